"""Jobs of SLURM: resources become a batch script (submitit writes its directives), and sbatch takes it.

No pickle is made: what a job executes is ``python -m jobs.runner RUN``, which reads the run's configuration. The script only
holds words that :func:`shlex.quote` has seen, and directives whose text :mod:`nepa_dist.config_cluster` has checked. sbatch
gets a small environment, so nothing of the submitting shell reaches the job that its configuration does not name.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.options import absolute
from jobs.runs import BATCH, JOB
from nepa_dist.config import ClusterConfig, Config
from nepa_dist.config_cluster import is_hostile
from nepa_dist.run_folder import write_text

INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "SLURM_CONF")
"""Variables of the submitting shell that a job has; ``cluster.inherit`` names more."""
RUNNER = ("jobs.runner",)


class Job(NamedTuple):
    """One submission: a run, or several as an array."""

    name: str
    cluster: ClusterConfig
    runs: tuple[Path, ...]
    """Run folders; an array has one task for each."""
    folder: Path
    """Of the runs and the code; mounted into containers. The record of an array lies in it, too."""
    code: Path
    """The snapshot that runs."""
    gpus: bool = True
    """Ask for GPUs; off where the ranks compute on CPUs."""
    module: tuple[str, ...] = RUNNER
    """What each rank executes: ``python -m`` this, then the run folder."""
    record: str = JOB
    """Folder in that of the run for what concerns the job."""
    after: str = ""
    """Condition, such as afterok:17; the job is cancelled when it cannot be met any more."""
    is_array: bool = False

    @property
    def log(self) -> Path:
        """Where the batch script prints, with SLURM's patterns."""
        return self.folder / self.record / "log-%A_%a.txt" if self.is_array else self.runs[0] / "logs" / "job-%j.txt"

    def log_of(self, number: str) -> Path:
        """The same for a job with this number, ``17`` or ``17_3``."""
        return Path(str(self.log).replace("%A_%a", number).replace("%j", number))


def job_of(config: Config, code: Path, folder: Path | None = None, after: str = "") -> Job:
    """The job of one run.

    Args:
        config: of the run.
        code: its snapshot.
        folder: that holds run and snapshot; default: that of the run.
        after: condition that it waits for.
    """
    folder = folder or config.run_dir
    name = config.name if folder == config.run_dir else f"{folder.name}-{config.name}"
    return Job(name, config.cluster, (config.run_dir,), folder, code, gpus=config.engine.device != "cpu", after=after)


class SubmitError(RuntimeError):
    """sbatch did not take a job; the message says why."""


def batch_script(job: Job) -> str:
    """The batch script of a job, whole.

    Raises:
        SubmitError: a word of it has a control character or a line break, which would be more than a word to sbatch.
    """
    texts = (job.name, *map(str, (*job.runs, job.folder, job.code)), *job.module, job.record, job.after, sys.executable)
    for text in texts:
        if is_hostile(text):
            raise SubmitError(f"{text!r} has a control character or a line break: no batch script may hold it")
    from submitit.slurm.slurm import _make_sbatch_string  # a function: an executor would look for srun

    return _make_sbatch_string(
        command=_step(job),
        folder=job.folder,  # only named in a directive that ours replaces
        setup=list(_setup(job)),
        teardown=["end $?"],
        use_srun=False,
        stderr_to_stdout=True,
        wckey=None,  # type: ignore[arg-type]  # no directive for it
        **_directives(job),
    )


def rank_environment_text(job: Job) -> str:
    """What the ranks find beside the variables of the script, as comments."""
    where = job.cluster
    master = where.environment.get("MASTER_ADDR", "first node of the job")
    lines = [
        f"each of the {where.world_size} ranks also has, from srun through jobs.runner:",
        "  RANK=$SLURM_PROCID  WORLD_SIZE=$SLURM_NTASKS  LOCAL_RANK=$SLURM_LOCALID  LOCAL_WORLD_SIZE=tasks of its node",
        f"  MASTER_ADDR={master}  MASTER_PORT=20000 + (16 x job + step) mod 12000, the same for all",
        f"and of the shell that submits: {', '.join((*INHERITED, *where.inherit))}; nothing else",
    ]
    if where.secrets:
        lines.append(f"and from {where.secrets_file} on its node: {', '.join(where.secrets)}")
    return "".join(f"# {line}\n" for line in lines)


def submit(job: Job) -> str:
    """Write the script beside the record and give it to sbatch; returns the job's number.

    Raises:
        SubmitError: sbatch refused it.
        OSError: a file cannot be written.
    """
    place = job.folder / job.record if job.is_array else job.runs[0] / job.record
    for folder in (place, job.log.parent, *(run / job.record for run in job.runs)):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    script = place / "script.sh"
    write_text(script, batch_script(job))
    for run in job.runs:
        (run / job.record / "hold").unlink(missing_ok=True)
        (run / job.record / "stalled").unlink(missing_ok=True)
    return sbatch(["--parsable", str(script)], job.cluster, job.folder)


def sbatch(words: Sequence[str], cluster: ClusterConfig, folder: Path) -> str:
    """Call sbatch with the small environment; returns the job's number, "" where it gives none (--test-only)."""
    try:
        done = subprocess.run(
            ["sbatch", *words], cwd=folder, env=submit_environment(cluster), capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubmitError(f"sbatch: {error}") from None
    if done.returncode:
        raise SubmitError(f"sbatch refused the job: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    answer = done.stdout.strip().split(";")[0]
    if answer and not re.fullmatch("[0-9]+", answer):
        raise SubmitError(f"sbatch answered {answer!r}, which is no job number")
    return answer


def submit_environment(cluster: ClusterConfig) -> dict[str, str]:
    """The variables that sbatch gets, and the job with it; none of them can change a directive."""
    return {name: os.environ[name] for name in (*INHERITED, *cluster.inherit) if name in os.environ}


def _directives(job: Job) -> dict[str, Any]:
    """Arguments for submitit: those it knows, and the others as ``additional_parameters``."""
    where = job.cluster
    known = {
        "job_name": job.name,
        "nodes": where.nodes,
        "ntasks_per_node": where.gpus_per_node,
        "cpus_per_task": where.cpus_per_gpu,
        "mem": where.mem,
        "time": where.time,
        "partition": where.partition,
        "account": where.account,
        "qos": where.qos,
        "constraint": where.constraint,
        "exclude": where.exclude,
        "signal_delay_s": where.signal_seconds,
        "dependency": job.after or None,
    }
    more: dict[str, Any] = {"output": job.log, "requeue": True, "chdir": job.folder}
    if job.gpus:
        more["gpus-per-node"] = f"{where.gpu_type}:{where.gpus_per_node}" if where.gpu_type else where.gpus_per_node
    if job.after:
        more["kill-on-invalid-dep"] = "yes"
    if job.is_array:
        known |= {"map_count": len(job.runs), "array_parallelism": where.array_parallelism}
    return {**known, "additional_parameters": more}


def _setup(job: Job) -> Iterator[str]:
    where, folder = job.cluster, shlex.quote(str(job.folder))
    if job.is_array:
        yield f"runs=({' '.join(shlex.quote(str(run)) for run in job.runs)})"
        yield "run=${runs[SLURM_ARRAY_TASK_ID]}"
        yield f'log={folder}/{job.record}/log-"$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID".txt'
    else:
        yield f"run={shlex.quote(str(job.runs[0]))}"
        yield "log=$run/logs/job-$SLURM_JOB_ID.txt"
    yield f"job=$run/{job.record}"
    yield f"max_stalled={where.max_stalled_starts}"
    yield f"silence={'stopped' if job.module == RUNNER else 'finished'}"
    if where.source is not None:
        yield f". {shlex.quote(absolute(where.source))}"
    if where.modules:
        yield "type module >/dev/null 2>&1 || . /etc/profile"
        yield f"module load {shlex.join(where.modules)}"
    for name, value in _environment(job).items():
        yield f"export {name}={shlex.quote(value)}"
    yield f". {shlex.quote(str(job.code / 'jobs' / 'attempt.sh'))}"
    yield "begin"


def _environment(job: Job) -> dict[str, str]:
    return {"PYTHONPATH": str(job.code), "PYTHONUNBUFFERED": "1", BATCH: "1", **site_environment(job.cluster)}


def site_environment(where: ClusterConfig) -> dict[str, str]:
    """Threads and network of each rank, and what the site says."""
    values = {"OMP_NUM_THREADS": str(where.cpus_per_gpu or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    if where.interface is not None:
        values |= {"NCCL_SOCKET_IFNAME": where.interface, "GLOO_SOCKET_IFNAME": where.interface}
    return values | where.environment


def _step(job: Job) -> str:
    """The call of srun. An exit code other than 0 of one rank ends the others, and stopping in order is 0 for srun."""
    where = job.cluster
    words = ["srun", "--kill-on-bad-exit=1", "--open-mode=append"]
    if where.cpus_per_gpu is not None:
        words.append(f"--cpus-per-task={where.cpus_per_gpu}")  # srun does not take it from the job since SLURM 22.05
    output = '--output="$run/logs/rank-%t.txt"' if job.module == RUNNER else f'--output="$run/{job.record}/log.txt"'
    inner = []
    if where.container is not None and where.container_runtime == "pyxis":
        mounts = [_mount(text) for text in (str(job.folder), *where.container_mounts)]
        words += [f"--container-image={where.container}", f"--container-mounts={','.join(mounts)}"]
    elif where.container is not None:
        mounts = [word for text in (str(job.folder), *where.container_mounts) for word in ("--bind", _mount(text))]
        inner = ["apptainer", "exec", *(["--nv"] if job.gpus else []), *mounts, where.container]
    default = sys.executable if where.container is None else "python"
    inner += [where.python or default, "-P", "-m", *job.module]
    return f'{shlex.join(words)} {output} \\\n  {shlex.join(inner)} "$run"'


def _mount(text: str) -> str:
    return text if ":" in text else f"{text}:{text}"
