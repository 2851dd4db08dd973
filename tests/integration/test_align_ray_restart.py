"""The align stage on Ray Train: a rank that dies is started again, and the end is the same."""

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from alignrec import artifacts, checkpoint
from alignrec.align import STAGE, training
from alignrec.align.config import AlignConfig
from alignrec.distributed.process_group import Rank
from alignrec.stage import Context, Stage
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from cluster import engine, worker_group
from cluster.config import ClusterConfig

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NUM_ITEMS = 30
SETTINGS = {
    "mode": "sampled", "num_ranks": 2, "embedding_dim": 8, "batch_size": 50, "epochs": 3,
    "checkpoint_steps": 4, "num_neighbors": [4, 4],
}  # fmt: skip
DYING = Stage(
    name=STAGE.name,
    kind=STAGE.kind,
    config=STAGE.config,
    run="test_align_ray_restart:run_and_die_once",
    inputs=STAGE.inputs,
)


def run_and_die_once(config: AlignConfig, context: Context) -> None:
    """Run the stage; the last rank dies when it saves for the second time, but only once."""
    save, saves = checkpoint.save, 0
    died = context.log_dir / "died"

    def saving(
        folder: Path, step: int, *, rank: Rank, state: Mapping[str, Any], **named: Any
    ) -> None:
        nonlocal saves
        saves += 1
        if saves == 2 and rank.index == rank.world_size - 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        save(folder, step, rank=rank, state=state, **named)

    checkpoint.save = saving  # type: ignore[assignment]
    training.run(config, context)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.setenv("ALIGNREC_HOME", "/nonexistent")
    try:
        with engine.connected(ClusterConfig(object_store_bytes=100_000_000), num_ranks=2):
            yield
    finally:
        patch.undo()


def run(stage: Stage, folders: dict[str, Path], output: Path) -> list[str]:
    config, shown = STAGE.load_config(SETTINGS), list[str]()
    logs = output.with_name(output.name + ".logs")
    worker_group.run_stage(
        stage,
        config,
        Context(folders, output, STAGE.fingerprint(config, folders), logs),
        num_ranks=2,
        cluster=ClusterConfig(max_restarts=1, cpus_per_rank=1),
        run="test",
        show=shown.append,
    )
    return shown


@pytest.mark.usefixtures("ray_session")
def test_a_rank_that_dies_is_started_again_and_the_end_is_the_same(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=NUM_ITEMS, num_users=40)
    features = write_features(tmp_path / "features", num_items=NUM_ITEMS)
    graph = write_graph(
        tmp_path / "graph", dataset=dataset, features=features, k=4, num_partitions=2
    )
    folders = {"dataset": dataset, "features": features, "graph": graph}
    quiet, killed = tmp_path / "quiet" / "align", tmp_path / "killed" / "align"
    quiet.parent.mkdir()
    killed.parent.mkdir()
    assert not any("died" in line for line in run(STAGE, folders, quiet))
    shown = run(DYING, folders, killed)
    assert any("died" in line and "Restart 1 of 1" in line for line in shown)
    assert any("resuming at epoch" in line for line in shown)
    for name in ("embeddings.safetensors", "model.safetensors"):
        same = [(output / name).read_bytes() for output in (quiet, killed)]
        assert same[0] == same[1]
    facts = [artifacts.read(output).facts for output in (quiet, killed)]
    assert facts[0]["valid"] == facts[1]["valid"]
