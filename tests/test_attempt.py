"""What a batch script notes and decides, with stand-ins for SLURM's commands; the real ones are in tests/slurm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import REPO_ROOT
from jobs.runs import write_outcome

SCRIPT = """\
run=$RUN job=$RUN/job log=$RUN/logs/job-$SLURM_JOB_ID.txt max_stalled=2 silence=stopped
. {attempt}
exec >>"$log" 2>&1
begin
{between}
end {code}
"""
SCONTROL = '#!/bin/sh\necho "$@" >>"$RUN/requeued"\nkill -9 $PPID\n'


class Job:
    """A batch script that is run here, as often as it comes back."""

    def __init__(self, folder: Path) -> None:
        self.run, self.bin = folder / "it's a run", folder / "bin"
        (self.run / "logs").mkdir(parents=True)
        self.bin.mkdir()
        self.program("scontrol", SCONTROL)
        self.program("sacct", "#!/bin/sh\nexit 1\n")
        self.restarts = 0

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def attempt(self, code: int, between: str = "", outcome: str = "", job: str = "7") -> int:
        """One start of the job; ``between`` is what happens in place of srun."""
        if outcome:
            write_outcome(self.run, "x")  # of the start before: it must not count
            between += f'\nprintf \'{{"kind": "{outcome}", "detail": "x"}}\' >"$job/outcome.json"'
        text = SCRIPT.format(attempt=REPO_ROOT / "jobs" / "attempt.sh", between=between, code=code)
        variables = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": str(self.restarts)}
        environment = {**variables, "RUN": str(self.run), "PATH": f"{self.bin}:{os.defpath}"}
        done = subprocess.run(["bash"], input=text, env=environment, text=True, capture_output=True, timeout=60)
        self.restarts += 1
        return done.returncode

    @property
    def record(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "job" / "attempts.jsonl").read_text().splitlines()]

    @property
    def came_back(self) -> bool:
        return (self.run / "requeued").exists()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


JOB = "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-01-02T03:04:05"
SAVE = 'mkdir -p "$run/checkpoints/step-00000020"'


@pytest.mark.parametrize(
    ("code", "outcome", "message", "why", "again"),
    [
        (0, "finished", "", "finished", False),
        (0, "stopped", "", "stopped", True),
        (0, "", "", "stopped", True),
        (2, "mistake", "", "mistake", False),
        (137, "mistake", "srun: error: node2: task 1: Killed", "mistake", False),
        (1, "gave up", "", "gave up", False),
        (1, "crashed", "", "crashed", True),
        (1, "", "", "crashed", True),
        (75, "", "", "stopped before training", True),
        (137, "", "srun: error: node2: task 1: Killed", "killed by SIGKILL", True),
        (137, "crashed", "srun: error: node2: task 1: Killed", "killed by SIGKILL", True),
        (137, "", "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0", "out of memory", True),
        (137, "", "slurmstepd-node1: error: StepId=7.0 exceeded memory limit (9 > 5), being killed", "out of memory", True),
        (137, "", "srun: error: Node failure on node2", "node failure", True),
        (
            143,
            "",
            f"{JOB} DUE TO TIME LIMIT ***",
            "time limit",
            True,
        ),
        (75, "", f"{JOB} ***", "cancelled", False),
        (0, "stopped", f"{JOB} ***", "cancelled", False),
        (0, "stopped", "slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-01-02T03:04:05 ***", "stopped", True),
    ],
)
def test_each_end_has_its_reason_and_some_come_back(
    job: Job, code: int, outcome: str, message: str, why: str, again: bool
) -> None:
    status = job.attempt(code, f"echo '{message}'; {SAVE}", outcome)
    start, end = job.record
    assert (start["event"], start["nodes"], start["checkpoint"]) == ("start", "node[1-2]", "")
    assert (end["why"], end["again"], end["code"], end["checkpoint"]) == (why, again, code, "00000020")
    assert job.came_back == again
    if not again:
        assert (status == 0) == (why == "finished")


def test_a_hang_is_told_apart(job: Job) -> None:
    job.attempt(75, 'sleep 1.1; echo stacks >"$run/logs/hang-rank-3.txt"')
    assert job.record[-1]["why"] == "hung"
    job.attempt(75)
    assert job.record[-1]["why"] == "stopped before training", "the file is of the start before"


def test_the_job_ends_when_it_makes_no_progress(job: Job) -> None:
    for number in range(1, 4):
        job.attempt(137)
        assert (job.record[-1]["stalled"], job.record[-1]["again"]) == (number, number <= 2)
    assert "does not come back" in (job.run / "logs" / "job-7.txt").read_text()


def test_progress_starts_the_count_anew(job: Job) -> None:
    for number in range(1, 7):
        job.attempt(137, f'mkdir -p "$run/checkpoints/step-0000000{number // 2}"')
    assert [row["stalled"] for row in job.record if row["event"] == "end"] == [0, 0, 1, 0, 1, 0]
    assert job.record[-1]["again"]


def test_a_start_that_ended_without_a_word_gets_the_reason_from_the_accounting(job: Job) -> None:
    job.attempt(0, "kill -9 $$")
    job.program("sacct", "#!/bin/sh\nprintf 'NODE_FAIL\\nRUNNING\\n'\n")
    job.attempt(0, "kill -9 $$")
    job.program("sacct", "#!/bin/sh\nprintf 'CANCELLED by 0\\n'\n")
    job.attempt(0, outcome="finished", job="8")
    assert [(row["event"], row.get("why")) for row in job.record] == [
        ("start", None),
        ("lost", "NODE_FAIL"),
        ("start", None),
        ("lost", "CANCELLED by 0"),
        ("start", None),
        ("end", "finished"),
    ]


def test_what_slurm_says_between_the_lines_of_a_rank_counts(job: Job) -> None:
    """The daemon of a node writes to the output of the step, which goes to the logs of the ranks."""
    said = "slurmstepd-node1: error: StepId=7.0 exceeded memory limit (9 > 5), being killed"
    for rank in (0, 13):
        job.attempt(137, f"echo 'srun: error: node1: task 0: Killed'; echo '{said}' >>\"$run/logs/rank-{rank}.txt\"; {SAVE}")
        assert (job.record[-1]["why"], job.record[-1]["detail"]) == ("out of memory", said)
    job.attempt(137, "echo 'srun: error: node1: task 0: Killed'")
    assert job.record[-1]["why"] == "killed by SIGKILL", "what the ranks' logs hold is of the starts before"
    job.attempt(1, "echo 'RuntimeError: out of memory, says a rank' >>\"$run/logs/rank-0.txt\"", outcome="crashed")
    assert job.record[-1]["why"] == "crashed", "a GPU that is full is an error of the program"


def test_what_stopped_a_run_is_noted(job: Job) -> None:
    """A preemption, and the warning before a time limit, are told apart by their signals."""
    for name in ("SIGTERM", "SIGUSR2"):
        job.attempt(0, f"echo 'stopped by {name}; step 7 is saved, ...' >>\"$run/logs/rank-0.txt\"", "stopped")
        assert (job.record[-1]["why"], job.record[-1]["detail"]) == ("stopped", f"stopped by {name}")
        assert f"stopped by {name} (exit code 0)" in (job.run / "logs" / "job-7.txt").read_text()
    job.attempt(0, outcome="stopped")
    assert job.record[-1]["detail"] == "", "what it says is of the start before"


def test_a_run_that_is_held_does_not_come_back(job: Job) -> None:
    assert job.attempt(0, 'touch "$job/hold"', "stopped") == 75
    assert not job.came_back
    assert job.record[-1]["why"] == "stopped"


def test_a_requeue_that_slurm_refuses_is_an_end(job: Job) -> None:
    job.program("scontrol", "#!/bin/sh\nexit 1\n")
    assert job.attempt(137) == 137
    assert job.record[-1]["detail"] == "scontrol requeue failed"
    assert not job.record[-1]["again"]


def test_a_job_that_slurm_has_queued_by_itself_is_no_end(job: Job) -> None:
    job.program("scontrol", "#!/bin/sh\nexit 1\n")
    job.program("squeue", "#!/bin/sh\necho PENDING\nkill -9 $PPID\n")
    job.attempt(137)
    assert [row["event"] for row in job.record] == ["start", "end"]
    assert job.record[-1]["again"]


def test_a_signal_while_it_notes_the_end_changes_nothing(job: Job) -> None:
    job.program("grep", f'#!/bin/sh\nkill -TERM $PPID\nexec {shutil.which("grep")} "$@"\n')
    job.attempt(137, "echo 'srun: error: Node failure on node2'")
    assert job.record[-1]["why"] == "node failure"


def test_signals_to_the_batch_script_wait_for_the_ranks(job: Job) -> None:
    """SLURM tells the script as well; it must live to see what the ranks make of it."""
    job.attempt(0, "kill -TERM $$; kill -USR2 $$; echo still here", "stopped")
    assert job.record[-1]["why"] == "stopped"
    assert "still here" in (job.run / "logs" / "job-7.txt").read_text()


def test_messages_cannot_break_the_record(job: Job) -> None:
    job.attempt(1, r"""printf 'srun: error: "quoted" \\ back\tslash\001 $(id) %%s\n'""")
    assert job.record[-1]["detail"].startswith("srun: error: quoted")


def test_what_it_makes_is_private(job: Job) -> None:
    job.attempt(0, outcome="finished")
    for path in (job.run / "job", job.run / "job" / "attempts.jsonl"):
        assert path.stat().st_mode & 0o077 == 0
