"""Sampled training on several ranks: full fanout is the full graph, ranks change nothing."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignrec import checkpoint
from alignrec.align import row_file
from alignrec.align.config import AlignConfig
from alignrec.align.full_graph import FullGraphTrainer
from alignrec.align.inputs import Inputs
from alignrec.align.sampled import SampledTrainer
from alignrec.align.training import Trainer
from alignrec.artifacts import Draft
from alignrec.checkpoint import Checkpoint
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
# Two triples a step on average: steps in which one of two ranks, or each, has none.
TINY = dataclasses.replace(SAMPLED, batch_size=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("align")
    dataset = write_dataset(root / "dataset", num_items=NUM_ITEMS, num_users=NUM_USERS)
    features = write_features(root / "features", num_items=NUM_ITEMS, zero_rows=(3,))
    graphs = {
        name: write_graph(root / name, dataset=dataset, features=features, k=4, num_partitions=n)
        for name, n in (("graph", 4), ("undivided", 1))
    }
    return {"dataset": dataset, "features": features, **graphs}


@dataclasses.dataclass(frozen=True)
class Job:
    """Training from one step to another.

    Attributes:
        out: name of the folder for the result.
        first: step to continue at; the state comes from the checkpoint in the folder ``saved``.
        last: one behind the last step.
        save: whether to leave a checkpoint in the folder ``saved``.
        graph: name of the graph among the folders.
    """

    out: str
    config: AlignConfig
    last: int
    first: int = 0
    save: bool = False
    graph: str = "graph"


@dataclasses.dataclass(frozen=True)
class Noting(Checkpoint):
    """A checkpoint that notes whose rows are read.

    Attributes:
        read: ranks whose embeddings, not only their ids, were read.
    """

    read: set[int]

    def tensors(self, rank_index: int, *prefixes: str) -> dict[str, torch.Tensor]:
        found = super().tensors(rank_index, *prefixes)
        if any(name.endswith("/weight") and "gate" not in name for name in found):
            self.read.add(rank_index)
        return found


def train(folders: dict[str, Path], root: Path, jobs: list[Job]) -> dict[str, Any]:
    """Do the jobs on this rank; return each one's loss terms, metrics and files it resumed from."""
    row_file._RANGE_BYTES = 1 << 10  # so that files are written in several rounds
    with process_group(timeout_seconds=100) as rank:
        return {job.out: train_one(folders, root, job, rank) for job in jobs}


def train_one(folders: dict[str, Path], root: Path, job: Job, rank: Rank) -> Any:
    out = root / job.out
    out.mkdir(exist_ok=True)
    inputs = Inputs.open({**folders, "graph": folders[job.graph]})
    trainer: Trainer
    if job.config.mode == "full":
        trainer = FullGraphTrainer(job.config, inputs, rank)
    else:
        trainer = SampledTrainer(job.config, inputs, rank, work=out)
    read: set[int] = set()
    if job.first:
        found = checkpoint.latest(root / "saved", rank=rank)
        assert found is not None
        saved = Noting(found.path, found.step, found.world_size, read)
        assert trainer.restore(saved) == {"mark": 7}
    losses = []
    while (done := job.first + len(losses)) < job.last:
        epoch, first = divmod(done, trainer.num_steps)
        steps = itertools.islice(trainer.steps(epoch, first), job.last - done)
        losses += [{name: float(term) for name, term in terms.items()} for terms in steps]
    metrics = trainer.evaluate()
    trainer.keep_best()
    if job.save:
        trainer.save(root / "saved", job.last, {"mark": 7})
    trainer.write_best(Draft(out))
    return losses, metrics, read


def test_users_to_rank_change_no_count_that_ranks_compare(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    counts = []
    for block in (1, 1000):
        config = dataclasses.replace(SAMPLED, evaluation_block=block)
        beats, signs = list[int](), list[int]()
        trainer = SampledTrainer(
            config,
            Inputs.open(folders),
            Rank(),
            work=tmp_path,
            beat=lambda kept=beats: kept.append(1),
            alive=lambda kept=signs: kept.append(1),
        )
        trainer.evaluate()
        counts.append((len(beats), len(signs)))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] > counts[1][1] > 0


def test_no_split_of_the_interactions_is_in_one_ranks_memory(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Inputs, "interactions")
    SampledTrainer(SAMPLED, Inputs.open(folders), Rank(), work=tmp_path).evaluate()


@pytest.fixture(scope="module")
def runs(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Any]]]:
    """Run everything with as few processes as possible; return results by folder and rank."""
    root = tmp_path_factory.mktemp("runs")
    alone = [Job("full", FULL, 3), Job("full_id", id_only(FULL), 3), Job("sampled1", SAMPLED, 7)]
    alone += [Job("full_deep", deeper(FULL), 3), Job("exact_deep1", deeper(EXACT), 3)]
    alone.append(Job("tiny1", TINY, 12))
    resumed = {ranks: Job(f"resumed{ranks}", SAMPLED, 7, first=3) for ranks in (1, 2, 3)}
    results = {}
    for ranks in (2, 3, 1):
        jobs = [Job(f"exact{ranks}", EXACT, 3), Job(f"exact_id{ranks}", id_only(EXACT), 3)]
        if ranks == 2:
            jobs += [Job("sampled2", SAMPLED, 7), Job("half", SAMPLED, 3, save=True)]
            jobs += [Job("exact_deep2", deeper(EXACT), 3), Job("tiny2", TINY, 12)]
            jobs.append(Job("undivided2", SAMPLED, 7, graph="undivided"))
        jobs.append(resumed[ranks])
        if ranks == 1:
            found = [train(folders, root, alone + jobs)]
        else:
            found = run_ranks(train, ranks, folders, root, jobs, timeout_seconds=300)
        results |= {name: [result[name] for result in found] for name in found[0]}
    return root, results


def id_only(config: AlignConfig) -> AlignConfig:
    return dataclasses.replace(config, content=False, evaluate_users=9)


def deeper(config: AlignConfig) -> AlignConfig:
    return dataclasses.replace(config, content_layers=2)


def same_files(one: Path, other: Path, name: str, tolerance: float) -> None:
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=tolerance)


def same_course(found: Any, wanted: Any) -> None:
    """Compare loss terms step by step, and metrics."""
    for mine, other in zip(found[0], wanted[0], strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    assert found[1] == pytest.approx(wanted[1])


@pytest.mark.parametrize(
    ("kind", "ranks"), [*itertools.product(("", "_id"), (1, 2, 3)), ("_deep", 1), ("_deep", 2)]
)
def test_full_fanout_on_any_number_of_ranks_is_full_graph_training(
    runs: tuple[Path, dict[str, list[Any]]], ranks: int, kind: str
) -> None:
    root, results = runs
    found = results[f"exact{kind}{ranks}"]
    assert len(found) == ranks
    for result in found:
        same_course(result, results[f"full{kind}"][0])
    one, other = root / f"exact{kind}{ranks}", root / f"full{kind}"
    tables = [load_file(folder / "embeddings.safetensors") for folder in (one, other)]
    scores = [table["user"] @ table["item"].T for table in tables]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)
    same_files(one, other, "model.safetensors", 1e-5)


def test_the_number_of_ranks_changes_neither_samples_nor_steps(
    runs: tuple[Path, dict[str, list[Any]]],
) -> None:
    root, results = runs
    for result in results["sampled2"]:
        same_course(result, results["sampled1"][0])
    same_files(root / "sampled1", root / "sampled2", "model.safetensors", 1e-4)


def test_as_many_ranks_read_their_own_rows_of_a_checkpoint_alone(
    runs: tuple[Path, dict[str, list[Any]]],
) -> None:
    _, results = runs
    assert [read for *_, read in results["resumed2"]] == [{0}, {1}]
    assert [read for *_, read in results["resumed1"]] == [{0, 1}]


@pytest.mark.parametrize(("some_empty", "alone"), [("tiny2", "tiny1"), ("undivided2", "sampled1")])
def test_ranks_without_triples_take_part(
    runs: tuple[Path, dict[str, list[Any]]], some_empty: str, alone: str
) -> None:
    root, results = runs
    for result in results[some_empty]:
        same_course(result, results[alone][0])
    same_files(root / alone, root / some_empty, "model.safetensors", 1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_continues_bit_equal_on_as_many_ranks_and_on_any_other_number(
    runs: tuple[Path, dict[str, list[Any]]], ranks: int
) -> None:
    root, results = runs
    whole = results["sampled2"][0]
    for result in results[f"resumed{ranks}"]:
        same_course(result, (whole[0][3:], whole[1]))
    for name in ("model.safetensors", "embeddings.safetensors"):
        tolerance = 0 if ranks == 2 else 1e-4
        same_files(root / f"resumed{ranks}", root / "sampled2", name, tolerance)


def test_where_there_is_a_gpu_everything_stays_on_the_cpu(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # "meta" stands for any other device: mixing it with the CPU fails in the same way.
    rank = Rank(device=torch.device("meta"))
    assert train_one(folders, tmp_path, Job("other", SAMPLED, 1), rank) == train_one(
        folders, tmp_path, Job("cpu", SAMPLED, 1), Rank()
    )
