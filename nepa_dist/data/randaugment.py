"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) with the operations and ranges of timm's ``rand-m9-mstd0.5-inc1``.

Each image gets ``num_ops`` operations, chosen with replacement from fifteen; each is then applied with probability 0.5 and a
strength of its own, drawn from a normal distribution around the magnitude. All operations grow stronger with the magnitude.
Random numbers are keyed by (seed, epoch, sample id). The pixels are Pillow's. Differences: posterize keeps at least one bit.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from nepa_dist.data.order import keyed_uniforms

Interpolation = Literal["random", "bilinear", "bicubic"]
"""Of the geometric operations; ``random`` draws one of the two for each operation."""

MAX_MAGNITUDE = 10.0
"""Magnitudes are clipped to [0, MAX_MAGNITUDE]; at the upper end each operation has its full range."""

_STREAM = 0x72616E64  # keeps these draws apart from all others of the same seed
_NUM_DRAWS = 5  # of one operation: which, whether, magnitude, sign, interpolation
_NORMAL = NormalDist()
_TINY = 2.0**-54  # half a step of a draw: keeps the normal deviate of a draw of 0 finite

_Color = tuple[int, int, int]


class Operation(NamedTuple):
    """One step of the augmentation of an image, fully determined."""

    name: str
    """A key of OPERATIONS."""
    magnitude: float
    """In [0, MAX_MAGNITUDE]."""
    sign: int
    """1 or -1: direction of a geometric operation, more or less of an enhancement; the others ignore it."""
    resample: Image.Resampling
    """Bilinear or bicubic, used by the geometric operations."""


def draw_operations(
    seed: int,
    epoch: int,
    sample_id: int,
    *,
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    probability: float = 0.5,
    interpolation: Interpolation = "random",
) -> list[Operation]:
    """Draw what happens to one image.

    Args:
        seed, epoch, sample_id: key of the draws.
        num_ops: operations that are chosen.
        magnitude: mean strength, 0 to MAX_MAGNITUDE.
        magnitude_std: standard deviation of the strength of one operation; 0 is always the mean.
        probability: that a chosen operation is applied.
        interpolation: of the geometric operations.

    Returns:
        The operations that are applied, in order: at most num_ops.

    Raises:
        ValueError: a setting is out of its range or unknown.
    """
    if num_ops < 0 or not 0 <= magnitude <= MAX_MAGNITUDE or magnitude_std < 0 or not 0 <= probability <= 1:
        raise ValueError(
            f"RandAugment needs num_ops >= 0, magnitude in [0, {MAX_MAGNITUDE:g}], magnitude_std >= 0 and probability in "
            f"[0, 1], got {num_ops}, {magnitude}, {magnitude_std} and {probability}"
        )
    if interpolation not in _RESAMPLE:
        raise ValueError(f"interpolation {interpolation!r} is unknown; use one of {', '.join(_RESAMPLE)}")
    resample = _RESAMPLE[interpolation]
    draws = keyed_uniforms(seed, _STREAM, epoch, sample_id, count=num_ops * _NUM_DRAWS)
    operations = []
    for which, whether, strength, sign, method in draws.reshape(num_ops, _NUM_DRAWS).tolist():
        if whether >= probability:
            continue
        level = magnitude + magnitude_std * _NORMAL.inv_cdf(max(strength, _TINY))
        operations.append(
            Operation(
                name=_NAMES[int(which * len(_NAMES))],
                magnitude=min(max(level, 0.0), MAX_MAGNITUDE),
                sign=1 if sign < 0.5 else -1,
                resample=resample[int(method * len(resample))],
            )
        )
    return operations


def apply_operation(image: Image.Image, operation: Operation, fill: _Color = (128, 128, 128)) -> Image.Image:
    """Apply one operation.

    Args:
        image: mode RGB.
        operation: from :func:`draw_operations`.
        fill: colour of what a geometric operation uncovers.

    Returns:
        A new image of the same mode and size.
    """
    return OPERATIONS[operation.name](image, operation, fill)


def rand_augment(
    image: NDArray[np.uint8],
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    probability: float = 0.5,
    interpolation: Interpolation = "random",
    fill: _Color = (128, 128, 128),
) -> NDArray[np.uint8]:
    """Augment one image.

    Args:
        image: uint8 [H, W, 3], RGB; not changed.
        seed, epoch, sample_id: key of the random draws.
        num_ops, magnitude, magnitude_std, probability, interpolation: see :func:`draw_operations`.
        fill: colour of what a geometric operation uncovers; timm takes the mean of the normalisation, in levels.

    Returns:
        uint8 [H, W, 3]; the argument itself if no operation was drawn.

    Raises:
        ValueError: see :func:`draw_operations`.
    """
    operations = draw_operations(
        seed,
        epoch,
        sample_id,
        num_ops=num_ops,
        magnitude=magnitude,
        magnitude_std=magnitude_std,
        probability=probability,
        interpolation=interpolation,
    )
    if not operations:
        return image
    picture = Image.fromarray(image)
    for operation in operations:
        picture = apply_operation(picture, operation, fill)
    return np.asarray(picture)


def _share(operation: Operation) -> float:
    return operation.magnitude / MAX_MAGNITUDE


def _signed(operation: Operation, limit: float) -> float:
    return operation.sign * limit * _share(operation)


def _factor(operation: Operation) -> float:
    # 1 leaves the image as it is. Not below 0.1, where little more than a flat picture would be left.
    return max(0.1, 1.0 + _signed(operation, 0.9))


def _affine(image: Image.Image, operation: Operation, fill: _Color, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, operation.resample, fillcolor=fill)


def _auto_contrast(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return image.rotate(_signed(operation, 30.0), operation.resample, fillcolor=fill)


def _posterize(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    # 4 high bits at magnitude 0, 1 at magnitude 9. timm goes down to none at 10: a black image, which newer Pillows refuse.
    return ImageOps.posterize(image, max(1, 4 - int(4 * _share(operation))))


def _solarize(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * _share(operation)))


def _solarize_add(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    added = int(110 * _share(operation))
    return image.point([min(255, level + added) if level < 128 else level for level in range(256)] * 3)


def _color(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_factor(operation))


def _contrast(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_factor(operation))


def _brightness(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_factor(operation))


def _sharpness(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_factor(operation))


def _shear_x(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return _affine(image, operation, fill, (1, _signed(operation, 0.3), 0, 0, 1, 0))


def _shear_y(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return _affine(image, operation, fill, (1, 0, 0, _signed(operation, 0.3), 1, 0))


def _translate_x(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return _affine(image, operation, fill, (1, 0, _signed(operation, 0.45) * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, operation: Operation, fill: _Color) -> Image.Image:
    return _affine(image, operation, fill, (1, 0, 0, 0, 1, _signed(operation, 0.45) * image.height))


OPERATIONS: dict[str, Callable[[Image.Image, Operation, _Color], Image.Image]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""The fifteen operations by name; their order is part of what a key means."""

_NAMES = tuple(OPERATIONS)

_RESAMPLE: dict[str, tuple[Image.Resampling, ...]] = {
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
}
