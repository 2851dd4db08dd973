"""Samples of a dataset's shards: what names a shard, and when no more are fetched."""

import dataclasses
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignrec import artifacts
from alignrec.data.loader import Loader, MicroBatch
from alignrec.data.shard_file import ShardFile, shard_files
from alignrec.data.shards import SampleTable, ShardReader
from alignrec.errors import StageFailure, UserError
from alignrec.testing.datasets import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("near") / "d", num_items=60, samples_per_shard=10, image_size=16
    )


class Stuck:
    """Shards whose fetch ends only when the fetching was given up."""

    keep_fresh = True
    ahead_bytes = 2**40

    def __init__(self) -> None:
        self.begun = 0
        self.given_up = threading.Event()

    def open(self, shard: ShardFile) -> int:
        raise StageFailure(shard.name)

    def recheck(self, shard: ShardFile) -> None:
        pass

    def expect(self, shards: Iterable[ShardFile]) -> None:
        pass

    def prefetch(self, shard: ShardFile) -> None:
        self.begun += 1
        assert self.given_up.wait(timeout=30)

    def damaged(self, shard: ShardFile, fault: str) -> StageFailure:
        return StageFailure(fault)


def test_a_failed_run_fetches_no_more(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Stuck()
    files = shard_files(dataset, SampleTable.read(dataset).shard_names)
    reader = ShardReader(SampleTable.read(dataset), files, source)
    shutdown = ThreadPoolExecutor.shutdown

    def watched(
        self: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False
    ) -> None:
        shutdown(self, wait=False, cancel_futures=cancel_futures)
        if self._thread_name_prefix == "shards":
            source.given_up.set()
        shutdown(self, wait=wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", watched)
    batches = (MicroBatch(0, np.arange(start, start + 10)) for start in range(0, 60, 10))
    near = reader.fetched_ahead(batches, lambda batch: batch.rows)
    stream = Loader(lambda batch: reader.read(int(batch.rows[0])), prefetch=1).batches(near)
    with pytest.raises(StageFailure, match=files[0].name):
        next(stream)
    begun, given_up = source.begun, source.given_up.is_set()
    source.given_up.set()  # where it was not: the test ends
    assert given_up
    assert begun == 4  # of 6: as many as at once


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (None, {"sha256": "../x/victim"}),
        (None, {"sha256": "A" * 64}),
        (None, {"bytes": -1}),
        ("../outside.tar", {}),
        ("/etc/passwd", {}),
        ("shards/../../outside.tar", {}),
        ("shards/..", {}),
    ],
)
def test_what_would_lead_out_of_the_folders_is_no_shard(
    dataset: Path, name: str | None, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SampleTable.read(dataset).shard_names[0]
    entry = artifacts.read(dataset).files[own] | change
    manifest = dataclasses.replace(artifacts.read(dataset), files={name or own: entry})
    monkeypatch.setattr(artifacts, "read", lambda _: manifest)
    with pytest.raises(UserError, match=r"is not shards/<name> with a size and a SHA-256"):
        shard_files(dataset, (name or own,))


def test_a_shard_that_the_manifest_does_not_list_is_refused(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"'shards/x\.tar', bytes=None"):
        shard_files(dataset, ("shards/x.tar",))
