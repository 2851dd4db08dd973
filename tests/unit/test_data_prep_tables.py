"""Raw tables: every format gives the same rows, and mistakes in them are named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from alignrec.errors import UserError
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


@pytest.mark.parametrize(
    "name", ["t.parquet", "t.csv", "t.jsonl", "t.csv.gz", "t.jsonl.gz", "t.jsonl.zst", "t.csv.zst"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    rows, malformed = read(tmp_path / name)
    assert not malformed
    assert [(row["key"], row["name"]) for row in rows] == [(r["key"], r["name"]) for r in ROWS]
    sizes = [None if row["size"] is None else float(row["size"] or "nan") for row in rows]
    assert sizes == [1.5, None, 3.0]


def test_many_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("2.jsonl", "1.csv", "3.parquet"):
        write(tmp_path / name, [{"key": name, "name": "x", "size": 1.0}])
    (tmp_path / "README.txt").write_text("not a table")
    expected = ["1.csv", "2.jsonl", "3.parquet"]
    assert [row["key"] for row in read(tmp_path)[0]] == expected
    assert [row["key"] for row in read(tmp_path / "*.*s*")[0]] == expected[:2]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1, None, 30]), ["1", None, "30"]),
        (pa.array([1.0, None, 30.0]), ["1", None, "30"]),
        (pa.array([1.5, 2.0]), ["1.5", "2"]),
        (pa.array([float("nan"), 7.0, None, 1e300]), [None, "7", None, "1e+300"]),
        (pa.array([0.5, 3.0, float("nan")], pa.float32()), ["0.5", "3", None]),
        (pa.array(["a", None]), ["a", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([["a", "b"], [], None, [None, "c"]]), ["a, b", "", None, "c"]),
        (pa.array([[["a"], ["b", "c"]]]), ["a, b, c"]),
        (pa.array([b"ok", b"\xff\xfe"]), ["ok", "\ufffd\ufffd"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([None, None]), [None, None]),
        (pa.array([{"x": 1}]), ['{"x": 1}']),
    ],
)
def test_columns_of_any_type_become_text(values: Any, expected: Any) -> None:
    assert tables.as_text(pa.chunked_array([values])).to_pylist() == expected


def test_a_missing_key_is_no_text_in_json_either(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"key": NaN}\n{"key": 7.0}\n')
    rows, _ = read(tmp_path / "t.jsonl", Columns("s", text=("key",)))
    assert [row["key"] for row in rows] == [None, "7"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.binary()])
def test_other_columns_are_numbers_dates_or_strings(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table(
        {
            "text": pa.array(["1", None], pa.string()).cast(kind),
            "category": pa.array(["1", None]).dictionary_encode(),
            "number": pa.array([1, None]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    columns = Columns("s", text=(), other=("text", "category", "number"))
    rows, _ = read(tmp_path / "t.parquet", columns)
    assert list(rows[0].values()) == ["1", "1", 1, 1]
    assert list(rows[1].values()) == [None, None, None, 2]


@pytest.mark.parametrize("kind", [pa.time64("us"), pa.duration("s"), pa.list_(pa.int64())])
def test_a_column_of_no_number_date_or_text_is_named(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"when": pa.nulls(2, kind)}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"the column 'when', which the.setting names, holds"):
        read(tmp_path / "t.parquet", Columns("the.setting", text=(), other=("when",)))


def test_strings_with_invalid_bytes_are_repaired(tmp_path: Path) -> None:
    offsets = pa.array([0, 2, 4], pa.int32()).buffers()[1]
    broken = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"\xff\xfeok"))
    pq.write_table(pa.table({"key": broken}), tmp_path / "t.parquet")
    rows, _ = read(tmp_path / "t.parquet", Columns("s", text=("key",)))
    assert [row["key"] for row in rows] == ["\ufffd\ufffd", "ok"]


def test_malformed_json_lines_are_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        json.dumps(ROWS[0]),
        "{broken",
        '"a string"',
        "",
        "[" * 10_000,
        json.dumps({"key": 12, "name": ["a", "b"], "size": 2.0}),
        '{"key": "\\ud800x", "name": "lone surrogate", "size": 1.0}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    rows, malformed = read(tmp_path / "t.jsonl")
    assert [row["key"] for row in rows] == ["007", "12", "?x"]
    assert rows[1]["name"] == "a, b"
    assert [row.where.rpartition(" ")[2] for row in malformed] == ["2", "3", "5"]


def test_malformed_csv_rows_are_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("key,name,size\na,b,1\nc,d\ne,f,2,9\ng,h,3\n")
    rows, malformed = read(tmp_path / "t.csv")
    assert [row["key"] for row in rows] == ["a", "g"]
    assert [row.detail for row in malformed] == [
        "2 columns instead of 3", "4 columns instead of 3",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_a_missing_column_names_the_nearest(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"t.{suffix}")
    with pytest.raises(
        UserError, match=r"no column 'nam', which the.setting names. Did you mean n"
    ):
        read(tmp_path / f"t.{suffix}", Columns("the.setting", text=("key", "nam")))


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_column_that_is_there_twice_is_named(tmp_path: Path, suffix: str) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["key", "key"])
    if suffix == "csv":
        pyarrow.csv.write_csv(table, tmp_path / "t.csv")
    else:
        pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"has 2 columns 'key': which of them the.setting names"):
        read(tmp_path / f"t.{suffix}", Columns("the.setting", text=("key",)))


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.csv.gz", "t.csv.zst"])
def test_names_of_columns_are_read_as_the_rows_are(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    assert tables.column_names(locations.find([str(tmp_path / name)])[0]) == list(ROWS[0])


def test_json_lines_have_no_header(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match=r"\.jsonl is none of a table with a header"):
        tables.column_names(locations.find([str(tmp_path / "t.jsonl")])[0])


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("cat.v2", "cat.v2"),
        ("cat.v2/items.csv", "cat.v2"),
        ("cat.v2/items", "cat.v2"),
        ("cat.v2/part-*", "cat.v2"),
        ("cat.*/*.csv", "."),
    ],
)
def test_the_folder_of_a_table_is_where_it_lies(tmp_path: Path, path: str, folder: str) -> None:
    (tmp_path / "cat.v2").mkdir()
    assert Path(locations.folder_of(str(tmp_path / path))) == tmp_path / folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"not parquet", "cannot be read as parquet"),
        ("t.parquet", b"", "cannot be read as parquet"),
        ("t.csv", b"", "cannot be read as csv"),
        ("t.csv.gz", b"not gzip", "cannot be read as csv"),
        ("t.json", b'[{"key": 1}]', "one JSON array"),
        ("t.xlsx", b"PK", "no reader for the suffix"),
    ],
)
def test_an_unreadable_file_is_the_users_mistake(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_truncated_parquet_file_is_the_users_mistake(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(data[:4] + bytes(60) + data[64:])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path / "t.parquet")


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "items.parquet")
    with pytest.raises(UserError, match=r"no such file\. Did you mean items.parquet"):
        locations.find([str(tmp_path / "item.parquet")])
    with pytest.raises(UserError, match="no parquet, CSV or JSON-lines file"):
        locations.find([str(tmp_path / "*.csv")])


def test_an_unknown_protocol_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        locations.find(["nosuch://host/items.parquet"])
