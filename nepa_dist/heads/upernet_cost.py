"""What :class:`nepa_dist.heads.upernet.UPerNetHead` costs: parameters and floating point operations.

This module imports no torch, so that the command line can print a cost at once. Both formulas are checked against a count of
the real module in ``tests/test_upernet.py``. The arguments are those of the head.

Legend: D width of the backbone, C classes, h and w rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence


def num_parameters(
    embed_dim: int,
    num_classes: int,
    *,
    channels: int = 512,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    aux_channels: int = 256,
) -> int:
    """Number of trainable parameters of neck, head and auxiliary head."""
    D, C = embed_dim, num_classes
    neck = 3 * (4 * D * D + D) + 2 * D
    pool = len(pool_scales) * _convolution(D, channels, 1)
    pool_fuse = _convolution(D + len(pool_scales) * channels, channels, 3)
    top_down = 3 * (_convolution(D, channels, 1) + _convolution(channels, channels, 3))
    fuse = _convolution(4 * channels, channels, 3)
    classifiers = _convolution(D, aux_channels, 3) + (channels + 1) * C + (aux_channels + 1) * C
    return neck + pool + pool_fuse + top_down + fuse + classifiers


def forward_flops(
    embed_dim: int,
    num_classes: int,
    grid: tuple[int, int],
    *,
    channels: int = 512,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    aux_channels: int = 256,
    training: bool = False,
) -> int:
    """Floating point operations of the convolutions in one forward pass of one image (a multiply and an add are two).

    Norms, pooling and resizing are not counted: they are bound by memory, not by arithmetic.

    Args:
        grid: (h, w), in patches.
        training: count the auxiliary head as well.
    """
    D, C = embed_dim, num_classes
    n = grid[0] * grid[1]
    finest, coarsest, finer = 16 * n, -(-grid[0] // 2) * -(-grid[1] // 2), (16 + 4 + 1) * n
    neck = 8 * D * D * (n + 4 * n + n)
    pool = 2 * D * channels * sum(scale * scale for scale in pool_scales)
    pool_fuse = 18 * (D + len(pool_scales) * channels) * channels * coarsest
    top_down = finer * (2 * D * channels + 18 * channels * channels)
    fuse = finest * (18 * 4 * channels * channels + 2 * channels * C)
    auxiliary = n * (18 * D * aux_channels + 2 * aux_channels * C) if training else 0
    return neck + pool + pool_fuse + top_down + fuse + auxiliary


def activation_bytes(
    embed_dim: int,
    num_classes: int,
    grid: tuple[int, int],
    patch_size: int,
    *,
    channels: int = 512,
    aux_channels: int = 256,
    low_bytes: int = 2,
) -> int:
    """Estimated bytes that the head and its two losses keep of one training image for the backward pass.

    Convolutions keep their inputs in the precision of matrix products; norms, activations and the log-probabilities of every
    pixel are fp32.

    Args:
        grid: (h, w), in patches.
        patch_size: in pixels.
        low_bytes: of one number in a matrix product: 2 for bf16, 4 for fp32.
    """
    D, C, A = embed_dim, channels, aux_channels
    finer = 16 + 4 + 1  # pixels per patch of the three finer maps
    products = 6 * D + (D + 4 * C) / 4 + finer * (D + C) + 16 * 5 * C + D + A
    norms = 4 * D + C / 4 + 2 * finer * C + 16 * C + A
    activations = 4 * D + 1.25 * D + norms - 4 * D
    logits = 2 * num_classes * patch_size**2
    pixels = grid[0] * grid[1]
    if low_bytes == 4:  # one tensor is then the output of an activation and the input of the next convolution
        activations -= finer * C + 4 * D + A + C
    return int(pixels * (low_bytes * products + 4 * (norms + activations + logits)))


def _convolution(inputs: int, outputs: int, kernel: int) -> int:
    """Weights without bias, and scale and shift of the norm."""
    return inputs * outputs * kernel * kernel + 2 * outputs
