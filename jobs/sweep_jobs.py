"""A sweep on SLURM: the runs of a stage are one array, which follows the array of the stage before it, run by run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.chain import report_job
from jobs.launch import make_private, note_job, prepare_run
from jobs.pipeline import Stage
from jobs.slurm import Job, batch_script, job_of, submit
from jobs.snapshot import CODE, Snapshot, write_snapshot

REPORT = "jobs.sweep_report"


class Array(NamedTuple):
    """The runs of one stage, which need not wait for each other."""

    stage: str
    runs: list[Stage]
    """One for each variant, in the same order in all arrays; a single one where the stage is shared."""
    after: str | None
    """Stage of the array whose weights they start with."""
    one_to_one: bool
    """Run i waits for run i of ``after`` (SLURM's aftercorr). Off: all wait for its only run (afterok)."""


def array_problems(arrays: Sequence[Array]) -> Iterator[str]:
    """Sentences about runs that cannot be one array."""
    for array in arrays:
        if len({repr(stage.config.cluster) for stage in array.runs}) > 1:
            yield f"{array.stage}: the variants have different clusters or resources, but an array has one for all"


def describe_arrays(root: Path, arrays: Sequence[Array], code: Snapshot) -> Iterator[str]:
    """The batch scripts; a job's number is not known before it is submitted."""
    for array in arrays:
        after = "" if array.after is None else _dependency(array, f"JOB-OF-{array.after}")
        yield f"# ---- {array.stage}\n{batch_script(_job(root, array, root / CODE / code.digest[:12], after))}\n"


def submit_arrays(root: Path, arrays: Sequence[Array], code: Snapshot) -> Iterator[str]:
    """Submit each stage that has something left to do, and a job that writes the table when the last one has ended.

    A stage is submitted with all its runs, so that their places in the arrays agree: one that is finished says so and ends.

    Yields:
        What was submitted, a line for each job.

    Raises:
        LaunchError, SubmitError, OSError: a job could not be submitted; those before it are.
    """
    make_private(root)
    place = write_snapshot(code, root)
    numbers: dict[str, str] = {}
    for array in arrays:
        if all(stage.is_finished for stage in array.runs):
            yield f"{array.stage}: finished before"
            continue
        for stage in array.runs:
            prepare_run(stage.config, code)
        before = numbers.get(array.after or "")
        job = _job(root, array, place, _dependency(array, before) if before else "")
        number = submit(job)
        for index, stage in enumerate(array.runs):
            note_job(job, stage.config.run_dir, f"{number}_{index}")
        waits = f", after job {before}" + (" run by run" if array.one_to_one else "") if before else ""
        yield f"{array.stage}: job {number}, {len(array.runs)} runs{waits}"
        numbers[array.stage] = number
    after = "afterany:" + ":".join(numbers.values()) if numbers else ""
    last = submit(report_job(root, arrays[-1].runs[0].config.cluster, place, after, REPORT))
    yield f"table: job {last} writes {root}/table.md; python jobs/submit.py status {root}"


def _job(root: Path, array: Array, place: Path, after: str) -> Job:
    job = job_of(array.runs[0].config, place, root, after)
    return job._replace(
        name=f"{root.name}-{array.stage}", runs=tuple(stage.config.run_dir for stage in array.runs), is_array=True
    )


def _dependency(array: Array, number: str) -> str:
    return f"{'aftercorr' if array.one_to_one else 'afterok'}:{number}"
