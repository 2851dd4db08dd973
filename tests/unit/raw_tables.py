"""Small tables in any format, for the tests of reading them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data_prep import locations, tables
from data_prep.tables import Columns, MalformedRow

ROWS: list[dict[str, Any]] = [
    {"key": "007", "name": "plain", "size": 1.5},
    {"key": "b, c", "name": 'quoted "x"\nsecond line', "size": None},
    {"key": "ü", "name": None, "size": 3.0},
]
COLUMNS = Columns("the.setting", text=("key", "name"), other=("size",))


def read(path: Path, columns: Columns = COLUMNS) -> tuple[list[dict[str, Any]], list[MalformedRow]]:
    malformed: list[MalformedRow] = []
    batches = tables.read_batches(locations.find([str(path)]), columns, malformed)
    return [row for batch in batches for row in batch.to_pylist()], malformed


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    table = pa.Table.from_pylist(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(".parquet"):
        pq.write_table(table, path)
        return
    if plain.endswith(".csv"):
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(table, sink)
        lines = sink.getvalue().to_pybytes()
    if path.suffix == ".gz":
        lines = gzip.compress(lines)
    if path.suffix == ".zst":
        lines = pa.Codec("zstd").compress(lines).to_pybytes()
    path.write_bytes(lines)
