"""The encoder's linear layer: torch's values and gradients, whatever it is given."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alignrec.pretrain.linear import Linear

RTOL = 2e-5


def _results(layer: nn.Linear, inputs: Tensor, wanted: Tensor) -> list[Tensor]:
    rows = inputs.clone().requires_grad_()
    outputs = layer(rows)
    (outputs * wanted).sum().backward()
    gradients = [rows.grad, *(p.grad for p in layer.parameters())]
    return [outputs.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 48), (3, 7, 48), (48,), (1, 48), (0, 48)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], *, bias: bool) -> None:
    torch.manual_seed(0)
    plain, layer = nn.Linear(48, 80, bias=bias), Linear(48, 80, bias=bias)
    layer.load_state_dict(plain.state_dict())
    inputs, wanted = torch.randn(shape), torch.randn(*shape[:-1], 80)
    for expected, found in zip(
        _results(plain, inputs, wanted), _results(layer, inputs, wanted), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize(
    "strided",
    [lambda x: x.t().contiguous().t(), lambda x: x[:, ::2], lambda x: x[:1].expand(9, -1)],
)
def test_inputs_and_gradients_of_any_strides(strided: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    inputs, wanted = strided(torch.randn(9, 32)), strided(torch.randn(9, 24))
    plain, layer = (kind(inputs.shape[1], wanted.shape[1]) for kind in (nn.Linear, Linear))
    layer.load_state_dict(plain.state_dict())
    for expected, found in zip(
        _results(plain, inputs, wanted), _results(layer, inputs, wanted), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=RTOL, atol=RTOL)


def test_the_graph_is_the_same_with_and_without_rows() -> None:
    """ZeRO-2 takes the order of gradients for the same on every rank."""
    layer = Linear(8, 4)
    outputs = [layer(torch.randn(count, 8)).grad_fn for count in (5, 0)]
    computed = [type(output.next_functions[0][0]).__name__ for output in outputs]
    assert computed == ["_ProductBackward"] * 2  # else torch has no oneDNN: nothing is faster


def test_only_gradients_that_are_needed() -> None:
    layer = Linear(8, 4)
    layer.weight.requires_grad_(False)
    layer(torch.randn(5, 8)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_half_precision_stays_half_precision() -> None:
    layer, inputs = Linear(8, 4), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    assert layer.double()(inputs.double()).dtype == torch.float64
    assert layer.bfloat16()(inputs.bfloat16()).dtype == torch.bfloat16
