"""What a prepared split is made from: one view of image folders, the ILSVRC2012 archives, ADE20K's layout and Parquet files.

A sample's id is the rank of its name among all names, sorted by their bytes. So the images of a folder and the same images
in the archives it was unpacked from have the same ids, names, labels and fingerprint.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]

_LOST = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG}


class SourceError(ValueError):
    """A source cannot be used; the message says what is wrong, where, and what to do."""


def is_lost(error: OSError) -> bool:
    """Whether an error of reading a sample is about this sample alone, and not about the disk or the network."""
    return error.errno in _LOST


class Source(Protocol):
    """Random access to the images of one split. Can be pickled and forked."""

    kind: str
    """One of KINDS."""
    split: Split
    class_names: list[str]
    """Class c of the labels is class_names[c]; with masks, the class of value c + 1. Empty if no class is known."""
    class_titles: list[str]
    """Names for people, one per class, or empty."""
    fingerprint: str
    """SHA-256, hexadecimal, of names and sizes; it knows neither the machine nor the path."""
    has_masks: bool
    """Every sample has a class mask, or none has."""
    num_ignored: int
    """Files beside the samples that are none by their name."""

    def __len__(self) -> int:
        """Number of samples N, at least 1."""

    def name(self, index: int) -> str:
        """Where sample ``index`` comes from, relative to the source; one line, without control characters."""

    def label(self, index: int) -> int:
        """Class of a sample; -1 is unknown."""

    def read(self, index: int) -> bytes:
        """The image file. Raises OSError if it cannot be read, BadImage if the source holds none for this sample."""

    def read_mask(self, index: int) -> bytes | None:
        """The PNG with the class of each pixel, None without masks. Raises OSError if it cannot be read."""


def one_line(name: str | bytes) -> str:
    """A name as text without line breaks and other control characters, which are written as escapes."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fingerprint(split: str, names: Iterable[bytes], sizes: NDArray[np.int64]) -> str:
    """Digest of the names and sizes of a split in the order of ids, as folders of images have it too."""
    digest = hashlib.sha256(split.encode() + b"\0" + b"\0".join(names) + b"\0")
    digest.update(sizes.astype("<i8").tobytes())
    return digest.hexdigest()


def listed(problems: list[str], most: int = 20) -> str:
    """Problems for a message, one per line, the first ``most`` of them."""
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join(["", *problems[:most], *more])
