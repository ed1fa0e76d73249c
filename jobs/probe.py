"""``probe``: what frozen features are worth, by ``python -m nepa_dist.evaluate``, here or as a job. Imports no torch."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import slurm
from jobs.cluster import REPO_ROOT
from jobs.control import read_config
from jobs.launch import note_job
from jobs.options import CONFIGS, recipe_names, with_value
from jobs.runs import named_run, newest_checkpoint, read_json
from jobs.slurm import Job, SubmitError
from jobs.snapshot import read_code, write_snapshot
from nepa_dist.config import ClusterConfig, Config, ConfigError, nearest
from nepa_dist.config_load import load_config

RECORD = "probe"
"""Folder in that of a run for what concerns the job."""
MODULE = "nepa_dist.evaluate"


def main(argv: Sequence[str]) -> tuple[int, list[str]]:
    """The command line; returns the exit code, and problems."""
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py probe",
        description="Probe the frozen features of pretraining runs.",
        epilog="Options of python -m nepa_dist.evaluate come after --, for example: probe RUN -- --num-train 2000",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="+", type=named_run, help="folder of a run")
    parser.add_argument("--cluster", default="local", help=f"{', '.join(recipe_names('cluster'))}; default: local")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="settings of the cluster (YAML)")
    known = list(argv)
    options = known[known.index("--") + 1 :] if "--" in known else []
    args = parser.parse_args(known[: known.index("--")] if "--" in known else known)
    if args.cluster not in (known := recipe_names("cluster")):
        return 2, [f"unknown cluster {args.cluster!r} (known: {', '.join(known)}){nearest(args.cluster, known)}"]
    if missing := [f"{run} has no checkpoint to probe" for run in args.run if newest_checkpoint(run) is None]:
        return 2, missing
    try:
        files = [CONFIGS / "cluster" / f"{args.cluster}.yaml", *args.config]
        where = load_config(files).cluster
        if where.launcher == "local":
            return max(probe_here(run, options) for run in args.run), []
        for run in args.run:
            config = with_value(read_config(run), "cluster", where)
            code = write_snapshot(read_code(()), config.run_dir)
            job = probe_job(config, code, options=options)
            number = slurm.submit(job)
            note_job(job, run, number)
            print(f"submitted job {number}: {run}/evaluation.json; what it says: {run}/{RECORD}/log.txt")
    except (ConfigError, SubmitError, OSError, ValueError) as error:
        return 2, [str(error)]
    return 0, []


def probe_here(run: Path, options: Sequence[str] = ()) -> int:
    """Probe a run in a process of this machine; returns the exit code."""
    command = [sys.executable, "-P", "-m", MODULE, *options, str(run)]
    return subprocess.run(command, env=with_our_code(), check=False).returncode


def probe_job(config: Config, code: Path, folder: Path | None = None, after: str = "", options: Sequence[str] = ()) -> Job:
    """The job that probes a run on one GPU, with the other settings of its cluster."""
    job = slurm.job_of(with_value(config, "cluster", one_gpu(config.cluster)), code, folder, after)
    return job._replace(name=f"{job.name}-probe", module=(MODULE, *options), record=RECORD)


def one_gpu(cluster: ClusterConfig) -> ClusterConfig:
    """The same site for a job of one process."""
    return cluster.model_copy(update={"nodes": 1, "gpus_per_node": 1})


def is_probed(run: Path) -> bool:
    """Whether the newest checkpoint has been probed."""
    newest = newest_checkpoint(run)
    return newest is not None and read_json(run / "evaluation.json").get("step") == newest


def with_our_code() -> dict[str, str]:
    """The environment of a process that imports this project's code, whatever is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
