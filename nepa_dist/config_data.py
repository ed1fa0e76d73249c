"""The section of the configuration that says where images come from and how they are varied. Imports no torch.

"Paper" is arXiv 2512.16922; "released" is the official code.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nepa_dist.config_base import Positive, Section


class AugmentConfig(Section):
    """Random resized crop and flip (released: torchvision's defaults, bilinear with antialias)."""

    crop: Literal["random_resized", "center"] = "random_resized"
    """center: short side to the image size, then the middle; no randomness."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area over the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height, drawn log-uniformly."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of the resize (released: bilinear in pretraining, bicubic in fine-tuning)."""
    randaugment_magnitude: float | None = Field(None, ge=0, le=10)
    """Mean strength of RandAugment (arXiv 1909.13719; paper for fine-tuning: 9); null is none."""
    randaugment_std: float = Field(0.5, ge=0)
    """Standard deviation of the strength (paper)."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Largest change of brightness, contrast and saturation, as a share; 0 is none."""
    erase_probability: float = Field(0.0, ge=0, le=1)
    """Share of images of which a rectangle becomes noise (arXiv 1708.04896; released for fine-tuning: 0.25)."""

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        problems = []
        for name, (low, high), limit in (("scale", self.scale, 1.0), ("ratio", self.ratio, float("inf"))):
            if not 0 < low <= high <= limit:
                problems.append(f"{name} must be 0 < low <= high{' <= 1' if name == 'scale' else ''}, got {low}, {high}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class DataConfig(Section):
    """Where images come from and how they are read."""

    source: str | None = Field(None, min_length=1)
    """``digits`` (embedded); a folder that ``python -m data_prep`` made, or its URL; or a folder of images:
    ``train/<class>/*``, ``<class>/*`` or a flat one."""
    expected_num_samples: int | None = Field(None, gt=0)
    """Images in the training split, for a dry run where the data is out of reach. The counted number wins."""
    augment: AugmentConfig = AugmentConfig()
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted on the device from pixels in [0, 1] (released)."""
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    """Divided by, on the device (released)."""
    num_workers: int | None = Field(None, ge=0)
    """Loader processes per rank; default: the cores of this rank less one, at most 8. 0 loads in the trainer's process."""
    prefetch_batches: int = Field(2, gt=0)
    """Micro-batches each worker keeps ready."""
    block_shards: int = Field(0, ge=0)
    """0 mixes all samples. W > 0 reads from W shards of a prepared split at a time and mixes within them: for storage that is
    slow at random reads."""
    cache_dir: str | None = Field(None, min_length=1)
    """Folder on this node for shards of a remote source (``s3://``, ``gs://``, ``https://``); default: in the temporary one."""
    cache_gigabytes: float | None = Field(None, gt=0)
    """Shards beyond this are removed again, those of longest ago first; default: keep all."""
    checksums: bool = False
    """Compare each image and mask of a prepared split with its checksum when it is read: one that a disk has damaged is
    replaced, named and counted like an unreadable one, also where it could be decoded. Needs the package crc32c."""
    max_bad_samples: int = Field(100, ge=0)
    """Different unreadable images that a run survives, each replaced and named; one more ends it."""
