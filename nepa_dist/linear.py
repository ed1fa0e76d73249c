"""Linear layers in fp32 on a CPU: by the library that is fast there.

torch gives fp32 products on a CPU to MKL, which on processors that are not Intel's takes its AVX2 kernels and reaches half of
what oneDNN does with AVX-512. Here forward and backward are oneDNN's, as operations that a compiler takes as they are. The
arithmetic is the same, fp32 throughout; sums are taken in another order.

Legend: n rows, D inputs, E outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_PRODUCTS = 1 << 26
"""Multiplications from which on a layer is worth the call of an operation of one's own, some tens of microseconds."""


def prefers_onednn() -> bool:
    """Whether this processor has AVX-512 and is one that MKL does not know as its own."""
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return available and "AuthenticAMD" in about and " avx512f " in about


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, D] times weight [E, D] transposed."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@torch.library.custom_op("nepa_dist::linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [n, D] times weight [E, D] transposed, plus bias [E], fp32, contiguous."""
    return _product(x, weight, bias)


@torch.library.custom_op("nepa_dist::linear_backward", mutates_args=())
def onednn_linear_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight from that of the output [n, E]."""
    gradient = gradient.contiguous()
    of_x = _product(gradient, weight.t().contiguous(), None)
    return of_x, _product(gradient.t().contiguous(), x.t().contiguous(), None)


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@onednn_linear_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight = onednn_linear_backward(gradient, *ctx.saved_tensors)
    return of_x, of_weight, gradient.sum(0)


onednn_linear.register_autograd(_backward, setup_context=_keep)


class Linear(nn.Linear):
    """A linear layer; a large one with ``onednn``, a bias, in fp32 and outside of autocast is oneDNN's."""

    onednn = False

    def forward(self, x: Tensor) -> Tensor:
        large = x.numel() * self.out_features >= FEWEST_PRODUCTS
        if not (self.onednn and large) or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or self.bias is None:
            return F.linear(x, self.weight, self.bias)
        rows = onednn_linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        out: Tensor = rows.unflatten(0, x.shape[:-1])
        return out
