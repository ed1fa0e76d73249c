"""A batch on the host, and the memory it is filled in.

Suffix letters: B samples of the batch, S side of the image in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DIGEST_MASK = 2**63 - 1


class BadSample(NamedTuple):
    """A sample that could not be used."""

    id: int
    name: str
    reason: str


@dataclass
class Batch:
    """Samples of one forward pass, on the host."""

    images: Tensor
    """uint8 [B, S, S, 3]."""
    labels: Tensor
    """int64 [B]; -1 is unknown."""
    ids: Tensor
    """int64 [B], the samples that are shown, so of the substitutes where a sample was bad."""
    bad: tuple[BadSample, ...]
    """Samples that were replaced (training) or left out (evaluation)."""
    masks: Tensor | None = None
    """uint8 [B, S, S], the class of each pixel, if the loader was asked for masks."""
    digest: int = 0
    """Of ids, sizes and augmentation keys; see :func:`add_digests`."""
    erasings: NDArray[np.int64] | None = None
    """[B, 5], the rectangle of each image that becomes noise; see :mod:`nepa_dist.data.erasing`. None: none does."""


def add_digests(*digests: int) -> int:
    """Digest of several batches together, 0 <= digest < 2^63.

    The order does not matter: the sum over the micro-batches and ranks of a step is the same for every world size. An int64
    all-reduce gives it too, after ``& (2**63 - 1)``.
    """
    return sum(digests) & _DIGEST_MASK


class BatchShape(NamedTuple):
    """Room for one batch."""

    capacity: int
    """B, samples at most."""
    image_size: int
    """S, pixels."""
    masks: bool
    """Whether there are masks."""

    @property
    def num_bytes(self) -> int:
        """Of images and masks."""
        return self.capacity * self.image_size**2 * (4 if self.masks else 3)


class Pixels(NamedTuple):
    """Memory of one batch."""

    images: NDArray[np.uint8]
    """[B, S, S, 3]."""
    masks: NDArray[np.uint8] | None
    """[B, S, S]."""


class Filled(NamedTuple):
    """What was put into a batch, beside its pixels. Row i of the pixels belongs to element i."""

    labels: list[int]
    ids: list[int]
    bad: list[BadSample]
    digest: int
    erasings: list[tuple[int, int, int, int, int]]
    """Empty, or one for each row."""


def pixels_in(memory: NDArray[np.uint8], shape: BatchShape) -> Pixels:
    """Lay out a batch in ``memory``, uint8 [shape.num_bytes]."""
    capacity, size, masks = shape
    end = capacity * size * size * 3
    images = memory[:end].reshape(capacity, size, size, 3)
    return Pixels(images, memory[end : shape.num_bytes].reshape(capacity, size, size) if masks else None)


def new_pixels(shape: BatchShape, *, pin: bool) -> Pixels:
    """Memory for one batch; with ``pin`` page-locked, so that the copy to a GPU runs beside the computation."""
    return pixels_in(torch.empty(shape.num_bytes, dtype=torch.uint8, pin_memory=pin).numpy(), shape)


def make_batch(pixels: Pixels, filled: Filled, *, pin: bool) -> Batch:
    """The batch in ``pixels``, without a copy of them.

    Args:
        pixels: its memory.
        filled: what is in it.
        pin: put labels and ids into page-locked memory.
    """
    num = len(filled.ids)
    labels, ids = (torch.tensor(values, dtype=torch.int64, pin_memory=pin) for values in (filled.labels, filled.ids))
    masks = None if pixels.masks is None else torch.from_numpy(pixels.masks[:num])
    erasings = np.array(filled.erasings, np.int64) if filled.erasings else None
    return Batch(torch.from_numpy(pixels.images[:num]), labels, ids, tuple(filled.bad), masks, filled.digest, erasings)
