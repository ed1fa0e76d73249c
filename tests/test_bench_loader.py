"""The loader benchmark: a short run of it ends in a report that says what was measured and where."""

import json
from pathlib import Path

import pytest

from benchmarks.loader import main, ratios, summary, to_markdown


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
    assert report["command"].startswith("python -m benchmarks.loader --images 40")
    text = path.with_suffix(".md").read_text()
    assert text == to_markdown(report)
    assert "2 generated pictures" in text
    assert "ours folder keep" in text


def test_summaries_hold_median_and_range() -> None:
    assert summary([{"x": 3.0}, {"x": 1.0}, {"x": 2.0}]) == {"x": {"median": 2.0, "low": 1.0, "high": 3.0}}


def test_ratios_compare_within_a_round_with_the_slowest_container() -> None:
    def rates(*values: float) -> list[dict[str, float]]:
        return [{"images_per_cpu_second": value} for value in values]

    rounds = {
        "ours tar keep": rates(200, 400, 900),
        "ours beton keep": rates(300, 300, 800),
        "ours folder keep": rates(1, 1, 1),
        "webdataset+pillow tar keep": rates(100, 100, 400),
        "ffcv beton raw256": rates(1, 1, 1),
    }
    assert ratios(rounds) == {"webdataset+pillow tar keep": {"median": 2.0, "low": 2.0, "high": 3.0}}
