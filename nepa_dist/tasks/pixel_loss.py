"""Cross-entropy over pixels as a sum and a count, so that a mean over ranks and micro-batches can be exact."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
"""Label of pixels that count nowhere."""


def segmentation_loss(logits: Tensor, target: Tensor, *, ignore: int = IGNORE) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of all labelled pixels, and how many these are.

    The mean over a batch that is split in any way is the sum of the sums over the sum of the counts. A mean of means would
    weigh a pixel more where its part of the batch has few labelled ones.

    Args:
        logits: [B, C, H, W] float.
        target: [B, H, W] integer, in [0, C) or ``ignore``. Other values fail inside torch: IndexError on a CPU, on a GPU an
            assertion that ends the process; so labels are checked when data are prepared, not here.
        ignore: label of pixels that do not count.

    Returns:
        The sum, 0-d fp32 in nats, and the number of pixels, 0-d int64. Both are 0, and so is the gradient, where no pixel
        counts.

    Raises:
        ValueError: logits and target have different batch, height or width.
    """
    expected = (logits.shape[0], *logits.shape[2:])
    if target.shape != expected:
        raise ValueError(f"logits {list(logits.shape)} need targets {list(expected)}, got {list(target.shape)}")
    # Summed here and not in cross_entropy: its reduction over images has no deterministic kernel on a GPU.
    losses = F.cross_entropy(logits.float(), target.long(), ignore_index=ignore, reduction="none")
    return losses.sum(), (target != ignore).sum()
