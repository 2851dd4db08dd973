"""BEiT v2's picture tokenizer (VQ-KD, Peng et al. 2022): pictures in, a code per patch out, frozen.

Parameter names are those of microsoft/unilm's checkpoints ``vqkd_encoder_base_decoder_*.pth``, of
which only the encoder, its task layer and the codes are read.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignrec.errors import UserError
from alignrec.pretrain.architecture import CHANNELS, Architecture
from alignrec.pretrain.checkpoint_files import Tensors, read_tensor_file, some

VQKD = "vqkd.safetensors"
_HEAD_WIDTH = 64  # of every published model; the weights do not tell
_EPSILON = 1e-6
_CODES = "quantize.embedding.weight"
_READ = ("encoder.", "encode_task_layer.", _CODES)


class _Attention(nn.Module):
    """Softmax attention whose keys have no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // _HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch positions width"]) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        batch, positions, width = x.shape
        joint = F.linear(x, self.qkv.weight, bias)
        # (batch, positions, 3, heads, head) -> (3, batch, heads, positions, head)
        q, k, v = joint.view(batch, positions, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, positions, width))
        return projected


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPSILON)
        self.attn = _Attention(width)
        self.norm2 = nn.LayerNorm(width, eps=_EPSILON)
        self.mlp = _Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(CHANNELS, width, kernel_size=patch_size, stride=patch_size)


class _VisionTransformer(nn.Module):
    """A plain vision transformer that gives normalised patch states."""

    def __init__(
        self, *, num_layers: int, width: int, hidden: int, patch_size: int, num_patches: int
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.patch_embed = _PatchEmbedding(width, patch_size)
        self.blocks = nn.Sequential(*(_Block(width, hidden) for _ in range(num_layers)))
        self.fc_norm = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, pixels: Float[Tensor, "batch 3 size size"]) -> Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(len(patches), -1, -1)
        x = self.blocks(torch.cat([cls, patches], dim=1) + self.pos_embed)
        states: Tensor = self.fc_norm(x[:, 1:])
        return states


class _Quantizer(nn.Module):
    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)


class VqkdTokenizer(nn.Module):
    """The tokenizer; its weights never change."""

    def __init__(
        self,
        *,
        num_layers: int = 12,
        width: int = 768,
        hidden: int = 3072,
        patch_size: int = 16,
        patches_per_side: int = 14,
        num_codes: int = 8192,
        code_dim: int = 32,
    ) -> None:
        """Make the layers; the default shapes are those of the published checkpoints."""
        super().__init__()
        self.patch_size = patch_size
        self.patches_per_side = patches_per_side
        self.num_codes = num_codes
        self._hidden = hidden
        self.encoder = _VisionTransformer(
            num_layers=num_layers,
            width=width,
            hidden=hidden,
            patch_size=patch_size,
            num_patches=patches_per_side**2,
        )
        self.encode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim)
        )
        self.quantize = _Quantizer(num_codes, code_dim)
        self.requires_grad_(requires_grad=False)

    @torch.no_grad()
    def codes(self, images: UInt8[Tensor, "batch size size 3"]) -> Int64[Tensor, "batch patches"]:
        """Return the code of each patch; pictures are brought to the tokenizer's resolution."""
        if len(images) == 0:
            return torch.zeros(0, self.patches_per_side**2, dtype=torch.int64, device=images.device)
        features = self.encode_task_layer(self.encoder(self._pixels(images)))
        vectors = self.quantize.embedding.weight
        # |f - v|^2 / 2 less what all codes share; the published codes are of length 1 to rounding
        score = F.normalize(features, dim=-1) @ vectors.T - vectors.square().sum(dim=1) / 2
        return score.argmax(dim=-1)

    def working_bytes(self, num_pictures: int) -> int:
        """Return the bytes of the largest tensors that are there together, about.

        Those are the states with a layer's hidden ones before and after GELU, or the scores.
        """
        width = self.encoder.pos_embed.shape[-1]
        layer = (1 + self.patches_per_side**2) * (2 * self._hidden + 2 * width)
        scores = self.patches_per_side**2 * self.num_codes
        return num_pictures * max(layer, scores) * self.encoder.pos_embed.itemsize

    def _pixels(self, images: UInt8[Tensor, "batch size size 3"]) -> Tensor:
        """Return pixels -1 .. 1 of the size that the tokenizer was trained with."""
        pixels = images.permute(0, 3, 1, 2).float()
        side = self.patches_per_side * self.patch_size
        if pixels.shape[-1] != side:
            pixels = F.interpolate(
                pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 255)
        return pixels / 127.5 - 1.0


def write_tokenizer_weights(source: Path, architecture: Architecture, target: Path) -> None:
    """Write the tensors that are needed of a checkpoint as safetensors, by rename (rank 0).

    Raises:
        UserError: it cannot be read, is no VQ-KD, or has another grid of patches.
    """
    tensors = needed_tensors(source)
    tokenizer = empty_tokenizer(tensors, source)
    check_grid(tokenizer, architecture, source)
    spare = target.with_suffix(".writing")
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, spare)
    spare.replace(target)


def load_tokenizer(path: Path, device: torch.device) -> VqkdTokenizer:
    """Read what ``write_tokenizer_weights`` wrote."""
    tensors = load_file(path, device=str(device))
    tokenizer = empty_tokenizer(tensors, path)
    tokenizer.load_state_dict(tensors, assign=True)
    return tokenizer.requires_grad_(requires_grad=False).eval()


def needed_tensors(source: Path) -> Tensors:
    """Read a checkpoint's encoder, task layer and codes."""
    tensors = read_tensor_file(source, setting="pretrain.objective.vqkd", give="BEiT v2's .pth")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(_READ)}


def empty_tokenizer(tensors: Tensors, source: Path) -> VqkdTokenizer:
    """Return a tokenizer without memory, of the shapes that a checkpoint has.

    Raises:
        UserError: the tensors are not those of a VQ-KD.
    """
    with torch.device("meta"):
        tokenizer = VqkdTokenizer(**_shapes(tensors, source))
    wanted = {name: parameter.shape for name, parameter in tokenizer.named_parameters()}
    other = {name for name in wanted.keys() & tensors if tensors[name].shape != wanted[name]}
    faults = {
        "missing": sorted(wanted.keys() - tensors),
        "unknown": sorted(tensors.keys() - wanted),
        "of other shapes": sorted(other),
    }
    told = [f"{len(names)} {fault} ({some(names)})" for fault, names in faults.items() if names]
    if told:
        raise _misfit(source, "; ".join(told))
    return tokenizer


def check_grid(tokenizer: VqkdTokenizer, architecture: Architecture, source: Path) -> None:
    """Refuse a tokenizer that has not one code for each of the encoder's patches.

    Raises:
        UserError: the grids differ.
    """
    side = tokenizer.patches_per_side
    if architecture.patches_per_side != side:
        raise UserError(
            f"pretrain.encoder cuts pictures into {architecture.patches_per_side} x "
            f"{architecture.patches_per_side} patches, but {source} gives codes for {side} x "
            f"{side}, so patches would have no code of their own. Set encoder.image_size to "
            f"{side * architecture.patch_size} (with patch_size {architecture.patch_size}), or "
            f"objective.targets to codebook."
        )


def _shapes(tensors: Tensors, source: Path) -> dict[str, int]:
    """Return the sizes that a checkpoint's tensors tell."""
    try:
        positions = tensors["encoder.pos_embed"].shape[1] - 1
        num_codes, code_dim = tensors[_CODES].shape
        width, _, patch_size, _ = tensors["encoder.patch_embed.proj.weight"].shape
        hidden = len(tensors["encoder.blocks.0.mlp.fc1.weight"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _misfit(source, f"{error} is missing or of another shape") from error
    side = math.isqrt(positions)
    if side**2 != positions or width % _HEAD_WIDTH:
        raise _misfit(source, f"{positions} patches of width {width}")
    numbers = (name.split(".")[2] for name in tensors if name.startswith("encoder.blocks."))
    return {
        "num_layers": len(set(numbers)),
        "width": width,
        "hidden": hidden,
        "patch_size": patch_size,
        "patches_per_side": side,
        "num_codes": num_codes,
        "code_dim": code_dim,
    }


def _misfit(source: Path, fault: str) -> UserError:
    return UserError(
        f"pretrain.objective.vqkd={source} is no tokenizer of BEiT v2 ({fault}), so it gives no "
        f"codes. Give a published vqkd_encoder_base_decoder_*.pth."
    )
