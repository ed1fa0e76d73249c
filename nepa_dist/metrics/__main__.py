"""What the numbers of runs are good for without a server: python -m nepa_dist.metrics COMMAND.

Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nepa_dist.metrics.discovery import LEASE_SECONDS, prune, watch
from nepa_dist.metrics.replay import to_openmetrics
from nepa_dist.metrics.report import write_report
from nepa_dist.metrics.sinks import read_curve

PROBLEM = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for a mistake to correct."""
    parser = argparse.ArgumentParser(
        prog="python -m nepa_dist.metrics", description="Reports of runs, and their way to Prometheus."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="one HTML page with the curves of runs, which needs no server and no network")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    replay = commands.add_parser(
        "replay", help="write a run's metrics.jsonl as OpenMetrics, for promtool tsdb create-blocks-from"
    )
    replay.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    replay.add_argument("--out", type=Path, help="the file (default: standard output)")
    targets = commands.add_parser("targets", help="remove the targets of runs that were killed from RUN_ROOT/prometheus")
    targets.add_argument("run_root", type=Path, metavar="RUN_ROOT", help="folder of the runs")
    targets.add_argument("--watch", action="store_true", help="go on for ever, beside Prometheus")
    args = parser.parse_args(argv)
    try:
        if args.command == "report":
            write_report(args.out, args.runs)
            print(args.out)
        elif args.command == "replay":
            _replay(args.run, args.out)
        elif not args.run_root.is_dir():
            raise ValueError(f"{args.run_root} is not a folder")
        elif args.watch:
            watch(args.run_root)
        else:
            for run in prune(args.run_root):
                print(f"{run}: not renewed for {LEASE_SECONDS:g} seconds, removed")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return PROBLEM
    except KeyboardInterrupt:
        return 0
    return 0


def _replay(run: Path, out: Path | None) -> None:
    rows = read_curve(run / "metrics.jsonl")
    lines = to_openmetrics(run.resolve().name, rows)
    if out is None:
        sys.stdout.writelines(lines)
        return
    with out.open("w", encoding="utf-8") as file:
        file.writelines(lines)


if __name__ == "__main__":
    sys.exit(main())
