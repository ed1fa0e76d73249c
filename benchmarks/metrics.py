"""What measuring costs: the time of a plain step and of an observed one, in turn, in one process.

    python benchmarks/metrics.py [--model vit_b] [--batch 64] [--every 50] [--rounds 12]

A step is that of the loop: forward, backward, update. An observed one takes the gauges as well: norms by group, collapse, a
look into the blocks. The order alternates, so that a machine that slows down harms both. On a GPU the wall clock counts; on a
CPU the processor time of all threads of the process, which others on the machine do not change much, and which holds the
eigenvalues that another thread finds (on a GPU they are found beside training).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # started as a file: the folder above holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from nepa_dist.config import Config
from nepa_dist.engines.build import build_engine
from nepa_dist.metrics.collapse import spectral_metrics
from nepa_dist.plan import make_plan
from nepa_dist.tasks.inspection import inspect
from nepa_dist.tasks.pretrain import PretrainTask


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The cost of the observed gauges.")
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--every", type=int, default=50, help="steps between two observed ones (metrics.collapse_every)")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    settings = {
        "model": {"preset": args.model},
        "global_batch_size": args.batch,
        "micro_batch_size": args.batch,
        "steps": 10**6,
    }
    config = Config.model_validate(settings)
    plan = make_plan(config, 10**6)
    task = PretrainTask(config.model, config.objective)
    engine = build_engine(task, config, plan, device)
    task.train()
    size = config.model.image_size
    images = torch.randn(args.batch, 3, size, size, device=device)
    solver = ThreadPoolExecutor(1)

    def step(number: int, *, observe: bool) -> None:
        task.begin_step(number, observe=observe)
        for group in engine.param_groups:
            group["lr"] = 1e-4
        loss, _ = engine.model({"images": images})
        engine.backward(loss, last=True)
        result = engine.step(observe=observe)
        if observe:
            health = task.health()
            inspect(task, engine.model, {"images": images}, lambda x: x, audit=False)
            spectra = {name: x.to("cpu", non_blocking=True) for name, x in health.spectra.items()}
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the loop waits one step later, when this is over anyhow
            solved = solver.submit(spectral_metrics, spectra)
            if device.type == "cpu":
                solved.result()
        result.grad_norm.to("cpu", non_blocking=True)

    def seconds(number: int, *, observe: bool) -> float:
        synchronize()
        start = clock()
        step(number, observe=observe)
        synchronize()
        return clock() - start

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for warm in (False, True, False, True):
        step(0, observe=warm)
    plain, watched = [], []
    for number in range(args.rounds):
        for observe in (False, True) if number % 2 == 0 else (True, False):
            (watched if observe else plain).append(seconds(number, observe=observe))
    solver.shutdown()
    base, other = statistics.median(plain), statistics.median(watched)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads, processor time"
    print(f"{name}, {args.model}, batch {args.batch}, {args.rounds} steps of each kind in turn")
    print(f"plain    {1000 * base:.1f} ms a step (from {1000 * min(plain):.1f} to {1000 * max(plain):.1f})")
    print(f"observed {1000 * other:.1f} ms a step (from {1000 * min(watched):.1f} to {1000 * max(watched):.1f})")
    cost = 100 * (other / base - 1)
    print(
        f"cost     {cost:+.1f} % of an observed step, {cost / args.every:+.2f} % of a step if one in {args.every} is observed"
    )


if __name__ == "__main__":
    main()
