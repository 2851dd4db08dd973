"""Tables in pieces: numbers of rows, malformed rows, pictures, and what parquet may hold."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from raw_tables import read

from alignrec.errors import UserError
from data_prep import delimited, locations, parquet, readers, tables
from data_prep.tables import ROW, Columns, MalformedRows


def write_row_groups(path: Path, num_rows: int, rows_per_group: int) -> None:
    keys = [f"k{row}" for row in range(num_rows)]
    pq.write_table(pa.table({"key": keys}), path, row_group_size=rows_per_group)


@pytest.mark.parametrize("max_bytes", [1, 200, 10**9])
def test_pieces_are_the_files_rows_in_order(tmp_path: Path, max_bytes: int) -> None:
    write_row_groups(tmp_path / "1.parquet", 95, 10)
    (tmp_path / "2.csv").write_text("key\nx\ny\n")
    write_row_groups(tmp_path / "3.parquet", 5, 10)
    files = locations.find([str(tmp_path)])
    columns = Columns("s", text=("key",))
    found = tables.pieces(files, max_bytes=max_bytes)
    assert len(found) == {1: 12, 200: len(found), 10**9: 3}[max_bytes]
    whole = [row for batch in tables.read_batches(files, columns, []) for row in batch.to_pylist()]
    parts = [row for batch in tables.read_batches(found, columns, []) for row in batch.to_pylist()]
    assert parts == whole
    assert [row[ROW] for row in whole] == [*range(1, 96), 1, 2, *range(1, 6)]
    for piece in found:  # each by itself has the same numbers
        rows = [r for b in tables.read_batches([piece], columns, []) for r in b.to_pylist()]
        assert all(row in whole for row in rows)
        assert rows[0][ROW] == piece.first_row + 1


def test_malformed_rows_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_MALFORMED", 100)
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", 1 << 20)
    monkeypatch.setattr(delimited, "_HEADER_BYTES", 1 << 10)
    num_bad = 30_000  # in one block
    (tmp_path / "t.csv").write_text("key,b\n" + "x\n" * num_bad + "k,1\n")
    files, columns = locations.find([str(tmp_path / "t.csv")]), Columns("s", text=("key",))
    list(tables.read_batches(files, columns, MalformedRows()))  # what is loaded at first use
    malformed = MalformedRows()
    tracemalloc.start()
    rows = [row for b in tables.read_batches(files, columns, malformed) for row in b.to_pylist()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [{"key": "k", ROW: num_bad + 1}]
    assert malformed.total == num_bad
    assert peak < (1 << 20) + 64 * num_bad  # a block, and bytes a row: a list takes hundreds


@pytest.mark.parametrize("block_bytes", [40, 500, 1 << 20])
def test_numbers_of_rows_count_the_malformed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    good = rng.random(500) < np.repeat([0.7, 0.0, 1.0, 0.1, 0.7], 100)
    lines = [f"k{row},1" if fine else "broken" for row, fine in enumerate(good)]
    (tmp_path / "t.csv").write_text("key,b\n" + "\n".join(lines))
    rows, malformed = read(tmp_path / "t.csv", Columns("s", text=("key",)))
    assert [row[ROW] - 1 for row in rows] == np.flatnonzero(good).tolist()
    assert [row["key"] for row in rows] == [f"k{row[ROW] - 1}" for row in rows]
    numbers = [int(row.where.rpartition(" ")[2]) - 1 for row in malformed]
    assert numbers == np.flatnonzero(~good).tolist()


# --- pictures as bytes ---------------------------------------------------------------------------

PICTURES = [b"\xff\xd8jpeg", None, b""]
REFERENCES = ["a.jpg", "b.jpg", None]


@pytest.mark.parametrize(
    ("column", "references", "contents"),
    [
        (pa.array(REFERENCES), REFERENCES, [None] * 3),
        (pa.array(REFERENCES).dictionary_encode(), REFERENCES, [None] * 3),
        (pa.array(PICTURES), [None] * 3, [PICTURES[0], None, None]),
        (pa.array(PICTURES, pa.large_binary()), [None] * 3, [PICTURES[0], None, None]),
        (pa.array([b"abc"] * 3, pa.binary(3)), [None] * 3, [b"abc"] * 3),
        (
            pa.array([{"bytes": b, "path": p} for b, p in zip(PICTURES, REFERENCES, strict=True)]),
            [None, "b.jpg", None],
            [PICTURES[0], None, None],
        ),
        (pa.array([{"bytes": b"x"}, None, {"bytes": None}]), [None] * 3, [b"x", None, None]),
        (pa.nulls(3), [None] * 3, [None] * 3),
    ],
)
def test_pictures_are_references_or_bytes(
    tmp_path: Path, column: pa.Array, references: Any, contents: Any
) -> None:
    pq.write_table(pa.table({"key": ["1", "2", "3"], "image": column}), tmp_path / "t.parquet")
    columns = Columns("s", text=("key",), binary=("image",))
    rows, _ = read(tmp_path / "t.parquet", columns)
    assert [row["image"] for row in rows] == references
    assert [row[tables.bytes_column("image")] for row in rows] == contents


@pytest.mark.parametrize("coded", [True, False])
def test_batches_of_large_pictures_are_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coded: bool
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 1 << 20)
    pictures = [bytes([row % 251]) * 40_000 for row in range(100)]
    table = pa.table({"key": list(map(str, range(100))), "image": pictures})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=coded, compression="none")
    columns = Columns("s", text=("key",), binary=("image",))
    batches = list(tables.read_batches(locations.find([str(tmp_path / "t.parquet")]), columns, []))
    assert max(batch.get_total_buffer_size() for batch in batches) < 4 << 20
    assert sum(map(len, batches)) == 100


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "encoding": "DELTA_BYTE_ARRAY"}])
def test_values_that_repeat_take_no_more_memory_than_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Thousands of rows of one long value are a small file."""
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 1 << 18)
    monkeypatch.setattr(parquet, "_WORST_BATCH_BYTES", 1 << 20)
    value, num_rows = "x" * 5000, 4000
    columns: dict[str, Any] = {
        "key": [str(row) for row in range(num_rows)],
        "text": [value if row % 1000 else None for row in range(num_rows)],
    }
    if not options:
        columns["struct"] = [{"bytes": value.encode(), "path": "p"}] * num_rows
        columns["list"] = [[value, "y"]] * num_rows
    encoding = options.pop("encoding", None)
    pq.write_table(
        pa.table(columns), tmp_path / "t.parquet", **options,
        column_encoding=encoding and dict.fromkeys(columns, encoding),
    )  # fmt: skip
    assert (tmp_path / "t.parquet").stat().st_size < 1 << 18
    names = tuple(name for name in columns if name != "struct")
    wanted = Columns("s", text=names, binary=("struct",) if "struct" in columns else ())
    before, keys = pa.total_allocated_bytes(), []
    assert num_rows * len(value) > 16 << 20  # what one batch would take otherwise
    files = locations.find([str(tmp_path / "t.parquet")])
    for number, batch in enumerate(tables.read_batches(files, wanted, [])):
        assert pa.total_allocated_bytes() - before < 4 << 20
        assert batch.nbytes < 1 << 20
        keys += zip(batch["key"].to_pylist(), batch[ROW].to_pylist(), strict=True)
        if number == 3:  # the others are alike
            break
    assert keys == [(str(row), row + 1) for row in range(len(keys))]
    assert batch["text"].to_pylist()[-1] == value
    if not options and "struct" in columns:
        assert batch["struct:bytes"].to_pylist()[-1] == value.encode()
        assert batch["list"].to_pylist()[-1] == f"{value}, y"


def test_a_row_of_parquet_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_PARQUET_ROW_BYTES", 5_000_000)
    values = [["x"], ["y" * 1000] * 10_000, ["z"]]
    pq.write_table(pa.table({"key": ["a", "b", "c"], "list": values}), tmp_path / "t.parquet")
    assert len(read(tmp_path / "t.parquet", Columns("s", text=("key",)))[0]) == 3
    with pytest.raises(UserError, match=r"t\.parquet row 2 takes 10,000,00[01] bytes, more than"):
        read(tmp_path / "t.parquet", Columns("s", text=("key", "list")))


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_parquet_of_any_type_is_read_as_it_is(tmp_path: Path, use_dictionary: bool) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None, "a", ""]),
            "large": pa.array(["a", None, "b", "a"], pa.large_string()),
            "coded": pa.array(["a", "b", None, "a"]).dictionary_encode(),
            "bytes": pa.array([b"a", b"", None, b"a"]),
            "fixed": pa.array([b"ab", b"cd", None, b"ab"], pa.binary(2)),
            "number": pa.array([1, None, 3, 1]),
            "decimal": pa.array([1, 2, None, 1]).cast(pa.decimal128(30, 2)),
            "list": pa.array([["a", None], [], None, ["a"]]),
            "nested": pa.array([[{"x": ["a"], "y": 1}], [], None, [{"x": None, "y": None}]]),
            "map": pa.array([[("k", "v")], [], None, [("k", None)]], pa.map_("string", "string")),
        }
    )
    whole = [*table.to_pylist(), *table.to_pylist()]
    with pq.ParquetWriter(
        tmp_path / "t.parquet", table.schema, use_dictionary=use_dictionary
    ) as writer:
        writer.write_table(table, row_group_size=3)
        writer.write_table(table)
    wanted = Columns("s", text=tuple(table.column_names)[::-1])
    piece = locations.Piece(locations.find([str(tmp_path / "t.parquet")])[0])
    found = [row for batch in parquet.read_parquet(piece, wanted, []) for row in batch.to_pylist()]
    assert [{k: v for k, v in row.items() if k != ROW} for row in found] == whole
    assert [row[ROW] for row in found] == list(range(1, 9))


def test_a_column_whose_dictionary_is_given_up_is_read_as_it_is(tmp_path: Path) -> None:
    values = [f"value {row % 700}" if row < 2000 else f"other {row}" for row in range(5000)]
    table = pa.table({"key": values, "list": [[value] for value in values]})
    pq.write_table(
        table, tmp_path / "t.parquet", dictionary_pagesize_limit=4000, row_group_size=4000
    )
    rows, _ = read(tmp_path / "t.parquet", Columns("s", text=("key", "list")))
    assert [row["key"] for row in rows] == [row["list"] for row in rows] == values
