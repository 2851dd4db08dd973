"""Settings of the align stage: defaults of the paper, ablation, settings without effect."""

from typing import Any

import pytest

from alignrec.align import ABLATION, STAGE
from alignrec.align.schedule import Selection, learning_rate
from alignrec.errors import UserError


def test_the_defaults_are_those_of_the_paper() -> None:
    config = STAGE.load_config({})
    assert (config.embedding_dim, config.layers, config.temperature) == (64, 2, 0.2)
    assert (config.uia_weight, config.l2_weight, config.batch_size) == (0.1, 1e-4, 2048)
    assert (config.epochs, config.patience, config.evaluate_every) == (1000, 30, 1)


def test_the_ablation_takes_over_settings_but_not_content() -> None:
    config = ABLATION.load_config({"mode": "sampled", "cca_weight": 0.3, "num_similar": 4})
    assert not config.content
    assert config.similar_neighbors == ()
    assert STAGE.load_config({"mode": "sampled", "num_similar": 4}).similar_neighbors == (4,)


def test_neighbors_default_to_one_number_a_layer() -> None:
    assert STAGE.load_config({"mode": "sampled", "layers": 3}).neighbors == (10, 10, 10)
    config = STAGE.load_config({"mode": "sampled", "num_neighbors": [-1, 5]})
    assert config.neighbors == (-1, 5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"num_neighbors": [5, 5]}, "num_neighbors.* has no effect in mode full"),
        ({"num_similar": 5}, "num_similar=5 has no effect in mode full"),
        ({"num_ranks": 2}, "num_ranks=2 has no effect in mode full"),
        ({"cache_bytes": 0}, "cache_bytes=0 has no effect in mode full"),
        ({"sample_cache_bytes": 1}, "sample_cache_bytes=1 has no effect in mode full"),
        ({"mode": "sampled", "num_neighbors": [5]}, "has 1 hops, but layers=2"),
        ({"mode": "sampled", "num_neighbors": [5, 0]}, "0 neighbours cannot be sampled"),
        ({"mode": "sampled", "num_similar": 0}, "num_similar: 0 neighbours"),
        ({"mode": "sampled", "paper_compatible": True}, "trains the whole feature table"),
        ({"mode": "sampled", "edge_dropout": 0.2}, "no effect.*--set align.edge_dropout=0\\)"),
        ({"evaluate_users": 0}, "out of range"),
        ({"edge_dropout": 1.0}, "out of range"),
        ({"temperature": 0.001}, "out of range"),
        ({"learnin_rate": 1}, "Did you mean learning_rate"),
    ],
)
def test_a_setting_without_effect_or_out_of_range_is_an_error(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        STAGE.load_config(section)


def test_the_number_of_ranks_does_not_make_a_result_stale() -> None:
    one, two = (STAGE.load_config({"mode": "sampled", "num_ranks": n}) for n in (1, 2))
    assert STAGE.fingerprint(one, {}) == STAGE.fingerprint(two, {})
    other = STAGE.load_config({"mode": "sampled", "seed": 1})
    assert STAGE.fingerprint(one, {}) != STAGE.fingerprint(other, {})


def test_users_that_are_judged_count_and_rows_of_the_history_do_not() -> None:
    plain = STAGE.fingerprint(STAGE.load_config({}), {})
    assert STAGE.fingerprint(STAGE.load_config({"log_steps": 7}), {}) == plain
    assert STAGE.fingerprint(STAGE.load_config({"evaluate_users": 7}), {}) != plain


def test_the_learning_rate_decays_by_four_percent_in_fifty_epochs() -> None:
    config = STAGE.load_config({"learning_rate": 0.5})
    assert learning_rate(config, 0) == 0.5
    assert learning_rate(config, 50) == pytest.approx(0.48)
    assert learning_rate(config, 25) == pytest.approx(0.5 * 0.96**0.5)


def test_selection_keeps_the_first_of_equal_evaluations_and_counts_since() -> None:
    selection = Selection()
    offered = [selection.offer({"m": value}, by="m", epoch=e) for e, value in enumerate([0, 2, 2])]
    assert offered == [True, True, False]
    assert (selection.epoch, selection.stale, selection.metrics) == (1, 1, {"m": 2})
    assert selection.offer({"m": 3}, by="m", epoch=3)
    assert selection.stale == 0
