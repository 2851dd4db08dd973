"""Token embeddings to start from: which tokens share texts (tokenizer -> training).

A transformer that starts from random token embeddings needs many steps to find out that two words
belong together; the counts say it at once. So embeddings start as the leading factors of the
positive pointwise mutual information of tokens within texts (Levy & Goldberg 2014), because
training starts from scratch. The text head starts from the same vectors, and from how frequent each
token is: else the first hundreds of steps would only teach it that.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.multiway import SMALL_STD
from alignrec.pretrain.tokenizer import Words, read_training_texts

Floats = npt.NDArray[np.float32]

VECTORS = "word_vectors.safetensors"
# More texts, or more tokens of one, do not change which tokens belong together.
_MAX_TEXTS, _MAX_TOKENS = 50_000, 64
# A pair in one of many texts is chance more often than not, and most pairs are such.
_MANY_TEXTS, _LEAST_SHARED = 10_000, 2
_UNSEEN = 1.0  # occurrences that all tokens share beforehand: none has a share of 0
_MAX_FACTORS = 256
_ITERATIONS = 4
_SPARE_COLUMNS = 16
_ROWS_AT_ONCE = 256


def counts_words(config: PretrainConfig) -> bool:
    """Whether a run starts from these vectors; a checkpoint has a text head of its own."""
    return config.tokenizer.initial_vectors == "texts" and config.initial.checkpoint is None


def write_word_vectors(
    dataset: Path, words: Words, config: PretrainConfig, target: Path, *, width: int
) -> None:
    """Write the vectors of the training items' texts by rename (rank 0 calls it)."""
    occurrences = np.full(words.vocabulary_size, _UNSEEN / words.vocabulary_size)
    batches = map(words.batch, read_training_texts(dataset, config, most=_MAX_TEXTS))
    texts = _tallied(itertools.chain.from_iterable(batches), occurrences)
    vectors = word_vectors(
        texts, vocabulary_size=words.vocabulary_size, width=width, seed=config.seed
    )
    log_shares = np.log(occurrences / occurrences.sum()).astype(np.float32)
    spare = target.with_suffix(".writing")
    save_file(
        {"vectors": torch.from_numpy(vectors), "log_shares": torch.from_numpy(log_shares)}, spare
    )
    spare.replace(target)


def read_word_vectors(path: Path) -> Float[Tensor, "vocabulary width"]:
    """Read the vectors that ``write_word_vectors`` wrote."""
    return load_file(path)["vectors"]


def read_text_head(path: Path) -> dict[str, Tensor]:
    """Return the text head to start from: vectors as long as random ones, shares as the bias."""
    state = load_file(path)
    vectors = state["vectors"]
    length = SMALL_STD * vectors.shape[1] ** 0.5
    return {"mlm_head.weight": vectors * length, "mlm_head.bias": state["log_shares"]}


def _tallied(
    texts: Iterable[list[int]], occurrences: npt.NDArray[np.float64]
) -> Iterator[list[int]]:
    """Pass texts on and add up how often each token occurs."""
    for text in texts:
        np.add.at(occurrences, text, 1.0)
        yield text


def word_vectors(
    texts: Iterable[list[int]], *, vocabulary_size: int, width: int, seed: int
) -> Floats:
    """Return one vector of length about 1 per token: (vocabulary_size, width).

    Args:
        texts: token ids of each text; a token counts once per text.
        vocabulary_size: one past the largest id.
        width: columns; beyond the rank of the counts they are random.
        seed: of the vectors of tokens without a companion, and of the iteration's start.
    """
    rng = np.random.default_rng([seed, vocabulary_size, width])
    vectors = rng.standard_normal((vocabulary_size, width), dtype=np.float32)
    vectors *= width**-0.5
    information = _positive_information(_presence(texts, vocabulary_size))
    known = np.flatnonzero(np.diff(information.indptr))  # tokens with a companion
    factors = _leading_factors(information[known][:, known], min(width, _MAX_FACTORS), rng)
    length = np.linalg.norm(factors, axis=1, keepdims=True)
    told = length[:, 0] > 1e-6 * length.max(initial=1e-30)
    # A turn spreads the few strong factors over all columns, as a random start would.
    turn, _ = np.linalg.qr(rng.standard_normal((width, width), dtype=np.float32))
    vectors[known[told]] = (factors[told] / length[told]) @ turn[: factors.shape[1]]
    return vectors


def _presence(texts: Iterable[list[int]], vocabulary_size: int) -> sp.csr_array:
    """Return which of its first tokens each text has: (texts, vocabulary_size), ones and zeros."""
    columns = [np.unique(np.asarray(text[:_MAX_TOKENS], dtype=np.int32)) for text in texts]
    starts = np.concatenate([[0], np.cumsum([len(c) for c in columns], dtype=np.int64)])
    indices = np.concatenate([np.zeros(0, dtype=np.int32), *columns])
    ones = np.ones(len(indices), dtype=np.float32)
    return sp.csr_array((ones, indices, starts), shape=(len(columns), vocabulary_size))


def _positive_information(presence: sp.csr_array) -> sp.csr_array:
    """Return max(0, log p(a, b) / (p(a) p(b))) of pairs of tokens, by the texts that they share.

    Some tokens at a time: all pairs together may take gigabytes before the weak ones are dropped.
    """
    num_texts, size = presence.shape
    by_token = sp.csr_array(presence.T)
    # of each token, the pairs that it is in, over all texts
    mass = by_token @ (presence.sum(axis=1) - 1.0).astype(np.float64)
    least = _LEAST_SHARED if num_texts > _MANY_TEXTS else 1
    parts = [sp.csr_array((0, size), dtype=np.float32)]
    for first in range(0, size, _ROWS_AT_ONCE):
        pairs = sp.coo_array(by_token[first : first + _ROWS_AT_ONCE] @ presence)
        row, column, shared = pairs.row + first, pairs.col, pairs.data.astype(np.float64)
        kept = (row != column) & (shared >= least)
        row, column, shared = row[kept], column[kept], shared[kept]
        value = np.log(shared * mass.sum() / (mass[row] * mass[column]))
        kept = value > 0
        entries = (value[kept].astype(np.float32), (row[kept] - first, column[kept]))
        parts.append(sp.csr_array(entries, shape=(pairs.shape[0], size)))
    return sp.csr_array(sp.vstack(parts, format="csr"))


def _leading_factors(matrix: sp.csr_array, rank: int, rng: np.random.Generator) -> Floats:
    """Return U sqrt(S) of a symmetric matrix by subspace iteration (Halko et al. 2011)."""
    size = matrix.shape[0]
    columns = min(rank + _SPARE_COLUMNS, size)
    basis = np.linalg.qr(rng.standard_normal((size, columns), dtype=np.float32))[0]
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(matrix @ basis)[0]
    strength, turn = np.linalg.eigh(basis.T @ (matrix @ basis))
    order = np.argsort(-strength)[:rank]
    factors: Floats = (basis @ turn[:, order]) * np.sqrt(np.maximum(strength[order], 0.0))
    return factors
