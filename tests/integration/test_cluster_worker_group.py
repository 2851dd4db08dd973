"""Ranks on a real local Ray: their failures arrive as one line, a killed rank is started again."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignrec import artifacts
from alignrec.configuration import option, to_mapping
from alignrec.distributed.process_group import all_reduce_sum, process_group
from alignrec.errors import StageFailure, UserError
from alignrec.stage import Context, Stage
from cluster import engine, worker_group
from cluster.config import ClusterConfig
from cluster.rank import RankCrash

pytestmark = pytest.mark.integration


@dataclasses.dataclass(frozen=True)
class Settings:
    how: str = option("well", "what happens")


def work(config: Settings, context: Context) -> None:
    """Add up the ranks; ``how`` says what goes wrong on the last one."""
    import torch

    with process_group() as rank:
        print(f"[sum] rank {rank.index} of {rank.world_size}")
        last = rank.index == rank.world_size - 1
        killed = context.log_dir / "killed"
        if config.how == "killed" and last and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config.how == "mistaken" and last:
            raise UserError("sum.how=mistaken cannot work. Say well.")
        if config.how == "crashing" and last:
            raise ZeroDivisionError("a bug")
        if config.how == "dying":
            os.kill(os.getpid(), signal.SIGKILL)
        total = all_reduce_sum(torch.tensor(rank.index + 1), rank)
        if rank.is_first:
            with artifacts.writing(
                context.output,
                kind="dataset",
                fingerprint=context.fingerprint,
                config=to_mapping(config),
                inputs=context.inputs,
            ) as draft:
                draft.counts["total"] = int(total)
                draft.counts["threads"] = int(os.environ["OMP_NUM_THREADS"])


STAGE = Stage(
    "sum", "dataset", "test_cluster_worker_group:Settings", "test_cluster_worker_group:work"
)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A Ray of its own for this module; it ends with it, also when a test fails."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.setenv("ALIGNREC_HOME", "/nonexistent")
    try:
        with engine.connected(ClusterConfig(object_store_bytes=100_000_000), num_ranks=2) as name:
            assert "its own" in name
            yield
    finally:
        patch.undo()


def run(folder: Path, how: str, *, num_ranks: int, max_restarts: int = 1) -> list[str]:
    config, output, shown = Settings(how), folder / "sum", list[str]()
    worker_group.run_stage(
        STAGE,
        config,
        Context({}, output, STAGE.fingerprint(config, {}), folder / "sum.logs"),
        num_ranks=num_ranks,
        cluster=ClusterConfig(max_restarts=max_restarts, cpus_per_rank=1),
        run="test",
        show=shown.append,
    )
    return shown


@pytest.mark.usefixtures("ray_session")
class TestOneRank:
    def test_its_lines_are_shown_and_its_artifact_is_there(self, tmp_path: Path) -> None:
        assert run(tmp_path, "well", num_ranks=1) == ["[sum] rank 0 of 1"]
        assert artifacts.read(tmp_path / "sum").counts == {"total": 1, "threads": 1}

    def test_a_crash_is_one_line_and_its_traceback_is_in_the_log(self, tmp_path: Path) -> None:
        with pytest.raises(RankCrash) as caught:
            run(tmp_path, "crashing", num_ranks=1)
        log = tmp_path / "sum.logs" / "rank_0.log"
        assert str(caught.value) == (
            f"sum: rank 0 failed with ZeroDivisionError: a bug. Its output is in {log}"
        )
        assert "Traceback" in log.read_text()

    def test_a_rank_that_always_dies_is_given_up(self, tmp_path: Path) -> None:
        with pytest.raises(StageFailure, match="rank 0 of sum died"):
            run(tmp_path, "dying", num_ranks=1)
        assert (tmp_path / "sum.logs" / "rank_0.log").read_text().count("rank 0 of 1") == 2


@pytest.mark.usefixtures("ray_session")
class TestTwoRanks:
    def test_a_killed_rank_is_started_again_with_its_peer(self, tmp_path: Path) -> None:
        shown = run(tmp_path, "killed", num_ranks=2)
        assert artifacts.read(tmp_path / "sum").counts["total"] == 3
        assert any("died" in line and "Restart 1 of 1" in line for line in shown)

    def test_a_mistake_found_by_one_rank_is_not_tried_again(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            run(tmp_path, "mistaken", num_ranks=2)
        assert str(caught.value) == "sum.how=mistaken cannot work. Say well."
        assert (tmp_path / "sum.logs" / "rank_1.log").read_text().count("rank 1 of 2") == 1

    def test_more_ranks_than_cpus_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"sum\.num_ranks=64"):
            run(tmp_path, "well", num_ranks=64)
