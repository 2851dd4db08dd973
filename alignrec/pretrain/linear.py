"""The linear layer of the encoder and its heads: on a CPU in fp32, oneDNN's matrix products.

Torch leaves products of fp32 matrices to MKL and those of half precision to oneDNN. On AVX-512
processors oneDNN is about a tenth faster in fp32, too, for outputs and for gradients of inputs, not
for those of weights (``benchmarks/bench_pretrain.py reference`` sees the difference). The operator
is the one that torch.compile inserts for inference; without it this is ``nn.Linear``.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Float
from torch import Tensor, nn

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)


class Linear(nn.Linear):
    """``nn.Linear``, with oneDNN's products where they are faster."""

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Tensor:  # noqa: A002 - torch's name
        """Return the outputs: the shape is the input's but for the last dimension."""
        is_fp32 = input.dtype == self.weight.dtype == torch.float32
        is_usable = _HAS_ONEDNN and input.device.type == "cpu" and is_fp32
        if not is_usable or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        rows: Tensor = _Product.apply(
            input.reshape(input.shape[:-1].numel(), self.in_features), self.weight, self.bias
        )  # type: ignore[no-untyped-call]
        return rows.view(*input.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """Rows times a transposed weight, plus a bias.

    Also of no rows at all: ZeRO-2 fills its buckets in the order in which gradients come, and takes
    it for the same on every rank, which holds where all have the same graph.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        rows: Float[Tensor, "rows inputs"],
        weight: Float[Tensor, "outputs inputs"],
        bias: Float[Tensor, " outputs"] | None,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        gradient: Float[Tensor, "rows outputs"],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t(), None) if of_rows else None,
            gradient.t() @ rows if of_weight else None,
            gradient.sum(dim=0) if of_bias else None,
        )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not rows.numel():
        return F.linear(rows, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        rows.contiguous(), weight, bias, "none", [], ""
    )
    return product
