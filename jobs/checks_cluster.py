"""What a cluster must have for a job: partition, account, time, and SLURM's own opinion. Imports no torch."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobs import scheduler
from jobs.findings import Check, Context, Finding, good, note, problem, skipped
from jobs.runs import JOB, read_json, tail_rows
from jobs.scheduler import Partition, SchedulerError, minutes
from jobs.slurm import SubmitError, batch_script, job_of, sbatch

_NO_CLUSTER = "no SLURM on this machine (sbatch is not on PATH)"


def check_launcher(context: Context) -> Iterator[Finding]:
    """The cluster is one that this machine can start a run on."""
    where = context.config.cluster
    if where.launcher == "local" and where.nodes > 1:
        total = where.world_size
        yield problem(
            f"the local cluster is one machine, not {where.nodes} nodes: use --gpus-per-node {total}, or --cluster slurm"
        )
    elif context.is_slurm and not scheduler.is_here() and not context.describing:
        yield problem(f"{_NO_CLUSTER}: use a login node, --print to see the job, or --cluster local to run it here")
    else:
        yield good(f"{where.launcher}, {where.world_size} ranks")


def check_local_gpus(context: Context) -> Iterator[Finding]:
    """A local run has a GPU per rank, where this machine has any."""
    if context.is_slurm:
        return
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    found, wanted, engine = listed.count("GPU "), context.config.cluster.gpus_per_node, context.config.engine
    if not found and (engine.device == "cuda" or engine.kernels == "triton"):
        asks = "engine.device is cuda" if engine.device == "cuda" else "engine.kernels is triton"
        yield problem(f"{asks}, but this machine has no GPU (nvidia-smi -L lists none): use auto, or --cluster slurm")
    elif engine.device == "cpu" or not found:
        yield good(f"{wanted} ranks on the CPU")
    elif wanted > found:
        yield problem(f"{wanted} ranks on {found} GPUs: --gpus-per-node {found}, or --set engine.device=cpu")
    else:
        yield good(f"{wanted} of {found} GPUs")


def check_queue(context: Context) -> Iterator[Finding]:
    """No job of this run waits or runs already."""
    if not context.is_slurm:
        return
    number = read_json(context.run_dir / JOB / "job.json").get("id")
    if not number:
        yield good("no job of this run")
        return
    try:
        entry = scheduler.queue().get(str(number))
    except SchedulerError as error:
        yield skipped(str(error))
        return
    if entry is None or entry.state not in scheduler.ACTIVE:
        yield good(f"job {number} of this run is over")
    else:
        end = f"end it (python jobs/submit.py cancel {context.run_dir})"
        yield problem(f"job {number} of this run is {entry.state.lower()}: wait for it, {end}, or give another --name")


def check_partition(context: Context) -> Iterator[Finding]:
    """The partition exists, is up, and has such nodes for so long."""
    if not context.is_slurm:
        return
    where = context.config.cluster
    try:
        found = scheduler.partitions()
        names = where.partition.split(",") if where.partition else [scheduler.default_partition()]
    except SchedulerError as error:
        yield skipped(str(error))
        return
    known = sorted({partition.name for partition in found})
    for name in names:
        kinds = [partition for partition in found if partition.name == name]
        if not kinds:
            text = f"no partition {name!r}" if name else "this cluster has no default partition"
            yield problem(f"{text}: --partition, one of {', '.join(known) or 'none'}")
        else:
            yield from _check_kinds(context, name or "", kinds)


def _check_kinds(context: Context, name: str, kinds: list[Partition]) -> Iterator[Finding]:
    where, gpus = context.config.cluster, wants_gpus(context)
    if not any(kind.is_up for kind in kinds):
        yield problem(f"partition {name} is down: choose another --partition")
        return
    limit = max(kind.minutes for kind in kinds)
    if where.time and minutes(where.time) > limit:
        yield problem(f"--time {where.time} is more than the {limit:g} minutes of partition {name}: --time {limit:.0f}")
    memory = _megabytes(where.mem)
    cores = where.gpus_per_node * (where.cpus_per_gpu or 1)
    wanted = {
        "GPUs": (where.gpus_per_node if gpus else 0, "gpus", "--gpus-per-node"),
        "cores": (cores, "cores", "--cpus-per-gpu"),
        "MB of memory": (memory, "memory_megabytes", "--mem"),
    }
    fitting = kinds
    for what, (needed, field, option) in wanted.items():
        most = max(getattr(kind, field) for kind in kinds)
        fitting = [kind for kind in fitting if getattr(kind, field) >= needed]
        if needed > most:
            yield problem(
                f"{needed} {what} per node, partition {name} has nodes with {most}: lower {option}, or another --partition"
            )
    total = sum(kind.nodes for kind in fitting)
    if where.nodes > total and fitting:
        yield problem(
            f"{where.nodes} nodes, partition {name} has {total} of that kind: --nodes {total}, or another --partition"
        )
    elif fitting:
        yield good(f"{name}: {where.nodes} of {total} nodes, limit {limit:g} minutes")


def check_account(context: Context) -> Iterator[Finding]:
    """The account may be charged, with that quality of service."""
    if not context.is_slurm:
        return
    where = context.config.cluster
    try:
        found = scheduler.accounts()
    except SchedulerError as error:
        yield skipped(str(error))
        return
    if not found:
        yield skipped("the cluster keeps no associations of this user")
    elif where.account is not None and where.account not in found:
        yield problem(f"--account {where.account}: you may charge {', '.join(sorted(found))}")
    else:
        allowed = found[where.account] if where.account else set().union(*found.values())
        if where.qos is not None and where.qos not in allowed:
            yield problem(f"--qos {where.qos}: you may ask for {', '.join(sorted(allowed)) or 'none'}")
        else:
            yield good(f"{where.account or 'the default account'}{f', {where.qos}' if where.qos else ''}")


def check_signal(context: Context) -> Iterator[Finding]:
    """The warning before the time limit leaves time for a step and a checkpoint."""
    if not context.is_slurm:
        return
    where = context.config.cluster
    lead = where.signal_seconds
    step, save = _measured(context, "step_seconds"), _measured(context, "checkpoint_seconds")
    needed = None if step is None else 2 * step + 2 * (save or 0) + 10
    limit = minutes(where.time) * 60 if where.time else float("inf")
    if lead + 60 >= limit:
        yield problem(
            f"--time {where.time} is too short for a warning {lead} s before it: --set cluster.signal_seconds=30, or more time"
        )
    elif needed is not None and needed > lead:
        yield problem(
            f"a step of {step:.3g} s and a checkpoint of {save or 0:.3g} s need {needed:.0f} s, the warning comes {lead} s "
            f"before the limit: --set cluster.signal_seconds={needed:.0f}"
        )
    else:
        known = "not measured yet" if needed is None else f"a step and a checkpoint need {needed:.0f} s"
        yield good(f"the ranks are told {lead} s before the limit; {known}")


def check_interval(context: Context) -> Iterator[Finding]:
    """A checkpoint comes often enough for a job of this length (it is also written before the limit)."""
    if not context.is_slurm:
        return
    step, every = _measured(context, "step_seconds"), context.config.checkpoint.every
    if step is None:
        yield skipped("no speed measured yet")
    elif step * every > 2 * 3600:
        fitting = max(1, round(1800 / step))
        yield note(
            f"a checkpoint every {step * every / 3600:.1f} h: a node that fails costs half of that; checkpoint.every={fitting}"
        )
    else:
        yield good(f"every {every} steps, {step * every / 60:.1f} minutes")


def check_test_only(context: Context) -> Iterator[Finding]:
    """SLURM itself would take the job."""
    if not context.is_slurm:
        return
    if not scheduler.is_here():
        yield skipped(_NO_CLUSTER)
        return
    here = Path(tempfile.gettempdir())
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(batch_script(job_of(context.config, here)._replace(folder=here)))
            file.flush()
            sbatch(["--test-only", file.name], context.config.cluster, here)
    except (SubmitError, ImportError) as error:
        yield problem(str(error))
    else:
        yield good("sbatch --test-only takes it")


def wants_gpus(context: Context) -> bool:
    """Whether the job asks for GPUs."""
    return context.config.engine.device != "cpu"


def _measured(context: Context, name: str) -> float | None:
    """Newest value of a metric of the run in that folder."""
    for row in tail_rows(context.run_dir / "metrics.jsonl"):
        if isinstance(value := row.get(name), int | float):
            return float(value)
    return None


def _megabytes(text: str | None) -> int:
    if text is None:
        return 0
    factor = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}.get(text[-1])
    return int(text) if factor is None else round(int(text[:-1]) * factor)


CLUSTER_CHECKS: dict[str, Check] = {
    "launcher": check_launcher,
    "local GPUs": check_local_gpus,
    "queue": check_queue,
    "partition": check_partition,
    "account": check_account,
    "signal": check_signal,
    "interval": check_interval,
    "test-only": check_test_only,
}
