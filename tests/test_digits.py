"""The embedded digit scenes: pure, labelled, and with no digit in both splits."""

import pickle
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from nepa_dist.data.containers import DataError, Sample
from nepa_dist.data.digits import BACKGROUND, NUM_SCENES, DigitScenes
from nepa_dist.data.open import open_container


def _pixels(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.integer[Any]]]:
    assert isinstance(sample.image, np.ndarray)
    assert sample.mask is not None
    return sample.image, sample.mask


@pytest.mark.parametrize("split", ["train", "val"])
def test_open_container_gives_the_scenes(split: Literal["train", "val"]) -> None:
    container = open_container("digits", split, image_size=48)
    assert len(container) == NUM_SCENES[split]
    assert container.class_names == [str(i) for i in range(10)]
    assert container.name(7) == f"digits/{split}/7"
    image, mask = _pixels(container.read(7))
    assert image.shape == (48, 48, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (48, 48)


def test_a_scene_depends_on_split_and_index_alone() -> None:
    first = DigitScenes("train", 64)
    wanted = [first.read(i) for i in (5, 19_999, 5)]
    again = pickle.loads(pickle.dumps(DigitScenes("train", 64)))  # noqa: S301 - our own bytes
    for index, sample in zip((5, 19_999, 5), wanted, strict=True):
        other = again.read(index)
        for one, two in zip(_pixels(sample), _pixels(other), strict=True):
            np.testing.assert_array_equal(one, two)
        assert sample.label == other.label
    assert not np.array_equal(_pixels(wanted[0])[0], _pixels(wanted[1])[0])
    assert not np.array_equal(_pixels(wanted[0])[0], _pixels(DigitScenes("val", 64).read(5))[0])


def test_no_digit_is_in_both_splits() -> None:
    train, val = (
        {glyph.source for i in range(2000) for glyph in scenes.scene(i).glyphs}
        for scenes in (DigitScenes("train", 32), DigitScenes("val", 32))
    )
    assert max(train) < 1437
    assert len(train) > 1300
    assert val == set(range(1437, 1797))


def test_the_mask_agrees_with_the_label_and_the_picture() -> None:
    scenes = DigitScenes("train", 64)
    for index in range(60):
        sample, scene = scenes.read(index), scenes.scene(index)
        image, mask = _pixels(sample)
        assert set(np.unique(mask)) <= set(range(BACKGROUND + 1))
        counts = np.bincount(mask.ravel(), minlength=BACKGROUND + 1)
        assert counts[:BACKGROUND].argmax() == sample.label
        # Inside the box of the large digit, which is painted last, its ink has the ink's colour.
        main = scene.glyphs[-1]
        x, y, size = (round(v * 64) for v in (main.x, main.y, main.size))
        ink = mask[y : y + size, x : x + size] == sample.label
        pixels = image[y : y + size, x : x + size][ink].astype(float)
        assert np.median(np.abs(pixels - np.array(main.colour) * 255)) < 12


def test_composition_keeps_its_promises() -> None:
    scenes = DigitScenes("val", 32)
    labels = []
    for index in range(500):
        *small, main = scenes.scene(index).glyphs
        labels.append(scenes.read(index).label)
        assert 1 <= len(small) <= 3
        assert 0.6 <= main.size <= 0.85
        for glyph in (*small, main):
            assert 0 <= glyph.x <= 1 - glyph.size
            assert 0 <= glyph.y <= 1 - glyph.size
        for glyph in small:
            assert 0.14 <= glyph.size <= 0.22
            cx, cy = main.x + main.size / 2, main.y + main.size / 2
            assert not (glyph.x < cx < glyph.x + glyph.size and glyph.y < cy < glyph.y + glyph.size)
    assert np.bincount(labels, minlength=10).min() > 25


def test_ink_stands_out_from_the_background() -> None:
    scenes = DigitScenes("train", 64)
    for index in range(100):
        sample = scenes.read(index)
        image, mask = _pixels(sample)
        gray = image.astype(float) @ (0.299, 0.587, 0.114)
        contrast = abs(gray[mask == sample.label].mean() - gray[mask == BACKGROUND].mean())
        assert contrast > 35, index


@pytest.mark.parametrize("size", [32, 33, 50, 224])
def test_the_same_picture_at_every_size(size: int) -> None:
    label = DigitScenes("train", 128).read(11).label
    assert DigitScenes("train", size).read(11).label == label
    small, small_mask = _pixels(DigitScenes("train", size).read(11))
    large, large_mask = _pixels(DigitScenes("train", 128).read(11))
    assert (small_mask == label).mean() == pytest.approx((large_mask == label).mean(), abs=0.04)
    assert np.abs(small.mean((0, 1)) - large.mean((0, 1))).max() < 6


def test_fingerprint_tells_the_splits_apart() -> None:
    assert DigitScenes("train", 32).fingerprint == DigitScenes("train", 64).fingerprint != DigitScenes("val", 32).fingerprint


def test_limits() -> None:
    with pytest.raises(DataError, match="at least 32 pixels, got 28"):
        DigitScenes("train", 28)
    for index in (-1, 2000):
        with pytest.raises(IndexError):
            DigitScenes("val", 32).read(index)
