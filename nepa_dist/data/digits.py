"""The embedded data set: coloured scenes composed of real handwritten digits, drawn when they are read.

The digits are the 1797 of scikit-learn's ``load_digits`` (8x8 pixels; the test part of UCI's "Optical Recognition of
Handwritten Digits", Alpaydin and Kaynak 1998), which come with that package: nothing is downloaded. Train scenes use digits
0 .. 1436, validation scenes the other 360, so no digit is in both. A scene depends on its split and index alone; all measures
are shares of the side, so a scene is the same picture at every size.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.data.containers import DataError, Sample
from nepa_dist.data.order import keyed_uniforms

NUM_SCENES = {"train": 20_000, "val": 2_000}
BACKGROUND = 10
"""Class of the pixels without ink in a mask; 0 .. 9 are the digits."""
MIN_IMAGE_SIZE = 32
"""Pixels; below that the small digits are a smear."""

_VERSION = 3  # rises when a scene changes
_FIRST_VAL_DIGIT = 1437
_STREAM = {"train": 0x64696701, "val": 0x64696702}
_NUM_DRAWS = 96
_PLACES = 8  # tried for each small digit; the one with most room is taken

Colour = tuple[float, float, float]


class Glyph(NamedTuple):
    """One digit of a scene; measures are shares of the image's side."""

    source: int
    """Index into the handwritten digits."""
    x: float
    """Left edge of the 8x8 pixels."""
    y: float
    """Top edge."""
    size: float
    colour: Colour


class Scene(NamedTuple):
    """What is drawn, before it has a size in pixels."""

    start: Colour
    """Background colour where the gradient begins."""
    end: Colour
    angle: float
    """Direction of the gradient, radians."""
    glyphs: tuple[Glyph, ...]
    """In the order in which they are painted; the last is the large one that gives the image its class."""


class DigitScenes:
    """Container of scenes: one large digit, its class, among one to three small ones.

    Args:
        split: train (20,000 scenes) or val (2,000).
        image_size: S, side in pixels.

    Raises:
        DataError: image_size is less than MIN_IMAGE_SIZE.
    """

    def __init__(self, split: Literal["train", "val"], image_size: int) -> None:
        if image_size < MIN_IMAGE_SIZE:
            raise DataError(f"the digit scenes need an image size of at least {MIN_IMAGE_SIZE} pixels, got {image_size}")
        self.split = split
        self.num_ignored = 0
        self.image_size = image_size
        self.class_names = [str(digit) for digit in range(10)]
        self.mask_names = [*self.class_names, "background"]
        self._ink, self._digits = _handwriting()
        digest = hashlib.sha256(f"digits {_VERSION} {split} {len(self)}".encode())
        digest.update(self._ink.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return NUM_SCENES[self.split]

    def name(self, index: int) -> str:
        """``digits/<split>/<index>``."""
        return f"digits/{self.split}/{index}"

    def read(self, index: int) -> Sample:
        """Draw scene ``index``: image uint8 [S, S, 3], label 0 .. 9, mask uint8 [S, S] of 0 .. 10."""
        scene = self.scene(index)
        size = self.image_size
        canvas = _background(scene, size)
        mask = np.full((size, size), BACKGROUND, np.uint8)
        for glyph in scene.glyphs:
            self._paint(glyph, canvas, mask)
        image = (canvas * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        return Sample(image, int(self._digits[scene.glyphs[-1].source]), mask)

    def scene(self, index: int) -> Scene:
        """Compose scene ``index`` without drawing it."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        draws = iter(keyed_uniforms(_VERSION, _STREAM[self.split], index, count=_NUM_DRAWS).tolist())
        start, end, ink = _palette(draws)
        size = 0.6 + 0.25 * next(draws)
        main = Glyph(self._source(next(draws)), (1 - size) * next(draws), (1 - size) * next(draws), size, ink)
        small: list[Glyph] = []
        angle, count = 2 * math.pi * next(draws), 1 + int(3 * next(draws))
        for _ in range(count):
            size, colour = 0.14 + 0.08 * next(draws), _hsv(next(draws), 0.4, 0.8)
            source, places = self._source(next(draws)), [(next(draws), next(draws)) for _ in range(_PLACES)]
            options = [Glyph(source, (1 - size) * x, (1 - size) * y, size, colour) for x, y in places]
            small.append(max(options, key=lambda glyph: min(_gap(glyph, other) for other in (main, *small))))
        return Scene(start, end, angle, (*small, main))

    def _source(self, draw: float) -> int:
        first, end = (0, _FIRST_VAL_DIGIT) if self.split == "train" else (_FIRST_VAL_DIGIT, len(self._digits))
        return first + int(draw * (end - first))

    def _paint(self, glyph: Glyph, canvas: NDArray[np.float32], mask: NDArray[np.uint8]) -> None:
        """Blend one digit into the canvas, float32 [S, S, 3] in [0, 1], and write its class into the mask."""
        size = self.image_size
        # The ink has one empty pixel around its 8x8, so that strokes at the edge end smoothly.
        side = max(1, round(1.25 * glyph.size * size))
        left, top = round((glyph.x - glyph.size / 8) * size), round((glyph.y - glyph.size / 8) * size)
        smooth = Image.fromarray(self._ink[glyph.source]).resize((side, side), Image.Resampling.BICUBIC)
        # Cutting the smooth ramp of the enlarged pixels near its middle gives round strokes with a soft edge.
        alpha = np.clip((np.asarray(smooth, np.float32) / 255 - 0.28) / 0.3, 0, 1)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, size), min(top + side, size)
        alpha = alpha[y0 - top : y1 - top, x0 - left : x1 - left]
        region = canvas[y0:y1, x0:x1]
        region += alpha[..., None] * (np.array(glyph.colour, np.float32) - region)
        mask[y0:y1, x0:x1][alpha > 0.5] = self._digits[glyph.source]


@functools.cache
def _handwriting() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Ink of all digits, uint8 [1797, 10, 10] with an empty border, and what they show, uint8 [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return np.pad(ink, ((0, 0), (1, 1), (1, 1))), digits.target.astype(np.uint8)


def _palette(draws: Iterator[float]) -> tuple[Colour, Colour, Colour]:
    """Two neighbouring background colours, dark and cool, and a pale ink that stands out against both.

    Light on dark everywhere: with both polarities, a linear probe of a small model cannot tell the digits apart.
    """
    hue = 0.5 + 0.3 * next(draws)
    near = hue + 0.05 + 0.1 * next(draws)
    return _hsv(hue, 0.62, 0.22), _hsv(near, 0.52, 0.38), _hsv(next(draws), 0.1 + 0.2 * next(draws), 1.0)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)


def _gap(one: Glyph, other: Glyph) -> float:
    """Free distance between two digits seen as discs; negative if they overlap."""
    distance = math.hypot(one.x + one.size / 2 - other.x - other.size / 2, one.y + one.size / 2 - other.y - other.size / 2)
    return distance - (one.size + other.size) / 2


def _background(scene: Scene, size: int) -> NDArray[np.float32]:
    """The gradient, float32 [S, S, 3] in [0, 1]."""
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    share = (cos * ramp[None, :] + sin * ramp[:, None]) / (abs(cos) + abs(sin)) + 0.5
    start, end = np.array(scene.start, np.float32), np.array(scene.end, np.float32)
    background: NDArray[np.float32] = start + share[..., None].astype(np.float32) * (end - start)
    return background
