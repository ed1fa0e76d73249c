"""Scaled dot-product attention: the ways to compute it, and which one a device gets.

All of them are the same function up to rounding. On a GPU they are torch's, which never store the scores. On a CPU torch's own
kernel takes its products in fp32 also where the inputs are bf16; ``dense`` stores the scores instead and leaves the products to
the matrix library, which is faster where there are few tokens.

Legend: B batch, H heads, T tokens, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(queries, keys, values, each [B, H, T, K] of one dtype; causal) to [B, H, T, K]."""

TILE = 128
"""Rows of ``dense`` that are computed together; of a causal row only the tiles up to its own count."""
DENSE_TOKENS = 512
"""Up to this many tokens a CPU stores the scores."""

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention by torch, which chooses among its kernels."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention by batched matrix products; keeps B H T^2 numbers for backward, or nearly half of them if causal.

    Scores have the dtype of the inputs, their softmax is taken in fp32.
    """
    B, H, T, K = q.shape
    q, k, v = ((q * K**-0.5).reshape(B * H, T, K), k.reshape(B * H, T, K), v.reshape(B * H, T, K))
    rows = []
    for start in range(0, T, TILE if causal else T):
        end = min(start + TILE, T) if causal else T
        tile, seen = q[:, start:end], k[:, :end].mT
        if causal:
            later = torch.full((end - start, end), -math.inf, dtype=q.dtype, device=q.device).triu(start + 1)
            scores = torch.baddbmm(later.expand(B * H, -1, -1), tile, seen)
        else:
            scores = torch.bmm(tile, seen)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        rows.append(torch.bmm(weights, v[:, :end]))
    return torch.cat(rows, dim=1).view(B, H, T, K)


def few_dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """``dense`` up to DENSE_TOKENS tokens, beyond that ``sdpa``."""
    return (dense if q.shape[2] <= DENSE_TOKENS else sdpa)(q, k, v, causal)


def choose_attention(name: str, device: torch.device) -> Attend:
    """The implementation that a setting (``engine.attention``) means on a device.

    Raises:
        ValueError: the device or the installation does not have it.
    """
    if name == "auto":
        return few_dense if device.type == "cpu" else sdpa
    if name in ("sdpa", "dense"):
        return sdpa if name == "sdpa" else dense
    if device.type != "cuda":
        raise ValueError(f"engine.attention {name} needs a GPU; {device.type} has auto, sdpa and dense")
    if name == "fa3":
        try:
            from torch.nn.attention import activate_flash_attention_impl

            activate_flash_attention_impl("FA3")  # torch's flash kernel is this one now, for the whole process
        except Exception as error:  # of whatever kind: an old torch, a package that is missing or made for another GPU
            raise ValueError(f"engine.attention fa3: FlashAttention-3 cannot be used: {error}") from error
    return _by_kernel(_KERNELS["flash" if name == "fa3" else name])


def _by_kernel(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend
