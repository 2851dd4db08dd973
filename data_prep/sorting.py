"""Rows in any order in, chunks in the order of item_index out, over the disk (catalogue -> chunks).

Rows are scattered into buckets, each a range of item_index; then each bucket is mapped into memory
and cut into chunks. So a catalogue of any size needs the memory of one batch and one chunk.
"""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

_BUCKET_BYTES = 64 << 20
_MAX_BUCKETS = 500  # each is an open file


def sorted_chunks(
    rows: Iterator[pa.Table], *, num_rows: int, max_rows: int, folder: Path
) -> Iterator[pa.Table]:
    """Yield rows in the order of item_index, ``max_rows`` at a time.

    Args:
        rows: tables of one schema; item_index 0 .. num_rows - 1, each once, in any order.
        num_rows: rows of all tables.
        max_rows: rows of every chunk but the last.
        folder: for the buckets; it is deleted at the end.
    """
    folder.mkdir()
    first = next(rows)
    row_bytes = first.nbytes / max(len(first), 1)
    num_chunks = -(-num_rows // max_rows)
    num_buckets = min(int(row_bytes * num_rows / _BUCKET_BYTES) + 1, _MAX_BUCKETS, num_chunks)
    bucket_rows = -(-num_chunks // num_buckets) * max_rows
    _scatter(itertools.chain([first], rows), folder, bucket_rows)
    for start in range(0, num_rows, bucket_rows):
        end = min(start + bucket_rows, num_rows)
        yield from _chunks_of(_bucket_path(folder, start // bucket_rows), start, end, max_rows)
    shutil.rmtree(folder)


def _bucket_path(folder: Path, bucket: int) -> Path:
    return folder / f"{bucket:06d}.arrow"


def _scatter(rows: Iterator[pa.Table], folder: Path, bucket_rows: int) -> None:
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    try:
        for table in rows:
            buckets = table["item_index"].to_numpy() // bucket_rows
            for bucket in np.unique(buckets).tolist():
                if bucket not in writers:
                    path = str(_bucket_path(folder, bucket))
                    writers[bucket] = pa.ipc.new_stream(path, table.schema)
                writers[bucket].write_table(table.filter(pa.array(buckets == bucket)))
    finally:
        for writer in writers.values():
            writer.close()


def _chunks_of(path: Path, start: int, end: int, max_rows: int) -> Iterator[pa.Table]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all()
    index = table["item_index"].to_numpy()
    for first in range(start, end, max_rows):
        chosen = (index >= first) & (index < first + max_rows)
        yield table.filter(pa.array(chosen)).sort_by("item_index").combine_chunks()
