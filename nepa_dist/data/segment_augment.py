"""From a photograph and its class mask to the square pair that segmentation trains on, and the resize for evaluation.

The steps and their numbers are those of MMSegmentation's ADE20K pipeline: random resize with the aspect ratio kept, random crop
that no class may fill, flip, photometric distortion, padding. Differences: images are resized by Pillow's bilinear filter with
antialias; mask pixels are picked at the centre of each output pixel, so that they lie on the image; saturation and hue change
in one conversion to HSV. Random numbers are keyed by (seed, epoch, sample id).

Suffix letters: H and W height and width, S side of the crop, all in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.config import SegmentConfig
from nepa_dist.data.color_jitter import shift_hue
from nepa_dist.data.decode import BadImage
from nepa_dist.data.order import keyed_uniforms

IGNORE = 255
"""Mask value of pixels without a class; they count in no loss and in no score."""

_STREAM = 0x7365676D  # keeps these draws apart from all others of the same seed
_CROP_ATTEMPTS = 10
# Draws of one sample: scale, flip, photometric; then left and top of each box.
_SCALE, _FLIP, _PHOTOMETRIC, _NUM_PHOTOMETRIC = 0, 1, 2, 9
_BOXES = _PHOTOMETRIC + _NUM_PHOTOMETRIC
_NUM_DRAWS = _BOXES + 2 * (_CROP_ATTEMPTS + 1)

_BRIGHTNESS = 32.0  # levels, up or down
_CONTRAST = (0.5, 1.5)  # factor
_SATURATION = (0.5, 1.5)  # factor
_HUE = 18 / 180  # of the colour circle, either way

Mask = NDArray[np.integer[Any]]


def reduce_zero_label(mask: Mask) -> Mask:
    """Make class 0 the ignored one and number the others from 0, as ADE20K with 150 classes needs it.

    Args:
        mask: integer [H, W] of any type that can hold IGNORE.

    Returns:
        [H, W], same type: 0 and IGNORE become IGNORE, any other value v becomes v - 1.

    Raises:
        ValueError: the type cannot hold IGNORE.
    """
    _check_mask_type(mask)
    reduced: Mask = np.where((mask == 0) | (mask == IGNORE), mask.dtype.type(IGNORE), mask - mask.dtype.type(1))
    return reduced


def class_mask(mask: Mask, config: SegmentConfig) -> NDArray[np.uint8]:
    """The classes of a mask as the loss and the scores count them: from 0, IGNORE where there is none.

    Args:
        mask: integer [H, W] as the data has it.
        config: whether 0 is no class, and how many classes there are.

    Returns:
        uint8 [H, W].

    Raises:
        BadImage: a class that does not exist.
    """
    wide = mask if np.iinfo(mask.dtype).max >= IGNORE else mask.astype(np.int64)
    offset, limit = int(config.reduce_zero_label), config.num_classes or IGNORE
    known = wide[(wide != IGNORE) & ((wide != 0) | (not config.reduce_zero_label))]
    if known.size and not offset <= known.min() <= known.max() < limit + offset:
        raise BadImage(
            f"the mask has class values from {known.min()} to {known.max()}, but there are {limit} classes, "
            f"{offset} to {limit - 1 + offset} (segment.num_classes, segment.reduce_zero_label)"
        )
    classes = reduce_zero_label(wide) if config.reduce_zero_label else wide
    return classes.astype(np.uint8)


def rescaled_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Largest size with the same aspect ratio whose long side is at most max(scale) and short side at most min(scale).

    Args:
        height, width: of the image, pixels.
        scale: pixels, for example (2048, 512): the short side becomes 512 unless the aspect ratio is above 4.

    Returns:
        (height, width), each rounded to the nearest pixel and at least 1.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_for_evaluation(image: NDArray[np.uint8], scale: tuple[int, int] = (2048, 512)) -> NDArray[np.uint8]:
    """Resize an image for evaluation, aspect ratio kept; its mask keeps its own size, to which the scores are resized.

    Args:
        image: uint8 [H, W, 3].
        scale: limits of long and short side, see :func:`rescaled_size`; take (4 S, S) for a crop of S.

    Returns:
        uint8 [H', W', 3]. The short side is less than min(scale) where the long side reached its limit first.
    """
    height, width = rescaled_size(image.shape[0], image.shape[1], scale)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def augment_segment(
    image: NDArray[np.uint8],
    mask: Mask,
    *,
    crop_size: int,
    seed: int,
    epoch: int,
    sample_id: int,
    scale: tuple[int, int] = (2048, 512),
    ratio_range: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    flip: float = 0.5,
    photometric: bool = True,
    fill: tuple[int, int, int] = (128, 128, 128),
) -> tuple[NDArray[np.uint8], Mask]:
    """Resize, crop, flip, recolour and pad one training pair.

    A ratio r uniform in ratio_range gives limits (int(scale[0] r), int(scale[1] r)) for :func:`rescaled_size`. A box of S x S
    is placed in that size at random, up to ten times more while one class fills cat_max_ratio or more of its labelled pixels.
    Where the resized image is smaller than S, it is padded at the right and at the bottom, after the change of colours.

    Args:
        image: uint8 [H, W, 3], RGB; not changed.
        mask: integer [H, W], classes from 0, IGNORE where there is none; not changed.
        crop_size: S.
        seed, epoch, sample_id: key of the random draws.
        scale: limits of long and short side at ratio 1.
        ratio_range: of the random scale.
        cat_max_ratio: largest share of one class in the crop; 1 takes the first box.
        flip: probability of a horizontal flip.
        photometric: change brightness, contrast, saturation and hue, each with probability 0.5.
        fill: colour of the padding; the mean of the normalisation makes it 0 for the model.

    Returns:
        Image uint8 [S, S, 3] and mask [S, S] of the mask's type, padded with IGNORE.

    Raises:
        ValueError: the mask has not the image's height and width, or its type cannot hold IGNORE.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask is {mask.shape}, but the image is {image.shape[:2]} (height, width)")
    _check_mask_type(mask)
    draws = keyed_uniforms(seed, _STREAM, epoch, sample_id, count=_NUM_DRAWS)
    ratio = _between(ratio_range, draws[_SCALE])
    limits = (max(1, int(scale[0] * ratio)), max(1, int(scale[1] * ratio)))
    rows, columns = _crop(mask, rescaled_size(mask.shape[0], mask.shape[1], limits), crop_size, cat_max_ratio, draws[_BOXES:])
    labels = _picked(mask, rows, columns)
    picture = _resized_part(image, rows, columns)
    if draws[_FLIP] < flip:
        labels, picture = labels[:, ::-1], picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if photometric:
        picture = _distort(picture, draws[_PHOTOMETRIC:_BOXES])
    height, width = labels.shape
    padded_image = np.empty((crop_size, crop_size, 3), np.uint8)
    padded_image[:] = fill
    padded_image[:height, :width] = np.asarray(picture)
    padded_mask = np.full((crop_size, crop_size), IGNORE, mask.dtype)
    padded_mask[:height, :width] = labels
    return padded_image, padded_mask


class _Span:
    """Part of one axis of the resized image, ``start`` to ``stop`` of ``resized`` pixels, and where it lies in the source.

    Args:
        source, resized: length of the axis in pixels.
        size: wanted length; less if the axis is shorter.
        draw: in [0, 1), the place.
    """

    def __init__(self, source: int, resized: int, size: int, draw: float) -> None:
        self.length = min(size, resized)
        start = int(draw * (resized - self.length + 1))
        step = source / resized
        self.low, self.high = start * step, min((start + self.length) * step, source)
        self.nearest = ((np.arange(start, start + self.length) + 0.5) * step).astype(np.int64)


def _crop(
    mask: Mask, size: tuple[int, int], crop_size: int, cat_max_ratio: float, draws: NDArray[np.float64]
) -> tuple[_Span, _Span]:
    """Rows and columns of a box that no class fills; the last one that was drawn if there is none among the first ten."""
    for top, left in draws.reshape(-1, 2).tolist():
        rows = _Span(mask.shape[0], size[0], crop_size, top)
        columns = _Span(mask.shape[1], size[1], crop_size, left)
        if cat_max_ratio >= 1 or _largest_share(_picked(mask, rows, columns)) < cat_max_ratio:
            break
    return rows, columns


def _picked(mask: Mask, rows: _Span, columns: _Span) -> Mask:
    # Rows first: far faster than both at once.
    return mask.take(rows.nearest, axis=0).take(columns.nearest, axis=1)


def _largest_share(mask: Mask) -> float:
    """Share of the most frequent class among the pixels with a class; 1 if there are none."""
    if mask.dtype == np.uint8:
        counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE]  # much faster than the general way
    else:
        classes, counts = np.unique(mask, return_counts=True)
        counts = counts[classes != IGNORE]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def _resized_part(image: NDArray[np.uint8], rows: _Span, columns: _Span) -> Image.Image:
    # Only the crop is computed, from the pixels it needs: equal to a resize of the whole image and a crop, at less cost.
    box = (columns.low, rows.low, columns.high, rows.high)
    return Image.fromarray(image).resize((columns.length, rows.length), Image.Resampling.BILINEAR, box=box)


def _distort(image: Image.Image, draws: NDArray[np.float64]) -> Image.Image:
    """Brightness, then saturation and hue, with contrast before or after these.

    Draws: whether and how much, for brightness, contrast, saturation and hue; then whether contrast comes before.
    """
    whether, amounts = draws[0:8:2] < 0.5, draws[1:8:2]
    brightness = 2 * _BRIGHTNESS * (amounts[0] - 0.5) if whether[0] else 0.0
    contrast = _between(_CONTRAST, amounts[1]) if whether[1] else 1.0
    saturation = _between(_SATURATION, amounts[2]) if whether[2] else 1.0
    turn = 2 * _HUE * (amounts[3] - 0.5) if whether[3] else 0.0
    contrast_first = draws[8] < 0.5
    image = _linear(image, 1.0, brightness)
    if contrast_first:
        image = _linear(image, contrast, 0.0)
    if whether[2] or whether[3]:
        image = shift_hue(image, turn, saturation)
    return image if contrast_first else _linear(image, contrast, 0.0)


def _linear(image: Image.Image, factor: float, offset: float) -> Image.Image:
    if factor == 1 and offset == 0:
        return image
    return image.point([int(min(max(level * factor + offset, 0.0), 255.0)) for level in range(256)] * 3)


def _between(limits: tuple[float, float], draw: float) -> float:
    return float(limits[0] + draw * (limits[1] - limits[0]))


def _check_mask_type(mask: Mask) -> None:
    if not np.issubdtype(mask.dtype, np.integer) or np.iinfo(mask.dtype).max < IGNORE:
        raise ValueError(f"a mask needs an integer type that holds {IGNORE} (ignored pixels), got {mask.dtype}")
