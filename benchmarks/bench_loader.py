"""Loader: samples a second against webdataset and MosaicML Streaming on the same JPEGs; waiting.

python benchmarks/bench_loader.py speed     (about 10 minutes; Streaming comes from PyPI)
python benchmarks/bench_loader.py waiting   (about 5 minutes)

Each writes benchmarks/results/loader_<part>.json. All loaders turn the same JPEG bytes, shuffled,
into batches of uint8 (batch, size, size, 3), cropped and flipped at random, in processes of their
own, one after the other, round by round. ``same_pixels`` peers call our decoder, so that only the
loaders differ; the ``pillow`` ones decode and resize with Pillow, as their users commonly do. Every
loader runs with every number of workers, and reads as many shards with each of its workers.
``decode_only`` is one thread that reads nothing: the two decoders on the same bytes, crops and
sizes.
"""

import argparse
import io
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import RESULTS, ROOT, Cost, run, write_result
from PIL import Image

from alignrec import artifacts
from alignrec.data import schema
from alignrec.data.config import ShardsConfig
from alignrec.data.images import crop_box, decode
from alignrec.data.loader import ItemReader, Loader, Plan
from alignrec.data.shards import SampleTable, open_shards

Pixels = npt.NDArray[np.uint8]
Decode = Callable[[bytes, int, int], Pixels]

STREAMING = "mosaicml-streaming==0.13.0"
# What Streaming imports without its clients of clouds; torch and the rest are taken from here.
STREAMING_NEEDS = ("brotli", "catalogue", "python-snappy", "xxhash", "zstd")
SAMPLES_PER_SHARD = 1000  # about: so that every worker has equally many shards
SHUFFLE_BUFFER = 1000  # samples, of webdataset
SIZES = ((256, 256), (256, 192), (192, 256), (256, 170))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for data; default: a temporary one")
    parser.add_argument("--result", type=Path, help="file; default: results/loader_<part>.json")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("speed", help="samples a second")
    part.add_argument("--pictures", type=int, default=20_000)
    part.add_argument("--drawn", type=int, default=300, help="pictures that differ in content")
    part.add_argument("--scale", type=int, default=1, help="pictures have this many times 256 px")
    part.add_argument("--size", type=int, default=224, help="side of the decoded pictures")
    part.add_argument("--batch", type=int, default=64)
    part.add_argument("--workers", type=int, nargs="+", default=[2, 3], help="threads or processes")
    part.add_argument("--repeats", type=int, default=3)
    part.add_argument("--peer-python", type=Path, help="has Streaming; default: made for the run")
    part = parts.add_parser("waiting", help="share of a training step that waits for the loader")
    part.add_argument("--items", type=int, default=512)
    part.add_argument("--steps", type=int, default=24)
    part.add_argument("--batch", type=int, default=16)
    part.add_argument("--sizes", nargs="+", default=["tiny", "small"], help="of the encoder")
    child = parts.add_parser("read", help="one measured pass, by itself")
    child.add_argument("reader", choices=READERS)
    child.add_argument("--pixels", choices=DECODERS, required=True)
    for name in ("size", "batch", "workers"):
        child.add_argument(f"--{name}", type=int, required=True)
    child.add_argument("--data", type=Path, required=True)
    child = parts.add_parser("decode", help="the decoders alone, by itself")
    child.add_argument("--pictures", type=Path, required=True, help="folder of JPEGs")
    child.add_argument("--size", type=int, required=True)
    child.add_argument("--repeats", type=int, required=True)
    child = parts.add_parser("write-mds", help="Streaming's copy of the data, by itself")
    child.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    if options.part == "read":
        print(json.dumps(read(options)))
        return
    if options.part == "decode":
        print(json.dumps(decode_only(options)))
        return
    if options.part == "write-mds":
        write_mds(options.data)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        result = {"speed": speed, "waiting": waiting}[options.part](options, folder)
    default = RESULTS / f"loader_{options.part}.json"
    write_result(options.result or default, vars(options), result)


# Speed


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all loaders in turn, several times; compare the best setting of each."""
    peer = options.peer_python or _install_streaming(folder)
    data = write_dataset(folder / "dataset", options)
    _child(peer, folder, "write-mds", "--data", str(data))
    variants = [
        *itertools.product(["alignrec"], ["same_pixels"], options.workers),
        *itertools.product(["webdataset", "streaming"], DECODERS, options.workers),
    ]
    passes: dict[tuple[str, str, int], list[dict[str, float]]] = {v: [] for v in variants}
    for _ in range(options.repeats):
        for variant in variants:
            passes[variant].append(_pass(peer, folder, data, options, *variant))
            print(variant, passes[variant][-1], flush=True)
    rates = {
        variant: statistics.median(one["samples_per_second"] for one in found)
        for variant, found in passes.items()
    }
    best: dict[str, float] = {}
    for (reader, pixels, _), rate in rates.items():
        name = reader if reader == "alignrec" else f"{reader}_{pixels}"
        best[name] = max(best.get(name, 0.0), rate)
    return {
        "samples_per_second_best_setting": {name: round(rate) for name, rate in best.items()},
        "times_peer": {
            name: round(best["alignrec"] / rate, 3)
            for name, rate in best.items()
            if name != "alignrec"
        },
        "times_peer_by_workers": {
            f"{reader}_{pixels}_{workers}": round(
                rates["alignrec", "same_pixels", workers] / rate, 3
            )
            for (reader, pixels, workers), rate in rates.items()
            if reader != "alignrec"
        },
        "decode_only": _decode_only(peer, folder, options),
        "passes": {"_".join(map(str, variant)): found for variant, found in passes.items()},
        "streaming": STREAMING,
    }


def write_dataset(folder: Path, options: argparse.Namespace) -> Path:
    """Write a dataset of pictures and short texts; every picture has bytes of its own."""
    from picture_host import draw, numbered

    sizes = [(width * options.scale, height * options.scale) for width, height in SIZES]
    drawn = draw(_drawn(folder.parent, options), num=options.drawn, sizes=sizes)
    pictures = [path.read_bytes() for path in drawn]
    multiple = math.lcm(*options.workers)
    num_shards = multiple * max(1, round(options.pictures / SAMPLES_PER_SHARD / multiple))
    bounds = np.linspace(0, options.pictures, num_shards + 1).astype(int).tolist()
    settings = {
        "pictures": options.pictures,
        "drawn": options.drawn,
        "scale": options.scale,
        "shards": num_shards,
    }
    mark = artifacts.fingerprint("bench_loader", 2, settings, {})
    with artifacts.writing(
        folder, kind="dataset", fingerprint=mark, config=settings, inputs={}
    ) as draft:
        (draft.path / "shards").mkdir(exist_ok=True)
        rows = []
        for number, indices in enumerate(map(range, bounds[:-1], bounds[1:])):
            name = f"shards/{number:06d}.tar"
            contents = (numbered(pictures[index % len(pictures)], index) for index in indices)
            rows += write_shard(draft.path / name, name, zip(indices, contents, strict=True))
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema.SAMPLES), draft.path / "samples.parquet"
        )
    return folder


def _drawn(folder: Path, options: argparse.Namespace) -> Path:
    return folder / f"drawn-{options.scale}"


def write_shard(
    path: Path, name: str, samples: Iterator[tuple[int, bytes]]
) -> list[dict[str, str | int]]:
    """Write a tar as data_prep does; returns rows of ``samples.parquet``."""
    rows: list[dict[str, str | int]] = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, picture in samples:
            text = {"item_key": f"item-{index}", "title": f"Item {index}", "text": f"Item {index}"}
            row: dict[str, str | int] = {"item_index": index, "shard": name}
            document = json.dumps(text).encode()
            row["crc32"] = zlib.crc32(document, zlib.crc32(picture))
            for suffix, what, content in (("jpg", "image", picture), ("json", "json", document)):
                member = tarfile.TarInfo(f"{index:012d}.{suffix}")
                member.size = len(content)
                row |= {f"{what}_offset": tar.offset + 512, f"{what}_bytes": len(content)}
                tar.addfile(member, io.BytesIO(content))
            rows.append(row)
    return rows


def _pass(
    peer: Path,
    folder: Path,
    data: Path,
    options: argparse.Namespace,
    reader: str,
    pixels: str,
    workers: int,
) -> dict[str, float]:
    log = folder / "read.log"
    log.unlink(missing_ok=True)
    sizes = {"size": options.size, "batch": options.batch, "workers": workers}
    arguments = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    cost = _child(peer, folder, "read", reader, "--pixels", pixels, "--data", str(data), *arguments)
    told: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    assert told["samples"] == options.pictures, (reader, told)
    return told | {
        "cpu_seconds_per_1000_with_start": round(cost.cpu_seconds / told["samples"] * 1000, 3)
    }


def _decode_only(
    peer: Path, folder: Path, options: argparse.Namespace
) -> dict[str, float | list[float]]:
    words = ("--pictures", _drawn(folder, options), "--size", options.size)
    _child(peer, folder, "decode", *map(str, words), "--repeats", str(options.repeats))
    told: dict[str, float | list[float]] = json.loads(
        (folder / "read.log").read_text().splitlines()[-1]
    )
    return told


def _child(python: Path, folder: Path, *words: str) -> Cost:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-W", "ignore", str(Path(__file__).resolve()), *words]
    return run(command, log=folder / "read.log", environment=environment)


def read(options: argparse.Namespace) -> dict[str, float]:
    """Read an epoch; the time is from the first batch to the last, as in a long training."""
    torch.set_num_threads(1)
    began = time.monotonic()
    batches = READERS[options.reader](options, DECODERS[options.pixels])
    first = next(batches)
    assert first.shape[1:] == (options.size, options.size, 3), first.shape
    assert first.dtype == torch.uint8
    started = time.monotonic()
    later = sum(len(batch) for batch in batches)
    seconds = time.monotonic() - started
    return {
        "samples": len(first) + later,
        "samples_per_second": round(later / seconds, 1),
        "seconds_to_first_batch": round(started - began, 3),
    }


def decode_only(options: argparse.Namespace) -> dict[str, float | list[float]]:
    """Decode all pictures in one thread, by either decoder in turn; pictures a second."""
    torch.set_num_threads(1)
    contents = [path.read_bytes() for path in sorted(options.pictures.iterdir())]
    rates: dict[str, list[float]] = {"alignrec": [], "pillow": []}
    for repeat in range(options.repeats + 1):
        for name, decode_one in zip(rates, (decode_ours, decode_pillow), strict=True):
            started = time.monotonic()
            for number, content in enumerate(contents):
                decode_one(content, number, options.size)
            if repeat:  # the first pass imports and allocates
                rates[name].append(round(len(contents) / (time.monotonic() - started), 1))
    ours, pillow = map(statistics.median, rates.values())
    return {"times_pillow": round(ours / pillow, 3)} | {
        f"{name}_pictures_per_second": found for name, found in rates.items()
    }


def decode_ours(content: bytes, number: int, size: int) -> Pixels:
    """Decode as the loader does."""
    return decode(content, size=size, rng=np.random.default_rng([0, 3, 0, number]), name="")


def decode_pillow(content: bytes, number: int, size: int) -> Pixels:
    """Decode, crop, resize and flip with Pillow alone; at a smaller scale where that is enough."""
    rng = np.random.default_rng([0, 3, 0, number])
    flip = rng.random() < 0.5
    picture = Image.open(io.BytesIO(content))
    picture.draft("RGB", (int(size * 1.42), int(size * 1.42)))
    rgb = picture.convert("RGB")
    box = crop_box(rgb.width, rgb.height, rng=rng)
    small = rgb.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(small)


def read_alignrec(options: argparse.Namespace, decode_one: Decode) -> Iterator[torch.Tensor]:
    """Yield an epoch by our loader, threads of one process; texts go to an idle tokenizer."""
    assert decode_one is decode_ours
    table = SampleTable.read(options.data)
    shards = open_shards(options.data, table, ShardsConfig())
    reader = ItemReader(
        shards,
        lambda texts: [[0]] * len(texts),
        image_size=options.size,
        padding_id=1,
        augment_seed=0,
    )
    plan = Plan(np.arange(len(table)), 0, options.batch, options.batch, 1, 1)
    batches = (
        batch for step in range(plan.steps_per_epoch) for batch in plan.micro_batches(step, 0)
    )
    loader = Loader(reader.read, num_threads=options.workers, prefetch=2 * options.workers)
    for batch in loader.batches(batches):
        yield torch.from_numpy(batch.images)


def read_webdataset(options: argparse.Namespace, decode_one: Decode) -> Iterator[torch.Tensor]:
    """Yield an epoch by webdataset: shards and raw samples shuffled, batches made in workers."""
    import webdataset

    def pixels(sample: dict[str, Any]) -> torch.Tensor:
        return torch.from_numpy(decode_one(sample["jpg"], int(sample["__key__"]), options.size))

    urls = [str(path) for path in sorted((options.data / "shards").glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(SHUFFLE_BUFFER)
        .map(pixels)
        .batched(options.batch, collation_fn=torch.stack)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=options.workers)
    yield from loader


def read_streaming(options: argparse.Namespace, decode_one: Decode) -> Iterator[torch.Tensor]:
    """Yield an epoch by MosaicML Streaming from a local copy in its own format."""
    streaming = _import_streaming()

    class Pictures(streaming.StreamingDataset):  # type: ignore[misc, name-defined]
        """Decodes what the shards hold."""

        def __getitem__(self, at: int) -> torch.Tensor:
            sample = super().__getitem__(at)
            return torch.from_numpy(decode_one(sample["jpg"], sample["number"], options.size))

    dataset = Pictures(
        local=str(options.data.with_name("mds")),
        shuffle=True,
        batch_size=options.batch,
        num_canonical_nodes=1,
    )
    yield from streaming.StreamingDataLoader(
        dataset, batch_size=options.batch, num_workers=options.workers
    )


READERS = {"alignrec": read_alignrec, "webdataset": read_webdataset, "streaming": read_streaming}
DECODERS: dict[str, Decode] = {"same_pixels": decode_ours, "pillow": decode_pillow}


def write_mds(data: Path) -> None:
    """Write the same JPEG bytes in Streaming's format, uncompressed like the tars."""
    streaming = _import_streaming()
    table = SampleTable.read(data)
    shards = open_shards(data, table, ShardsConfig())
    target = data.with_name("mds")
    if target.exists():
        return
    spare = data.with_name("mds.partial")
    columns = {"number": "int", "jpg": "bytes"}
    with streaming.MDSWriter(out=str(spare), columns=columns, exist_ok=True) as writer:
        for row in range(len(table)):
            sample = shards.read(row)
            writer.write({"number": sample.item_index, "jpg": sample.image})
    spare.rename(target)


def _import_streaming() -> Any:  # noqa: ANN401 - the module
    """Import Streaming without torchvision, which only its vision datasets use."""
    import transformers.feature_extraction_utils
    import transformers.tokenization_utils_base  # noqa: F401 - looks for torchvision itself

    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        module = types.ModuleType(f"torchvision{name}")
        module.__dict__.update(VisionDataset=object, to_tensor=None)
        sys.modules[module.__name__] = module
    import streaming

    return streaming


def _install_streaming(folder: Path) -> Path:
    """Make an environment that sees this one's packages and has Streaming; return its Python."""
    place = folder / "streaming-venv"
    python = place / "bin" / "python"
    if not (place / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, *STREAMING_NEEDS], check=True)
        subprocess.run([*pip, "--no-deps", STREAMING], check=True)
        packages = next((place / "lib").glob("python*/site-packages"))
        here = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "benchmark.pth").write_text("\n".join(here) + "\n")
        (place / "installed").touch()
    return python


# Waiting


def waiting(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train a little with 224 px pictures of 256 px; report what the log says of waiting."""
    from alignrec.testing.datasets import write_dataset as write_test_dataset

    data = write_test_dataset(folder / "dataset", num_items=options.items, image_size=256)
    found = {size: _train(options, folder, data, size=size) for size in options.sizes}
    return {"encoders": found}


def _train(
    options: argparse.Namespace, folder: Path, data: Path, *, size: str
) -> dict[str, float | int]:
    settings = {
        "encoder.size": size,
        "encoder.image_size": 224,
        "epochs": 1000,
        "max_steps": options.steps,
        "global_batch_size": options.batch,
        "log_steps": 4,
        "checkpoint_steps": 1_000_000,
        "valid_fraction": 0.02,
    }
    output = folder / f"encoder-{size}"
    command = [sys.executable, "-m", "alignrec.pretrain", "--dataset", str(data)]
    command += ["--output", str(output)]
    for key, value in settings.items():
        command += ["--set", f"pretrain.{key}={value}"]
    run(command, log=folder / "train.log", environment={"OMP_NUM_THREADS": str(os.cpu_count())})
    rows = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    settled = [row for row in rows if row.get("data_wait_share") is not None][1:]
    return {
        "data_wait_share_median": round(
            statistics.median(row["data_wait_share"] for row in settled), 4
        ),
        "data_wait_share_worst": round(max(row["data_wait_share"] for row in settled), 4),
        "samples_per_second": round(
            statistics.median(row["samples_per_second"] for row in settled), 2
        ),
        "log_rows": len(settled),
    }


if __name__ == "__main__":
    main()
