"""Text to token ids: trained on the catalogue's text, or given (dataset -> masking)."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alignrec import artifacts
from alignrec.data import schema
from alignrec.data.order import item_places
from alignrec.errors import UserError
from alignrec.pretrain.config import PretrainConfig
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
# Of this much text the trained tokens are the same but for rare ones; 45 s of one core at most.
_MAX_TEXTS, _MAX_CHARACTERS = 100_000, 2_000


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


def train(texts: Iterable[str | list[str]], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE: every string has an encoding, and equal texts give equal tokens.

    Args:
        texts: one by one, or in lists.
        vocabulary_size: tokens at most.
    """
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


def write_tokenizer(dataset: Path, config: PretrainConfig, target: Path) -> None:
    """Put the configured tokenizer at ``target`` (rank 0 calls it)."""
    given = config.tokenizer.path
    if given is not None:
        read_given(given).save(str(target))
        return
    sample = read_training_texts(dataset, config, most=_MAX_TEXTS)
    texts = ([text[:_MAX_CHARACTERS] for text in batch] for batch in sample)
    train(texts, config.tokenizer.vocabulary_size).save(str(target))


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
    """Yield the text of every item, in item_index order; empty where there is none.

    Raises:
        UserError: the item table is absent or damaged.
    """
    path = dataset / "items.parquet"
    for batch in schema.read_batches(path, batch_size=_ROWS_AT_ONCE, columns=["text"]):
        yield from batch["text"].to_pylist()


def read_training_texts(dataset: Path, config: PretrainConfig, *, most: int) -> Iterator[list[str]]:
    """Yield lists of the texts of training items, about ``most`` of a larger catalogue.

    Held-out items would be known before they are predicted, so their texts are left out. Which
    items are read is a hash of (seed, item_index), as which are held out.

    Raises:
        UserError: the item table is absent or damaged.
    """
    first = config.valid_fraction
    end = first + most / max(artifacts.read(dataset).counts["num_items"], 1)
    path, columns = dataset / "items.parquet", ["item_index", "text"]
    for batch in schema.read_batches(path, batch_size=_ROWS_AT_ONCE, columns=columns):
        place = item_places(batch["item_index"].to_numpy(), seed=config.seed)
        chosen = batch["text"].filter((first <= place) & (place < end))
        yield chosen.filter(pc.not_equal(chosen, "")).to_pylist()
