"""Every ZeRO stage on two ranks follows plain AdamW; stopped runs go on as if never stopped."""

import contextlib
import io
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignrec import artifacts, configuration
from alignrec.data.loader import Loader
from alignrec.distributed.process_group import Rank, barrier, process_group
from alignrec.errors import StageFailure
from alignrec.pretrain import training
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import open_training_data
from alignrec.pretrain.engine import deepspeed_group
from alignrec.pretrain.objective import build_model
from alignrec.pretrain.optimizer import parameter_groups
from alignrec.pretrain.schedule import learning_rate
from alignrec.pretrain.tokenizer import TOKENIZER, load_words
from alignrec.pretrain.training import CHECKPOINTS
from alignrec.pretrain.word_vectors import read_text_head, read_word_vectors, write_word_vectors
from alignrec.telemetry import read_history
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER, context_of, run_until
from alignrec.testing.processes import free_port, run_ranks

pytestmark = pytest.mark.multiprocess

NUM_STEPS = 6
NOT_A_NUMBER = r"not a number at step \d+ \(among item_index \d+.*learning_rate"
# The last batch of an epoch is short, so the second rank's last micro batch is empty.
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "encoder": {**TINY_ENCODER, "max_text_tokens": 20},
    "tokenizer": {"vocabulary_size": 320},
    "objective": {"image_weight": 0.5, "summary_weight": 0.8},
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
    run_ranks(on_one_rank, 1, dataset, folder)
    run_ranks(on_two_ranks, 2, dataset, folder, timeout_seconds=300)
    run_ranks(on_four_ranks_and_three, 4, dataset, folder, free_port(), timeout_seconds=300)
    run_ranks(on_one_rank_again, 1, dataset, folder)
    return folder


def on_one_rank(dataset: Path, folder: Path) -> None:
    """Write "plain": ZeRO-0, whole batches; and do the first step of "chain"."""
    with process_group() as _, deepspeed_group():
        pretrain(dataset, folder / "plain", zero_stage=0, micro_batch_size=8)
        pretrain_until(dataset, folder / "chain", 1, checkpoint_steps=1)


def on_two_ranks(dataset: Path, folder: Path) -> None:
    # ZeRO-3 comes last: it replaces torch's linear function for the rest of the process.
    with process_group(timeout_seconds=60) as rank, deepspeed_group():
        with pytest.raises(StageFailure, match=NOT_A_NUMBER):
            pretrain(dataset, folder / "nan", learning_rate=1e30, max_gradient_norm=0.0)
        pretrain_until(dataset, folder / "two_to_one", 3, micro_batch_size=None)
        pretrain_until(dataset, folder / "chain", 2, checkpoint_steps=1)
        for stage in (1, 2):
            in_bf16(dataset, folder, stage, rank)
        for stage in (0, 1, 2, 3):
            with pytest.MonkeyPatch.context() as patch:
                if rank.index == 1:
                    patch.setattr(Loader, "_next", waiting_long)
                pretrain(dataset, folder / f"stage_{stage}", zero_stage=stage)
            pretrain_until(dataset, folder / f"resumed_{stage}", 3, zero_stage=stage)
            barrier(rank)
            pretrain(dataset, folder / f"resumed_{stage}", zero_stage=stage)
        for stage in (0, 1, 2, 3):
            pretrain_until(dataset, folder / f"changed_{stage}", 3, zero_stage=(stage + 3) % 4)
            barrier(rank)
            pretrain(dataset, folder / f"changed_{stage}", zero_stage=stage)
        in_bf16(dataset, folder, 3, rank)


def in_bf16(dataset: Path, folder: Path, stage: int, rank: Rank) -> None:
    """Write "bf16_<stage>" and what it printed, and "bf16_resumed_<stage>"."""
    changes = {"zero_stage": stage, "precision": "bf16"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pretrain(dataset, folder / f"bf16_{stage}", **changes)
    (folder / f"printed_{stage}_{rank.index}").write_text(printed.getvalue())
    pretrain_until(dataset, folder / f"bf16_resumed_{stage}", 5, **changes)
    barrier(rank)
    pretrain(dataset, folder / f"bf16_resumed_{stage}", **changes)


def waiting_long(self: Loader[Any], waiting: Any) -> Any:
    """Return the next batch as if it had taken an hour."""
    self.wait_seconds += 3600
    return waiting.popleft().result()


def on_four_ranks_and_three(dataset: Path, folder: Path, port: int) -> None:
    """Do a step of "chain" on four ranks, and one on three, which do not divide the batch."""
    with process_group(timeout_seconds=60), deepspeed_group():
        pretrain_until(dataset, folder / "chain", 3, checkpoint_steps=1)
    os.environ.update(WORLD_SIZE="3", MASTER_PORT=str(port))
    if os.environ["RANK"] != "3":
        with process_group(timeout_seconds=60), deepspeed_group():
            pretrain_until(dataset, folder / "chain", 4, checkpoint_steps=1)


def on_one_rank_again(dataset: Path, folder: Path) -> None:
    with process_group() as _, deepspeed_group():
        pretrain(dataset, folder / "chain", checkpoint_steps=1)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            pretrain(dataset, folder / "two_to_one", micro_batch_size=None)
    (folder / "printed_two_to_one").write_text(printed.getvalue())


def assert_close_to_plain(folder: Path, name: str) -> None:
    """Losses agree to rounding; in weights, Adam divides tiny gradients by their own size."""
    assert losses(folder / name) == pytest.approx(losses(folder / "plain"), abs=5e-6)
    reference = weights(folder / "plain")
    for parameter, tensor in weights(folder / name).items():
        torch.testing.assert_close(tensor, reference[parameter], rtol=0, atol=2e-4)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "encoder.safetensors")


def losses(output: Path) -> list[float]:
    rows = read_history(output)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    return [row["loss"] for row in rows]


def test_the_plain_run_is_torch_adamw_on_the_global_batches(
    dataset: Path, folder: Path, tmp_path: Path
) -> None:
    plain = folder / "plain"
    config = make_config(micro_batch_size=8)
    words = load_words(plain / TOKENIZER, max_length=20)
    data = open_training_data(dataset, config, words, num_ranks=1)
    model = build_model(
        config.encoder.architecture(words.vocabulary_size),
        config.objective,
        seed=config.seed,
    )
    write_word_vectors(dataset, words, config, tmp_path / "vectors", width=16)
    model.encoder.text_embed.weight.data.copy_(read_word_vectors(tmp_path / "vectors"))
    model.load_state_dict(read_text_head(tmp_path / "vectors"), strict=False)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), betas=(config.beta1, config.beta2)
    )
    expected = []
    for step in range(NUM_STEPS):
        batch = data.training_batch(data.plan.global_batch(step))
        sums, _ = model(batch)
        weights_by_loss = torch.tensor([1.0, 0.5, 0.8, 0.4]) / batch.counts().float()
        loss = (sums * weights_by_loss).sum()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step=step, num_steps=NUM_STEPS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        optimizer.step()
        expected.append(loss.item())
    assert losses(plain) == pytest.approx(expected, abs=2e-6)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, model.encoder.state_dict()[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_zero_stage_on_two_ranks_follows_the_plain_run(folder: Path, stage: int) -> None:
    assert_close_to_plain(folder, f"stage_{stage}")


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [
        ("resumed_0", "stage_0"),
        ("resumed_1", "stage_1"),
        ("resumed_2", "stage_2"),
        ("resumed_3", "stage_3"),
        *((f"bf16_resumed_{stage}", f"bf16_{stage}") for stage in (1, 2, 3)),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(folder: Path, resumed: str, whole: str) -> None:
    assert losses(folder / resumed) == losses(folder / whole)
    reference = weights(folder / whole)
    for name, tensor in weights(folder / resumed).items():
        assert torch.equal(tensor, reference[name]), name


@pytest.mark.parametrize("name", [f"changed_{stage}" for stage in range(4)])
def test_a_run_goes_on_under_another_zero_stage(folder: Path, name: str) -> None:
    assert_close_to_plain(folder, name)


@pytest.mark.parametrize("name", ["chain", "two_to_one"])
def test_a_run_goes_on_with_another_number_of_ranks(folder: Path, name: str) -> None:
    assert_close_to_plain(folder, name)


def test_fewer_ranks_hold_no_larger_micro_batches(folder: Path) -> None:
    printed = (folder / "printed_two_to_one").read_text()
    assert "8 = 4 x 2 x 1 ranks" in printed
    assert "resumed after step 2" in printed
    assert artifacts.read(folder / "two_to_one").config["micro_batch_size"] is None


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_printed_but_by_the_stage(folder: Path, stage: int) -> None:
    printed = (folder / f"printed_{stage}_0").read_text().splitlines()
    assert printed
    assert all(line.startswith("[pretrain] ") for line in printed)
    assert not (folder / f"printed_{stage}_1").read_text()


def test_waiting_for_data_is_that_of_the_slowest_rank(folder: Path) -> None:
    rows = read_history(folder / "stage_0")
    assert min(row["data_wait_share"] for row in rows) > 1  # on_two_ranks has told an hour a batch
    assert max(row["data_wait_share"] for row in read_history(folder / "plain")) <= 1


def test_a_loss_that_is_no_number_leaves_no_artifact(folder: Path) -> None:
    assert not (folder / "nan").exists()  # on_two_ranks has checked the message
    assert (folder / "nan.partial").exists()


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


def test_what_is_not_finite_stops_the_run_and_is_not_kept(dataset: Path, tmp_path: Path) -> None:
    run_ranks(overflow, 2, dataset, tmp_path)
    assert len(list(tmp_path.glob("*.partial"))) == 9
    assert not list(tmp_path.glob(f"*.partial/{artifacts.WORK}/{CHECKPOINTS}/*"))


def overflow(dataset: Path, folder: Path) -> None:
    original = training.Engine.backward
    every_step = {"checkpoint_steps": 1}
    with process_group(timeout_seconds=60), deepspeed_group():
        for stage in (0, 2):  # decayed to minus infinity by a finite gradient
            settings = {"zero_stage": stage, "learning_rate": 1e38, "weight_decay": 1e38}
            with pytest.raises(StageFailure, match=r"\d+ tensors of .* not finite after step 1, "):
                pretrain(dataset, folder / f"decayed_{stage}", **settings, **every_step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                training.Engine, "backward", lambda self, loss: original(self, loss * math.inf)
            )
            cases = [("bf16", 1), ("bf16", 2), ("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3)]
            for precision, stage in cases:
                settings = {"zero_stage": stage, "precision": precision, **every_step}
                with pytest.raises(StageFailure, match=r"gradient is not finite at step 1, .*resh"):
                    pretrain(dataset, folder / f"{precision}_{stage}", **settings)
            with pytest.raises(StageFailure, match="gradient is not finite at step 1"):
                pretrain(dataset, folder / "unclipped", zero_stage=0, max_gradient_norm=0.0)


def test_a_run_that_only_had_to_be_published_has_no_speed(dataset: Path, tmp_path: Path) -> None:
    run_ranks(publish_later, 1, dataset, tmp_path / "encoder")
    facts = artifacts.read(tmp_path / "encoder").facts
    assert "samples_per_second" not in facts
    assert facts["num_ranks"] == 1


class _VanishedError(Exception):
    pass


def publish_later(dataset: Path, output: Path) -> None:
    def vanish(*_: Any) -> None:
        raise _VanishedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_publish", vanish)
        with pytest.raises(_VanishedError):
            pretrain(dataset, output)
    pretrain(dataset, output)
