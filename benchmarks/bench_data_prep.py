"""Data preparation: speed against img2dataset and a bare loop, growth by 1 %, and random SIGKILLs.

python benchmarks/bench_data_prep.py throughput     (about 12 minutes; img2dataset comes from PyPI)
python benchmarks/bench_data_prep.py incremental    (about 4 minutes)
python benchmarks/bench_data_prep.py kills          (about 8 minutes)

Each writes benchmarks/results/data_prep_<part>.json. ``--help`` of a part lists its sizes.
"""

import argparse
import dataclasses
import io
import os
import random
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
import yaml
from measuring import RESULTS, ROOT, Cost, Family, beside, run, write_result
from picture_host import PHOTOGRAPHS, THUMBNAILS, draw
from PIL import Image

from alignrec import artifacts
from alignrec.data import schema

MAX_SIDE = 256
QUALITY = 90
SAMPLES_PER_SHARD = 1000
IMG2DATASET = "img2dataset==1.47.0"
_KILL_TIMEOUT_SECONDS = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for data; default: a temporary one")
    parser.add_argument("--result", type=Path, help="file; default: results/data_prep_<part>.json")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("throughput", help="images per second and per CPU second")
    part.add_argument("--images", type=int, default=40_000, help="pictures of each measured run")
    part.add_argument("--trial-images", type=int, default=3000, help="to choose img2dataset's")
    part.add_argument("--threads", type=int, nargs="+", default=[8, 16, 64])
    part.add_argument("--drawn", type=int, default=300, help="pictures that differ in content")
    part.add_argument("--repeats", type=int, default=1)
    part = parts.add_parser("incremental", help="cost of 1 % more items")
    part.add_argument("--items", type=int, default=50_000)
    part.add_argument("--drawn", type=int, default=300)
    part = parts.add_parser("kills", help="SIGKILLs of driver, worker and raylet")
    part.add_argument("--items", type=int, default=50_000)
    part.add_argument("--kills", type=int, default=20)
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--drawn", type=int, default=300)
    bare = parts.add_parser("bare", help="the loop that throughput compares with, by itself")
    for name in ("table", "pictures", "output"):
        bare.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    if options.part == "bare":
        bare_loops(options.table, options.pictures, options.output)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        result = {"throughput": throughput, "incremental": incremental, "kills": kills}[
            options.part
        ](options, folder)
    default = RESULTS / f"data_prep_{options.part}.json"
    write_result(options.result or default, vars(options), result)


# Speed


def throughput(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare with img2dataset over the web, and with a bare loop over local files."""
    pictures = folder / "photographs"
    draw(pictures, num=options.drawn, sizes=PHOTOGRAPHS)
    tool = _install_img2dataset(folder)
    host = [sys.executable, str(ROOT / "benchmarks" / "picture_host.py"), str(pictures)]
    with beside(host) as port:
        url = f"http://127.0.0.1:{port}/{{}}.jpg"
        trials = {
            threads: _img2dataset(tool, folder, url, options.trial_images, threads=threads)
            for threads in options.threads
        }
        best = min(trials, key=lambda threads: trials[threads].wall_seconds)
        web = _alternate(
            options.repeats,
            alignrec=lambda: _data_prep(folder, url, options.images),
            img2dataset=lambda: _img2dataset(tool, folder, url, options.images, threads=best),
        )
    files = str(pictures) + "/{:05d}.jpg"
    few = options.images // 5
    local = _alternate(
        options.repeats,
        alignrec=lambda: _data_prep(folder, files, options.images, cycle=options.drawn),
        alignrec_fifth=lambda: _data_prep(folder, files, few, cycle=options.drawn),
        bare=lambda: _bare(folder, files, options.images, cycle=options.drawn),
    )
    many_cpu, few_cpu, bare_cpu = (
        min(cost.cpu_seconds for cost in local[name])
        for name in ("alignrec", "alignrec_fifth", "bare")
    )
    return {
        "web": {name: _rates(costs, options.images) for name, costs in web.items()},
        "img2dataset_trials_images_per_second": {
            threads: round(options.trial_images / cost.wall_seconds, 1)
            for threads, cost in trials.items()
        },
        "img2dataset_threads": best,
        "times_img2dataset": _ratio(web["img2dataset"], web["alignrec"], "wall_seconds"),
        "local": {
            name: _rates(costs, few if name == "alignrec_fifth" else options.images)
            for name, costs in local.items()
        },
        # Per core, with Ray's start, and for one more picture: what is left of the bare loop.
        "share_of_bare_loop": round(bare_cpu / many_cpu, 3),
        "share_of_bare_loop_marginal": round(
            bare_cpu / options.images / ((many_cpu - few_cpu) / (options.images - few)), 3
        ),
    }


def bare_loops(table: Path, pictures: Path, output: Path) -> None:
    """Run one bare loop a core, so that each has what a core gives when all are busy."""
    output.mkdir(parents=True)
    rows = pq.read_table(table).to_pylist()
    num = os.cpu_count() or 1
    with ProcessPoolExecutor(num) as pool:
        parts = [
            pool.submit(bare_loop, rows[part::num], pictures, output / f"{part}-%06d.tar")
            for part in range(num)
        ]
        for part in parts:
            part.result()


def bare_loop(rows: list[dict[str, str]], pictures: Path, pattern: Path) -> None:
    """Decode at the best scale, resize, encode, write: what cannot be left out."""
    with webdataset.ShardWriter(str(pattern), maxcount=SAMPLES_PER_SHARD, verbose=0) as shards:
        for number, row in enumerate(rows):
            image = Image.open(io.BytesIO((pictures / row["image"]).read_bytes()))
            scale = min(1.0, MAX_SIDE / max(image.size))
            size = (round(image.width * scale), round(image.height * scale))
            image.draft("RGB", size)
            image.load()
            small = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=QUALITY)
            document = {"item_key": row["item_id"], "title": row["title"]}
            sample = {"__key__": f"{number:012d}", "jpg": buffer.getvalue(), "json": document}
            shards.write(sample)


def _alternate(repeats: int, **runs: Callable[[], Cost]) -> dict[str, list[Cost]]:
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, once in runs.items():
            costs[name].append(once())
            print(f"{name}: {costs[name][-1]}", flush=True)
    return costs


def _rates(costs: Iterable[Cost], num_images: int) -> dict[str, Any]:
    listed = list(costs)
    wall = [cost.wall_seconds for cost in listed]
    cpu = [cost.cpu_seconds for cost in listed]
    return {
        "images_per_second_best": round(num_images / min(wall), 1),
        "images_per_second_median": round(num_images / statistics.median(wall), 1),
        "cpu_seconds_per_1000_images_best": round(min(cpu) / num_images * 1000, 3),
        "wall_seconds": [round(seconds, 1) for seconds in wall],
        "cpu_seconds": [round(seconds, 1) for seconds in cpu],
    }


def _ratio(other: list[Cost], mine: list[Cost], what: str) -> float:
    return round(min(getattr(c, what) for c in other) / min(getattr(c, what) for c in mine), 2)


def _data_prep(folder: Path, pattern: str, num: int, *, cycle: int | None = None) -> Cost:
    raw = _write_raw(folder / f"raw-{num}", pattern, num, cycle=cycle)
    output = _fresh(folder / "prepared")
    recipe = _recipe(raw, shards={"max_samples": SAMPLES_PER_SHARD})
    cost = run(_command(recipe, output), log=folder / "alignrec.log")
    counts = artifacts.read(output).counts
    assert counts["num_items"] == num, counts
    assert counts["num_without_image"] == 0, counts
    return cost


def _bare(folder: Path, pattern: str, num: int, *, cycle: int) -> Cost:
    raw = _write_raw(folder / f"raw-{num}", pattern, num, cycle=cycle)
    output = _fresh(folder / "bare")
    arguments = ["--table", raw / "items.parquet", "--pictures", raw, "--output", output]
    command = [sys.executable, __file__, "bare", *map(str, arguments)]
    cost = run(command, log=folder / "bare.log")
    assert _count_pictures(output) == num
    return cost


def _img2dataset(tool: Path, folder: Path, pattern: str, num: int, *, threads: int) -> Cost:
    raw = _write_raw(folder / f"raw-{num}", pattern, num)
    table = pq.read_table(raw / "items.parquet", columns=["image", "title"])
    pq.write_table(table.rename_columns(["url", "caption"]), raw / "urls.parquet")
    output = _fresh(folder / "img2dataset")
    settings = {
        "url_list": raw / "urls.parquet", "input_format": "parquet", "url_col": "url",
        "caption_col": "caption", "output_folder": output, "output_format": "webdataset",
        "image_size": MAX_SIDE, "resize_mode": "keep_ratio_largest", "resize_only_if_bigger": True,
        "encode_format": "jpg", "encode_quality": QUALITY, "processes_count": os.cpu_count(),
        "thread_count": threads, "number_sample_per_shard": SAMPLES_PER_SHARD,
        # What costs it time and we do not have: left out.
        "extract_exif": False, "compute_hash": None, "enable_wandb": False,
    }  # fmt: skip
    command = [str(tool), *(f"--{name}={value}" for name, value in settings.items())]
    environment = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    cost = run(command, log=folder / "img2dataset.log", environment=environment)
    assert _count_pictures(output) == num
    return cost


def _install_img2dataset(folder: Path) -> Path:
    """Install it into an environment of its own; return its command."""
    place = folder / "img2dataset-venv"
    if not (place / "bin" / "img2dataset").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(place / "bin" / "pip"), "install", "-q", IMG2DATASET], check=True)
    return place / "bin" / "img2dataset"


def _count_pictures(folder: Path) -> int:
    """Count the pictures in a folder's tars, each with no side above the limit."""
    num = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".jpg")]
            member = tar.extractfile(names[0])
            assert member is not None
            assert max(Image.open(member).size) == MAX_SIDE
            num += len(names)
    return num


# Growth


def incremental(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare a catalogue, then the same with 1 % more items, then the same again."""
    drawn = draw(folder / "photographs", num=options.drawn, sizes=PHOTOGRAPHS[:1])
    more = max(1, options.items // 100)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for number in range(options.items + more):
        if not (pictures / f"{number}.jpg").exists():
            os.link(drawn[number % len(drawn)], pictures / f"{number}.jpg")
    log = folder / "alignrec.log"
    versions = {"root": str(_fresh(folder / "versions"))}
    output = _fresh(folder / "growing")
    runs = {}
    sizes = {"first": options.items, "one_percent_more": options.items + more}
    for name, num in (*sizes.items(), ("nothing_new", options.items + more)):
        raw = _write_raw(folder / "growing-raw", f"{pictures}/{{}}.jpg", num)
        cost = run(_command(_recipe(raw, versions=versions), output), log=log)
        facts = artifacts.read(output).facts
        runs[name] = {**dataclasses.asdict(cost), "version": facts.get("version")}
        print(name, runs[name], flush=True)
    first, second = runs["first"], runs["one_percent_more"]
    return {
        "runs": runs,
        "share_of_first_wall": round(second["wall_seconds"] / first["wall_seconds"], 4),
        "share_of_first_cpu": round(second["cpu_seconds"] / first["cpu_seconds"], 4),
    }


# Kills


def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill random processes at random moments until the run is done; compare with a quiet run."""
    drawn = draw(folder / "thumbnails", num=options.drawn, sizes=THUMBNAILS)
    pattern = str(drawn[0].parent) + "/{:05d}.jpg"
    raw = _write_raw(folder / "kills-raw", pattern, options.items, cycle=len(drawn))
    recipe = _recipe(raw, max_side=96, shards={"max_samples": 250})
    quiet = _fresh(folder / "quiet")
    started = _Attempt(recipe, quiet, folder)
    first_shard_seconds = started.until_first_shard()
    started.wait()
    total_seconds = time.monotonic() - started.began
    expected = _content(quiet)
    rng = random.Random(options.seed)
    attempts: list[dict[str, Any]] = []
    num_runs = 0
    while sum(bool(attempt["killed"]) for attempt in attempts) < options.kills:
        output = _fresh(folder / f"killed-{num_runs}")
        left = options.kills - sum(bool(attempt["killed"]) for attempt in attempts)
        work_seconds = 2 * (total_seconds - first_shard_seconds) / options.kills
        attempts += _kill_until_done(
            rng, recipe, output, folder, most=left, ready=first_shard_seconds, work=work_seconds
        )
        assert _content(output) == expected, "the bytes differ from those of the quiet run"
        num_runs += 1
        print(f"run {num_runs}: {len(attempts)} attempts so far", flush=True)
    keys = _sample_keys(folder / f"killed-{num_runs - 1}")
    assert keys == list(range(options.items)), "a sample is lost or there twice"
    return {
        "quiet_run_seconds": round(total_seconds, 1),
        "runs_that_all_ended_with_the_same_bytes": num_runs,
        "kills": dict(Counter(a["killed"] for a in attempts if a["killed"])),
        "processes_that_were_started": len(attempts),
        "ends": dict(Counter(attempt["end"] for attempt in attempts)),
        "files_compared": len(expected),
        "samples_once_each": len(keys),
        "attempts": attempts,
    }


def _kill_until_done(
    rng: random.Random,
    recipe: Path,
    output: Path,
    folder: Path,
    *,
    most: int,
    ready: float,
    work: float,
) -> list[dict[str, Any]]:
    """Start the run again and again, with one kill each, until it is done."""
    attempts: list[dict[str, Any]] = []
    while not output.exists():
        attempt = _Attempt(recipe, output, folder)
        victim = None
        # One in four at any moment of the start, the others while shards are made.
        early = rng.random() < 0.25
        seconds = rng.uniform(0.2, ready) if early else ready + rng.uniform(0, work)
        kind = rng.choice(("driver", "worker", "raylet"))
        if len(attempts) < most and not attempt.ended_within(seconds):
            victim = attempt.kill(kind, rng)
        end = attempt.wait()
        attempts.append({"killed": victim, "after_seconds": round(seconds, 2), "end": end})
        print(attempts[-1], flush=True)
        if victim is None and not output.exists():
            raise RuntimeError(f"a run that was left alone ended with {end}: {folder}/kills.log")
    return attempts


class _Attempt:
    """One start of the command."""

    def __init__(self, recipe: Path, output: Path, folder: Path) -> None:
        self.began = time.monotonic()
        self._output = output
        self._family = Family()
        with (folder / "kills.log").open("ab") as log:
            self._process = subprocess.Popen(
                _command(recipe, output),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=self._family.environment(),
            )

    def until_first_shard(self) -> float:
        """Wait for the first shard; return the seconds since the start."""
        shards = artifacts.partial_path(self._output) / "shards"
        while not list(shards.glob("*.tar")) and not self.ended_within(0.05):
            pass
        return time.monotonic() - self.began

    def ended_within(self, seconds: float) -> bool:
        """Wait; say whether the command has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, kind: str, rng: random.Random) -> str | None:
        """Kill a process of a kind, the driver where there is none yet; return which it was."""
        chosen = [p for p in self._family.members() if _kind(p, self._process.pid) == kind]
        if not chosen:
            kind = "driver"
        pid = rng.choice(sorted(p.pid for p in chosen)) if chosen else self._process.pid
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return kind

    def wait(self) -> str:
        """Wait for the end, and end what the command leaves behind; say how it ended."""
        if self.ended_within(_KILL_TIMEOUT_SECONDS):
            end = f"exit {self._process.returncode}"
        else:
            end = "hung"
        self._family.end()
        self._process.wait()
        return end


def _kind(process: psutil.Process, driver: int) -> str:
    try:
        words = process.cmdline() or [""]
    except psutil.Error:  # it has ended
        return ""
    if process.pid == driver:
        return "driver"
    if words[0].startswith("ray::"):
        return "worker"
    return "raylet" if words[0].endswith("/raylet") else ""


def _content(output: Path) -> dict[str, str]:
    """Return the checksum of every file, after checking that the files have it."""
    return {name: str(entry["sha256"]) for name, entry in artifacts.verify(output).files.items()}


def _sample_keys(output: Path) -> list[int]:
    keys: list[int] = []
    for shard in schema.read_samples(output)["shard"].unique().to_pylist():
        with tarfile.open(output / shard) as tar:
            names = [name for name in tar.getnames() if name.endswith(".json")]
            keys += [int(name.removesuffix(".json")) for name in names]
    return keys


# Raw data and recipes


def _write_raw(folder: Path, pattern: str, num: int, *, cycle: int | None = None) -> Path:
    """Write an item table whose pictures follow a pattern, and a small log."""
    folder.mkdir(exist_ok=True)
    numbers = np.arange(num)
    rng = np.random.default_rng(0)
    items = {
        "item_id": [f"item-{number}" for number in numbers],
        "title": [f"Item number {number}" for number in numbers],
        "description": [f"What there is to say about item {number}. " * 4 for number in numbers],
        "image": [pattern.format(int(n) % cycle if cycle else n) for n in numbers],
    }
    log = {
        "user_id": [f"user-{user}" for user in rng.integers(0, 2000, 20_000)],
        "item_id": [f"item-{item}" for item in rng.integers(0, num, 20_000)],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    pq.write_table(pa.table(log), folder / "log.parquet")
    return folder


def _recipe(raw: Path, *, max_side: int = MAX_SIDE, **changes: dict[str, object]) -> Path:
    section = {
        "items": {
            "path": str(raw / "items.parquet"),
            "columns": {"text": ["title", "description"]},
        },
        "interactions": {"path": str(raw / "log.parquet")},
        "images": {
            "root": "/",
            "max_side": max_side,
            "jpeg_quality": QUALITY,
            "allowed_schemes": ["http"],
            "allowed_hosts": ["127.0.0.1"],
            "private_hosts": ["127.0.0.1"],
        },
        **changes,
    }
    path = raw / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data_prep": section}))
    return path


def _command(recipe: Path, output: Path) -> list[str]:
    module = [sys.executable, "-m", "data_prep"]
    return [*module, "--recipe", str(recipe), "--output", str(output)]


def _fresh(output: Path) -> Path:
    """Remove what an earlier run left at a place."""
    for path in (output, artifacts.partial_path(output)):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            subprocess.run(["rm", "-r", str(path)], check=True)
    return output


if __name__ == "__main__":
    main()
