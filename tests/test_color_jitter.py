"""Colour jitter: torchvision's ranges and order on Pillow's operators, draws by key alone."""

import colorsys
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from nepa_dist.data.color_jitter import color_jitter, shift_hue

KEYS = {"seed": 1, "epoch": 0}


def _photo() -> NDArray[np.uint8]:
    y, x = np.mgrid[:24, :32]
    waves = np.stack([np.sin(x / 5 + y / 11), np.cos(y / 7), np.sin((x + y) / 9)], -1)
    pixels: NDArray[np.uint8] = np.clip(128 + 110 * waves, 0, 255).astype(np.uint8)
    return pixels


def _flat(color: tuple[int, int, int]) -> NDArray[np.uint8]:
    image = np.empty((8, 8, 3), np.uint8)
    image[:] = color
    return image


def test_brightness_is_uniform_in_its_range() -> None:
    # Pillow multiplies: 100 times the factor is the level.
    levels = np.array([color_jitter(_flat((100,) * 3), **KEYS, sample_id=i, brightness=0.4)[0, 0, 0] for i in range(2000)])
    assert levels.min() in (60, 61)
    assert levels.max() in (139, 140)
    assert abs(levels.mean() - 99.5) < 4 * 80 / np.sqrt(12 * 2000)
    assert levels.std() == pytest.approx(80 / np.sqrt(12), rel=0.05)
    assert abs(np.corrcoef(levels[1:], levels[:-1])[0, 1]) < 4 / np.sqrt(2000)
    wide = [color_jitter(_flat((100,) * 3), **KEYS, sample_id=i, brightness=2.0)[0, 0, 0] for i in range(300)]
    assert min(wide) < 10  # the factor stops at 0
    assert max(wide) == 255


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)],
)
def test_each_amount_is_its_pillow_operator(name: str, enhancer: type[ImageEnhance.Brightness]) -> None:
    image = _photo()
    out = color_jitter(image, **KEYS, sample_id=4, **{name: 0.5})
    candidates = [np.asarray(enhancer(Image.fromarray(image)).enhance(factor)) for factor in np.linspace(0.5, 1.5, 2001)]
    assert min(np.abs(candidate.astype(int) - out).max() for candidate in candidates) <= 1
    assert not np.array_equal(out, image)


def test_the_order_is_drawn_and_does_not_follow_the_amounts() -> None:
    image = _photo()
    by_order: tuple[list[float], list[float]] = ([], [])
    for i in range(200):
        # One amount keeps its draw when others are switched on, so the two orders can be told apart.
        both = color_jitter(image, **KEYS, sample_id=i, brightness=0.8, contrast=0.8)
        bright = color_jitter(image, **KEYS, sample_id=i, brightness=0.8)
        contrasted = color_jitter(image, **KEYS, sample_id=i, contrast=0.8)
        last = color_jitter(contrasted, **KEYS, sample_id=i, brightness=0.8)
        if not np.array_equal(last, color_jitter(bright, **KEYS, sample_id=i, contrast=0.8)):
            by_order[np.array_equal(both, last)].append(float(bright.mean()))
    first, second = (np.array(levels) for levels in by_order)
    assert len(first) + len(second) > 150
    assert abs(len(first) - len(second)) < 4 * math.sqrt(200)
    spread = np.concatenate([first, second]).std()
    assert abs(first.mean() - second.mean()) < 4 * spread * math.sqrt(1 / len(first) + 1 / len(second))


@pytest.mark.parametrize("turn", [-0.5, -0.25, -0.1, 0.0, 0.1, 1 / 3, 0.5, 1.0])
def test_hue_turns_the_circle(turn: float) -> None:
    color = (200, 80, 60)
    out = np.asarray(shift_hue(Image.fromarray(_flat(color)), turn))[0, 0] / 255
    hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in color))
    wanted = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    assert np.abs(out - wanted).max() < 0.03


def test_saturation_scales_and_stops_at_full() -> None:
    picture = Image.fromarray(_flat((200, 80, 60)))
    grey = np.asarray(shift_hue(picture, 0.0, 0.0))[0, 0]
    assert (grey == 200).all()
    full = np.asarray(shift_hue(picture, 0.0, 100.0))[0, 0]
    assert full[0] == 200
    assert full.min() == 0


def test_hue_of_the_jitter_is_uniform_in_its_range() -> None:
    image = _flat((200, 80, 80))  # hue 0
    hues = []
    for i in range(1000):
        red, green, blue = color_jitter(image, **KEYS, sample_id=i, hue=0.1)[0, 0] / 255
        hue = colorsys.rgb_to_hsv(red, green, blue)[0]
        hues.append(hue - 1 if hue > 0.5 else hue)
    assert max(map(abs, hues)) < 0.11
    assert max(hues) > 0.09
    assert min(hues) < -0.09
    assert abs(np.mean(hues)) < 4 * 0.2 / np.sqrt(12 * 1000) + 1 / 256


def test_off_is_the_same_image() -> None:
    image = _photo()
    assert color_jitter(image, **KEYS, sample_id=0) is image


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(8, 30), st.integers(8, 30)), sample=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_the_key_decides_and_nothing_else(size: tuple[int, int], sample: int, epoch: int) -> None:
    image = np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8)
    amounts = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    before = image.copy()
    out = color_jitter(image, seed=0, epoch=epoch, sample_id=sample, **amounts)
    assert out.shape == image.shape
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    np.random.seed(sample % 2**32)
    np.testing.assert_array_equal(out, color_jitter(image, seed=0, epoch=epoch, sample_id=sample, **amounts))
    assert not np.array_equal(out, color_jitter(image, seed=0, epoch=epoch, sample_id=sample + 1, **amounts))


@pytest.mark.parametrize("amounts", [{"brightness": -0.1}, {"hue": 0.6}])
def test_amounts_out_of_range_are_refused(amounts: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="colour jitter needs"):
        color_jitter(_photo(), **KEYS, sample_id=0, **amounts)
