"""What the folder of a run says about it: how far it is, how it ended, what it has scored. Imports no torch.

``job/outcome.json`` is written by :mod:`jobs.runner` when a rank ends; whoever starts the ranks removes it first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nepa_dist.guard import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED
from nepa_dist.run_folder import write_text

JOB = "job"
"""In the folder of a run: what concerns its job."""
OUTCOME = f"{JOB}/outcome.json"
BATCH = "NEPA_BATCH"
"""Variable that tells a rank that the batch script reads outcome.json, so that stopping in order may be exit code 0."""
KINDS = {EXIT_DONE: "finished", EXIT_AGAIN: "stopped", EXIT_FAILED: "gave up"}
"""Exit code of a training that ended in order -> what is noted."""
SCORES = ("top1", "top5", "miou", "macc", "aacc")
"""Metrics of the validation, each a share."""
_TAIL_BYTES = 1 << 16


class Outcome(NamedTuple):
    """How the ranks of a run ended the last time."""

    kind: str
    """A value of :data:`KINDS`, or "mistake" (of the user's), or "crashed" (an error that nobody expected)."""
    detail: str = ""
    """What a rank said about it."""


class Progress(NamedTuple):
    """The newest line of metrics.jsonl, None where there is none."""

    step: int | None = None
    total: int | None = None
    """Steps of the whole run."""
    loss: float | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    restarts: int = 0
    time: float = 0.0
    """When the line was written, Unix seconds."""


def named_run(text: str) -> Path:
    """The folder that a user means: a path, or a name as ``status`` shows it, below ``runs``."""
    path = Path(text)
    return path if path.exists() or not (Path("runs") / path).exists() else Path("runs") / path


def write_outcome(run_dir: Path, kind: str, detail: str = "") -> None:
    """Note how the ranks of a run have ended. Of errors the first counts: the others may have failed because of it."""
    path = run_dir / OUTCOME
    if kind in KINDS.values() or not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_text(path, json.dumps({"kind": kind, "detail": detail[:2000]}) + "\n")


def read_outcome(run_dir: Path) -> Outcome | None:
    """How the ranks ended; None while they run, after they were killed, or before the first start."""
    values = read_json(run_dir / OUTCOME)
    return Outcome(str(values["kind"]), str(values.get("detail", ""))) if "kind" in values else None


def clear_outcome(run_dir: Path) -> None:
    """Forget how the ranks ended: they are about to start again."""
    (run_dir / OUTCOME).unlink(missing_ok=True)


def read_progress(run_dir: Path) -> Progress:
    """Where the run stands; reads no more than the end of the file."""
    for row in tail_rows(run_dir / "metrics.jsonl"):
        step, eta, seconds = (row.get(name) for name in ("step", "eta_seconds", "step_seconds"))
        if not isinstance(step, int) or not isinstance(eta, int | float) or not isinstance(seconds, int | float):
            continue  # the line of a validation
        return Progress(
            step=step,
            total=step + round(eta / seconds) if seconds else None,
            loss=_number(row.get("loss")),
            images_per_second=_number(row.get("images_per_second")),
            eta_seconds=float(eta),
            restarts=int(_number(row.get("restarts_total")) or 0),
            time=float(_number(row.get("time")) or 0.0),
        )
    return Progress()


def newest_checkpoint(run_dir: Path) -> int | None:
    """Step of the newest committed checkpoint; nothing in it is read."""
    try:
        names = os.listdir(run_dir / "checkpoints")
    except OSError:
        return None
    return max((int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8,})", name))), default=None)


def is_finished(run_dir: Path, steps: int | None = None) -> bool:
    """Whether a run has done all it was to do.

    Args:
        run_dir: its folder.
        steps: that it is to have; None: as many as it had the last time.
    """
    outcome, newest = read_outcome(run_dir), newest_checkpoint(run_dir)
    return outcome is not None and outcome.kind == "finished" and newest is not None and newest >= (steps or 0)


def read_scores(run_dir: Path) -> dict[str, float]:
    """Scores by metric name: the best validation of fine-tuning or segmentation, or the probe of pretraining.

    A probe gives those of the last layer: ``linear``, ``knn_20``, ...
    """
    best = read_json(run_dir / "best" / "results.json")
    scores = {name: value for name in SCORES if (value := _number(best.get(name))) is not None}
    layers = read_json(run_dir / "evaluation.json").get("trained")
    last = layers[-1] if isinstance(layers, list) and layers else None
    if isinstance(last, Mapping) and isinstance(last.get("top1"), Mapping):
        found = {str(name): _number(value) for name, value in last["top1"].items()}
        scores |= {name: value for name, value in found.items() if value is not None}
    return scores


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def tail_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of the last lines of a JSONL file, newest first; what is no object is passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def last_line(path: Path) -> str:
    """Last line of a text file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
