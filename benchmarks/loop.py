"""What the loop costs beside its steps: ``python -m benchmarks.loop vit_b_gelu --data digits --steps 24 --every 8``.

Trains as the shell would, once with a checkpoint every ``--every`` steps and once without (both save at the end), and tells
from the runs' own curves where their time went, how long the loop stood still for a save, and whether steps were slower while
one was written. The share of a recipe that saves more rarely follows from the stall and the step.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import facts, run_parser, train_all
from benchmarks.step import write
from nepa_dist.config import CheckpointConfig

_TIME = "time_seconds_total."


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Seconds by what they went to, the median step, and each stall for a save."""
    last = rows[-1]
    stalls: list[float] = []
    for row in rows:
        if (stall := row.get("checkpoint_stall_seconds")) is not None and stall not in stalls[-1:]:
            stalls.append(stall)
    return {
        "step_seconds": statistics.median(row["step_seconds"] for row in rows[1:]),
        "stall_seconds": stalls,
        "save_seconds": last.get("checkpoint_seconds"),
        "save_bytes": last.get("checkpoint_bytes"),
        "seconds": {key.removeprefix(_TIME): value for key, value in last.items() if key.startswith(_TIME)},
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    about, saving, without = report["machine"], report["arms"]["saving"], report["arms"]["without"]
    lines = [
        f"# Around the steps of {report['model']}, {about['device']}, {report['date']}",
        "",
        f"    {report['command']}",
        "",
        f"Commit {about['commit']}; Python {about['python']}, torch {about['versions']['torch']}. Where the time went:",
        "",
        "| seconds | saving | without |",
        "|---|---|---|",
    ]
    for kind, seconds in saving["seconds"].items():
        shares = [
            f"{value:.3f} ({value / sum(arm['seconds'].values()):.2%})"
            for value, arm in ((seconds, saving), (without["seconds"][kind], without))
        ]
        lines.append(f"| {kind} | {' | '.join(shares)} |")
    lines.append(f"| a step, median | {saving['step_seconds']:.3f} | {without['step_seconds']:.3f} |")
    stalls = ", ".join(f"{seconds:.3f}" for seconds in saving["stall_seconds"])
    lines += [
        "",
        f"The loop stood still for {stalls} s at its saves of {saving['save_bytes'] / 1e9:.2f} GB; writing one took "
        f"{saving['save_seconds']:.1f} s beside training. With a save every {report['usual_every']} steps of "
        f"{without['step_seconds']:.3f} s, the longest of these is {report['usual_share']:.3%} of the time.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = run_parser("loop", __doc__.splitlines()[0], 24)
    parser.add_argument("--every", type=int, default=8, help="steps between two checkpoints")
    args = parser.parse_args(argv)
    if not 0 < args.every < args.steps:
        parser.error(f"--every {args.every}: between 1 and --steps {args.steps}, so that a save falls into the run")
    every = {"saving": args.every, "without": args.steps + 1}
    with tempfile.TemporaryDirectory() as scratch:
        curves = train_all(args, Path(scratch), {name: [f"checkpoint.every={number}"] for name, number in every.items()})
    found = {name: summarize(rows) for name, rows in curves.items()}
    usual = CheckpointConfig().every
    report = facts("loop", args.model, argv) | {
        "arms": found,
        "usual_every": usual,
        "usual_share": max(found["saving"]["stall_seconds"]) / (usual * found["without"]["step_seconds"]),
    }
    write(report, to_markdown(report), args.out, "loop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
