"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) of a micro-batch, on the device.

Semantics of timm's ``Mixup`` in mode ``batch``: sample i is mixed with sample B - 1 - i, and one weight holds for all of them.
Random numbers are keyed by (seed, step, micro-batch), so a resumed run repeats them and another number of ranks does not change
them.

Suffix letters: B samples, C classes, H and W height and width in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nepa_dist.data.order import keyed_uniforms

_STREAM = 0x6D697875  # keeps these draws apart from all others of the same seed
_NUM_DRAWS = 6  # whether, which of the two, centre x and y of the box, two words of a seed


class Mix(NamedTuple):
    """How the samples of a micro-batch are mixed."""

    weight: float
    """Share of a sample's own label, in [0, 1]; the rest is its partner's. 1 is no mixing."""
    box: tuple[int, int, int, int] | None
    """CutMix: (x, y, w, h) in pixels, the part that comes from the partner. None: both images are blended by weight."""


@dataclass(frozen=True)
class Mixup:
    """Mixes images and gives the labels that belong to them, smoothed.

    Args:
        num_classes: C.
        mixup_alpha: the weight of mixup is Beta(alpha, alpha); 0 is no mixup.
        cutmix_alpha: the same for CutMix, before the box is clipped at the border.
        switch_prob: probability of CutMix where both are on.
        prob: probability that a micro-batch is mixed at all.
        label_smoothing: share of the label that is spread over all classes evenly.

    Raises:
        ValueError: an argument is out of its range.
    """

    num_classes: int
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    switch_prob: float = 0.5
    prob: float = 1.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("switch_prob", "prob", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def draw(self, height: int, width: int, *, seed: int, step: int, micro_batch: int) -> Mix:
        """Draw how a micro-batch is mixed.

        Args:
            height, width: of the images, pixels.
            seed, step, micro_batch: see :meth:`__call__`.
        """
        whether, which, x, y, *words = keyed_uniforms(seed, _STREAM, step, micro_batch, count=_NUM_DRAWS).tolist()
        if whether >= self.prob or not (self.mixup_alpha or self.cutmix_alpha):
            return Mix(1.0, None)
        cut = bool(self.cutmix_alpha) and (not self.mixup_alpha or which < self.switch_prob)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        # The one generator of numpy whose stream is frozen for ever (NEP 19); a beta deviate takes an unknown number of draws.
        weight = float(np.random.RandomState([int(word * 2**32) for word in words]).beta(alpha, alpha))
        return _cut(height, width, weight, int(x * width), int(y * height)) if cut else Mix(weight, None)

    def __call__(self, images: Tensor, labels: Tensor, *, seed: int, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Mix a micro-batch.

        Args:
            images: floating point [B, 3, H, W], not changed. With an odd B the middle one stays as it is.
            labels: int64 [B], in [0, C); another value is an indexing error of the device.
            seed: of the run.
            step: finished optimizer updates.
            micro_batch: index in the global batch: rank x gradient accumulation steps + micro-batch of the rank.

        Returns:
            Images [B, 3, H, W], dtype and memory layout of the argument, and soft labels float32 [B, C] whose rows sum to 1.

        Raises:
            ValueError: images are not floating point [B, 3, H, W], or labels are not int64 [B].
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"mixup needs floating-point images [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"mixup needs int64 labels [{len(images)}], got {labels.dtype} {list(labels.shape)}")
        mix = self.draw(images.shape[2], images.shape[3], seed=seed, step=step, micro_batch=micro_batch)
        targets = self.soft_labels(labels)
        if mix.weight == 1:
            return images, targets
        if mix.box is None:
            images = torch.lerp(images.flip(0), images, mix.weight)
        else:
            x, y, w, h = mix.box
            part = images[:, :, y : y + h, x : x + w].flip(0)
            images = images.clone()
            images[:, :, y : y + h, x : x + w] = part
        return images, torch.lerp(targets.flip(0), targets, mix.weight)

    def soft_labels(self, labels: Tensor) -> Tensor:
        """Smoothed labels without mixing.

        Args:
            labels: int64 [B], in [0, C).

        Returns:
            float32 [B, C]: 1 - s + s / C for the label and s / C for the others, where s is label_smoothing.
        """
        low = self.label_smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), low, dtype=torch.float32, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1 - self.label_smoothing + low)


def _cut(height: int, width: int, weight: float, x: int, y: int) -> Mix:
    """A box around (x, y) with the image's proportions and a share of 1 - weight, clipped; the weight follows what is left."""
    side = math.sqrt(1 - weight)
    half_w, half_h = int(width * side) // 2, int(height * side) // 2
    left, right = max(x - half_w, 0), min(x + half_w, width)
    top, bottom = max(y - half_h, 0), min(y + half_h, height)
    w, h = right - left, bottom - top
    return Mix(1 - w * h / (width * height), (left, top, w, h))
