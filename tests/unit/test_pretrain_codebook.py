"""Visual words: exact clustering, features of patches, what is learned and what is resumed."""

import contextlib
import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from alignrec import configuration
from alignrec.data.shards import SampleTable
from alignrec.errors import UserError
from alignrec.pretrain import clustering
from alignrec.pretrain.clustering import LIMIT, MAX_COMPONENTS, Clusters, nearest
from alignrec.pretrain.codebook import (
    Codebook,
    cosine_basis,
    fit_features,
    learn_codebook,
    most_codes,
)
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import open_training_data, split_rows
from alignrec.pretrain.patch_sample import choose_pictures, sample_size, write_sample
from alignrec.pretrain.tokenizer import load_words, write_tokenizer
from alignrec.telemetry import Telemetry
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER

CPU = torch.device("cpu")
QUIET = Telemetry(Path("unused"), "pretrain", enabled=False)


def draw_vectors(count: int, *, components: int = MAX_COMPONENTS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (count, components)
    return torch.randint(-LIMIT, LIMIT + 1, size, generator=generator).float()


def draw_patches(count: int, *, side: int = 4, seed: int = 0) -> np.ndarray:
    """Patches of one of five colours with noise, one in three of them plain white."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, size=(5, 3, 1))
    plain = np.repeat(colours[rng.integers(5, size=count)], side**2, axis=2)
    noisy = plain + rng.integers(-20, 21, size=plain.shape)
    noisy[rng.random(count) < 1 / 3] = 255
    return noisy.clip(0, 255).astype(np.uint8).reshape(count, -1)


def learn(patches: np.ndarray, state: Path | None = None, *, num_codes: int = 16) -> Codebook:
    return learn_codebook(
        patches, num_codes=num_codes, seed=3, device=CPU, telemetry=QUIET, state=state
    )


def assert_same(found: Codebook, other: Codebook) -> None:
    assert torch.equal(found.features.basis, other.features.basis)
    assert torch.equal(found.centers, other.centers)
    assert torch.equal(found.mean_patches, other.mean_patches)
    assert torch.equal(found.counts, other.counts)
    assert found.facts == other.facts


def test_nearest_centres_are_those_of_integer_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, centers = draw_vectors(300), draw_vectors(70, seed=1)
    codes, distances = nearest(vectors, centers)
    exact = (vectors.long()[:, None] - centers.long()[None]).square().sum(dim=2)
    assert torch.equal(distances, exact.min(dim=1).values)
    assert torch.equal(codes, exact.argmin(dim=1))
    monkeypatch.setattr(clustering, "SCORES_AT_ONCE", 700)  # ten vectors at a time
    assert torch.equal(nearest(vectors, centers)[0], codes)
    assert nearest(vectors[:0], centers)[0].shape == (0,)


def test_the_worst_case_is_still_exact() -> None:
    largest = torch.full((1, MAX_COMPONENTS), float(LIMIT))
    centers = torch.cat([-largest, largest, largest])
    centers[2, 0] -= 1
    codes, distances = nearest(torch.cat([largest, -largest]), centers)
    assert codes.tolist() == [1, 0]
    assert distances.tolist() == [0, 0]
    _, far = nearest(-largest, largest)
    assert far.item() == MAX_COMPONENTS * (2 * LIMIT) ** 2


def test_apart_groups_are_found_though_all_centres_start_as_one() -> None:
    groups = torch.tensor([[-90.0, 10.0], [90.0, 0.0], [20.0, -70.0]])
    generator = torch.Generator().manual_seed(0)
    vectors = groups.repeat(100, 1) + torch.randint(-3, 4, (300, 2), generator=generator)
    clusters = Clusters.at(vectors[:1].repeat(3, 1))
    errors = [clusters.one_pass([vectors]) for _ in range(9)]
    assert errors[-1] < errors[0] / 100
    assert torch.cdist(groups, clusters.centers).min(dim=1).values.max() <= 1.5


def test_a_crowd_of_equal_vectors_gets_one_code() -> None:
    crowd, few = torch.zeros(500, 2), torch.tensor([[50.0, 9.0], [50.0, -9.0]])
    vectors = torch.cat([crowd, few.repeat(10, 1)])
    clusters = Clusters.at(torch.tensor([[0.0, 0.0], [0.0, 0.0], [50.0, 0.0]]))
    for _ in range(4):
        error = clusters.one_pass([vectors])
    assert error == 0
    assert sorted(map(tuple, clusters.centers.tolist())) == [(0, 0), (50, -9), (50, 9)]


def test_cosine_components_are_orthonormal_and_the_first_is_the_mean() -> None:
    basis = cosine_basis(16)
    assert basis.shape == (3 * 8 * 8, 3 * 256)
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
    np.testing.assert_allclose(basis[0], 768**-0.5, atol=1e-12)
    np.testing.assert_allclose(np.abs(basis[1:].sum(axis=1)), 0, atol=1e-12)


@pytest.mark.parametrize("side", [2, 4, 16])
def test_features_are_small_integers_and_a_patch_has_its_own_whatever_is_beside_it(
    side: int,
) -> None:
    patches = draw_patches(200, side=side)
    features = fit_features(patches, CPU)
    found = features(torch.from_numpy(patches))
    assert torch.equal(found, found.round())
    assert found.abs().max() <= LIMIT
    assert found.shape[1] <= MAX_COMPONENTS
    alone = torch.cat([features(torch.from_numpy(patches[i : i + 1])) for i in range(20)])
    assert torch.equal(alone, found[:20])
    extremes = np.stack([np.zeros(3 * side**2), np.full(3 * side**2, 255)]).astype(np.uint8)
    assert features(torch.from_numpy(extremes)).abs().max() <= LIMIT


def test_pictures_of_one_colour_have_one_code() -> None:
    found = learn(np.full((100, 48), 77, dtype=np.uint8))
    assert found.num_codes == 1
    assert (found.mean_patches == 77).all()
    assert found.facts["quantisation_error"] == 0


def test_threads_change_nothing() -> None:
    patches = draw_patches(2000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = learn(patches)
        torch.set_num_threads(2)
        assert_same(learn(patches), single)
    finally:
        torch.set_num_threads(before)


def test_facts_are_those_of_the_codes_and_every_code_has_patches(tmp_path: Path) -> None:
    patches = draw_patches(1500)
    found = learn(patches, num_codes=40)
    codes = found.codes(torch.from_numpy(patches))
    counts = torch.bincount(codes, minlength=found.num_codes)
    assert counts.min() > 0
    assert torch.equal(found.counts, counts)
    assert found.facts["most_frequent_share"] == pytest.approx(int(counts.max()) / 1500, rel=1e-5)
    pixels = patches / 127.5 - 1
    error = np.square(pixels - (found.mean_patches[codes].numpy() / 127.5 - 1)).mean()
    assert found.facts["quantisation_error"] == pytest.approx(error, rel=0.02)  # means are rounded
    constant = np.square(pixels - pixels.mean(axis=0)).mean()
    assert found.facts["mean_patch_error"] == pytest.approx(constant, rel=1e-4)
    assert error < constant / 20
    found.save(tmp_path / "codebook.safetensors")
    assert_same(Codebook.load(tmp_path / "codebook.safetensors", CPU), found)


def test_small_samples_have_fewer_codes() -> None:
    assert most_codes(8192, 10**6) == 8192
    assert most_codes(8192, 640) == 20
    assert most_codes(8192, 5) == 1


@pytest.mark.parametrize("last", [0, 1, 3])
def test_a_killed_run_goes_on_to_the_same_codebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    patches = draw_patches(1500)
    original, done = Clusters.one_pass, []

    def one_pass(self: Clusters, *args: object) -> int:
        done.append(1)
        if len(done) == last + 1:
            raise KeyboardInterrupt
        return original(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Clusters, "one_pass", one_pass)
        learn(patches, tmp_path / "state.safetensors")
    assert len(done) == last + 1
    assert_same(learn(patches, tmp_path / "state.safetensors"), learn(patches))


def make_config(**objective: object) -> PretrainConfig:
    section = {
        "encoder": TINY_ENCODER,
        "tokenizer": {"vocabulary_size": 300},
        "valid_fraction": 0.3,
        "objective": {"targets": "codebook", **objective},
    }
    return configuration.build(PretrainConfig, section, section="pretrain")


def test_the_sample_is_of_training_pictures_whatever_the_threads(tmp_path: Path) -> None:
    dataset = write_dataset(
        tmp_path / "dataset", num_items=40, image_size=16, without_image=range(0, 40, 3)
    )
    config, table = make_config(), SampleTable.read(dataset)
    rows = choose_pictures(table, config)
    train = split_rows(table, config).train
    assert sorted(rows) == [row for row in train if table.item_index[row] % 3]
    assert len(choose_pictures(table, make_config(codebook_pictures=7))) == 7
    write_tokenizer(dataset, config, tmp_path / "tokenizer.json")
    words = load_words(tmp_path / "tokenizer.json", max_length=20)
    architecture = config.encoder.architecture(words.vocabulary_size)
    for threads in (1, 3):
        loader = dataclasses.replace(config.loader, num_threads=threads)
        changed = dataclasses.replace(config, loader=loader)
        with contextlib.closing(open_training_data(dataset, changed, words, num_ranks=1)) as data:
            target = tmp_path / f"{threads}.npy"
            # a full disk kills who writes through a mapping, and is told to who writes by offset
            with mock.patch.object(np, "memmap", side_effect=AssertionError):
                write_sample(data, rows, changed, architecture, target=target, telemetry=QUIET)
    found = np.load(tmp_path / "1.npy")
    assert found.shape == (len(rows) * 16, 48)
    assert len(found) == sample_size(table, config, architecture)
    assert np.array_equal(np.load(tmp_path / "3.npy"), found)


def test_without_pictures_there_is_nothing_to_learn(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=10, without_image=range(10))
    with pytest.raises(UserError, match="no training item has a picture"):
        choose_pictures(SampleTable.read(dataset), make_config())
