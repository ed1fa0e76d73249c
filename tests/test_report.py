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
    assert re.search(
        rf"weights +{size / 1e6:.4g} MB\n +gradients +{size / 1e6:.4g} MB\n +Adam moments +{2 * size / 1e6:.4g} MB", report
    )
    assert re.search(rf"EMA +{size / 1e6:.4g} MB", report)
    activations = 8 * (22 * 768 + 6 * 2048) * 256 * 12
    assert f"activations                  {activations / 1e6:.4g} MB" in report
    fp32 = build_report(load_config(overrides=[*settings[:2], "engine.precision=fp32", "optim.ema_decay=null"]), 100)
    assert f"activations                  {2 * activations / 1e9:.4g} GB" in fp32
    assert "EMA " not in fp32.partition("Whole run")[0]


def test_the_report_estimates_gpu_hours() -> None:
    settings = ["model.preset=vit_l", "epochs=800", "cluster.gpus_per_node=8"]
    report = build_report(load_config(overrides=settings), 1_281_167)
    found = re.search(r"GPU-hours +(\S+), (\S+) hours at world size 8; assumes 40% of 989 TFLOP/s", report)
    assert found
    # 1.025e9 images at 830 images/s per GPU.
    assert float(found[1]) == pytest.approx(1.0249e9 / 830 / 3600, rel=5e-3)
    assert float(found[2]) == pytest.approx(float(found[1]) / 8, rel=1e-2)
