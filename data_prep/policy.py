"""How an image is stored: as it is, as a smaller JPEG, or as pixels; and the class mask of the same geometry.

====================== ===========================================================================================
``keep``               the bytes of the source, untouched
``shortN``, ``-qQ``    shorter side N pixels (LANCZOS), JPEG quality Q (default 90), 4:2:0, no metadata
``raw``, ``rawN``      RGB pixels without coding; with N the shorter side is N pixels
====================== ===========================================================================================

No image is enlarged: a side that is short already stays. Under ``shortN`` an image that is no larger and needs no repair
keeps its bytes. A repair is whatever sets a file apart from plain upright 8-bit RGB (the rules are those of
:mod:`nepa_dist.data.decode`); under ``keep`` it is listed, and the training reader applies it.

The same bytes come out for the same bytes with the same versions of Pillow, libjpeg-turbo and zlib.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.data.decode import FORMATS, MIN_SIDE, BadImage, decode_image, orientation
from nepa_dist.data.index import ENCODED, RAW

REPAIRS = ("not-jpeg", "animation", "orientation", "cmyk", "gray", "palette", "alpha", "16bit", "colorspace")
"""What can be wrong with an image. ``not-jpeg`` is listed only where a JPEG is made of it; ``colorspace`` is YCbCr, HSV, ..."""

MAX_SIDE = 65500
"""Pixels: the longest side that libjpeg writes, and the index counts to 65535."""

IGNORE = 255
"""Value of mask pixels that count for no class, like 0."""

_TEXT = re.compile(r"keep|short(?P<short>\d{1,5})(?:-q(?P<quality>\d{1,3}))?|raw(?P<raw>\d{1,5})?", re.ASCII)
_MASK_COLOURS = {2: "RGB colours", 4: "grey with transparency", 6: "RGB colours with transparency"}


class PolicyError(ValueError):
    """The text of a policy cannot be understood."""


class BadMask(BadImage):
    """A class mask that cannot be used; the message is the reason, without the name of the file."""


class PreparedImage(NamedTuple):
    """An image as it will be stored."""

    image: bytes
    encoding: int
    """ENCODED or RAW of :mod:`nepa_dist.data.index`."""
    height: int
    """Pixels of the stored image, upright."""
    width: int
    repairs: tuple[str, ...]
    """Members of REPAIRS, in its order."""
    source_height: int
    """Pixels of the source image, upright."""
    source_width: int


@dataclass(frozen=True)
class ImagePolicy:
    """A parsed policy; make one with :meth:`parse`."""

    kind: Literal["keep", "short", "raw"]
    side: int | None = None
    """Longest length of the shorter side, pixels."""
    quality: int | None = None
    """Of the JPEG, 1 .. 100."""

    @classmethod
    def parse(cls, text: str) -> ImagePolicy:
        """Read ``keep``, ``short256``, ``short288-q95``, ``raw``, ``raw256`` and the like.

        Raises:
            PolicyError: it is none of these, or a number is out of range.
        """
        found = _TEXT.fullmatch(text)
        if not found:
            raise PolicyError(
                f"image policy {text!r} is unknown; use keep, shortN, shortN-qQ, raw or rawN, such as short256-q90"
            )
        digits = found["short"] or found["raw"]
        side = int(digits) if digits else None
        if side is not None and not MIN_SIDE <= side <= MAX_SIDE:
            raise PolicyError(f"image policy {text!r}: the side must be {MIN_SIDE} to {MAX_SIDE} pixels")
        if not found["short"]:
            return cls("raw" if text.startswith("raw") else "keep", side)
        quality = int(found["quality"] or 90)
        if not 1 <= quality <= 100:
            raise PolicyError(f"image policy {text!r}: the JPEG quality must be 1 to 100")
        return cls("short", side, quality)

    @property
    def name(self) -> str:
        """The policy as text, the same for the same policy."""
        return f"{self.kind}{self.side or ''}" + (f"-q{self.quality}" if self.quality else "")

    def stored_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, pixels, at which an upright image of height x width is stored."""
        short = min(height, width)
        if self.side is None or short <= self.side:
            return height, width
        # Halves are rounded up, in integers: the same on every machine.
        return (height * self.side + short // 2) // short, (width * self.side + short // 2) // short

    def apply(self, data: bytes) -> PreparedImage:
        """Bring an image file into its stored form.

        Args:
            data: the whole file.

        Raises:
            BadImage: it cannot be decoded, or a side of the stored image has more than MAX_SIDE pixels.
        """
        pixels = decode_image(data)
        height, width = pixels.shape[:2]
        size = self.stored_size(height, width)
        if max(size) > MAX_SIDE:
            raise BadImage(f"{size[1]}x{size[0]} pixels: a side longer than {MAX_SIDE} cannot be stored")
        repairs = _repairs(data)
        if self.kind != "short":
            repairs = tuple(repair for repair in repairs if repair != "not-jpeg")
        if self.kind == "raw":
            image, encoding = np.ascontiguousarray(_resized(pixels, size)).tobytes(), RAW
        elif self.kind == "keep" or (size == (height, width) and not repairs):
            image, encoding = data, ENCODED
        else:
            image, encoding = _jpeg(_resized(pixels, size), self.quality or 90), ENCODED
        return PreparedImage(image, encoding, *size, repairs, height, width)

    def apply_mask(
        self,
        mask: bytes,
        height: int,
        width: int,
        *,
        source_size: tuple[int, int] | None = None,
        num_classes: int | None = None,
    ) -> bytes:
        """Bring a class mask to the size of its stored image (nearest pixel); a mask of that size keeps its bytes.

        Args:
            mask: a PNG of 8-bit or 16-bit grey values, or with a palette, whose indices are the labels.
            height: of the stored image, pixels.
            width: of the stored image, pixels.
            source_size: height and width of the upright source image. Without it a mask of another resolution passes if it
                leads to the same stored size.
            num_classes: C; labels above it other than IGNORE are refused. Value 0 is no class, c is class c of 1 .. C.

        Returns:
            A PNG of height x width.

        Raises:
            BadMask: it is no such PNG, is damaged, has another size than the image or a label outside the class table.
        """
        values = decode_mask(mask)
        if source_size is not None and values.shape != source_size:
            raise BadMask(f"the mask has {_size(values.shape)} pixels, its image {_size(source_size)}")
        if self.stored_size(*values.shape) != (height, width):
            raise BadMask(f"the mask has {_size(values.shape)} pixels, which does not fit the stored {_size((height, width))}")
        if num_classes is not None and (outside := values[(values > num_classes) & (values != IGNORE)]).size:
            raise BadMask(
                f"the mask has the label {int(outside.max())} at {outside.size} pixels; the class table ends at {num_classes}"
            )
        if values.shape == (height, width):
            return mask
        return _png(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))


def decode_mask(data: bytes) -> NDArray[Any]:
    """The labels of a class mask.

    Args:
        data: a PNG of 8-bit or 16-bit grey values, or with a palette, whose indices are the labels.

    Returns:
        uint8 or uint16 [H, W].

    Raises:
        BadMask: it is no such PNG or it is damaged.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 26:
        raise BadMask("the mask is no PNG")
    depth, colour = data[24], data[25]
    if colour in _MASK_COLOURS:
        raise BadMask(
            f"the mask has {_MASK_COLOURS[colour]}; a mask holds one label per pixel, as grey values or palette indices"
        )
    if colour == 0 and depth < 8:
        # Pillow would spread 0 .. 2^depth - 1 over 0 .. 255, and others would not.
        raise BadMask(f"the mask has grey values of {depth} bits, which readers understand differently; save it with 8 bits")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                return np.asarray(image).astype(np.uint16 if depth == 16 else np.uint8)
    except MemoryError:  # of this process, not of the mask
        raise
    except Exception as error:  # a damaged file can raise almost anything in a decoder
        raise BadMask(f"the mask cannot be decoded: {error or type(error).__name__}") from error


def _repairs(data: bytes) -> tuple[str, ...]:
    """What sets a file, which can be decoded, apart from a plain upright 8-bit RGB JPEG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            mode = image.mode
            found = {
                "not-jpeg": image.format not in ("JPEG", "MPO"),  # MPO: a JPEG that holds more pictures
                "animation": bool(getattr(image, "is_animated", False)),
                "alpha": mode.endswith(("A", "a")) or "transparency" in image.info,
                "16bit": mode.startswith("I") or _bits(image, data) > 8,
                "orientation": 2 <= orientation(image) <= 8,
                "cmyk": mode == "CMYK",
                "gray": mode[0] in "1LI" and mode != "LAB",
                "palette": mode in ("P", "PA"),
                "colorspace": mode in ("YCbCr", "LAB", "HSV"),
            }
    return tuple(repair for repair in REPAIRS if found[repair])


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel of the file, where Pillow's mode does not tell."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,)))  # type: ignore[attr-defined,no-any-return]
    return 8


def _resized(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
