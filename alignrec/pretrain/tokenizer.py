"""Text to token ids: trained on the catalogue's text, or given (dataset -> masking)."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alignrec.errors import UserError
from alignrec.pretrain.config import TokenizerConfig
from alignrec.pretrain.given_tokenizer import read_given, read_json

TOKENIZER = "tokenizer.json"
# Ids 0 .. 4; the same words as in XLM-R's vocabulary, which BEiT-3 uses.
START, PADDING, END, UNKNOWN, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
SPECIAL = (START, PADDING, END, UNKNOWN, MASK)
# What tokenizers of masked language models call these four, the first that is there counts.
_ROLES = {
    "start": (START, "[CLS]", "<cls>"),
    "end": (END, "[SEP]", "<sep>", "<eos>"),
    "padding": (PADDING, "[PAD]"),
    "mask": (MASK, "[MASK]"),
}
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
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the tokens around a text, ascending: they are never masked."""
        return tuple(sorted({self.start_id, self.end_id, self.padding_id}))

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, cut to ``max_length``."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.start_id, *ids[: self.max_length - 2], self.end_id]

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, each cut to ``max_length``."""
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        longest = self.max_length - 2
        return [[self.start_id, *one.ids[:longest], self.end_id] for one in encoded]

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
        read_given(config.path).save(str(target))


def load_words(path: Path, *, max_length: int) -> Words:
    """Read a tokenizer.json.

    Raises:
        UserError: no such file, or a special token that masking needs is absent.
    """
    return as_words(read_json(path), max_length=max_length, source=str(path))


def as_words(tokenizer: Tokenizer, *, max_length: int, source: str) -> Words:
    """Find the special tokens of a tokenizer.

    Raises:
        UserError: one that masking needs is absent.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: dict[str, int] = {}
    for role, names in _ROLES.items():
        found = (tokenizer.token_to_id(name) for name in names)
        if (number := next((i for i in found if i is not None), None)) is None:
            raise UserError(
                f"{source} has no token {' or '.join(names)}, which masking needs. Use the "
                f"tokenizer of a masked language model, or leave pretrain.tokenizer.path out to "
                f"train one."
            )
        ids[f"{role}_id"] = number
    return Words(tokenizer, max_length, **ids)


def read_texts(dataset: Path) -> Iterator[str]:
    """Yield the text of every item, in item_index order; empty where there is none."""
    file = pq.ParquetFile(dataset / "items.parquet")
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["text"]):
        yield from batch["text"].to_pylist()
