"""Which held-out items are judged, and how far that is."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignrec import configuration
from alignrec.data.order import item_places
from alignrec.data.shards import SampleTable
from alignrec.distributed.process_group import Rank
from alignrec.pretrain import data as module
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import open_training_data, split_rows
from alignrec.pretrain.held_out import judge
from alignrec.pretrain.objective import build_model
from alignrec.pretrain.tokenizer import load_words, write_tokenizer
from alignrec.telemetry import Telemetry
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out") / "d"
    return write_dataset(folder, num_items=60, image_size=16, removed=(0, 7))


def make_config(**settings: Any) -> PretrainConfig:
    section = {
        "encoder": {**TINY_ENCODER, "max_text_tokens": 20},
        "tokenizer": {"vocabulary_size": 320},
        "valid_fraction": 0.4,
        **settings,
    }
    return configuration.build(PretrainConfig, section, section="pretrain")


def test_of_many_held_out_items_the_first_of_the_hash_order_are_judged(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, table = make_config(seed=2), SampleTable.read(dataset)
    whole = split_rows(table, config)
    assert np.array_equal(whole.judged, whole.held_out)
    assert sorted([*whole.train, *whole.held_out]) == list(range(58))
    monkeypatch.setattr(module, "_MAX_JUDGED", 10)
    capped = split_rows(table, config)
    assert np.array_equal(capped.held_out, whole.held_out)
    assert np.array_equal(capped.train, whole.train)
    places = item_places(table.item_index, seed=2)
    expected = whole.held_out[np.argsort(places[whole.held_out])[:10]]
    assert np.array_equal(capped.judged, np.sort(expected))


def test_judging_tells_how_far_it_is(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_MAX_JUDGED", 10)
    config = make_config()
    write_tokenizer(dataset, config, tmp_path / "tokenizer.json")
    words = load_words(tmp_path / "tokenizer.json", max_length=20)
    architecture = config.encoder.architecture(words.vocabulary_size)
    model = build_model(architecture, config.objective, seed=0)
    beats: list[int] = []
    with (
        contextlib.closing(open_training_data(dataset, config, words, num_ranks=1)) as data,
        Telemetry(tmp_path, "pretrain") as telemetry,
    ):
        judged = judge(
            SimpleNamespace(model=model, forward=model),  # type: ignore[arg-type]
            data,
            Rank(),
            batch_size=4,
            telemetry=telemetry,
            beat=lambda: beats.append(1),
        )
    assert judged["text_loss"] > 0
    assert len(beats) == 3
    assert "10/10 held-out items in" in capsys.readouterr().out
