"""What the three container formats share: the sample they take, the records they give, and how they refuse a bad shard.

A format is a module with the functions of :class:`Format`. Scanning a shard reads every byte of it but trusts none: it never
imports the format's library, never unpickles, reads one sample at a time and stops at the end of the file.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nepa_dist.data.index import ENCODED, INDEX_DTYPE, RAW, ShardRecord

MAX_PROBLEMS = 100
"""Problems that a ShardError lists; a shard with more is read no further."""

MAX_SIDE = 65535
"""Pixels; sides are stored in 16 bits."""

_MAX_LABEL = 2**31 - 1
# The same as for decoding: among Pillow's other formats are some that run programs.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_INTEGER = re.compile(rb"[+-]?[0-9]{1,19}")
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


class ShardError(ValueError):
    """A shard that cannot be written or must not be used.

    Args:
        path: of the shard.
        problems: pairs of a sample, a member or a part of the file, and what is wrong with it.
    """

    def __init__(self, path: Path, problems: Sequence[tuple[str, str]]) -> None:
        self.path = path
        self.problems = list(problems)
        lines = [f"{where}: {reason}" if where else reason for where, reason in self.problems]
        super().__init__(
            f"{path}: {lines[0]}" if len(lines) == 1 else f"{path}:\n" + "\n".join(f"  - {line}" for line in lines)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problems)  # it crosses the border between processes


class StoredSample(NamedTuple):
    """One sample as it goes into a shard."""

    id: int
    """Rank of the source's name, see :mod:`nepa_dist.data.index`."""
    name: str
    """What to call it in a message."""
    image: bytes
    """An image file, or uint8 RGB pixels [height, width, 3]."""
    encoding: int
    """ENCODED or RAW."""
    height: int
    """Pixels, upright."""
    width: int
    label: int
    """-1: none."""
    mask: bytes | None
    """A PNG, or none."""


class Scan(NamedTuple):
    """What is in a shard, in the order of the file."""

    records: NDArray[Any]
    """INDEX_DTYPE, with shard 0."""
    keys: list[str]
    """What the shard itself calls each sample: unique, printable."""


class Format(Protocol):
    """The functions of a format's module."""

    def shard_name(self, k: int) -> str:
        """File name of shard k, counted from 0."""

    def write_shard(self, path: Path, samples: Iterable[StoredSample], *, with_mask: bool) -> NDArray[Any]:
        """Write a whole shard, with the same bytes for the same samples.

        Args:
            path: the file, replaced if it is there. It is neither synced nor renamed.
            samples: read once and in order if it is a sequence, so one that makes its samples on demand takes no more memory
                than one sample; anything else may be gathered in a list first.
            with_mask: room for masks; otherwise they are left out.

        Returns:
            INDEX_DTYPE, one record per sample, in their order, with shard 0.

        Raises:
            ShardError: the format cannot hold a sample, or the shard gets too large.
        """

    def finish(self, folder: Path, shards: Sequence[ShardRecord]) -> None:
        """Write, in one step, what the format's own readers need beside the shards in ``folder``; often nothing."""

    def scan_shard(self, path: Path) -> Scan:
        """Read a shard of ours or of the format's own library without any index.

        Raises:
            ShardError: something in it is damaged or hostile; all that was found is listed.
            OSError: the file cannot be read.
        """


class Problems:
    """Collects what is wrong with one shard, so that a user sees it all at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: list[tuple[str, str]] = []

    def add(self, where: str, reason: str) -> None:
        """Note a problem that leaves the rest readable. Raises ShardError when there are too many."""
        self._found.append((where, reason))
        if len(self._found) == MAX_PROBLEMS:
            raise self.fatal("", "and perhaps more: it is read no further")

    def fatal(self, where: str, reason: str) -> ShardError:
        """The error to raise when nothing can be read after this problem."""
        return ShardError(self.path, [*self._found, (where, reason)])

    def check(self) -> None:
        """Raise ShardError if there was a problem."""
        if self._found:
            raise ShardError(self.path, self._found)


class ImageInfo(NamedTuple):
    """What the header of an image file says."""

    height: int
    """Pixels, upright."""
    width: int
    stored_height: int
    """Pixels, before the EXIF orientation is applied."""
    stored_width: int
    mode: str
    """Pillow's name: RGB, L, CMYK, ..."""


def probe_image(data: bytes) -> ImageInfo:
    """Read the header of an image file; the pixels are not decoded.

    Raises:
        ValueError: it is no image of a known format, or too large; the message is the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
                width, height = image.size
                sideways, mode = _is_sideways(image), image.mode
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except MemoryError:  # of this process, not of the image
        raise
    except Exception as error:  # a damaged file can raise almost anything
        raise ValueError(f"not a usable image: {error or type(error).__name__}") from None
    if not 0 < max(width, height) <= MAX_SIDE:
        raise ValueError(f"{width}x{height} pixels; a side may have {MAX_SIDE}")
    upright = (width, height) if sideways else (height, width)
    return ImageInfo(*upright, height, width, mode)


def _is_sideways(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) in _SIDEWAYS
    except MemoryError:
        raise
    except Exception:  # damaged metadata around good pixels: the image counts as upright
        return False


def image_extension(data: bytes) -> str | None:
    """Ending of the file name that fits the first bytes: ``jpg``, ``png``, ...; None if they are of no known image format."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _MAGIC if data.startswith(magic)), None)


def parse_label(text: bytes) -> int:
    """A class number written in decimal.

    Raises:
        ValueError: it is something else, or outside of what an index can hold; the message is the reason.
    """
    if not _INTEGER.fullmatch(text.strip()):
        raise ValueError(f"the label {text[:32]!r} is no integer")
    return check_label(int(text))


def check_label(label: int) -> int:
    """``label`` itself. Raises ValueError if an index cannot hold it."""
    if not -1 <= label <= _MAX_LABEL:
        raise ValueError(f"the label {label} is not in -1 .. {_MAX_LABEL}")
    return label


def as_sequence(samples: Iterable[StoredSample]) -> Sequence[StoredSample]:
    """``samples`` itself if it has a length, else a list of them."""
    return samples if isinstance(samples, Sequence) else list(samples)


def new_records(samples: Sequence[StoredSample]) -> NDArray[Any]:
    """Zeroed records, one per sample."""
    return np.zeros(len(samples), INDEX_DTYPE)


def describe(sample: StoredSample) -> str:
    """What to call a sample in a message."""
    return f"sample {sample.id} ({sample.name})"


def fill_record(record: Any, sample: StoredSample, offset: int, mask_offset: int, crc32c: Callable[[bytes], int]) -> None:
    """Write one record of an index.

    Args:
        record: INDEX_DTYPE [] that is written to.
        sample: what is stored; its mask only if ``mask_offset`` is not 0.
        offset: first byte of the image in the file.
        mask_offset: the same of the mask; 0: it is not stored.
        crc32c: the checksum function.

    Raises:
        ValueError: a value is too large for the index, or raw pixels do not fill the image; the message is the reason.
    """
    if not (0 < sample.height <= MAX_SIDE and 0 < sample.width <= MAX_SIDE):
        raise ValueError(f"{sample.width}x{sample.height} pixels; a side may have 1 to {MAX_SIDE}")
    if sample.encoding == RAW and len(sample.image) != 3 * sample.height * sample.width:
        raise ValueError(f"{len(sample.image)} bytes are not {sample.width}x{sample.height} RGB pixels")
    if sample.encoding not in (ENCODED, RAW) or not sample.image:
        raise ValueError("it is empty" if not sample.image else f"the encoding {sample.encoding} is not known")
    mask = sample.mask if sample.mask and mask_offset else b""
    record["encoding"], record["height"], record["width"] = sample.encoding, sample.height, sample.width
    record["label"] = check_label(sample.label)
    record["offset"], record["length"], record["crc"] = offset, len(sample.image), crc32c(sample.image)
    if mask:
        record["mask_offset"], record["mask_length"], record["mask_crc"] = mask_offset, len(mask), crc32c(mask)
