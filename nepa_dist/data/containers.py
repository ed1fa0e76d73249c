"""Where sample i is: a folder, a prepared split, the embedded digits. A container knows nothing of order, rank or epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Sample:
    """One sample as its container holds it."""

    image: bytes | NDArray[np.uint8]
    """A whole image file, or RGB pixels [H, W, 3] that need no decoding."""
    label: int
    """Index into the container's class_names; -1 is unknown."""
    mask: NDArray[np.integer[Any]] | None = None
    """[H, W], the class of each pixel."""


class Container(Protocol):
    """Random access to the samples of one split. Implementations can be pickled and forked: no open files."""

    class_names: list[str]
    """Class c of the labels is class_names[c]; empty if there are no labels."""
    fingerprint: str
    """SHA-256, hexadecimal, of the names and sizes of the samples; it goes into checkpoints."""
    num_ignored: int
    """Files beside the samples that are no images by their name."""

    def __len__(self) -> int:
        """Number of samples N."""

    def read(self, index: int) -> Sample:
        """Sample 0 <= index < N. Raises OSError if it cannot be read."""

    def name(self, index: int) -> str:
        """What to call a sample in a message: a path or an id."""
