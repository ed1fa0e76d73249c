"""The stages of a pipeline as jobs of SLURM: each begins when the one before has finished, and none if that fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.launch import launch_slurm, make_private, note_job
from jobs.probe import is_probed, one_gpu, probe_job
from jobs.runs import is_finished
from jobs.slurm import Job, batch_script, job_of, submit
from jobs.snapshot import CODE, Snapshot, write_snapshot
from nepa_dist.config import ClusterConfig, Config

REPORT = "jobs.pipeline_report"


def submit_chain(root: Path, stages: Sequence[tuple[Config, int | None]], code: Snapshot, *, probe: bool) -> Iterator[str]:
    """Submit the stages that are not finished, and a job that writes the report when the last one has ended.

    Args:
        root: folder of the pipeline.
        stages: configuration and number of steps of each.
        code: the snapshot that all of them run.
        probe: probe each pretraining run when it is finished.

    Yields:
        What was submitted, a line for each job.

    Raises:
        LaunchError, SubmitError, OSError: a job could not be submitted; those before it are.
    """
    last = ""
    make_private(root)
    place = write_snapshot(code, root)
    for config, steps in stages:
        run_dir = config.run_dir
        if is_finished(run_dir, steps):
            yield f"{run_dir.name}: finished before"
        else:
            waits, after = (f", after job {last}", f"afterok:{last}") if last else ("", "")
            last = launch_slurm(config, code, folder=root, after=after)
            yield f"{run_dir.name}: job {last}{waits}"
        if probe and config.task == "pretrain" and not is_probed(run_dir):
            job = probe_job(config, place, root, f"afterok:{last}" if last else "")
            number = submit(job)
            note_job(job, run_dir, number)
            yield f"{run_dir.name}: job {number} probes it"
    number = submit(report_job(root, stages[-1][0].cluster, place, f"afterany:{last}" if last else "", REPORT))
    yield f"report: job {number} writes {root / 'report.md'}"


def report_job(root: Path, cluster: ClusterConfig, code: Path, after: str, module: str) -> Job:
    """The job of one core that describes what others have left."""
    small = one_gpu(cluster).model_copy(update={"cpus_per_gpu": 1, "mem": None if cluster.mem is None else "6G", "time": "30"})
    small = small.model_copy(update={"signal_seconds": 60})
    name = f"{root.name}-report"
    return Job(name, small, (root,), root, code, gpus=False, module=(module,), record="report", after=after)


def describe_chain(root: Path, stages: Sequence[Config], code: Snapshot) -> Iterator[str]:
    """The batch scripts of all stages; a job's number is not known before it is submitted."""
    after = ""
    for config in stages:
        script = batch_script(job_of(config, root / CODE / code.digest[:12], root, after))
        yield f"# ---- {config.name}\n{script}\n"
        after = f"afterok:JOB-OF-{config.name}"
