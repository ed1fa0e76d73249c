"""What measuring costs: the time of a step with and without the observed gauges, interleaved in one process.

    python benchmarks/metrics.py [--model vit_b] [--batch 64] [--every 50] [--rounds 6]

Each round trains ``every`` steps as the loop does without observing, and ``every`` steps of which the last is observed (norms
by group, collapse gauges, a look into the blocks); the order alternates, so that a machine that slows down harms both. Printed
are the median of both, their difference in percent of a step, and what an observed step costs over a plain one. The eigenvalues
are found on another thread, as in training, and compete for the same cores on a CPU.
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
from nepa_dist.engines.base import build_engine
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
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
            solver.submit(spectral_metrics, spectra)
        result.grad_norm.to("cpu", non_blocking=True)

    def span(observed: bool) -> float:
        synchronize()
        start = time.perf_counter()
        for number in range(args.every):
            step(number, observe=observed and number == args.every - 1)
        synchronize()
        return (time.perf_counter() - start) / args.every

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for warm in (False, True, False):
        step(0, observe=warm)
    plain, watched = [], []
    for number in range(args.rounds):
        for observed in (False, True) if number % 2 == 0 else (True, False):
            (watched if observed else plain).append(span(observed))
    solver.shutdown()
    base, other = statistics.median(plain), statistics.median(watched)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {args.model}, batch {args.batch}, one step in {args.every} observed, {args.rounds} rounds of each")
    print(f"plain   {1000 * base:.2f} ms a step (from {1000 * min(plain):.2f} to {1000 * max(plain):.2f})")
    print(f"watched {1000 * other:.2f} ms a step (from {1000 * min(watched):.2f} to {1000 * max(watched):.2f})")
    print(
        f"cost    {100 * (other / base - 1):+.2f} % of a step; "
        f"an observed step takes {args.every * (other / base - 1):.2f} steps more"
    )


if __name__ == "__main__":
    main()
