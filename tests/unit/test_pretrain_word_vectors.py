from pathlib import Path

import numpy as np
import pytest

from alignrec.pretrain import word_vectors as module
from alignrec.pretrain.config import TokenizerConfig
from alignrec.pretrain.tokenizer import load_words, read_texts, write_tokenizer
from alignrec.pretrain.word_vectors import word_vectors
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
