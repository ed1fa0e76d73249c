"""Whole runs, as the shell starts them: for benchmarks of the loop rather than of a step."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nepa_dist.metrics.sinks import read_curve

ROOT = Path(__file__).resolve().parents[1]


def train(command: Sequence[str], run_dir: Path) -> list[dict[str, float]]:
    """Train in the shell's way; returns the rows of the run's curve."""
    print(f"{shlex.join(command)}\n  (its progress: {run_dir / 'log.txt'})", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}error: the run in {run_dir} ended with {done.returncode}")
    return read_curve(run_dir / "metrics.jsonl")


def train_all(
    model: str, folder: Path, words: Sequence[str], arms: Mapping[str, Sequence[str]]
) -> dict[str, list[dict[str, float]]]:
    """Check all arms, then train them; returns their curves.

    Args:
        model: recipe of the pretraining.
        folder: of the runs, which are named after the arms.
        words: options of ``jobs/submit.py``, for all.
        arms: name -> settings.
    """
    commands = {}
    for name, settings in arms.items():
        run_dir = folder / name.replace(" ", "-")
        command = [sys.executable, str(ROOT / "jobs/submit.py"), "pretrain", model, "--cluster", "local"]
        command += ["--run-dir", str(run_dir), *words, *(part for setting in settings for part in ("--set", setting))]
        commands[name] = (command, run_dir)
    for name, (command, _) in commands.items():
        checked = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
        if checked.returncode:
            raise SystemExit(f"{checked.stdout}{checked.stderr}error: the run '{name}' cannot be made as it is")
    return {name: train(command, run_dir) for name, (command, run_dir) in commands.items()}
