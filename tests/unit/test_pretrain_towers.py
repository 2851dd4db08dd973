"""Laws of the towers: what is hidden stays hidden, and the fusion starts as the towers are."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from alignrec import configuration
from alignrec.data.loader import ItemBatch, MicroBatch
from alignrec.errors import UserError
from alignrec.pretrain.architecture import TowersArchitecture
from alignrec.pretrain.bridges import Moments, fit
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.encoder import load_encoder, pool, save_encoder
from alignrec.pretrain.given_tokenizer import read_given
from alignrec.pretrain.multiway import Streams
from alignrec.pretrain.tower_models import FoldedNorm, make_model, read_weights, vision_tower
from alignrec.pretrain.towers import Towers, resample
from alignrec.testing.towers import write_bert, write_resnet, write_vit

VOCABULARY, SIZE, PATCH, LENGTH = 57, 16, 4, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    write_vit(folder / "vit")
    write_resnet(folder / "resnet")
    write_bert(folder / "bert", max_tokens=24)
    return folder


def make_config(folder: Path, *, vision: str = "vit", **changes: Any) -> PretrainConfig:
    encoder = {
        "kind": "towers",
        "vision": str(folder / vision),
        "text": str(folder / "bert"),
        "num_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH,
        "max_text_tokens": 20,
        **changes,
    }
    return configuration.build(PretrainConfig, {"encoder": encoder}, section="pretrain")


def make_towers(
    folder: Path, *, vision: str = "vit", stirred: bool = True, **changes: Any
) -> Towers:
    """Return towers with their weights under a fusion, which does something when it is stirred."""
    architecture = make_config(folder, vision=vision, **changes).encoder.architecture(VOCABULARY)
    assert isinstance(architecture, TowersArchitecture)
    torch.manual_seed(1)
    towers = Towers(architecture)
    towers.reset_parameters()
    for parameter in towers.encoder.parameters() if stirred else ():
        nn.init.normal_(parameter, std=0.3)
    weights = {
        f"{modality}_tower.model.{name}": tensor
        for modality, source in (("vision", vision), ("text", "bert"))
        for name, tensor in read_weights(str(folder / source), modality).items()
    }
    assert not towers.load_state_dict(weights, strict=False).unexpected_keys
    return towers.eval()


def make_inputs(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    padding = torch.zeros(count, LENGTH, dtype=torch.bool)
    padding[:, 6:] = True
    return {
        "images": torch.randint(
            256, (count, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8
        ),
        "has_image": torch.ones(count, dtype=torch.bool),
        "tokens": torch.randint(5, VOCABULARY, (count, LENGTH), generator=generator),
        "text_padding": padding,
    }


def equal(one: Streams, other: Streams) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("vision", ["vit", "resnet"])
@torch.no_grad()
def test_pixels_of_masked_patches_do_not_count(folder: Path, vision: str) -> None:
    towers, inputs = make_towers(folder, vision=vision), make_inputs()
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[:, 5] = True  # row 1, column 1 of the grid
    before = towers(**inputs, masked_patches=masked)
    inputs["images"][:, 4:8, 4:8] = 255 - inputs["images"][:, 4:8, 4:8]
    assert equal(towers(**inputs, masked_patches=masked), before)
    assert not equal(towers(**inputs, masked_patches=~masked), before)
    inputs["images"][:, 4:8, 8] = 255 - inputs["images"][:, 4:8, 8]  # the patch beside it
    assert not equal(towers(**inputs, masked_patches=masked), before)


@pytest.mark.parametrize("vision", ["vit", "resnet"])
@torch.no_grad()
def test_what_is_absent_does_not_count(folder: Path, vision: str) -> None:
    towers, inputs = make_towers(folder, vision=vision), make_inputs()
    inputs["has_image"][0] = False
    inputs["text_padding"][1] = True
    before = towers(**inputs)
    assert all(stream.isfinite().all() for stream in before)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    changed["images"][0] = 7
    changed["tokens"][1] = 11
    changed["tokens"][:, 6:] = 12  # padding
    after = towers(**changed)
    for item in range(3):
        shown = ~inputs["text_padding"][item]
        torch.testing.assert_close(after.text[item][shown], before.text[item][shown])
        places = slice(None) if inputs["has_image"][item] else slice(1)
        torch.testing.assert_close(after.vision[item, places], before.vision[item, places])


@torch.no_grad()
def test_the_fusion_starts_as_the_towers_are(folder: Path) -> None:
    """Angles of pooled states are the towers' own, but for the places' small embeddings."""
    towers, inputs = make_towers(folder, stirred=False, width=32), make_inputs(8)
    for positions in (towers.encoder.embed_positions.A, towers.encoder.embed_positions.B):
        nn.init.zeros_(positions.weight)
    found = pool(towers(**inputs), inputs["has_image"], inputs["text_padding"], pooling="mean")
    pictures = towers.vision_bridge(towers.vision_tower(inputs["images"], None, torch.float32))
    texts = towers.text_bridge(towers.text_tower(inputs["tokens"], inputs["text_padding"]))
    width = towers.architecture.width
    whole = Streams(
        nn.functional.layer_norm(nn.functional.pad(pictures, (0, 0, 1, 0)), (width,), eps=1e-5),
        nn.functional.layer_norm(texts, (width,), eps=1e-5),
    )
    raw = pool(whole, inputs["has_image"], inputs["text_padding"], pooling="mean")
    torch.testing.assert_close(found, raw)
    told = towers(**inputs).vision[:, 0]  # CLS: the mean of both
    mean = pictures.mean(dim=1) + texts[:, :6].mean(dim=1)
    torch.testing.assert_close(told, nn.functional.layer_norm(mean, (width,), eps=1e-5))


@pytest.mark.parametrize("vision", ["vit", "resnet"])
@torch.no_grad()
def test_all_features_end_with_what_each_tower_says_by_itself(folder: Path, vision: str) -> None:
    towers, inputs = make_towers(folder, vision=vision), make_inputs()
    inputs["has_image"][0] = False
    inputs["text_padding"][1] = True
    found = towers.features(**inputs, pooling="all")
    parts = towers.feature_parts("all")
    assert [part.of for part in parts] == ["image", "text", None, "image", "text"]
    whole, halves, own_image, own_text = (
        found[:, : 3 * towers.architecture.width],
        towers.features(**inputs, pooling="mean"),
        *found.split([part.width for part in parts], dim=1)[3:],
    )
    cls_state = towers.features(**inputs, pooling="cls")
    assert torch.equal(whole, torch.cat([halves, cls_state], dim=1))
    states = towers.vision_tower(inputs["images"], None, torch.float32)
    torch.testing.assert_close(own_image[1:], states[1:].mean(dim=1))
    assert (own_image[0] == 0).all()
    texts = towers.text_tower(inputs["tokens"], inputs["text_padding"])
    torch.testing.assert_close(own_text[[0, 2]], texts[[0, 2], :6].mean(dim=1))
    assert (own_text[1] == 0).all()


@pytest.mark.parametrize("vision", ["vit", "resnet"])
@torch.no_grad()
def test_half_precision_gives_nearly_the_same_features(folder: Path, vision: str) -> None:
    towers, inputs = make_towers(folder, vision=vision, stirred=False), make_inputs()
    whole = towers.features(**inputs, pooling="all")
    with torch.autocast("cpu", torch.bfloat16):
        half = towers.features(**inputs, pooling="all").float()
    assert not torch.equal(half, whole)
    assert nn.functional.cosine_similarity(half, whole).min() > 0.999


def test_towers_never_draw_from_a_generator(folder: Path) -> None:
    inputs = make_inputs()
    for towers in (Towers(make_towers(folder).architecture), make_towers(folder).train()):
        assert towers.training
        assert equal(towers(**inputs), towers(**inputs))  # dropout would differ


@pytest.mark.parametrize("frozen", [[], ["vision"], ["vision", "text"]])
def test_an_artifact_needs_no_folder_of_a_tower(
    folder: Path, tmp_path: Path, frozen: list[str]
) -> None:
    shutil.copytree(folder, tmp_path / "towers")
    towers, inputs = make_towers(tmp_path / "towers", vision="resnet", frozen=frozen), make_inputs()
    parameters = dict(towers.named_parameters())
    for modality in ("vision", "text"):
        names = [n for n in parameters if n.startswith(f"{modality}_tower.")]
        assert bool(names) == (modality not in frozen)
    whole = {name: p.detach() for name, p in parameters.items()} | towers.frozen_state()
    save_encoder(towers.architecture, tmp_path, whole)
    shutil.rmtree(tmp_path / "towers")
    loaded = load_encoder(tmp_path)
    with torch.no_grad():
        assert equal(loaded(**inputs), towers(**inputs))
    assert str(tmp_path) not in (tmp_path / "encoder.json").read_text()
    if frozen:  # a weight that is absent is told, though it is no parameter
        del whole[next(iter(towers.frozen_state()))]
        save_encoder(towers.architecture, tmp_path, whole)
        with pytest.raises(UserError, match="1 tensors are missing"):
            load_encoder(tmp_path)


@torch.no_grad()
def test_folded_norms_compute_what_batch_norms_did(folder: Path) -> None:
    from transformers import AutoModel

    whole = AutoModel.from_pretrained(folder / "resnet").eval()
    config = json.loads((folder / "resnet" / "config.json").read_text())
    folded = make_model(config).eval()
    folded.load_state_dict(read_weights(str(folder / "resnet"), "vision"))
    assert any(isinstance(module, FoldedNorm) for module in folded.modules())
    assert not list(folded.buffers())
    pixels = torch.randn(2, 3, 24, 24)
    states = [model(pixel_values=pixels).last_hidden_state for model in (whole, folded)]
    torch.testing.assert_close(*states)


def test_grids_are_resampled_without_changing_their_mean() -> None:
    fine = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(resample(fine, 4), nn.functional.avg_pool2d(fine, 2))
    assert resample(fine, 8) is fine
    torch.testing.assert_close(
        resample(fine, 12),
        nn.functional.interpolate(fine, size=12, mode="bilinear", align_corners=False),
    )


def test_fitted_projections_keep_the_angles_of_what_was_seen() -> None:
    """States of 3 directions in 8 dimensions around a mean: 4 columns keep all of it."""
    generator = torch.Generator().manual_seed(0)
    mean, directions = torch.randn(8, generator=generator), torch.randn(3, 8, generator=generator)
    states = torch.randn(500, 3, generator=generator) @ directions + mean
    moments = Moments(8)
    for part in states.split(77):
        moments.add(part)
    found = moments.projection(4, generator)
    assert found is not None
    projected = nn.functional.linear(states, *found)
    centred = states - states.mean(dim=0)
    torch.testing.assert_close(projected.mean(dim=0), torch.zeros(4), atol=1e-4, rtol=0)
    assert projected.square().mean() == pytest.approx(1.0, abs=1e-3)
    gram, whole = projected @ projected.T, centred @ centred.T
    torch.testing.assert_close(gram, whole * (gram.trace() / whole.trace()), atol=1e-3, rtol=1e-3)
    assert Moments(8).projection(4, generator) is None


class Reader:
    """Gives items by their row, and stops after some batches, as a kill does."""

    def __init__(self, num_batches: int | None = None) -> None:
        self.left = num_batches
        self.rows: list[int] = []

    def read(self, batch: MicroBatch) -> ItemBatch:
        if self.left == 0:
            raise InterruptedError
        self.left = None if self.left is None else self.left - 1
        self.rows.extend(batch.rows)
        count, generator = len(batch.rows), np.random.default_rng(int(batch.rows[0]))
        return ItemBatch(
            item_index=batch.rows,
            images=generator.integers(256, size=(count, SIZE, SIZE, 3), dtype=np.uint8),
            has_image=np.ones(count, dtype=bool),
            tokens=generator.integers(5, VOCABULARY, size=(count, LENGTH)),
            text_padding=np.zeros((count, LENGTH), dtype=bool),
        )


def test_a_killed_fit_of_the_projections_goes_on(folder: Path, tmp_path: Path) -> None:
    towers, rows = make_towers(folder, width=8), np.arange(100)
    expected = fit(towers, Reader(), rows, 0, lambda n: None, state=tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fit(towers, Reader(6), rows, 0, lambda n: None, state=tmp_path / "killed")
    reader, seen = Reader(), []
    found = fit(towers, reader, rows, 0, seen.append, state=tmp_path / "killed")
    assert reader.rows == list(range(64, 100))
    assert sum(seen) == 100
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_positions_are_interpolated_where_the_model_can(folder: Path) -> None:
    towers = make_towers(folder, image_size=24)
    assert towers.architecture.vision.interpolate
    assert towers.architecture.vision.places_per_side == 6
    assert not make_towers(folder).architecture.vision.interpolate


def test_statistics_of_the_pixels_come_from_the_folder(folder: Path, tmp_path: Path) -> None:
    assert make_towers(folder).architecture.vision.mean == (0.485, 0.456, 0.406)
    shutil.copytree(folder, tmp_path / "own")
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    file = tmp_path / "own" / "vit" / "preprocessor_config.json"
    file.write_text(json.dumps(statistics))
    towers = make_towers(tmp_path / "own")
    pixels = towers.vision_tower.pixels(
        torch.full((1, SIZE, SIZE, 3), 255, dtype=torch.uint8), None
    )
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([2.5, 3.0, 7.0]))
    shutil.copytree(tmp_path / "own", tmp_path / "damaged")
    file = tmp_path / "damaged" / "vit" / "preprocessor_config.json"
    file.write_text('{"image_std": [0, 1]}')
    with pytest.raises(UserError, match="not three numbers each"):
        make_towers(tmp_path / "damaged")


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_damaged_statistics_of_the_pixels_are_told(
    folder: Path, tmp_path: Path, content: str
) -> None:
    shutil.copytree(folder / "vit", tmp_path / "vit")
    file = tmp_path / "vit" / "preprocessor_config.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"preprocessor_config\.json of .* cannot be read"):
        vision_tower(str(tmp_path / "vit"), image_size=SIZE, frozen=False)


def write_vision(folder: Path, kind: str, **config: Any) -> str:
    """Write the configuration of a small vision model, which is all that its shapes need."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoConfig.for_model(kind, **sizes, intermediate_size=24, **config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "config", "first"),
    [
        ("vit", {"image_size": 32, "patch_size": 8}, 1),
        ("deit", {"image_size": 32, "patch_size": 8}, 2),
        ("siglip_vision_model", {"image_size": 32, "patch_size": 8}, 0),
        ("dinov2_with_registers", {"image_size": 32, "patch_size": 8}, 5),
        ("dinov3_vit", {"image_size": 32, "patch_size": 8, "num_register_tokens": 4}, 5),
        ("dinov3_vit", {"image_size": 32, "patch_size": 8, "num_register_tokens": 8}, 9),
    ],
)
def test_states_before_the_grid_are_known(
    tmp_path: Path, kind: str, config: dict[str, Any], first: int
) -> None:
    tower = vision_tower(write_vision(tmp_path, kind, **config), image_size=32, frozen=False)
    assert (tower.places_per_side, tower.first_place) == (4, first)


def test_stages_that_halve_the_grid_are_a_grid(tmp_path: Path) -> None:
    config = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    AutoConfig.for_model("swin", image_size=32, patch_size=4, **config).save_pretrained(tmp_path)
    tower = vision_tower(str(tmp_path), image_size=32, frozen=False)
    assert (tower.places_per_side, tower.first_place) == (4, 0)


def test_states_of_something_else_behind_the_grid_are_refused(tmp_path: Path) -> None:
    """16 places, CLS and 8 detections are 25 states: a square, but no grid of places."""
    sizes = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 8}
    source = write_vision(tmp_path, "yolos", use_mid_position_embeddings=False, **sizes)
    with pytest.raises(UserError, match=r"\(1, 25, 16\), which are no square grid"):
        vision_tower(source, image_size=32, frozen=False)


def test_a_configuration_names_no_code_of_the_hub(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "vit", tmp_path / "vit")
    file = tmp_path / "vit" / "config.json"
    named = json.loads(file.read_text()) | {"attn_implementation": "somebody/kernel"}
    file.write_text(json.dumps(named))
    tower = vision_tower(str(tmp_path / "vit"), image_size=SIZE, frozen=False)
    assert "somebody" not in json.dumps(tower.config)
    assert make_model(named).config._attn_implementation in ("sdpa", "eager")
    assert read_weights(str(tmp_path / "vit"), "vision")


def test_a_name_of_the_hub_is_one_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read first is read again, whatever the name stands for by then."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--somebody--vit"
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        shutil.copytree(folder / "vit", place / "snapshots" / commit)
    file = place / "snapshots" / commits[1] / "model.safetensors"
    changed = {name: tensor + 1.0 for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commits[0])
    tower = vision_tower("somebody/vit", image_size=SIZE, frozen=False)
    assert tower.commit == commits[0]
    (place / "refs" / "main").write_text(commits[1])
    first = read_weights("somebody/vit", "vision", commit=tower.commit)
    newest = read_weights("somebody/vit", "vision")
    expected = read_weights(str(folder / "vit"), "vision")
    for name, tensor in expected.items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(newest[name], tensor + 1.0)


def test_the_text_tower_brings_its_tokenizer(folder: Path) -> None:
    assert make_config(folder).tokenizer.path == str(folder / "bert")
    absent = make_config(folder, text=str(folder / "absent")).tokenizer.path
    with pytest.raises(UserError, match=r"absent is no file, .*Correct .*pretrain\.encoder\.text"):
        read_given(absent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "needs pretrain.encoder.text"),
        ({"vision": "/absent/folder"}, "is no folder with a transformers model"),
        ({"vision": "bert"}, "is a BertModel, which reads input_ids, not pixel_values"),
        ({"text": "vit"}, "is a ViTModel, which reads pixel_values, not input_ids"),
        ({"max_text_tokens": 25}, "is more than the 24 positions"),
        ({"size": "base"}, "size has no effect on pretrain.encoder.kind=towers"),
        ({"kind": "multiway"}, "vision has no effect on pretrain.encoder.kind=multiway"),
        ({"frozen": ["vision", "text"], "tower_rate": 0.5}, "tower_rate=0.5 has no effect"),
        ({"frozen": ["sound"]}, "is not one of vision, text"),
    ],
)
def test_mistakes_are_told_in_a_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    placed = {
        key: str(folder / value) if value in ("bert", "vit") else value
        for key, value in changes.items()
        if isinstance(value, (str, int, float, type(None)))
    }
    with pytest.raises(UserError, match=message) as caught:
        make_config(folder, **{**changes, **placed}).encoder.architecture(VOCABULARY)
    assert "\n" not in str(caught.value)


def test_more_words_than_the_tower_has_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has 58 tokens, but .* has embeddings for 57"):
        make_config(folder).encoder.architecture(58)


def test_only_complete_safetensors_are_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "vit", tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="no weights that can be read as safetensors"):
        read_weights(str(tmp_path / "pickled"), "vision")
    shutil.copytree(folder / "vit", tmp_path / "half")
    name = next(n for n in weights if n.endswith("attention.output.dense.weight") or "o_proj" in n)
    rest = {n: t for n, t in weights.items() if n != name}
    save_file(rest, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of its own config\.json are missing"):
        read_weights(str(tmp_path / "half"), "vision")
