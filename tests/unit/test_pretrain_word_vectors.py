import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignrec import configuration
from alignrec.data.shards import SampleTable
from alignrec.errors import UserError
from alignrec.pretrain import word_vectors as module
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import split_rows
from alignrec.pretrain.tokenizer import (
    load_words,
    read_texts,
    read_training_texts,
    write_tokenizer,
)
from alignrec.pretrain.word_vectors import (
    counts_words,
    read_text_head,
    read_word_vectors,
    word_vectors,
    write_word_vectors,
)
from alignrec.testing.datasets import write_dataset


def topics(num_texts: int, seed: int) -> list[list[int]]:
    """Texts of one of four topics with ten words each, and five words that all share."""
    rng = np.random.default_rng(seed)
    texts = []
    for number in range(num_texts):
        own = 5 + 10 * (number % 4) + rng.choice(10, size=5, replace=False)
        texts.append([*own.tolist(), *rng.choice(5, size=3).tolist()])
    return texts


def test_words_that_share_texts_lie_together() -> None:
    vectors = word_vectors(topics(200, 0), vocabulary_size=45, width=16, seed=0)
    assert vectors.shape == (45, 16)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-4)
    cosine = vectors[5:] @ vectors[5:].T
    same = np.equal.outer(np.arange(40) // 10, np.arange(40) // 10)
    assert cosine[same].min() > cosine[~same].max()


def test_equal_seeds_give_equal_vectors() -> None:
    texts = topics(50, 1)
    first = word_vectors(texts, vocabulary_size=45, width=8, seed=3)
    assert np.array_equal(first, word_vectors(iter(texts), vocabulary_size=45, width=8, seed=3))
    assert not np.allclose(first, word_vectors(texts, vocabulary_size=45, width=8, seed=4))


@pytest.mark.parametrize("texts", [[], [[]], [[3], [4]], [[0, 1]] * 5])
def test_little_text_gives_finite_vectors(texts: list[list[int]]) -> None:
    vectors = word_vectors(texts, vocabulary_size=300, width=32, seed=0)
    assert vectors.shape == (300, 32)
    assert np.isfinite(vectors).all()
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths.min() > 0.3
    assert lengths.max() < 2.0


def test_rare_pairs_of_very_many_texts_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory and time do not grow with chance; what is in several texts stays."""
    texts = [*topics(200, 0), [45, 46], [47, 48], [47, 48]]
    pairs = module._positive_information(module._presence(texts, 49)).nonzero()
    assert {(45, 46), (47, 48)} <= set(zip(*map(np.ndarray.tolist, pairs), strict=True))
    monkeypatch.setattr(module, "_MANY_TEXTS", 100)
    kept = module._positive_information(module._presence(texts, 49)).nonzero()
    assert (45, 46) not in set(zip(*map(np.ndarray.tolist, kept), strict=True))
    assert (47, 48) in set(zip(*map(np.ndarray.tolist, kept), strict=True))
    vectors = word_vectors(texts, vocabulary_size=49, width=16, seed=0)
    assert vectors[47] @ vectors[48] > 0.9 > abs(vectors[45] @ vectors[46])


def test_information_is_that_of_all_pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = topics(40, 2)
    presence = np.zeros((40, 45))
    for row, text in enumerate(texts):
        presence[row, text] = 1
    counts = presence.T @ presence
    np.fill_diagonal(counts, 0)
    mass = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.log(counts * counts.sum() / np.outer(mass, mass))
    expected = np.where(counts > 0, np.maximum(expected, 0), 0)
    for rows_at_once in (7, 256):
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", rows_at_once)
        found = module._positive_information(module._presence(texts, 45))
        np.testing.assert_allclose(found.toarray(), expected, atol=1e-6)


def config_of(**settings: Any) -> PretrainConfig:
    section = {"tokenizer": {"vocabulary_size": 300}, **settings}
    return configuration.build(PretrainConfig, section, section="pretrain")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "d"
    return write_dataset(folder, num_items=200, image_size=8, without_text=(3,))


def sample(dataset: Path, config: PretrainConfig, most: int) -> list[str]:
    return list(itertools.chain.from_iterable(read_training_texts(dataset, config, most=most)))


def test_training_texts_are_all_but_the_held_out_and_empty_ones(dataset: Path) -> None:
    config = config_of(valid_fraction=0.2, seed=3)
    table = SampleTable.read(dataset)
    texts = list(read_texts(dataset))
    train = [texts[item] for item in table.item_index[split_rows(table, config).train]]
    assert sample(dataset, config, 1000) == [text for text in train if text]
    assert 145 < len(train) < 175


def test_a_part_of_very_many_texts_is_read(dataset: Path) -> None:
    whole = sample(dataset, config_of(), 1000)
    some = sample(dataset, config_of(), 50)
    assert 35 < len(some) < 65
    assert [text for text in whole if text in set(some)] == some
    assert sample(dataset, config_of(seed=1), 50) != some


def test_held_out_texts_are_in_no_count(dataset: Path, tmp_path: Path) -> None:
    """The same tokenizer, vectors and shares whatever the held-out items say."""
    config = config_of(valid_fraction=0.2)
    split = split_rows(SampleTable.read(dataset), config)
    texts = list(read_texts(dataset))
    for row in split.held_out:
        texts[row] = "quite another thing " * 5
    other = write_dataset(tmp_path / "other", num_items=200, image_size=8, texts=texts)
    for name, folder in (("one", dataset), ("two", other)):
        write_tokenizer(folder, config, tmp_path / f"{name}.json")
        words = load_words(tmp_path / f"{name}.json", max_length=40)
        write_word_vectors(folder, words, config, tmp_path / name, width=16)
    for name in ("json", ""):
        one, two = (tmp_path / f"{n}.{name}".rstrip(".") for n in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_a_damaged_item_table_is_named(dataset: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dataset, tmp_path / "d")
    path = folder / "items.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    for read in (read_texts(folder), read_training_texts(folder, config_of(), most=10)):
        with pytest.raises(UserError, match=r"items\.parquet cannot be read .*data_prep"):
            next(iter(read))


def test_the_text_head_starts_from_token_shares_and_word_vectors(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", num_items=30, without_text=(3,))
    config = config_of(valid_fraction=0)
    write_tokenizer(dataset, config, tmp_path / "t.json")
    words = load_words(tmp_path / "t.json", max_length=40)
    write_word_vectors(dataset, words, config, tmp_path / "v", width=16)
    head = read_text_head(tmp_path / "v")
    tokens = np.concatenate([words(text) for text in read_texts(dataset) if text])
    counts = np.bincount(tokens, minlength=words.vocabulary_size)
    shares = np.exp(head["mlm_head.bias"].double().numpy())
    assert shares.sum() == pytest.approx(1.0, rel=1e-5)
    seen = counts > 0
    assert not seen.all()
    assert np.allclose(shares[seen], counts[seen] / len(tokens), rtol=0.02)
    assert 0 < shares[~seen].max() < shares[seen].min()
    vectors = read_word_vectors(tmp_path / "v")
    ratio = head["mlm_head.weight"] / vectors
    assert np.allclose(ratio, 0.02 * 16**0.5)  # as long as weights of standard deviation 0.02


def test_a_checkpoint_keeps_its_text_head() -> None:
    given = {"initial": {"checkpoint": "x.pth"}, "tokenizer": {"path": "beit3.spm"}}
    build = configuration.build
    assert not counts_words(build(PretrainConfig, given, section="pretrain"))
    assert counts_words(build(PretrainConfig, {}, section="pretrain"))
    random = {"tokenizer": {"initial_vectors": "random"}}
    assert not counts_words(build(PretrainConfig, random, section="pretrain"))
