"""Scores for images of any size from a model that wants certain sizes: by windows, by padding, at several scales.

Windows lie as in MMSegmentation's ``slide`` mode: from the left and the top at equal steps, the last one flush with the border.
Call these functions without gradients and with the model in eval mode; they set neither.

Legend: B batch, C classes, H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_dist.heads.upernet import resize

ScoreFn = Callable[[Tensor], Tensor]
"""Maps images [B, 3, H, W], normalised, to logits [B, C, H, W]."""


def slide_logits(model_fn: ScoreFn, images: Tensor, *, crop: int, stride: int, num_classes: int) -> Tensor:
    """Mean of the logits of all windows that cover a pixel.

    Args:
        model_fn: called once per window, with images [B, 3, crop, crop].
        images: [B, 3, H, W], normalised. Where H or W is less than ``crop``, zeros are added at the bottom or the right, and
            their scores are cut off.
        crop: side of a window in pixels.
        stride: from one window to the next in pixels.
        num_classes: C.

    Returns:
        [B, C, H, W] fp32.

    Raises:
        ValueError: the stride is not in [1, crop], or ``model_fn`` returns another shape than [B, num_classes, crop, crop].
    """
    if not 1 <= stride <= crop:
        raise ValueError(f"stride {stride} must be at least 1 and at most the crop {crop}: larger steps would leave out pixels")
    height, width = images.shape[2:]
    padded = _padded(images, max(height, crop), max(width, crop))
    shape = (len(images), num_classes, crop, crop)
    total = torch.zeros(len(images), num_classes, *padded.shape[2:], device=images.device)
    count = torch.zeros(padded.shape[2:], device=images.device)
    for top in window_starts(height, crop, stride):
        for left in window_starts(width, crop, stride):
            window = (..., slice(top, top + crop), slice(left, left + crop))
            logits = model_fn(padded[window])
            if logits.shape != shape:
                raise ValueError(f"the model returned logits {list(logits.shape)} for a window, expected {list(shape)}")
            total[window] += logits
            count[window] += 1
    return (total / count)[..., :height, :width]


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of the windows on one axis: 0, stride, ... and, flush with the border, length - crop."""
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def whole_logits(model_fn: ScoreFn, images: Tensor, *, patch_size: int) -> Tensor:
    """Logits of whole images, filled up with zeros at the bottom and the right to multiples of the patch size.

    Args:
        model_fn: called once.
        images: [B, 3, H, W], normalised.
        patch_size: in pixels.

    Returns:
        [B, C, H, W] fp32.
    """
    height, width = images.shape[2:]
    padded = _padded(images, -(-height // patch_size) * patch_size, -(-width // patch_size) * patch_size)
    return model_fn(padded)[..., :height, :width].float()


def mean_probabilities(
    logits_fn: ScoreFn, images: Tensor, *, patch_size: int, ratios: Sequence[float] = (1.0,), flip: bool = False
) -> Tensor:
    """Mean of the class probabilities over scales and, if wanted, over the mirrored images as well.

    Args:
        logits_fn: scores images of any size, such as :func:`slide_logits` or :func:`whole_logits` with their options.
        images: [B, 3, H, W], normalised.
        patch_size: in pixels. A scaled image has the nearest multiple of it on each axis, at least one patch.
        ratios: scales; at 1 the images stay as they are.
        flip: also score each scale mirrored left to right.

    Returns:
        [B, C, H, W] fp32, 1 in the sum over classes.

    Raises:
        ValueError: there are no ratios, or one is not positive.
    """
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"ratios must be one or more positive numbers, got {list(ratios)}")
    size = (images.shape[2], images.shape[3])
    total = torch.zeros((), device=images.device)
    for ratio in ratios:
        scaled = images if ratio == 1 else _scaled(images, ratio, patch_size)
        for mirrored in (False, True) if flip else (False,):
            logits = logits_fn(scaled.flip(-1)).flip(-1) if mirrored else logits_fn(scaled)
            total = total + resize(logits.float(), size).softmax(1)
    return total / (len(ratios) * (2 if flip else 1))


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Most likely class of each pixel, after the scores were resized to the size of the mask that they are compared with.

    Args:
        scores: [B, C, h, w] logits or probabilities.
        size: (H, W) of the mask.

    Returns:
        [B, H, W] int64.
    """
    return resize(scores, size).argmax(1)


def _scaled(images: Tensor, ratio: float, patch_size: int) -> Tensor:
    size = [max(1, int(length * ratio / patch_size + 0.5)) * patch_size for length in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def _padded(images: Tensor, height: int, width: int) -> Tensor:
    return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
