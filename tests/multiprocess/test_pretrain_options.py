"""Options of pretraining change what they say and nothing else, under every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignrec import artifacts, configuration
from alignrec.distributed.process_group import barrier, process_group
from alignrec.pretrain import training
from alignrec.pretrain.compilation import compile_layers
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.encoder import save_encoder
from alignrec.pretrain.engine import deepspeed_group
from alignrec.pretrain.objective import build_model
from alignrec.pretrain.tokenizer import TOKENIZER, load_words
from alignrec.telemetry import read_history
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER, context_of, run_until
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess

NUM_STEPS = 5
DECAY = 0.6
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "encoder": {**TINY_ENCODER, "max_text_tokens": 20},
    "tokenizer": {"vocabulary_size": 320},
    "max_steps": NUM_STEPS,
    "valid_fraction": 0.1,
    "global_batch_size": 8,
    "learning_rate": 5e-3,
    "log_steps": 1,
    "checkpoint_steps": 2,
    "timeout_seconds": 60,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    return write_dataset(
        folder, num_items=32, image_size=16, without_image=(4, 7), without_text=(5, 7)
    )


def make_config(**changes: Any) -> PretrainConfig:
    return configuration.build(PretrainConfig, {**SETTINGS, **changes}, section="pretrain")


def pretrain(dataset: Path, output: Path, **changes: Any) -> None:
    """Run the stage on this rank."""
    config = make_config(**changes)
    training.run(config, context_of(config, dataset, output))


def pretrain_until(dataset: Path, output: Path, step: int, **changes: Any) -> None:
    run_until(make_config(**changes), dataset, output, step=step)


@pytest.fixture(scope="module")
def folder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that the tests compare: processes are started as seldom as possible."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(on_one_rank, 1, dataset, folder, timeout_seconds=300)
    run_ranks(on_two_ranks, 2, dataset, folder, timeout_seconds=300)
    return folder


def on_one_rank(dataset: Path, folder: Path) -> None:
    with process_group() as _, deepspeed_group():
        pretrain(dataset, folder / "plain", zero_stage=0)
        with pytest.MonkeyPatch.context() as patch:
            record_weights(patch, folder / "recorded.pt")
            pretrain(dataset, folder / "averaged", zero_stage=0, ema_decay=DECAY)
        kept = {"max_steps": 6, "checkpoint_steps": 1, "keep_checkpoints": 3}
        pretrain_until(dataset, folder / "kept", 5, **kept)
        start_from_a_checkpoint(dataset, folder)


def record_weights(patch: pytest.MonkeyPatch, target: Path) -> None:
    """Keep the encoder's weights before the first and after every step."""
    seen: list[dict[str, torch.Tensor]] = []
    resume, average = training.Trainer.resume, training.Engine.average

    def keep(engine: training.Engine) -> None:
        seen.append({name: t.clone() for name, t in engine.parameters()})
        torch.save(seen, target)

    def resumed(self: training.Trainer) -> None:
        resume(self)
        keep(self.engine)

    def averaged(self: training.Engine, step: int) -> None:
        average(self, step)
        keep(self)

    patch.setattr(training.Trainer, "resume", resumed)
    patch.setattr(training.Engine, "average", averaged)


def start_from_a_checkpoint(dataset: Path, folder: Path) -> None:
    """Train at rate 0 from weights with more token embeddings than the tokenizer has tokens."""
    tokenizer = folder / "plain" / TOKENIZER
    words = load_words(tokenizer, max_length=20)
    config = configuration.build(PretrainConfig, SETTINGS, section="pretrain")
    architecture = config.encoder.architecture(words.vocabulary_size + 6)
    encoder = build_model(architecture, config.objective, seed=8).encoder
    (folder / "given").mkdir()
    save_encoder(architecture, folder / "given", dict(encoder.state_dict()))
    given = {
        "initial": {"checkpoint": str(folder / "given")},
        "tokenizer": {"path": str(tokenizer)},
        "learning_rate": 0.0,
    }
    pretrain_until(dataset, folder / "started", 3, **given)
    pretrain(dataset, folder / "started", **given)


def on_two_ranks(dataset: Path, folder: Path) -> None:
    # ZeRO-3 comes last: it replaces torch's linear function for the rest of the process.
    with process_group(timeout_seconds=60) as rank, deepspeed_group():
        for stage in (0, 2, 3):
            changes = {"zero_stage": stage, "ema_decay": DECAY, "layer_decay": 0.5}
            pretrain(dataset, folder / f"both_{stage}", **changes)
            if stage == 0:
                continue
            pretrain(dataset, folder / f"stage_{stage}", zero_stage=stage)
            pretrain(
                dataset,
                folder / f"recomputed_{stage}",
                zero_stage=stage,
                activation_checkpointing=True,
            )
            pretrain_until(dataset, folder / f"both_resumed_{stage}", 3, **changes)
            barrier(rank)
            pretrain(dataset, folder / f"both_resumed_{stage}", **changes)
        for stage, offload in ((2, "optimizer"), (3, "parameters")):
            changes = {"zero_stage": stage, "offload": offload}
            pretrain(dataset, folder / f"offloaded_{stage}", **changes)
            pretrain_until(dataset, folder / f"offloaded_resumed_{stage}", 3, **changes)
            barrier(rank)
            pretrain(dataset, folder / f"offloaded_resumed_{stage}", **changes)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "encoder.safetensors")


def losses(output: Path) -> list[float]:
    rows = read_history(output)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    return [row["loss"] for row in rows]


def assert_equal(first: Path, second: Path) -> None:
    assert losses(first) == losses(second)
    reference = weights(second)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, reference[name]), name


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputed_layers_train_to_the_same_weights(folder: Path, stage: int) -> None:
    assert_equal(folder / f"recomputed_{stage}", folder / f"stage_{stage}")


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_changes_nothing(folder: Path, stage: int) -> None:
    assert losses(folder / f"offloaded_{stage}") == pytest.approx(
        losses(folder / f"stage_{stage}"), abs=5e-6
    )


def test_the_encoder_is_the_average_of_the_weights_after_each_step(folder: Path) -> None:
    recorded = torch.load(folder / "recorded.pt", weights_only=True)
    assert len(recorded) == 1 + NUM_STEPS
    assert losses(folder / "averaged") == losses(folder / "plain")  # training goes on as without
    averaged, last = weights(folder / "averaged"), weights(folder / "plain")
    moved = 0.0
    for name, tensor in averaged.items():
        expected = recorded[0][f"encoder.{name}"]
        for step in range(1, 1 + NUM_STEPS):
            decay = min(DECAY, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * recorded[step][f"encoder.{name}"]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
        moved = max(moved, float((tensor - last[name]).abs().max()))
    assert moved > 1e-4


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["both", "offloaded"])
def test_a_stop_changes_no_bit(folder: Path, name: str, stage: int) -> None:
    assert_equal(folder / f"{name}_resumed_{stage}", folder / f"{name}_{stage}")


@pytest.mark.parametrize("stage", [2, 3])
def test_average_and_layer_rates_do_not_depend_on_the_zero_stage(folder: Path, stage: int) -> None:
    expected = losses(folder / "both_0")
    assert losses(folder / f"both_{stage}") == pytest.approx(expected, abs=5e-6)
    reference = weights(folder / "both_0")
    for name, tensor in weights(folder / f"both_{stage}").items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=2e-4)
    held_out = [
        artifacts.read(folder / f"both_{number}").facts["held_out"] for number in (0, stage)
    ]
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-3)  # judged with the average, too


def test_only_the_newest_checkpoints_stay(folder: Path) -> None:
    checkpoints = folder / "kept.partial" / "work" / "checkpoints"
    steps = sorted(int(path.name.removeprefix("step_")) for path in checkpoints.iterdir())
    assert steps == [3, 4, 5]


def test_training_starts_from_the_given_weights_and_resumes(folder: Path) -> None:
    given = weights(folder / "given")
    started = weights(folder / "started")
    assert started.keys() == given.keys()
    for name, tensor in started.items():
        assert torch.equal(tensor, given[name]), name


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    # in a process of its own: shapes are not checked at every call there
    if fault := run_ranks(compare_compiled, 1, timeout_seconds=600)[0]:
        pytest.skip(fault)


def compare_compiled() -> str | None:
    config = configuration.build(PretrainConfig, {**SETTINGS, "compile": True}, section="pretrain")
    architecture = config.encoder.architecture(50)
    compiled, plain = (build_model(architecture, config.objective, seed=0) for _ in range(2))
    if fault := compile_layers(compiled, config):
        return fault
    assert list(compiled.state_dict()) == list(plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    for length in (9, 13):
        inputs = (
            torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=generator),
            torch.tensor([True, False, True]),
            torch.randint(0, 50, (3, length), generator=generator),
            torch.zeros(3, length, dtype=torch.bool),
            torch.rand(3, 16, generator=generator) < 0.4,
        )
        outputs = [torch.cat(m.encoder(*inputs), dim=1) for m in (compiled, plain)]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
        for output in outputs:
            output.square().mean().backward()
    expected = dict(plain.encoder.named_parameters())
    for name, parameter in compiled.encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-5)
    return None
