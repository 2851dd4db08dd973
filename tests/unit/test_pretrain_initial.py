"""Weights and tokenizers from elsewhere: official layouts in, our parameters and tokens out."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.convert_slow_tokenizer import import_protobuf

from alignrec import configuration
from alignrec.errors import UserError
from alignrec.pretrain import STAGE, initial
from alignrec.pretrain.config import PretrainConfig, TokenizerConfig
from alignrec.pretrain.encoder import save_encoder
from alignrec.pretrain.initial import (
    POSITIONS,
    fit_positions,
    read_initial,
    read_tensors,
)
from alignrec.pretrain.objective import MaskedModel, build_model
from alignrec.pretrain.targets import CodebookTarget, PictureTarget, VqkdTarget
from alignrec.pretrain.tokenizer import Words, load_words, write_tokenizer
from alignrec.pretrain.vqkd import VqkdTokenizer
from alignrec.testing.datasets import write_dataset

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "garden", "seed", "chair"]
ROWS = len(WORDS) + 2  # BEiT-3 has embeddings for more tokens than beit3.spm
TINY = {"num_layers": 2, "width": 16, "num_heads": 2, "hidden": 24, "patch_size": 4}


@pytest.fixture
def words(tmp_path: Path) -> Words:
    tokenizer = Tokenizer(models.WordLevel(dict(zip(WORDS, range(8), strict=True)), "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    return load_words(tmp_path / "words.json", max_length=12)


def make_config(
    checkpoint: Path,
    *,
    image_size: int = 16,
    encoder: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    **initial: Any,
) -> PretrainConfig:
    section = {
        "encoder": {**TINY, "image_size": image_size, **(encoder or {})},
        "initial": {"checkpoint": str(checkpoint), **initial},
        "tokenizer": {"path": "words.json"},
        "objective": {"summary_weight": 0, **(objective or {})},
    }
    return configuration.build(PretrainConfig, section, section="pretrain")


def given(path: Path | str) -> PretrainConfig:
    return PretrainConfig(tokenizer=TokenizerConfig(path=str(path)))


def official_tensors(*, image_size: int = 16) -> dict[str, torch.Tensor]:
    """What microsoft/unilm's pretraining checkpoints hold, small."""
    config = make_config(Path("unused"), image_size=image_size)
    encoder = build_model(config.encoder.architecture(ROWS), config.objective, seed=5).encoder
    tensors = {f"beit3.{name}": tensor for name, tensor in encoder.state_dict().items()}
    torch.manual_seed(0)
    for name, shape in {
        "mlm_head.weight": (ROWS, 16),
        "mlm_head.bias": (ROWS,),
        "mim_head.weight": (30, 16),  # codes, not pixels
        "mim_head.bias": (30,),
    }.items():
        tensors[name] = torch.randn(shape)
    return tensors


def write_initial(
    config: PretrainConfig, words: Words, target: Path, picture: PictureTarget | None = None
) -> str:
    architecture = config.encoder.architecture(words.vocabulary_size)
    return initial.write_initial(config, architecture, target, picture=picture)


def start_from(config: PretrainConfig, words: Words, folder: Path) -> MaskedModel:
    write_initial(config, words, folder / "initial.safetensors")
    model = build_model(config.encoder.architecture(ROWS), config.objective, seed=1)
    model.load_state_dict(read_initial(folder / "initial.safetensors"), strict=False)
    return model


def as_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"model": tensors}, path)


def as_plain_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)


def as_half(tensors: dict[str, torch.Tensor], path: Path) -> None:
    as_torch({name: tensor.half() for name, tensor in tensors.items()}, path)


def as_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("beit3.pth", as_torch),
        ("beit3_plain.pth", as_plain_torch),
        ("beit3.safetensors", as_safetensors),
    ],
)
def test_official_checkpoints_become_the_model(
    words: Words, tmp_path: Path, name: str, write: Callable[..., None]
) -> None:
    tensors = official_tensors()
    write(tensors, tmp_path / name)
    model = start_from(make_config(tmp_path / name), words, tmp_path)
    for parameter, value in model.encoder.state_dict().items():
        assert torch.equal(value, tensors[f"beit3.{parameter}"]), parameter
    assert torch.equal(model.mlm_head.weight, tensors["mlm_head.weight"])
    assert model.mim_head.weight.shape == (48, 16)  # pixels: drawn anew


def test_half_precision_is_read_as_fp32(words: Words, tmp_path: Path) -> None:
    tensors = official_tensors()
    as_half(tensors, tmp_path / "half.pth")
    model = start_from(make_config(tmp_path / "half.pth"), words, tmp_path)
    value = model.encoder.encoder.layers[0].ffn.A.fc1.weight
    assert value.dtype == torch.float32
    assert torch.equal(value, tensors["beit3.encoder.layers.0.ffn.A.fc1.weight"].half().float())


def test_heads_may_be_drawn_anew_and_the_line_says_what_became_of_each(
    words: Words, tmp_path: Path
) -> None:
    path = tmp_path / "beit3.pth"
    as_torch(official_tensors(), path)
    line = write_initial(make_config(path), words, tmp_path / "a")
    assert "drawn anew: mim_head.weight, mim_head.bias" in line
    assert "left out: mim_head.weight, mim_head.bias" in line
    write_initial(make_config(path, heads="fresh"), words, tmp_path / "b")
    assert "mlm_head.weight" in load_file(tmp_path / "a")
    assert not [name for name in load_file(tmp_path / "b") if "head" in name]


def test_the_picture_head_is_taken_over_where_codes_are_predicted(
    words: Words, tmp_path: Path
) -> None:
    path, tensors = tmp_path / "beit3.pth", official_tensors()
    as_torch(tensors, path)
    with torch.device("meta"):
        codes = {count: VqkdTarget(VqkdTokenizer(num_codes=count)) for count in (30, 31)}
    config = make_config(path, objective={"targets": "vqkd", "vqkd": "beit2.pth"})
    line = write_initial(config, words, tmp_path / "a", picture=codes[30])
    assert "mim_head" not in line
    for name in ("mim_head.weight", "mim_head.bias"):
        assert torch.equal(load_file(tmp_path / "a")[name], tensors[name])
    line = write_initial(config, words, tmp_path / "b", picture=codes[31])
    assert "drawn anew: mim_head.weight, mim_head.bias" in line


def test_the_catalogues_own_codes_get_no_head_of_other_codes(words: Words, tmp_path: Path) -> None:
    path = tmp_path / "beit3.pth"
    as_torch(official_tensors(), path)
    config = make_config(path, objective={"targets": "codebook"})
    book = mock.Mock(num_codes=30)  # as many as the checkpoint's
    line = write_initial(config, words, tmp_path / "a", picture=CodebookTarget(book, 4))
    assert "drawn anew: mim_head.weight, mim_head.bias" in line
    assert not [name for name in load_file(tmp_path / "a") if name.startswith("mim_head.")]


@pytest.mark.parametrize("image_size", [8, 24, 32])
def test_other_resolutions_interpolate_the_positions_of_patches_alone(
    words: Words, tmp_path: Path, image_size: int
) -> None:
    path = tmp_path / "beit3.pth"
    tensors = official_tensors()
    as_torch(tensors, path)
    model = start_from(make_config(path, image_size=image_size), words, tmp_path)
    found = model.encoder.state_dict()
    before = tensors["beit3.encoder.embed_positions.A.weight"]
    after = found["encoder.embed_positions.A.weight"]
    assert torch.equal(after[:3], before[:3])
    # as in unilm's load_model_and_may_interpolate: (1, old, old, width) -> (1, new, new, width)
    expected = torch.nn.functional.interpolate(
        before[3:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2),
        size=(image_size // 4, image_size // 4),
        mode="bicubic",
        align_corners=False,
    )
    flat = expected.permute(0, 2, 3, 1).reshape(-1, 16)
    torch.testing.assert_close(after[3:], flat, rtol=0, atol=1e-6)
    for name, value in found.items():
        if name != POSITIONS.removeprefix("encoder."):
            assert torch.equal(value, tensors[f"beit3.{name}"]), name


def test_interpolation_keeps_the_same_grid_and_constants() -> None:
    architecture = make_config(Path("unused"), image_size=32).encoder.architecture(ROWS)
    same = torch.randn(3 + 64, 5)
    assert fit_positions(same, architecture) is same
    constant = torch.cat([torch.zeros(3, 5), torch.full((9, 5), 2.5)])
    fitted = fit_positions(constant, architecture)
    assert fitted.shape == (67, 5)
    torch.testing.assert_close(fitted[3:], torch.full((64, 5), 2.5))


def test_an_encoder_trained_here_is_a_checkpoint_too(words: Words, tmp_path: Path) -> None:
    config = make_config(tmp_path / "encoder")
    trained = build_model(config.encoder.architecture(ROWS), config.objective, seed=9).encoder
    (tmp_path / "encoder").mkdir()
    save_encoder(trained.architecture, tmp_path / "encoder", dict(trained.state_dict()))
    model = start_from(config, words, tmp_path)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_all_misfits_are_told_at_once_with_the_sizes_to_set(words: Words, tmp_path: Path) -> None:
    tensors = official_tensors()
    del tensors["beit3.encoder.layer_norm.A.weight"]
    tensors["beit3.encoder.layers.0.extra"] = torch.zeros(1)
    as_torch(tensors, tmp_path / "c.pth")
    config = make_config(tmp_path / "c.pth", encoder={"hidden": 32, "num_layers": 1})
    with pytest.raises(UserError) as raised:
        write_initial(config, words, tmp_path / "initial")
    message = str(raised.value)
    assert "1 missing (encoder.encoder.layer_norm.A.weight)" in message
    assert "unknown (encoder.encoder.layers.0.extra, encoder.encoder.layers.1." in message
    assert "of other shapes" in message
    assert "(24, 16) for (32, 16)" in message
    assert "num_layers: 2, width: 16, hidden: 24, patch_size: 4" in message
    assert not (tmp_path / "initial").exists()


def test_of_an_encoder_of_towers_its_own_settings_are_told(words: Words, tmp_path: Path) -> None:
    tensors = official_tensors()
    tensors["beit3.vision_tower.model.x"] = tensors.pop("beit3.text_embed.weight")
    as_torch(tensors, tmp_path / "c.pth")
    with pytest.raises(UserError, match="made with kind: towers and num_layers: 2; set"):
        write_initial(make_config(tmp_path / "c.pth"), words, tmp_path / "initial")


def test_what_is_no_beit3_is_told_so(words: Words, tmp_path: Path) -> None:
    torch.save({"model": {"conv.weight": torch.zeros(2, 2)}}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="It is no BEiT-3 encoder"):
        write_initial(make_config(tmp_path / "resnet.pth"), words, tmp_path / "initial")


def test_a_tokenizer_with_more_words_than_the_checkpoint_is_refused(
    words: Words, tmp_path: Path
) -> None:
    tensors = official_tensors()
    tensors["beit3.text_embed.weight"] = tensors["beit3.text_embed.weight"][:6].clone()
    as_torch(tensors, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"has 8 tokens, but .*c\.pth has embeddings for 6"):
        write_initial(make_config(tmp_path / "c.pth"), words, tmp_path / "initial")


class Payload:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


class Nothing:
    """A tensor without numbers or shape: putting it together is a TypeError."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return torch._utils._rebuild_tensor_v2, ()


def test_nothing_but_tensors_is_read(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="anything but tensors is refused"):
        read_tensors(tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_tensors(tmp_path / "list.pth")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut")
        with pytest.raises(UserError, match="cannot be read"):
            read_tensors(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path / "absent.pth")
    (tmp_path / "odd.pth").write_bytes(pickle.dumps(Nothing(), protocol=2))
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path / "odd.pth")


def test_a_checkpoint_needs_its_tokenizer() -> None:
    with pytest.raises(UserError, match=r"Set pretrain.tokenizer.path to the checkpoint's"):
        configuration.build(
            PretrainConfig, {"initial": {"checkpoint": "beit3.pth"}}, section="pretrain"
        )
    with pytest.raises(UserError, match=r"heads=fresh has no effect without"):
        configuration.build(PretrainConfig, {"initial": {"heads": "fresh"}}, section="pretrain")


def test_another_content_of_the_checkpoint_makes_the_encoder_stale(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", num_items=4)
    marks = set()
    for value in (0.0, 1.0, 0.0):
        save_file({"x": torch.tensor([value])}, tmp_path / "c.safetensors")
        marks.add(STAGE.fingerprint(make_config(tmp_path / "c.safetensors"), {"dataset": dataset}))
    assert len(marks) == 2


def write_sentencepiece(path: Path, pieces: list[tuple[str, float]], *, kind: int = 1) -> None:
    content = import_protobuf().ModelProto()
    content.trainer_spec.model_type = kind
    for word, score in pieces:
        content.pieces.add(piece=word, score=score)
    path.write_bytes(content.SerializeToString())


OWN = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
LETTERS = [("▁", -3.0), *((letter, -4.0) for letter in "adegnrs")]


def test_sentencepiece_ids_are_those_of_the_xlmr_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "beit3.spm"
    write_sentencepiece(path, [*OWN, ("▁garden", -1.0), *LETTERS])
    write_tokenizer(tmp_path, given(path), tmp_path / "tokenizer.json")
    words = load_words(tmp_path / "tokenizer.json", max_length=12)
    assert (words.start_id, words.padding_id, words.end_id, words.mask_id) == (0, 1, 2, 13)
    assert words.vocabulary_size == 14  # 4 in front, 9 pieces, <mask>
    assert words("garden  gardens\n?") == [0, 4, 4, 12, 5, 3, 2]
    assert words.text([0, 4, 4, 12, 13, 2]) == "garden gardens<mask>"


def test_sentencepiece_byte_pairs_merge_in_the_order_of_the_pieces(tmp_path: Path) -> None:
    path = tmp_path / "bpe.model"
    merged = [("▁g", 0.0), ("▁ga", -1.0), ("rd", -2.0), ("▁gard", -3.0), ("en", -4.0)]
    write_sentencepiece(path, [*OWN, *merged, *LETTERS], kind=2)
    write_tokenizer(tmp_path, given(path), tmp_path / "tokenizer.json")
    words = load_words(tmp_path / "tokenizer.json", max_length=12)
    assert words("garden") == [0, 7, 8, 2]


def test_other_files_are_no_sentencepiece_models(tmp_path: Path) -> None:
    (tmp_path / "beit3.spm").write_bytes(b"no protobuf")
    with pytest.raises(UserError, match="is no sentencepiece model"):
        write_tokenizer(tmp_path, given(tmp_path / "beit3.spm"), tmp_path / "t")
    write_sentencepiece(tmp_path / "t5.model", [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)])
    with pytest.raises(UserError, match="begins with <pad> </s> <unk>"):
        write_tokenizer(tmp_path, given(tmp_path / "t5.model"), tmp_path / "t")
    with pytest.raises(UserError, match="is no sentencepiece model"):
        write_tokenizer(tmp_path, given(tmp_path / "no.spm"), tmp_path / "t")


def test_a_transformers_tokenizer_comes_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "garden", "seed", "##s"]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    write_tokenizer(tmp_path, given(folder), tmp_path / "tokenizer.json")
    words = load_words(tmp_path / "tokenizer.json", max_length=12)
    assert words("garden seeds") == [2, 5, 6, 7, 3]
    assert words.mask_id == 4
    assert words.special_ids == (0, 2, 3)


def test_a_name_that_leads_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = given("nobody/has-this-tokenizer")
    with pytest.raises(UserError, match=r"is no file, and transformers finds no tokenizer") as e:
        write_tokenizer(tmp_path, config, tmp_path / "t")
    assert "\n" not in str(e.value)
