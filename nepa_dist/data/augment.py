"""From decoded pixels to the square that the model sees: random resized crop and flip, or the centre.

Random numbers are keyed by (seed, epoch, sample id), so they need no state and do not depend on who draws them. The semantics
are torchvision's ``RandomResizedCrop`` and ``Resize`` + ``CenterCrop`` on Pillow images: bilinear with antialias.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.config import AugmentConfig
from nepa_dist.data.order import keyed_uniforms

AUGMENT_VERSION = 1
"""Rises when the same configuration and keys would give other pixels."""

_STREAM = 0x61756721  # keeps these draws apart from all others of the same seed
_ATTEMPTS = 10
# Draws of one sample: area and ratio of each attempt, left, top, flip.
_LEFT, _TOP, _FLIP, _NUM_DRAWS = 2 * _ATTEMPTS, 2 * _ATTEMPTS + 1, 2 * _ATTEMPTS + 2, 2 * _ATTEMPTS + 3


class _Crop(NamedTuple):
    """Left, top, width and height in pixels of the source (fractions allowed), and whether to mirror the result."""

    x: float
    y: float
    width: float
    height: float
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
    draws = keyed_uniforms(seed, _STREAM, epoch, sample_id, count=_NUM_DRAWS)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_ATTEMPTS):
        area = width * height * (scale[0] + float(draws[2 * attempt]) * (scale[1] - scale[0]))
        aspect = math.exp(low + float(draws[2 * attempt + 1]) * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[_LEFT] * (width - w + 1)), int(draws[_TOP] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (width - w) // 2, (height - h) // 2, w, h


def random_flip(seed: int, epoch: int, sample_id: int, probability: float) -> bool:
    """Draw whether a sample is mirrored, independent of its box."""
    return bool(keyed_uniforms(seed, _STREAM, epoch, sample_id, count=_NUM_DRAWS)[_FLIP] < probability)


def augment(
    image: NDArray[np.uint8], config: AugmentConfig, *, image_size: int, seed: int, epoch: int, sample_id: int
) -> NDArray[np.uint8]:
    """Crop, resize and flip one image.

    Args:
        image: uint8 [H, W, 3].
        config: crop ``random_resized``: the crop, then the resize, so nothing outside the box is seen; ``center``: short side
            to image_size and the middle of the long side, no flip.
        image_size: S, pixels.
        seed, epoch, sample_id: key of the random draws; not used by ``center``.

    Returns:
        uint8 [S, S, 3].
    """
    crop = _crop(image.shape[1], image.shape[0], config, seed, epoch, sample_id)
    size = (image_size, image_size)
    if config.crop == "random_resized":
        x, y, w, h = (int(value) for value in crop[:4])
        # Pillow is slow with arrays that are not contiguous.
        region = Image.fromarray(np.ascontiguousarray(image[y : y + h, x : x + w]))
        resized = region.resize(size, Image.Resampling.BILINEAR)
    else:
        # One resize from the central square: the long side is never resized in full, whatever the aspect ratio.
        box = (crop.x, crop.y, crop.x + crop.width, crop.y + crop.height)
        resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box=box)
    if crop.flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(resized)


def augment_mask(
    mask: NDArray[np.integer[Any]], config: AugmentConfig, *, image_size: int, seed: int, epoch: int, sample_id: int
) -> NDArray[np.integer[Any]]:
    """The same crop and flip for the class mask of an image, with the nearest pixel.

    Args:
        mask: integer [H, W] with the height and width of the image.
        config, image_size, seed, epoch, sample_id: as given to :func:`augment`.

    Returns:
        [S, S], dtype of the mask.
    """
    crop = _crop(mask.shape[1], mask.shape[0], config, seed, epoch, sample_id)
    centres = (np.arange(image_size) + 0.5) / image_size
    rows = (crop.y + centres * crop.height).astype(np.int64)
    columns = (crop.x + centres * crop.width).astype(np.int64)
    picked: NDArray[np.integer[Any]] = mask[np.ix_(rows, columns[::-1] if crop.flip else columns)]
    return picked


def _crop(width: int, height: int, config: AugmentConfig, seed: int, epoch: int, sample_id: int) -> _Crop:
    if config.crop == "center":
        side = min(width, height)
        return _Crop((width - side) / 2, (height - side) / 2, side, side, flip=False)
    box = random_resized_crop_box(width, height, seed, epoch, sample_id, config.scale, config.ratio)
    return _Crop(*box, flip=random_flip(seed, epoch, sample_id, config.flip))
