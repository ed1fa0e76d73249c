"""The terminal shows the curves that a run has, and says what is wrong."""

import math
import subprocess
import sys

import pytest

from jobs.watch import draw, main
from nepa_dist.metrics.sinks import JsonlSink
from prometheus_server import ROOT


@pytest.fixture
def run(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 41):
        loss = math.nan if step == 7 else -step / 40
        sink.write(step, {"loss": loss, "grad_norm": 10.0 ** (2 - step / 10), "planned_steps": 80.0, "goodput_ratio": 0.97})
    sink.close()
    return tmp_path


def test_watch_draws_a_falling_line_from_corner_to_corner(run):
    rows = [{"step": step, "loss": -float(step)} for step in range(100)]
    lines = draw(rows, ["loss"], 80, 20).splitlines()
    assert lines[0] == "step 99"
    assert lines[1].startswith("loss  -99")
    curve = [line.split("│")[1] for line in lines[2:]]
    assert all(line.strip("\u2800") for line in curve), "every line has a part of it"
    first = [next(i for i, c in enumerate(line) if c != "\u2800") for line in curve]
    assert first == sorted(first)
    assert first[0] == 0
    assert len(curve[-1].rstrip("\u2800")) == len(curve[-1])
    assert max(len(line) for line in lines) <= 80


def test_the_command_shows_the_main_curves_and_what_is_not_finite(run):
    command = [sys.executable, str(ROOT / "jobs/submit.py"), "watch", str(run)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "step 40/80" in result.stdout
    assert "goodput 97.0%" in result.stdout
    assert "loss  -1  (1 not finite)" in result.stdout
    assert "grad_norm" in result.stdout
    assert "top1" not in result.stdout
    assert "\x1b" not in result.stdout, "no control characters in a pipe"


def test_one_value_and_none_are_drawn_too():
    assert "loss  3" in draw([{"step": 1, "loss": 3.0}], ["loss"], 60, 10)
    assert "loss  nan" in draw([{"step": 1, "loss": math.nan}], ["loss"], 60, 10)
    assert draw([{"step": 1}], ["loss"], 60, 10) == "nothing has been logged yet"


def test_mistakes_are_named(run, tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert main([str(run), "--key", "los"]) == 2
    assert "did you mean 'loss'" in capsys.readouterr().err
