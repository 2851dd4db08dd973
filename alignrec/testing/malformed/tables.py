"""Whole files of catalogue or log that cannot be used: each must fail the run, by its name.

A damaged file is the user's mistake, not a bad row: half a table would make a dataset that looks
complete (-> tests of data_prep).
"""

import bz2
import dataclasses
import gzip
import io
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_NUM_CUTS = 6
_UNPACKED_BYTES = 96 << 20


@dataclasses.dataclass(frozen=True)
class TableCase:
    """One file.

    Attributes:
        name: unique.
        file: name of the file.
        data: its bytes.
    """

    name: str
    file: str
    data: bytes


def table_cases(columns: tuple[str, ...], seed: int = 0) -> list[TableCase]:
    """Return every case for a table that must have ``columns``; equal seeds give equal bytes."""
    rng = np.random.default_rng([seed, 14])
    rows = [{name: f"{name}-{n}" for name in columns} for n in range(200)]
    forms = {"csv": _csv(rows), "jsonl": _json_lines(rows), "parquet": _parquet(rows)}
    return [
        *_cut(forms, rng),
        *_empty(),
        *_other_content(forms, rng),
        *_damaged_parquet(forms["parquet"], rng),
        *_other_columns(columns, rows),
        *_without_lines(),
    ]


def _csv(rows: list[dict[str, str]]) -> bytes:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


def _json_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _packed(data: bytes, kind: str) -> bytes:
    if kind == "zst":
        return bytes(pa.compress(data, codec="zstd", asbytes=True))
    return gzip.compress(data, 1, mtime=0) if kind == "gz" else bz2.compress(data)


def _cut(forms: dict[str, bytes], rng: np.random.Generator) -> Iterator[TableCase]:
    """Cut archives and parquet short: an upload that broke off."""
    for form in ("csv", "jsonl"):
        for kind in ("gz", "zst", "bz2"):
            whole = _packed(forms[form], kind)
            for length in sorted(rng.choice(np.arange(1, len(whole) - 9), _NUM_CUTS // 2, False)):
                name = f"{form}-{kind}-cut-at-{length:05d}"
                yield TableCase(name, f"table.{form}.{kind}", whole[:length])
    whole = forms["parquet"]
    for length in sorted({1, 4, 8, *rng.choice(np.arange(9, len(whole)), _NUM_CUTS, False)}):
        yield TableCase(f"parquet-cut-at-{length:05d}", "table.parquet", whole[:length])


def _empty() -> Iterator[TableCase]:
    for suffix in ("csv", "jsonl", "parquet", "tsv", "csv.gz", "csv.zst", "jsonl.gz"):
        yield TableCase(f"no-bytes-{suffix}", f"table.{suffix}", b"")
    yield TableCase("empty-gz", "table.csv.gz", _packed(b"", "gz"))
    yield TableCase("line-ends-csv", "table.csv", b"\n\n\n")


def _other_content(forms: dict[str, bytes], rng: np.random.Generator) -> Iterator[TableCase]:
    """A suffix that promises something else than what the file holds."""
    contents = {"noise": rng.bytes(2000), "zeros": bytes(2000), "html": b"<!doctype html>" * 50}
    for name, data in contents.items():
        for suffix in ("parquet", "csv.gz", "csv.zst", "csv.bz2", "jsonl.gz"):
            yield TableCase(f"{name}-as-{suffix}", f"table.{suffix}", data)
    packed = _packed(forms["csv"], "gz")
    yield TableCase("gz-as-zst", "table.csv.zst", packed)
    yield TableCase("gz-as-csv", "table.csv", packed)
    yield TableCase("csv-as-gz", "table.csv.gz", forms["csv"])
    yield TableCase("csv-as-parquet", "table.parquet", forms["csv"])
    yield TableCase("parquet-as-csv", "table.csv", forms["parquet"])
    yield TableCase("utf16-csv", "table.csv", forms["csv"].decode().encode("utf-16"))
    yield TableCase("one-json-array", "table.json", json.dumps([{"a": 1}] * 9).encode())
    yield TableCase("json-array-on-lines", "table.jsonl", b"[\n" + forms["jsonl"] + b"]\n")
    for suffix in ("txt", "xlsx", "pkl", "npy", "tar.gz", "sqlite", "csv.xz"):
        yield TableCase(f"suffix-{suffix}", f"table.{suffix}", forms["csv"])
    yield TableCase("no-suffix", "table", forms["csv"])


def _damaged_parquet(whole: bytes, rng: np.random.Generator) -> Iterator[TableCase]:
    yield TableCase("parquet-magic-alone", "table.parquet", b"PAR1PAR1")
    for name, length in {"huge": 2**31 - 1, "none": 0, "odd": 77, "negative": 2**32 - 1}.items():
        footer = whole[:-8] + struct.pack("<I", length) + b"PAR1"
        yield TableCase(f"parquet-footer-{name}", "table.parquet", footer)
    size = struct.unpack("<I", whole[-8:-4])[0]
    noise = whole[: -8 - size] + rng.bytes(size) + whole[-8:]
    yield TableCase("parquet-footer-noise", "table.parquet", noise)
    pages = b"PAR1" + rng.bytes(len(whole) - size - 12) + whole[-8 - size :]
    yield TableCase("parquet-pages-noise", "table.parquet", pages)


def _other_columns(columns: tuple[str, ...], rows: list[dict[str, str]]) -> Iterator[TableCase]:
    """Well-formed tables that lack a column, or have it twice."""
    key = columns[0]
    renamed = [{name.upper() + "_": value for name, value in row.items()} for row in rows]
    without = [{name: value for name, value in row.items() if name != key} for row in rows]
    for name, table in (("renamed", renamed), ("without-key", without)):
        for suffix, write in (("csv", _csv), ("jsonl", _json_lines), ("parquet", _parquet)):
            yield TableCase(f"{name}-{suffix}", f"table.{suffix}", write(table))
    twice = ",".join([*columns, key]) + "\n" + ",".join(["x"] * (len(columns) + 1)) + "\n"
    yield TableCase("column-twice-csv", "table.csv", twice.encode())
    array = pa.array(["x"])
    file = io.BytesIO()
    pq.write_table(pa.table([array] * (len(columns) + 1), names=[*columns, key]), file)
    yield TableCase("column-twice-parquet", "table.parquet", file.getvalue())
    semicolons = _csv(rows).replace(b",", b";")
    yield TableCase("semicolons-csv", "table.csv", semicolons)
    tabs = _csv(rows).replace(b",", b"\t")
    yield TableCase("tabs-csv", "table.csv", tabs)


def _without_lines() -> Iterator[TableCase]:
    """Small archives of one endless line: whoever reads lines would hold all of it."""
    for kind in ("gz", "zst"):
        for form, data in (("csv", b"x"), ("jsonl", b" x"), ("jsonl", b'{"a":')):
            packed = _packed(data * (_UNPACKED_BYTES // len(data)), kind)
            name = f"one-line-of-96-MB-{form}-{kind}-{len(data)}"
            yield TableCase(name, f"table.{form}.{kind}", packed)
