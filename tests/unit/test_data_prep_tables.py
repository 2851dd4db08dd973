"""Raw tables: every format gives the same rows, and mistakes in them are named."""

import bz2
import functools
import gzip
import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from raw_tables import COLUMNS, ROWS, read, write

from alignrec.errors import StageFailure, UserError
from data_prep import conversion, delimited, json_lines, locations, tables
from data_prep.tables import ROW, Columns


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


# --- hostile and unusual files -------------------------------------------------------------------


def read_text(path: Path, content: bytes, **columns: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows, and the places (row or line) that are malformed."""
    path.write_bytes(content)
    rows, malformed = read(path, Columns("s", text=("key",), **columns))
    return rows, [row.where.rpartition("/")[2] for row in malformed]


@pytest.mark.parametrize(
    ("name", "content", "expected", "malformed"),
    [
        ("bom.csv", b"\xef\xbb\xbfkey,b\nx,1\n", [("x", 1)], []),
        ("crlf.csv", b'key,b\r\nx,1\r\n\r\n"y\r\nz",2\r\n', [("x", 1), ("y\r\nz", 2)], []),
        ("nul.csv", b"key,b\nx\x00y,1\n", [("x\x00y", 1)], []),
        ("latin.csv", b"key,b\nx\xe9,1\n", [("x\ufffd", 1)], []),
        ("ragged_latin.csv", b"key,b\nx,1\n\xe9\ny,\xe9\n", [("x", 1), ("y", 3)], ["row 2"]),
        ("quotes.csv", b'key,b\n"say ""x"", y",1\nz"z,2\n', [('say "x", y', 1), ('z"z', 2)], []),
        ("ragged.csv", b"key,b\n1,\n2\n3,\n4,5,6\n7\n8,\n", [("1", 1), ("3", 3), ("8", 6)],
         ["row 2", "row 4", "row 5"]),
        ("header_only.csv", b"key,b\n", [], []),
        ("open_quote.csv", b'key,b\n1,2\n"3,4\n5,6\n', [("1", 1)], ["row 2"]),
        ("empty.jsonl", b"", [], []),
        ("blank.jsonl", b"\n \n", [], []),
        ("bom.jsonl", b'\xef\xbb\xbf{"key": "x"}\n', [("x", 1)], []),
        ("crlf.jsonl", b'{"key": "x"}\r\n\r\n{"key": 2}\r\n', [("x", 1), ("2", 3)], []),
        ("null.jsonl", b'null\n{"key": "x"}\n', [("x", 2)], ["line 1"]),  # crashes pyarrow
        ("null_2.jsonl", b'\n null\n{"key": "x"}\n', [("x", 3)], ["line 2"]),
        ("kinds.jsonl", b'{"key": "x"}\n"key"\n7\n[1]\n{}\n', [("x", 1), (None, 5)],
         ["line 2", "line 3", "line 4"]),
        ("latin.jsonl", b'{"key": "x\xe9"}\n{"key": 3}\n', [("x\ufffd", 1), ("3", 2)], []),
        ("twice.jsonl", b'{"key": "a", "key": "b"}\n', [("b", 1)], []),
        ("two.jsonl", b'{"key": "a"}{"key": "b"}\n{"key": "c"}\n', [("c", 2)], ["line 1"]),
        ("deep.jsonl", b'{"key": "x", "z": ' + b"[" * 99_999 + b"]" * 99_999 + b"}\n", [("x", 1)],
         []),
        ("deep_key.jsonl", b'{"key": ' + b"[" * 99_999 + b"]" * 99_999 + b'}\n{"key": "y"}\n',
         [(None, 1), ("y", 2)], []),
        ("digits.jsonl", b'{"z": ' + b"9" * 5000 + b', "key": "x"}\n{"key": 1}\n',
         [("x", 1), ("1", 2)], []),
        ("number.jsonl", b'{"key": NaN}\n{"key": 1e999}\n', [(None, 1), ("inf", 2)], []),
    ],
)  # fmt: skip
def test_unusual_text_is_read_or_reported(
    tmp_path: Path, name: str, content: bytes, expected: Any, malformed: list[str]
) -> None:
    rows, where = read_text(tmp_path / name, content)
    assert [(row["key"], row[ROW]) for row in rows] == expected
    assert where == [f"{name} {place}" for place in malformed]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "key,b\n1,2\n".encode("utf-16"), "t.csv is UTF-16, but tables must be UTF-8"),
        ("t.csv", b'key,b\n1,2\n"3,4\n' + b"5,6\n" * 2000, "row 2 goes on for 2,000 lines"),
        ("t.csv", b"k\xe9y,b\n1,2\n", "has no column 'key'"),
        ("t.csv", b"key,b\n1," + b"x" * (34 << 20), "a row longer than 16,777,216 bytes"),
        ("t.csv.gz", gzip.compress(b"key,b\n" + b"1,2\n" * 9999)[:-20], "Truncated compressed"),
        ("t.csv.bz2", bz2.compress(b"key,b\n" + b"1,2\n" * 9999)[:-9], "Truncated compressed"),
        ("t.jsonl.gz", gzip.compress(b'{"key": 1}\n' * 9999)[:-20], "Truncated compressed"),
        ("t.jsonl.gz", gzip.compress(b'{"key": 1}\n' * 99) + b"junk", "cannot be read as jsonl"),
        ("t.parquet", b"PAR1" + bytes(99) + b"PAR1", "cannot be read as parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / name, content)


def test_a_truncated_zstandard_file_is_named(tmp_path: Path) -> None:
    data = pa.Codec("zstd").compress(b"key,b\n" + b"1,2\n" * 9999).to_pybytes()
    with pytest.raises(UserError, match=r"t\.csv\.zst cannot be read as csv: Truncated"):
        read_text(tmp_path / "t.csv.zst", data[:-9])


def test_a_line_above_the_limit_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 1000)
    for size in (900, 1001, 1999, 2000, 2001, 5000):
        lines = [b'{"key": "a"}', b'{"key": "' + b"x" * (size - 11) + b'"}', b'{"key": "b"}']
        rows, where = read_text(tmp_path / "t.jsonl", b"\n".join(lines))
        kept = ["a", "x" * (size - 11), "b"] if size <= 1000 else ["a", "b"]
        assert [row["key"] for row in rows] == kept
        assert where == ([] if size <= 1000 else ["t.jsonl line 2"])
        assert [row[ROW] for row in rows] == ([1, 2, 3] if size <= 1000 else [1, 3])


def test_a_title_of_a_megabyte_is_a_title(tmp_path: Path) -> None:
    title = "x" * (1 << 20)
    for name, content in (("t.csv", f"key\n{title}\n"), ("t.jsonl", json.dumps({"key": title}))):
        rows, _ = read_text(tmp_path / name, content.encode())
        assert rows[0]["key"] == title


def test_which_lines_are_rows_does_not_depend_on_the_columns(tmp_path: Path) -> None:
    lines = [
        '{"key": "a", "b": 1}',
        '{"key": "b", "b": "x"}',
        '{"key": "c", "z": ' + "[" * 9999 + "]" * 9999 + "}",
        '{"key": "d", "b": [1, 2]}',
        '{"key": "e", "z": ' + "9" * 5000 + "}",
        '{"key": "f", "b": 1e400}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines[:3]) + "\n" + "\n".join(lines[3:]))
    one, bad_one = read(tmp_path / "t.jsonl", Columns("s", text=("key",)))
    two, bad_two = read(tmp_path / "t.jsonl", Columns("s", text=("key", "b")))
    assert [row["key"] for row in one] == [row["key"] for row in two] == list("abcdef")
    assert bad_one == bad_two == []


@pytest.mark.parametrize("depth", [99, 200, 500, 900])
@pytest.mark.parametrize("inner", ["1", "NaN", '{"b": 1, "a": [2]}'])
def test_lines_of_any_depth_are_rows_in_both_passes(tmp_path: Path, depth: int, inner: str) -> None:
    deep = '{"key": "a", "b": ' + "[" * depth + inner + "]" * depth + "}"
    (tmp_path / "t.jsonl").write_text(deep + '\n{"key": "b", "b": "x"}\n')

    def passes() -> tuple[list[Any], list[Any]]:
        one, bad_one = read(tmp_path / "t.jsonl", Columns("s", text=("key",)))
        two, bad_two = read(tmp_path / "t.jsonl", Columns("s", text=("key", "b")))
        assert bad_one == bad_two
        return [row["key"] for row in one], [row["key"] for row in two]

    def deeper(frames: int) -> tuple[list[Any], list[Any]]:
        return deeper(frames - 1) if frames else passes()

    one, two = passes()
    assert one == two == deeper(300)[0]
    assert one[-1] == "b"
    if inner != "NaN":  # which pyarrow refuses, and Python reads no deeper
        assert one == ["a", "b"]


@pytest.mark.parametrize("depth", [50, 200, 500, 900])
def test_values_of_any_depth_and_keys_of_any_kind_have_a_text(depth: int) -> None:
    value: Any = {2: "x", "1": [None, 1.5], (3, "a"): float("nan"), None: True}
    text = conversion.plain_text(value)
    assert text == '{"": true, "1": [null, 1.5], "2": "x", "3, a": NaN}'
    for wrap in (lambda v: [v], lambda v: (v,), lambda v: {1: v, "k": 2}, lambda v: {"k": [v]}):
        deep: Any = "end"
        for _ in range(depth):
            deep = wrap(deep)
        assert isinstance(conversion.plain_text(deep), str)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["3", "4.5"], [3.0, 4.5]),
        (["1234567890123456789", "null"], [1234567890123456789, None]),
        (['"2020-01-01"', "null"], ["2020-01-01", None]),
        (["3", '"x"'], ["3", "x"]),
        (["null", "7"], [None, 7]),
    ],
)
def test_numbers_of_json_keep_their_precision(
    tmp_path: Path, values: list[str], expected: Any
) -> None:
    content = "".join(f'{{"key": "k", "n": {value}}}\n' for value in values)
    rows, _ = read_text(tmp_path / "t.jsonl", content.encode(), other=("n",))
    assert [row["n"] for row in rows] == expected


def test_what_is_not_asked_for_may_change_its_type(tmp_path: Path) -> None:
    blocks = [b'{"key": "a", "price": 1}\n', b'{"key": "b", "price": {"usd": [1]}}\n']
    rows, where = read_text(tmp_path / "t.jsonl", b"".join(blocks))
    assert [row["key"] for row in rows] == ["a", "b"]
    assert where == []


def test_an_archive_that_unpacks_to_very_much_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", 1 << 20)
    rows = b"key,b\n" + b"x,1\n" * 2_500_000  # 10 MB from 30 kB
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(rows, compresslevel=1))
    columns = Columns("s", text=("key",))
    batches = tables.read_batches(locations.find([str(tmp_path / "t.csv.gz")]), columns, [])
    sizes = [(len(batch), batch.nbytes) for batch in batches]
    assert sum(size[0] for size in sizes) == 2_500_000
    assert max(size[1] for size in sizes) < 8 << 20


# --- where files lie -----------------------------------------------------------------------------


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Write no log."""

    def do_GET(self) -> None:
        if self.path.startswith("/forbidden"):
            self.send_error(403)
        elif self.path.startswith("/cut"):
            self.send_response(200)
            self.send_header("Content-Length", "99999")
            self.end_headers()
            self.wfile.write(b"key\nx\n")
        else:
            super().do_GET()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_tables_on_a_web_server(served: tuple[Path, str]) -> None:
    folder, address = served
    (folder / "parts").mkdir()
    for name in ("parts/2.parquet", "parts/1.csv.gz"):
        write(folder / name, [{"key": name, "name": "x", "size": 1.0}])
    keys = ["parts/1.csv.gz", "parts/2.parquet"]
    for paths in (
        [f"{address}/{key}" for key in keys],
        [f"{address}/parts/"],
        [f"{address}/parts/*.*"],
        [f"{address}/{key}?token=a*b" for key in keys],
    ):
        batches = tables.read_batches(locations.find(paths), COLUMNS, [])
        assert [row["key"] for batch in batches for row in batch.to_pylist()] == keys


@pytest.mark.parametrize(
    ("name", "message"), [("forbidden.csv", "cannot be reached: 403"), ("absent.csv", "no such")]
)
def test_a_web_server_that_refuses_is_named(
    served: tuple[Path, str], name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        locations.find([f"{served[1]}/{name}"])


def test_a_connection_that_breaks_is_no_mistake_of_the_users(served: tuple[Path, str]) -> None:
    (served[0] / "cut.csv").write_text("key\nx\n" * 100)
    files = locations.find([f"{served[1]}/cut.csv"])
    with pytest.raises(StageFailure, match=r"cut\.csv could not be read to its end: Client"):
        list(tables.read_batches(files, Columns("s", text=("key",)), []))


def test_other_file_systems_and_archives(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/catalogue/1.csv": b"key\na\n", "/catalogue/2.csv": b"key\nb\n"})
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("in/1.csv", "key\nc\n")
    columns = Columns("s", text=("key",))
    for path, expected in (
        ("memory://catalogue", ["a", "b"]),
        ("memory://catalogue/*2.csv", ["b"]),
        (f"zip://in/1.csv::{tmp_path}/z.zip", ["c"]),
    ):
        batches = tables.read_batches(locations.find([path]), columns, [])
        assert [row["key"] for batch in batches for row in batch.to_pylist()] == expected
    memory.rm("/catalogue", recursive=True)


def test_a_folder_is_its_tables_without_a_writers_leftovers(tmp_path: Path) -> None:
    for name in ("_delta_log/0.json", ".hidden.csv", "_temporary/x.csv", "b/2.csv", "1.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("key\nx\n")
    urls = [file.url for file in locations.find([str(tmp_path)])]
    assert [url.rpartition(f"{tmp_path.name}/")[2] for url in urls] == ["1.csv", "b/2.csv"]
    (tmp_path / "a[1].csv").write_text("key\nx\n")
    assert len(locations.find([str(tmp_path / "a[1].csv")])) == 1
