"""What k-NN beside training costs the trainer: ``python -m benchmarks.online_knn``.

A model is trained on the embedded digits as the loop does it, with a loader of one worker. Round by round, so that a change of
the machine's load meets all: some steps alone, some while a thread of the trainer measures (``thread``), some while a process
of its own at the lowest priority does (``process``); both measure again as soon as they are done. Printed are the time of a
step (median and quartiles over all rounds), the images per second, and how long a measurement took.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median, quantiles

import torch

from nepa_dist.config import Config
from nepa_dist.data.device import to_device
from nepa_dist.data.loader import TrainLoader
from nepa_dist.data.open import open_split
from nepa_dist.online_knn import OnlineKnn
from nepa_dist.tasks.pretrain import PretrainTask

ARMS = ("alone", "thread", "process")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.online_knn", description="The cost of k-NN beside training.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15, help="of each arm in a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the trainer")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--images", type=int, default=2000, help="training images that vote; half as many are classified")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = {"preset": "vit_tiny", "image_size": 64, "patch_size": 8, "depth": args.depth}
    config = Config.model_validate(
        {"model": model, "data": {"source": "digits", "num_workers": 1}, "global_batch_size": args.batch}
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = PretrainTask(config.model, config.objective).to(device).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    loader = TrainLoader(
        open_split(config.data, "train", image_size=64), config.data, image_size=64, seed=0, global_batch_size=args.batch,
        micro_batch_size=args.batch, rank=0, world_size=1, start_step=0, num_steps=10**6, pin_memory=device.type == "cuda",
    )  # fmt: skip
    batches = iter(loader)

    def step() -> float:
        start = time.perf_counter()
        loss, _ = task(to_device(next(batches), device, config.data.mean, config.data.std))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())
        return time.perf_counter() - start

    counts = {"num_train": args.images, "num_test": args.images // 2}
    probes = {arm: OnlineKnn(config, device, in_process=arm == "thread", **counts) for arm in ARMS[1:]}
    for probe in probes.values():  # reads the images
        probe.start(0, task.named_parameters())
        while probe.poll(0.01) is None:
            step()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    took: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            for index in range(args.steps):
                if arm != "alone":
                    if (result := probes[arm].poll()) is not None:
                        took[arm].append(result.values["knn_seconds"])
                    probes[arm].start(index, task.named_parameters())
                seconds[arm].append(step())
            if arm != "alone" and (result := probes[arm].poll(600.0)) is not None:
                took[arm].append(result.values["knn_seconds"])
    for probe in probes.values():
        probe.close()
    loader.close()
    sizes = f"{args.batch} images a step, {args.images} + {args.images // 2} images measured"
    print(f"{device.type}, {args.threads} threads, depth {args.depth}, {sizes}")
    for arm in ARMS:
        low, _, high = quantiles(seconds[arm], n=4)
        middle = median(seconds[arm])
        text = f"{arm:<8} step {middle:.3f} s ({low:.3f} to {high:.3f}), {args.batch / middle:.0f} images/s"
        print(text + (f", a measurement {median(took[arm]):.1f} s" if took[arm] else ""))


if __name__ == "__main__":
    main()
