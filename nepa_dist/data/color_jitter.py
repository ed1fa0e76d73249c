"""Random changes of colour: brightness, contrast, saturation and hue, with torchvision's ``ColorJitter`` semantics on Pillow.

Random numbers are keyed by (seed, epoch, sample id).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from nepa_dist.data.order import keyed_uniforms

_STREAM = 0x6A697474  # keeps these draws apart from all others of the same seed
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def shift_hue(image: Image.Image, turn: float, saturation: float = 1.0) -> Image.Image:
    """Turn the colour circle, and scale the saturation on the way.

    Args:
        image: mode RGB.
        turn: share of a full circle; 1 is where it began. Rounded to 1/256.
        saturation: factor of the saturation of HSV, at least 0; clipped at full saturation.

    Returns:
        A new RGB image.
    """
    levels = range(256)
    hue = [(level + round(turn * 256)) % 256 for level in levels]
    scaled = [min(255, int(level * saturation)) for level in levels]
    return image.convert("HSV").point(hue + scaled + list(levels)).convert("RGB")


def color_jitter(
    image: NDArray[np.uint8],
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> NDArray[np.uint8]:
    """Change brightness, contrast, saturation and hue by random amounts, in random order.

    Args:
        image: uint8 [H, W, 3], RGB; not changed.
        seed, epoch, sample_id: key of the random draws.
        brightness, contrast, saturation: x draws a factor uniform in [max(0, 1 - x), 1 + x]; 0 is off.
        hue: draws a turn of the colour circle uniform in [-hue, hue], hue at most 0.5; 0 is off.

    Returns:
        uint8 [H, W, 3]; the argument itself if everything is off.

    Raises:
        ValueError: an amount is negative, or hue is above 0.5.
    """
    amounts = (brightness, contrast, saturation, hue)
    if min(amounts) < 0 or hue > 0.5:
        raise ValueError(f"colour jitter needs amounts of at least 0 and a hue of at most 0.5, got {amounts}")
    if not any(amounts):
        return image
    draws = keyed_uniforms(seed, _STREAM, epoch, sample_id, count=2 * len(amounts))
    picture = Image.fromarray(image)
    for which in np.argsort(draws[len(amounts) :], kind="stable").tolist():
        amount, draw = amounts[which], float(draws[which])
        if not amount:
            continue
        if which == len(_ENHANCERS):
            picture = shift_hue(picture, amount * (2 * draw - 1))
        else:
            low = max(0.0, 1 - amount)
            picture = _ENHANCERS[which](picture).enhance(low + draw * (1 + amount - low))
    return np.asarray(picture)
