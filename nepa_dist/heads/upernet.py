"""UPerNet on the outputs of four blocks of a plain vision transformer: a score per class and pixel.

All maps of a plain transformer have one resolution, so a neck first makes a pyramid of them: 4, 2, 1 and 1/2 times the patch
grid. UPerNet then pools the coarsest map at several scales, adds coarse maps to finer ones, and classifies all four together.

Norms are GroupNorm. Published recipes use SyncBatchNorm, whose statistics come from the images that happen to share a
micro-batch: the result would change with the number of accumulation steps, and a batch of two gives poor statistics. GroupNorm
looks at one image alone, so any split of a batch over ranks and micro-batches trains the same model. It also does the same in
training and evaluation, as long as images of one size go in: prefer windows of the training crop to whole images.

Averages over regions are matrix products and the 2 x 2 maximum is a reduction, because the pooling functions of torch have no
deterministic backward on a GPU.

Legend: B batch, D width, C classes, h and w rows and columns of patches, H and W height and width in pixels.

Sources: UPerNet arXiv 1807.10221; pyramid pooling arXiv 1612.01105; sizes, neck and auxiliary head as in MMSegmentation's
configuration for MAE, where ``channels`` is the width of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 4
AUXILIARY_FEATURE = 2

Size = tuple[int, int]


class PixelLogits(NamedTuple):
    """What the head returns."""

    logits: Tensor
    """[B, C, H, W]"""
    auxiliary: Tensor | None
    """[B, C, H, W] of the auxiliary head in training, None in evaluation."""


class UPerNetHead(nn.Module):
    """Neck, pyramid pooling, top-down fusion, classifier; and a small second head that helps the third map to train.

    Its initial weights are torch's; call ``init_weights`` of the model for weights keyed by a seed.

    Args:
        embed_dim: width D of the maps.
        num_classes: C.
        channels: width of the fused maps.
        pool_scales: cells on each axis into which the coarsest map is averaged.
        aux_channels: width of the auxiliary head.
        dropout: probability with which a channel of one image is dropped before each of the two classifiers.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        aux_channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        D, finer = embed_dim, NUM_FEATURES - 1
        self.pool_scales = tuple(pool_scales)
        self.neck = FeaturePyramid(D)
        self.pool = nn.ModuleList(_convolution(D, channels, 1) for _ in self.pool_scales)
        self.pool_fuse = _convolution(D + len(self.pool_scales) * channels, channels, 3)
        self.lateral = nn.ModuleList(_convolution(D, channels, 1) for _ in range(finer))
        self.smooth = nn.ModuleList(_convolution(channels, channels, 3) for _ in range(finer))
        self.fuse = _convolution(NUM_FEATURES * channels, channels, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))
        self.auxiliary = nn.Sequential(
            _convolution(D, aux_channels, 3), nn.Dropout2d(dropout), nn.Conv2d(aux_channels, num_classes, 1)
        )

    def forward(self, features: Sequence[Tensor], size: Size) -> PixelLogits:
        """Score every pixel.

        Args:
            features: four maps [B, D, h, w] from early to late blocks, usually at 1/4, 2/4, 3/4 and all of the depth.
            size: (H, W) of the scores, in pixels; usually that of the images.

        Raises:
            ValueError: there are not four maps.
        """
        if len(features) != NUM_FEATURES:
            raise ValueError(f"UPerNet needs the maps of {NUM_FEATURES} blocks, got {len(features)}")
        pyramid = self.neck(features)
        logits = resize(self.classifier(self._fuse(pyramid)), size)
        if not self.training:
            return PixelLogits(logits, None)
        return PixelLogits(logits, resize(self.auxiliary(pyramid[AUXILIARY_FEATURE]), size))

    def _fuse(self, pyramid: Sequence[Tensor]) -> Tensor:
        coarsest = pyramid[-1]
        regions = [
            resize(convolution(average_regions(coarsest, scale)), _size(coarsest))
            for scale, convolution in zip(self.pool_scales, self.pool, strict=True)
        ]
        above: Tensor = self.pool_fuse(torch.cat([coarsest, *regions], dim=1))
        maps = [above]  # from fine to coarse
        for finer, lateral, smooth in zip(pyramid[-2::-1], reversed(self.lateral), reversed(self.smooth), strict=True):
            above = lateral(finer) + resize(above, _size(finer))
            maps.insert(0, smooth(above))
        finest = _size(maps[0])
        fused: Tensor = self.fuse(torch.cat([maps[0], *(resize(x, finest) for x in maps[1:])], dim=1))
        return fused


class FeaturePyramid(nn.Module):
    """Four maps of one size become maps of 4, 2, 1 and 1/2 times that size; half of an odd size is rounded up.

    Args:
        embed_dim: width D of the maps, before and after.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(_double(embed_dim), _norm(embed_dim), nn.GELU(), _double(embed_dim))
        self.up2 = _double(embed_dim)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map four tensors [B, D, h, w] to [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w] and [B, D, h/2, w/2]."""
        first, second, third, fourth = features
        return [self.up4(first), self.up2(second), third, _halve(fourth)]


def average_regions(x: Tensor, scale: int) -> Tensor:
    """Average a map [B, D, h, w] over ``scale`` x ``scale`` regions that cover it evenly, as adaptive pooling does.

    Returns:
        [B, D, scale, scale]. Neighbouring regions overlap by one pixel where the size is no multiple of ``scale``.
    """
    rows, columns = (_average_matrix(length, scale, x) for length in _size(x))
    return ((x @ columns).mT @ rows).mT


def resize(x: Tensor, size: Size) -> Tensor:
    """Resize a map [B, D, h, w] to [B, D, *size] by bilinear interpolation between pixel centres."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _average_matrix(length: int, scale: int, like: Tensor) -> Tensor:
    """[length, scale]: column i averages from floor(i length / scale) to ceil((i + 1) length / scale), end excluded."""
    place = torch.arange(length, device=like.device)[:, None]
    region = torch.arange(scale, device=like.device)
    inside = (place >= region * length // scale) & (place < ((region + 1) * length + scale - 1) // scale)
    return inside.to(like.dtype) / inside.sum(0)


def _halve(x: Tensor) -> Tensor:
    """Maximum of each 2 x 2 square; an odd last row or column is a square of its own."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-math.inf)
    B, D, height, width = x.shape
    return x.view(B, D, height // 2, 2, width // 2, 2).amax(dim=(3, 5))


def _size(x: Tensor) -> Size:
    return x.shape[2], x.shape[3]


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), _norm(outputs), nn.ReLU())


def _double(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _norm(channels: int) -> nn.GroupNorm:
    # At most 32 groups of at least 8 channels: a region of one pixel has no other values to be normalised with.
    return nn.GroupNorm(max(1, math.gcd(32 * 8, channels) // 8), channels)
