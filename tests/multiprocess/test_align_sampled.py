"""Sampled training on several ranks: full fanout is the full graph, ranks change nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignrec import checkpoint
from alignrec.align.config import AlignConfig
from alignrec.align.full_graph import FullGraphTrainer
from alignrec.align.inputs import Inputs
from alignrec.align.sampled import SampledTrainer
from alignrec.artifacts import Draft
from alignrec.distributed.process_group import Rank, process_group
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess

NUM_USERS, NUM_ITEMS = 40, 30
FULL = AlignConfig(
    embedding_dim=8, batch_size=100_000, learning_rate=0.01, cca_weight=0.3, reg_weight=0.2, seed=5
)
# One step an epoch reads every node, so that Adam at the owners is Adam.
EXACT = dataclasses.replace(FULL, mode="sampled", num_neighbors=(-1, -1), num_similar=-1)
SAMPLED = dataclasses.replace(EXACT, batch_size=60, num_neighbors=(3, 2), num_similar=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("align")
    dataset = write_dataset(root / "dataset", num_items=NUM_ITEMS, num_users=NUM_USERS)
    features = write_features(root / "features", num_items=NUM_ITEMS, zero_rows=(3,))
    graph = write_graph(root / "graph", dataset=dataset, features=features, k=4, num_partitions=4)
    return {"dataset": dataset, "features": features, "graph": graph}


def train_full(folders: dict[str, Path], config: AlignConfig, epochs: int, out: Path) -> Any:
    trainer = FullGraphTrainer(config, Inputs.open(folders), Rank())
    losses = [
        {name: float(term) for name, term in terms.items()}
        for epoch in range(epochs)
        for terms in trainer.steps(epoch, 0)
    ]
    metrics = trainer.evaluate()
    trainer.keep_best()
    trainer.write_best(Draft(out))
    return losses, metrics


def train_sampled(
    folders: dict[str, Path],
    config: AlignConfig,
    steps: tuple[int, int],
    out: Path,
    checkpoints: Path,
    save: bool = False,
) -> Any:
    """Take steps ``steps[0]`` .. ``steps[1] - 1`` and write the result, on this rank."""
    with process_group(timeout_seconds=60) as rank:
        out.mkdir(exist_ok=True)
        trainer = SampledTrainer(config, Inputs.open(folders), rank, work=out)
        if steps[0]:
            saved = checkpoint.latest(checkpoints)
            assert saved is not None
            assert trainer.restore(saved) == {"mark": 7}
        losses = []
        done = steps[0]
        while done < steps[1]:
            epoch, first = divmod(done, trainer.num_steps)
            for terms in trainer.steps(epoch, first):
                losses.append({name: float(term) for name, term in terms.items()})
                done += 1
                if done == steps[1]:
                    break
        metrics = trainer.evaluate()
        trainer.keep_best()
        if save:
            trainer.save(checkpoints, done, {"mark": 7})
        trainer.write_best(Draft(out))
        return losses, metrics


def same_files(one: Path, other: Path, name: str, tolerance: float) -> None:
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=tolerance)


@pytest.mark.parametrize("content", [True, False], ids=["content", "id_only"])
def test_full_fanout_on_1_2_and_3_ranks_is_full_graph_training(
    folders: dict[str, Path], tmp_path: Path, content: bool
) -> None:
    reference = tmp_path / "full"
    reference.mkdir()
    full = dataclasses.replace(FULL, content=content)
    losses, metrics = train_full(folders, full, 3, reference)
    exact = dataclasses.replace(EXACT, content=content)
    for ranks in (1, 2, 3):
        out = tmp_path / f"ranks{ranks}"
        for found, found_metrics in run_ranks(
            train_sampled, ranks, folders, exact, (0, 3), out, tmp_path / "none"
        ):
            for mine, wanted in zip(found, losses, strict=True):
                assert mine == pytest.approx(wanted, abs=1e-5)
            assert found_metrics == pytest.approx(metrics)
        scores = [
            (tables := load_file(folder / "embeddings.safetensors"))["user"] @ tables["item"].T
            for folder in (out, reference)
        ]
        torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)
        same_files(out, reference, "model.safetensors", 1e-5)


def test_the_number_of_ranks_changes_neither_samples_nor_steps(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    alone = train_sampled(folders, SAMPLED, (0, 5), tmp_path / "1", tmp_path / "none")
    for losses, metrics in run_ranks(
        train_sampled, 2, folders, SAMPLED, (0, 5), tmp_path / "2", tmp_path / "none"
    ):
        for mine, wanted in zip(losses, alone[0], strict=True):
            assert mine == pytest.approx(wanted, abs=1e-5)
        assert metrics == pytest.approx(alone[1])
    same_files(tmp_path / "1", tmp_path / "2", "model.safetensors", 1e-4)


def test_a_checkpoint_continues_bit_equal_on_as_many_ranks_and_on_any_other_number(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    saved = tmp_path / "checkpoints"
    run_ranks(train_sampled, 2, folders, SAMPLED, (0, 7), tmp_path / "whole", tmp_path / "none")
    run_ranks(train_sampled, 2, folders, SAMPLED, (0, 3), tmp_path / "half", saved, True)
    for ranks in (1, 2, 3):
        out = tmp_path / f"resumed{ranks}"
        run_ranks(train_sampled, ranks, folders, SAMPLED, (3, 7), out, saved)
        same_files(out, tmp_path / "whole", "model.safetensors", 0 if ranks == 2 else 1e-4)
        same_files(out, tmp_path / "whole", "embeddings.safetensors", 0 if ranks == 2 else 1e-4)
    assert load_file(out / "embeddings.safetensors")["user"].isfinite().all()
