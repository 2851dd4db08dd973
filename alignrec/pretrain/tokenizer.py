"""Text to token ids: trained on the catalogue's text, or given as a tokenizer.json."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alignrec.errors import UserError
from alignrec.pretrain.config import TokenizerConfig

TOKENIZER = "tokenizer.json"
# Ids 0 .. 4; the same words as in XLM-R's vocabulary, which BEiT-3 uses.
START, PADDING, END, UNKNOWN, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
SPECIAL = (START, PADDING, END, UNKNOWN, MASK)
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Words:
    """A tokenizer with the ids that the objective needs.

    Attributes:
        tokenizer: Hugging Face tokenizer.
        max_length: longest result, the two special tokens at its ends included.
        start_id: first token of every text.
        end_id: last token of every text.
        padding_id: fills shorter texts up.
        mask_id: stands for a masked token.
    """

    tokenizer: Tokenizer
    max_length: int
    start_id: int
    end_id: int
    padding_id: int
    mask_id: int

    @property
    def vocabulary_size(self) -> int:
        """One past the largest id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def first_word_id(self) -> int:
        """Smallest id of a token that can be masked: those around a text lie below it."""
        return max(self.start_id, self.end_id, self.padding_id) + 1

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, cut to ``max_length``."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.start_id, *ids[: self.max_length - 2], self.end_id]

    def text(self, ids: list[int]) -> str:
        """Return the words of ids, with the mask token shown."""
        kept = [i for i in ids if i not in (self.start_id, self.end_id, self.padding_id)]
        words: str = self.tokenizer.decode(kept, skip_special_tokens=False)
        return words.strip()


def train(texts: Iterator[str], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE: every string has an encoding, and equal texts give equal tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(dataset: Path, config: TokenizerConfig, target: Path) -> None:
    """Put the configured tokenizer at ``target`` (rank 0 calls it)."""
    if config.path is None:
        train(filter(None, read_texts(dataset)), config.vocabulary_size).save(str(target))
    else:
        _read(config.path).save(str(target))


def load_words(path: Path, *, max_length: int) -> Words:
    """Read a tokenizer.json.

    Raises:
        UserError: no such file, or its special tokens are absent or come after words.
    """
    tokenizer = _read(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = {name: tokenizer.token_to_id(name) for name in (START, END, PADDING, MASK)}
    ids = {name: number for name, number in found.items() if number is not None}
    if missing := found.keys() - ids.keys():
        raise UserError(
            f"{path} has no token {' '.join(sorted(missing))}, which masking needs. Use a "
            f"tokenizer with {' '.join(SPECIAL)}, or leave tokenizer.path out to train one."
        )
    words = Words(tokenizer, max_length, ids[START], ids[END], ids[PADDING], ids[MASK])
    _refuse_words_below(words.first_word_id, tokenizer, path)
    return words


def _refuse_words_below(first_word_id: int, tokenizer: Tokenizer, path: Path) -> None:
    ids = tokenizer.get_vocab()
    low = [word for word, number in ids.items() if number < first_word_id and word not in SPECIAL]
    if low:
        raise UserError(
            f"{path} has {len(low)} words (such as {min(low)!r}) before the last of {START} "
            f"{PADDING} {END}, which would never be masked. Use a tokenizer whose special tokens "
            f"come first, or leave pretrain.tokenizer.path out to train one."
        )


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path} is no tokenizer.json of Hugging Face tokenizers ({error}). Correct "
            f"pretrain.tokenizer.path, or leave it out to train one on the catalogue."
        ) from error


def read_texts(dataset: Path) -> Iterator[str]:
    """Yield the text of every item, in item_index order; empty where there is none."""
    file = pq.ParquetFile(dataset / "items.parquet")
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["text"]):
        yield from batch["text"].to_pylist()
