"""Random erasing (Zhong et al. 2020, arXiv 1708.04896): a rectangle of an image becomes noise, as timm's mode ``pixel``.

The rectangles are drawn on the host by (seed, epoch, sample id). The noise is made on the device, after normalisation, because
its standard deviation of 1 does not fit into the range of a pixel. It is a hash of the sample's key and the place in the
rectangle, so it is the same on every device up to rounding, needs no generator, and costs a few elementwise kernels on the
erased pixels alone.

Suffix letters: B samples, H and W height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nepa_dist.data.order import keyed_uniforms

_STREAM = 0x65726173  # keeps these draws apart from all others of the same seed
_ATTEMPTS = 10
# Draws of one sample: whether, left, top, key of the noise; then area and ratio of each attempt.
_NUM_DRAWS = 4 + 2 * _ATTEMPTS
_MASK_32 = 0xFFFFFFFF


def draw_erasing(
    height: int,
    width: int,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> tuple[int, int, int, int, int]:
    """Draw the rectangle of one sample.

    Ten attempts draw an area and a log-uniform ratio; the first rectangle smaller than the image in both directions is placed
    at random. If none is, nothing is erased.

    Args:
        height, width: of the image that is erased, pixels.
        seed, epoch, sample_id: key of the draws.
        probability: that there is a rectangle.
        area: range of its area over the image's.
        ratio: range of its height over its width.

    Returns:
        (x, y, w, h, key): the rectangle in pixels and the key of its noise, below 2^32; all 0 if nothing is erased.

    Raises:
        ValueError: a setting is out of its range.
    """
    if not (0 <= probability <= 1 and 0 < area[0] <= area[1] <= 1 and 0 < ratio[0] <= ratio[1]):
        raise ValueError(
            f"random erasing needs a probability in [0, 1], 0 < area low <= high <= 1 and 0 < ratio low <= high, "
            f"got {probability}, {area} and {ratio}"
        )
    whether, left, top, key, *attempts = keyed_uniforms(seed, _STREAM, epoch, sample_id, count=_NUM_DRAWS).tolist()
    if whether >= probability:
        return 0, 0, 0, 0, 0
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for size, shape in zip(attempts[::2], attempts[1::2], strict=True):
        pixels = height * width * (area[0] + size * (area[1] - area[0]))
        aspect = math.exp(low + shape * (high - low))
        h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < h < height and 0 < w < width:
            return int(left * (width - w + 1)), int(top * (height - h + 1)), w, h, int(key * 2**32)
    return 0, 0, 0, 0, 0


def erase(images: Tensor, erasings: Sequence[tuple[int, int, int, int, int]] | NDArray[np.int64]) -> Tensor:
    """Fill the rectangles of a batch with normal noise of mean 0 and standard deviation 1.

    Args:
        images: floating point [B, 3, H, W], normalised; changed in place.
        erasings: [B, 5] on the host, one row of :func:`draw_erasing` for each sample.

    Returns:
        The same tensor.

    Raises:
        ValueError: erasings has not one row of 5 numbers for each image.
    """
    table = np.asarray(erasings, np.int64)
    if table.shape != (len(images), 5):
        raise ValueError(f"{len(images)} images need erasings of shape ({len(images)}, 5), got {table.shape}")
    rows = np.flatnonzero(table[:, 2])
    if not len(rows):
        return images
    # One entry for each erased pixel, so that only these cost anything. The host knows their number: no wait for the device.
    num_pixels = table[rows, 2] * table[rows, 3]
    total = int(num_pixels.sum())
    starts = np.cumsum(num_pixels) - num_pixels
    columns = _moved(np.stack([rows, starts, *table[rows].T]), images.device)
    which = torch.repeat_interleave(_moved(num_pixels, images.device), output_size=total)
    sample, start, x, y, w, _, key = columns[:, which].unbind()
    within = torch.arange(total, device=images.device) - start
    channels = torch.arange(images.shape[1], device=images.device)
    noise = _normal_noise(key[:, None], within[:, None] * images.shape[1] + channels)
    images[sample, :, y + within // w, x + within % w] = noise.to(images.dtype)
    return images


def _moved(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """On the device. From page-locked memory the copy runs by itself; from any other the host would wait for it."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _normal_noise(keys: Tensor, places: Tensor) -> Tensor:
    """Standard normal fp32 numbers, a pure function of keys and places (int64, broadcast against each other)."""
    # 24 bits, so that fp32 holds them exactly and the noise ends at 5.4 standard deviations.
    bits = _hash_32(_hash_32(keys) ^ places) >> 8
    return torch.erfinv((bits.float() * 2 + 1) * 2.0**-24 - 1) * math.sqrt(2)


def _hash_32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, a bijection of 32-bit numbers, in int64 (torch cannot shift unsigned numbers)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK_32
    return x ^ (x >> 16)
