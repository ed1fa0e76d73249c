"""A rank that hangs says where and ends with 75; one that is slow, paused, compiling or was stopped is left alone."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import REPO_ROOT, run_local
from nepa_dist.guard import EXIT_AGAIN
from nepa_dist.watchdog import ALARM_SECONDS, Watchdog

PRELUDE = """
import ctypes, os, pathlib, signal, sys, threading, time
from nepa_dist.watchdog import Watchdog
folder = pathlib.Path(sys.argv[1])
def step_of(seconds):
    time.sleep(seconds)
def warm_up(watchdog, steps=3):
    for number in range(1, steps + 1):
        step_of(0.02)
        watchdog.beat(number)
"""
HANG = """
def stuck_in_the_decoder():
    time.sleep(600)
def prefetch():
    time.sleep(600)
threading.Thread(target=prefetch, daemon=True).start()
watchdog = Watchdog(folder / "logs" / "hang.txt", min_seconds=1.0)
warm_up(watchdog)
stuck_in_the_decoder()
"""


def start(code: str, folder: Path, preexec_fn: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(folder)],
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "RANK": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


def assert_no_alarm(code: str, folder: Path) -> None:
    returncode, out, err = finish(start(code + "\nwatchdog.close()\nprint('through')", folder))
    assert (returncode, out, err) == (0, "through\n", "")
    assert not (folder / "hang.txt").exists()


def test_a_hang_is_written_down_and_ends_with_75(tmp_path: Path) -> None:
    returncode, _, err = finish(start(HANG, tmp_path))
    assert returncode == EXIT_AGAIN
    text = (tmp_path / "logs" / "hang.txt").read_text()
    for place in (text, err):
        assert "rank 3, pid " in place
        assert f" on {os.uname().nodename}: no step for " in place
        assert "after step 3. The limit is " in place
        for function in ("stuck_in_the_decoder", "prefetch"):
            assert f"in {function}\n" in place


def test_an_earlier_hang_stays_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "hang.txt"
    path.parent.mkdir()
    path.write_text("earlier\n")
    assert finish(start(HANG, tmp_path))[0] == EXIT_AGAIN
    text = path.read_text()
    assert text.startswith("earlier\n=== ")
    assert "in stuck_in_the_decoder\n" in text


def test_steps_that_are_slow_by_habit_are_no_hang(tmp_path: Path) -> None:
    code = """
watchdog = Watchdog(folder / "hang.txt", min_seconds=0.1, factor=20)
watchdog.beat(1)
for number in (2, 3, 4):
    step_of(0.3)
    watchdog.beat(number)
step_of(2.0)
watchdog.beat(5)
"""
    assert_no_alarm(code, tmp_path)


def test_batches_of_an_evaluation_are_signs_of_life_but_no_steps(tmp_path: Path) -> None:
    code = """
watchdog = Watchdog(folder / "hang.txt", min_seconds=0.1, factor=20)
watchdog.beat(1)
step_of(0.5)
watchdog.beat(2)
for batch in range(200):
    step_of(0.005)
    watchdog.beat()
step_of(2.0)  # longer than 20 batches, shorter than 20 steps
watchdog.beat(3)
"""
    assert_no_alarm(code, tmp_path)


@pytest.mark.parametrize("beats", [0, 1])
def test_the_first_step_may_take_its_time(tmp_path: Path, beats: int) -> None:
    code = f"""
watchdog = Watchdog(folder / "hang.txt", min_seconds=0.2, factor=1)
warm_up(watchdog, {beats})
step_of(1.5)
"""
    assert_no_alarm(code, tmp_path)


def test_a_pause_may_be_long(tmp_path: Path) -> None:
    code = """
watchdog = Watchdog(folder / "hang.txt", min_seconds=0.5, factor=1)
warm_up(watchdog)
with watchdog.pause():
    with watchdog.pause():
        step_of(0.5)
    step_of(1.5)
"""
    assert_no_alarm(code, tmp_path)


def test_a_hang_after_a_pause_is_found(tmp_path: Path) -> None:
    code = """
def stuck_after_the_pause():
    time.sleep(600)
watchdog = Watchdog(folder / "hang.txt", min_seconds=0.5, factor=1)
warm_up(watchdog)
with watchdog.pause():
    step_of(0.5)
stuck_after_the_pause()
"""
    assert finish(start(code, tmp_path))[0] == EXIT_AGAIN
    assert "in stuck_after_the_pause\n" in (tmp_path / "hang.txt").read_text()


def test_a_native_call_that_keeps_the_interpreter_is_ended_by_the_system(tmp_path: Path) -> None:
    code = """
def deadlock_in_native_code():
    mutex = ctypes.create_string_buffer(256)  # zeros are an unlocked mutex
    native = ctypes.PyDLL(None)  # its calls keep the lock of the interpreter
    native.pthread_mutex_lock(mutex)
    native.pthread_mutex_lock(mutex)
watchdog = Watchdog(folder / "hang.txt", min_seconds=1.0)
warm_up(watchdog)
time.sleep(0.5)  # let it look at least once
deadlock_in_native_code()
"""
    returncode, _, _ = finish(start(code, tmp_path))
    assert returncode == -signal.SIGALRM
    assert "in deadlock_in_native_code\n" in (tmp_path / "hang.txt").read_text()


def test_a_process_that_was_stopped_and_goes_on_is_left_alone(tmp_path: Path) -> None:
    code = """
watchdog = Watchdog(folder / "hang.txt", min_seconds=2.0, factor=1)
warm_up(watchdog)
step_of(0.5)
print("stop me", flush=True)
for part in range(12):  # it is in this step when it is stopped, and must have time to finish it
    step_of(0.1)
watchdog.beat(4)
step_of(0.5)
watchdog.beat(5)
print(signal.getitimer(signal.ITIMER_REAL)[0], flush=True)
watchdog.close()
print(signal.getitimer(signal.ITIMER_REAL)[0], flush=True)
"""
    process = start(code, tmp_path)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stop me\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)  # both timers run out meanwhile
        process.send_signal(signal.SIGCONT)
    finally:
        returncode, out, err = finish(process)
    assert returncode == 0, err
    open_timer, closed_timer = map(float, out.split())
    assert 0 < open_timer <= 2.0 < ALARM_SECONDS, "the alarm clock was set and not set back"
    assert closed_timer == 0
    assert "goes on; stacks just above are of no hang" in (tmp_path / "hang.txt").read_text()


def test_all_ranks_say_where_they_are_when_one_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import torch, torch.distributed as dist
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
def average_over_ranks():
    dist.all_reduce(torch.ones(4))
def stuck_on_one_rank():
    time.sleep(600)
watchdog = Watchdog(folder / "logs" / f"hang-rank-{rank}.txt", min_seconds=2.0)
for step in range(1, 6):
    average_over_ranks()
    watchdog.beat(step)
if rank == 1:
    stuck_on_one_rank()
average_over_ranks()
"""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_local(tmp_path, 2, command=[sys.executable, "-c", PRELUDE + code, str(tmp_path)]) == EXIT_AGAIN
    texts = [(tmp_path / "logs" / f"hang-rank-{rank}.txt").read_text() for rank in (0, 1)]
    for rank, (text, function) in enumerate(zip(texts, ("average_over_ranks", "stuck_on_one_rank"), strict=True)):
        assert f"rank {rank}, pid " in text
        assert f"in {function}\n" in text
    assert "in stuck_on_one_rank\n" in (tmp_path / "logs" / "rank-1.txt").read_text()


def allow_ten_bytes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_does_not_keep_a_hanging_process_alive(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "hang.txt").write_text("0123456789")
    returncode, _, err = finish(start(HANG, tmp_path, preexec_fn=allow_ten_bytes))
    assert returncode == EXIT_AGAIN
    assert "in stuck_in_the_decoder\n" in err
    assert "hang.txt cannot be written" in err


def test_the_caller_decides_how_to_end(tmp_path: Path) -> None:
    code = """
watchdog = Watchdog(folder / "hang.txt", min_seconds=0.5, on_hang=lambda: os._exit(9))
warm_up(watchdog)
time.sleep(600)
"""
    assert finish(start(code, tmp_path))[0] == 9


@pytest.mark.parametrize("limits", [{"min_seconds": 0.0}, {"min_seconds": float("nan")}, {"factor": 0.5}])
def test_limits_that_make_no_sense_are_refused(tmp_path: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive and factor"):
        Watchdog(tmp_path / "hang.txt", **limits)
