"""A rank of the features stage that hangs shows its stacks and is named."""

import time
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from alignrec.distributed.process_group import rank_from_environment
from alignrec.features import STAGE, extraction
from alignrec.stage import Context
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import write_encoder
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess


def run(inputs: dict[str, Path], output: Path) -> None:
    """Run the stage; rank 1 stands still at its second batch until both ranks have noticed."""
    logs = output.with_name(output.name + ".logs")
    encode, batches = extraction._Worker.encode, []

    def hanging(self: Any, batch: Any) -> Any:
        batches.append(batch)
        deadline = time.monotonic() + 60
        if rank_from_environment().index == 1 and len(batches) == 2:
            for path in logs.glob("stacks_*.json"):  # of a slow start
                path.unlink()
            while len(list(logs.glob("stacks_*.json"))) < 2 and time.monotonic() < deadline:
                Event().wait(0.05)
        return encode(self, batch)

    extraction._Worker.encode = hanging  # type: ignore[method-assign]
    config = STAGE.load_config({"batch_size": 4, "watchdog_seconds": 2.0, "num_ranks": 2})
    extraction.run(config, Context(inputs, output, STAGE.fingerprint(config, inputs), logs))


def test_the_rank_that_hangs_is_named_and_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=16, image_size=16)
    encoder = write_encoder(tmp_path / "encoder", dataset)
    run_ranks(run, 2, {"dataset": dataset, "encoder": encoder}, tmp_path / "features")
    told = capfd.readouterr().err
    for rank in (0, 1):
        assert f"rank {rank} of 2 (host " in told
    assert told.count("behind the others: rank 1;") >= 2
    stacks = (tmp_path / "features.logs" / "stacks_0001.txt").read_text()
    assert "while extracting features" in stacks.partition("\n")[0]
    assert "in hanging" in stacks
    assert np.load(tmp_path / "features" / "features.npy").any(axis=1).all()
