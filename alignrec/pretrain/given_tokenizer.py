"""A tokenizer from elsewhere: tokenizer.json, sentencepiece or transformers (-> tokenizer)."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from alignrec.errors import UserError

SENTENCEPIECE_SUFFIXES = (".spm", ".model")
# XLMRobertaTokenizer, with which BEiT-3 reads beit3.spm, puts fairseq's four words in front and
# drops sentencepiece's three.
_FAIRSEQ_WORDS = ("<s>", "<pad>", "</s>", "<unk>")
_OWN_WORDS = ("<unk>", "<s>", "</s>")
_MASK = "<mask>"
_SETTINGS = "pretrain.tokenizer.path, or pretrain.encoder.text where that names the tokenizer"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type of sentencepiece_model.proto


def read_given(source: str) -> Tokenizer:
    """Return the tokenizer that a user names.

    Args:
        source: a tokenizer.json; a sentencepiece model (.spm, .model) in the layout of XLM-R and
            BEiT-3; or a folder or hub id of a transformers tokenizer.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(source)
    if path.suffix in SENTENCEPIECE_SUFFIXES:
        return read_sentencepiece(path)
    if path.suffix == ".json" or path.is_file():
        return read_json(path)
    return _read_transformers(source)


def read_json(path: Path) -> Tokenizer:
    """Read a tokenizer.json of Hugging Face tokenizers."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path} is no tokenizer.json of Hugging Face tokenizers ({error}). Correct "
            f"pretrain.tokenizer.path, or leave it out to train one on the catalogue."
        ) from error


def read_sentencepiece(path: Path) -> Tokenizer:
    """Read a sentencepiece model with the ids that XLMRobertaTokenizer gives it.

    Raises:
        UserError: no such file, no sentencepiece model, or other special words than BEiT-3's.
    """
    content = _parse_sentencepiece(path)
    pieces = [(piece.piece, piece.score) for piece in content.pieces]
    head = tuple(word for word, _ in pieces[: len(_OWN_WORDS)])
    kind = content.trainer_spec.model_type
    if head != _OWN_WORDS or kind not in (_UNIGRAM, _BPE):
        raise UserError(
            f"{path} begins with {' '.join(head)} (model type {kind}), not with "
            f"{' '.join(_OWN_WORDS)} as beit3.spm and XLM-R's models do, so its ids cannot be "
            f"told. Convert it to a tokenizer.json and set pretrain.tokenizer.path to that."
        )
    words = [(word, 0.0) for word in _FAIRSEQ_WORDS] + pieces[len(_OWN_WORDS) :] + [(_MASK, 0.0)]
    tokenizer = Tokenizer(_unigram(words) if kind == _UNIGRAM else _byte_pairs(words))
    if charsmap := content.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([*_FAIRSEQ_WORDS, _MASK])
    return tokenizer


def _parse_sentencepiece(path: Path) -> Any:  # noqa: ANN401 - a generated protobuf class
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers.convert_slow_tokenizer import import_protobuf

    content = import_protobuf().ModelProto()
    try:
        content.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(
            f"{path} is no sentencepiece model ({error}). Correct pretrain.tokenizer.path, or "
            f"leave it out to train one on the catalogue."
        ) from error
    return content


def _unigram(words: list[tuple[str, float]]) -> models.Unigram:
    return models.Unigram(words, unk_id=_FAIRSEQ_WORDS.index("<unk>"), byte_fallback=False)


def _byte_pairs(words: list[tuple[str, float]]) -> models.BPE:
    from transformers.tokenization_utils_base import generate_merges

    ids = {word: number for number, (word, _) in enumerate(words)}
    return models.BPE(ids, generate_merges(ids), unk_token="<unk>", fuse_unk=True)  # noqa: S106


def _read_transformers(source: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, and the hub's own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{source} is no file, and transformers finds no tokenizer of that name ({reason}). "
            f"Correct {_SETTINGS}; on a host without network give a folder with tokenizer.json."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"{source} is a tokenizer in plain Python ({type(tokenizer).__name__}), which cannot "
            f"be kept as tokenizer.json. Give one that has a tokenizer.json as {_SETTINGS}."
        )
    return backend
