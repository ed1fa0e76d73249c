"""What a dry run says a run will cost."""

from __future__ import annotations

import re

import pytest

from nepa_dist.config_load import load_config
from nepa_dist.report import build_report


def test_the_report_says_what_is_unknown() -> None:
    report = build_report(load_config(), None, "no --data given")
    assert re.search(r"training images +unknown", report)
    assert "no --data given" in report
    assert re.search(r"steps +unknown", report)
    assert re.search(r"parameters +5,459,712", report)
    known = build_report(load_config(overrides=["steps=10", "epochs=7"]), None)
    assert re.search(r"steps +10, 40,960 images \(steps is given, epochs 7 has no effect\)", known)


def test_the_report_counts_memory_by_formula() -> None:
    settings = ["model.preset=vit_b", "global_batch_size=8", "engine.precision=bf16_autocast"]
    report = build_report(load_config(overrides=settings), 100)
    size = 4 * 85_539_840
    rows = [("weights", 1), ("bf16 copies by autocast", 0.5), ("gradients", 1), ("Adam moments", 2)]
    assert re.search("".join(rf"\n +{name} +{share * size / 1e6:.4g} MB" for name, share in rows), report)
    assert re.search(rf"EMA +{size / 1e6:.4g} MB", report)
    activations = 8 * (28 * 768 + 6 * 2048) * 256 * 12
    assert f"activations                  {activations / 1e6:.4g} MB" in report
    fp32 = build_report(load_config(overrides=[*settings[:2], "engine.precision=fp32", "optim.ema_decay=null"]), 100)
    activations = 8 * (48 * 768 + 12 * 2048) * 256 * 12  # the residual stream is in fp32 in both
    assert f"activations                  {activations / 1e9:.4g} GB" in fp32
    assert "by autocast" not in fp32
    assert "EMA " not in fp32.partition("Time on")[0]


def test_the_report_estimates_gpu_hours() -> None:
    settings = ["model.preset=vit_l", "epochs=800", "engine.compile=true", "cluster.gpus_per_node=8"]
    report = build_report(load_config(overrides=settings), 1_281_167)
    assert "Time on H100s (a model, docs/performance.md)" in report
    assert "Gb/s per node" not in report  # one node
    speed = re.search(r"images per second +\S+, ([\d,]+) per GPU, (\d+)% of 989 TFLOP/s", report)
    found = re.search(r"GPU-hours +(\S+), (\S+) hours or (\S+) days at world size 8\n", report)
    assert speed
    assert found
    assert float(found[1].replace(",", "")) == pytest.approx(1.0249e9 / float(speed[1].replace(",", "")) / 3600, rel=5e-3)
    assert float(found[2]) == pytest.approx(float(found[1].replace(",", "")) / 8, rel=2e-2)
    assert float(found[3]) == pytest.approx(float(found[2]) / 24, rel=5e-2)
    # Between what is published for such models and what no GPU can.
    assert 30 < int(speed[2]) < 60


def test_the_report_compares_links_between_nodes() -> None:
    settings = ["model.preset=vit_l", "steps=100", "cluster.gpus_per_node=8", "cluster.nodes=8", "cluster.gpu_type=h200"]
    report = build_report(load_config(overrides=settings), None)
    assert "Time on H200s" in report
    steps = [float(value) for value in re.findall(r"step, \d x \d+ Gb/s per node +(\S+) ms", report)]
    assert len(steps) == 2
    assert steps[0] < steps[1]
    assert "(of " in report


def test_the_report_says_when_it_knows_no_figures_of_the_gpu() -> None:
    report = build_report(load_config(overrides=["steps=10", "cluster.gpu_type=b200"]), None)
    assert re.search(r"assumes +H100 \(there are no figures for cluster.gpu_type b200\), rates", report)
    report = build_report(load_config(overrides=["steps=10", "cluster.gpu_type=h200"]), None)
    assert re.search(r"assumes +H200, rates", report)
