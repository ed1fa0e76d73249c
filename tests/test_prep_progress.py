"""The progress of long work: a bar for a terminal, lines for a log file."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import progress
from data_prep.progress import Meter
from images import image_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_tells_count_rate_and_time_left(clock: list[float]) -> None:
    meter = Meter("write train", 100_000)
    clock[0] += 10
    meter.add(4_000, 8_000_000)
    assert meter.line() == "write train: 4,000 of 100,000 images, 400 img/s, 800 kB/s, 0:04:00 left"


def test_a_log_gets_a_line_every_half_minute_and_the_last(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("verify val", 70, unit="shards") as meter:
        for _ in range(70):
            clock[0] += 1
            meter.add(1, 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" of ")[0] for line in lines] == ["verify val: 30", "verify val: 60", "verify val: 70"]
    assert lines[0].endswith("1 shards/s, 10 bytes/s, 0:00:40 left")


def test_nothing_is_shown_where_nothing_is_wanted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("write", 1, quiet=True) as meter:
        clock[0] += 100
        meter.add(1, 1)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_rate_and_time_left(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", num_classes=2, per_class=3)
    command = [sys.executable, "-m", "data_prep", "prepare", str(images), str(tmp_path / "out"), "--split", "train"]
    command += ["--container", "mds", "--workers", "1"]
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while select.select([ours], [], [], 60)[0] and (data := os.read(ours, 1 << 16)):
            shown += data
    except OSError:  # so a terminal ends
        pass
    os.close(ours)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"write train .*6/6 [0-9,]+ img/s, [0-9.]+ [kM]B/s 0:00:00", text), text
