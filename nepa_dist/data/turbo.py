"""Plain JPEG files through libjpeg-turbo: Pillow's pixels in two thirds of its time.

Only what cannot differ from Pillow is taken; :mod:`nepa_dist.data.decode` does the rest. So a file gives the same pixels and
the same error whether this path is there or not.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

_SOS = 0xDA
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
# Tables, restart interval, comment, JFIF, and APP markers without a meaning for the pixels. APP1 (EXIF, XMP) may say how the
# image is turned, and Pillow reads several images from an APP2 of the kind MPF.
_PASSED = {0xDB, 0xC4, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)}


def decode_plain_jpeg(data: bytes, min_side: int) -> NDArray[np.uint8] | None:
    """Decode a JPEG file that needs nothing but decoding: 8 bits, gray or colour, upright, undamaged.

    Args:
        data: the whole file.
        min_side: smallest side that is taken, pixels.

    Returns:
        uint8 [H, W, 3], RGB; None for any other file, also a damaged one.
    """
    size = _plain_size(data)
    if size is None or min(size) < min_side or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    try:
        # Exact arithmetic and smooth upsampling are the defaults; what libjpeg only warns about is an error.
        return simplejpeg.decode_jpeg(data, "RGB")  # type: ignore[no-any-return]
    except ValueError:
        return None


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """Height and width from the header, pixels; None unless every segment before the image data is one that is known."""
    if data[:2] != b"\xff\xd8":
        return None
    size = None
    place, end = 2, len(data) - 10  # what follows is read without asking for the length again
    while place < end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _SOS:
            return size
        if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            if size is not None or data[place + 4] != 8 or data[place + 9] not in (1, 3):
                return None
            size = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
        elif marker not in _PASSED or data[place + 4 : place + 8] == b"MPF\0":
            return None
        place += 2 + (data[place + 2] << 8 | data[place + 3])
    return None
