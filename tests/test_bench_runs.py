"""Benchmarks that train whole runs: the gate on the loss, and what the loop costs beside its steps."""

import json

import pytest

from benchmarks import loop, parity

SMALL = ["model.image_size=32", "model.patch_size=8", "model.embed_dim=32", "model.depth=1", "model.num_heads=2"]
SMALL += ["global_batch_size=8", "micro_batch_size=8", "data.num_workers=0", "engine.device=cpu", "optim.warmup_steps=2"]
WORDS = ["vit_tiny", "--data", "digits", "--steps", "20", *(word for setting in SMALL for word in ("--set", setting))]


def test_another_learning_rate_fails_and_the_record_says_so(tmp_path, capsys):
    words = [*WORDS, "--set", "optim.base_lr=0.01", "--change", "optim.base_lr=0.3"]
    assert parity.main([*words, "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 1
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"as-given", "changed", "rounding"}
    (path,) = tmp_path.glob("parity_optim.base_lr-0.3_vit_tiny_*.json")
    report = json.loads(path.read_text())
    assert report["gap"]["rounding"] < 1e-4 < report["tolerance"] < report["gap"]["changed"]
    assert report["steps"] == 20
    assert all(len(means) == 10 for means in report["loss"].values())
    assert "**FAILED**" in path.with_suffix(".md").read_text()
    assert "**FAILED**" in capsys.readouterr().out


def test_what_cannot_run_is_refused_before_the_first_run(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)engine\.fp8 rowwise with engine\.precision fp32.*'changed' cannot be made"):
        parity.main([*WORDS, "--change", "engine.fp8=rowwise", "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_a_difference_within_the_tolerance_passes():
    def curve(shift):
        return [{"step": k, "loss": -k / 100 + shift * (k > 50), "images_per_second": 5.0} for k in range(1, 101)]

    curves = {"as given": curve(0.0), "changed": curve(0.004), "rounding": curve(1e-5)}
    passed = parity.compare(curves, 0.005)
    assert passed["passed"]
    assert passed["gap"] == pytest.approx({"changed": 0.004, "rounding": 1e-5})
    assert not parity.compare(curves, 0.003)["passed"]


def test_the_loop_tells_where_its_time_goes(tmp_path, capsys):
    assert loop.main([*WORDS, "--every", "8", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("loop_vit_tiny_*.json")
    report = json.loads(path.read_text())
    saving, without = report["arms"]["saving"], report["arms"]["without"]
    assert len(saving["stall_seconds"]) == 2
    assert not without["stall_seconds"]
    assert saving["seconds"]["checkpoint_stall"] == pytest.approx(sum(saving["stall_seconds"]))
    assert saving["save_bytes"] > 0
    assert 0 < report["usual_share"] < 1
    assert "The loop stood still for" in path.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        loop.main([*WORDS, "--every", "20"])
    assert "--every 20" in capsys.readouterr().err
