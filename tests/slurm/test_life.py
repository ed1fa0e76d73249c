"""The life of a job on a real SLURM: whatever ends it, it comes back and continues to the bit, and the record says why."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Desk

from cluster import Cluster, job_processes

STEPS = 40


def slow(steps: int = STEPS) -> tuple[str, ...]:
    """Settings of a run that lasts some seconds even on a fast machine."""
    return ("--set", f"steps={steps}", "--set", "metrics.every=1", "--set", "model.depth=4", "--set", "checkpoint.every=1000")


Quiet = tuple[dict[str, str], list[tuple[int, float, float]]]
"""Files of the last checkpoint, and what each step logged, of the run that nothing happens to."""


def tensors(run: Path, step: int = STEPS) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08}" / "manifest.json").read_text())
    return {file["name"]: file["sha256"] for file in manifest["files"]}


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["data_digest"]) for row in rows]


def run_here(desk: Desk, steps: int = STEPS) -> Quiet:
    """The run that nothing happens to, as two processes of this machine."""
    options = ("--data", "digits", "--set", "optim.warmup_steps=1", "--gpus-per-node", "2", "--name", f"quiet-{steps}")
    desk.submit("pretrain", "vit_tiny", "--cluster", "local", *options, *slow(steps))
    return tensors(desk.run(f"quiet-{steps}"), steps), losses(desk.rows(f"quiet-{steps}"))


@pytest.fixture(scope="module")
def quiet_desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(cluster, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def undisturbed(quiet_desk: Desk) -> Quiet:
    return run_here(quiet_desk)


def ended_well(desk: Desk, name: str, undisturbed: Quiet) -> None:
    """The run is finished, with the weights and losses of the undisturbed one."""
    assert desk.record(name)[-1]["why"] == "finished", desk.picture()
    assert tensors(desk.run(name)) == undisturbed[0]
    assert losses(desk.rows(name)) == undisturbed[1]


def ends(desk: Desk, name: str) -> list[str]:
    return [row["why"] for row in desk.record(name) if row["event"] in ("end", "lost")]


def test_two_nodes_train_and_a_finished_run_says_so(desk: Desk, undisturbed: Quiet) -> None:
    job = desk.train("two", *slow())
    desk.wait_for_end(job)
    ended_well(desk, "two", undisturbed)
    facts = json.loads((desk.run("two") / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in facts] == [2]
    assert facts[0]["git"]["snapshot"].startswith(next((desk.run("two") / "code").iterdir()).name)
    assert "finished" in desk.submit("status")
    manifest = json.loads((desk.run("two") / "checkpoints" / "step-00000040" / "manifest.json").read_text())
    assert manifest["meta"]["config"]["cluster"]["snapshot"] == facts[0]["git"]["snapshot"], (
        "the code's hash is in the checkpoint"
    )
    options = ("--name", "two", "--config", str(desk.site), "--nodes", "2", "--data", "digits", "--gpus-per-node", "1")
    text = desk.submit("pretrain", "vit_tiny", *options, "--set", "optim.warmup_steps=1", *slow())
    assert "this run is finished" in text
    assert "nothing was submitted" in text


def test_the_time_limit_saves_requeues_and_continues_to_the_bit(desk: Desk, quiet_desk: Desk, undisturbed: Quiet) -> None:
    """The limit is moved so near that its warning is due. SLURM looks at limits every 30 s, so the run must last longer."""
    pace = quiet_desk.rows(f"quiet-{STEPS}")[-1]["step_seconds"]
    steps = max(STEPS, round(60 / pace))
    expected = undisturbed if steps == STEPS else run_here(quiet_desk, steps)
    job = desk.train("limit", *slow(steps), "--set", "cluster.signal_seconds=600")
    desk.wait_for_step("limit", 3)
    desk.ask("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    desk.wait_for_start("limit", 2)
    desk.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    desk.wait_for_end(job)
    assert ends(desk, "limit") == ["stopped", "finished"]
    assert 3 <= int(desk.record("limit")[1]["checkpoint"]) < steps
    assert tensors(desk.run("limit"), steps) == expected[0]
    assert losses(desk.rows("limit")) == expected[1]


def test_sigterm_as_in_a_preemption_saves_requeues_and_continues_to_the_bit(desk: Desk, undisturbed: Quiet) -> None:
    job = desk.train("term", *slow())
    desk.wait_for_step("term", 3)
    desk.ask("scancel", "--signal=TERM", job)
    desk.wait_for_end(job)
    assert ends(desk, "term") == ["stopped", "finished"]
    ended_well(desk, "term", undisturbed)


def test_a_preemption_by_another_partition(desk: Desk, undisturbed: Quiet) -> None:
    job = desk.train("preempted", *slow())
    desk.wait_for_step("preempted", 3)
    other = desk.ask(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"
    )
    desk.wait_for_end(other.strip(), job)
    assert ends(desk, "preempted") == ["stopped", "finished"]
    ended_well(desk, "preempted", undisturbed)


def test_scontrol_requeue_continues_from_the_newest_checkpoint(desk: Desk, undisturbed: Quiet) -> None:
    job = desk.train("again", *slow(), "--set", "checkpoint.every=5")
    desk.wait(lambda: (desk.run("again") / "checkpoints" / "step-00000005").exists(), "a checkpoint")
    desk.ask("scontrol", "requeue", job)
    desk.wait_for_start("again", 2)
    desk.wait_for_end(job)
    ended_well(desk, "again", undisturbed)


def test_a_dead_node_is_replaced_and_the_record_says_so(desk: Desk, undisturbed: Quiet) -> None:
    job = desk.train("node", *slow(), "--set", "checkpoint.every=5")
    desk.wait(lambda: (desk.run("node") / "checkpoints" / "step-00000005").exists(), "a checkpoint")
    desk.cluster.kill_node("node1")
    try:
        desk.wait_for_start("node", 2)
        second = [row for row in desk.record("node") if row["event"] == "start"][1]
        assert not {"node1", "node[1"} & {second["nodes"][:5], second["nodes"][:6]}
        desk.wait_for_end(job)
    finally:
        desk.cluster.start_node("node1")
        desk.wait(lambda: desk.ask("sinfo", "-h", "-N", "-n", "node1", "-p", "batch", "-o", "%t").strip() == "idle", "node1")
    assert ends(desk, "node") in (["NODE_FAIL", "finished"], ["node failure", "finished"])
    ended_well(desk, "node", undisturbed)


def test_kill_9_of_a_rank_ends_the_job_at_once_and_it_comes_back(desk: Desk, undisturbed: Quiet) -> None:
    job = desk.train("kill", *slow(), "--set", "checkpoint.every=5")
    desk.wait(lambda: (desk.run("kill") / "checkpoints" / "step-00000005").exists(), "a checkpoint")
    os.kill(rank_process(desk, job, "1"), signal.SIGKILL)
    desk.wait(lambda: ends(desk, "kill"), "the end of the first start", 60)
    first = desk.record("kill")[1]
    assert (first["why"], first["again"]) == ("killed by SIGKILL", True)
    assert "task 1: Killed" in first["detail"]
    desk.wait_for_end(job)
    ended_well(desk, "kill", undisturbed)


def rank_process(desk: Desk, job: str, rank: str) -> int:
    """Process id of the trainer of one rank."""
    for node in ("node1", "node2", "node3", "node4"):
        for pid in job_processes(node, desk.cluster.conf):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if f"SLURM_PROCID={rank}".encode() in variables and b"jobs.runner" in words and b"-m" in words:
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if b"jobs.runner" not in Path(f"/proc/{parent}/cmdline").read_bytes():  # a loader worker's parent is one
                    return pid
    pytest.fail(f"no process of rank {rank}\n{desk.picture()}")


def test_a_job_that_needs_more_memory_than_it_has_says_so(desk: Desk) -> None:
    job = desk.train("memory", *slow(), "--mem", "100M", "--set", "cluster.max_stalled_starts=1", nodes=1)
    desk.wait_for_end(job)
    assert ends(desk, "memory") == ["out of memory", "out of memory"], desk.picture()
    assert not desk.record("memory")[-1]["again"]
    assert "ended: out of memory (" in desk.submit("status")


def test_a_job_without_progress_does_not_come_back_for_ever(desk: Desk) -> None:
    job = desk.train("stalled", *slow(), "--set", "cluster.max_stalled_starts=1", nodes=1)
    for number in (1, 2):
        desk.wait_for_start("stalled", number)
        desk.wait(lambda: (desk.run("stalled") / "logs" / "rank-0.txt").exists(), "rank 0")
        pid = desk.wait(lambda: _or_none(desk, job), "the process of rank 0")
        os.kill(pid, signal.SIGKILL)
        desk.wait(lambda n=number: len(ends(desk, "stalled")) == n, "the end")
    desk.wait_for_end(job, seconds=60)
    last = desk.record("stalled")[-1]
    assert (last["why"], last["again"], last["stalled"]) == ("killed by SIGKILL", False, 2)
    assert "does not come back" in desk.submit("logs", "runs/stalled")
    assert "killed by SIGKILL" in desk.submit("status")


def _or_none(desk: Desk, job: str) -> int | None:
    try:
        return rank_process(desk, job, "0")
    except BaseException:
        return None
