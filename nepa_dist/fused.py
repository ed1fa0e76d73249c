"""A block in few passes over memory: the same function as :meth:`nepa_dist.model.Block.forward`, with kernels of its own.

Between two matrix products there is one kernel each way. Biases are added by the products, as ever, but their gradients, sums
over tokens, are made where the gradient of the products is, and not in another pass over it. So a layer here gives its output
and its bias (:func:`_linear`), and what comes next is a function of both.

A backward pass keeps what the kernels before the products made, and of a sum its result: norms and activations are computed
again from it. Gradients have no gradients. Arithmetic is described in :mod:`nepa_dist.kernels`.

Legend: B images, T tokens, D width, H hidden width of the MLP, N heads, K head width.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nepa_dist.config import kernels_obstacle
from nepa_dist.linear import Linear
from nepa_dist.model import Block

if TYPE_CHECKING:
    from nepa_dist.config import EngineConfig, ModelConfig
    from nepa_dist.model import Rotary

_log = logging.getLogger(__name__)

kernels: Any = None
"""The module of the Triton kernels, once it is imported."""

PROGRAMS = 1056
"""Programs of a kernel that adds up, about: eight for each of the 132 multiprocessors of an H100."""
ROW_PROGRAMS = 528
"""The same where a program holds whole rows."""


def wanted(model: ModelConfig, engine: EngineConfig, device: torch.device) -> bool:
    """Whether blocks run on these kernels; if they do, the kernels are imported.

    With ``auto`` they do wherever they can; if it is only Triton that fails on this machine, a warning says so.

    Args:
        model: what the blocks are made of.
        engine: ``kernels`` and ``name``.
        device: where they will run.

    Raises:
        ValueError: they are asked for and cannot be used.
    """
    if engine.kernels == "torch":
        return False
    never = kernels_obstacle(model, engine, device.type)
    not_here = None if never else load() or _trial(device)
    reason = never or not_here
    if reason and engine.kernels == "triton":
        raise ValueError(f"engine.kernels triton: {reason}; use auto or torch")
    if not_here:
        _log.warning("engine.kernels auto: %s; blocks run on torch's operations, which is slower", not_here)
    return reason is None


def load() -> str | None:
    """Import the kernels, or say why it cannot be done."""
    global kernels
    try:
        from nepa_dist import kernels as module
    except ImportError as error:
        return f"Triton is missing ({error}): it comes with torch's builds for GPUs"
    kernels = module
    return None


def _trial(device: torch.device) -> str | None:
    """Run a kernel, or say why it cannot be done: that takes a C compiler, headers of Python and a GPU that Triton knows."""
    try:
        x = torch.ones(1, 1, 1, device=device)
        Add.apply(x, x.bfloat16(), None, x.flatten(), None)
    except Exception as error:
        return f"Triton cannot run a kernel here ({type(error).__name__}: {error})"
    return None


def block_forward(block: Block, x: Tensor, rotary: Rotary, causal: bool) -> Tensor:
    """See :meth:`nepa_dist.model.Block.forward`; to be bound to a block in its place.

    Without gradients it is that: who looks into a model hooks the parts of its blocks.
    """
    if not torch.is_grad_enabled():
        return Block.forward(block, x, rotary, causal)
    B, T, D = x.shape
    attn, mlp = block.attn, block.mlp
    parts: Any = block
    norm, k_norm = parts.attn.q_norm, parts.attn.k_norm
    qkv, bias = _linear(attn.qkv, block.norm1(x))
    weights = None if norm.weight is None else torch.stack([norm.weight, k_norm.weight])
    q, k, v = Heads.apply(qkv, bias, weights, rotary.cos, rotary.sin, attn.num_heads, norm.eps)
    y = attn.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal).transpose(1, 2).reshape(B, T, D)
    branch, bias = _linear(attn.proj, y)
    norm = block.norm2
    x, y = AddNorm.apply(x, branch, bias, parts.ls1.gamma, _kept(block, x), norm.weight, norm.bias, norm.eps)
    h, bias = _linear(mlp.gate_up if mlp.gated else mlp.up, y)
    y = Activation.apply(h, bias, mlp.gated, mlp.activation is F.gelu)
    branch, bias = _linear(mlp.down, y)
    out: Tensor = Add.apply(x, branch, bias, parts.ls2.gamma, _kept(block, x))
    return out


def _linear(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output of a layer, and its bias if its gradient is left to what comes next."""
    if type(layer) is Linear and layer.bias is not None:
        return F.linear(x, layer.weight, layer.bias.detach()), layer.bias
    return layer(x), None


def _kept(block: Block, x: Tensor) -> Tensor | None:
    """What drop path leaves of the branch of each image [B]; draws as the block itself does."""
    if not block.training or block.drop_path == 0:
        return None
    keep = 1 - block.drop_path
    return (torch.rand(len(x), 1, 1, device=x.device) < keep).flatten().float() / keep


def _power(width: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (width - 1).bit_length()


def _of_bias(sums: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else sums.to(dtype)


class Heads(torch.autograd.Function):
    """Queries and keys, normalised and rotated, and values, each [B, T, N, K], of qkv [B, T, 3 D]."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, weights: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, width = qkv.shape
        half = width // (6 * heads)
        qkv = qkv.contiguous()
        q, k = (torch.empty(B, T, heads, 2 * half, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
        scales = qkv if weights is None else weights
        grid = (heads * -(-B * T // 32),)
        sizes = {"EPS": eps, "HEADS": heads, "HALF": half, "AFFINE": weights is not None, "R": 32, "C": _power(half)}
        kernels.heads_forward[grid](qkv, cos, sin, scales, q, k, B * T, T, **sizes, num_warps=4)
        ctx.save_for_backward(qkv, weights, cos, sin)
        ctx.heads, ctx.eps, ctx.bias_dtype = heads, eps, None if bias is None else bias.dtype
        return q, k, qkv.view(B, T, 3, heads, 2 * half)[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weights, cos, sin = ctx.saved_tensors
        heads = ctx.heads
        B, T, width = qkv.shape
        half = width // (6 * heads)
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
        programs = max(1, min(PROGRAMS // heads, -(-B * T // 32)))
        dqkv = torch.empty_like(qkv)
        sums = torch.empty(programs, width, dtype=torch.float32, device=qkv.device)
        of_weights = torch.empty(programs * heads, 4 * half, dtype=torch.float32, device=qkv.device)
        scales = qkv if weights is None else weights
        sizes = {"EPS": ctx.eps, "HEADS": heads, "HALF": half, "AFFINE": weights is not None, "R": 32, "C": _power(half)}
        kernels.heads_backward[(heads, programs)](
            dq, dk, dv, qkv, cos, sin, scales, dqkv, sums, of_weights, B * T, T, **sizes, num_warps=4
        )
        dweights = None if weights is None else of_weights.sum(0).view(2, 2 * half).to(weights.dtype)
        return dqkv, _of_bias(sums.sum(0), ctx.bias_dtype), dweights, None, None, None, None


class AddNorm(torch.autograd.Function):
    """x + kept * gamma * branch [B, T, D], and its LayerNorm in the dtype of branch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        kept: Tensor | None,
        weight: Tensor,
        shift: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        B, T, D = x.shape
        x, branch = x.contiguous(), branch.contiguous()
        out = torch.empty(B, T, D, dtype=torch.promote_types(x.dtype, gamma.dtype), device=x.device)
        normed = torch.empty_like(branch)
        mean, scale = (torch.empty(B, T, dtype=torch.float32, device=x.device) for _ in range(2))
        sizes = {"EPS": eps, "D": D, "KEPT": kept is not None, "R": 1, "C": _power(D)}
        factors = gamma if kept is None else kept
        kernels.add_norm_forward[(B * T,)](
            x, branch, gamma, factors, weight, shift, out, normed, mean, scale, B * T, T, **sizes, num_warps=4
        )
        ctx.save_for_backward(out, branch, gamma, kept, weight, mean, scale)
        ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return out, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        out, branch, gamma, kept, weight, mean, scale = ctx.saved_tensors
        B, T, D = out.shape
        programs = min(ROW_PROGRAMS, B * T)
        dx = torch.empty(B, T, D, dtype=ctx.dtype, device=out.device)
        dbranch = torch.empty_like(branch)
        sums = torch.empty(programs, 4, D, dtype=torch.float32, device=out.device)
        sizes = {"D": D, "KEPT": kept is not None, "R": 1, "C": _power(D)}
        factors = gamma if kept is None else kept
        kernels.add_norm_backward[(programs,)](
            dout.contiguous(),
            dnormed.contiguous(),
            out,
            branch,
            gamma,
            factors,
            weight,
            mean,
            scale,
            dx,
            dbranch,
            sums,
            B * T,
            T,
            **sizes,
            num_warps=8,
        )
        of_weight, of_shift, of_gamma, of_branch = sums.sum(0)
        of_bias = _of_bias(of_branch, ctx.bias_dtype)
        dtypes = gamma.dtype, weight.dtype
        return dx, dbranch, of_bias, of_gamma.to(dtypes[0]), None, of_weight.to(dtypes[1]), of_shift.to(dtypes[1]), None


class Activation(torch.autograd.Function):
    """act(h) [B, T, H], or act(gate) * up of h = [gate, up] [B, T, 2 H]."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor | None, gated: bool, gelu: bool) -> Tensor:
        B, T, width = h.shape
        hidden = width // 2 if gated else width
        h = h.contiguous()
        y = torch.empty(B, T, hidden, dtype=h.dtype, device=h.device)
        grid = (-(-hidden // 128) * -(-B * T // 32),)
        kernels.activation_forward[grid](h, y, B * T, H=hidden, GATED=gated, GELU=gelu, R=32, C=128, num_warps=8)
        ctx.save_for_backward(h)
        ctx.gated, ctx.gelu, ctx.bias_dtype = gated, gelu, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        B, T, hidden = dy.shape
        columns = -(-hidden // 128)
        programs = max(1, min(PROGRAMS // columns, -(-B * T // 16)))
        dh = torch.empty_like(h)
        sums = torch.empty(programs, h.shape[2], dtype=torch.float32, device=h.device)
        sizes = {"H": hidden, "GATED": ctx.gated, "GELU": ctx.gelu, "R": 16, "C": 128}
        kernels.activation_backward[(columns, programs)](dy.contiguous(), h, dh, sums, B * T, **sizes, num_warps=8)
        return dh, _of_bias(sums.sum(0), ctx.bias_dtype), None, None


class Add(torch.autograd.Function):
    """x + kept * gamma * branch [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, bias: Tensor | None, gamma: Tensor, kept: Tensor | None) -> Tensor:
        B, T, D = x.shape
        x, branch = x.contiguous(), branch.contiguous()
        out = torch.empty(B, T, D, dtype=torch.promote_types(x.dtype, gamma.dtype), device=x.device)
        sizes = {"D": D, "KEPT": kept is not None, "R": 8, "C": 512}
        factors = gamma if kept is None else kept
        grid = (-(-D // 512) * -(-B * T // 8),)
        kernels.add_forward[grid](x, branch, gamma, factors, out, B * T, T, **sizes, num_warps=8)
        ctx.save_for_backward(branch, gamma, kept)
        ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        branch, gamma, kept = ctx.saved_tensors
        B, T, D = branch.shape
        columns = -(-D // 128)
        programs = max(1, min(2 * PROGRAMS // columns, -(-B * T // 16)))
        dbranch = torch.empty_like(branch)
        sums = torch.empty(programs, 2, D, dtype=torch.float32, device=branch.device)
        sizes = {"D": D, "KEPT": kept is not None, "R": 16, "C": 128}
        factors = gamma if kept is None else kept
        kernels.add_backward[(columns, programs)](
            dout.contiguous(), branch, gamma, factors, dbranch, sums, B * T, T, **sizes, num_warps=4
        )
        of_gamma, of_branch = sums.sum(0)
        return dout.to(ctx.dtype), dbranch, _of_bias(of_branch, ctx.bias_dtype), of_gamma.to(gamma.dtype), None
