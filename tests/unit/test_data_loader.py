"""Order, shards, pictures and batches between the dataset and the encoder."""

import errno
import hashlib
import io
import itertools
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alignrec import artifacts
from alignrec.data import schema
from alignrec.data.config import ShardsConfig
from alignrec.data.images import crop_box, decode
from alignrec.data.loader import NO_ITEM, ItemReader, Loader, MicroBatch, Plan
from alignrec.data.order import EpochOrder, item_places, permute, unpermute
from alignrec.data.shards import SampleTable, open_shards
from alignrec.errors import StageFailure
from alignrec.testing.datasets import write_dataset


def plan(num_rows: int, *, ranks: int, micro: int, global_batch: int = 12) -> Plan:
    return Plan(
        rows=np.arange(num_rows),
        seed=5,
        global_batch_size=global_batch,
        micro_batch_size=micro,
        num_ranks=ranks,
        accumulation=global_batch // (micro * ranks),
        block_size=4,
        window_size=16,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000])
def test_permutation_is_one_and_has_its_inverse(size: int) -> None:
    values = np.arange(size)
    image = permute(values, size, np.uint64(7))
    assert sorted(image) == list(range(size))
    assert np.array_equal(unpermute(image, size, np.uint64(7)), values)


@pytest.mark.parametrize("num_samples", [1, 3, 4, 17, 100])
@pytest.mark.parametrize(("block", "window"), [(4, 16), (7, 5), (1000, 1000)])
def test_order_has_every_sample_once_and_any_slice_alone(
    num_samples: int, block: int, window: int
) -> None:
    order = EpochOrder(num_samples, 1, 0, block, window)
    whole = order.samples(np.arange(num_samples))
    assert sorted(whole) == list(range(num_samples))
    middle = np.arange(num_samples // 3, num_samples // 2)
    assert np.array_equal(order.samples(middle), whole[middle])


def test_orders_of_epochs_and_seeds_differ() -> None:
    orders = [
        EpochOrder(500, seed, epoch, 16, 64).samples(np.arange(500))
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    for a in range(3):
        for b in range(a):
            assert (orders[a] == orders[b]).mean() < 0.05


def test_blocks_stay_in_their_window_so_that_shards_are_read_in_large_pieces() -> None:
    whole = EpochOrder(256, 0, 0, 16, 32).samples(np.arange(256))
    for window in whole.reshape(-1, 32):
        assert len(np.unique(window // 16)) == 2


def test_held_out_share_and_stability() -> None:
    places = item_places(np.arange(10_000), seed=3)
    for fraction in (0.1, 0.5):
        assert (places < fraction).mean() == pytest.approx(fraction, abs=0.02)
    assert places.min() >= 0
    assert places.max() < 1
    assert np.array_equal(item_places(np.arange(20_000), seed=3)[:10_000], places)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (1, 4), (2, 3), (3, 2), (4, 3)])
def test_the_global_stream_does_not_depend_on_ranks_and_micro_batches(
    ranks: int, micro: int
) -> None:
    reference = plan(50, ranks=1, micro=12)
    split = plan(50, ranks=ranks, micro=micro)
    assert split.steps_per_epoch == 5
    seen = []
    for step in range(2 * split.steps_per_epoch):
        shares = [split.micro_batches(step, rank) for rank in range(ranks)]
        assert {len(share) for share in shares} == {12 // (ranks * micro)}
        rows = np.concatenate([share[m].rows for m in range(len(shares[0])) for share in shares])
        assert np.array_equal(rows, reference.global_batch(step).rows)
        seen.append(rows)
    first_epoch = np.concatenate(seen[:5])
    assert sorted(first_epoch) == list(range(50))
    assert not np.array_equal(first_epoch, np.concatenate(seen[5:]))


def make_reader(folder: Path, *, augment_seed: int | None = None) -> ItemReader:
    table = SampleTable.read(folder)
    return ItemReader(
        open_shards(folder, table, ShardsConfig()),
        lambda texts: [[0, *(ord(word[0]) for word in text.split()), 2] for text in texts],
        image_size=16,
        padding_id=1,
        augment_seed=augment_seed,
    )


def test_batches_hold_what_the_shards_hold(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", num_items=20, without_image=(3,), without_text=(5,))
    batch = make_reader(folder).read(MicroBatch(0, np.array([3, 5, 19])))
    assert batch.item_index.tolist() == [3, 5, 19]
    assert batch.has_image.tolist() == [False, True, True]
    assert batch.images.shape == (3, 16, 16, 3)
    assert batch.images[0].max() == 0
    assert batch.images[1].max() > 0
    assert batch.text_padding[:, 0].tolist() == [False, True, False]
    assert (batch.tokens[1] == 1).all()


def test_an_empty_share_becomes_one_padding_row(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", num_items=20)
    batch = make_reader(folder).read(MicroBatch(0, np.array([], dtype=np.int64)))
    assert batch.item_index.tolist() == [NO_ITEM]
    assert not batch.has_image.any()
    assert batch.text_padding.all()
    assert batch.tokens.shape == (1, 1)


def test_augmentation_is_a_function_of_epoch_and_item(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", num_items=20)
    reader = make_reader(folder, augment_seed=1)
    alone = reader.read(MicroBatch(2, np.array([7]))).images[0]
    among = reader.read(MicroBatch(2, np.array([1, 7, 4]))).images[1]
    later = reader.read(MicroBatch(3, np.array([7]))).images[0]
    assert np.array_equal(alone, among)
    assert not np.array_equal(alone, later)


def test_threads_keep_the_order(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", num_items=40)
    loader = Loader(make_reader(folder).read, num_threads=3, prefetch=5)
    wanted = [MicroBatch(0, np.array([i, 39 - i])) for i in range(20)]
    got = [batch.item_index.tolist() for batch in loader.batches(wanted)]
    assert got == [[i, 39 - i] for i in range(20)]


def damage(folder: Path, *, row: int, column: str) -> str:
    """Change one byte of a sample's picture or JSON; returns the shard's name."""
    table = SampleTable.read(folder)
    shard = table.shard_names[int(table.shard[row])]
    with (folder / shard).open("r+b") as file:
        file.seek(int(getattr(table, column)[row]) + 20)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return shard


@pytest.mark.parametrize("column", ["image_offset", "json_offset"])
def test_a_damaged_sample_and_its_shard_are_named(tmp_path: Path, column: str) -> None:
    folder = write_dataset(tmp_path / "d", num_items=20, samples_per_shard=10)
    shard = damage(folder, row=12, column=column)
    reader = make_reader(folder)
    reader.read(MicroBatch(0, np.array([0, 11, 13])))
    with pytest.raises(StageFailure, match=f"{shard}.*sample 12 .*checksum differs.*data_prep"):
        reader.read(MicroBatch(0, np.array([12])))
    (folder / shard).unlink()
    with pytest.raises(StageFailure, match=f"{shard}.*No such file"):
        reader.read(MicroBatch(0, np.array([12])))


def test_no_more_is_read_than_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dataset(tmp_path / "d", num_items=20, samples_per_shard=10)
    table = SampleTable.read(folder)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *of: (read.append(of[1]), pread(*of))[1])
    monkeypatch.setattr(hashlib, "file_digest", None)
    make_reader(folder).read(MicroBatch(0, np.array([3, 15])))
    assert sum(read) == sum(int(table.image_bytes[r] + table.json_bytes[r]) for r in (3, 15))


def test_shards_of_samples_without_checksums_are_verified_whole(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", num_items=20, samples_per_shard=10)
    shard = damage(folder, row=12, column="image_offset")
    samples = schema.read_samples(folder).drop_columns(["crc32"])
    pq.write_table(samples, folder / "samples.parquet")
    reader = make_reader(folder)
    reader.read(MicroBatch(0, np.array([0])))
    with pytest.raises(StageFailure, match=f"{shard}.*checksum differs from the manifest"):
        reader.read(MicroBatch(0, np.array([11])))


def test_a_storage_that_fails_is_asked_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "d", num_items=20, samples_per_shard=10)
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]
    pread = os.pread

    def failing(*of: int) -> bytes:
        if failures:
            raise failures.pop()
        return pread(*of)

    monkeypatch.setattr(os, "pread", failing)
    reader = make_reader(folder)
    assert reader.read(MicroBatch(0, np.array([3]))).item_index.tolist() == [3]
    failures.extend([OSError(errno.EIO, os.strerror(errno.EIO))] * 2)
    shard = SampleTable.read(folder).shard_names[0]
    with pytest.raises(StageFailure, match=f"{shard}: sample 3 is unreadable .*Input/output error"):
        reader.read(MicroBatch(0, np.array([3])))


@pytest.mark.parametrize(("limit", "most"), [(60, 30), (1024, 100), (resource.RLIM_INFINITY, 100)])
def test_shards_stay_open_as_far_as_the_process_may_have_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    folder = write_dataset(tmp_path / "d", num_items=100, samples_per_shard=1, image_size=8)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = make_reader(folder)
    reader.read(MicroBatch(0, np.arange(100)))
    assert len(list(Path("/proc/self/fd").iterdir())) - before == most
    assert artifacts.read(folder).counts["num_shards"] == 100


def test_the_sample_table_is_narrow_and_says_what_the_file_says(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", num_items=300, samples_per_shard=20, image_size=8)
    table = SampleTable.read(folder)
    wanted = schema.read_samples(folder)
    columns = [name for name in wanted.column_names if name != "shard"]
    for name in columns:
        assert np.array_equal(getattr(table, name), wanted[name].to_numpy()), name
    assert [table.shard_names[s] for s in table.shard] == wanted["shard"].to_pylist()
    assert sum(getattr(table, name).itemsize for name in (*columns, "shard")) <= 26


def test_crops_lie_inside_and_keep_half_of_the_area() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = crop_box(128, 192, rng=rng)
        assert 0 <= left < right <= 128 + 1e-9
        assert 0 <= top < bottom <= 192 + 1e-9
        assert (right - left) * (bottom - top) >= 0.5 * 128 * 192 - 1e-6


def test_decode_takes_the_whole_picture_without_rng() -> None:
    pixels = np.zeros((40, 20, 3), dtype=np.uint8)
    pixels[:, 10:] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    decoded = decode(file.getvalue(), size=8, rng=None, name="a")
    assert decoded[:, 0].max() < 40
    assert decoded[:, -1].min() > 215
    with pytest.raises(StageFailure, match="item 3 cannot be decoded"):
        decode(b"no picture", size=8, rng=None, name="item 3")


def jpeg(width: int, height: int, **options: object) -> bytes:
    """Encode a picture whose colours tell the place."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 128)], axis=2)
    file = io.BytesIO()
    image = Image.fromarray(pixels.astype(np.uint8))
    image.convert(str(options.pop("mode", "RGB"))).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(32, 32), (40, 90), (200, 130), (521, 263), (9, 7)])
def test_a_picture_is_what_pillow_makes_of_it(width: int, height: int) -> None:
    content = jpeg(width, height)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    wanted = np.asarray(whole.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    decoded = decode(content, size=32, rng=None, name="a")
    assert decoded.shape == (32, 32, 3)
    assert np.abs(decoded - wanted).mean() < 1.5
    assert np.abs(decoded - wanted).max() < 12


@pytest.mark.parametrize("shrunk", [1, 2, 4, 8])
def test_large_pictures_are_decoded_smaller_and_crops_stay_where_they_were(shrunk: int) -> None:
    """Colours tell the place, so a crop of the small decoding shows what one of the large does."""
    content = jpeg(32 * 8, 40 * 8)
    size = 256 // shrunk
    for seed in range(4):
        cropped = decode(content, size=size, rng=np.random.default_rng(seed), name="a")
        exact = np.random.default_rng(seed)
        flip = exact.random() < 0.5
        left, top, right, bottom = crop_box(256, 320, rng=exact)
        across = np.sort(cropped[size // 2, :, 0].astype(int))
        assert (cropped[size // 2, 0, 0] > cropped[size // 2, -1, 0]) == flip
        assert abs(across[0] - left) < 3 + 8
        assert abs(across[-1] - right) < 3 + 8
        down = cropped[:, size // 2, 1].astype(int) * 320 / 255
        assert abs(down[0] - top) < 3 + 8
        assert abs(down[-1] - bottom) < 3 + 8


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_four_colours_become_three(mode: str) -> None:
    decoded = decode(jpeg(64, 48, mode=mode), size=16, rng=None, name="a")
    assert decoded.shape == (16, 16, 3)
    assert decoded.max() > 100


def test_progressive_and_plain_jpegs_give_the_same_pixels() -> None:
    plain = decode(jpeg(64, 64), size=16, rng=None, name="a")
    assert np.array_equal(plain, decode(jpeg(64, 64, progressive=True), size=16, rng=None, name=""))


def test_a_truncated_picture_is_named() -> None:
    with pytest.raises(StageFailure, match="item 3 cannot be decoded"):
        decode(jpeg(64, 64)[:-300], size=16, rng=None, name="item 3")


@pytest.mark.parametrize("samples_per_shard", [7, 100])
def test_stopped_on_four_ranks_and_resumed_on_two_the_stream_of_items_is_the_same(
    tmp_path: Path, samples_per_shard: int
) -> None:
    folder = write_dataset(
        tmp_path / "d", num_items=50, samples_per_shard=samples_per_shard, image_size=8
    )
    reader = make_reader(folder)

    def items(ranks: int, steps: range) -> list[list[int]]:
        chosen = plan(50, ranks=ranks, micro=12 // ranks)
        stream = []
        for step in steps:
            shares = [chosen.micro_batches(step, rank) for rank in range(ranks)]
            assert {len(share) for share in shares} == {1}  # equal steps on every rank
            read = np.concatenate([reader.read(share[0]).item_index for share in shares])
            stream.append(read[read != NO_ITEM].tolist())
        return stream

    steps = 2 * plan(50, ranks=1, micro=12).steps_per_epoch
    middle = 3  # not at the end of an epoch
    resumed = items(4, range(middle)) + items(2, range(middle, steps))
    assert resumed == items(1, range(steps))
    assert sorted(itertools.chain(*resumed[: steps // 2])) == list(range(50))
