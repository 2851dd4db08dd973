"""A catalogue that grows, as a whole: versions through the stage, two runs at once, kills."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from alignrec import artifacts, stage
from alignrec.data import schema
from alignrec.data.schema import SPLITS
from alignrec.testing import synthetic
from data_prep import STAGE, engine, packing, versions
from data_prep.lock import LOCK
from launch import recipe, runner
from launch.recipe import Step
from launch.runner import Selection

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS = 48
SHARD_ITEMS = 8
# For each line "text n": a child that makes a version of the text and kills itself before the n-th
# call that changes the file system. Children of one process: each would take long to import.
_PROGRAM = """
import os, signal, sys
from pathlib import Path
from alignrec import artifacts
from data_prep import versions
artifacts.producer = dict  # asks git, which takes most of the time
root = Path(sys.argv[1])
EVENTS = ("os.rename", "os.remove", "os.symlink", "os.link", "os.mkdir", "os.rmdir", "os.utime")

def make(text, fatal):
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        opened = event == "open" and arguments[1] and set(arguments[1]) & set("wax")
        if opened or event in EVENTS:
            seen += 1
            if seen == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    with versions.writing(
        root, root.parent / "out", keep=2, kind="dataset", fingerprint=text, config={}, run="r",
        say=lambda _: None,
    ) as growing:
        (growing.draft.path / "data.txt").write_text(text)
        (growing.draft.work / "position").write_text("7")

for line in sys.stdin:
    text, fatal = line.split()
    if not (child := os.fork()):
        make(text, int(fatal))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Shop:
    """A raw catalogue of which more or less is on sale, and the versions made of it."""

    def __init__(self, folder: Path) -> None:
        self.raw = folder / "raw"
        self.root = folder / "versions"
        self.output = folder / "run" / "data_prep"
        self.output.parent.mkdir()
        synthetic.write_catalogue(self.raw, num_items=NUM_ITEMS, num_users=40, image_size=48)
        self._items = pq.read_table(self.raw / "items.parquet")
        self._log = pq.read_table(self.raw / "interactions.parquet")

    def sell(self, order: list[int], *, users: int = 40) -> None:
        """Write the tables of the given items, in this order, and of the first users."""
        items = self._items.take(order)
        known = pc.is_in(self._log["item_id"], items["item_id"])
        present = pc.less(self._log["user_id"], f"user-{users:07d}")
        pq.write_table(items, self.raw / "items.parquet")
        pq.write_table(self._log.filter(pc.and_(known, present)), self.raw / "interactions.parquet")

    def recipe(self, **changes: Any) -> Path:
        section: dict[str, Any] = {
            "items": {"path": str(self.raw / "items.parquet")},
            "interactions": {"path": str(self.raw / "interactions.parquet")},
            "shards": {"max_samples": SHARD_ITEMS},
            "versions": {"root": str(self.root), "keep": 2, "max_removed_fraction": 1.0},
            "num_cpus": 1,
            "object_store_bytes": 100_000_000,
        }
        path = self.output.with_name("recipe.yaml")
        path.write_text(yaml.safe_dump({"data_prep": {**section, **changes}}))
        return path

    def words(self, **changes: Any) -> list[str]:
        return ["--output", str(self.output), "--recipe", str(self.recipe(**changes)), "--json"]

    def prepare(self, **changes: Any) -> artifacts.Manifest:
        assert stage.main(STAGE, self.words(**changes)) == 0
        return artifacts.verify(self.output)

    def numbers(self, table: str, key: str) -> dict[str, int]:
        rows = pq.read_table(self.output / f"{table}.parquet").to_pylist()
        return {row[f"{key}_key"]: row[f"{key}_index"] for row in rows}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    section = {"source": "synthetic", "num_cpus": 1, "object_store_bytes": 100_000_000}
    with engine.session(STAGE.load_config(section)):
        yield


def content(folder: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in artifacts.verify(folder).files.items()}


def picture(item: int) -> str:
    return f"{synthetic.item_key(item)}.jpg"


def test_night_after_night(
    shop: Shop,
    local_ray: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told() -> dict[str, Any]:
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    shop.sell(list(range(40)), users=30)
    first = shop.prepare()
    assert (told()["version"], first.counts["num_removed"]) == ("000001", 0)
    users, items = shop.numbers("users", "user"), shop.numbers("items", "item")

    again = shop.prepare()  # nothing changed
    assert told()["version"] == "000001"
    assert again == first

    # New items come first in the table, two are sold out, a picture changed, new users came.
    shop.sell([*range(40, 46), *(i for i in range(40) if i not in (3, 20))], users=40)
    os.utime(shop.raw / "images" / picture(9), times=(1, 1))
    second = shop.prepare()
    summary = told()
    assert (summary["state"], summary["version"]) == ("done", "000002")
    assert summary["counts"] == second.counts
    assert (second.counts["num_items"], second.counts["num_removed"]) == (46, 2)
    # Chunk 0 lost item 3, chunk 1 has the changed picture, chunk 2 lost item 20, 5 is new.
    assert second.facts["version"] == {
        "number": 2, "base": "000001", "new_items": 6, "linked_shards": 2,
        "kept_pictures": 7 + 7 + 7, "fetched_pictures": 1 + 6,
    }  # fmt: skip
    old, new = shop.root / "000001", shop.root / "000002"
    shared = {p.stat().st_ino for p in (old / "shards").iterdir()} & {
        p.stat().st_ino for p in (new / "shards").iterdir()
    }
    assert len(shared) == 3  # of the touched picture the bytes are the same
    assert shop.numbers("items", "item").items() >= items.items()
    found = shop.numbers("users", "user")
    assert found.items() >= users.items()
    assert len(found) > len(users)
    removed = schema.read_removed_items(shop.output).tolist()
    assert removed == [3, 20]
    log = pq.read_table(shop.raw / "interactions.parquet")
    assert sum(second.counts[f"num_{split}"] for split in SPLITS) == len(log)

    # The sold-out items are back: the same items. This time the shards are Ray's work.
    shop.sell(list(range(46)))
    monkeypatch.setattr(packing, "_ALONE_SECONDS", -1.0)
    third = shop.prepare()
    assert told()["version"] == "000003"
    assert third.counts["num_removed"] == 0
    assert shop.numbers("items", "item")[synthetic.item_key(3)] == 3
    assert (shop.root / "latest").resolve() == shop.output.resolve()
    assert sorted(p.name for p in shop.root.iterdir() if p.name[0] != ".") == [
        "000002", "000003", "latest",
    ]  # fmt: skip

    # A run without a history numbers the users of this log otherwise, and nothing else differs.
    shop.output = shop.output.with_name("fresh")
    fresh = shop.prepare(versions={})
    assert told()["version"] is None
    assert {n for n in fresh.files if fresh.files[n] != third.files[n]} <= {
        "users.parquet", *(f"interactions/{split}.parquet" for split in SPLITS),
    }  # fmt: skip


class HereEngine:
    """Runs a recipe's stages in this process."""

    @contextlib.contextmanager
    def connected(self, *_: object, **__: object) -> Iterator[str]:
        yield "this process"

    def run(self, step: Step, context: stage.Context, **_: object) -> None:
        step.stage.load_run()(step.config, context)


def test_a_run_of_a_recipe_reuses_the_version_that_its_output_is(
    shop: Shop, local_ray: None
) -> None:
    def run(folder: str, **selection: str) -> tuple[str, str]:
        result = runner.run(
            recipe.load(str(shop.recipe())), shop.output.with_name(folder),
            engine=HereEngine(), selection=Selection(**selection),
        )  # fmt: skip
        return result[0].state, result[0].path.resolve().name

    shop.sell(list(range(20)))
    assert run("one") == ("ran", "000001")
    assert run("one") == ("reused", "000001")
    assert run("other") == ("ran", "000001")  # it looks, and finds nothing new
    os.utime(shop.raw / "images" / picture(9), times=(1, 1))
    assert run("one") == ("reused", "000001")
    assert run("one", first="data_prep") == ("ran", "000002")
    for number in (21, 22):
        shop.sell(list(range(number)))
        run("one")
    assert not (shop.output.with_name("other") / "data_prep").exists()  # pruned below the link
    assert run("other") == ("ran", "000004")


def test_items_that_are_not_interacted_with_any_more_are_removed(
    shop: Shop, local_ray: None
) -> None:
    shop.sell(list(range(NUM_ITEMS)))
    section = {"path": str(shop.raw / "items.parquet"), "keep": "interacted"}
    first = shop.prepare(items=section)
    assert first.counts["num_removed"] == 0
    items = shop.numbers("items", "item")
    shop.sell(list(range(NUM_ITEMS)), users=10)
    second = shop.prepare(items=section)
    assert shop.numbers("items", "item") == items
    used = {index for split in SPLITS for index in schema.read_interactions(shop.output, split)[1]}
    removed = set(schema.read_removed_items(shop.output).tolist())
    assert removed
    assert used | removed == set(items.values())
    assert not used & removed
    samples = schema.read_samples(shop.output)["item_index"].to_pylist()
    assert samples == sorted(used)
    assert second.counts["num_without_image"] <= 1


def test_the_second_run_at_once_is_refused_by_the_name_of_the_first(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.sell(list(range(8)))
    with versions.Lock(shop.root, run="the nightly one"):
        assert stage.main(STAGE, shop.words()) == 1  # tried again later, it may succeed
    captured = capsys.readouterr()
    assert f"in use by the run the nightly one (process {os.getpid()}" in captured.err
    told = json.loads(captured.out.splitlines()[-1])
    assert (told["state"], told["exit_code"]) == ("failed", 1)
    assert told["error"] in captured.err


class SlowHost:
    """Serves pictures on loopback; one of them only when the gate is open."""

    def __init__(self, folder: Path, gated: str) -> None:
        self.arrived, self.gate = threading.Event(), threading.Event()
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                if name == gated:
                    host.arrived.set()
                    host.gate.wait()
                data = (folder / name).read_bytes()
                with contextlib.suppress(ConnectionError):  # who asked was killed
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Run:
    """The stage as a process of its own with a Ray of its own."""

    def __init__(self, words: list[str]) -> None:
        environment = {name: v for name, v in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data_prep", *words],
            cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()

    def kill(self, name: str) -> None:
        """Kill a process of its Ray by the beginning of its name."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        next(child for child in family if child.name().startswith(name)).kill()

    def end(self) -> tuple[int, str]:
        """Wait for its end; return exit code and the last line of stdout."""
        told, _ = self.process.communicate(timeout=120)
        return self.process.returncode, told.splitlines()[-1]


def test_a_kill_of_driver_raylet_or_worker_costs_only_what_was_in_flight(
    shop: Shop, local_ray: None
) -> None:
    """Each kill comes while the third of six shards waits for a picture."""
    gated = 2 * SHARD_ITEMS + 1
    with SlowHost(shop.raw / "images", picture(gated)) as host:
        shop.sell(list(range(NUM_ITEMS)))
        items = pq.read_table(shop.raw / "items.parquet")
        references = items["image"].to_pylist()
        references[gated] = f"{host.address}/{picture(gated)}"
        at = items.column_names.index("image")
        pq.write_table(items.set_column(at, "image", [references]), shop.raw / "items.parquet")
        web = {"allowed_schemes": ["http"], "private_hosts": ["127.0.0.1"]}
        host.gate.set()
        shop.prepare(versions={}, images=web)
        wanted = content(shop.output)
        host.gate.clear()

        draft = shop.root / "000001.partial"

        def begin() -> Run:
            host.arrived.clear()
            run = Run(shop.words(images=web))
            assert host.arrived.wait(120)
            return run

        with begin() as run:
            run.process.kill()
            assert run.end()[0] == -signal.SIGKILL
        done = {path: path.stat().st_mtime_ns for path in draft.glob("shards/*.tar")}
        assert done

        with begin() as run:  # Ray ends the driver's process then; it is not asked
            run.kill("raylet")
            assert run.end()[0] == 1

        with begin() as run:
            host.arrived.clear()
            run.kill("ray::Map")
            assert host.arrived.wait(120)  # Ray gives the task to another worker
            host.gate.set()
            code, told = run.end()
        assert (code, json.loads(told)["version"]) == (0, "000001")
    assert content(shop.output) == wanted
    for path, changed in done.items():
        assert (shop.root / "000001" / "shards" / path.name).stat().st_mtime_ns == changed
    assert not (shop.root / LOCK).exists()


def test_a_kill_before_any_step_leaves_old_or_new_and_the_next_run_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the file system is the last one of a run, in turn."""
    monkeypatch.setattr(artifacts, "producer", dict)
    root = tmp_path / "versions"

    def write(text: str) -> str:
        with versions.writing(
            root, root.parent / "out", keep=2, kind="dataset", fingerprint=text, config={},
            run="test", say=lambda _: None,
        ) as growing:  # fmt: skip
            (growing.draft.path / "data.txt").write_text(text)
        assert growing.path is not None
        return growing.path.name

    for text in ("one", "two"):
        write(text)
    number, fatal, seen = 2, 0, set()
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(root)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            fatal += 1
            process.stdin.write(f"text{fatal} {fatal}\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            if code == 0:
                break
            assert code == -signal.SIGKILL
            found = artifacts.verify(root / "latest").fingerprint
            assert found in (f"text{fatal}", f"text{fatal - 1}", "two")
            assert artifacts.verify(root.parent / "out").kind == "dataset"
            seen.add(found == f"text{fatal}")
            number += 1
            assert write(f"text{fatal}") == f"{number:06d}"
            assert versions.numbers(root) == [number - 1, number]
            whole = sorted(p.name for p in (root / "latest").iterdir())
            assert whole == ["data.txt", "manifest.json"]
            artifacts.verify(root.parent / "out")
    assert seen == {True, False}
    assert fatal > 25
    assert sorted(p.name for p in root.parent.iterdir()) == ["out", "versions"]
