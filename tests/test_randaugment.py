"""RandAugment: timm's operations and ranges, Pillow's pixels, draws by key alone."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from nepa_dist.data.randaugment import OPERATIONS, Operation, apply_operation, draw_operations, rand_augment

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILL = (128, 128, 128)
NUM = 2000


def _photo(height: int = 60, width: int = 80) -> Image.Image:
    """A smooth picture with some noise that does not reach the full range, so that autocontrast has something to do."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 31), np.cos(y / 7), np.sin((x + y) / 13)], -1)
    noise = np.random.RandomState(0).uniform(-20, 20, waves.shape)
    return Image.fromarray(np.clip(120 + 80 * waves + noise, 0, 255).astype(np.uint8))


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


def _expected(name: str, image: Image.Image, magnitude: float, sign: int, resample: Image.Resampling) -> Image.Image:
    """What timm documents for the operation at this magnitude, written with Pillow's own operator or plain arithmetic."""
    pixels = np.asarray(image).astype(int)
    enhance = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhance:
        return enhance[name](image).enhance(max(0.1, 1 + sign * magnitude / 10 * 0.9))
    shear, shift = sign * magnitude / 10 * 0.3, sign * magnitude / 10 * 0.45
    match name:
        case "auto_contrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "rotate":
            return image.rotate(sign * 3.0 * magnitude, resample, fillcolor=FILL)
        case "shear_x":
            return _affine(image, (1, shear, 0, 0, 1, 0), resample)
        case "shear_y":
            return _affine(image, (1, 0, 0, shear, 1, 0), resample)
        case "translate_x":
            return _affine(image, (1, 0, shift * image.width, 0, 1, 0), resample)
        case "translate_y":
            return _affine(image, (1, 0, 0, 0, 1, shift * image.height), resample)
        case "invert":
            pixels = 255 - pixels
        case "posterize":
            pixels = pixels & (0xFF00 >> max(1, 4 - int(magnitude / 10 * 4))) & 0xFF
        case "solarize":
            pixels = np.where(pixels < 256 - int(magnitude / 10 * 256), pixels, 255 - pixels)
        case "solarize_add":
            pixels = np.where(pixels < 128, np.minimum(255, pixels + int(magnitude / 10 * 110)), pixels)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows(name: str) -> None:
    image = _photo()
    before = image.tobytes()
    for magnitude in (0.0, 4.5, 8.7, 9.0, 10.0):
        for sign in (1, -1):
            for resample in (BILINEAR, BICUBIC):
                out = apply_operation(image, Operation(name, magnitude, sign, resample), FILL)
                assert (out.mode, out.size) == ("RGB", image.size)
                wanted = _expected(name, image, magnitude, sign, resample)
                np.testing.assert_array_equal(np.asarray(out), np.asarray(wanted))
    assert image.tobytes() == before


def test_there_are_fifteen_operations_and_all_but_the_weak_ones_change_a_photo() -> None:
    assert len(OPERATIONS) == 15
    image = _photo()
    for name in OPERATIONS:
        out = apply_operation(image, Operation(name, 9.0, 1, BILINEAR))
        assert np.abs(np.asarray(out).astype(int) - np.asarray(image)).mean() > 1, name


def test_a_translation_by_whole_pixels_moves_and_fills() -> None:
    image = _photo(40, 100)
    pixels = np.asarray(image)
    moved = np.asarray(apply_operation(image, Operation("translate_x", 2.0, 1, BILINEAR), (1, 2, 3)))  # 9 % of 100 pixels
    assert np.abs(moved[:, :91].astype(int) - pixels[:, 9:]).max() <= 1  # 9 only up to rounding
    assert (moved[:, 91:] == (1, 2, 3)).all()
    moved = np.asarray(apply_operation(image, Operation("translate_y", 5.0, -1, BICUBIC), (1, 2, 3)))  # 22.5 % of 40 pixels
    assert np.abs(moved[9:].astype(int) - pixels[:31]).max() <= 1
    assert (moved[:9] == (1, 2, 3)).all()


def test_draws_follow_the_policy() -> None:
    chosen = [draw_operations(3, 1, i, probability=1.0) for i in range(NUM)]
    assert all(len(operations) == 2 for operations in chosen)
    flat = [operation for operations in chosen for operation in operations]
    total = len(flat)

    def near(count: int, share: float, num: int = total) -> bool:
        return abs(count - share * num) < 4 * math.sqrt(num * share * (1 - share))

    counts = Counter(operation.name for operation in flat)
    assert set(counts) == set(OPERATIONS)
    assert all(near(count, 1 / 15) for count in counts.values()), counts
    assert near(sum(operations[0].name == operations[1].name for operations in chosen), 1 / 15, NUM)  # with replacement
    assert near(sum(operation.sign == 1 for operation in flat), 0.5)
    assert near(sum(operation.resample == BICUBIC for operation in flat), 0.5)
    magnitudes = np.array([operation.magnitude for operation in flat])
    assert magnitudes.max() == 10.0
    assert near(int((magnitudes == 10).sum()), 0.02275)  # above 2 standard deviations
    assert abs(magnitudes.mean() - 8.9958) < 4 * 0.5 / math.sqrt(total)  # of N(9, 0.5) clipped at 10
    assert near(int((magnitudes < 8.5).sum()), 0.15866)  # below 1 standard deviation


def test_each_operation_is_applied_half_the_time_and_independently() -> None:
    lengths = Counter(len(draw_operations(0, 0, i)) for i in range(NUM))
    for length, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert abs(lengths[length] - share * NUM) < 4 * math.sqrt(NUM * share * (1 - share)), lengths


def test_interpolation_and_strength_can_be_fixed() -> None:
    for i in range(50):
        for operation in draw_operations(0, 0, i, interpolation="bicubic", magnitude=7, magnitude_std=0):
            assert operation.resample == BICUBIC
            assert operation.magnitude == 7
    assert draw_operations(0, 0, 0, num_ops=0) == []
    assert {len(draw_operations(0, 0, i, num_ops=5, probability=1.0)) for i in range(20)} == {5}


def test_neighbouring_keys_are_independent() -> None:
    values = np.array([draw_operations(0, 0, i, probability=1.0, magnitude=5)[0].magnitude for i in range(NUM)])
    for other in (
        np.roll(values, 1),
        np.array([draw_operations(0, 1, i, probability=1.0, magnitude=5)[0].magnitude for i in range(NUM)]),
        np.array([draw_operations(0, 0, i, probability=1.0, magnitude=5)[1].magnitude for i in range(NUM)]),
    ):
        assert abs(np.corrcoef(values, other)[0, 1]) < 4 / math.sqrt(NUM)


def test_the_key_decides_and_nothing_else() -> None:
    image = np.asarray(_photo())
    base = {"seed": 1, "epoch": 2, "sample_id": 3, "probability": 1.0}
    first = rand_augment(image, **base)
    np.random.seed(99)
    random.seed(99)
    np.testing.assert_array_equal(first, rand_augment(image, **base))
    for key in ("seed", "epoch", "sample_id"):
        assert not np.array_equal(first, rand_augment(image, **(base | {key: 7}))), key


def test_the_meaning_of_a_key_does_not_change() -> None:
    # A change here changes what every run sees: a resumed run would no longer repeat its pixels.
    names = [[operation.name for operation in draw_operations(0, 0, i)] for i in range(6)]
    assert names == [["sharpness"], ["color"], ["equalize", "posterize"], ["posterize"], [], ["color"]]
    assert draw_operations(0, 0, 5)[0].magnitude == pytest.approx(8.989681502237016, abs=1e-9)


def test_the_image_gets_the_drawn_operations_in_order() -> None:
    image = _photo()
    for sample in range(30):
        wanted = image
        for operation in draw_operations(5, 0, sample, interpolation="bilinear"):
            wanted = apply_operation(wanted, operation, (9, 9, 9))
        out = rand_augment(np.asarray(image), seed=5, epoch=0, sample_id=sample, interpolation="bilinear", fill=(9, 9, 9))
        np.testing.assert_array_equal(out, np.asarray(wanted))


@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(st.tuples(st.integers(8, 40), st.integers(8, 40)), st.sampled_from([(8, 8), (20, 3000), (3000, 20)])),
    sample=st.integers(0, 2**40),
    level=st.integers(0, 255),
)
def test_any_image_gives_an_image_of_its_size(size: tuple[int, int], sample: int, level: int) -> None:
    image: NDArray[np.uint8] = np.full((*size, 3), level, np.uint8)
    image[0, 0] = 255 - level
    out = rand_augment(image, seed=0, epoch=0, sample_id=sample, num_ops=4, probability=1.0)
    assert out.shape == image.shape
    assert out.dtype == np.uint8
    assert (image[1:] == level).all()


@pytest.mark.parametrize(
    "settings_", [{"num_ops": -1}, {"magnitude": 11.0}, {"magnitude": -1.0}, {"magnitude_std": -0.5}, {"probability": 1.5}]
)
def test_settings_out_of_range_are_refused(settings_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="RandAugment needs"):
        draw_operations(0, 0, 0, **settings_)  # type: ignore[arg-type]


def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(ValueError, match="'lanczos' is unknown; use one of random, bilinear, bicubic"):
        draw_operations(0, 0, 0, interpolation="lanczos")  # type: ignore[arg-type]
