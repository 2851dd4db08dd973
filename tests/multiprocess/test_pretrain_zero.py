"""Every ZeRO stage on two ranks follows plain AdamW; stopped runs go on as if never stopped."""

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignrec import checkpoint, configuration
from alignrec.distributed.process_group import barrier, process_group
from alignrec.errors import StageFailure
from alignrec.pretrain import STAGE, training
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import open_training_data
from alignrec.pretrain.engine import deepspeed_group, parameter_groups
from alignrec.pretrain.objective import build_model
from alignrec.pretrain.schedule import learning_rate
from alignrec.pretrain.tokenizer import TOKENIZER, load_words
from alignrec.stage import Context
from alignrec.telemetry import read_history
from alignrec.testing.datasets import write_dataset
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess

NUM_STEPS = 6
# The last batch of an epoch is short, so the second rank's last micro batch is empty.
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "encoder": {
        "num_layers": 2,
        "width": 16,
        "num_heads": 2,
        "hidden": 24,
        "image_size": 16,
        "patch_size": 4,
        "max_text_tokens": 20,
    },
    "tokenizer": {"vocabulary_size": 320},
    "max_steps": NUM_STEPS,
    "epochs": 3,
    "valid_fraction": 0.1,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "learning_rate": 5e-3,
    "log_steps": 1,
    "checkpoint_steps": 2,
    "timeout_seconds": 30,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    return write_dataset(
        folder, num_items=32, image_size=16, without_image=(4, 7), without_text=(5, 7)
    )


def make_config(**changes: Any) -> PretrainConfig:
    return configuration.build(PretrainConfig, {**SETTINGS, **changes}, section="pretrain")


def make_context(dataset: Path, output: Path, config: PretrainConfig) -> Context:
    inputs = {"dataset": dataset}
    return Context(
        inputs=inputs,
        output=output,
        fingerprint=STAGE.fingerprint(config, inputs),
        log_dir=output.with_name(output.name + ".logs"),
    )


def pretrain(dataset: Path, output: Path, **changes: Any) -> None:
    """Run the stage on this rank."""
    config = make_config(**changes)
    training.run(config, make_context(dataset, output, config))


def pretrain_until(dataset: Path, output: Path, step: int, **changes: Any) -> None:
    """Run the stage, but vanish right after a step, as after a SIGKILL between two checkpoints."""
    original = training.Trainer._one_step

    def one_step(self: training.Trainer, batches: Any) -> dict[str, float]:
        if self.step == step:
            raise _VanishedError
        return original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "_one_step", one_step)
        with contextlib.suppress(_VanishedError):
            pretrain(dataset, output, **changes)


class _VanishedError(Exception):
    pass


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank, ZeRO-0, whole batches: what the others are compared with."""
    output = tmp_path_factory.mktemp("plain") / "encoder"
    run_ranks(pretrain_plainly, 1, dataset, output)
    return output


def pretrain_plainly(dataset: Path, output: Path) -> None:
    pretrain(dataset, output, zero_stage=0, micro_batch_size=8)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "encoder.safetensors")


def losses(output: Path) -> list[float]:
    rows = read_history(output)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    return [row["loss"] for row in rows]


def test_the_plain_run_is_torch_adamw_on_the_global_batches(dataset: Path, plain: Path) -> None:
    config = make_config(micro_batch_size=8)
    words = load_words(plain / TOKENIZER, max_length=20)
    data = open_training_data(dataset, config, words, num_ranks=1)
    model = build_model(
        config.encoder.architecture(words.vocabulary_size),
        config.objective,
        seed=config.seed,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), betas=(config.beta1, config.beta2)
    )
    expected = []
    for step in range(NUM_STEPS):
        batch = data.training_batch(data.plan.global_batch(step))
        num_words, num_patches = batch.counts().tolist()
        sums, _ = model(batch)
        loss = (sums * torch.tensor([1 / num_words, 1 / num_patches] * 2)).sum()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step=step, num_steps=NUM_STEPS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        optimizer.step()
        expected.append(loss.item())
    assert losses(plain) == pytest.approx(expected, abs=2e-6)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, model.encoder.state_dict()[name], rtol=0, atol=2e-5)


def test_each_zero_stage_on_two_ranks_follows_the_plain_run(
    dataset: Path, plain: Path, tmp_path: Path
) -> None:
    run_ranks(pretrain_with_each_stage, 2, dataset, tmp_path)
    reference = weights(plain)
    for stage in (0, 1, 2, 3):
        output = tmp_path / str(stage)
        assert losses(output) == pytest.approx(losses(plain), abs=5e-6)
        for name, tensor in weights(output).items():
            torch.testing.assert_close(tensor, reference[name], rtol=0, atol=5e-5)


def pretrain_with_each_stage(dataset: Path, folder: Path) -> None:
    with process_group(timeout_seconds=60), deepspeed_group():
        for stage in (0, 1, 2, 3):
            pretrain(dataset, folder / str(stage), zero_stage=stage)


def pretrain_with_stage(dataset: Path, output: Path, stage: int) -> None:
    pretrain(dataset, output, zero_stage=stage)


def test_a_stopped_run_goes_on_as_if_never_stopped(dataset: Path, tmp_path: Path) -> None:
    run_ranks(stop_and_resume, 2, dataset, tmp_path)
    whole = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "same").items():
        assert torch.equal(tensor, whole[name]), name  # bit for bit
    assert losses(tmp_path / "same") == losses(tmp_path / "whole")
    for other in ("stage_3", "stage_0", "bf16"):
        twin = whole if other != "bf16" else weights(tmp_path / "whole_bf16")
        limit = 5e-5 if other != "bf16" else 0.0
        for name, tensor in weights(tmp_path / other).items():
            torch.testing.assert_close(tensor, twin[name], rtol=0, atol=limit)


def stop_and_resume(dataset: Path, folder: Path) -> None:
    with process_group(timeout_seconds=60) as rank, deepspeed_group():
        pretrain(dataset, folder / "whole", zero_stage=2)
        pretrain(dataset, folder / "whole_bf16", zero_stage=2, precision="bf16")
        pretrain_until(dataset, folder / "bf16", 5, zero_stage=2, precision="bf16")
        barrier(rank)
        pretrain(dataset, folder / "bf16", zero_stage=2, precision="bf16")
        # ZeRO-3 comes last: it replaces torch's linear function for the rest of the process
        for name, first, second in [("same", 2, 2), ("stage_0", 1, 0), ("stage_3", 0, 3)]:
            pretrain_until(dataset, folder / name, 3, zero_stage=first)
            barrier(rank)
            pretrain(dataset, folder / name, zero_stage=second)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    dataset: Path, plain: Path, tmp_path: Path, before: int, after: int
) -> None:
    output = tmp_path / "encoder"
    run_ranks(pretrain_three_steps, before, dataset, output)
    found = checkpoint.latest(output.with_name("encoder.partial") / "work" / training.CHECKPOINTS)
    assert found is not None
    assert (found.step, found.world_size) == (2, before)
    run_ranks(pretrain_with_stage, after, dataset, output, 2)
    assert losses(output) == pytest.approx(losses(plain), abs=5e-6)
    reference = weights(plain)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=5e-5)


def pretrain_three_steps(dataset: Path, output: Path) -> None:
    pretrain_until(dataset, output, 3)


def test_a_loss_that_is_no_number_is_reported_with_step_and_items(
    dataset: Path, tmp_path: Path
) -> None:
    messages = run_ranks(diverge, 2, dataset, tmp_path / "encoder")
    for message in messages:
        assert "not a number at step" in message
        assert "item_index" in message
        assert "learning_rate" in message


def diverge(dataset: Path, output: Path) -> str:
    with pytest.raises(StageFailure) as failure:
        pretrain(dataset, output, learning_rate=1e30, warmup_fraction=0.0, max_gradient_norm=0.0)
    return str(failure.value)


def test_the_death_of_a_peer_is_reported_by_rank(dataset: Path, tmp_path: Path) -> None:
    results = run_ranks(lose_a_peer, 2, dataset, tmp_path / "encoder")
    assert "rank 0 of 2 lost a peer while pretraining" in results[0]


def lose_a_peer(dataset: Path, output: Path) -> str:
    if int(os.environ["RANK"]) == 1:
        pretrain_until(dataset, output, 3)
        return "gone"
    with pytest.raises(StageFailure) as failure:
        pretrain(dataset, output)
    return str(failure.value)
