"""Positions that are not there, or not asked for, are left out and change nothing else."""

import pytest
import torch
from torch import Tensor

from alignrec.pretrain.multiway import (
    Layout,
    MultiwayEncoder,
    Streams,
    pack,
    true_places,
    unpack,
)

BATCH, VISION, TEXT, WIDTH = 3, 5, 4, 8
TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


def make_encoder() -> MultiwayEncoder:
    torch.manual_seed(0)
    encoder = MultiwayEncoder(
        width=WIDTH,
        num_layers=3,
        num_heads=2,
        hidden=12,
        num_vision_positions=VISION + 2,
        num_text_positions=TEXT + 2,
    )
    encoder.reset_parameters()
    return encoder


def make_streams() -> Streams:
    generator = torch.Generator().manual_seed(1)
    return Streams(
        torch.randn(BATCH, VISION, WIDTH, generator=generator),
        torch.randn(BATCH, TEXT, WIDTH, generator=generator),
    )


def make_padding() -> tuple[Tensor, Tensor]:
    """All there; no picture but CLS and a short text; no text."""
    vision = torch.zeros(BATCH, VISION, dtype=torch.bool)
    vision[1, 1:] = True
    text = torch.zeros(BATCH, TEXT, dtype=torch.bool)
    text[1, 2:] = True
    text[2] = True
    return vision, text


def test_packing_and_joining_are_undone() -> None:
    streams, (vision, text) = make_streams(), make_padding()
    places = true_places(~vision)
    packed = Streams(pack(streams.vision, places), pack(streams.text, true_places(~text)))
    assert torch.equal(
        unpack(packed.vision, places, vision.shape),
        streams.vision.masked_fill(vision[..., None], 0.0),
    )
    layout = Layout.of(~vision, ~text)
    joint = layout.join(packed)
    assert layout.keys.sum(dim=(1, 2, 3)).tolist() == [9, 3, 5]
    for item in range(BATCH):
        there = torch.cat([streams.vision[item, ~vision[item]], streams.text[item, ~text[item]]])
        assert torch.equal(joint[item, : len(there)], there)
        assert (joint[item, len(there) :] == 0).all()
    back = layout.split(joint)
    assert torch.equal(back.vision, packed.vision)
    assert torch.equal(back.text, packed.text)


def test_padding_is_not_read_and_zero_in_the_result() -> None:
    encoder, streams, padding = make_encoder(), make_streams(), make_padding()
    other = Streams(
        *(s.masked_fill(p[..., None], 1e6) for s, p in zip(streams, padding, strict=True))
    )
    for mine, theirs, hidden in zip(
        encoder(streams, *padding), encoder(other, *padding), padding, strict=True
    ):
        assert torch.equal(mine, theirs)
        assert (mine[hidden] == 0).all()
        assert (mine[~hidden] != 0).any(dim=1).all()


def test_an_item_is_encoded_alike_whatever_is_beside_it() -> None:
    encoder, streams, (vision, text) = make_encoder(), make_streams(), make_padding()
    together = encoder(streams, vision, text)
    for item in range(BATCH):
        rows = slice(item, item + 1)
        alone = encoder(Streams(*(s[rows] for s in streams)), vision[rows], text[rows])
        torch.testing.assert_close(alone.vision[0], together.vision[item], **TOLERANCE)
        torch.testing.assert_close(alone.text[0], together.text[item], **TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_wanted_positions_are_what_they_are_among_all(share: float, recompute: bool) -> None:
    """Values at wanted positions and all gradients that come from them are the same."""
    streams, padding = make_streams(), make_padding()
    generator = torch.Generator().manual_seed(2)
    wanted = Streams(
        torch.rand(BATCH, VISION, generator=generator) < share,
        torch.rand(BATCH, TEXT, generator=generator) < share,
    )
    whole, part = make_encoder(), make_encoder()
    part.recompute = recompute
    all_states, states = whole(streams, *padding), part(streams, *padding, wanted)
    for every, some, asked in zip(all_states, states, wanted, strict=True):
        torch.testing.assert_close(some[asked], every[asked], **TOLERANCE)
        assert (some[~asked] == 0).all()
    for found in (all_states, states):
        sum(
            (s[w].square() * 0.3 + s[w]).sum() for s, w in zip(found, wanted, strict=True)
        ).backward()
    for (name, expected), parameter in zip(
        whole.named_parameters(), part.parameters(), strict=True
    ):
        assert parameter.grad is not None, name  # DeepSpeed waits for every parameter's gradient
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-5)
