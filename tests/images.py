"""Small image folders for tests, and what a batch shows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from nepa_dist.data.batch import Batch


def image_folder(root: Path, num_classes: int = 3, per_class: int = 4, size: tuple[int, int] = (48, 40), seed: int = 0) -> Path:
    """Write ``root/class_<c>/<i>.jpg`` and return ``root``.

    The pixels are smooth, differ between any two images and are the same for the same seed; a class shares its hue.

    Args:
        root: folder, made if missing.
        num_classes: number of class folders.
        per_class: images in each.
        size: (width, height), pixels.
        seed: of the pixels.
    """
    rng = np.random.default_rng(seed)
    hues = rng.uniform(40, 215, size=(num_classes, 3))
    for label in range(num_classes):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        for index in range(per_class):
            coarse = np.clip(hues[label] + rng.normal(0, 40, size=(4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
    return root


def batch_digest(batch: Batch) -> str:
    """Short hash of ids and pixels (16 hexadecimal digits); equal for two runs that saw the same data."""
    digest = hashlib.blake2b(batch.ids.numpy().tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(batch.images.numpy()).data)
    return digest.hexdigest()
