"""From the bytes of an image file to RGB pixels; what cannot be read is a :class:`BadImage` with its reason.

Plain JPEG files take a short way (:mod:`nepa_dist.data.turbo`), all others Pillow; both give the same.

Rules, so that the pixels of a file are the same everywhere:

- the content decides the format, not the name; of an animation the first frame counts;
- EXIF orientation is applied; colour profiles are ignored; CMYK is converted by Pillow's plain formula;
- transparency is dropped, not composited: the colour stored under it stays;
- 16-bit channels keep their high byte (Pillow does so for colour; for grayscale it would clip, so it is done here);
- sides under MIN_SIDE pixels, sizes that Pillow calls a decompression bomb, and pixels without a known range are refused.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nepa_dist.data.turbo import decode_plain_jpeg

MIN_SIDE = 8
"""Pixels; a smaller image carries nothing to learn from and is most often a placeholder."""

# Nothing else is tried: among Pillow's other formats are some that run programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason, without the name of the file."""


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode an image file.

    Args:
        data: the whole file.

    Returns:
        uint8 [H, W, 3], RGB, upright; it may be read-only.

    Raises:
        BadImage: the bytes are no image, are damaged or cut off, or break a rule of this module.
    """
    if not data:
        raise BadImage("the file is empty")
    pixels = decode_plain_jpeg(data, MIN_SIDE)
    return _decode_with_pillow(data) if pixels is None else pixels


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd metadata, which does not touch the pixels, and about bombs, which are refused.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if min(image.size) < MIN_SIDE:
                    raise BadImage(f"{image.width}x{image.height} pixels: too small, each side needs {MIN_SIDE}")
                image.load()
                return _upright(_to_rgb(image), orientation(image))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image ({', '.join(FORMATS)} are read)") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"too large: {error}") from None
    except MemoryError:  # of this process, not of the image
        raise
    except Exception as error:  # a damaged file can raise almost anything in a decoder
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if (image.mode == "I" and image.format == "TIFF") or values.min() < 0 or values.max() > 65535:
            raise BadImage("32-bit integer pixels have no known range")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("floating-point pixels have no known range")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 is upright."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except MemoryError:  # of this process, not of the image
        raise
    except Exception:  # damaged metadata around good pixels: the image counts as upright
        return 1


def _upright(image: Image.Image, orientation: int) -> NDArray[np.uint8]:
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    return np.asarray(image)
