"""Augmentation for segmentation: image and mask stay together, the published steps, draws by key alone."""

import colorsys
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.data.segment_augment import (
    IGNORE,
    augment_segment,
    reduce_zero_label,
    rescaled_size,
    resize_for_evaluation,
)

NUM = 1000
SCALE = (128, 32)
COLORS = np.array([(230, 30, 40), (20, 200, 60), (40, 60, 220), (210, 210, 30), (120, 20, 160)], np.uint8)


def _scene(height: int = 48, width: int = 64, block: int = 12) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Blocks of classes 0 to 4, each in its own colour."""
    y, x = np.mgrid[:height, :width] // block
    mask = ((x + 2 * y) % 5).astype(np.uint8)
    return COLORS[mask], mask


def _photo(height: int, width: int) -> NDArray[np.uint8]:
    """A smooth picture with some noise; no two rows or columns are alike."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 31), np.cos(y / 7), np.sin((x + y) / 13)], -1)
    noise = np.random.RandomState(0).uniform(-20, 20, waves.shape)
    pixels: NDArray[np.uint8] = np.clip(128 + 100 * waves + noise, 0, 255).astype(np.uint8)
    return pixels


def _augment(
    image: NDArray[np.uint8], mask: NDArray[Any], sample: int = 0, **options: Any
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    return augment_segment(
        image, mask, **({"crop_size": 32, "seed": 0, "epoch": 0, "sample_id": sample, "scale": SCALE} | options)
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_reduce_zero_label(dtype: type[np.integer[Any]]) -> None:
    mask = np.array([[0, 1, 2], [150, 254, 255]], dtype)
    reduced = reduce_zero_label(mask)
    assert reduced.dtype == dtype
    np.testing.assert_array_equal(reduced, [[255, 0, 1], [149, 253, 255]])
    np.testing.assert_array_equal(mask, [[0, 1, 2], [150, 254, 255]])


@pytest.mark.parametrize(
    ("size", "scale", "wanted"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((683, 512), (2048, 512), (683, 512)),
        ((300, 400), (2048, 512), (512, 683)),
        ((20, 3000), (2048, 512), (14, 2048)),  # the long side stops it
        ((3000, 20), (512, 2048), (2048, 14)),
        ((8, 8), (2048, 512), (512, 512)),
        ((1, 9000), (100, 50), (1, 100)),
    ],
)
def test_rescaled_size(size: tuple[int, int], scale: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert rescaled_size(*size, scale) == wanted


@pytest.mark.parametrize("size", [(75, 100), (100, 75), (8, 8), (600, 500), (20, 3000)])
def test_evaluation_resizes_the_short_side_and_keeps_the_aspect(size: tuple[int, int]) -> None:
    image = _photo(*size)
    out = resize_for_evaluation(image, (256, 64))
    height, width = rescaled_size(*size, (256, 64))
    assert out.shape == (height, width, 3)
    assert min(height, width) == 64 or max(height, width) == 256
    wanted = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(out, np.asarray(wanted))


def test_a_colour_stays_on_its_label() -> None:
    image, mask = _scene()
    for sample in range(60):
        out, labels = _augment(image, mask, sample, photometric=False)
        labelled = labels != IGNORE
        # Away from edges a pixel has exactly one class's colour, and it must be the label's.
        exact = (out[:, :, None] == COLORS).all(-1)
        pure = exact.any(-1) & labelled
        assert pure.sum() > 0.3 * labelled.sum()
        np.testing.assert_array_equal(exact.argmax(-1)[pure], labels[pure])
        # At an edge the colour is a mixture, but one with the label: it is at most half-way to another class.
        own = np.abs(out.astype(int) - COLORS[np.where(labelled, labels, 0)]).sum(-1)
        assert (own[labelled] < 255).mean() > 0.975


def test_a_small_marker_is_found_at_the_same_place() -> None:
    image, mask = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80), np.uint8)
    image[33:39, 51:57], mask[33:39, 51:57] = 255, 1
    seen = 0
    for sample in range(100):
        out, labels = _augment(
            image, mask, sample, photometric=False, fill=(0, 0, 0), ratio_range=(1.0, 2.0), cat_max_ratio=1.0
        )
        if (labels == 1).sum() < 4:
            continue
        bright, marked = np.argwhere(out[..., 0] > 127), np.argwhere(labels == 1)
        assert np.abs(bright.mean(0) - marked.mean(0)).max() < 0.6
        seen += 1
    assert seen > 25


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.7])
def test_the_crop_is_a_part_of_the_resized_image(ratio: float) -> None:
    image = _photo(75, 100)
    mask = np.arange(7500).reshape(75, 100) + 256  # no two pixels alike
    height, width = rescaled_size(75, 100, (int(240 * ratio), int(60 * ratio)))
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    rows = ((np.arange(height) + 0.5) * 75 / height).astype(int)
    columns = ((np.arange(width) + 0.5) * 100 / width).astype(int)
    whole_mask = mask[np.ix_(rows, columns)]
    places = set()
    for sample in range(12):
        options = {"crop_size": 24, "scale": (240, 60), "ratio_range": (ratio, ratio), "photometric": False}
        out, labels = _augment(image, mask, sample, flip=float(sample % 2), **options)
        if sample % 2:
            out, labels = out[:, ::-1], labels[:, ::-1]
        found = [
            (y, x)
            for y in range(height - 23)
            for x in range(width - 23)
            if np.array_equal(whole_mask[y : y + 24, x : x + 24], labels)
        ]
        assert len(found) == 1
        y, x = found[0]
        difference = np.abs(whole[y : y + 24, x : x + 24] - out)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.05  # Pillow holds the box in single precision
        places.add(found[0])
    assert len(places) > 8


def test_a_crop_larger_than_the_image_pads_right_and_below() -> None:
    image, mask = _scene()
    for flip in (0.0, 1.0):
        out, labels = _augment(image, mask, crop_size=100, ratio_range=(1.0, 1.0), photometric=True, flip=flip, fill=(1, 2, 3))
        assert out.shape == (100, 100, 3)
        height, width = rescaled_size(48, 64, SCALE)
        inside = np.zeros((100, 100), bool)
        inside[:height, :width] = True
        assert (labels[inside] != IGNORE).all()
        assert (labels[~inside] == IGNORE).all()
        assert (out[~inside] == (1, 2, 3)).all()


def test_the_scale_is_uniform() -> None:
    image, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    options = {"crop_size": 210, "scale": (100, 100), "photometric": False, "cat_max_ratio": 1.0}
    sides = np.array([(_augment(image, mask, i, **options)[1][0] != IGNORE).sum() for i in range(NUM)])
    assert sides.min() in (50, 51)
    assert sides.max() in (198, 199)
    assert abs(sides.mean() - 124.5) < 4 * 150 / math.sqrt(12 * NUM)
    assert sides.std() == pytest.approx(150 / math.sqrt(12), rel=0.05)
    assert abs(np.corrcoef(sides[1:], sides[:-1])[0, 1]) < 4 / math.sqrt(NUM)


def test_the_flip_has_its_probability() -> None:
    image, mask = _scene(8, 8, 4)
    mask[:, 4:], mask[:, :4] = 1, 0
    flat = {"crop_size": 8, "scale": (8, 8), "ratio_range": (1.0, 1.0), "photometric": False}
    flipped = np.array([_augment(image, mask, i, flip=0.3, **flat)[1][0, 0] == 1 for i in range(NUM)])
    assert abs(flipped.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / NUM)
    assert abs(np.corrcoef(flipped[1:], flipped[:-1])[0, 1]) < 4 / math.sqrt(NUM)


def _largest_share(labels: NDArray[Any]) -> float:
    counts = np.unique(labels[labels != IGNORE], return_counts=True)[1]
    return float(counts.max() / counts.sum())


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_crops_that_one_class_fills_are_drawn_again(dtype: type[np.integer[Any]]) -> None:
    image, mask = np.zeros((64, 256, 3), np.uint8), np.zeros((64, 256), dtype)
    mask[:, 100:140] = 3  # one box in five or so shows enough of both
    options = {"scale": (256, 64), "ratio_range": (1.0, 1.0), "photometric": False}
    free = [_largest_share(_augment(image, mask, i, cat_max_ratio=1.0, **options)[1]) < 0.75 for i in range(200)]
    bound = [_largest_share(_augment(image, mask, i, **options)[1]) < 0.75 for i in range(200)]
    rate = float(np.mean(free))
    assert 0.1 < rate < 0.35
    wanted = 1 - (1 - rate) ** 11  # the first box and ten more
    assert abs(np.mean(bound) - wanted) < 0.1


def test_a_box_that_is_good_at_once_is_kept() -> None:
    image, mask = _scene(64, 64, 8)
    for sample in range(20):
        free, bound = (_augment(image, mask, sample, cat_max_ratio=limit) for limit in (1.0, 0.75))
        assert np.array_equal(free[0], bound[0])


def test_ignored_pixels_do_not_count_for_the_share_of_a_class() -> None:
    image, mask = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), IGNORE, np.uint8)
    mask[::8, ::4], mask[::8, 2::4] = 0, 1  # rare, even, everywhere
    options = {"scale": (64, 64), "ratio_range": (1.0, 1.0), "photometric": False}
    for sample in range(20):
        free, bound = (_augment(image, mask, sample, cat_max_ratio=limit, **options)[1] for limit in (1.0, 0.75))
        assert np.array_equal(free, bound)
    empty = _augment(image, np.full((64, 64), IGNORE, np.uint8), **options)[1]
    assert (empty == IGNORE).all()


def _flat(color: tuple[int, int, int], sample: int) -> NDArray[np.uint8]:
    image = np.empty((8, 8, 3), np.uint8)
    image[:] = color
    out, _ = _augment(image, np.zeros((8, 8), np.uint8), sample, crop_size=8, scale=(8, 8), ratio_range=(1.0, 1.0))
    assert (out == out[0, 0]).all()
    return out[0, 0]


def test_brightness_and_contrast_of_the_distortion() -> None:
    greys = np.array([_flat((100, 100, 100), i) for i in range(NUM)]).astype(int)
    assert (greys == greys[:, :1]).all()  # saturation and hue leave grey alone
    levels = greys[:, 0]
    assert abs((levels == 100).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / NUM) + 0.01
    assert levels.min() >= int((100 - 32) * 0.5)
    assert levels.max() <= (100 + 32) * 1.5
    assert levels.min() < 45
    assert levels.max() > 185
    # Half of (32 / 2 on average in size) and half of (a factor of 1 on average): no drift, but for rounding down.
    assert abs(levels.mean() - 99.6) < 4 * levels.std() / math.sqrt(NUM)


def test_saturation_and_hue_of_the_distortion() -> None:
    hues, saturations = [], []
    for i in range(NUM):
        hue, saturation, value = colorsys.rgb_to_hsv(*(_flat((200, 120, 120), i).astype(float) / 255))
        if abs(value * 255 - 200) < 1.5:  # neither brightness nor contrast, which change the saturation too
            hues.append((hue + 0.5) % 1 - 0.5)
            saturations.append(saturation)
    num = len(hues)
    assert abs(num / NUM - 0.25) < 0.06
    turned = np.abs(hues) > 0.004
    assert abs(turned.mean() - 0.5) < 4 * 0.5 / math.sqrt(num) + 0.03  # a turn below 1/256 cannot be seen
    assert 0.09 < np.abs(hues).max() < 0.11
    assert min(hues) < -0.05
    changed = np.abs(np.array(saturations) - 0.4) > 0.01
    assert abs(changed.mean() - 0.5) < 4 * 0.5 / math.sqrt(num) + 0.03
    low, high = np.quantile(saturations, [0.02, 0.98])  # beyond are changes of brightness and contrast that cancel in the value
    assert 0.19 < low < 0.24
    assert 0.56 < high < 0.61
    assert abs(np.corrcoef(turned, changed)[0, 1]) < 4 / math.sqrt(num)


def test_the_distortion_changes_the_image_alone() -> None:
    image, mask = _scene()
    changed = 0
    for sample in range(40):
        plain, distorted = (_augment(image, mask, sample, photometric=on) for on in (False, True))
        np.testing.assert_array_equal(plain[1], distorted[1])
        changed += not np.array_equal(plain[0], distorted[0])
    assert changed > 30


def test_the_key_decides_and_nothing_else() -> None:
    image, mask = _photo(48, 64), _scene()[1]
    base = {"seed": 1, "epoch": 2, "sample_id": 3}
    out, labels = _augment(image, mask, **base)
    np.random.seed(99)
    random.seed(99)
    again, other = _augment(image, mask, **base)
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(labels, other)
    for key in base:
        assert not np.array_equal(out, _augment(image, mask, **(base | {key: 7}))[0]), key


@settings(max_examples=80, deadline=None)
@given(
    size=st.one_of(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.sampled_from([(8, 8), (3000, 20), (20, 3000)])),
    crop_size=st.integers(1, 70),
    sample=st.integers(0, 2**40),
    dtype=st.sampled_from([np.uint8, np.int16, np.int64]),
)
def test_any_size_gives_a_square_pair(size: tuple[int, int], crop_size: int, sample: int, dtype: type[np.integer[Any]]) -> None:
    image = _photo(*size)
    mask = (np.arange(size[0] * size[1]).reshape(size) % 7).astype(dtype)
    mask[0, 0] = IGNORE
    image_before, mask_before = image.copy(), mask.copy()
    out, labels = _augment(image, mask, sample, crop_size=crop_size, fill=(7, 8, 9))
    assert out.shape == (crop_size, crop_size, 3)
    assert out.dtype == np.uint8
    assert labels.shape == (crop_size, crop_size)
    assert labels.dtype == dtype
    assert set(np.unique(labels)) <= {*range(7), IGNORE}
    np.testing.assert_array_equal(image, image_before)
    np.testing.assert_array_equal(mask, mask_before)
    assert out.flags.c_contiguous
    assert labels.flags.c_contiguous


def test_bad_arguments_are_refused() -> None:
    image, mask = _scene()
    with pytest.raises(ValueError, match=r"the mask is \(64, 48\), but the image is \(48, 64\)"):
        _augment(image, mask.T)
    for wrong in (mask.astype(np.int8), mask.astype(np.float32), mask.astype(bool)):
        with pytest.raises(ValueError, match="a mask needs an integer type that holds 255"):
            _augment(image, wrong)
        with pytest.raises(ValueError, match="a mask needs an integer type that holds 255"):
            reduce_zero_label(wrong)
