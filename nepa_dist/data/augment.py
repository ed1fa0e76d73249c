"""From decoded pixels to the square that the model sees: random resized crop and flip, or the centre.

Random numbers are keyed by (seed, epoch, sample id), so they need no state and do not depend on who draws them. The semantics
are torchvision's ``RandomResizedCrop`` and ``Resize`` + ``CenterCrop`` on Pillow images, with antialias. Random crops, which
training waits for, are resized by torch: three times as fast as Pillow and, for a photograph, within one level of it (two for
pure noise). The centre, which decides scores, is resized by Pillow itself.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from nepa_dist.config import AugmentConfig
from nepa_dist.data.order import KeyedDraws

AUGMENT_VERSION = 2
"""Rises when the same configuration and keys would give other pixels."""

Interpolation = Literal["bilinear", "bicubic"]
Mask = NDArray[np.integer[Any]]

_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_STREAM = 0x61756721  # keeps these draws apart from all others of the same seed
_ATTEMPTS = 10
# Draws of one sample: area and ratio of each attempt, left, top, flip.
_LEFT, _TOP, _FLIP = 2 * _ATTEMPTS, 2 * _ATTEMPTS + 1, 2 * _ATTEMPTS + 2


class Transform(Protocol):
    """Makes of one decoded sample what goes into the batch. It must depend on its arguments alone, and can be forked."""

    def __call__(
        self, pixels: NDArray[np.uint8], mask: Mask | None, /, *, image_size: int, seed: int, epoch: int, sample_id: int
    ) -> tuple[NDArray[np.uint8], Mask | None]:
        """Transform one sample.

        Args:
            pixels: uint8 [H, W, 3]; it may be read-only.
            mask: integer [H, W], the class of each pixel; None if the loader gives no masks.
            image_size: S, pixels.
            seed, epoch, sample_id: key of all random draws.

        Returns:
            uint8 [S, S, 3], and the mask [S, S] of it with values 0 .. 255, or None if none was given.
        """


class CropTransform:
    """The :class:`Transform` of pretraining: :func:`augment`, and of a mask the same crop and flip, with the nearest pixel."""

    def __init__(self, config: AugmentConfig, interpolation: Interpolation = "bilinear") -> None:
        self._config = config
        self._interpolation = interpolation

    def __call__(
        self, pixels: NDArray[np.uint8], mask: Mask | None, /, *, image_size: int, seed: int, epoch: int, sample_id: int
    ) -> tuple[NDArray[np.uint8], Mask | None]:
        """See :class:`Transform`."""
        crop = _crop(pixels.shape[1], pixels.shape[0], self._config, seed, epoch, sample_id)
        if self._config.crop == "center":
            image = cut_center(pixels, image_size, interpolation=self._interpolation)
        else:
            image = _cut_random(pixels, crop, image_size, self._interpolation)
        return image, None if mask is None else _cut_mask(mask, crop, image_size)


class _Crop(NamedTuple):
    """Left, top, width and height in pixels of the source, and whether to mirror the result."""

    x: float
    y: float
    width: int
    height: int
    flip: bool


def random_resized_crop_box(
    width: int,
    height: int,
    seed: int,
    epoch: int,
    sample_id: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    Ten attempts draw an area and a log-uniform ratio; the first box that fits is placed at random. If none fits, the result is
    the largest central box whose ratio is within the range.

    Args:
        width, height: of the image, pixels.
        seed, epoch, sample_id: key of the draw.
        scale: range of the box's area over the image's area, within (0, 1].
        ratio: range of the box's width over height.

    Returns:
        (x, y, w, h) in pixels, inside the image.
    """
    return _draw_box(width, height, KeyedDraws(seed, _STREAM, epoch, sample_id), scale, ratio)


def resize(image: NDArray[np.uint8], height: int, width: int, interpolation: Interpolation = "bilinear") -> NDArray[np.uint8]:
    """Resize with antialias, as Pillow does: a filter that grows with the factor when it shrinks.

    Args:
        image: uint8 [H, W, 3].
        height, width: of the result, pixels.
        interpolation: ``bicubic`` differs from Pillow's beyond one level only where it overshoots black or white and one side
            shrinks while the other grows.

    Returns:
        uint8 [height, width, 3].
    """
    # A copy, because torch warns of arrays that are read-only; it would make one of a part of an image anyway.
    pixels = torch.from_numpy(image.copy())[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(pixels, (height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def augment(
    image: NDArray[np.uint8],
    config: AugmentConfig,
    *,
    image_size: int,
    seed: int,
    epoch: int,
    sample_id: int,
    interpolation: Interpolation = "bilinear",
) -> NDArray[np.uint8]:
    """Crop, resize and flip one image.

    Args:
        image: uint8 [H, W, 3].
        config: crop ``random_resized``: the crop, then the resize, so nothing outside the box is seen; ``center``: short side
            to image_size and the middle of the long side, no flip.
        image_size: S, pixels.
        seed, epoch, sample_id: key of the random draws; not used by ``center``.
        interpolation: see :func:`resize`.

    Returns:
        uint8 [S, S, 3].
    """
    image_and_mask = CropTransform(config, interpolation)(
        image, None, image_size=image_size, seed=seed, epoch=epoch, sample_id=sample_id
    )
    return image_and_mask[0]


def cut_center(
    image: NDArray[np.uint8],
    size: int,
    *,
    resize_to: float = 1.0,
    squash: bool = False,
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Resize an image, short side to ``resize_to`` x S, and keep its centre.

    Args:
        image: uint8 [H, W, 3].
        size: S, pixels.
        resize_to: at least 1.
        squash: resize to a square of that side instead, so that the aspect ratio changes.
        interpolation: Pillow's, with antialias.

    Returns:
        uint8 [S, S, 3].
    """
    height, width = image.shape[:2]
    share = size / round(size * resize_to)  # of the resized image that is kept
    kept_width, kept_height = (width * share, height * share) if squash else (min(width, height) * share,) * 2
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    # One resize from the part that is kept: the rest is never resized.
    return np.asarray(Image.fromarray(image).resize((size, size), _PILLOW[interpolation], box=box))


def _crop(width: int, height: int, config: AugmentConfig, seed: int, epoch: int, sample_id: int) -> _Crop:
    if config.crop == "center":
        side = min(width, height)
        return _Crop((width - side) / 2, (height - side) / 2, side, side, flip=False)
    draws = KeyedDraws(seed, _STREAM, epoch, sample_id)
    return _Crop(*_draw_box(width, height, draws, config.scale, config.ratio), flip=draws[_FLIP] < config.flip)


def _draw_box(
    width: int, height: int, draws: KeyedDraws, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_ATTEMPTS):
        area = width * height * (scale[0] + draws[2 * attempt] * (scale[1] - scale[0]))
        aspect = math.exp(low + draws[2 * attempt + 1] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[_LEFT] * (width - w + 1)), int(draws[_TOP] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (width - w) // 2, (height - h) // 2, w, h


def _cut_random(image: NDArray[np.uint8], crop: _Crop, size: int, interpolation: Interpolation) -> NDArray[np.uint8]:
    x, y = int(crop.x), int(crop.y)
    resized = resize(image[y : y + crop.height, x : x + crop.width], size, size, interpolation)
    # torch mirrors 20 times faster than numpy copies a reversed view.
    return torch.from_numpy(resized).flip(1).numpy() if crop.flip else resized


def _cut_mask(mask: Mask, crop: _Crop, size: int) -> Mask:
    centres = (np.arange(size) + 0.5) / size
    rows = (crop.y + centres * crop.height).astype(np.int64)
    columns = (crop.x + centres * crop.width).astype(np.int64)
    picked: Mask = mask[np.ix_(rows, columns[::-1] if crop.flip else columns)]
    return picked
