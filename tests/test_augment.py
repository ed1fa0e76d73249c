"""Augmentation: torchvision's semantics, Pillow's pixels, no hidden state."""

import math
import random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.config import AugmentConfig
from nepa_dist.data.augment import CropTransform, Interpolation, augment, random_resized_crop_box, resize

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def _photo(height: int = 75, width: int = 100) -> NDArray[np.uint8]:
    """A smooth picture with some noise; no two rows or columns are alike."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 31), np.cos(y / 7), np.sin((x + y) / 13)], -1)
    noise = np.random.RandomState(0).uniform(-20, 20, waves.shape)
    pixels: NDArray[np.uint8] = np.clip(128 + 100 * waves + noise, 0, 255).astype(np.uint8)
    return pixels


def _torchvision_box(rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params as its documentation describes it, with another source of randomness."""
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    raise AssertionError("the sizes used here always fit within ten attempts")


def test_boxes_follow_torchvision_in_range_and_distribution() -> None:
    width, height, num = 500, 375, 2000
    boxes = np.array([random_resized_crop_box(width, height, 1, 0, i, SCALE, RATIO) for i in range(num)], float)
    x, y, w, h = boxes.T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + w <= width).all()
    assert (y + h <= height).all()
    share, ratio = w * h / (width * height), w / h
    assert share.min() > 0.078
    assert share.min() < 0.1
    assert share.max() > 0.97
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    rng = random.Random(0)
    wanted = np.array([_torchvision_box(rng, width, height) for _ in range(num)], float)
    for name, values, other in (
        ("area", share, wanted[:, 2] * wanted[:, 3] / (width * height)),
        ("log ratio", np.log(ratio), np.log(wanted[:, 2] / wanted[:, 3])),
        ("centre x", x + w / 2, wanted[:, 0] + wanted[:, 2] / 2),
        ("centre y", y + h / 2, wanted[:, 1] + wanted[:, 3] / 2),
    ):
        error = math.sqrt((values.var() + other.var()) / num)
        assert abs(values.mean() - other.mean()) < 4 * error, name
        assert values.std() == pytest.approx(other.std(), rel=0.1), name


@pytest.mark.parametrize(("width", "height", "box"), [(1000, 20, (486, 0, 27, 20)), (20, 1000, (0, 486, 20, 27))])
def test_an_extreme_image_falls_back_to_the_central_crop(width: int, height: int, box: tuple[int, ...]) -> None:
    # Only the full area is allowed, and with these shapes no ratio in the range gives it.
    assert random_resized_crop_box(width, height, 0, 0, 0, (1.0, 1.0), RATIO) == box


@pytest.mark.parametrize("size", [(8, 8), (8, 4000), (4000, 8), (9, 17)])
def test_every_image_size_gives_a_box_inside_and_an_output(size: tuple[int, int]) -> None:
    height, width = size
    image = np.full((height, width, 3), 77, np.uint8)
    for crop in ("random_resized", "center"):
        for sample in range(20):
            out = augment(image, AugmentConfig(crop=crop), image_size=32, seed=0, epoch=0, sample_id=sample)
            assert out.shape == (32, 32, 3)
            assert (out == 77).all()


def _levels(one: NDArray[np.uint8], two: NDArray[np.uint8]) -> int:
    """Largest difference of two pixels."""
    return int(np.abs(one.astype(int) - two).max())


def _flips(seed: int, epoch: int, sample_id: int, probability: float) -> bool:
    """Whether an image of which only the left half is white comes out with a white right half."""
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2] = 255
    whole = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=probability)
    out = augment(image, whole, image_size=4, seed=seed, epoch=epoch, sample_id=sample_id)
    return bool(out[0, 3, 0])


def test_random_crops_are_pillows_crop_and_resize_within_a_level() -> None:
    image, config = _photo(), AugmentConfig()
    flips = []
    for sample in range(30):
        x, y, w, h = random_resized_crop_box(100, 75, 4, 2, sample, config.scale, config.ratio)
        wanted = Image.fromarray(image).crop((x, y, x + w, y + h)).resize((48, 48), Image.Resampling.BILINEAR)
        flips.append(_flips(4, 2, sample, 0.5))
        pixels = np.asarray(wanted)[:, ::-1] if flips[-1] else np.asarray(wanted)
        out = augment(image, config, image_size=48, seed=4, epoch=2, sample_id=sample)
        assert out.dtype == np.uint8
        assert _levels(out, pixels) <= 1
    assert {True, False} == set(flips)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(48, 48), (200, 150), (75, 100), (10, 12)])
def test_resize_is_pillows_within_a_level(interpolation: Interpolation, size: tuple[int, int]) -> None:
    image = _photo()
    image.setflags(write=False)
    wanted = Image.fromarray(image).resize(size[::-1], Image.Resampling[interpolation.upper()])
    assert _levels(resize(image, *size, interpolation), np.asarray(wanted)) <= 1


def test_draws_are_stable_across_versions() -> None:
    boxes = [random_resized_crop_box(500, 375, 4, 2, i, SCALE, RATIO) for i in range(3)]
    assert boxes == [(100, 118, 175, 171), (79, 141, 179, 199), (138, 125, 288, 231)]
    assert [_flips(4, 2, i, 0.5) for i in range(8)] == [False, True, True, False, True, True, False, True]


def test_interpolation_can_be_chosen() -> None:
    keys = {"image_size": 30, "seed": 0, "epoch": 0, "sample_id": 0}
    image, center = _photo(60, 60), AugmentConfig(crop="center")
    wanted = np.asarray(Image.fromarray(image).resize((30, 30), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(augment(image, center, interpolation="bicubic", **keys), wanted)
    sharp, soft = (augment(image, AugmentConfig(), interpolation=kind, **keys) for kind in ("bicubic", "bilinear"))
    assert sharp.std() > soft.std()


def test_flip_has_its_probability_and_does_not_follow_the_box() -> None:
    flips = np.array([_flips(0, 0, i, 0.3) for i in range(3000)])
    assert flips.mean() == pytest.approx(0.3, abs=0.03)
    left = np.array([random_resized_crop_box(500, 375, 0, 0, i, SCALE, RATIO)[0] for i in range(3000)])
    assert abs(np.corrcoef(flips, left)[0, 1]) < 0.06
    assert not any(_flips(0, 0, i, 0.0) for i in range(100))
    assert all(_flips(0, 0, i, 1.0) for i in range(100))


def test_the_key_decides_and_nothing_else() -> None:
    image, config = _photo(), AugmentConfig()
    base = {"image_size": 32, "seed": 1, "epoch": 2, "sample_id": 3}
    first = augment(image, config, **base)
    np.random.seed(99)
    random.seed(99)
    np.testing.assert_array_equal(first, augment(image, config, **base))
    for key in ("seed", "epoch", "sample_id"):
        assert not np.array_equal(first, augment(image, config, **(base | {key: 7}))), key


def test_center_is_the_short_side_and_the_middle() -> None:
    image = _photo(60, 120)
    config = AugmentConfig(crop="center")
    keys = {"seed": 0, "epoch": 0, "sample_id": 0}
    whole = Image.fromarray(image).resize((60, 30), Image.Resampling.BILINEAR).crop((15, 0, 45, 30))
    np.testing.assert_array_equal(augment(image, config, image_size=30, **keys), np.asarray(whole))
    np.testing.assert_array_equal(augment(image, config, image_size=60, **keys), image[:, 30:90])
    # A size that does not divide: torchvision rounds the long side and the offset, so pixels agree only nearly.
    odd = _photo(75, 100)
    resized = Image.fromarray(odd).resize((int(32 * 100 / 75), 32), Image.Resampling.BILINEAR)
    other = np.asarray(resized)[:, 5:37].astype(float)
    assert np.abs(augment(odd, config, image_size=32, **keys) - other).mean() < 6


@pytest.mark.parametrize("crop", ["random_resized", "center"])
def test_a_mask_is_cut_like_its_image(crop: str) -> None:
    height, width = 60, 90
    mask = (np.mgrid[:height, :width][1] // 10).astype(np.uint8)
    image = np.repeat((mask * 28)[..., None], 3, -1)
    for sample in range(10):
        keys = {"image_size": 64, "seed": 0, "epoch": 0, "sample_id": sample}
        _, cut = CropTransform(AugmentConfig(crop=crop))(image, mask, **keys)
        assert cut is not None
        assert cut.shape == (64, 64)
        assert cut.dtype == np.uint8
        pixels = augment(image, AugmentConfig(crop=crop), **keys)[..., 0]
        # Only pixels at an edge between two classes are mixed.
        assert (np.abs(pixels / 28 - cut) < 0.51).all()
