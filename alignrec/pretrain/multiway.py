"""Multiway transformer of BEiT-3: vision and text positions share attention and nothing else.

Module names follow torchscale (architecture/encoder.py), so that state dicts map one to one:
``A`` is the vision branch, ``B`` the text branch. Both streams are kept apart, and without their
padding, so that nothing is computed for what is not there; they are joined, padded and with a mask,
only for the softmax attention.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignrec.pretrain.linear import Linear

LAYER_NORM_EPS = 1e-5
SMALL_STD = 0.02
POSITION_OFFSET = 2  # fairseq's first position index


class Streams(NamedTuple):
    """Hidden states: vision ``(batch, 1 + patches, width)`` and text ``(batch, length, width)``.

    Inside of the encoder packed: ``(vision positions, width)`` and ``(text positions, width)``, the
    positions that are there, item by item.
    """

    vision: Tensor
    text: Tensor


class Layout(NamedTuple):
    """Where packed positions lie in the joint sequences that attention is computed over.

    Attributes:
        places: of the packed vision positions, then of the packed text positions, in the flattened
            (batch, length) joint sequences; an item's positions come first there, padding last.
        num_vision: packed vision positions.
        keys: True where a position may be attended to.
    """

    places: Int64[Tensor, " positions"]
    num_vision: int
    keys: Bool[Tensor, "batch 1 1 length"]

    @classmethod
    def of(cls, vision: Bool[Tensor, "batch vision"], text: Bool[Tensor, "batch text"]) -> "Layout":
        """Lay out the positions that are there (True)."""
        joint = torch.cat([vision, text], dim=1)
        lengths = joint.sum(dim=1)
        longest = max(int(lengths.max()), 1) if len(lengths) else 0
        rows = torch.arange(len(joint), device=joint.device)[:, None] * longest
        places = rows + joint.cumsum(dim=1) - 1
        at_vision, at_text = places[:, : vision.shape[1]], places[:, vision.shape[1] :]
        at_vision = at_vision[vision]
        keys = torch.arange(longest, device=joint.device) < lengths[:, None]
        return cls(torch.cat([at_vision, at_text[text]]), len(at_vision), keys[:, None, None, :])

    def join(self, streams: Streams) -> Float[Tensor, "batch length width"]:
        """Return the joint sequences of packed streams, zero where nothing is."""
        batch, length = self.keys.shape[0], self.keys.shape[-1]
        joint: Tensor = _Join.apply(*streams, self.places, batch * length)  # type: ignore[no-untyped-call]
        return joint.view(batch, length, -1)

    def split(self, joint: Float[Tensor, "batch length width"]) -> Streams:
        """Undo ``join``."""
        taken = _Split.apply(joint.flatten(0, 1), self.places, self.num_vision)  # type: ignore[no-untyped-call]
        return Streams(*taken)


class Wanted(NamedTuple):
    """Packed positions whose results are asked for.

    Attributes:
        rows: int64 indices of packed vision and of packed text positions.
        layout: of these positions among themselves.
    """

    rows: Streams
    layout: Layout

    def of(self, streams: Streams) -> Streams:
        """Return the states of these positions."""
        return _of_both(lambda states, rows: states.index_select(0, rows), streams, self.rows)


class _Join(torch.autograd.Function):
    """Put packed streams at their places; backward is ``_Split``'s forward.

    Both are autograd functions because torch's own derivatives of indexing and slicing would go
    over the states three times more, in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        vision: Float[Tensor, "vision width"],
        text: Float[Tensor, "text width"],
        places: Int64[Tensor, " positions"],
        size: int,
    ) -> Tensor:
        """Return (size, width), zero at other places."""
        ctx.save_for_backward(places)
        ctx.num_vision = len(vision)
        return _put(vision, text, places, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        """Return the gradients of the two streams."""
        (places,) = ctx.saved_tensors
        return *_take(gradient, places, ctx.num_vision), None, None


class _Split(torch.autograd.Function):
    """Take packed streams from their places; backward is ``_Join``'s forward."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        joint: Float[Tensor, "size width"],
        places: Int64[Tensor, " positions"],
        num_vision: int,
    ) -> tuple[Tensor, Tensor]:
        """Return (vision positions, width) and (text positions, width)."""
        ctx.save_for_backward(places)
        ctx.size = len(joint)
        return _take(joint, places, num_vision)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        vision: Tensor,
        text: Tensor,
    ) -> tuple[Tensor, None, None]:
        """Return the gradient of the joint states: zero where nothing was taken."""
        (places,) = ctx.saved_tensors
        return _put(vision, text, places, ctx.size), None, None


def _put(vision: Tensor, text: Tensor, places: Tensor, size: int) -> Tensor:
    joint = vision.new_zeros(size, vision.shape[-1])
    joint.index_copy_(0, places[: len(vision)], vision)
    return joint.index_copy_(0, places[len(vision) :], text)


def _take(joint: Tensor, places: Tensor, num_vision: int) -> tuple[Tensor, Tensor]:
    return (
        joint.index_select(0, places[:num_vision]),
        joint.index_select(0, places[num_vision:]),
    )


def pack(
    states: Float[Tensor, "batch length width"], places: Int64[Tensor, " positions"]
) -> Float[Tensor, "positions width"]:
    """Return the states at some places of the flattened batch."""
    return states.flatten(0, 1).index_select(0, places)


def unpack(
    packed: Float[Tensor, "positions width"],
    places: Int64[Tensor, " positions"],
    shape: torch.Size,
) -> Float[Tensor, "batch length width"]:
    """Undo ``pack``, zero at other places of a batch of shape (batch, length)."""
    states = packed.new_zeros(shape.numel(), packed.shape[-1])
    return states.index_copy_(0, places, packed).view(*shape, packed.shape[-1])


def true_places(mask: Bool[Tensor, "*shape"]) -> Int64[Tensor, " places"]:
    """Return where a flattened mask is True; waits for a GPU, which must tell how many they are."""
    return mask.flatten().nonzero().squeeze(1)


class Multiway(nn.Module):
    """Two copies of a module: A for vision positions, B for text positions."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.A = make()
        self.B = make()

    def forward(self, streams: Streams) -> Streams:
        """Apply each copy to its stream."""
        return Streams(self.A(streams.vision), self.B(streams.text))


def multiway_linear(inputs: int, outputs: int) -> Multiway:
    """Return a linear layer for each modality."""
    return Multiway(lambda: Linear(inputs, outputs))


def multiway_norm(width: int) -> Multiway:
    """Return a LayerNorm for each modality."""
    return Multiway(lambda: nn.LayerNorm(width, eps=LAYER_NORM_EPS))


class Attention(nn.Module):
    """Softmax attention over the joint sequence, with a LayerNorm before the output (sub-LN)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = multiway_linear(width, width)
        self.v_proj = multiway_linear(width, width)
        self.q_proj = multiway_linear(width, width)
        self.out_proj = multiway_linear(width, width)
        self.inner_attn_ln = multiway_norm(width)

    def forward(self, streams: Streams, layout: Layout, wanted: Wanted | None = None) -> Streams:
        """Attend to every position of the item, from all packed positions or from some."""
        asking, to = streams, layout
        if wanted is not None:
            asking, to = wanted.of(streams), wanted.layout
        query = self._heads(to.join(self.q_proj(asking)))
        key, value = (
            self._heads(layout.join(projection(streams)))
            for projection in (self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.keys)
        split = to.split(mixed.transpose(1, 2).flatten(2))
        result: Streams = self.out_proj(self.inner_attn_ln(split))
        return result

    def _heads(self, joint: Float[Tensor, "batch joint width"]) -> Tensor:
        batch, length, _ = joint.shape
        return joint.view(batch, length, self.num_heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """fc1, GELU, LayerNorm (sub-LN), fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)

    def forward(self, x: Float[Tensor, "positions width"]) -> Tensor:
        """Apply to each position."""
        result: Tensor = self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))
        return result


class Layer(nn.Module):
    """Pre-norm transformer layer with residual connections."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, num_heads)
        self.self_attn_layer_norm = multiway_norm(width)
        self.ffn = Multiway(lambda: FeedForward(width, hidden))
        self.final_layer_norm = multiway_norm(width)

    def forward(self, streams: Streams, layout: Layout, wanted: Wanted | None = None) -> Streams:
        """Attend over the joint sequence, then transform each position, or only some."""
        mixed = self.self_attn(self.self_attn_layer_norm(streams), layout, wanted)
        streams = _add(streams if wanted is None else wanted.of(streams), mixed)
        return _add(streams, self.ffn(self.final_layer_norm(streams)))


class PositionEmbedding(nn.Embedding):
    """Learned positions whose first index is 2."""

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__(num_positions, width)

    def forward(self, x: Float[Tensor, "batch length width"]) -> Tensor:
        """Return the embedding of positions 0 .. length - 1."""
        positions = torch.arange(x.shape[1], device=x.device) + POSITION_OFFSET
        return super().forward(positions)


class MultiwayEncoder(nn.Module):
    """Positions, layers and the final LayerNorm.

    Attributes:
        recompute: whether the backward pass computes each layer again instead of keeping what is
            inside it.
    """

    def __init__(
        self,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        hidden: int,
        num_vision_positions: int,
        num_text_positions: int,
    ) -> None:
        super().__init__()
        self.recompute = False
        self.embed_positions = Multiway(nn.Identity)
        self.embed_positions.A = PositionEmbedding(num_vision_positions, width)
        self.embed_positions.B = PositionEmbedding(num_text_positions, width)
        self.layers = nn.ModuleList(Layer(width, num_heads, hidden) for _ in range(num_layers))
        self.layer_norm = multiway_norm(width)

    def forward(
        self,
        streams: Streams,
        vision_padding: Bool[Tensor, "batch vision"],
        text_padding: Bool[Tensor, "batch text"],
        wanted: Streams | None = None,
    ) -> Streams:
        """Encode; padded positions (True) are not attended to, and zero in the result.

        Args:
            streams: states of all positions.
            vision_padding: of the vision stream.
            text_padding: of the text stream.
            wanted: masks (True) of the positions whose results are asked for, which spares the
                others most of the last layer; they are zero. Without it all are.
        """
        present = Streams(~vision_padding, ~text_padding)
        layout = Layout.of(*present)
        places = _of_both(true_places, present)
        last, kept = None, places
        if wanted is not None:
            rows = _of_both(lambda mask, place: true_places(mask.flatten()[place]), wanted, places)
            kept = _of_both(lambda place, row: place[row], places, rows)
            last = Wanted(rows, Layout.of(*_of_both(torch.logical_and, wanted, present)))
        streams = _add(streams, self.embed_positions(streams))
        streams = _of_both(pack, streams, places)
        for layer in self.layers[:-1]:
            streams = self._layer(layer, streams, layout, None)
        streams = self._layer(self.layers[-1], streams, layout, last)
        streams = self.layer_norm(streams)
        shapes = vision_padding.shape, text_padding.shape
        return _of_both(unpack, streams, kept, shapes)

    def _layer(
        self, layer: nn.Module, streams: Streams, layout: Layout, wanted: Wanted | None
    ) -> Streams:
        if not (self.recompute and torch.is_grad_enabled()):
            result: Streams = layer(streams, layout, wanted)
            return result
        # nothing in a layer is random, so no generator's state needs to be kept
        recomputed: Streams = checkpoint(
            layer, streams, layout, wanted, use_reentrant=False, preserve_rng_state=False
        )
        return recomputed

    def reset_parameters(self) -> None:
        """Initialise as torchscale does with sub-LN: Xavier attention, scaled by depth."""
        scale = math.sqrt(math.log(len(self.layers) * 2))
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or "layer_norm" in name or "layernorm" in name:
                continue
            if "embed_positions" in name:
                # small beside the tokens: words are learned long before their places matter
                nn.init.normal_(parameter, std=SMALL_STD)
            elif "self_attn" in name:
                gain = 1.0 if "out_proj" in name else 1.0 / math.sqrt(2.0)
                nn.init.xavier_uniform_(parameter, gain=gain)
            if any(part in name for part in ("fc1", "fc2", "out_proj", "v_proj")):
                with torch.no_grad():
                    parameter.mul_(scale)


def _of_both(change: Callable[..., Tensor], *pairs: tuple[Any, Any]) -> Streams:
    """Apply a function to the vision parts of some pairs, and to the text parts."""
    return Streams(*(change(*parts) for parts in zip(*pairs, strict=True)))


def _add(a: Streams, b: Streams) -> Streams:
    return _of_both(torch.add, a, b)
