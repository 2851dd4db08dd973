"""Rows of catalogue and log that are broken, hostile or odd, with verdicts (-> tests of data_prep).

A row comes as a line of CSV or JSON, or as the values of a parquet row. Rows of the catalogue have
the columns of ITEM_COLUMNS, rows of the log those of LOG_COLUMNS.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal

from alignrec.testing.malformed import GOOD, one_of

Table = Literal["items", "interactions"]
Format = Literal["csv", "jsonl", "parquet"]

ITEM_COLUMNS = ("item_id", "title", "description", "image")
LOG_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
MAX_KEY_BYTES = 256
_DEPTH = 100_000


@dataclasses.dataclass(frozen=True)
class RowCase:
    """One row.

    Attributes:
        name: unique.
        table: where it belongs.
        form: format of the file that it stands in.
        row: the line without its end, or the values of a parquet row.
        verdicts: any of them is right.
        key: what the dataset or the quarantine calls it (the item's key, the user's key); None: the
            row has no key of its own.
    """

    name: str
    table: Table
    form: Format
    row: bytes | dict[str, Any]
    verdicts: frozenset[str]
    key: str | None = None


def item_rows(good_key: str) -> list[RowCase]:
    """Return the rows of a catalogue that also has an item ``good_key``, in an earlier row."""
    return [*_item_csv(good_key), *_item_json(good_key), *_item_parquet(good_key)]


def log_rows(good_item: str) -> list[RowCase]:
    """Return the rows of a log whose catalogue has the item ``good_item``."""
    return [*_log_csv(good_item), *_log_json(good_item), *_log_parquet(good_item)]


def _item_csv(good_key: str) -> Iterator[RowCase]:
    missing = {
        "nothing": b"", "quotes": b'""', "blanks": b"    ", "tab": b"\t",
        "no-break-space": "\u00a0".encode(), "em-space": "\u2003".encode(),
    }  # fmt: skip
    for name, blank in missing.items():
        yield _item(f"csv-key-{name}", "csv", blank + b",title,text,", "missing_key")
    long = {"ascii": "k" * (MAX_KEY_BYTES + 1), "chinese": "\u6f22" * 86, "huge": "h" * 1_000_000}
    for name, text in long.items():
        yield _item(f"csv-key-long-{name}", "csv", f"{text},,,".encode(), "invalid_key")
    for code in (0x00, 0x01, 0x07, 0x08, 0x0B, 0x1B, 0x1F, 0x7F):
        line = b"key%cend,title,text," % code
        yield _item(f"csv-key-control-{code:02x}", "csv", line, "invalid_key")
    yield _item("csv-key-line-end", "csv", b'"key\nend",title,text,', "invalid_key")
    yield _item("csv-key-twice", "csv", f"{good_key},again,,".encode(), "duplicate_key", good_key)
    for name, ragged in {
        "one-column": b"ragged-1", "two-columns": b"ragged-2,title",
        "five-columns": b"ragged-5,a,b,c,d", "fifty-columns": b"ragged-50" + b",x" * 49,
    }.items():  # fmt: skip
        yield _item(f"csv-{name}", "csv", ragged, "malformed_row")
    for name, key in {
        "longest": "l" * MAX_KEY_BYTES, "spaces-around": " padded ",
        "traversal": "../../etc/passwd",
        "markup": "<script>alert(1)</script>", "formula": "=1+1", "variable": "${HOME}",
        "zeros": "007", "number": "1e5", "arabic": "\u0645\u0641\u062a\u0627\u062d",
        "emoji": "\U0001f9e2", "none": "None", "null": "null", "nan": "NaN", "semicolon": "a;b",
        "percent": "%s%n%d", "backslash": "a\\b", "sql": "x' OR '1'='1", "minus": "-1",
    }.items():  # fmt: skip
        yield _item(f"csv-key-{name}", "csv", f"{key},title,text,".encode(), GOOD, key)
    texts = {
        "long-title": b"t" * 1_000_000, "controls": b"a\x01b\x08c\x1b[31m",
        "not-utf8": b"caf\xe9",
        "overlong-utf8": b"a\xc0\xafb", "utf16-half": b"a\xed\xa0\x80b",
        "entities": b"&lt;b&#0;&amp;",
        "right-to-left": "a\u202eb\u2066c".encode(), "combining": ("e" + "\u0301" * 5000).encode(),
        "line-separator": "a\u2028b".encode(), "quotes": b'"say ""hi"""', "markup": b"</script><b>",
    }  # fmt: skip
    for name, data in texts.items():
        key = f"text-{name}"
        yield _item(f"csv-{key}", "csv", key.encode() + b"," + data + b"," + data + b",", GOOD, key)


def _item_json(good_key: str) -> Iterator[RowCase]:
    broken = {
        "cut": b'{"item_id": "j-cut", "title": "a', "text": b"item_id=1", "array": b'["j-array"]',
        "string": b'"j-string"', "number": b"17", "null": b"null", "true": b"true",
        "single-quotes": b"{'item_id': 'j-quotes'}", "comma": b'{"item_id": "j-comma",}',
        "no-quotes": b"{item_id: 1}", "comment": b'{"item_id": "j-c"} // why', "brace": b"}",
        "control": b'{"item_id": "j-\x01"}',
        "bad-escape": b'{"item_id": "j-\\x"}', "bytes": b"\x00\x01\x02\x03",
    }  # fmt: skip
    for name, line in broken.items():
        yield _item(f"json-{name}", "jsonl", line, "malformed_row")
    missing: dict[str, dict[str, Any]] = {
        "absent": {}, "null": {"item_id": None}, "empty": {"item_id": ""},
        "blank": {"item_id": " \n "}, "list": {"item_id": []},
    }  # fmt: skip
    for name, row in missing.items():
        yield _item(f"json-key-{name}", "jsonl", _line(row), "missing_key")
    deep = {"arrays": (b"[", b"]"), "objects": (b'{"a":', b"}")}
    for name, (begin, end) in deep.items():  # a row whose key is no text
        line = b'{"item_id": ' + begin * _DEPTH + b"1" + end * _DEPTH + b"}"
        yield _item(f"json-key-nested-{name}", "jsonl", line, "missing_key")
    yield _item("json-not-utf8", "jsonl", b'{"item_id": "j-\xff\xfe"}', GOOD, "j-\ufffd\ufffd")
    yield _item("json-key-nan", "jsonl", b'{"item_id": NaN}', "missing_key")
    invalid = {"nul": "a\x00b", "line-end": "a\nb", "escape": "a\x1bb", "long": "k" * 300}
    for name, key in invalid.items():
        yield _item(f"json-key-{name}", "jsonl", _line({"item_id": key}), "invalid_key")
    twice = _line({"item_id": good_key, "title": "again"})
    yield _item("json-key-twice", "jsonl", twice, "duplicate_key", good_key)
    kept: dict[str, tuple[Any, str]] = {
        "integer": (170_001, "170001"), "whole-float": (170_002.0, "170002"),
        "boolean": (True, "true"), "huge": (10**40, str(10**40)),
    }  # fmt: skip
    for name, (value, key) in kept.items():
        yield _item(f"json-key-{name}", "jsonl", _line({"item_id": value}), GOOD, key)
    titles = {"object": {"a": [1]}, "list": ["a", None, ["b"]], "number": 5, "surrogate": "\ud800",
              "nul": "a\x00b", "megabyte": "m" * 1_000_000, "false": False}  # fmt: skip
    for name, title in titles.items():
        key = f"json-title-{name}"
        yield _item(key, "jsonl", _line({"item_id": key, "title": title}), GOOD, key)
    references = {"number": (17, "image_missing"), "object": ({"url": "x"}, "image_missing"),
                  "nul": ("a\x00.jpg", "image_forbidden_location"), "blank": (" ", "image_missing"),
                  "long": ("p" * 100_000, "image_unreadable"),
                  "above": ("../outside/picture.jpg", "image_forbidden_location"),
                  "absolute": ("/etc/passwd", "image_forbidden_location"),
                  "root": (".", "image_forbidden_location"),
                  "newline": ("a\n.jpg", "image_missing")}  # fmt: skip
    for name, (reference, reason) in references.items():
        key = f"json-image-{name}"
        yield _item(key, "jsonl", _line({"item_id": key, "image": reference}), reason, key)


def _item_parquet(good_key: str) -> Iterator[RowCase]:
    rows: dict[str, tuple[str | None, str]] = {
        "null": (None, "missing_key"), "empty": ("", "missing_key"),
        "blank": ("\t ", "missing_key"),
        "control": ("a\x02b", "invalid_key"), "long": ("k" * 257, "invalid_key"),
        "twice": (good_key, "duplicate_key"), "del": ("a\x7f", "invalid_key"),
    }  # fmt: skip
    for name, (key, reason) in rows.items():
        own = good_key if reason == "duplicate_key" else None
        row = {"item_id": key, "title": "t", "description": None, "image": None}
        yield RowCase(f"parquet-key-{name}", "items", "parquet", row, one_of(reason), own)


def _log_csv(good_item: str) -> Iterator[RowCase]:
    def case(name: str, user: str, item: str, rest: str, verdict: str) -> RowCase:
        line = f"{user},{item},{rest}".encode("utf-8", "surrogateescape")
        return RowCase(
            f"log-csv-{name}", "interactions", "csv", line, one_of(verdict), user.strip() or None
        )

    right = "4.0,1700000000"
    for name, user in {"empty": "", "blank": "  ", "tab": "\t"}.items():
        yield case(f"user-{name}", user, good_item, right, "missing_user")
    for name, user in {"control": "u\x01", "nul": "u\x00", "long": "u" * 300}.items():
        bad = case(f"user-{name}", user, good_item, right, "invalid_key")
        yield dataclasses.replace(bad, key=None)
    for name, item in {"empty": "", "blank": "   "}.items():
        yield case(f"item-{name}", f"ghost-item-{name}", item, right, "missing_item")
    for name, item in {
        "unknown": "nobody-sells-this", "case": good_item.upper() + "X", "padded": f" {good_item}",
        "control": good_item + "\x01", "long": "i" * 5000, "path": f"./{good_item}",
    }.items():  # fmt: skip
        yield case(f"item-{name}", f"ghost-unknown-{name}", item, right, "unknown_item")
    ratings = ("abc", "1e300", "inf", "-inf", '"1,5"', "0x10", "--5", "1e", "five", "\u0663",
               "\u221e", "1_000", "4/5", "+", ".", "1e999", "99999999999", "4.0.0",
               "$5")  # fmt: skip
    for number, rating in enumerate(ratings):
        user = f"ghost-rating-{number}"
        yield case(f"rating-{number}", user, good_item, f"{rating},1700000000", "bad_rating")
    times = ("2024-02-30", "2024-13-01", "yesterday", "1e30", "99999999999999999999", "12:00",
             "2024-01-01T25:00:00", "0000-00-00", "01/02/2024", "2024-02-30 10:00:00Z", "Infinity",
             "2024-01-01T10:00:00+99:99", "-", "0x5f", "2024-W05", "20 000")  # fmt: skip
    for number, moment in enumerate(times):
        user = f"ghost-time-{number}"
        yield case(f"time-{number}", user, good_item, f"4.0,{moment}", "bad_timestamp")
    for name, line in {
        "one-column": "ragged", "three-columns": f"ragged,{good_item},4.0",
        "five-columns": f"ragged,{good_item},4.0,1,1", "many-columns": "r" + "," * 60,
    }.items():  # fmt: skip
        row = line.encode()
        yield RowCase(f"log-csv-{name}", "interactions", "csv", row, one_of("malformed_row"))
    odd = {
        "no-rating": ",1700000000", "no-time": "4.0,", "neither": ",", "negative": "-3,-5",
        "date": "4.0,2024-02-29", "moment": "4.0,2024-02-29T10:00:00Z", "blank-rating": "  ,1",
        "precise": "4.000000000000000001,1700000000.75", "exponent": "4e0,17e8",
    }  # fmt: skip
    for name, rest in odd.items():
        yield case(f"odd-{name}", f"odd-{name}", good_item, rest, GOOD)


def _log_json(good_item: str) -> Iterator[RowCase]:
    for name, line in {
        "cut": b'{"user_id": "u', "array": b"[1, 2, 3]", "text": b"user_id,item_id",
        "null": b"null",
        "nested": b'{"user_id": ' + b"[" * _DEPTH, "bytes": b"\xff\xfe\xfd", "brace": b"{",
    }.items():  # fmt: skip
        broken = one_of("malformed_row")
        yield RowCase(f"log-json-{name}", "interactions", "jsonl", line, broken)
    right = {"item_id": good_item, "rating": 4.0, "timestamp": 1_700_000_000}
    changed: dict[str, tuple[dict[str, Any], str]] = {
        "item-object": ({"item_id": {"a": 1}}, "unknown_item"),
        "item-null": ({"item_id": None}, "missing_item"),
        "item-number": ({"item_id": 5}, "unknown_item"),
        "rating-text": ({"rating": "good"}, "bad_rating"),
        "rating-object": ({"rating": {"stars": 5}}, "bad_rating"),
        "rating-true": ({"rating": True}, "bad_rating"),
        "rating-huge": ({"rating": 1e12}, "bad_rating"),
        "time-object": ({"timestamp": {"$date": 1}}, "bad_timestamp"),
        "time-text": ({"timestamp": "last week"}, "bad_timestamp"),
        "time-huge": ({"timestamp": 1e25}, "bad_timestamp"),
        "time-true": ({"timestamp": True}, "bad_timestamp"),
    }
    for name, (change, reason) in changed.items():
        key = f"ghost-json-{name}"
        line = _line({"user_id": key, **right, **change})
        yield RowCase(f"log-json-{name}", "interactions", "jsonl", line, one_of(reason), key)
    for name, user in {"null": None, "empty": "", "absent": ...}.items():
        row = {**right} if user is ... else {"user_id": user, **right}
        yield RowCase(
            f"log-json-user-{name}", "interactions", "jsonl", _line(row), one_of("missing_user")
        )


def _log_parquet(good_item: str) -> Iterator[RowCase]:
    nan, inf = float("nan"), float("inf")
    rows: dict[str, tuple[float | None, float | None, str]] = {
        "rating-inf": (inf, 1.0, "bad_rating"), "rating-minus-inf": (-inf, 1.0, "bad_rating"),
        "rating-huge": (1e300, 1.0, "bad_rating"), "rating-nan": (nan, 1.0, GOOD),
        "rating-null": (None, 1.0, GOOD), "rating-tiny": (5e-324, 1.0, GOOD),
        "time-huge": (4.0, 1e30, "bad_timestamp"), "time-inf": (4.0, inf, "bad_timestamp"),
        "time-nan": (4.0, nan, GOOD), "time-null": (4.0, None, GOOD),
        "time-minus-huge": (4.0, -1e30, "bad_timestamp"), "time-negative": (4.0, -5.5, GOOD),
    }  # fmt: skip
    for name, (rating, moment, verdict) in rows.items():
        key = f"{'odd' if verdict == GOOD else 'ghost'}-parquet-{name}"
        row = {"user_id": key, "item_id": good_item, "rating": rating, "timestamp": moment}
        yield RowCase(f"log-parquet-{name}", "interactions", "parquet", row, one_of(verdict), key)


def _item(name: str, form: Format, line: bytes, verdict: str, key: str | None = None) -> RowCase:
    return RowCase(name, "items", form, line, one_of(verdict), key)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode()
