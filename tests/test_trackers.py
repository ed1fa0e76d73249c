"""Trackers get what is logged, after a restart too and no step twice, and hold nobody up when they fail."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from nepa_dist.metrics import trackers
from nepa_dist.metrics.meter import Meter
from nepa_dist.metrics.sinks import read_curve
from nepa_dist.metrics.trackers import Background, TensorBoardSink, WandbSink, tracker_problems
from prometheus_server import ROOT

needs_tensorboard = pytest.mark.skipif(bool(tracker_problems(["tensorboard"])), reason="tensorboardX is in the dev extra")
needs_wandb = pytest.mark.skipif(bool(tracker_problems(["wandb"])), reason="wandb is in the dev extra")
RUN = ("model.image_size=32", "model.patch_size=16", "model.embed_dim=32", "model.depth=1", "model.num_heads=2")
RUN += ("global_batch_size=4", "metrics.every=1", "checkpoint.every=5", "data.num_workers=0", "engine.device=cpu")
RUN += ("engine.precision=fp32", "steps=12", "optim.ema_decay=null", "metrics.collapse_every=100")


def accumulated(folder):
    """What TensorBoard itself finds in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="in the dev extra")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


def scalars(folder, tag):
    return [(event.step, event.value) for event in accumulated(folder).Scalars(tag)]


def wandb_rows(folder):
    """Steps of all runs in a folder of wandb in offline mode, by their id: {id: {step: {key: text of the value}}}."""
    from wandb.proto import wandb_internal_pb2

    runs = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        rows = runs.setdefault(path.stem.removeprefix("run-"), {})
        for content in leveldb_records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                step = int(values["_step"])
                assert step not in rows, f"step {step} is there twice"
                rows[step] = values
    return runs


def leveldb_records(log):
    """Whole records of a file of wandb behind its header: blocks of 32 KiB with parts of records, as in LevelDB's log."""
    at, parts, begin = 0, [], 7
    while at + 7 <= len(log):
        room = 32768 - (at + begin) % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        parts.append(log[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield b"".join(parts)
            parts = []


@needs_tensorboard
def test_tensorboard_finds_every_value(tmp_path):
    meter = Meter([Background("tensorboard", lambda: TensorBoardSink(tmp_path, 0))])
    for step in (10, 20):
        meter.log(step, {"loss": step / 4, "embedding_mean_cosine.target": float("nan"), "straggler_score.3": 1.0})
    meter.close()
    found = accumulated(tmp_path)
    assert scalars(tmp_path, "loss") == [(10, 2.5), (20, 5.0)]
    assert [step for step, _ in scalars(tmp_path, "embedding_mean_cosine/target")] == [10, 20]
    assert not [tag for tag in found.Tags()["scalars"] if "straggler" in tag]


@needs_tensorboard
def test_a_resumed_run_replaces_the_steps_that_it_does_again(tmp_path):
    for resume_step, steps in ((0, (10, 20, 30, 40)), (20, (30, 40, 50))):
        sink = TensorBoardSink(tmp_path, resume_step)
        for step in steps:
            sink.write(step, {"loss": step + resume_step})
        sink.close()
    assert scalars(tmp_path, "loss") == [(10, 10), (20, 20), (30, 50), (40, 60), (50, 70)]


@needs_tensorboard
def test_a_full_disk_costs_only_the_rows_that_did_not_fit(tmp_path):
    """The limit on the size of a file stands for the disk's end, in a process of its own."""
    code = f"""if True:
        import resource, sys
        from pathlib import Path
        from nepa_dist.metrics.trackers import TensorBoardSink
        sink, failed = TensorBoardSink(Path({str(tmp_path)!r}), 0), []
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for step in range(1, 61):
            if step == 21:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
            if step == 31:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            try:
                sink.write(step, {{"loss": float(step), "grad_norm": 1.0}})
            except OSError:
                failed.append(step)
        sink.close()
        print(failed)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    failed = eval(result.stdout)
    assert set(failed) == set(range(21, 31))
    assert [step for step, _ in scalars(tmp_path, "loss")] == [*range(1, 21), *range(31, 61)]


@needs_wandb
def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for logged, steps in ((0, (10, 20, 30)), (30, (20, 30, 40))):  # resumed at step 10, so 20 and 30 are done again
        meter = Meter([Background("wandb", lambda n=logged: WandbSink(tmp_path, "p", "r", {"seed": 1}, n))])
        for step in steps:
            meter.log(step, {"loss": step / 4, "embedding_mean_cosine.target": float("nan")})
        meter.close()
    ((run_id, rows),) = wandb_rows(tmp_path).items()
    assert run_id == (tmp_path / "wandb/run-id.txt").read_text().strip()
    assert {step: float(values["loss"]) for step, values in rows.items()} == {10: 2.5, 20: 5, 30: 7.5, 40: 10}
    assert rows[10]["embedding_mean_cosine/target"] == "NaN"


@needs_wandb
@pytest.mark.parametrize("victim", ["process", "server"])
def test_a_wandb_that_is_gone_is_counted_told_once_and_waited_for_by_nobody(tmp_path, monkeypatch, victim, capsys):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1.0)
    if victim == "process":
        monkeypatch.setenv("WANDB_MODE", "offline")
    else:  # takes connections and never answers
        silent = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    started = []

    def opened():
        started.append(WandbSink(tmp_path, "p", "r", {}, 0))
        return started[0]

    other = Kept()
    meter = Meter([Background("wandb", opened), other])
    deadline = time.monotonic() + 60
    while not started or (victim == "process" and not list(tmp_path.glob("wandb/offline*"))):
        meter.log(len(other.rows), {"loss": 1.0})
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if victim == "process":
        os.killpg(started[0]._process.pid, signal.SIGKILL)
        while not other.events:
            meter.log(len(other.rows), {"loss": 1.0})
            assert time.monotonic() < deadline
            time.sleep(0.05)
        meter.log(len(other.rows), {"loss": 1.0})
        assert other.rows[-1].get("sink_failures_total.wandb", 0) >= 1
    meter.close()
    assert len(other.events) == 1
    assert "metrics sink wandb failed" in other.events[0]
    started[0]._process.wait(10)


class Kept:
    name = "jsonl"

    def __init__(self):
        self.rows, self.events = [], []

    def write(self, step, values):
        self.rows.append(dict(values))

    def event(self, message):
        self.events.append(message)

    def close(self):
        pass


def test_nobody_waits_for_a_tracker_that_hangs_and_what_is_dropped_is_counted(monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "MAX_WAITING_ROWS", 3)
    hangs = threading.Event()

    class Hanging(Kept):
        def write(self, step, values):
            hangs.wait()

    kept = Kept()
    meter = Meter([Background("wandb", Hanging), kept])
    for step in range(8):
        meter.log(step, {"loss": 1.0})
    assert len(kept.rows) == 8
    assert kept.rows[-1]["sink_failures_total.wandb"] >= 2
    assert "rows wait for it" in kept.events[0]
    meter.close()
    hangs.set()


def test_a_tracker_that_cannot_be_opened_is_off_after_a_while(capsys):
    def broken():
        raise OSError("no such place")

    kept = Kept()
    meter = Meter([Background("tensorboard", broken), kept])
    for step in range(40):
        meter.log(step, {"loss": 1.0})
        time.sleep(0.005)
    meter.close()
    assert "no such place" in kept.events[0]
    assert "is off" in kept.events[1]


def launch(run_dir, *settings, **environment):
    sets = [part for setting in (*RUN, *settings) for part in ("--set", setting)]
    script = [sys.executable, str(ROOT / "jobs/submit.py"), "pretrain", "vit_tiny", "--cluster", "local", "--data", "digits"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **environment}
    command = [*script, "--run-dir", str(run_dir), *sets]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_library_that_is_missing_is_refused_before_anything_starts(tmp_path):
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'wandb' else find(n, *a)\n"
    )
    result = launch(tmp_path / "run", "metrics.sinks=[wandb]", PYTHONPATH=str(hide))
    assert result.returncode == 2
    assert "pip install 'nepa-dist[wandb]'" in result.stdout + result.stderr
    assert not (tmp_path / "run").exists()


@needs_tensorboard
@needs_wandb
def test_a_run_that_stops_and_goes_on_is_one_run_at_every_tracker(tmp_path):
    run_dir = tmp_path / "run"
    both = "metrics.sinks=[tensorboard, wandb]"
    assert launch(run_dir, both, "checkpoint.every=4", "guard.max_consecutive_skips=1").returncode == 0
    # As after a kill between two checkpoints: steps 9 to 12 were logged, and are done again.
    newest = max((run_dir / "checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    result = launch(run_dir, both, "checkpoint.every=4", "guard.max_consecutive_skips=1")
    assert result.returncode == 0, result.stderr
    curve = [(row["step"], pytest.approx(row["loss"])) for row in read_curve(run_dir / "metrics.jsonl")]
    assert [step for step, _ in curve] == list(range(1, 13))
    assert scalars(run_dir / "tensorboard", "loss") == curve
    ((_, rows),) = wandb_rows(run_dir).items()
    assert [(step, float(values["loss"])) for step, values in sorted(rows.items())] == curve
    assert "metrics sink" not in (run_dir / "log.txt").read_text()
