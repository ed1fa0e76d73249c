"""Which transform each task uses, in training and in evaluation.

Pretraining crops and flips. Fine-tuning adds RandAugment and colour jitter (random erasing is drawn by the loader and painted
on the device). Segmentation scales, crops, flips and recolours image and mask together.

Suffix letters: H and W height and width, S side of the square, all in pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nepa_dist.config import AugmentConfig, Config, EvaluateConfig, SegmentConfig
from nepa_dist.data.augment import CropTransform, Interpolation, Mask, Transform, cut_center
from nepa_dist.data.color_jitter import color_jitter
from nepa_dist.data.randaugment import rand_augment
from nepa_dist.data.segment_augment import augment_segment, class_mask


def train_transform(config: Config) -> Transform:
    """The transform of training images, by the task of the configuration."""
    red, green, blue = (round(255 * level) for level in config.data.mean)
    if config.task == "segment":
        return SegmentTransform(config.segment, config.data.augment.flip, (red, green, blue))
    return ClassifyTransform(config.data.augment, (red, green, blue))


def eval_transform(config: Config) -> Transform:
    """The transform of validation images of classification."""
    return CenterTransform(config.evaluate)


class ClassifyTransform:
    """Crop and flip, then RandAugment and colour jitter where they are on.

    Args:
        config: what is done, and how strongly.
        fill: colour, in levels, of what a rotation or a shift uncovers.
    """

    def __init__(self, config: AugmentConfig, fill: tuple[int, int, int]) -> None:
        self._config = config
        self._crop = CropTransform(config, config.interpolation)
        self._fill = fill

    def __call__(
        self, pixels: NDArray[np.uint8], mask: Mask | None, /, *, image_size: int, seed: int, epoch: int, sample_id: int
    ) -> tuple[NDArray[np.uint8], Mask | None]:
        """See :class:`nepa_dist.data.augment.Transform`."""
        image, mask = self._crop(pixels, mask, image_size=image_size, seed=seed, epoch=epoch, sample_id=sample_id)
        config = self._config
        if config.randaugment_magnitude is not None:
            image = rand_augment(
                image,
                seed=seed,
                epoch=epoch,
                sample_id=sample_id,
                magnitude=config.randaugment_magnitude,
                magnitude_std=config.randaugment_std,
                fill=self._fill,
            )
        amount = config.color_jitter
        image = color_jitter(
            image, seed=seed, epoch=epoch, sample_id=sample_id, brightness=amount, contrast=amount, saturation=amount
        )
        return image, mask


class SegmentTransform:
    """Image and mask of a training pair: classes from 0, random scale, crop, flip, colours.

    At ratio 1 the short side is the crop, as in MMSegmentation's ADE20K pipeline.

    Args:
        config: classes, range of the scale, colours.
        flip: probability of a horizontal flip.
        fill: colour, in levels, of the padding.
    """

    def __init__(self, config: SegmentConfig, flip: float, fill: tuple[int, int, int]) -> None:
        self._config = config
        self._flip = flip
        self._fill = fill

    def __call__(
        self, pixels: NDArray[np.uint8], mask: Mask | None, /, *, image_size: int, seed: int, epoch: int, sample_id: int
    ) -> tuple[NDArray[np.uint8], Mask | None]:
        """See :class:`nepa_dist.data.augment.Transform`. Raises BadImage for a class that does not exist."""
        assert mask is not None, "the loader of segmentation is made with masks=True"
        return augment_segment(
            pixels,
            class_mask(mask, self._config),
            crop_size=image_size,
            seed=seed,
            epoch=epoch,
            sample_id=sample_id,
            scale=(4 * image_size, image_size),
            ratio_range=self._config.scale_range,
            flip=self._flip,
            photometric=self._config.photometric,
            fill=self._fill,
        )


class CenterTransform:
    """The centre of a validation image, or the whole of it squashed to a square before that.

    Args:
        config: how much larger than the crop the image is resized, and how.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config

    def __call__(
        self, pixels: NDArray[np.uint8], mask: Mask | None, /, *, image_size: int, seed: int, epoch: int, sample_id: int
    ) -> tuple[NDArray[np.uint8], Mask | None]:
        """See :class:`nepa_dist.data.augment.Transform`; nothing is random."""
        config = self._config
        method: Interpolation = "bicubic" if config.bicubic else "bilinear"
        return cut_center(pixels, image_size, resize_to=config.resize, squash=config.squash, interpolation=method), mask
