"""A rank of the align stage that hangs shows its stacks and is named, in both modes."""

import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from alignrec import artifacts
from alignrec.align import STAGE, full_graph, sampled
from alignrec.distributed.process_group import rank_from_environment
from alignrec.graph import sampler
from alignrec.stage import Context
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess

NUM_ITEMS = 30
SETTINGS = {"embedding_dim": 8, "batch_size": 60, "epochs": 2, "watchdog_seconds": 2.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("align_watchdog")
    dataset = write_dataset(root / "dataset", num_items=NUM_ITEMS, num_users=40)
    features = write_features(root / "features", num_items=NUM_ITEMS)
    graph = write_graph(root / "graph", dataset=dataset, features=features, k=4, num_partitions=2)
    return {"dataset": dataset, "features": features, "graph": graph}


def hanging(
    function: Any,
    logs: Path,
    num_ranks: int,
) -> Any:
    """Return the function with one call, the third, that stands still until this was noticed."""
    calls = 0

    def stuck_here(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # a slow start may have been told already: this standstill is the one
            for path in logs.glob("stacks_*.json"):
                path.unlink()
        deadline = time.monotonic() + 60
        while calls == 3 and time.monotonic() < deadline:
            if len(list(logs.glob("stacks_*.json"))) == num_ranks:
                break
            Event().wait(0.05)
        return function(*arguments, **named)

    return stuck_here


# Where a rank hangs: over the losses, or in the thread that samples.
PLACES = {
    "full": (full_graph, "objective"),
    "sampled": (sampled, "objective"),
    "sampling": (sampler, "draw_negatives"),
}


def run(folders: dict[str, Path], output: Path, settings: dict[str, Any], place: str) -> None:
    """Run the stage; the last rank hangs somewhere, but for a while."""
    logs = output.with_name(output.name + ".logs")
    rank = rank_from_environment()
    module, name = PLACES[place]
    if rank.index == rank.world_size - 1:
        setattr(module, name, hanging(getattr(module, name), logs, rank.world_size))
    config = STAGE.load_config(settings)
    context = Context(folders, output, STAGE.fingerprint(config, folders), logs)
    STAGE.load_run()(config, context)


@pytest.mark.parametrize("place", ["sampled", "sampling"])
def test_the_rank_that_hangs_in_sampled_mode_is_named_and_the_run_goes_on(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    settings = {**SETTINGS, "mode": "sampled", "num_ranks": 2}
    run_ranks(run, 2, folders, tmp_path / "align", settings, place)
    told = capfd.readouterr().err
    for rank in (0, 1):
        assert f"rank {rank} of 2 (host " in told
    assert told.count("behind the others: rank 1;") >= 2
    stacks = (tmp_path / "align.logs" / "stacks_0001.txt").read_text()
    assert "while aligning" in stacks.partition("\n")[0]
    assert "in stuck_here" in stacks
    assert artifacts.read(tmp_path / "align").facts["epochs_run"] == 2


def test_full_mode_shows_where_it_stands_still(
    folders: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(full_graph, "objective", full_graph.objective)  # put back at the end
    run(folders, tmp_path / "align", SETTINGS, "full")
    assert "rank 0 of 1 (host " in capfd.readouterr().err
    assert "in stuck_here" in (tmp_path / "align.logs" / "stacks_0000.txt").read_text()
    assert artifacts.read(tmp_path / "align").facts["epochs_run"] == 2
