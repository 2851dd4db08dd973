"""Six hundred malformed inputs: good items are kept, bad ones listed, nothing hangs or crashes."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from alignrec import artifacts, stage
from alignrec.data import schema
from alignrec.testing.malformed import GOOD, pictures, rows, tables, web
from alignrec.testing.malformed.pictures import COLOUR, PictureCase, good_picture
from alignrec.testing.malformed.rows import ITEM_COLUMNS, LOG_COLUMNS, RowCase
from alignrec.testing.malformed.web import HostileHost, WebCase
from data_prep import STAGE
from data_prep.config import ImagesConfig
from data_prep.fetching import Fetcher
from data_prep.images import BadImage, ImageRules

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
NUM_GOOD = 80
NUM_GOOD_USERS = 40
TIMEOUT_SECONDS = 240
DRIVER_MIB = 900  # Ray and Arrow alone take about 400
HTTP = {"timeout_seconds": 1.0, "total_seconds": 2.0, "retries": 1, "backoff_seconds": 0.05}
PICTURE_RULES = {"max_side": 64, "max_bytes": pictures.MAX_BYTES, "max_pixels": pictures.MAX_PIXELS}
# What reads all pictures in one process and tells its peak memory in MiB.
READ_ALL = """
import resource, sys
from data_prep.config import ImagesConfig
from data_prep.fetching import Fetcher
from data_prep.images import BadImage, ImageRules, prepare
config = ImagesConfig(max_bytes={max_bytes}, max_pixels={max_pixels})
rules = ImageRules.of(config, root=sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
with Fetcher(rules) as fetcher:
    for name in sys.argv[2:]:
        try:
            prepare(fetcher.read(name), rules)
        except BadImage:
            pass
print(peak() - before)
"""


class Raw:
    """A catalogue and a log of good and bad rows, written to ``folder``."""

    def __init__(self, folder: Path, host: HostileHost) -> None:
        self.folder = folder
        self.port = host.port
        self.pictures: dict[str, PictureCase] = {
            f"picture-{case.name}": case for case in pictures.picture_cases()
        }
        self.addresses: dict[str, WebCase] = {case.name: case for case in web.web_cases(host)}
        self.items = rows.item_rows("good-000")
        self.log = rows.log_rows("good-001")
        self.places: dict[str, tuple[str, int]] = {}  # name of a row -> (file, number of the row)
        self.good_items = {f"good-{n:03d}" for n in range(NUM_GOOD)}
        self.good_users = {f"user-{n:03d}" for n in range(NUM_GOOD_USERS)}
        self._write_items()
        self._write_log()

    def _write_items(self) -> None:
        root = self.folder / "images"
        root.mkdir(parents=True)
        listed = []
        for number, key in enumerate(sorted(self.good_items)):
            (root / f"{key}.jpg").write_bytes(good_picture(seed=number))
            listed.append((key, f"{key}.jpg"))
        bad = [(key, pictures.write_picture(case, root)) for key, case in self.pictures.items()]
        bad += [(key, case.reference) for key, case in self.addresses.items()]
        order = np.random.default_rng(5).permutation(len(bad))
        listed += [bad[place] for place in order]
        table = [
            {"item_id": key, "title": f"Title {key}", "description": "words", "image": reference}
            for key, reference in listed
        ]
        self._write("items", ITEM_COLUMNS, table, self.items)

    def _write_log(self) -> None:
        rng = np.random.default_rng(6)
        items = sorted(self.good_items)
        table = [
            {"user_id": user, "item_id": items[place], "rating": 4.0, "timestamp": 1.7e9 + place}
            for user in sorted(self.good_users)
            for place in rng.choice(len(items), 8, replace=False)
        ]
        self._write("log", LOG_COLUMNS, table, self.log)

    def _write(
        self, name: str, columns: tuple[str, ...], table: list[dict[str, Any]], cases: list[RowCase]
    ) -> None:
        """Write a table's three files; every second row of those of lines is a good one."""
        own = [case for case in cases if case.form == "parquet"]
        whole = [*table, *(case.row for case in own)]
        for number, case in enumerate(own, start=len(table) + 1):
            self.places[case.name] = (f"{name}.parquet", number)
        pq.write_table(pa.Table.from_pylist(whole), self.folder / f"{name}.parquet")
        self._write_lines(name, "csv", cases, first=",".join(columns).encode())
        self._write_lines(name, "jsonl", cases)

    def _write_lines(
        self, name: str, form: str, cases: list[RowCase], *, first: bytes | None = None
    ) -> None:
        lines = []
        for number, case in enumerate(case for case in cases if case.form == form):
            assert isinstance(case.row, bytes)
            self.places[case.name] = (f"{name}.{form}", 2 * number + 1)
            key = f"{form}-good-{number}"
            if name == "items":
                self.good_items.add(key)
                good = {"item_id": key, "title": "t", "description": "d", "image": None}
            else:
                self.good_users.add(key)
                good = {"user_id": key, "item_id": "good-002", "rating": 3.5, "timestamp": 1.7e9}
            lines += [case.row, _line(good, form)]
        head = [] if first is None else [first]
        (self.folder / f"{name}.{form}").write_bytes(b"\n".join([*head, *lines]) + b"\n")

    def section(self, **changes: Any) -> dict[str, Any]:
        def files(name: str) -> list[str]:
            return [str(self.folder / f"{name}.{form}") for form in ("parquet", "csv", "jsonl")]

        return {
            "items": {
                "path": files("items"),
                "columns": {"text": ["title", "description"]},
            },
            "interactions": {
                "path": files("log"),
                "columns": {"rating": "rating", "timestamp": "timestamp"},
            },
            "images": {
                **PICTURE_RULES,
                "root": str(self.folder / "images"),
                "allowed_schemes": ["http"],
                "allowed_hosts": [web.HOST],
                "private_hosts": [web.HOST],
                "http": HTTP,
            },
            "shards": {"max_samples": 60},
            "max_bad_fraction": 1.0,
            "num_cpus": 2,
            "object_store_bytes": 100_000_000,
            **changes,
        }


def _line(row: dict[str, Any], form: str) -> bytes:
    if form == "jsonl":
        return json.dumps(row).encode()
    return ",".join("" if value is None else str(value) for value in row.values()).encode()


class Run:
    """One run of ``python -m data_prep``, waited for with a time limit."""

    def __init__(self, output: Path, section: dict[str, Any]) -> None:
        recipe = output.with_name(output.name + ".yaml")
        recipe.write_text(yaml.safe_dump({"data_prep": section}))
        command = [sys.executable, "-m", "data_prep", f"--output={output}", f"--recipe={recipe}"]
        log = output.with_name(output.name + ".txt")
        began = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
            timer = subprocess.Popen([sys.executable, "-c", _KILLER, str(process.pid)])
            _, status, usage = os.wait4(process.pid, 0)
        timer.kill()
        timer.wait()
        process.returncode = os.waitstatus_to_exitcode(status)
        self.output = output
        self.exit_code = process.returncode
        self.seconds = time.monotonic() - began
        self.peak_mib = usage.ru_maxrss >> 10
        self.told = log.read_text()


# A process that waits for its parent's child cannot be given a time limit by wait4.
_KILLER = f"""
import os, signal, sys, time
time.sleep({TIMEOUT_SECONDS})
os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raw]:
    with HostileHost() as host:
        yield Raw(tmp_path_factory.mktemp("raw"), host)


@pytest.fixture(scope="module")
def run(raw: Raw, tmp_path_factory: pytest.TempPathFactory) -> Run:
    result = Run(tmp_path_factory.mktemp("prepared") / "dataset", raw.section())
    assert result.exit_code == 0, result.told
    return result


@pytest.fixture(scope="module")
def listed(run: Run) -> list[dict[str, str]]:
    """The rows of the quarantine."""
    rows_listed: list[dict[str, str]] = pq.read_table(run.output / "quarantine.parquet").to_pylist()
    return rows_listed


def test_there_are_many_and_all_differ(raw: Raw) -> None:
    cases: list[Any] = [*raw.pictures.values(), *raw.addresses.values(), *raw.items, *raw.log]
    cases += tables.table_cases(ITEM_COLUMNS)
    assert len({case.name for case in cases}) == len(cases) > 600
    contents = [case.data for case in raw.pictures.values() if case.place == "file"]
    assert len(set(contents)) == len(contents)
    again = {case.name: case.data for case in pictures.picture_cases()}
    assert all(again[case.name] == case.data for case in raw.pictures.values())


def test_the_run_ends_in_time_and_in_bounded_memory(run: Run) -> None:
    assert run.seconds < TIMEOUT_SECONDS
    assert run.peak_mib < DRIVER_MIB
    assert "Traceback" not in run.told


def test_all_good_items_and_users_are_kept_and_nobody_else(run: Run, raw: Raw) -> None:
    items = schema.read_items(run.output)["item_key"].to_pylist()
    expected = raw.good_items | raw.pictures.keys() | raw.addresses.keys()
    expected |= {case.key for case in raw.items if case.key and _keeps_item(case)}
    assert sorted(items) == sorted(expected)
    users = schema.read_users(run.output)["user_key"].to_pylist()
    expected = raw.good_users | {case.key for case in raw.log if case.key and GOOD in case.verdicts}
    assert sorted(users) == sorted(expected)
    counts = artifacts.verify(run.output).counts
    held = sum(counts[f"num_{split}"] for split in schema.SPLITS)
    assert held == NUM_GOOD_USERS * 8 + len(users) - NUM_GOOD_USERS


def _keeps_item(case: RowCase) -> bool:
    return GOOD in case.verdicts or any(verdict.startswith("image") for verdict in case.verdicts)


def test_every_bad_picture_is_listed_once_with_its_reason_and_no_good_one(
    run: Run, raw: Raw, listed: list[dict[str, str]]
) -> None:
    verdicts = {key: case.verdicts for key, case in (raw.pictures | raw.addresses).items()}
    verdicts |= {
        case.key: case.verdicts for case in raw.items if case.key and case.key.startswith("json-im")
    }
    found: dict[str, list[str]] = {}
    for row in listed:
        if row["source"] == "images":
            found.setdefault(row["key"], []).append(row["reason"])
            assert "\n" not in row["detail"]
            assert len(row["detail"]) <= 200
    items = schema.read_items(run.output).to_pylist()
    has_image = {row["item_key"]: row["has_image"] for row in items}
    wrong = {
        key: (found.get(key, [GOOD]), set(verdict))
        for key, verdict in verdicts.items()
        if len(found.get(key, [GOOD])) != 1
        or found.get(key, [GOOD])[0] not in verdict
        or has_image[key] != (key not in found)
    }
    assert wrong == {}
    assert found.keys() <= verdicts.keys()


def test_every_bad_row_is_listed_once_with_its_reason(
    raw: Raw, listed: list[dict[str, str]]
) -> None:
    for source, cases in (("items", raw.items), ("interactions", raw.log)):
        bad = [case for case in cases if not _keeps_item(case)]
        named = Counter((case.key, *case.verdicts) for case in bad if case.key)
        nameless = Counter(tuple(case.verdicts) for case in bad if not case.key)
        names = {key for key, _ in named}
        found = [row for row in listed if row["source"] == source]
        own = [(row["key"].partition(" -> ")[0], row["reason"]) for row in found]
        assert Counter(pair for pair in own if pair[0] in names) == named
        assert Counter((reason,) for key, reason in own if key not in names) == nameless


def test_rows_that_cannot_be_parsed_are_named_by_file_and_row(
    raw: Raw, listed: list[dict[str, str]]
) -> None:
    found = [
        re.search(r"/(\w+\.\w+) (?:row|line) (\d+)$", row["key"])
        for row in listed
        if row["reason"] == "malformed_row"
    ]
    places = sorted((match[1], int(match[2])) for match in found if match)
    cases = [case for case in (*raw.items, *raw.log) if "malformed_row" in case.verdicts]
    assert places == sorted(raw.places[case.name] for case in cases)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_pictures_are_the_right_ones(run: Run, raw: Raw) -> None:
    payloads = _payloads(run.output)
    for number in range(NUM_GOOD):
        assert payloads[f"good-{number:03d}"] == good_picture(seed=number)
    for key, case in raw.pictures.items():
        if case.show_colour:
            with Image.open(io.BytesIO(payloads[key])) as image:
                mean = np.asarray(image).mean(axis=(0, 1))
            assert np.abs(mean - COLOUR).max() < 12, key


def _payloads(dataset: Path) -> dict[str, bytes]:
    """Return the pictures by key, read as a tar and not by our offsets."""
    keys = schema.read_items(dataset)["item_key"].to_pylist()
    result = {}
    for path in (dataset / "shards").iterdir():
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    result[keys[int(member.name.split(".")[0])]] = file.read()
    return result


def test_titles_and_texts_are_one_clean_line_of_limited_length(run: Run) -> None:
    for row in schema.read_items(run.output).to_pylist():
        assert len(row["title"]) <= 300
        assert len(row["text"]) <= 5000
        assert (row["title"] + row["text"]).isprintable()


def test_no_picture_makes_the_reader_large(raw: Raw) -> None:
    root = raw.folder / "images"
    names = [f"{case.name}.jpg" for case in raw.pictures.values()]
    program = READ_ALL.format(**PICTURE_RULES)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(root), *names],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert int(result.stdout) < 100


@pytest.mark.parametrize("name", web.PRIVATE_HOSTS)
def test_no_host_of_another_network_is_asked_unless_it_is_listed(raw: Raw, name: str) -> None:
    config = ImagesConfig(allowed_schemes=("http",), **PICTURE_RULES)
    rules = ImageRules.of(config, root="/nowhere")
    with Fetcher(rules) as fetcher, pytest.raises(BadImage) as refused:
        fetcher.read(f"http://{name}:{raw.port}/picture")
    assert refused.value.reason == "image_forbidden_location"


def test_above_the_budget_nothing_is_published(
    raw: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data_prep": raw.section(max_bad_fraction=0.01)}))
    output = tmp_path / "dataset"
    assert stage.main(STAGE, ["--output", str(output), "--recipe", str(recipe)]) == 1
    told = capsys.readouterr().err
    reasons = Counter(min(case.verdicts) for case in raw.items if not _keeps_item(case))
    for reason, count in reasons.items():
        assert f"{reason} {count}" in told
    assert not output.exists()
    assert (tmp_path / "dataset.logs" / "quarantine.parquet").exists()


def test_pictures_above_the_budget_stop_the_run(raw: Raw, tmp_path: Path) -> None:
    run = Run(tmp_path / "dataset", raw.section(max_bad_fraction=0.3))
    assert run.exit_code == 1
    assert "max_bad_fraction=0.3" in run.told
    assert "image_forbidden_location" in run.told
    assert "Traceback" not in run.told
    assert not run.output.exists()


def section_with(folder: Path, table: str, file: Path) -> dict[str, Any]:
    """Write good tables and return settings that read ``file`` in place of one of them."""
    good = {
        "items": pa.table({name: ["a", "b"] for name in ITEM_COLUMNS}),
        "interactions": pa.table({"user_id": ["u", "v"], "item_id": ["a", "b"]}),
    }
    for name, content in good.items():
        pq.write_table(content, folder / f"{name}.parquet")
    paths = {name: str(folder / f"{name}.parquet") for name in good} | {table: str(file)}
    return {
        "items": {"path": paths["items"], "columns": {"text": ["title", "description"]}},
        "interactions": {"path": paths["interactions"]},
        "max_bad_fraction": 1.0,
    }


TABLES = {
    "items": tables.table_cases(ITEM_COLUMNS),
    "interactions": tables.table_cases(LOG_COLUMNS[:2], seed=1),
}


@pytest.mark.parametrize(
    ("table", "case"),
    [
        pytest.param(table, case, id=f"{table}-{case.name}")
        for table, cases in TABLES.items()
        for case in (cases if table == "items" else cases[::3])
    ],
)
def test_a_file_that_is_not_whole_fails_the_run_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, case: tables.TableCase
) -> None:
    file = tmp_path / f"bad-{case.file}"
    file.write_bytes(case.data)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data_prep": section_with(tmp_path, table, file)}))
    assert stage.main(STAGE, [f"--output={tmp_path / 'dataset'}", f"--recipe={recipe}"]) == 2
    told = capsys.readouterr().err
    assert file.name in told
    assert told.count("\n") == 1
    assert len(told) < 1500
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("name", ["csv-gz-cut-at", "parquet-footer-noise", "one-line-of-96-MB"])
def test_the_command_says_which_file_is_not_whole(tmp_path: Path, name: str) -> None:
    case = next(case for case in TABLES["items"] if case.name.startswith(name))
    file = tmp_path / f"bad-{case.file}"
    file.write_bytes(case.data)
    run = Run(tmp_path / "dataset", section_with(tmp_path, "items", file))
    assert run.exit_code == 2
    assert file.name in run.told
    assert run.told.count("\n") == 1
    assert run.peak_mib < DRIVER_MIB
    assert not run.output.exists()
