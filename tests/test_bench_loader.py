"""The loader benchmark: a short run of it ends in a report that says what was measured and where."""

import json
from pathlib import Path

import pytest

from benchmarks.loader import main, summary, to_markdown


def test_a_run_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.loader._GENERATED", 2)
    options = ["--images", "40", "--repeats", "2", "--seconds", "0.2", "--batch-size", "8", "--image-size", "32"]
    assert (
        main([*options, "--only", "ours folder keep", "--scratch", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 0
    )
    (path,) = (tmp_path / "out").glob("loader_generated_*.json")
    report = json.loads(path.read_text())
    assert report["failed"] == {}
    rate = report["arms"]["ours folder keep"]["images_per_cpu_second"]
    assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert set(report["stages"]["folder keep"]) == {"read", "decode", "crop and resize"}
    assert report["machine"]["commit"]
    text = path.with_suffix(".md").read_text()
    assert text == to_markdown(report)
    assert "2 generated pictures" in text
    assert "ours folder keep" in text


def test_summaries_hold_median_and_range() -> None:
    assert summary([{"x": 3.0}, {"x": 1.0}, {"x": 2.0}]) == {"x": {"median": 2.0, "low": 1.0, "high": 3.0}}
