"""The page that compares runs holds their curves and nothing from elsewhere; replay is what Prometheus takes in; windows."""

import json
import math
import re
import shutil
import subprocess

import pytest

from nepa_dist.metrics.__main__ import main
from nepa_dist.metrics.profile import peak_flops
from nepa_dist.metrics.report import MAX_POINTS, _thin
from nepa_dist.metrics.sinks import JsonlSink
from nepa_dist.metrics.windows import MovingAverage, SpikeRatio
from prometheus_server import needs_promtool


@pytest.fixture
def run(tmp_path):
    sink = JsonlSink(tmp_path / "big" / "metrics.jsonl", 0)
    for step in range(1, 31):
        loss = math.nan if step == 20 else -step / 30
        sink.write(
            step, {"loss": loss, "grad_norm": 2.0 / step, "embedding_mean_cosine.target": 0.1, "skipped_steps_total": 1.0}
        )
    sink.close()
    return tmp_path / "big"


def data_of(page):
    return json.loads(re.search(r"const data = (.*);\n", page.read_text()).group(1))


def test_the_report_holds_the_curves_and_needs_no_network(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "other")
    page = tmp_path / "report.html"
    assert main(["report", str(run), str(tmp_path / "other"), "--out", str(page)]) == 0
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=|https?://|@import|fetch\(""", text)
    data = data_of(page)
    assert data["runs"] == ["big", "other"]
    loss = next(panel for panel in data["panels"] if panel["title"] == "Loss")
    assert loss["lines"][0]["x"] == list(range(1, 31))
    assert loss["lines"][0]["y"][18:21] == [pytest.approx(-19 / 30), None, pytest.approx(-21 / 30)]
    assert "Training loss of the step" in loss["about"]
    assert all(panel["lines"] for panel in data["panels"]), "what no run has is left out"


def test_a_name_cannot_end_the_script(run, tmp_path):
    evil = tmp_path / "<!--<script>"
    shutil.copytree(run, evil)
    page = tmp_path / "report.html"
    assert main(["report", str(evil), "--out", str(page)]) == 0
    assert data_of(page)["runs"] == ["<!--<script>"]
    assert "<!--<script>" not in page.read_text()


def test_a_folder_without_a_run_is_a_mistake_that_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert f"{tmp_path} is not the folder of a run" in capsys.readouterr().err
    assert main(["replay", str(tmp_path)]) == 2


def test_long_curves_keep_their_spikes():
    points = [(float(step), 100.0 if step == 77_777 else math.sin(step)) for step in range(100_000)]
    thin = _thin(points)
    assert len(thin) <= MAX_POINTS
    assert (77_777.0, 100.0) in thin
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)


@needs_promtool
def test_prometheus_takes_a_replay_in(run, tmp_path):
    out = tmp_path / "big.om"
    assert main(["replay", str(run), "--out", str(out)]) == 0
    text = out.read_text()
    assert "# TYPE nepa_skipped_steps counter" in text
    assert 'nepa_embedding_mean_cosine{run="big",instance="big",job="nepa",tensor="target"} 0.1 ' in text
    # The lines above were written within a millisecond or two: each series keeps those whose clock went on.
    blocks = tmp_path / "blocks"
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(out), str(blocks)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(blocks.glob("*/chunks"))


def test_a_spike_is_six_deviations_above_what_came_before():
    spikes = SpikeRatio()
    for step in range(100):
        spikes.add(1 + 0.1 * math.sin(step))
    assert spikes.ratio == 0
    spikes.add(3.0)
    assert spikes.ratio == 1 / 128
    spikes.add(math.nan)
    assert spikes.ratio == 2 / 128
    for step in range(200):
        spikes.add(1 + 0.1 * math.sin(step))
    assert spikes.ratio == 0


def test_the_moving_average_passes_over_what_is_not_finite():
    average = MovingAverage(0.5)
    for value in (math.nan, 1.0, math.inf, 3.0):
        average.add(value)
    assert average.value == 2.0


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
        ("NVIDIA A10G", None, None),
        ("CPU", None, None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name, bf16, fp32):
    assert peak_flops(name, fp32=False) == bf16
    assert peak_flops(name, fp32=True) == fp32
