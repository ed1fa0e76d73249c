"""Images to look at: from files, or from the validation split of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nepa_dist.config import DataConfig
from nepa_dist.data.augment import Mask
from nepa_dist.data.decode import BadImage, decode_image
from nepa_dist.data.open import open_split


class Shown(NamedTuple):
    """One image."""

    name: str
    """For its title and the file of its picture; no two images of a gallery have the same."""
    pixels: NDArray[np.uint8]
    """[H, W, 3]."""
    mask: Mask | None = None
    """[H, W], the class of each pixel as the data has it."""


def from_files(files: Sequence[Path]) -> list[Shown]:
    """Read image files; images of the same name in several folders are numbered.

    Raises:
        ValueError: images cannot be read; all are named.
    """
    images: list[Shown] = []
    problems = []
    for file in files:
        try:
            pixels = decode_image(file.read_bytes())
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
        except BadImage as error:
            problems.append(f"{file}: {error}")
        else:
            taken, name, number = {image.name for image in images}, file.stem, 1
            while name in taken:
                number += 1
                name = f"{file.stem}-{number}"
            images.append(Shown(name, pixels))
    if problems:
        raise ValueError("\n".join(["these images cannot be read:", *(f"  - {problem}" for problem in problems)]))
    return images


def from_samples(data: DataConfig, numbers: Sequence[int], image_size: int) -> list[Shown]:
    """Read images of the validation split by number, with their masks where it has any.

    Args:
        data: whose split.
        numbers: from 0.
        image_size: pixels, of data that is drawn when it is read.

    Raises:
        DataError: there is no validation split.
        ValueError: a number is outside of it.
        BadImage, OSError: an image cannot be read.
    """
    if not numbers:
        return []
    container = open_split(data, "val", image_size=image_size)
    if wrong := [number for number in numbers if not 0 <= number < len(container)]:
        raise ValueError(f"--samples {', '.join(map(str, wrong))}: the validation split has 0 to {len(container) - 1}")
    images = []
    for number in numbers:
        sample = container.read(number)
        pixels = decode_image(sample.image) if isinstance(sample.image, bytes) else sample.image
        images.append(Shown(f"val-{number}", pixels, sample.mask))
    return images


def cropped(images: Sequence[Shown], height: int, width: int) -> list[Shown]:
    """The largest central part of each that has the shape of height x width, scaled to that many pixels."""
    return [Shown(image.name, _fit(image.pixels, height, width)) for image in images]


def whole(images: Sequence[Shown], short: int, patch_size: int) -> list[Shown]:
    """Each scaled so that its short side has ``short`` pixels; both sides become the nearest multiple of the patch size."""
    shown = []
    for image in images:
        scale = short / min(image.pixels.shape[:2]) / patch_size
        height, width = (max(1, round(side * scale)) * patch_size for side in image.pixels.shape[:2])
        shown.append(Shown(image.name, _fit(image.pixels, height, width)))
    return shown


def _fit(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.BILINEAR))
