"""When a run must stop: bounds on skipped steps, failed saves and bad images, and the lock of a run folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nepa_dist.guard import RunAborted, RunLock, StopFlag, count_bad_samples, count_saves, count_skip
from nepa_dist.state import TrainState

ROOT = Path(__file__).parents[1]


def test_skips_are_counted_and_a_row_of_them_ends_the_run():
    state = TrainState()
    for applied in (False, False, True, False, False):
        count_skip(state, applied, limit=2)
    assert (state.skipped_steps, state.consecutive_skips) == (4, 2)
    with pytest.raises(RunAborted, match="3 steps in a row"):
        count_skip(state, False, limit=2)


def test_failed_saves_are_counted_and_a_row_of_them_ends_the_run():
    state = TrainState()
    for written, failed in ((0, 1), (1, 0), (0, 0), (0, 1)):
        count_saves(state, written, failed, limit=1)
    assert state.checkpoint_failures == 2
    with pytest.raises(RunAborted, match="2 checkpoints in a row"):
        count_saves(state, 0, 1, limit=1)


def test_bad_images_count_once_each():
    state = TrainState()
    assert count_bad_samples(state, {"a": "empty", "b": "text"}, limit=2) == {"a": "empty", "b": "text"}
    assert count_bad_samples(state, {"b": "text"}, limit=2) == {}
    with pytest.raises(RunAborted, match=r"(?s)3 images are unreadable.*c: cut"):
        count_bad_samples(state, {"c": "cut"}, limit=2)


def test_state_survives_as_json_values():
    state = TrainState(step=3, samples_seen=24, bad_samples={"a": "empty"})
    assert TrainState.from_dict(state.to_dict()) == state
    with pytest.raises(TypeError):
        TrainState.from_dict({"stop": 3})


def test_a_signal_sets_the_flag_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGUSR2)
    with StopFlag() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.is_set
        assert stop.signal_name == "SIGUSR2"
    assert signal.getsignal(signal.SIGUSR2) is before


def test_the_lock_keeps_others_out_and_dies_with_its_holder(tmp_path):
    script = "from pathlib import Path; from nepa_dist.guard import RunLock\n"
    script += f"lock = RunLock(Path({str(tmp_path)!r})); lock.__enter__()\n"
    script += "print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunAborted, match=f"in use by another trainer .pid {holder.pid} on"), RunLock(tmp_path, wait_seconds=0):
        pass
    holder.kill()
    holder.wait()
    with RunLock(tmp_path, wait_seconds=0):
        pass
