"""How long a fast device waits for data: ``python -m benchmarks.feed --data FOLDER --rates 100 200 400``.

The loader is the real one; the device is a clock that needs batch / rate seconds for each step, and no processor time. As in
the trainer, the host hands it a step and asks for the next batch while that step runs, and is never more than one step ahead.
The wait is what the device stands still for, as a share of the whole time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from nepa_dist.config import DataConfig
from nepa_dist.data.containers import DataError
from nepa_dist.data.loader import TrainLoader
from nepa_dist.data.open import open_container


class Device:
    """A clock that computes one step after the other."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._busy_until = seconds, 0.0
        self.idle_seconds = 0.0

    def launch(self) -> None:
        """Give it a step; it begins when the one before is done."""
        now = time.perf_counter()
        if self._busy_until:
            self.idle_seconds += max(0.0, now - self._busy_until)
        self._busy_until = max(now, self._busy_until) + self._seconds

    def wait(self) -> None:
        """Until all but the last step it was given are done."""
        time.sleep(max(0.0, self._busy_until - self._seconds - time.perf_counter()))


def share_waited(batches: Iterable[object], seconds_per_step: float, warmup: int) -> float:
    """Share of the time that a device stands still.

    Args:
        batches: as many steps, ``warmup`` of them uncounted.
        seconds_per_step: what the device needs for one.
        warmup: steps before the clock starts.
    """
    device = Device(seconds_per_step)
    start = time.perf_counter()
    for step, _ in enumerate(batches):
        device.launch()
        if step == warmup:
            start, device.idle_seconds = time.perf_counter(), 0.0
        device.wait()
    return device.idle_seconds / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="prepared, or images: the folder that holds train"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 200, 400], help="images per second of the device")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    if min(args.rates) <= 0:
        parser.error("--rates must be above 0")
    try:
        container = open_container(str(args.data), "train", image_size=args.image_size)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    waited: dict[float, list[float]] = {rate: [] for rate in args.rates}
    warmup = 8
    for turn in range(args.rounds):
        for rate in args.rates:
            steps = max(4, round(args.seconds * rate / args.batch))
            loader = TrainLoader(
                container,
                DataConfig(num_workers=args.workers),
                image_size=args.image_size,
                seed=turn,
                global_batch_size=args.batch,
                micro_batch_size=args.batch,
                rank=0,
                world_size=1,
                start_step=0,
                num_steps=warmup + steps,
            )
            waited[rate].append(share_waited(loader, args.batch / rate, warmup))
            loader.close()
    print(
        f"{args.workers} workers, batches of {args.batch}, {args.rounds} rounds; share of the time without data, median (range)"
    )
    for rate, shares in waited.items():
        print(f"{rate:g} images/s: {statistics.median(shares):.2%} ({min(shares):.2%} - {max(shares):.2%})")


if __name__ == "__main__":
    main()
