"""The loader's processes: what a kill leaves, and ranks that share copies of far-away shards."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignrec.data.config import ShardsConfig
from alignrec.data.loader import ItemReader, Loader, Plan
from alignrec.data.shard_cache import ShardCache
from alignrec.data.shard_file import shard_files
from alignrec.data.shards import SampleTable, open_shards
from alignrec.testing.datasets import write_dataset
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("loader") / "d", num_items=60, samples_per_shard=10, image_size=16
    )


def read_epochs(dataset: Path, folder: Path, num_ranks: int) -> list[tuple[int, int]]:
    """Read two epochs as one rank; returns (item_index, sum of pixels) in order."""
    table = SampleTable.read(dataset)
    config = ShardsConfig(
        root=f"file://{dataset}", cache_folder=folder, cache_bytes=cache_bytes(dataset)
    )
    shards = open_shards(dataset, table, config)
    reader = ItemReader(
        shards, lambda texts: [[0]] * len(texts), image_size=8, padding_id=1, augment_seed=0
    )
    chosen = plan(num_ranks)
    rank = int(os.environ.get("RANK", "0"))
    planned = (b for step in range(12) for b in chosen.micro_batches(step, rank))
    stream = Loader(reader.read, num_threads=2).batches(
        shards.fetched_ahead(planned, lambda batch: batch.rows)
    )
    seen = [
        (int(item), int(image.sum(dtype=np.int64)))
        for batch in stream
        for item, image in zip(batch.item_index, batch.images, strict=True)
    ]
    shards.close()
    return seen


def plan(num_ranks: int) -> Plan:
    return Plan(np.arange(60), 3, 10, 10 // num_ranks, num_ranks, 1, block_size=10, window_size=20)


def cache_bytes(dataset: Path) -> int:
    files = shard_files(dataset, SampleTable.read(dataset).shard_names)
    return 4 * max(file.num_bytes for file in files)


def test_two_ranks_with_one_small_cache_read_what_one_rank_reads(
    tmp_path: Path, dataset: Path
) -> None:
    alone = read_epochs(dataset, tmp_path / "alone", 1)
    first, second = run_ranks(read_epochs, 2, dataset, tmp_path / "shared", 2)
    together = [
        item
        for start in range(0, 60 * 2 // 2, 5)
        for part in (first, second)
        for item in part[start : start + 5]
    ]
    assert together == alone
    assert sorted(item for item, _ in alone[:60]) == list(range(60))
    left = list((tmp_path / "shared").iterdir())
    assert sum(path.stat().st_size for path in left) <= cache_bytes(dataset)
    assert {path.suffix for path in left if path.name != ".lock"} == {".tar"}


KILLED = """
import sys
import fsspec
from fsspec.implementations.local import LocalFileSystem
from pathlib import Path
from alignrec.data.config import ShardsConfig
from alignrec.data.shard_cache import ShardCache
from alignrec.data.shard_file import shard_files
from alignrec.data.shards import SampleTable

class Half:
    def __init__(self, file):
        self.file, self.num_reads = file, 0
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def read(self, size):
        self.num_reads += 1
        if self.num_reads == 2:
            print("half", flush=True)
            sys.stdin.read()
        return self.file.read(1000)

class Slow(LocalFileSystem):
    protocol = "slow"
    def open(self, path, mode="rb", **options):
        return Half(open(path, mode))

fsspec.register_implementation("slow", Slow, clobber=True)
dataset, folder = Path(sys.argv[1]), Path(sys.argv[2])
shards = shard_files(dataset, SampleTable.read(dataset).shard_names)
config = ShardsConfig(root=f"slow://{dataset}", cache_folder=folder)
ShardCache(config, shards, verify=True).open(shards[0])
"""


def test_what_a_killed_process_was_fetching_does_not_count(tmp_path: Path, dataset: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(dataset), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    files = shard_files(dataset, SampleTable.read(dataset).shard_names)
    part = tmp_path / f"{files[0].sha256}.part"
    assert part.stat().st_size == files[0].num_bytes
    config = ShardsConfig(
        root=str(dataset), cache_folder=tmp_path, cache_bytes=max(f.num_bytes for f in files)
    )
    cache = ShardCache(config, files, verify=True)
    for file in (files[1], files[0]):  # the first needs the room that the part takes
        descriptor = cache.open(file)
        assert os.pread(descriptor, file.num_bytes, 0) == (dataset / file.name).read_bytes()
        os.close(descriptor)
        assert not part.exists()


ENDLESS = """
import itertools, sys
from pathlib import Path
import numpy as np
from alignrec.data.config import ShardsConfig
from alignrec.data.loader import ItemReader, Loader, MicroBatch
from alignrec.data.shards import SampleTable, open_shards
folder = Path(sys.argv[1])
shards = open_shards(folder, SampleTable.read(folder), ShardsConfig())
reader = ItemReader(shards, lambda texts: [[0]] * len(texts), image_size=8, padding_id=1)
batches = (MicroBatch(0, np.arange(20)) for _ in itertools.count())
for number, _ in enumerate(Loader(reader.read, num_threads=3).batches(batches)):
    if number == 20:
        print("going", flush=True)
"""


def test_a_kill_leaves_no_shared_memory(dataset: Path) -> None:
    """What a process never mapped from /dev/shm it cannot leave there."""
    command = [sys.executable, "-c", ENDLESS, str(dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        open_files = [str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        own = [line for line in segments if f" {process.pid} " in line]
        process.kill()
    assert "/dev/shm" not in maps
    assert not [path for path in open_files if path.startswith("/dev/shm")]
    assert not own
