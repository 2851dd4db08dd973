"""The plan of a run: what it counts, what it refuses, and that it trains nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignrec import configuration
from alignrec.pretrain import planning
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.encoder import save_encoder
from alignrec.pretrain.memory import Memory, memory_per_rank
from alignrec.pretrain.objective import build_model
from alignrec.pretrain.tokenizer import load_words, write_tokenizer
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER
from alignrec.testing.towers import write_bert, write_vit

SETTINGS = [
    "pretrain.encoder.num_layers=1",
    "pretrain.encoder.width=16",
    "pretrain.encoder.num_heads=2",
    "pretrain.encoder.hidden=16",
    "pretrain.encoder.image_size=16",
    "pretrain.encoder.patch_size=4",
    "pretrain.tokenizer.vocabulary_size=320",
    "pretrain.global_batch_size=12",
    "pretrain.micro_batch_size=3",
    "pretrain.num_ranks=2",
    "pretrain.epochs=3",
    "pretrain.valid_fraction=0",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", num_items=40)


def command(dataset: Path, *settings: str, json_output: bool = True) -> list[str]:
    assignments = [part for s in (*SETTINGS, *settings) for part in ("--set", s)]
    return ["--dataset", str(dataset), *assignments, *(["--json"] if json_output else [])]


def test_the_plan_counts_what_a_run_would_do(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(dataset.parent.iterdir())
    assert planning.main(command(dataset)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["num_items"], found["num_held_out"]) == (40, 0)
    assert (found["steps_per_epoch"], found["num_steps"]) == (4, 12)
    assert (found["micro_batch_size"], found["accumulation"]) == (3, 2)
    assert found["patches_per_epoch"] == 40 * 16
    assert 40 * 3 < found["text_tokens_per_epoch"] < 40 * 128
    assert found["num_encoder_parameters"] < found["num_parameters"]
    assert set(found["memory"]) == {"0", "1", "2", "3"}
    assert sorted(dataset.parent.iterdir()) == before
    assert planning.main(command(dataset, json_output=False)) == 0
    shown = capsys.readouterr().out
    assert "12 steps (4 an epoch) of 12 = 3 x 2 x 2 ranks" in shown
    assert shown.count("<- pretrain.zero_stage") == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pretrain.num_ranks=13", "global_batch_size=12 is less than 13 ranks"),
        ("pretrain.offload=parameters", "has no effect under pretrain.zero_stage=2"),
        ("pretrain.layer_dekay=0.5", "Did you mean layer_decay"),
        ("pretrain.tokenizer.path=absent.json", "absent.json is no tokenizer.json"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    dataset: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    settings = ["pretrain.tokenizer.vocabulary_size=4096"] if "path" in setting else []
    assert planning.main(command(dataset, *settings, setting)) == 2
    assert message in capsys.readouterr().err


def given_weights(dataset: Path, folder: Path, *, num_layers: int) -> list[str]:
    """Write a tokenizer and an encoder's weights; returns the settings that name them."""
    (folder / "encoder").mkdir()
    section = {
        "encoder": {**TINY_ENCODER, "hidden": 16, "num_layers": num_layers},
        "tokenizer": {"vocabulary_size": 300},
    }
    config = configuration.build(PretrainConfig, section, section="pretrain")
    write_tokenizer(dataset, config, folder / "tokenizer.json")
    words = load_words(folder / "tokenizer.json", max_length=128)
    architecture = config.encoder.architecture(words.vocabulary_size + 2)
    encoder = build_model(architecture, config.objective, seed=0).encoder
    save_encoder(architecture, folder / "encoder", dict(encoder.state_dict()))
    return [
        "pretrain.tokenizer.vocabulary_size=4096",
        f"pretrain.tokenizer.path={folder / 'tokenizer.json'}",
        f"pretrain.initial.checkpoint={folder / 'encoder'}",
    ]


def test_weights_that_do_not_fit_are_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = given_weights(dataset, tmp_path, num_layers=2)
    assert planning.main(command(dataset, *settings)) == 2
    assert "do not fit pretrain.encoder" in capsys.readouterr().err
    assert planning.main(command(dataset, *settings, "pretrain.encoder.num_layers=2")) == 0


def test_towers_without_weights_are_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    towers = {"vision": write_vit(tmp_path / "vit"), "text": write_bert(tmp_path / "bert")}
    settings = ["pretrain.tokenizer.vocabulary_size=4096", "pretrain.encoder.kind=towers"]
    settings += [f"pretrain.encoder.{name}={folder}" for name, folder in towers.items()]
    assert planning.main(command(dataset, *settings)) == 0
    (tmp_path / "bert" / "model.safetensors").unlink()
    assert planning.main(command(dataset, *settings)) == 2
    assert "no weights that can be read as safetensors" in capsys.readouterr().err


def test_a_cache_that_is_too_small_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = "pretrain.loader.shards."
    settings = [f"{shards}root=memory://shop", f"{shards}cache_folder={tmp_path / 'cache'}"]
    assert planning.main(command(dataset, *settings, f"{shards}cache_bytes=1000")) == 2
    assert "cache_bytes=1000 holds less than" in capsys.readouterr().err
    assert planning.main(command(dataset, *settings)) == 0
    assert not list(tmp_path.iterdir())


def test_uneven_batches_are_shown(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["pretrain.num_ranks=5", "pretrain.micro_batch_size=2"]
    assert planning.main(command(dataset, *settings, json_output=False)) == 0
    assert "of 12 in at most 2 x 2 x 5 ranks = 20" in capsys.readouterr().out


def base(**changes: Any) -> Memory:
    """BEiT-3 base on 8 ranks."""
    section = {
        "encoder": {"size": "base", "image_size": 224},
        "global_batch_size": 64,
        **changes,
    }
    config = configuration.build(PretrainConfig, section, section="pretrain")
    return memory_per_rank(
        config,
        config.encoder.architecture(64_010),
        num_parameters=280_000_000,
        largest=64_010 * 768,
        num_ranks=8,
    )


def test_what_zero_divides_is_divided() -> None:
    stages = [base(zero_stage=number) for number in range(4)]
    assert [m.parameters for m in stages[:3]] == [4 * 280_000_000] * 3
    assert [m.moments for m in stages] == [8 * 280_000_000, *[280_000_000] * 3]
    assert stages[0].master == 0
    assert len({m.activations for m in stages}) == 1
    assert stages[0].peak > stages[1].peak == stages[2].peak  # nothing is accumulated
    accumulated = [base(zero_stage=number, micro_batch_size=1) for number in (1, 2)]
    assert accumulated[0].peak > accumulated[1].peak


def test_options_save_what_they_promise() -> None:
    plain = base(zero_stage=2)
    assert base(zero_stage=2, activation_checkpointing=True).activations < plain.activations / 4
    assert base(zero_stage=2, precision="bf16").parameters == plain.parameters // 2
    assert base(zero_stage=2, micro_batch_size=2).activations < plain.activations / 3
    assert base(zero_stage=2, ema_decay=0.9).moments == plain.moments * 3 // 2
    assert plain.host == 0
    gradients = parameters = plain.master  # of the rank's share, on their way
    expected = plain.master + plain.moments + gradients + parameters
    assert base(zero_stage=2, offload="optimizer").host == expected
