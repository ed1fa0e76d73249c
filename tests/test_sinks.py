"""What is logged can be read back to the last digit, over crashes and restarts, and no sink can stop a run."""

import io
import json
import math

import pytest

from nepa_dist.metrics.meter import MAX_CONSECUTIVE_FAILURES, Meter
from nepa_dist.metrics.sinks import ConsoleSink, JsonlSink, LogSink, read_curve


def write_steps(path, steps, resume_step=0, **values):
    sink = JsonlSink(path, resume_step)
    for step in steps:
        sink.write(step, {"loss": step / 3, **values})
    sink.close()
    return sink


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class Recorder:
    """A sink that keeps what it gets, and fails while ``broken``."""

    def __init__(self, name="jsonl", broken=False):
        self.name, self.broken = name, broken
        self.rows, self.events, self.calls, self.closed = [], [], 0, False

    def write(self, step, values):
        self.calls += 1
        if self.broken:
            raise OSError("disk full")
        self.rows.append((step, dict(values)))

    def event(self, message):
        if self.broken:
            raise OSError("disk full")
        self.events.append(message)

    def close(self):
        self.closed = True


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    return Terminal()


# The JSONL file


def test_values_come_back_exactly(tmp_path):
    values = {
        "loss": 0.1 + 0.2,
        "lr": 1e-17 / 3,
        "grad_norm": math.inf,
        "samples_seen": 2.0**52 + 1,
        "prediction_cosine": math.nan,
    }
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    sink.write(3, values)
    sink.write(5, {"loss": -math.inf})
    first, second = read_curve(path)  # before close: every line is on its way at once
    assert first.pop("time") > 1.6e9
    assert math.isnan(first.pop("prediction_cosine"))
    assert first == {"step": 3, **{k: v for k, v in values.items() if k != "prediction_cosine"}}
    assert second["loss"] == -math.inf
    sink.close()


def test_every_line_is_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1], grad_norm=math.nan, lr=math.inf)

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert (row["grad_norm"], row["lr"]) == ("NaN", "Infinity")


def test_resuming_moves_later_lines_aside(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.superseded.jsonl"
    write_steps(path, [10, 20, 30, 40])
    before = path.read_text().splitlines()
    write_steps(path, [30, 40, 50], resume_step=20)
    assert steps_in(path) == [10, 20, 30, 40, 50]
    assert aside.read_text().splitlines() == before[2:]
    assert path.read_text().splitlines()[:2] == before[:2]
    write_steps(path, [50], resume_step=40)
    assert steps_in(aside) == [30, 40, 50]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.superseded.jsonl"]


def test_a_run_without_checkpoint_starts_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20])
    write_steps(path, [10], resume_step=0)
    assert steps_in(path) == [10]
    assert steps_in(tmp_path / "metrics.superseded.jsonl") == [10, 20]


def test_resuming_at_the_last_line_leaves_the_file_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20])
    before = path.stat()
    JsonlSink(path, 20).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', '{"step": 30', "\0\0\0\0", '{"step"', "\udcff"])
def test_a_torn_last_line_is_moved_aside(tmp_path, torn):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.superseded.jsonl"
    write_steps(path, [10, 20])
    with path.open("a", errors="surrogateescape") as file:
        file.write(torn)
    assert [row["step"] for row in read_curve(path)] == [10, 20]
    write_steps(path, [30], resume_step=20)
    assert steps_in(path) == [10, 20, 30]
    assert aside.read_text(errors="surrogateescape") == torn + "\n"


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20])
    path.write_text(path.read_text().rstrip("\n"))
    assert len(read_curve(path)) == 2
    write_steps(path, [30], resume_step=20)
    assert steps_in(path) == [10, 20, 30]


def test_a_crash_while_resuming_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20, 30])
    before = path.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        JsonlSink(path, 10)
    assert path.read_text() == before
    monkeypatch.undo()
    JsonlSink(path, 10).close()
    assert steps_in(path) == [10]
    assert set(steps_in(tmp_path / "metrics.superseded.jsonl")) == {20, 30}


def test_a_line_cut_short_by_a_full_disk_is_taken_back(tmp_path):
    class FullDisk:
        """Writes a few bytes of the next line, then has no room."""

        def __init__(self, file):
            self.file, self.room = file, 10

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            written, self.room = self.file.write(data[: self.room]), 0
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    sink.write(1, {"loss": 1.0})
    real, sink._file = sink._file, FullDisk(sink._file)
    with pytest.raises(OSError, match="No space"):
        sink.write(2, {"loss": 2.0})
    sink._file = real
    sink.write(3, {"loss": 3.0})
    sink.close()
    assert steps_in(path) == [1, 3]


def test_steps_never_go_back(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink.write(5, {})
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        sink.write(4, {})
    sink.close()


def test_damage_inside_the_file_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_curve(path)


# People


VALUES = {
    "loss": -0.71234,
    "grad_norm": 0.2134,
    "lr": 1.2e-3,
    "images_per_second": 812.4,
    "step_seconds": 0.5,
    "data_wait_seconds": 0.005,
    "eta_seconds": 192.4,
    "prediction_cosine": 0.5,
}


def test_plain_lines_away_from_a_terminal():
    stream = io.StringIO()
    sink = ConsoleSink(1000, 0, stream)
    sink.write(120, VALUES)
    sink.write(130, {"loss": math.nan, "applied": 0.0, "eta_seconds": math.inf, "lr": 0.0})
    sink.write(140, {"prediction_cosine": 0.5})
    sink.event("saved [step 120]")
    sink.close()
    assert stream.getvalue().splitlines() == [
        "step  120/1000  loss -0.7123  grad_norm 0.213  lr 1.2e-3  812 img/s  data wait 1 %  eta 0:03:12",
        "step  130/1000  loss nan  lr 0e0  SKIPPED  eta ?",
        "saved [step 120]",
    ]


def test_a_bar_on_a_terminal(terminal):
    sink = ConsoleSink(1000, 100, terminal)
    sink.event("resumed [from 100]")
    sink.write(120, VALUES)
    sink.write(500, {**VALUES, "loss": -0.9})
    sink.event("saved")
    sink.close()
    shown = terminal.getvalue()
    for text in ("resumed [from 100]", "step 120/1000", "step 500/1000", "loss -0.9000", "812 img/s", "eta 0:03:12", "saved"):
        assert text in shown
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_plain_lines_on_a_dumb_terminal(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    ConsoleSink(10, 0, terminal).write(1, {"loss": 1.0})
    assert terminal.getvalue() == "step  1/10  loss 1.0000\n"


def test_the_log_is_appended_to_with_times(tmp_path):
    path = tmp_path / "run" / "log.txt"
    for step in (10, 20):
        sink = LogSink(path, 1000)
        sink.write(step, {"loss": 0.5})
        sink.event("stopped")
        sink.close()
    lines = path.read_text().splitlines()
    assert [line[20:] for line in lines] == ["step   10/1000  loss 0.5000", "stopped", "step   20/1000  loss 0.5000", "stopped"]
    assert all(line[4] == "-" and line[13] == ":" for line in lines)


# The meter


def test_every_sink_gets_every_value():
    sinks = [Recorder("jsonl"), Recorder("prometheus")]
    meter = Meter(sinks)
    meter.log(10, {"loss": 1, "embedding_mean_cosine.target": 0.5})
    meter.event("hello")
    meter.close()
    for sink in sinks:
        (step, values) = sink.rows[0]
        assert step == 10
        assert values["loss"] == 1.0
        assert values["embedding_mean_cosine.target"] == 0.5
        assert sink.events == ["hello"]
        assert sink.closed


def test_an_unknown_key_reaches_no_sink():
    sink = Recorder()
    with pytest.raises(KeyError, match="did you mean 'loss'"):
        Meter([sink]).log(1, {"lr": 0.1, "losss": 1.0})
    assert not sink.calls


def test_a_failing_sink_is_counted_and_the_others_go_on(capsys):
    broken, good = Recorder("jsonl", broken=True), Recorder("prometheus")
    meter = Meter([broken, good])
    for step in range(1, 4):
        meter.log(step, {"loss": 0.0})
    counts = [values.get("sink_failures_total.jsonl") for _, values in good.rows]
    assert counts == [0, 1, 2]
    assert len(good.events) == 1
    assert "jsonl" in good.events[0]
    assert "disk full" in good.events[0]
    assert capsys.readouterr().err.count("disk full") == 1


def test_a_sink_that_recovers_is_kept():
    sink = Recorder()
    meter = Meter([sink])
    for _ in range(3):
        sink.broken = True
        for step in range(MAX_CONSECUTIVE_FAILURES - 1):
            meter.log(step, {})
        sink.broken = False
        meter.log(99, {})
    assert len(sink.rows) == 3
    assert sink.rows[-1][1]["sink_failures_total.jsonl"] == 3 * (MAX_CONSECUTIVE_FAILURES - 1)


def test_a_sink_that_stays_broken_is_switched_off(capsys):
    broken, console = Recorder("jsonl", broken=True), Recorder("console")
    meter = Meter([broken, console])
    for step in range(3 * MAX_CONSECUTIVE_FAILURES):
        meter.log(step, {})
    assert broken.calls == MAX_CONSECUTIVE_FAILURES
    assert len(console.rows) == 3 * MAX_CONSECUTIVE_FAILURES
    assert [("is off" in message) for message in console.events] == [False, True]
    assert capsys.readouterr().err == "", "the console has said it already"
    meter.close()
    assert broken.closed


def test_counts_are_logged_only_when_they_change():
    sink = Recorder()
    meter = Meter([sink])
    meter.log(1, {"loss": 0.0})
    meter.log(2, {"loss": 0.0})
    assert sink.rows == [(1, {"loss": 0.0, "sink_failures_total.jsonl": 0.0}), (2, {"loss": 0.0})]


def test_two_broken_sinks_do_not_report_for_ever(capsys):
    meter = Meter([Recorder("jsonl", broken=True), Recorder("console", broken=True)])
    for step in range(2 * MAX_CONSECUTIVE_FAILURES):
        meter.log(step, {})
        meter.event("hello")
    meter.close()
    assert capsys.readouterr().err.count("is off") == 2


def test_sink_names_must_be_known_and_differ():
    with pytest.raises(KeyError, match="sink_failures_total"):
        Meter([Recorder("fax")])
    with pytest.raises(ValueError, match="same name"):
        Meter([Recorder("log"), Recorder("log")])
