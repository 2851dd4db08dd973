"""Far-away shards: bounded copies, shared by all who read them, verified and fetched once."""

import contextlib
import dataclasses
import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from alignrec.data.config import ShardsConfig
from alignrec.data.shard_cache import ShardCache
from alignrec.data.shard_file import ShardFile, shard_files
from alignrec.data.shards import SampleTable, ShardReader, open_shards
from alignrec.errors import StageFailure, UserError
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import open_training_data
from alignrec.pretrain.tokenizer import load_words, write_tokenizer
from alignrec.testing.datasets import write_dataset

ROOT = "counted://bucket/dataset"


class CountedFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A store in memory that counts what is fetched, and fails when told to."""

    protocol = "counted"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fetched: ClassVar[Counter[str]] = Counter()
    failures: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("counted://").strip("/")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self.fetched[path.rsplit("/", 1)[1]] += 1
            if self.failures:
                raise self.failures.pop(0)
        return super().open(path, mode, **options)


@pytest.fixture(autouse=True)
def counted() -> Iterator[type[CountedFileSystem]]:
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    yield CountedFileSystem
    CountedFileSystem.store.clear()
    CountedFileSystem.fetched.clear()
    CountedFileSystem.failures.clear()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("far") / "d", num_items=60, samples_per_shard=10, image_size=16
    )


@pytest.fixture
def shards(dataset: Path) -> tuple[ShardFile, ...]:
    """Put the shards into the store, return what the manifest says of them."""
    files = shard_files(dataset, SampleTable.read(dataset).shard_names)
    store = fsspec.filesystem("counted")
    for file in files:
        store.pipe(f"{ROOT}/{file.name}", (dataset / file.name).read_bytes())
    return files


def cache_of(
    folder: Path,
    shards: tuple[ShardFile, ...],
    *,
    num_shards: float = 100,
    root: str = ROOT,
    verify: bool = True,
) -> ShardCache:
    most = int(num_shards * max(shard.num_bytes for shard in shards))
    config = ShardsConfig(root=root, cache_folder=folder, cache_bytes=most)
    return ShardCache(config, shards, verify=verify, pause_seconds=0.0)


def read(cache: ShardCache, shard: ShardFile) -> bytes:
    descriptor = cache.open(shard)
    try:
        return os.pread(descriptor, shard.num_bytes, 0)
    finally:
        os.close(descriptor)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def occupied(folder: Path) -> int:
    sizes = {}  # by inode, because a part may get its final name between two looks
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def names(*shards: ShardFile) -> set[str]:
    return {f"{shard.sha256}.tar" for shard in shards}


def test_a_shard_is_fetched_once_by_all_runs_of_a_host(
    tmp_path: Path, dataset: Path, shards: tuple[ShardFile, ...]
) -> None:
    for _ in range(2):
        cache = cache_of(tmp_path, shards)
        for shard in shards:
            assert read(cache, shard) == (dataset / shard.name).read_bytes()
    assert set(CountedFileSystem.fetched.values()) == {1}
    assert kept(tmp_path) == names(*shards)


def test_the_least_recently_used_shard_makes_room(
    tmp_path: Path, shards: tuple[ShardFile, ...]
) -> None:
    cache = cache_of(tmp_path, shards, num_shards=3)
    for number in (0, 1, 2, 0, 3):
        read(cache, shards[number])
    assert kept(tmp_path) == names(shards[0], shards[2], shards[3])


def test_what_will_be_read_makes_room_last(tmp_path: Path, shards: tuple[ShardFile, ...]) -> None:
    cache = cache_of(tmp_path, shards, num_shards=3)
    for number in (0, 1, 2):
        read(cache, shards[number])
    cache.expect([shards[0], shards[3]])
    cache.prefetch(shards[3])
    cache.prefetch(shards[5])  # nobody waits for it any more
    read(cache, shards[4])
    assert kept(tmp_path) == names(shards[0], shards[3], shards[4])


def test_a_late_prefetch_does_not_fetch_what_was_read_and_removed_by_then(
    tmp_path: Path, shards: tuple[ShardFile, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path, shards)
    cache.expect([shards[0]])
    locked = cache._locked

    def later() -> Any:
        cache.expect([])
        return locked()

    monkeypatch.setattr(cache, "_locked", later)
    cache.prefetch(shards[0])
    assert not CountedFileSystem.fetched


def test_the_cache_never_takes_more_than_its_bytes(
    tmp_path: Path, dataset: Path, shards: tuple[ShardFile, ...]
) -> None:
    most = 2.5 * max(shard.num_bytes for shard in shards)
    largest = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            with (tmp_path / ".lock").open("rb") as lock:  # no file comes or goes meanwhile
                fcntl.flock(lock, fcntl.LOCK_EX)
                largest = max(largest, occupied(tmp_path))

    def reader(seed: int) -> None:
        cache = cache_of(tmp_path, shards, num_shards=2.5)
        for number in np.random.default_rng(seed).integers(len(shards), size=20):
            assert read(cache, shards[number]) == (dataset / shards[number].name).read_bytes()

    cache_of(tmp_path, shards, num_shards=2.5)
    watcher = threading.Thread(target=watch)
    readers = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    watcher.start()
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join(timeout=60)
    done.set()
    watcher.join()
    assert 0 < largest <= most
    assert not [name for name in kept(tmp_path) if not name.endswith(".tar")]


def test_readers_that_start_together_fetch_a_shard_once(
    tmp_path: Path, shards: tuple[ShardFile, ...]
) -> None:
    barrier = threading.Barrier(4)

    def reader() -> None:
        cache = cache_of(tmp_path, shards)
        barrier.wait()
        for shard in shards:
            read(cache, shard)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(CountedFileSystem.fetched.values()) == {1}
    assert len(CountedFileSystem.fetched) == len(shards)


def test_a_descriptor_outlives_its_file(tmp_path: Path, shards: tuple[ShardFile, ...]) -> None:
    cache = cache_of(tmp_path, shards, num_shards=1)
    descriptor = cache.open(shards[0])
    read(cache, shards[1])
    assert kept(tmp_path) == names(shards[1])
    assert len(os.pread(descriptor, shards[0].num_bytes, 0)) == shards[0].num_bytes
    os.close(descriptor)


def test_damage_on_the_way_is_fetched_again(
    tmp_path: Path, dataset: Path, shards: tuple[ShardFile, ...]
) -> None:
    cache = cache_of(tmp_path, shards)
    right = (dataset / shards[0].name).read_bytes()
    store = fsspec.filesystem("counted")
    store.pipe(f"{ROOT}/{shards[0].name}", right[:-9] + b"different")
    with pytest.raises(StageFailure, match=rf"{ROOT}/{shards[0].name}: its checksum .* twice"):
        cache.open(shards[0])
    assert sum(CountedFileSystem.fetched.values()) == 2
    assert kept(tmp_path) == set()
    store.pipe(f"{ROOT}/{shards[0].name}", right * 3)  # more than there is room for
    with pytest.raises(StageFailure, match="checksum"):
        cache_of(tmp_path, shards).open(shards[0])
    store.pipe(f"{ROOT}/{shards[0].name}", right)
    assert read(cache_of(tmp_path, shards), shards[0]) == right


def test_damage_on_the_disk_is_found_by_the_next_run(
    tmp_path: Path, dataset: Path, shards: tuple[ShardFile, ...]
) -> None:
    read(cache_of(tmp_path, shards), shards[0])
    copy = tmp_path / f"{shards[0].sha256}.tar"
    copy.write_bytes(b"x" * shards[0].num_bytes)
    assert read(cache_of(tmp_path, shards), shards[0]) == (dataset / shards[0].name).read_bytes()
    assert sum(CountedFileSystem.fetched.values()) == 2


def test_damage_on_the_disk_is_found_by_who_reads_the_sample(
    tmp_path: Path, dataset: Path, shards: tuple[ShardFile, ...]
) -> None:
    """Copies are not read whole for it, and what is damaged is fetched again."""
    near = open_shards(dataset, SampleTable.read(dataset), ShardsConfig())
    wanted = [near.read(row) for row in (3, 4)]
    read(cache_of(tmp_path, shards), shards[0])
    copy = tmp_path / f"{shards[0].sha256}.tar"
    content = copy.read_bytes()
    copy.write_bytes(content.replace(wanted[0].image, bytes(len(wanted[0].image))))
    reader = reader_of(dataset, tmp_path, shards, num_shards=100)
    assert reader.read(4) == wanted[1]
    assert sum(CountedFileSystem.fetched.values()) == 1
    assert [reader.read(row) for row in (3, 4)] == wanted
    assert sum(CountedFileSystem.fetched.values()) == 2
    assert copy.read_bytes() == content
    reader.close()
    near.close()


def test_a_store_that_fails_for_a_while_is_asked_again(
    tmp_path: Path, shards: tuple[ShardFile, ...]
) -> None:
    cache = cache_of(tmp_path, shards)
    CountedFileSystem.failures.extend([TimeoutError("slow"), ConnectionError("reset")])
    assert read(cache, shards[0])
    assert sum(CountedFileSystem.fetched.values()) == 3


def test_a_store_that_fails_for_good_is_named(
    tmp_path: Path, shards: tuple[ShardFile, ...]
) -> None:
    cache = cache_of(tmp_path, shards)
    CountedFileSystem.failures.extend([TimeoutError("slow")] * 4)
    with pytest.raises(StageFailure, match=rf"{shards[0].name}: TimeoutError: slow .*4 of 4"):
        cache.open(shards[0])
    fsspec.filesystem("counted").rm(f"{ROOT}/{shards[1].name}")
    with pytest.raises(StageFailure, match=rf"{shards[1].name}: it is not there.*shards\.root"):
        cache.open(shards[1])
    assert CountedFileSystem.fetched[shards[1].name.rsplit("/", 1)[1]] == 1
    assert kept(tmp_path) == set()


def test_what_somebody_fetches_is_left_to_him(
    tmp_path: Path, shards: tuple[ShardFile, ...]
) -> None:
    cache = cache_of(tmp_path, shards)
    part = tmp_path / f"{shards[0].sha256}.part"
    cache.expect(shards)
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.prefetch(shards[0])
        assert not CountedFileSystem.fetched
    cache.prefetch(shards[0])  # the lock is free: its holder is gone
    assert kept(tmp_path) == names(shards[0])


def reader_of(
    dataset: Path, folder: Path, shards: tuple[ShardFile, ...], *, num_shards: float
) -> ShardReader:
    cache = cache_of(folder, shards, num_shards=num_shards, verify=False)
    return ShardReader(SampleTable.read(dataset), shards, cache)


def test_far_samples_are_the_near_ones(
    tmp_path: Path, dataset: Path, shards: tuple[ShardFile, ...]
) -> None:
    near = open_shards(dataset, SampleTable.read(dataset), ShardsConfig())
    far = reader_of(dataset, tmp_path, shards, num_shards=2)
    for row in (59, 0, 31, 32, 17, 44, 1, 58):
        assert far.read(row) == near.read(row)
    far.close()
    near.close()


def test_shards_are_fetched_before_they_are_read(
    tmp_path: Path, dataset: Path, shards: tuple[ShardFile, ...]
) -> None:
    reader = reader_of(dataset, tmp_path, shards, num_shards=100)
    batches = [np.arange(start, start + 5) for start in range(0, 60, 5)]
    stream = reader.fetched_ahead(batches, lambda rows: rows)
    got = [next(stream)]
    got += list(stream)  # ends when all fetches have
    assert np.concatenate(got).tolist() == list(range(60))
    assert kept(tmp_path) == names(*shards)
    for row in range(60):
        reader.read(row)
    assert set(CountedFileSystem.fetched.values()) == {1}
    reader.close()


def idle_after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a removed shard one to close this long after it was read."""
    monkeypatch.setattr("alignrec.data.shards._IDLE_SECONDS", seconds)


def test_no_more_is_fetched_ahead_than_the_cache_holds(
    tmp_path: Path,
    dataset: Path,
    shards: tuple[ShardFile, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room for three shards, two ahead: a pass in order fetches each shard once."""
    idle_after(60.0, monkeypatch)
    reader = reader_of(dataset, tmp_path, shards, num_shards=3)
    batches = [np.arange(start, start + 5) for start in range(0, 60, 5)]
    for rows in reader.fetched_ahead(batches, lambda rows: rows):
        for row in rows:
            reader.read(int(row))
        assert len(CountedFileSystem.fetched) <= rows[-1] // 10 + 4
    assert set(CountedFileSystem.fetched.values()) == {1}
    reader.close()


def test_open_shards_do_not_keep_the_place_of_removed_ones(
    tmp_path: Path,
    dataset: Path,
    shards: tuple[ShardFile, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle_after(-1.0, monkeypatch)
    reader = reader_of(dataset, tmp_path, shards, num_shards=2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for row in range(60):
        reader.read(row)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 2
    reader.close()


def test_mistakes_are_told_before_anything_is_fetched(
    tmp_path: Path, shards: tuple[ShardFile, ...]
) -> None:
    with pytest.raises(UserError, match=r"no effect without shards\.root"):
        ShardsConfig(cache_bytes=10)
    with pytest.raises(UserError, match="less than the largest shard"):
        cache_of(tmp_path, shards, num_shards=0.5)
    with pytest.raises(UserError, match="nosuch://bucket cannot be read"):
        cache_of(tmp_path, shards, root="nosuch://bucket")
    with pytest.raises(UserError, match=r"password.*fsspec's own") as told:
        ShardsConfig(root="s3://me:secret@bucket")
    assert "secret" not in str(told.value)
    ShardsConfig(root="file:///srv/me@home")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        cache_of(tmp_path / "file" / "below", shards)
    assert not CountedFileSystem.fetched


def test_a_cache_smaller_than_a_window_is_refused(
    tmp_path: Path,
    dataset: Path,
    shards: tuple[ShardFile, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PretrainConfig()
    write_tokenizer(dataset, config, tmp_path / "tokenizer.json")
    words = load_words(tmp_path / "tokenizer.json", max_length=16)
    most = 3 * max(shard.num_bytes for shard in shards)
    far = ShardsConfig(root=ROOT, cache_folder=tmp_path / "cache", cache_bytes=most)

    def opened(**loader: Any) -> None:
        changed = configured(config, shards=far, **loader)
        open_training_data(dataset, changed, words, num_ranks=1).close()

    with pytest.raises(UserError, match=r"cache_bytes=.*less than the shards of one window"):
        opened()
    opened(block_size=10, window_size=10)
    assert not CountedFileSystem.fetched
    sizes = iter([0, 0, 2**60])
    monkeypatch.setattr(ShardReader, "bytes_of", lambda *_: next(sizes, 0))
    with pytest.raises(UserError, match=str(2**60)):  # not only the first window
        opened(block_size=10, window_size=10)


def test_a_prefetch_that_failed_is_not_tried_again(
    tmp_path: Path, shards: tuple[ShardFile, ...]
) -> None:
    cache = cache_of(tmp_path, shards)
    cache.expect(shards)
    CountedFileSystem.failures.extend([TimeoutError("slow")] * 4)
    for attempt in (cache.prefetch, cache.open):
        with pytest.raises(StageFailure, match="4 of 4"):
            attempt(shards[0])
    assert sum(CountedFileSystem.fetched.values()) == 4


def test_what_a_killed_process_left_is_not_counted_beside_its_successor(
    tmp_path: Path, shards: tuple[ShardFile, ...]
) -> None:
    cache = cache_of(tmp_path, shards, num_shards=2)
    read(cache, shards[1])
    (tmp_path / f"{shards[0].sha256}.part").write_bytes(b"x" * shards[0].num_bytes)
    read(cache, shards[0])
    assert kept(tmp_path) == names(shards[0], shards[1])


def test_the_wait_for_another_process_ends_when_nothing_comes(
    tmp_path: Path, shards: tuple[ShardFile, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still but for the pauses, and the holder writes in the first ten."""
    now, pauses = 0.0, 0
    part = tmp_path / f"{shards[0].sha256}.part"

    def pause(_: float) -> None:
        nonlocal now, pauses
        now, pauses = now + 100.0, pauses + 1
        if pauses <= 10:
            os.utime(part, ns=(pauses, pauses))

    cache = cache_of(tmp_path, shards)
    monkeypatch.setattr("alignrec.data.shard_cache.time.sleep", pause)
    monkeypatch.setattr("alignrec.data.shard_cache.time.monotonic", lambda: now)
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StageFailure, match="120 s in which nothing came"):
            cache.open(shards[0])
    assert 10 < pauses <= 13


def open_removed(folder: Path) -> int:
    """Return how many files of a folder this process holds open though they have no name."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(path.readlink()))
    return sum(link.startswith(str(folder)) and link.endswith("(deleted)") for link in links)


def test_removed_copies_do_not_stay_open(
    tmp_path: Path,
    dataset: Path,
    shards: tuple[ShardFile, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle_after(-1.0, monkeypatch)
    reader = reader_of(dataset, tmp_path, shards, num_shards=3)
    for row in (0, 10, 20):
        reader.read(row)
    list(reader.fetched_ahead([np.arange(30, 35), np.arange(40, 45)], lambda rows: rows))
    assert kept(tmp_path) == names(*shards[2:5])
    assert open_removed(tmp_path) == 0  # after a fetch of its own
    reader.read(20)
    other = cache_of(tmp_path, shards, num_shards=3)
    for number in (0, 1, 5):
        read(other, shards[number])
    assert open_removed(tmp_path) == 1
    monkeypatch.setattr(reader, "_next_look", 0.0)
    reader.read(20)
    assert open_removed(tmp_path) == 0  # a second after another's
    reader.close()


def test_a_removed_copy_stays_open_while_it_is_read(
    tmp_path: Path,
    dataset: Path,
    shards: tuple[ShardFile, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle_after(60.0, monkeypatch)
    reader = reader_of(dataset, tmp_path, shards, num_shards=1)
    for row in (0, 10, 1, 11):
        reader.read(row)
    assert set(CountedFileSystem.fetched.values()) == {1}
    reader.close()


def test_readers_of_different_shards_leave_each_other_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two read ten shards each through a cache of eight, in step: all are fetched once."""
    idle_after(60.0, monkeypatch)
    dataset = write_dataset(tmp_path / "d", num_items=100, samples_per_shard=5, image_size=16)
    table = SampleTable.read(dataset)
    files = shard_files(dataset, table.shard_names)
    for file in files:
        fsspec.filesystem("counted").pipe(f"{ROOT}/{file.name}", (dataset / file.name).read_bytes())
    far = ShardsConfig(
        root=ROOT,
        cache_folder=tmp_path / "cache",
        cache_bytes=8 * max(file.num_bytes for file in files),
    )
    readers = [open_shards(dataset, table, far, num_readers=2) for _ in range(2)]
    streams = [
        reader.fetched_ahead((np.arange(n, n + 5) for n in range(first, first + 50, 5)), np.asarray)
        for reader, first in zip(readers, (0, 50), strict=True)
    ]
    for pair in zip(*streams, strict=True):
        for reader, rows in zip(readers, pair, strict=True):
            for row in rows.tolist():
                reader.read(row)
    for reader in readers:
        reader.close()
    assert len(CountedFileSystem.fetched) == 20
    assert set(CountedFileSystem.fetched.values()) == {1}


def configured(config: PretrainConfig, **loader: Any) -> PretrainConfig:
    return dataclasses.replace(config, loader=dataclasses.replace(config.loader, **loader))
