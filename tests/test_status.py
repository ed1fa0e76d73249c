"""``status``, ``logs``, ``cancel``, ``stop`` and ``resume``, with run folders and a queue made by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import cluster, submit
from jobs.runs import is_finished, read_progress, write_outcome
from nepa_dist.config_load import load_config


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; squeue knows jobs 41 (running), 42 (waiting); sacct knows 40."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    programs = {
        "squeue": "echo called >>squeue-calls; printf '41|RUNNING|None|node[1-2]|N/A\\n42|PENDING|Priority||N/A\\n'",
        "sacct": "printf '40|NODE_FAIL\\n'",
        "scancel": 'echo "$@" >>scancel-calls',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def make_run(
    name: str,
    *,
    job: str = "",
    step: int = 0,
    outcome: str = "",
    record: list[dict[str, object]] | None = None,
    total: int = 100,
    task: str = "pretrain",
) -> Path:
    run = Path("runs") / name
    (run / "job").mkdir(parents=True)
    (run / "logs").mkdir()
    (run / "config.yaml").write_text(load_config(overrides=[f"task={task}"]).to_yaml())
    if job:
        (run / "job" / "job.json").write_text(json.dumps({"id": job, "log": f"{run}/logs/job-{job}.txt"}))
    if step:
        values = {"loss": -0.5, "images_per_second": 1234.0, "step_seconds": 2.0, "eta_seconds": 2.0 * (total - step)}
        rows = [
            {"step": 1, **values},
            {"step": step, "time": time.time(), **values, "restarts_total": 1},
            {"step": step, "top1": 1},
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    if record:
        (run / "job" / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in record))
    if outcome:
        write_outcome(run, outcome, "the reason\nand more")
    return run


def status(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    capsys.readouterr()
    assert submit.main(["status", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    import re

    return {line.split()[0]: re.split(r"  +", line)[1:] for line in lines}


START, AGAIN = {"event": "start", "job": "41"}, {"event": "end", "why": "killed by SIGKILL", "again": True}


def test_each_state_is_told(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a-running", job="41", step=40, record=[START, AGAIN, START])
    make_run("b-waiting", job="42")
    make_run("c-back", job="42", step=7, record=[START, AGAIN])
    stopped = {"event": "end", "why": "stopped", "detail": "stopped by SIGUSR2", "again": True}
    make_run("c-limit", job="41", step=7, record=[START, stopped, START])
    make_run("c-lost", job="41", step=7, record=[START, {"event": "lost", "why": "NODE_FAIL"}, START])
    make_run("d-finished", job="39", step=100, outcome="finished", record=[START, {"event": "end", "why": "finished"}])
    make_run("e-mistake", job="39", outcome="mistake", record=[START, {"event": "end", "why": "mistake"}])
    make_run("f-node", job="40", step=3, record=[START])
    make_run("g-local", step=9, outcome="stopped")
    make_run("h-new")
    make_run("i-killed", step=4)
    make_run("p/pretrain", step=100, outcome="finished")
    rows = status(capsys=capsys)
    assert rows["a-running"] == [
        "running on node[1-2] after killed by SIGKILL",
        "40/100",
        "-0.5000",
        "1234",
        "0:02:00",
        "40",
        "2",
        "41",
    ]
    assert rows["b-waiting"][0] == "waiting (Priority)"
    assert rows["c-back"][0] == "comes back after killed by SIGKILL (pending: Priority)"
    assert rows["c-limit"][0] == "running on node[1-2] after stopped by SIGUSR2"
    assert rows["c-lost"][0] == "running on node[1-2] after node fail"
    assert rows["d-finished"][0] == "finished"
    assert rows["e-mistake"][0] == "ended: mistake (the reason)"
    assert rows["f-node"][0] == "ended: node fail"
    assert rows["g-local"][0] == "ended: stopped (the reason)"
    assert rows["h-new"][0] == "not started"
    assert rows["i-killed"][0] == "killed"
    assert rows["p/pretrain"][0] == "finished"
    assert (desk / "squeue-calls").read_text() == "called\n", "one look at the queue for all"
    assert set(status("runs/p", capsys=capsys)) == {"run", "p/pretrain"}


def test_stages_come_in_their_order(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, task in (
        *((f"p/{stage}", stage) for stage in ("segment", "finetune", "pretrain")),
        *(("p/finetune-scratch", "finetune"), ("p/base", "segment"), ("s/mask/pretrain", "pretrain"), ("s/mask/a", "finetune")),
        ("z", "pretrain"),
    ):
        make_run(name, task=task)
    make_run("p/broken")
    (desk / "runs" / "p" / "broken" / "config.yaml").write_text("")
    stages = ["p/pretrain", "p/finetune", "p/finetune-scratch", "p/base", "p/segment", "p/broken"]
    assert list(status(capsys=capsys)) == ["run", "z", *stages, "s/mask/pretrain", "s/mask/a"]
    assert list(status("runs/p", capsys=capsys)) == ["run", *stages]


def test_fifty_runs_need_one_look_at_the_queue(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(50):
        make_run(f"run{number}", job=str(number), step=number + 1)
    assert len(status(capsys=capsys)) == 51
    assert (desk / "squeue-calls").read_text() == "called\n"


def test_without_slurm_the_folders_speak(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a", job="41", step=5)
    monkeypatch.setenv("PATH", "/usr/local/nowhere")
    assert submit.main(["status"]) == 0
    captured = capsys.readouterr()
    assert "killed" in captured.out
    assert "SLURM cannot be asked" in captured.err


def test_a_silent_run_is_shown_as_such(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a", job="41", step=5)
    text = (run / "metrics.jsonl").read_text().splitlines()
    row = json.loads(text[1]) | {"time": time.time() - 3600}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "silent for 60 min" in status(capsys=capsys)["a"][0]


def test_damaged_files_do_not_hide_a_run(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a", job="41", step=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (run / "job" / "attempts.jsonl").write_text('nonsense\n[1]\n{"event": "start", "job": "41"}\n{"ev')
    assert status(capsys=capsys)["a"][1] == "5/100"
    (run / "job" / "job.json").write_text("{")
    (run / "job" / "outcome.json").write_text("[]")
    assert status(capsys=capsys)["a"][0] == "killed"


def test_no_runs_is_a_mistake(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["status"]) == 2
    assert "no runs in runs" in capsys.readouterr().err


def test_logs_show_the_job_and_a_rank(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a", job="41")
    (run / "logs" / "job-40.txt").write_text("older\n")
    os.utime(run / "logs" / "job-40.txt", (1, 1))
    (run / "logs" / "job-41.txt").write_text("--- start\n")
    (run / "logs" / "rank-0.txt").write_text("".join(f"line {number}\n" for number in range(100)))
    (run / "logs" / "rank-3.txt").write_text("of three\n")
    assert submit.main(["logs", "runs/a", "-n", "5"]) == 0
    out = capsys.readouterr().out
    assert "--- start" in out
    assert "older" not in out
    assert out.splitlines()[-5:] == [f"line {number}" for number in range(95, 100)]
    assert submit.main(["logs", "runs/a", "--rank", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["of three"]
    assert submit.main(["logs", "runs/a", "--rank", "4"]) == 2
    assert submit.main(["logs", "runs/nothing"]) == 2


def test_a_run_may_be_called_as_status_shows_it(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("p/pretrain", job="41", step=5)
    (run / "logs" / "rank-0.txt").write_text("hello\n")
    for name in ("p/pretrain", "runs/p/pretrain"):
        assert submit.main(["logs", name]) == 0
        assert "hello" in capsys.readouterr().out
        assert submit.main(["status", name]) == 0
        assert "p/pretrain" in capsys.readouterr().out
    assert submit.main(["cancel", "p"]) == 0
    assert (desk / "scancel-calls").read_text() == "41\n"


def test_logs_can_be_followed(desk: Path) -> None:
    run = make_run("a", job="41")
    log = run / "logs" / "rank-0.txt"
    script = str(cluster.REPO_ROOT / "jobs" / "submit.py")
    process = subprocess.Popen([sys.executable, script, "logs", "-f", "runs/a"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        log.write_text("first\n")
        assert "first\n" in (process.stdout.readline(), process.stdout.readline())  # maybe under a head line
        with log.open("a") as file:
            file.write("second\n")
        assert process.stdout.readline() == "second\n"
    finally:
        process.kill()
        process.wait()


def test_a_running_job_is_stopped_by_a_signal_and_does_not_come_back(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a", job="41", step=5)
    waiting = make_run("b", job="42")
    assert submit.main(["stop", "--save", "runs/a", "runs/b"]) == 0
    assert (desk / "scancel-calls").read_text() == "--signal=USR2 41\n42\n"
    assert (run / "job" / "hold").exists()
    assert (waiting / "job" / "hold").exists()
    assert submit.main(["cancel", "runs/a"]) == 0
    assert (desk / "scancel-calls").read_text().endswith("\n41\n")
    capsys.readouterr()
    assert submit.main(["cancel", "runs/nothing"]) == 2
    assert "no runs in runs/nothing" in capsys.readouterr().err
    make_run("p/pretrain", outcome="finished")
    make_run("p/finetune", job="42")
    assert submit.main(["cancel", "runs/p"]) == 0
    assert (desk / "scancel-calls").read_text().endswith("41\n42\n"), "of several, those that go on"


def test_a_run_of_this_machine_is_stopped_after_it_has_saved(tmp_path: Path) -> None:
    script = str(cluster.REPO_ROOT / "jobs" / "submit.py")
    words = ["pretrain", "vit_tiny", "--cluster", "local", "--data", "digits", "--name", "a", "--gpus-per-node", "2"]
    settings = ["--set", "steps=100000", "--set", "model.depth=1", "--set", "metrics.every=1", "--set", "optim.warmup_steps=1"]
    run = subprocess.Popen([sys.executable, script, *words, *settings], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while read_progress(tmp_path / "runs" / "a").step is None:
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.1)

        def call(*what: str) -> str:
            done = subprocess.run([sys.executable, script, *what], cwd=tmp_path, capture_output=True, text=True, check=True)
            return done.stdout

        assert "running (pid" in call("status")
        assert "told to save and end" in call("stop", "runs/a")
        assert run.wait(120) == 75
        assert "ended: stopped" in call("status")
        assert list((tmp_path / "runs" / "a" / "checkpoints").glob("step-*"))
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)
            run.wait()


def test_resume_starts_a_local_run_again_with_its_settings(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(cluster, "run_local", lambda run_dir, world_size: calls.append(run_dir) or 0)
    run = make_run("a", step=5, outcome="stopped")
    assert submit.main(["resume", "runs/a"]) == 0
    assert calls == [run.absolute()]
    write_outcome(run, "finished")
    assert submit.main(["resume", "runs/a"]) == 0
    assert len(calls) == 1, "it is finished"
    make_run("p/pretrain", step=5)
    assert submit.main(["resume", "runs/p"]) == 2
    assert "give the command of the pipeline or sweep again" in capsys.readouterr().err


def test_of_several_that_are_resumed_none_starts_beside_a_wrong_name_or_after_a_stop(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cluster, "run_local", lambda run_dir, world_size: calls.append(run_dir.name) or 75)
    for name in ("first", "second"):
        make_run(name, step=5, outcome="stopped")
    assert submit.main(["resume", "runs/first", "runs/secand"]) == 2
    assert "nothing was done:\n  - no runs in runs/secand; did you mean 'second'?" in capsys.readouterr().err
    assert calls == []
    assert submit.main(["resume", "runs/first", "runs/second"]) == 75
    assert calls == ["first"], "who stops it means all of them"


def test_status_names_what_it_does_not_find(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("mine", step=5)
    assert submit.main(["status", "mine", "mina", "nothing-like-it"]) == 2
    captured = capsys.readouterr()
    assert "mine" in captured.out
    assert captured.err == "no runs in mina; did you mean 'mine'?\nno runs in nothing-like-it\n"
    assert submit.main(["logs", "mina"]) == 2
    assert "did you mean 'mine'?" in capsys.readouterr().err


def test_finished_is_what_the_outcome_and_the_checkpoint_say(desk: Path) -> None:
    run = make_run("a", step=5, outcome="finished")
    assert is_finished(run)
    assert is_finished(run, 5)
    assert not is_finished(run, 6), "it is to be longer now"
    assert not is_finished(make_run("b", outcome="finished")), "its checkpoint is gone"
    assert not is_finished(make_run("c", step=5, outcome="stopped"))
