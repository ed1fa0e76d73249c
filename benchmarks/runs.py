"""Whole runs, as the shell starts them: for benchmarks of the loop rather than of a step."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import place
from benchmarks.step import RESULTS
from nepa_dist.metrics.sinks import read_curve

ROOT = Path(__file__).resolve().parents[1]


def train(command: Sequence[str], run_dir: Path) -> list[dict[str, float]]:
    """Train in the shell's way; returns the rows of the run's curve."""
    print(f"{shlex.join(command)}\n  (its progress: {run_dir / 'log.txt'})", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}error: the run in {run_dir} ended with {done.returncode}")
    return read_curve(run_dir / "metrics.jsonl")


def train_all(args: argparse.Namespace, folder: Path, arms: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, float]]]:
    """Check all arms, then train them; returns their curves.

    Args:
        args: of :func:`run_parser`.
        folder: of the runs, which are named after the arms.
        arms: name -> settings beside those of all.
    """
    commands = {}
    for name, settings in arms.items():
        run_dir = folder / name.replace(" ", "-")
        command = [sys.executable, str(ROOT / "jobs/submit.py"), "pretrain", args.model, "--cluster", "local"]
        command += ["--run-dir", str(run_dir), "--data", args.data, "--gpus-per-node", str(args.gpus_per_node)]
        shared = [f"steps={args.steps}", "metrics.every=1", *args.set]
        command += [part for setting in (*shared, *settings) for part in ("--set", setting)]
        commands[name] = (command, run_dir)
    for name, (command, _) in commands.items():
        checked = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
        if checked.returncode:
            raise SystemExit(f"{checked.stdout}{checked.stderr}error: the run '{name}' cannot be made as it is")
    return {name: train(command, run_dir) for name, (command, run_dir) in commands.items()}


def run_parser(name: str, about: str, steps: int) -> argparse.ArgumentParser:
    """The options that benchmarks of whole runs share.

    Args:
        name: of the module in ``benchmarks``.
        about: first line of its help.
        steps: of each run, by default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("model", help="as for jobs/submit.py pretrain")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs; may be repeated")
    parser.add_argument("--gpus-per-node", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the report goes")
    return parser


def facts(name: str, model: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """What a report says of the machine and of how it was made."""
    cuda = torch.cuda.is_available()
    return {
        "model": model,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": place(torch.device("cuda" if cuda else "cpu")),
        "cuda": cuda,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)]),
    }
