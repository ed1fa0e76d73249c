"""What every test shares: one thread per process, and a small folder of images."""

from __future__ import annotations

import os

# Before torch is imported; processes that tests start inherit it. With more threads than cores, ranks wait on each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest
import torch

from images import image_folder

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before Triton is imported: its kernels run on a CPU, for tests/test_fused.py


@pytest.fixture
def tiny_images(tmp_path: Path) -> Path:
    """A folder of 3 classes with 4 JPEGs of 48 x 40 pixels each."""
    return image_folder(tmp_path / "images", num_classes=3, per_class=4, size=(48, 40))
