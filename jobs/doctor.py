"""Can this node feed its GPUs with this data? ``submit.py doctor --data DATA`` measures, compares and says what to change.

One core reads, decodes and crops random samples for some seconds. What the GPUs ask for follows from the operations of the
model at a stated utilisation.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jobs.cluster import USER_ERROR
from nepa_dist.config import AugmentConfig, ConfigError, ModelConfig
from nepa_dist.cost import train_flops
from nepa_dist.data.containers import Container, DataError
from nepa_dist.data.mounts import find_mount
from nepa_dist.data.open import DIGITS, open_container
from nepa_dist.presets import PRESETS
from nepa_dist.step_time import GPUS

UTILISATION = 0.5
"""Share of the peak that a well fed GPU is taken to reach; a good run comes near it, so this asks for enough."""

_SHORT_SIDE = 256  # of the images that data_prep stores by default, pixels
_TABLE = ("vit_s", "vit_b", "vit_l", "vit_h")
_RESERVE = 1.25  # cores over those that decode all the time: loads vary, and a busy node delays the trainer
_MAX_SAMPLES = 20_000


class Speed(NamedTuple):
    """What one core did."""

    images_per_second: float
    """Per second of processor time: what a core gives when it never waits."""
    read_wait: float
    """Seconds per image spent waiting for the storage."""
    busy: float
    """Time that decoding took over the processor time it got; above 1 other programs used the core."""
    short_side: float
    """Median of the stored images, pixels."""
    num_bytes: float
    """Mean of a stored image; 0 if it is made on the fly."""
    num_bad: int
    """Samples that could not be used."""
    num_samples: int

    @property
    def images_per_wall_second(self) -> float:
        """With the waiting for the storage."""
        return 1 / (1 / self.images_per_second + self.read_wait)

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for the storage, 0 .. 1."""
        return self.read_wait * self.images_per_wall_second


@dataclass(frozen=True)
class Report:
    """What was found. ``advice`` is empty if nothing needs to change."""

    source: str
    num_samples: int
    speed: Speed
    file_system: str
    """Kind and mount point."""
    shm_free_bytes: int
    cores: int
    """That this process may use."""
    gpus: int
    images_per_second_per_gpu: float
    """That the model asks for."""
    cores_needed: int
    """For all GPUs, with the trainers' own."""
    data_wait: float
    """Share of the time that GPUs will wait for data, 0 .. 1, with the loader's default workers."""
    advice: tuple[str, ...]
    table: tuple[tuple[str, float], ...]
    """Preset -> images per second per GPU."""

    def text(self) -> str:
        """For people; ends with a newline."""
        speed = self.speed
        stored = f", {speed.num_bytes / 1e3:.0f} kB each" if speed.num_bytes else ""
        peak = f"{UTILISATION:.0%} of {GPUS['h100'].peak_bf16 / 1e12:.0f} TFLOP/s"
        rows = [
            ("data", f"{self.source}: {self.num_samples} images, short side {speed.short_side:.0f} pixels{stored}"),
            ("file system", self.file_system),
            ("one core", f"{speed.images_per_second:.0f} images/s decoded and cropped"),
            ("waiting for storage", f"{speed.wait_share:.0%} of a worker's time"),
            ("cores", f"{self.cores} for {self.gpus} GPUs; {self.cores_needed} needed"),
            ("free in /dev/shm", f"{self.shm_free_bytes / 1e9:.1f} GB"),
            ("one GPU", f"{self.images_per_second_per_gpu:.0f} images/s at {peak}"),
            ("predicted data wait", f"{self.data_wait:.0%} of the time"),
        ]
        if speed.num_bad:
            rows.append(("unusable samples", f"{speed.num_bad} of {speed.num_samples} that were tried"))
        lines = [f"{label:<20} {value}" for label, value in rows]
        lines.append("\nmodel        images/s per GPU   cores per GPU for this data")
        lines += [f"{name:<12} {rate:16.0f} {rate / speed.images_per_second:15.1f}" for name, rate in self.table]
        lines.append("\nWhat to change:" if self.advice else "\nNothing needs to change.")
        return "\n".join([*lines, *(f"  - {line}" for line in self.advice)]) + "\n"


def doctor(source: str, *, model_preset: str, gpus: int, seconds: float = 5.0, image_size: int = 224) -> Report:
    """Measure the data on this node and compare with what its GPUs ask for.

    Args:
        source: as ``data.source``.
        model_preset: name in :data:`nepa_dist.presets.PRESETS`.
        gpus: of this node that will train, at least 1.
        seconds: to measure for.
        image_size: S, side of the training image, pixels.

    Raises:
        ConfigError, ValueError: the model or a number makes no sense.
        DataError: the data cannot be opened, or not one sample can be used.
    """
    if gpus < 1 or seconds <= 0:
        raise ValueError(f"needs at least 1 GPU and some time, got {gpus} GPUs and {seconds} seconds")
    asked = images_per_second_per_gpu(model_preset, image_size)
    container = open_container(source, "train", image_size=image_size)
    speed = measure(container, image_size, seconds)
    cores = usable_cores()
    workers = _default_workers(gpus)
    # Without workers the trainer itself decodes, beside its own work.
    supply = max(0.5, workers) * speed.images_per_wall_second
    report = Report(
        source=source,
        num_samples=len(container),
        speed=speed,
        file_system=_where(source),
        shm_free_bytes=_free_bytes("/dev/shm"),
        cores=cores,
        gpus=gpus,
        images_per_second_per_gpu=asked,
        cores_needed=gpus * _cores_per_gpu(asked, speed),
        data_wait=max(0.0, 1 - supply / asked),
        advice=(),
        table=tuple((name, images_per_second_per_gpu(name, image_size)) for name in dict.fromkeys((*_TABLE, model_preset))),
    )
    return Report(**(report.__dict__ | {"advice": tuple(_advice(report, workers))}))


def images_per_second_per_gpu(preset: str, image_size: int = 224) -> float:
    """What a GPU trains at UTILISATION of its peak, in pretraining, images per second."""
    model = ModelConfig(preset=preset, image_size=image_size)
    return UTILISATION * GPUS["h100"].peak_bf16 / train_flops(model, num_tokens=model.num_patches)


def measure(container: Container, image_size: int, seconds: float) -> Speed:
    """Read, decode and crop random samples on one core for some seconds.

    Raises:
        DataError: not one of them could be used.
    """
    import torch

    from nepa_dist.data.augment import augment
    from nepa_dist.data.decode import BadImage, decode_image
    from nepa_dist.data.order import KeyedDraws

    draws, config, clock = KeyedDraws(int(time.time())), AugmentConfig(), _Clock()
    sides, sizes, bad = [], [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    deadline = time.perf_counter() + seconds
    try:
        for k in range(_MAX_SAMPLES):
            if time.perf_counter() > deadline and k:
                break
            sample_id = int(draws[k] * len(container))
            try:
                with clock.reading():
                    sample = container.read(sample_id)
                with clock.working():
                    pixels = decode_image(sample.image) if isinstance(sample.image, bytes) else sample.image
                    augment(pixels, config, image_size=image_size, seed=0, epoch=0, sample_id=sample_id)
            except (BadImage, OSError) as error:
                bad.append(f"{container.name(sample_id)}: {error}")
                continue
            sides.append(min(pixels.shape[:2]))
            sizes.append(len(sample.image) if isinstance(sample.image, bytes) else 0)
    finally:
        torch.set_num_threads(threads)
    if not sides:
        raise DataError(f"none of {len(bad)} samples can be used; the first is {bad[0]}")
    num = len(sides)
    return Speed(
        images_per_second=num / max(clock.read_used + clock.work_used, 1e-9),
        read_wait=max(0.0, clock.read_wall - clock.read_used) / num,
        busy=clock.work_wall / max(clock.work_used, 1e-9),
        short_side=statistics.median(sides),
        num_bytes=statistics.fmean(sizes),
        num_bad=len(bad),
        num_samples=num + len(bad),
    )


class _Clock:
    """Time and processor time of reading and of working, seconds."""

    def __init__(self) -> None:
        self.read_wall = self.read_used = self.work_wall = self.work_used = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        wall, used = time.perf_counter(), time.thread_time()
        yield
        self.read_wall += time.perf_counter() - wall
        self.read_used += time.thread_time() - used

    @contextmanager
    def working(self) -> Iterator[None]:
        wall, used = time.perf_counter(), time.thread_time()
        yield
        self.work_wall += time.perf_counter() - wall
        self.work_used += time.thread_time() - used


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def file_system(folder: Path, mounts: str | None = None) -> str:
    """Kind and mount point of the file system that holds a folder, such as ``ext4 at /data``.

    Args:
        folder: that exists.
        mounts: the content of ``/proc/self/mountinfo``; default: read it.
    """
    kind, point = find_mount(folder, mounts)
    return f"{kind} at {point}" if kind else "unknown"


def _where(source: str) -> str:
    if source == DIGITS:
        return "none: embedded"
    return "remote, fetched into a cache on this node" if "://" in source else file_system(Path(source).expanduser())


def _advice(report: Report, workers: int) -> list[str]:
    advice = []
    speed, per_gpu = report.speed, report.cores_needed // report.gpus
    if speed.busy > 1.3:
        advice.append(f"other programs use these cores: decoding took {speed.busy:.1f} times the processor time it got")
    elif speed.wait_share > 0.2:  # on busy cores, waiting for a core and for the storage cannot be told apart
        total = speed.num_bytes * report.num_samples
        room = " (it fits into /dev/shm)" if 0 < total < 0.8 * report.shm_free_bytes else ""
        advice.append(
            f"the storage is slow ({report.file_system}): pack the data with python -m data_prep prepare, then copy its "
            f"{total / 1e9:.1f} GB to a disk of the node with python -m data_prep stage{room}; if this was the first reading, "
            "measure again"
        )
    if report.data_wait < 0.01 and report.cores >= report.cores_needed:
        return advice
    if speed.short_side > 1.15 * _SHORT_SIDE and speed.num_bytes:
        factor = (speed.short_side / _SHORT_SIDE) ** 2
        advice.append(
            f"the short side of stored images is {speed.short_side:.0f} pixels; prepared with the policy short{_SHORT_SIDE} "
            f"(python -m data_prep prepare) they decode about {factor:.1f} times as fast"
        )
    if report.cores < report.cores_needed:
        advice.append(
            f"ask for {report.cores_needed} cores, --cpus-per-task {per_gpu} with a task per GPU (now {report.cores})"
        )
    needed = math.ceil(_RESERVE * report.images_per_second_per_gpu / speed.images_per_wall_second)
    if report.cores >= report.cores_needed and needed > workers:
        advice.append(f"--set data.num_workers={needed} (now {workers} per GPU)")
    return advice


def _cores_per_gpu(asked: float, speed: Speed) -> int:
    return 1 + math.ceil(_RESERVE * asked / speed.images_per_second)


def _default_workers(gpus: int) -> int:
    from nepa_dist.data.loader import default_num_workers

    return default_num_workers(gpus)


def _free_bytes(folder: str) -> int:
    try:
        info = os.statvfs(folder)
    except OSError:
        return 0
    return info.f_bavail * info.f_frsize


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py doctor",
        description="Can this node feed its GPUs with this data? Measures, compares and says what to change.",
        epilog="With --nodes N it is about the nodes of a cluster: python jobs/submit.py doctor --nodes N --help",
    )
    parser.add_argument("--data", required=True, metavar="DATA", help="folder of images, prepared folder, or digits")
    parser.add_argument("--model", default="vit_b", choices=sorted(PRESETS), help="size that is trained (default: vit_b)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of this node that train (default: 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure (default: 5)")
    arguments = parser.parse_args(argv)
    try:
        report = doctor(arguments.data, model_preset=arguments.model, gpus=arguments.gpus, seconds=arguments.seconds)
    except (ConfigError, DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    print(report.text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
