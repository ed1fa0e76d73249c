"""``doctor --nodes N``: are the nodes of a cluster fit to train together, and if not, which one is bad? Imports no torch.

Every rank looks at its node and meets the others (:mod:`jobs.node_check`). What differs from the rest, fails, or never comes is
named with its node.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs import cluster, scheduler
from jobs.options import CONFIGS, absolute, recipe_names
from jobs.runs import read_json
from jobs.slurm import site_environment, submit_environment
from nepa_dist.config import ClusterConfig
from nepa_dist.config_load import load_config

SLOW = 0.5
"""A node below this share of the median of all is named."""
MAX_CLOCK_OFFSET_SECONDS = 1.0
_PHASES = {
    "start": "starting Python and torch",
    "compute": "a product of matrices",
    "storage": "writing to the folder of the runs",
    "join": "joining the others",
    "clock": "the first meeting of all",
    "pair": "exchanging data with rank 0",
    "all-reduce": "a sum over all ranks",
}
_SPEEDS = {
    "gflops": ("computes", 1.0, "GFLOP/s"),
    "write_bytes_per_second": ("writes", 1e-6, "MB/s"),
    "read_bytes_per_second": ("reads", 1e-6, "MB/s"),
    "pair_bytes_per_second": ("sends to rank 0", 1e-6, "MB/s"),
}
Report = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """The command line; returns 0 if all nodes are fit, 1 if one is not, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py doctor --nodes N", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="processes per node; default: the cluster's")
    parser.add_argument("--cluster", metavar="NAME", help=f"{', '.join(recipe_names('cluster'))}; default: slurm")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="settings of the cluster (YAML)")
    parser.add_argument("--partition", metavar="P")
    parser.add_argument("--account", metavar="A")
    parser.add_argument("--exclude", metavar="NODES")
    parser.add_argument("--folder", metavar="DIR", default="runs", help="on the storage of the runs; default: runs")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in ("nodes", "gpus_per_node", "partition", "account", "exclude")}
    name = args.cluster or "slurm"
    if name not in recipe_names("cluster"):
        print(f"unknown cluster {name!r} (known: {', '.join(recipe_names('cluster'))})", file=sys.stderr)
        return cluster.USER_ERROR
    try:
        site = load_config([CONFIGS / "cluster" / f"{name}.yaml", *args.config]).cluster.model_dump()
        cluster_settings = site | {key: value for key, value in given.items() if value is not None}
        where = load_config(base={"cluster": cluster_settings}).cluster
    except ValueError as error:
        print(error, file=sys.stderr)
        return cluster.USER_ERROR
    if where.launcher == "slurm" and shutil.which("srun") is None:
        print("srun is not on PATH: use a login node of the cluster, or --cluster local", file=sys.stderr)
        return cluster.USER_ERROR
    base = Path(absolute(args.folder))
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=base) as folder:
        said = _run(where, Path(folder))
        reports = [read_json(path) for path in sorted(Path(folder).glob("rank-*.json"))]
    lines, bad = describe(reports, where.world_size, where.gpus_per_node)
    print("\n".join(lines))
    if bad and said:
        print(f"\n{said}", file=sys.stderr)
    return 1 if bad else 0


def describe(reports: Sequence[Report], world_size: int, per_node: int) -> tuple[list[str], bool]:
    """The findings as text, and whether a node is bad.

    Args:
        reports: of the ranks that came.
        world_size: ranks that there should be.
        per_node: ranks of each node.
    """
    reports = sorted(reports, key=lambda report: int(report["rank"]))
    rows: list[tuple[str, ...]] = [
        ("rank", "node", "device", "GFLOP/s", "write MB/s", "read MB/s", "to rank 0 MB/s", "clock s", "reached")
    ]
    for report in reports:
        speeds = [_shown(report, key, scale) for key, (_, scale, _) in _SPEEDS.items()]
        offset = report.get("clock_offset_seconds")
        clock = "" if offset is None else f"{offset:+.3f}"
        rows.append(
            (str(report["rank"]), str(report["node"]), str(report.get("device", "")), *speeds, clock, str(report["phase"]))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    seconds = [report["all_reduce_seconds"] for report in reports if "all_reduce_seconds" in report]
    if seconds:
        lines.append(f"\na sum of 67 MB over all {world_size} ranks takes {max(seconds):.3g} s")
    problems = list(find_problems(reports, world_size, per_node))
    lines += ["", *(f"BAD  {problem}" for problem in problems)] if problems else ["", "All nodes are fit."]
    return lines, bool(problems)


def find_problems(reports: Sequence[Report], world_size: int, per_node: int) -> Iterator[str]:
    """Sentences about nodes that are not as the others, each with the node's name."""
    came = {int(report["rank"]): str(report["node"]) for report in reports}
    for rank in range(world_size):
        if rank not in came:
            neighbours = [came[other] for other in came if other // per_node == rank // per_node]
            node = neighbours[0] if neighbours else f"node {rank // per_node} of the job"
            yield f"{node}: rank {rank} never started"
    failed = [report for report in reports if report["phase"] != "done"]
    # Those that are stuck where others wait for them tell most: the earliest phase counts.
    order = list(_PHASES)
    first = min((order.index(report["phase"]) for report in failed), default=None)
    for report in failed:
        if order.index(report["phase"]) == first:
            reason = report.get("error", "no answer in time")
            yield f"{report['node']}: rank {report['rank']} failed in {_PHASES[report['phase']]}: {reason}"
    for key, (verb, scale, unit) in _SPEEDS.items():
        yield from _slow_ones(reports, key, verb, scale, unit)
    for report in reports:
        offset = report.get("clock_offset_seconds", 0.0)
        if report["rank"] and abs(offset) > MAX_CLOCK_OFFSET_SECONDS:
            yield f"{report['node']}: its clock is {offset:+.1f} s off that of rank 0: set up NTP"
    for key in ("driver", "torch", "device"):
        yield from _odd_ones(reports, key)


def _slow_ones(reports: Sequence[Report], key: str, verb: str, scale: float, unit: str) -> Iterator[str]:
    values = [(report, float(report[key])) for report in reports if key in report]
    if len(values) < 3:  # of two, either could be the odd one
        return
    median = statistics.median(value for _, value in values)
    for report, value in values:
        if value < SLOW * median:
            yield f"{report['node']}: rank {report['rank']} {verb} {value * scale:.0f} {unit}, the others {median * scale:.0f}"


def _odd_ones(reports: Sequence[Report], key: str) -> Iterator[str]:
    counts = Counter(str(report[key]) for report in reports if key in report)
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]
    for node, value in sorted({(str(r["node"]), str(r[key])) for r in reports if key in r and str(r[key]) != usual}):
        yield f"{node}: {key} {value}, elsewhere {usual}"


def _shown(report: Report, key: str, scale: float) -> str:
    return f"{float(report[key]) * scale:.0f}" if key in report else ""


def _run(where: ClusterConfig, folder: Path) -> str:
    """Run the check on all ranks; returns what went wrong with that, if anything did."""
    command = [where.python or sys.executable, "-P", "-m", "jobs.node_check", str(folder)]
    if where.launcher == "local":
        code = cluster.run_local(folder, where.world_size, command=command)
        return f"exit code {code}" if code else ""
    resources = {
        "nodes": where.nodes,
        "ntasks-per-node": where.gpus_per_node,
        "cpus-per-task": where.cpus_per_gpu,
        "mem": where.mem,
        "partition": where.partition,
        "account": where.account,
        "qos": where.qos,
        "constraint": where.constraint,
        "exclude": where.exclude,
    }
    words = [f"--{name}={value}" for name, value in resources.items() if value is not None]
    gpus = any(partition.gpus for partition in scheduler.partitions())
    words += [f"--gpus-per-node={where.gpus_per_node}"] if gpus else []
    environment = {**submit_environment(where), **site_environment(where), "PYTHONPATH": str(cluster.REPO_ROOT)}
    words += ["--job-name=nepa-doctor", "--time=10", "--kill-on-bad-exit=0", "--wait=120"]
    done = subprocess.run(["srun", *words, *command], env=environment, capture_output=True, text=True)
    return done.stderr.strip()
