from pathlib import Path

import numpy as np
import pytest

from alignrec import configuration
from alignrec.pretrain import word_vectors as module
from alignrec.pretrain.config import PretrainConfig, TokenizerConfig
from alignrec.pretrain.tokenizer import load_words, read_texts, write_tokenizer
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


def test_every_nth_of_very_many_texts_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(tmp_path / "d", num_items=10, without_text=(3,))
    write_tokenizer(dataset, TokenizerConfig(vocabulary_size=300), tmp_path / "t.json")
    words = load_words(tmp_path / "t.json", max_length=40)
    texts = list(read_texts(dataset))
    assert list(module._token_ids(dataset, words)) == [words(text) for text in texts]
    monkeypatch.setattr(module, "_MAX_TEXTS", 4)
    assert list(module._token_ids(dataset, words)) == [words(text) for text in texts[::3]]


def test_the_text_head_starts_from_token_shares_and_word_vectors(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", num_items=30)
    write_tokenizer(dataset, TokenizerConfig(vocabulary_size=300), tmp_path / "t.json")
    words = load_words(tmp_path / "t.json", max_length=40)
    write_word_vectors(dataset, words, tmp_path / "v", width=16, seed=0)
    head = read_text_head(tmp_path / "v")
    tokens = np.concatenate([words(text) for text in read_texts(dataset)])
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
