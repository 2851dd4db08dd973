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
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.multiway import SMALL_STD
from alignrec.pretrain.tokenizer import Words, read_texts

Floats = npt.NDArray[np.float32]

VECTORS = "word_vectors.safetensors"
_MAX_TEXTS = 200_000  # more do not change which tokens belong together
_UNSEEN = 1.0  # occurrences that all tokens share beforehand: none has a share of 0
_ITERATIONS = 8
_SPARE_COLUMNS = 16


def counts_words(config: PretrainConfig) -> bool:
    """Whether a run starts from these vectors; a checkpoint has a text head of its own."""
    return config.tokenizer.initial_vectors == "texts" and config.initial.checkpoint is None


def write_word_vectors(dataset: Path, words: Words, target: Path, *, width: int, seed: int) -> None:
    """Write the vectors of a dataset's texts by rename (rank 0 calls it)."""
    occurrences = np.full(words.vocabulary_size, _UNSEEN / words.vocabulary_size)
    texts = _tallied(_token_ids(dataset, words), occurrences)
    vectors = word_vectors(texts, vocabulary_size=words.vocabulary_size, width=width, seed=seed)
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


def _token_ids(dataset: Path, words: Words) -> Iterator[list[int]]:
    """Yield the token ids of the texts, of every n-th where there are very many."""
    num_texts = pq.read_metadata(dataset / "items.parquet").num_rows
    stride = -(-max(num_texts, 1) // _MAX_TEXTS)
    yield from map(words, itertools.islice(read_texts(dataset), 0, None, stride))


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
    random = rng.normal(scale=width**-0.5, size=(vocabulary_size, width))
    information = _positive_information(_counts(texts, vocabulary_size))
    factors = _leading_factors(information, min(width, vocabulary_size), rng)
    vectors = np.zeros_like(random)
    vectors[:, : factors.shape[1]] = factors
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    known = length > 1e-6 * max(float(length.max()), 1e-30)
    # A turn spreads the few strong factors over all columns, as a random start would.
    turn, _ = np.linalg.qr(rng.normal(size=(width, width)))
    turned = np.divide(vectors, length, out=np.zeros_like(vectors), where=known) @ turn
    return np.where(known, turned, random).astype(np.float32)


def _counts(texts: Iterable[list[int]], vocabulary_size: int) -> sp.csr_array:
    """Return how many texts each pair of tokens shares; the diagonal says how many each has."""
    columns = [np.unique(np.asarray(text, dtype=np.int64)) for text in texts]
    lengths = [len(c) for c in columns]
    indices = np.concatenate([np.zeros(0, dtype=np.int64), *columns])
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    shape = (len(columns), vocabulary_size)
    present = sp.csr_array((np.ones(len(indices)), indices, starts), shape=shape)
    return sp.csr_array(present.T @ present)


def _positive_information(counts: sp.csr_array) -> sp.csr_array:
    """Return max(0, log p(a, b) / (p(a) p(b))) of pairs, from counts of shared texts."""
    pairs = sp.coo_array(counts)
    apart = pairs.row != pairs.col
    row, col, value = pairs.row[apart], pairs.col[apart], pairs.data[apart]
    mass = np.bincount(row, weights=value, minlength=counts.shape[0])
    information = np.log(value * value.sum() / (mass[row] * mass[col])) if len(value) else value
    kept = information > 0
    return sp.csr_array((information[kept], (row[kept], col[kept])), shape=counts.shape)


def _leading_factors(
    matrix: sp.csr_array, rank: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return U sqrt(S) of a symmetric matrix by subspace iteration (Halko et al. 2011)."""
    columns = min(rank + _SPARE_COLUMNS, matrix.shape[0])
    basis = np.linalg.qr(rng.normal(size=(matrix.shape[0], columns)))[0]
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(matrix @ basis)[0]
    strength, turn = np.linalg.eigh(basis.T @ (matrix @ basis))
    order = np.argsort(-strength)[:rank]
    factors: npt.NDArray[np.float64] = (basis @ turn[:, order]) * np.sqrt(
        np.maximum(strength[order], 0.0)
    )
    return factors
