"""Does a setting change what is learned? ``python -m benchmarks.parity vit_b --data PREPARED --change engine.fp8=rowwise``.

Two runs of the same seed see the same images in the same order: one as given, one with ``--change``. The mean losses of ten
equal spans of steps, the first left out, must not differ by more than ``--tolerance``; otherwise the exit code is 1. A third
run, which differs only in the order in which attention sums, tells how far apart two curves get by rounding alone.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import facts, run_parser, train_all
from benchmarks.step import write

SPANS = 10


def spans(rows: Sequence[dict[str, float]]) -> list[float]:
    """Mean loss of each of the equal parts of a curve."""
    losses = [row["loss"] for row in rows if "loss" in row]
    return [statistics.fmean(losses[k * len(losses) // SPANS : (k + 1) * len(losses) // SPANS]) for k in range(SPANS)]


def compare(curves: dict[str, list[dict[str, float]]], tolerance: float) -> dict[str, Any]:
    """Mean losses by span, the largest difference to the first curve after the first span, and whether the change passes."""
    means = {name: spans(rows) for name, rows in curves.items()}
    first = means["as given"]
    gaps = {name: max(abs(a - b) for a, b in zip(first[1:], other[1:], strict=True)) for name, other in means.items()}
    speeds = {
        name: statistics.median(row["images_per_second"] for row in rows if row.get("images_per_second"))
        for name, rows in curves.items()
    }
    return {
        "tolerance": tolerance,
        "steps": int(max(row["step"] for row in curves["as given"])),
        "loss": means,
        "gap": {name: gap for name, gap in gaps.items() if name != "as given"},
        "images_per_second": speeds,
        "passed": gaps["changed"] <= tolerance,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    about, names = report["machine"], list(report["loss"])
    lines = [
        f"# Parity of {report['model']} with {', '.join(report['changes'])}, {about['device']}, {report['date']}",
        "",
        f"    {report['command']}",
        "",
        f"Commit {about['commit']}; Python {about['python']}, torch {about['versions']['torch']}; {report['steps']} steps. "
        "Mean loss of each tenth of them:",
        "",
        f"| tenth | {' | '.join(names)} |",
        "|---" * (1 + len(names)) + "|",
    ]
    for k in range(SPANS):
        lines.append(f"| {k + 1} | " + " | ".join(f"{report['loss'][name][k]:.5f}" for name in names) + " |")
    speeds = report["images_per_second"]
    lines.append("| images/s | " + " | ".join(f"{speeds[name]:.4g}" for name in names) + " |")
    verdict = "passed" if report["passed"] else "FAILED"
    lines += [
        "",
        f"Largest difference from the second tenth on: {report['gap']['changed']:.5f} with the change, "
        f"{report['gap']['rounding']:.5f} by rounding alone; allowed {report['tolerance']}: **{verdict}**.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = run_parser("parity", __doc__.splitlines()[0], 1000)
    parser.add_argument("--change", action="append", required=True, metavar="KEY=VALUE", help="what is tested; may be repeated")
    parser.add_argument("--tolerance", type=float, default=0.005, help="of the mean loss of a tenth of the steps")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="keep the runs there; default: they are thrown away")
    args = parser.parse_args(argv)
    if args.steps < 2 * SPANS:
        parser.error(f"--steps {args.steps}: at least {2 * SPANS}, two for each span")
    arms = {"as given": [], "changed": args.change, "rounding": [f"engine.attention={_other_attention(args.set)}"]}
    with tempfile.TemporaryDirectory() as scratch:
        curves = train_all(args, args.runs or Path(scratch), arms)
    report = facts("parity", args.model, argv) | compare(curves, args.tolerance) | {"changes": args.change}
    about_change = re.sub(r"[^\w.]+", "-", " ".join(args.change))
    write(report, to_markdown(report), args.out, f"parity_{about_change}")
    return 0 if report["passed"] else 1


def _other_attention(settings: Sequence[str]) -> str:
    """An implementation of attention that is not the one of the runs and works on every device."""
    chosen = [setting.partition("=")[2] for setting in settings if setting.startswith("engine.attention=")]
    return "dense" if torch.cuda.is_available() or chosen[-1:] == ["sdpa"] else "sdpa"


if __name__ == "__main__":
    sys.exit(main())
