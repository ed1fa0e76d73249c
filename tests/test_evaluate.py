"""``python -m nepa_dist.evaluate RUN`` on a short run with the embedded data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "model.depth=2",
    "model.embed_dim=32",
    "model.num_heads=2",
    "steps=60",
    "global_batch_size=16",
    "optim.base_lr=0.05",
]
SETTINGS += ["optim.ema_decay=0.8", "checkpoint.every=60"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "probe-me"
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [
        sys.executable,
        str(ROOT / "jobs/submit.py"),
        "pretrain",
        "vit_tiny",
        "--data",
        "digits",
        "--run-dir",
        str(folder),
    ]
    subprocess.run([*command, *sets], check=True, timeout=120, capture_output=True)
    return folder


def evaluate(*arguments):
    command = [sys.executable, "-P", "-m", "nepa_dist.evaluate", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, timeout=120, capture_output=True, text=True, env=environment, check=False)


def test_table_json_and_picture(run_dir):
    result = evaluate(run_dir, "--num-train", "300", "--num-test", "100")
    assert result.returncode == 0, result.stderr
    assert "step 60, ema weights" in result.stdout
    values = json.loads((run_dir / "evaluation.json").read_text())
    assert (
        [row["layer"] for row in values["trained"]] == ["embed", 0, 1, "final"] == [row["layer"] for row in values["untrained"]]
    )
    assert all(0 <= row[kind] <= 1 for row in (*values["trained"], *values["untrained"]) for kind in ("knn", "linear"))
    assert (values["num_train"], values["num_test"]) == (300, 100)
    objective = values["objective"]
    assert objective["loss"] == pytest.approx(-objective["prediction_cosine"], abs=1e-6)
    assert objective["prediction_skill_const"] > 0.1
    assert f"{objective['loss']:.4f}" in result.stdout
    assert (run_dir / "figures/probe.png").stat().st_size > 5000
    # Trained and untrained differ, so both were really measured.
    assert values["trained"][-1]["linear"] != values["untrained"][-1]["linear"]


def test_raw_weights_on_request(run_dir):
    losses = []
    for options, kind in (([], "ema"), (["--raw", "--pooling", "last"], "raw")):
        result = evaluate(run_dir, *options, "--num-train", "100", "--num-test", "50")
        assert f"step 60, {kind} weights" in result.stdout
        losses.append(json.loads((run_dir / "evaluation.json").read_text())["objective"]["loss"])
    assert losses[0] != losses[1]


def test_what_cannot_be_evaluated_is_said_in_one_line(run_dir, tmp_path):
    result = evaluate(tmp_path / "nowhere")
    assert result.returncode == 2
    assert "has no checkpoint that can be used" in result.stderr
    result = evaluate(run_dir, "--data", tmp_path / "missing")
    assert result.returncode == 2
    assert "missing" in result.stderr
    assert "Traceback" not in result.stderr
