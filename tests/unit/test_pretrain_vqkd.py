"""BEiT v2's tokenizer: the official layout in, codes of patches out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling

from alignrec import configuration
from alignrec.errors import UserError
from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.config import EncoderConfig
from alignrec.pretrain.vqkd import VqkdTokenizer, load_tokenizer, write_tokenizer_weights

CPU = torch.device("cpu")
SIDE, PATCH, WIDTH, LAYERS, CODES, DIM = 4, 4, 128, 2, 30, 8


def architecture(*, image_size: int = 16, patch_size: int = 4) -> Architecture:
    section = {"image_size": image_size, "patch_size": patch_size}
    return configuration.build(EncoderConfig, section, section="encoder").architecture(50)


def encoder_shapes(
    *, width: int, layers: int, hidden: int, patch: int, patches: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of unilm's VisionTransformer as VQ-KD sets it up."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
    }
    for layer in range(layers):
        shapes |= {
            f"blocks.{layer}.{name}": shape
            for name, shape in {
                "norm1.weight": (width,),
                "norm1.bias": (width,),
                "attn.q_bias": (width,),
                "attn.v_bias": (width,),
                "attn.qkv.weight": (3 * width, width),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "norm2.weight": (width,),
                "norm2.bias": (width,),
                "mlp.fc1.weight": (hidden, width),
                "mlp.fc1.bias": (hidden,),
                "mlp.fc2.weight": (width, hidden),
                "mlp.fc2.bias": (width,),
            }.items()
        }
    return shapes


def official_shapes(
    *, width: int, layers: int, hidden: int, patch: int, patches: int, codes: int, dim: int
) -> dict[str, tuple[int, ...]]:
    """What a tokenizer is made of in microsoft/unilm's checkpoints."""
    encoder = encoder_shapes(
        width=width, layers=layers, hidden=hidden, patch=patch, patches=patches
    )
    return {f"encoder.{name}": shape for name, shape in encoder.items()} | {
        "encode_task_layer.0.weight": (width, width),
        "encode_task_layer.0.bias": (width,),
        "encode_task_layer.2.weight": (dim, width),
        "encode_task_layer.2.bias": (dim,),
        "quantize.embedding.weight": (codes, dim),
    }


def checkpoint(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small checkpoint with everything that the official ones hold."""
    torch.manual_seed(seed)
    shapes = official_shapes(
        width=WIDTH, layers=LAYERS, hidden=192, patch=PATCH, patches=SIDE**2, codes=CODES, dim=DIM
    )
    tensors = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    for name in tensors:
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    codes = "quantize.embedding.weight"
    tensors[codes] = F.normalize(torch.randn(CODES, DIM), dim=-1)
    return tensors | {
        "quantize.cluster_size": torch.zeros(CODES),
        "quantize.embedding.cluster_size": torch.zeros(CODES),
        "quantize.embedding.embed_avg": tensors[codes].clone(),
        "quantize.embedding.initted": torch.tensor([True]),
        "decoder.cls_token": torch.zeros(1, 1, WIDTH),
        "decode_task_layer.0.weight": torch.zeros(WIDTH, WIDTH),
        "teacher_model.logit_scale": torch.zeros(()),
        "scaling_layer.shift": torch.zeros(1, 3, 1, 1),
    }


def reference_codes(tensors: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The tokenizer from the paper's formulas in float64, position by position."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        shape = (WIDTH,)
        return F.layer_norm(x, shape, t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)

    pixels = images.permute(0, 3, 1, 2).double() / 127.5 - 1
    proj = "encoder.patch_embed.proj"
    patches = F.conv2d(pixels, t[f"{proj}.weight"], t[f"{proj}.bias"], stride=PATCH)
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([t["encoder.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + t["encoder.pos_embed"]
    for layer in range(LAYERS):
        block = f"encoder.blocks.{layer}"
        y = norm(x, f"{block}.norm1")
        q, k, v = (y @ t[f"{block}.attn.qkv.weight"].T).chunk(3, dim=-1)
        q, v = q + t[f"{block}.attn.q_bias"], v + t[f"{block}.attn.v_bias"]
        heads = []
        for head in range(WIDTH // 64):
            part = slice(64 * head, 64 * (head + 1))
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(64)
            heads.append(scores.softmax(dim=-1) @ v[..., part])
        mixed = torch.cat(heads, dim=-1)
        x = x + mixed @ t[f"{block}.attn.proj.weight"].T + t[f"{block}.attn.proj.bias"]
        y = norm(x, f"{block}.norm2") @ t[f"{block}.mlp.fc1.weight"].T
        y = F.gelu(y + t[f"{block}.mlp.fc1.bias"])
        x = x + y @ t[f"{block}.mlp.fc2.weight"].T + t[f"{block}.mlp.fc2.bias"]
    x = norm(x[:, 1:], "encoder.fc_norm")
    x = (x @ t["encode_task_layer.0.weight"].T + t["encode_task_layer.0.bias"]).tanh()
    x = F.normalize(x @ t["encode_task_layer.2.weight"].T + t["encode_task_layer.2.bias"], dim=-1)
    return torch.cdist(x, t["quantize.embedding.weight"]).argmin(dim=-1)


def convert(tensors: dict[str, torch.Tensor], folder: Path, **shape: int) -> VqkdTokenizer:
    torch.save({"model": tensors}, folder / "vqkd.pth")
    write_tokenizer_weights(folder / "vqkd.pth", architecture(**shape), folder / "kept")
    return load_tokenizer(folder / "kept", CPU)


def draw_images(count: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    size_ = (count, size, size, 3)
    return torch.randint(0, 256, size_, generator=generator, dtype=torch.uint8)


def test_names_and_shapes_are_those_of_the_published_checkpoints() -> None:
    with torch.device("meta"):
        found = {name: tuple(t.shape) for name, t in VqkdTokenizer().state_dict().items()}
    assert found == official_shapes(
        width=768, layers=12, hidden=3072, patch=16, patches=196, codes=8192, dim=32
    )


def test_codes_are_those_of_the_formulas(tmp_path: Path) -> None:
    tensors, images = checkpoint(), draw_images()
    tokenizer = convert(tensors, tmp_path)
    expected = reference_codes(tensors, images)
    assert torch.equal(tokenizer.codes(images), expected)
    assert len(expected.unique()) > 3
    assert tokenizer.codes(images[:0]).shape == (0, SIDE**2)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_larger_pictures_of_the_same_grid_are_made_smaller(tmp_path: Path) -> None:
    tokenizer = convert(checkpoint(), tmp_path, image_size=32, patch_size=8)
    small = draw_images()
    large = small.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    agreement = (tokenizer.codes(large) == tokenizer.codes(small)).double().mean()
    assert agreement > 0.5  # smoothing changes noise, but not where a patch is
    assert torch.equal(tokenizer.codes(torch.full_like(large, 9)), tokenizer.codes(small * 0 + 9))


def test_a_grid_without_a_code_for_each_patch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Set encoder\.image_size to 16"):
        convert(checkpoint(), tmp_path, image_size=32, patch_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.blocks.1.attn.q_bias": None}, "1 missing .encoder.blocks.1.attn.q_bias"),
        ({"encoder.pos_embed": None}, "'encoder.pos_embed' is missing"),
        ({"encoder.pos_embed": (1, 12, WIDTH)}, "11 patches of width 128"),
        ({"encoder.blocks.0.gamma_1": (WIDTH,)}, "1 unknown .encoder.blocks.0.gamma_1"),
        ({"encode_task_layer.2.bias": (DIM + 1,)}, "1 of other shapes .encode_task_layer.2.bias"),
        ({"encoder.blocks.0.mlp.fc1.weight": ()}, "is missing or of another shape"),
        ({"quantize.embedding.weight": None}, "'quantize.embedding.weight' is missing"),
    ],
)
def test_what_is_no_tokenizer_is_told(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tensors = checkpoint()
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    with pytest.raises(UserError, match=message):
        convert(tensors, tmp_path)


def test_files_that_could_run_are_refused(tmp_path: Path) -> None:
    torch.save({"model": [Path("x")]}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"objective\.vqkd=.*evil\.pth cannot be read"):
        write_tokenizer_weights(tmp_path / "evil.pth", architecture(), tmp_path / "kept")
    with pytest.raises(UserError, match=r"absent.pth cannot be read"):
        write_tokenizer_weights(tmp_path / "absent.pth", architecture(), tmp_path / "kept")
