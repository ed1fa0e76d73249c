"""What :mod:`benchmarks.kernels` times: the pieces of a block between its products, attention's inputs, the products.

Legend: B images, T tokens, n tokens of all images, D width, H hidden width of the MLP, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_dist import fused
from nepa_dist.config_model import ModelConfig
from nepa_dist.model import Rotary, rotary_table, rotate

BF16 = torch.bfloat16


class Piece(NamedTuple):
    """What lies between two products, by the project's kernels and by torch's operations."""

    name: str
    ours: Callable[..., Any]
    """Of the inputs to one output or a tuple of them."""
    plain: Callable[..., Any]
    """The same; leaves the bias alone."""
    inputs: tuple[Tensor, ...]
    """First the output of a product, in which its bias is already; then that bias; then others. All get gradients."""
    forward_bytes: int
    backward_bytes: int

    def pull(self, inputs: list[Tensor], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of all inputs by torch's operations."""
        product, bias, *others = inputs
        outputs, back = torch.func.vjp(lambda product, *others: self.plain(product, bias, *others), product, *others)
        of_product, *rest = back(gradients if isinstance(outputs, tuple) else gradients[0])
        return (of_product, of_product.flatten(0, -2).sum(0, dtype=torch.float32), *rest)


def _random(*shape: int, device: torch.device, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def make_pieces(model: ModelConfig, B: int, T: int, device: torch.device) -> Iterator[Callable[[], Piece]]:
    """The pieces of a block, in its order, each made when it is called for: the tensors are large."""
    yield from (partial(make, model, B, T, device) for make in (_heads, _add_norm, _activation, _add))


def _heads(model: ModelConfig, B: int, T: int, device: torch.device) -> Piece:
    D, N, K = model.embed_dim, model.num_heads, model.head_dim
    side = model.image_size // model.patch_size
    cos, sin = (table[:T] for table in rotary_table(model, (side, side), device))
    tables = Rotary(cos[:, None], sin[:, None])

    def ours(qkv: Tensor, bias: Tensor, weights: Tensor | None = None) -> Any:
        return fused.Heads.apply(qkv, bias, weights, cos, sin, N, model.norm_eps)

    def plain(qkv: Tensor, bias: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
        q, k, v = qkv.view(B, T, 3, N, K).unbind(2)
        scales = (None, None) if weights is None else weights.unbind()
        q, k = (F.layer_norm(x.float(), (K,), w, eps=model.norm_eps) for x, w in zip((q, k), scales, strict=True))
        return rotate(q, tables).to(v.dtype), rotate(k, tables).to(v.dtype), v

    inputs = [_random(B, T, 3 * D, device=device), _random(3 * D, device=device, dtype=torch.float32)]
    if model.qk_norm_affine:
        inputs.append(_random(2, K, device=device, dtype=torch.float32))
    # q and k to q and k, v stays; back: three gradients, q and k to one gradient three times as wide.
    return Piece("heads", ours, plain, tuple(inputs), B * T * 8 * D, B * T * 16 * D)


def _add_inputs(model: ModelConfig, B: int, T: int, device: torch.device) -> list[Tensor]:
    """A branch in bf16, its bias, the residual stream and the factors of LayerScale in fp32."""
    D = model.embed_dim
    shapes = ((D,), (B, T, D), (D,))
    return [_random(B, T, D, device=device), *(_random(*shape, device=device, dtype=torch.float32) for shape in shapes)]


def _add_norm(model: ModelConfig, B: int, T: int, device: torch.device) -> Piece:
    D = model.embed_dim

    def ours(branch: Tensor, bias: Tensor, x: Tensor, gamma: Tensor, weight: Tensor, shift: Tensor) -> Any:
        return fused.AddNorm.apply(x, branch, bias, gamma, None, weight, shift, model.norm_eps)

    def plain(branch: Tensor, bias: Tensor, x: Tensor, gamma: Tensor, weight: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        out = x + branch * gamma
        return out, F.layer_norm(out, (D,), weight, shift, model.norm_eps).to(branch.dtype)

    norm = (_random(D, device=device, dtype=torch.float32) for _ in range(2))
    # x and branch to sum and norm; back: both gradients, sum and branch to both gradients.
    return Piece("add_norm", ours, plain, (*_add_inputs(model, B, T, device), *norm), B * T * 12 * D, B * T * 18 * D)


def _activation(model: ModelConfig, B: int, T: int, device: torch.device) -> Piece:
    H, gated, gelu = model.mlp_hidden_dim_, model.gated_mlp, model.activation == "gelu"
    width = 2 * H if gated else H

    def ours(h: Tensor, bias: Tensor) -> Any:
        return fused.Activation.apply(h, bias, gated, gelu)

    def plain(h: Tensor, bias: Tensor) -> Tensor:
        act = F.gelu if gelu else F.silu
        if not gated:
            return act(h)
        gate, up = h.chunk(2, dim=-1)
        return act(gate) * up

    inputs = (_random(B, T, width, device=device), _random(width, device=device, dtype=torch.float32))
    # h to y; back: the gradient of y and h to the gradient of h.
    return Piece("activation", ours, plain, inputs, B * T * 2 * (width + H), B * T * 2 * (2 * width + H))


def _add(model: ModelConfig, B: int, T: int, device: torch.device) -> Piece:
    D = model.embed_dim

    def ours(branch: Tensor, bias: Tensor, x: Tensor, gamma: Tensor) -> Any:
        return fused.Add.apply(x, branch, bias, gamma, None)

    def plain(branch: Tensor, bias: Tensor, x: Tensor, gamma: Tensor) -> Tensor:
        return x + branch * gamma

    # x and branch to sum; back: its gradient, which is that of x, and branch to the gradient of branch.
    return Piece("add", ours, plain, tuple(_add_inputs(model, B, T, device)), B * T * 10 * D, B * T * 8 * D)


def attention_inputs(model: ModelConfig, B: int, T: int, device: torch.device) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, N, T, K] in bf16, laid out as a block gives them: values are a part of qkv."""
    N, K = model.num_heads, model.head_dim
    q, k = (torch.randn(B, T, N, K, device=device, dtype=BF16) for _ in range(2))
    v = torch.randn(B, T, 3, N, K, device=device, dtype=BF16)[:, :, 2]
    return tuple(x.transpose(1, 2).requires_grad_() for x in (q, k, v))


class Product(NamedTuple):
    """A linear layer of a block."""

    name: str
    sizes: str
    """Tokens x inputs x outputs."""
    flops: int
    """Of each of its three products."""
    runs: dict[str, Callable[[], Tensor]]


def make_products(model: ModelConfig, n: int, device: torch.device) -> Iterator[Product]:
    """The layers of a block, each with the products of forward and backward."""
    D, H = model.embed_dim, model.mlp_hidden_dim_
    up = ("gate_up", D, 2 * H) if model.gated_mlp else ("up", D, H)
    for name, inner, outer in (("qkv", D, 3 * D), ("proj", D, D), up, ("down", H, D)):
        shapes = ((n, inner), (outer, inner), (outer,), (n, outer))
        x, weight, bias, gradient = (torch.randn(shape, device=device, dtype=BF16) for shape in shapes)
        runs = {
            "forward with bias": partial(F.linear, x, weight, bias),
            "gradient of input": partial(torch.mm, gradient, weight),
            "gradient of weight": partial(torch.mm, gradient.T, x),
        }
        yield Product(name, f"{n} x {inner} x {outer}", 2 * n * inner * outer, runs)
