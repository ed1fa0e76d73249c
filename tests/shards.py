"""Prepared splits for tests: samples, and a folder with shards, index, names and manifest."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.formats.base import StoredSample
from data_prep.formats.registry import get_format
from nepa_dist.data.index import (
    ENCODED,
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    NAMES,
    RAW,
    Manifest,
    ShardRecord,
    content_sha256,
)

HEIGHT, WIDTH = 24, 32


def pixels(seed: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Smooth RGB pixels [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def image_file(seed: int, kind: str = "JPEG", height: int = HEIGHT, width: int = WIDTH, **options: Any) -> bytes:
    """A whole image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(buffer, kind, **options)
    return buffer.getvalue()


def mask_file(seed: int) -> bytes:
    """A PNG of class numbers 0 to 149."""
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 150, (HEIGHT, WIDTH)).astype(np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def make_samples(count: int, *, masks: bool = False, raw: bool = False) -> list[StoredSample]:
    """Samples 0 to count - 1: classes 0 to 2, JPEG or raw pixels, and with masks one of five without."""
    return [
        StoredSample(
            i,
            f"class_{i % 3}/{i}.jpg",
            pixels(i).tobytes() if raw else image_file(i),
            RAW if raw else ENCODED,
            HEIGHT,
            WIDTH,
            i % 3,
            mask_file(i) if masks and i % 5 != 2 else None,
        )
        for i in range(count)
    ]


def write_split(
    folder: Path, container: Literal["tar", "mds", "beton"], samples: Sequence[StoredSample], *, shards: int = 3
) -> Manifest:
    """Write a prepared split of the samples 0, 1, ... into a new folder; sample i goes into shard i % shards."""
    folder.mkdir(parents=True)
    module = get_format(container)
    index = np.zeros(len(samples), INDEX_DTYPE)
    parts = []
    for k in range(shards):
        path = folder / module.shard_name(k)
        records = module.write_shard(path, samples[k::shards], with_mask=any(sample.mask for sample in samples))
        records["shard"] = k
        index[k::shards] = records
        parts.append(ShardRecord(path.name, path.stat().st_size, sha256(path), len(records)))
    np.save(folder / INDEX, index)
    (folder / NAMES).write_text("".join(f"{sample.name}\n" for sample in samples))
    manifest = Manifest(
        "tiny", folder.name, container, "keep", len(samples), ["a", "b", "c"], [], {}, content_sha256(index), "",
        sha256(folder / INDEX), sha256(folder / NAMES), parts, {}, {},
    )  # fmt: skip
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    module.finish(folder, parts)
    return manifest


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change the bytes of a file in place."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def run_script(script: str, *arguments: object) -> None:
    """Run a Python script in a process of its own, where a library may do to the interpreter what it likes."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tests.parent), str(tests)))}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
