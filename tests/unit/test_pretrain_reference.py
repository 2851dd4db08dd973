"""The encoder is the public reference module of BEiT-3 (torchscale), weight for weight.

``make install`` installs torchscale without its dependencies: timm and fairscale, which would bring
torchvision, serve features that BEiT-3 without drop path does not use, and are stood in for here.
"""

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from alignrec import configuration
from alignrec.pretrain.config import SIZES, PretrainConfig
from alignrec.pretrain.encoder import Encoder, patchify
from alignrec.pretrain.multiway import Streams

VOCABULARY = 60
SIDE, PATCH, WIDTH = 16, 4, 16
NUM_PATCHES = (SIDE // PATCH) ** 2
NUM_ITEMS, LENGTH = 4, 7
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def torchscale() -> Iterator[Any]:
    """torchscale's package, importable without timm and fairscale."""
    unused = {
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": None, "wrap": None},
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in unused.items():
            module = types.ModuleType(name)
            module.__dict__.update(content)
            patch.setitem(sys.modules, name, module)
        yield pytest.importorskip(
            "torchscale.model.BEiT3",
            reason="the reference is absent: pip install --no-deps torchscale==0.3.0",
        )


def make_reference(torchscale: Any, size: str | None = None) -> Any:
    config = importlib.import_module("torchscale.architecture.config")
    layers, width, heads, hidden = SIZES[size] if size else (3, WIDTH, 2, 24)
    return torchscale.BEiT3(
        config.EncoderConfig(
            img_size=224 if size else SIDE,
            patch_size=16 if size else PATCH,
            vocab_size=64_010 if size else VOCABULARY,
            multiway=True,
            layernorm_embedding=False,
            normalize_output=True,
            no_output_layer=True,
            drop_path_rate=0,
            encoder_embed_dim=width,
            encoder_attention_heads=heads,
            encoder_ffn_embed_dim=hidden,
            encoder_layers=layers,
        )
    )


def make_encoder() -> Encoder:
    section = {
        "encoder": {
            "num_layers": 3,
            "width": WIDTH,
            "num_heads": 2,
            "hidden": 24,
            "image_size": SIDE,
            "patch_size": PATCH,
        }
    }
    config = configuration.build(PretrainConfig, section, section="pretrain")
    return Encoder(config.encoder.architecture(VOCABULARY))


@pytest.fixture
def pair(torchscale: Any) -> tuple[Encoder, Any]:
    """Our encoder and the reference with the same weights, none of them zero."""
    torch.manual_seed(0)
    ours, reference = make_encoder(), make_reference(torchscale)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def make_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    padding = torch.zeros(NUM_ITEMS, LENGTH, dtype=torch.bool)
    padding[1, 4:] = True
    padding[3, 6:] = True
    masked = torch.rand(NUM_ITEMS, NUM_PATCHES, generator=generator) < 0.4
    return {
        "images": torch.randint(
            0, 256, (NUM_ITEMS, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator
        ),
        "tokens": torch.randint(0, VOCABULARY, (NUM_ITEMS, LENGTH), generator=generator),
        "padding": padding,
        "masked": masked,
    }


def pixels(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def assert_same(
    ours: Encoder, reference: Any, mine: Tensor, theirs: Tensor, padding: Tensor | None = None
) -> None:
    """Outputs and the gradients of a loss with a weight of its own for every number agree.

    The reference computes something for padding, ours has zeros there.
    """
    if padding is not None:
        theirs = theirs.masked_fill(padding[..., None], 0.0)
    torch.testing.assert_close(mine, theirs, **TOLERANCE)
    assert mine.abs().max() > 0.1
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2)) / mine.numel()
    for module, output in ((ours, mine), (reference, theirs)):
        module.zero_grad()
        (output * weight).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        # a branch that nothing goes through: one of the two says zero, the other none at all
        wanted, found = (
            torch.zeros_like(p) if p.grad is None else p.grad for p in (expected[name], parameter)
        )
        torch.testing.assert_close(found, wanted, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    assert max(p.grad.abs().max() for p in ours.parameters() if p.grad is not None) > 1e-3


def test_parameters_map_one_to_one(pair: tuple[Encoder, Any]) -> None:
    ours, reference = pair
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    reference.load_state_dict(ours.state_dict())  # and back


@pytest.mark.parametrize("masking", [False, True])
def test_pairs_agree(pair: tuple[Encoder, Any], masking: bool) -> None:
    ours, reference = pair
    inputs = make_inputs()
    masked = inputs["masked"] if masking else None
    present = torch.ones(NUM_ITEMS, dtype=torch.bool)
    streams = ours(inputs["images"], present, inputs["tokens"], inputs["padding"], masked)
    theirs = reference(
        textual_tokens=inputs["tokens"],
        visual_tokens=pixels(inputs["images"]),
        text_padding_position=inputs["padding"],
        vision_masked_position=masked,
    )
    assert theirs["multiway_split_position"] == 1 + NUM_PATCHES
    hidden = torch.cat([torch.zeros(NUM_ITEMS, 1 + NUM_PATCHES).bool(), inputs["padding"]], dim=1)
    assert_same(ours, reference, torch.cat(streams, dim=1), theirs["encoder_out"], hidden)


def test_pictures_alone_agree(pair: tuple[Encoder, Any]) -> None:
    ours, reference = pair
    inputs = make_inputs()
    present = torch.ones(NUM_ITEMS, dtype=torch.bool)
    nothing = torch.ones(NUM_ITEMS, LENGTH, dtype=torch.bool)  # all padding
    streams = ours(inputs["images"], present, inputs["tokens"], nothing, inputs["masked"])
    theirs = reference(
        visual_tokens=pixels(inputs["images"]), vision_masked_position=inputs["masked"]
    )
    assert_same(ours, reference, streams.vision, theirs["encoder_out"])


def test_texts_alone_agree(pair: tuple[Encoder, Any]) -> None:
    """The reference has no CLS beside a text alone; neither has our transformer without vision."""
    ours, reference = pair
    inputs = make_inputs()
    none = torch.zeros(NUM_ITEMS, 0, WIDTH)
    streams = ours.encoder(
        Streams(none, ours.text_embed(inputs["tokens"])),
        torch.zeros(NUM_ITEMS, 0, dtype=torch.bool),
        inputs["padding"],
    )
    theirs = reference(textual_tokens=inputs["tokens"], text_padding_position=inputs["padding"])
    assert_same(ours, reference, streams.text, theirs["encoder_out"], inputs["padding"])


def test_items_without_a_picture_keep_cls_and_hide_patches(pair: tuple[Encoder, Any]) -> None:
    """CLS is the item's feature, so it is there without a picture, too; patches are padding."""
    ours, reference = pair
    inputs = make_inputs()
    present = torch.tensor([True, False, False, True])
    streams = ours(inputs["images"], present, inputs["tokens"], inputs["padding"])
    vision = reference.vision_embed(pixels(inputs["images"]))
    absent = torch.zeros(vision.shape[:2], dtype=torch.bool)
    absent[~present, 1:] = True
    hidden = torch.cat([absent, inputs["padding"]], dim=1)
    joint = torch.cat([vision, reference.text_embed(inputs["tokens"])], dim=1)
    theirs = reference.encoder(
        src_tokens=None,
        token_embeddings=joint,
        encoder_padding_mask=hidden,
        multiway_split_position=vision.shape[1],
    )
    assert_same(ours, reference, torch.cat(streams, dim=1), theirs["encoder_out"], hidden)


@pytest.mark.parametrize("size", list(SIZES))
def test_every_size_has_the_reference_shapes(torchscale: Any, size: str) -> None:
    config = configuration.build(
        PretrainConfig, {"encoder": {"size": size, "image_size": 224}}, section="pretrain"
    )
    with torch.device("meta"):
        ours = Encoder(config.encoder.architecture(64_010))
        reference = make_reference(torchscale, size)
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in reference.named_parameters()}


# BEiT-3's page says 276M and 746M, cut off after the point.
@pytest.mark.parametrize(("size", "millions"), [("base", 276.51), ("large", 746.71)])
def test_parameter_counts_are_those_of_the_published_models(size: str, millions: float) -> None:
    config = configuration.build(
        PretrainConfig, {"encoder": {"size": size, "image_size": 224}}, section="pretrain"
    )
    width = SIZES[size][1]
    with torch.device("meta"):
        parts = [
            Encoder(config.encoder.architecture(64_010)),
            torch.nn.Linear(width, 64_010),  # mlm_head
            torch.nn.Linear(width, 8_192),  # mim_head over the codes of BEiT v2
        ]
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_patches_are_cut_as_the_convolution_sees_them() -> None:
    images = make_inputs()["images"]
    unfolded = torch.nn.functional.unfold(pixels(images), PATCH, stride=PATCH)
    assert torch.equal(patchify(images, PATCH), unfolded.transpose(1, 2))
