"""What each task does to its images, and that the loader hands erasing on to the device."""

import numpy as np
import pytest
import torch
from PIL import Image

from nepa_dist.config import Config
from nepa_dist.data.augment import cut_center
from nepa_dist.data.device import to_device
from nepa_dist.data.erasing import draw_erasing
from nepa_dist.data.loader import EvalLoader, TrainLoader
from nepa_dist.data.open import open_container
from nepa_dist.data.transforms import eval_transform, train_transform

PIXELS = np.random.RandomState(0).randint(0, 256, (60, 80, 3)).astype(np.uint8)
KEY = {"image_size": 32, "seed": 1, "epoch": 2, "sample_id": 3}


def config(task="finetune", **sections):
    return Config.model_validate({"task": task, **sections})


@pytest.mark.parametrize("size", [(60, 75), (75, 60), (50, 50)])
@pytest.mark.parametrize("squash", [False, True])
def test_the_centre_is_that_of_pillows_resize_and_crop(size, squash):
    """Sizes at which no side is rounded when the short one becomes 40 pixels."""
    height, width = size
    image = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    resized_to = (40, 40) if squash else (width * 40 // min(size), height * 40 // min(size))
    resized = Image.fromarray(image).resize(resized_to, Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)))
    found = cut_center(image, 32, resize_to=40 / 32, squash=squash)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_fine_tuning_augments_as_configured_and_repeats_itself():
    plain = train_transform(config(data={"augment": {"randaugment_magnitude": None}}))
    strong = train_transform(config(data={"augment": {"randaugment_magnitude": 9, "color_jitter": 0.4}}))
    one, _ = plain(PIXELS, None, **KEY)
    two, _ = strong(PIXELS, None, **KEY)
    again, _ = strong(PIXELS, None, **KEY)
    assert one.shape == two.shape == (32, 32, 3)
    assert not np.array_equal(one, two)
    assert np.array_equal(two, again)
    bicubic = train_transform(config(data={"augment": {"interpolation": "bicubic"}}))
    assert not np.array_equal(bicubic(PIXELS, None, **KEY)[0], one)


def test_pretraining_is_crop_and_flip_alone():
    transform = train_transform(config("pretrain"))
    grey = np.full((60, 80, 3), 77, np.uint8)
    assert (transform(grey, None, **KEY)[0] == 77).all()


def test_segmentation_keeps_image_and_mask_together():
    mask = np.where(PIXELS[:, :, 0] > 127, 2, 1).astype(np.uint8)
    image = np.repeat(np.where(mask == 2, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)
    settings = {"num_classes": 2, "photometric": False, "scale_range": [2.0, 2.0]}
    transform = train_transform(config("segment", segment=settings))
    cut, classes = transform(image, mask, **KEY)
    assert cut.shape == (32, 32, 3)
    assert set(np.unique(classes)) <= {0, 1, 255}
    sure = (cut[:, :, 0] > 230) | (cut[:, :, 0] < 25)
    agree = (cut[:, :, 0] > 127) == (classes == 1)
    assert agree[sure & (classes != 255)].mean() > 0.95


def test_erasing_reaches_the_device_as_drawn():
    container = open_container("digits", "train", image_size=32)
    settings = config(data={"source": "digits", "num_workers": 0, "augment": {"erase_probability": 1.0, "flip": 0.0}})
    options = {"image_size": 32, "seed": 5, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    options |= {"start_step": 0, "num_steps": 1}
    batch = next(iter(TrainLoader(container, settings.data, **options)))
    for row, sample in zip(batch.erasings, batch.ids.tolist(), strict=True):
        assert tuple(row) == draw_erasing(32, 32, seed=5, epoch=0, sample_id=sample, probability=1.0)
    inputs = to_device(batch, torch.device("cpu"), settings.data.mean, settings.data.std)
    for image, (x, y, w, h, _) in zip(inputs["images"], batch.erasings, strict=True):
        noise = image[:, y : y + h, x : x + w]
        assert abs(float(noise.std()) - 1) < 0.5
        outside = image.clone()
        outside[:, y : y + h, x : x + w] = 0
        assert outside.abs().max() <= 1


def test_an_evaluation_can_be_repeated_by_the_same_workers():
    container = open_container("digits", "val", image_size=32)
    settings = config(data={"source": "digits", "num_workers": 2})
    loader = EvalLoader(
        container,
        settings.data,
        image_size=32,
        batch_size=4,
        indices=range(10),
        transform=eval_transform(settings),
        passes=3,
    )
    ids = [batch.ids.tolist() for batch in loader]
    assert loader.batches_per_pass == 3
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 3


def test_a_validation_image_without_a_label_is_named(tmp_path):
    for name in ("train/a/0.png", "val/a/0.png", "val/stray.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    container = open_container(str(tmp_path), "val", image_size=32)
    loader = EvalLoader(container, config().data, image_size=32, batch_size=2, num_workers=0, labels=True)
    (batch,) = loader
    assert [(bad.name, bad.reason) for bad in batch.bad] == [("stray.png", "it has no label")]
    assert batch.labels.tolist() == [0]
