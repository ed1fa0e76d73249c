"""Time from a process's start to its first steps, with and without a kept compile cache: ``python -m benchmarks.start``.

Each arm is a new process that builds a model, compiles it and does three steps. The first begins with an empty cache, the
others find what it left, as a run that is started again does in its run root.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nepa_dist import presets

ROOT = Path(__file__).resolve().parents[1]


def child(model: str, batch: int, precision: str) -> None:
    """Three steps; prints seconds of each, building and importing counted to the first."""
    start = time.perf_counter()
    import torch

    from benchmarks.rounds import synchronize
    from benchmarks.step import make_config, project_arm, random_images

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = make_config(model, batch, 1, precision=precision, compile=True)
    arm = project_arm("start", config, random_images(batch, config.model.image_size, device), device)
    for _ in range(3):
        arm.step()
        synchronize(device)
        print(f"{time.perf_counter() - start:.2f}")
        start = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the arms and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b_gelu", choices=list(presets.PRESETS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="bf16_autocast", choices=["fp32", "bf16_autocast", "bf16_params"])
    parser.add_argument("--repeats", type=int, default=2, help="warm starts")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.model, args.batch, args.precision)
        return
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        environment.pop("TRITON_CACHE_DIR", None)  # it would be warm; without it Triton's cache is a part of the other
        for name in ["empty cache", *["kept cache"] * args.repeats]:
            command = [sys.executable, "-m", "benchmarks.start", "--child", "--model", args.model, "--batch", str(args.batch)]
            command += ["--precision", args.precision]
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:  # it has said why
                raise SystemExit(f"error: a process ended with code {done.returncode}")
            print(f"{name}: seconds to the end of step 1, 2, 3: {', '.join(done.stdout.split())}", flush=True)


if __name__ == "__main__":
    main()
