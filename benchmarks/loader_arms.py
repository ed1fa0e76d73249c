"""The ways of reading images that ``benchmarks/loader.py`` compares, and the process that measures one of them.

Every arm gives endless batches, uint8 [B, S, S, 3], of random resized crops with flips from the same stored images, made by the
same number of worker processes (ffcv: threads). Run as a program it measures one arm and prints a JSON object.
"""

from __future__ import annotations

import importlib.machinery
import io
import json
import os
import random
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.config import AugmentConfig, DataConfig
from nepa_dist.data.augment import augment, random_resized_crop_box
from nepa_dist.data.decode import decode_image
from nepa_dist.data.folder import FolderContainer
from nepa_dist.data.loader import TrainLoader
from nepa_dist.data.open import open_container

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_WARM_UP_BATCHES = 4


class Setting(NamedTuple):
    """What an arm is measured with."""

    arm: str
    data: str
    """Folder of the stored images: an image folder, or the train split of a prepared data set."""
    batch_size: int
    image_size: int
    workers: int
    seconds: float


def pillow_sample(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode, random resized crop and flip with Pillow alone, as torchvision does."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGB")
    x, y, w, h = random_resized_crop_box(*image.size, random.getrandbits(62), 0, 0, SCALE, RATIO)
    image = image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image)


def turbo_sample(data: bytes, size: int) -> NDArray[np.uint8]:
    """The same with this project's decoder and resize."""
    return augment(decode_image(data), AugmentConfig(), image_size=size, seed=random.getrandbits(62), epoch=0, sample_id=0)


def ours(setting: Setting) -> Iterator[Any]:
    """This project's loader on a prepared data set or a folder."""
    loader = TrainLoader(
        open_container(str(Path(setting.data).parent), "train", image_size=setting.image_size),
        DataConfig(num_workers=setting.workers),
        image_size=setting.image_size, seed=1, global_batch_size=setting.batch_size, micro_batch_size=setting.batch_size,
        rank=0, world_size=1, start_step=0, num_steps=10**9,
    )  # fmt: skip
    return (batch.images for batch in loader)


class _Folder(torch.utils.data.Dataset[NDArray[np.uint8]]):
    def __init__(self, setting: Setting) -> None:
        self._files = FolderContainer(Path(setting.data), "train")
        self._size = setting.image_size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        data = self._files.read(index).image
        assert isinstance(data, bytes)
        return pillow_sample(data, self._size)


def _stack(images: list[NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images))


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def folder_pillow(setting: Setting) -> Iterator[Any]:
    """An image folder, Pillow and torch's DataLoader: what most training scripts do."""
    return _endless(
        torch.utils.data.DataLoader(
            _Folder(setting),
            batch_size=setting.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=setting.workers,
            collate_fn=_stack,
            persistent_workers=setting.workers > 0,
        )
    )


def _webdataset(setting: Setting, make: Callable[[bytes, int], NDArray[np.uint8]]) -> Iterator[Any]:
    import webdataset

    shards = sorted(str(path) for path in Path(setting.data).glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(1000)
        .map(lambda sample: make(next(sample[key] for key in sample if key in ("jpg", "jpeg", "png")), setting.image_size))
        .batched(setting.batch_size, partial=False, collation_fn=_stack)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=setting.workers))


def webdataset_pillow(setting: Setting) -> Iterator[Any]:
    """The library webdataset with Pillow."""
    return _webdataset(setting, pillow_sample)


def webdataset_turbo(setting: Setting) -> Iterator[Any]:
    """The library webdataset with this project's decoder and resize."""
    return _webdataset(setting, turbo_sample)


def streaming_turbo(setting: Setting) -> Iterator[Any]:
    """The library mosaicml-streaming with this project's decoder and resize."""
    _replace_torchvision()
    from streaming import StreamingDataset

    class Dataset(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> NDArray[np.uint8]:
            return turbo_sample(super().__getitem__(index)["image"], setting.image_size)

    dataset = Dataset(local=setting.data, shuffle=True, batch_size=setting.batch_size)
    return _endless(
        torch.utils.data.DataLoader(
            dataset, batch_size=setting.batch_size, num_workers=setting.workers, collate_fn=_stack, drop_last=True,
            persistent_workers=setting.workers > 0,
        )
    )  # fmt: skip


def _replace_torchvision() -> None:
    """Put empty modules in its place: streaming needs it only for data sets that are not read here, and fits but one torch."""
    needed: dict[str, dict[str, object]] = {
        "torchvision": {"__version__": "0"},
        "torchvision.datasets": {"VisionDataset": object, "CIFAR10": object},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": None},
    }
    for name, content in needed.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(content)
        sys.modules[name] = module


def ffcv(setting: Setting) -> Iterator[Any]:
    """The library ffcv, whose own decoder crops and resizes; its threads are ``workers``."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    (file,) = Path(setting.data).glob("*.beton")
    decoder = RandomResizedCropRGBImageDecoder((setting.image_size, setting.image_size), SCALE, RATIO)
    loader = Loader(
        str(file), batch_size=setting.batch_size, num_workers=max(1, setting.workers), order=OrderOption.RANDOM, drop_last=True,
        pipelines={"image": [decoder, RandomHorizontalFlip(), ToTensor()], "label": None}, os_cache=True,
    )  # fmt: skip
    return (batch[0] for batch in _endless(loader))


ARMS: dict[str, Callable[[Setting], Iterator[Any]]] = {
    "folder+pillow": folder_pillow,
    "webdataset+pillow": webdataset_pillow,
    "webdataset+turbo": webdataset_turbo,
    "streaming+turbo": streaming_turbo,
    "ffcv": ffcv,
    "ours": ours,
}


def measure(setting: Setting) -> dict[str, Any]:
    """Run one arm in this process.

    Returns:
        images_per_cpu_second (this process and its children), images_per_second, first_batch_seconds (from building the
        loader), batch_seconds p50 and p99, memory_bytes at the end above those at the start (shared pages counted once).
    """
    torch.set_num_threads(1)
    before = memory_bytes()
    started = time.perf_counter()
    batches = ARMS[setting.arm](setting)
    shape = tuple(next(batches).shape)
    first = time.perf_counter() - started
    if sorted(shape) != sorted((setting.batch_size, setting.image_size, setting.image_size, 3)):
        raise RuntimeError(f"{setting.arm} gave a batch of shape {shape}")
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    times = [time.perf_counter()]
    used = processor_seconds()
    while times[-1] - times[0] < setting.seconds:
        next(batches)
        times.append(time.perf_counter())
    used = processor_seconds() - used
    num = (len(times) - 1) * setting.batch_size
    waits = np.diff(times)
    return {
        "images_per_cpu_second": num / used,
        "images_per_second": num / (times[-1] - times[0]),
        "first_batch_seconds": first,
        "batch_seconds_p50": float(np.percentile(waits, 50)),
        "batch_seconds_p99": float(np.percentile(waits, 99)),
        "memory_bytes": memory_bytes() - before,
    }


def stage_rates(setting: Setting) -> dict[str, float]:
    """Images per processor second of each stage of this project's path, in one process."""
    container = open_container(str(Path(setting.data).parent), "train", image_size=setting.image_size)
    ids = np.random.RandomState(0).permutation(len(container))[:400].tolist()
    samples = [container.read(i).image for i in ids]
    pixels = [decode_image(image) if isinstance(image, bytes) else image for image in samples]

    def crop(k: int) -> None:
        augment(pixels[k], AugmentConfig(), image_size=setting.image_size, seed=1, epoch=0, sample_id=k)

    stages: dict[str, Callable[[int], object]] = {"read": lambda k: container.read(ids[k]), "crop and resize": crop}
    if isinstance(samples[0], bytes):
        stages["decode"] = lambda k: decode_image(samples[k])  # type: ignore[arg-type]
    rates = {}
    for name, stage in stages.items():
        used, num = time.process_time(), 0
        while time.process_time() - used < setting.seconds / 4:
            stage(num % len(ids))
            num += 1
        rates[name] = num / (time.process_time() - used)
    return rates


def processor_seconds() -> float:
    """Processor time of this process and all below it that still run."""
    return sum(_processor_seconds(pid) for pid in _family())


def memory_bytes() -> int:
    """Memory of this process and all below it; pages that they share are counted once where the system says so."""
    return sum(_memory_bytes(pid) for pid in _family())


def _family() -> list[int]:
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    family = [os.getpid()]
    for pid in family:  # grows while it is read
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def _processor_seconds(pid: int) -> float:
    if pid == os.getpid():
        return time.process_time()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_bytes(pid: int) -> int:
    for name, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    chosen = Setting(**json.loads(sys.argv[1]))
    print(json.dumps(stage_rates(chosen) if chosen.arm == "stages" else measure(chosen)), flush=True)
    os._exit(0)  # some libraries do not end their workers or wait for their threads
