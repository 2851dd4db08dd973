"""Both stages as a user starts them: killed and started again, on one rank and on two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from alignrec import artifacts, configuration
from alignrec.data.shards import SampleTable
from alignrec.data.shared_array import SharedArray
from alignrec.errors import StageFailure
from alignrec.features import STAGE as FEATURES
from alignrec.features import extraction
from alignrec.features.config import FeaturesConfig
from alignrec.pretrain import STAGE as PRETRAIN
from alignrec.stage import Context, main
from alignrec.testing.datasets import write_dataset
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.integration

PRETRAIN_SETTINGS = [
    "encoder.num_layers=1",
    "encoder.width=16",
    "encoder.num_heads=2",
    "encoder.hidden=16",
    "encoder.image_size=16",
    "encoder.patch_size=4",
    "encoder.max_text_tokens=20",
    "tokenizer.vocabulary_size=320",
    "global_batch_size=4",
    "checkpoint_steps=10",
    "log_steps=5",
    "epochs=8",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    return write_dataset(
        folder, num_items=48, image_size=16, without_image=(4, 7), without_text=(5, 7)
    )


@pytest.fixture(scope="module")
def encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose training was killed once and started again by the same command."""
    output = tmp_path_factory.mktemp("killed") / "encoder"
    process = subprocess.Popen(command(dataset, output), env=environment())
    checkpoints = output.with_name("encoder.partial") / "work" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_*0/manifest.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    finished = subprocess.run(
        command(dataset, output), env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert "resumed after step" in finished.stdout
    num_items = 8 * artifacts.read(output).counts["num_samples"]  # no multiple of the batch
    assert f" {num_items}/{num_items} samples in " in finished.stdout
    return output


def command(dataset: Path, output: Path) -> list[str]:
    settings = [part for s in PRETRAIN_SETTINGS for part in ("--set", f"pretrain.{s}")]
    folders = ["--dataset", str(dataset), "--output", str(output)]
    return [sys.executable, "-m", "alignrec.pretrain", *folders, *settings]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    dataset: Path, encoder: Path, tmp_path: Path
) -> None:
    undisturbed = tmp_path / "encoder"
    subprocess.run(command(dataset, undisturbed), env=environment(), check=True)
    for name in ("encoder.safetensors", "tokenizer.json", "encoder.json"):
        assert (undisturbed / name).read_bytes() == (encoder / name).read_bytes(), name
    steps = [
        json.loads(row)["step"] for row in (encoder / "history.jsonl").read_text().split("\n")[:-1]
    ]
    assert steps == sorted(set(steps))


def test_zero_3_needs_no_launcher(dataset: Path, tmp_path: Path) -> None:
    alone = {k: v for k, v in environment().items() if k not in ("RANK", "LOCAL_RANK")}
    output = tmp_path / "encoder"
    settings = ["--set", "pretrain.zero_stage=3", "--set", "pretrain.epochs=1"]
    subprocess.run([*command(dataset, output), *settings], env=alone, check=True)
    artifacts.verify(output)


def test_the_encoder_artifact_is_what_its_contract_says(encoder: Path) -> None:
    manifest = artifacts.verify(encoder)
    assert manifest.kind == "encoder"
    weights = load_file(encoder / "encoder.safetensors")
    assert manifest.counts["num_parameters"] == sum(t.numel() for t in weights.values())
    shown = np.load(encoder / "reconstructions.npz")
    size = shown["original"].shape
    assert size == shown["masked"].shape == shown["predicted"].shape
    assert size[1:] == (16, 16, 3)
    assert len(shown["text_masked"]) == size[0]
    assert any("<mask>" in text for text in shown["text_masked"])
    assert set(manifest.facts["held_out"]) >= {"text_accuracy", "image_loss_mean_patch"}


def extract(dataset: Path, encoder: Path, output: Path, **settings: Any) -> None:
    config = configuration.build(FeaturesConfig, settings, section="features")
    inputs = {"dataset": dataset, "encoder": encoder}
    mark = FEATURES.fingerprint(config, inputs)
    extraction.run(config, Context(inputs, output, mark, output.with_name(output.name + ".logs")))


def extract_raw(dataset: Path, encoder: Path, output: Path) -> None:
    raw = {"center": False, "normalise": False}
    extract(dataset, encoder, output, batch_size=8, extraction=raw)


def extract_variants(dataset: Path, encoder: Path, folder: Path) -> None:
    """Extract as usual, in half precision, and in one batch, so that ranks have nothing to do."""
    extract_raw(dataset, encoder, folder)
    raw = {"center": False, "normalise": False}
    for name, settings in {
        "bf16": {"batch_size": 8, "extraction": {**raw, "precision": "bf16"}},
        "one_batch": {"batch_size": 100, "extraction": raw},
    }.items():
        extract(dataset, encoder, folder.with_name(f"{folder.name}_{name}"), **settings)


def test_rows_do_not_depend_on_the_number_of_ranks(
    dataset: Path, encoder: Path, tmp_path: Path
) -> None:
    extract_variants(dataset, encoder, tmp_path / "one")
    run_ranks(extract_variants, 3, dataset, encoder, tmp_path / "three")
    for name in ("bf16", "one_batch"):
        one, three = (np.load(tmp_path / f"{n}_{name}" / "features.npy") for n in ("one", "three"))
        np.testing.assert_allclose(three, one, rtol=0, atol=1e-6)
    one, three = (np.load(tmp_path / n / "features.npy") for n in ("one", "three"))
    assert one.shape == (48, 16)
    shards = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in shards if path.is_relative_to(dataset)]  # all closed
    np.testing.assert_allclose(three, one, rtol=0, atol=1e-6)
    mask = np.load(tmp_path / "three" / "mask.npy")
    assert np.flatnonzero(~mask[:, 0]).tolist() == [4, 7]
    assert np.flatnonzero(~mask[:, 1]).tolist() == [5, 7]
    assert (one[7] == 0).all()  # neither picture nor text
    assert (np.abs(one[[4, 5]]).sum(axis=1) > 0).all()


@pytest.mark.parametrize("name", ["features", "encoder"])
def test_rank_0_publishes_when_its_peers_may_have_left(
    dataset: Path, encoder: Path, tmp_path: Path, name: str
) -> None:
    run_ranks(publish_alone, 2, dataset, encoder, tmp_path / name)
    assert artifacts.verify(tmp_path / name).kind == name


def publish_alone(dataset: Path, encoder: Path, output: Path) -> None:
    publish = artifacts.publish

    def alone(*args: Any, **named: Any) -> artifacts.Manifest:
        assert not dist.is_initialized()
        return publish(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "publish", alone)
        if output.name == "features":
            extract_raw(dataset, encoder, output)
        else:
            assert (
                main(PRETRAIN, [*command(dataset, output)[3:], "--set", "pretrain.epochs=1"]) == 0
            )


def test_a_batch_that_was_never_marked_fails_the_stage(
    dataset: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction._Worker, "encode_range", lambda *_: None)
    with pytest.raises(StageFailure, match="6 of 6 batches of features never reached"):
        extract_raw(dataset, encoder, tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_extraction_goes_on_where_it_was_stopped(
    dataset: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, seen = extraction._Worker.encode, []

    def stop_at_third(self: Any, batch: Any) -> Any:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(batch)
        return encode(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(extraction._Worker, "encode", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            extract_raw(dataset, encoder, tmp_path / "stopped")

    def count(self: Any, batch: Any) -> Any:
        seen.append(batch)
        return encode(self, batch)

    monkeypatch.setattr(extraction._Worker, "encode", count)
    extract_raw(dataset, encoder, tmp_path / "stopped")
    assert len(seen) == 6  # each of the six batches once
    extract_raw(dataset, encoder, tmp_path / "whole")
    stopped, whole = (np.load(tmp_path / n / "features.npy") for n in ("stopped", "whole"))
    assert np.array_equal(stopped, whole)


def test_a_mark_is_written_after_its_rows_are_on_disk(
    dataset: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, sync, marked, synced = SharedArray.write, SharedArray.sync, [], []

    def watch(self: Any, first: int, rows: Any) -> None:
        path = Path(self._file.name)
        if path.name.startswith("done_"):
            marked.append(first)
            assert synced[-1].shape == (48, 16)
            assert synced[-1][8 * first : 8 * first + 4].any(axis=1).all()  # item 7 has nothing
        write(self, first, rows)

    def look(self: Any) -> None:
        sync(self)
        synced.append(np.load(self._file.name))

    monkeypatch.setattr(SharedArray, "write", watch)
    monkeypatch.setattr(SharedArray, "sync", look)
    extract_raw(dataset, encoder, tmp_path / "features")
    assert marked == list(range(6))


def test_a_hidden_modality_changes_the_items_that_lose_it_alone(
    dataset: Path, encoder: Path, tmp_path: Path
) -> None:
    raw = {"center": False, "normalise": False}
    extract(dataset, encoder, tmp_path / "whole", extraction=raw)
    extract(dataset, encoder, tmp_path / "hidden", extraction={**raw, "hide": "image"})
    whole, hidden = (np.load(tmp_path / n / "features.npy") for n in ("whole", "hidden"))
    masks = [np.load(tmp_path / n / "mask.npy") for n in ("whole", "hidden")]
    lost = masks[0][:, 0] & ~masks[1][:, 0]
    assert 20 <= lost.sum() <= 24
    assert (np.abs(whole - hidden)[lost].max(axis=1) > 1e-4).all()
    np.testing.assert_allclose(hidden[~lost], whole[~lost], rtol=0, atol=1e-6)


@pytest.mark.parametrize("whiten", [0.0, 0.75])
def test_centred_unit_rows(dataset: Path, encoder: Path, tmp_path: Path, whiten: float) -> None:
    mean = {"pooling": "mean", "whiten": whiten}
    extract(dataset, encoder, tmp_path / "features", extraction=mean)
    features = np.load(tmp_path / "features" / "features.npy")
    lengths = np.linalg.norm(features, axis=1)
    assert features.shape == (48, 32)
    assert lengths[7] == 0
    assert np.flatnonzero((features[:, :16] == 0).all(axis=1)).tolist() == [4, 7]
    assert np.flatnonzero((features[:, 16:] == 0).all(axis=1)).tolist() == [5, 7]
    np.testing.assert_allclose(np.delete(lengths, 7), 1, atol=1e-5)


def test_all_parts_have_the_same_length(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    extract(dataset, encoder, tmp_path / "features", extraction={"pooling": "all"})
    features = np.load(tmp_path / "features" / "features.npy")
    assert artifacts.read(tmp_path / "features").facts["parts"] == [
        {"of": "image", "width": 16},
        {"of": "text", "width": 16},
        {"of": None, "width": 16},
    ]
    lengths = np.linalg.norm(features.reshape(48, 3, 16), axis=2)
    np.testing.assert_allclose(lengths[[4, 5, 7]] > 0, [[0, 1, 1], [1, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(np.delete(lengths, [4, 5, 7], axis=0), 3**-0.5, atol=1e-5)


def test_mistakes_are_one_line_with_exit_code_2(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--dataset", str(dataset), "--output", str(tmp_path / "encoder")]
    assert main(PRETRAIN, [*folders, "--set", "pretrain.global_batch_size=0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert main(PRETRAIN, [*folders, "--set", "pretrain.micro_batch_size=65"]) == 2
    assert "global_batch_size=64 is less than micro_batch_size=65" in capsys.readouterr().err
    assert main(PRETRAIN, [*folders, "--set", "pretrain.tokenizer.path=absent.json"]) == 2
    assert "pretrain.tokenizer.path" in capsys.readouterr().err
    assert main(FEATURES, folders) == 2
    assert "either an encoder" in capsys.readouterr().err


def test_a_damaged_shard_fails_the_stage_by_name(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=16, image_size=16)
    shard = dataset / SampleTable.read(dataset).shard_names[0]
    shard.write_bytes(shard.read_bytes().replace(b"item_key", b"item-key"))
    finished = subprocess.run(
        command(dataset, tmp_path / "encoder"), env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith(f"failed: shard {shard}: sample ")
    assert "its checksum differs" in last
