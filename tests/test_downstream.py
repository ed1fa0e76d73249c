"""Fine-tuning and segmentation as a user starts them: from a pretraining run, validated, resumed, on other engines."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from images import image_folder
from jobs import pipeline_report
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.metrics.sinks import read_curve
from nepa_dist.trained import load_trained

ROOT = Path(__file__).parents[1]
MODEL = [
    *("model.image_size=32", "model.patch_size=8", "model.embed_dim=32", "model.depth=4", "model.num_heads=2"),
    *("metrics.every=1", "optim.ema_decay=0.8", "checkpoint.every=3"),
]
SHAPE = {
    "pretrain": ["steps=4", "metrics.knn_every=2"],
    # Everything that is drawn: mixup, cutmix, RandAugment, erasing, drop path.
    "finetune": [
        *("steps=8", "global_batch_size=8", "micro_batch_size=2", "model.drop_path=0.2", "evaluate.every_epochs=0.0016"),
        *("finetune.mixup=0.8", "finetune.cutmix=1.0", "data.augment.randaugment_magnitude=9"),
        *("data.augment.erase_probability=0.5", "evaluate.max_samples=37", "evaluate.batch_size=8", "data.num_workers=1"),
    ],
    "segment": [
        *("steps=8", "global_batch_size=8", "micro_batch_size=2", "evaluate.every_epochs=0.0016", "evaluate.max_samples=11"),
        *("segment.channels=16", "segment.aux_channels=8", "segment.stride=16", "segment.scale_range=[0.5, 2.0]"),
        *("segment.photometric=true", "segment.dropout=0.1", "model.drop_path=0.2"),
    ],
}
MAIN = {"finetune": "top1", "segment": "miou"}


def command(task, run_dir, *settings, options=()):
    sets = [part for setting in (*MODEL, *SHAPE[task], *settings) for part in ("--set", setting)]
    script = [sys.executable, str(ROOT / "jobs/submit.py"), task, "vit_tiny", "--cluster", "local", "--data", "digits"]
    return [*script, "--run-dir", str(run_dir), *options, *sets]


def run(task, run_dir, *settings, options=()):
    return subprocess.run(
        command(task, run_dir, *settings, options=options),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def state_of(run_dir):
    found = CheckpointStore(run_dir / "checkpoints").latest()
    manifest, reader = CheckpointStore.open(found.path)
    return manifest.meta["state"], {name: reader.read(name) for name in reader.names()}


def curve(run_dir):
    keys = ("loss", "grad_norm", "data_digest", "top1", "top5", "miou", "aacc", "eval_loss")
    return [{key: row[key] for key in ("step", *keys) if key in row} for row in read_curve(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    result = run("pretrain", run_dir)
    assert result.returncode == 0, result.stderr
    return run_dir


@pytest.fixture(scope="module", params=["finetune", "segment"])
def whole(request, pretrained, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    result = run(request.param, run_dir, options=["--init", str(pretrained)])
    assert result.returncode == 0, result.stderr
    return request.param, run_dir


def test_nearest_neighbours_are_measured_beside_pretraining(pretrained):
    rows = [row for row in read_curve(pretrained / "metrics.jsonl") if "knn_top1" in row]
    assert rows, (pretrained / "log.txt").read_text()
    assert rows[0]["knn_step"] in (2, 4)
    assert 0 <= rows[0]["knn_top1"] <= 1
    assert rows[-1]["knn_failures_total"] == 0


def test_a_report_draws_what_the_stages_see_once(pretrained, whole, capfd):
    root = pretrained.parent
    (task, run_dir), copies = whole, root / "pipeline"
    for source, name in ((pretrained, "pretrain"), (run_dir, task)):
        shutil.copytree(source, copies / name)
    for _ in range(2):
        assert pipeline_report.main([str(copies)]) == 0
        drawn = {path.relative_to(copies).as_posix() for path in copies.glob("*/figures/val-*.png")}
        wanted = {f"pretrain/figures/val-{index}_maps.png" for index in range(3)}
        assert drawn == wanted | (
            {f"segment/figures/val-{index}_segmentation.png" for index in range(3)} if task == "segment" else set()
        )
        report = (copies / "report.md").read_text()
        assert all(f"]({name})" in report for name in drawn)
    assert capfd.readouterr().out.count("pretrain/figures/val-0_maps.png") == 1, "not again"
    (copies / "pretrain" / "figures" / ".samples").unlink()
    shutil.rmtree(copies / "pretrain" / "checkpoints")
    (copies / "pretrain" / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert pipeline_report.main([str(copies)]) == 0
    assert "pretrain: no pictures of what it sees" in capfd.readouterr().err
    shutil.rmtree(copies)


def test_it_starts_from_the_averaged_backbone_and_accounts_for_every_key(whole, pretrained):
    _, run_dir = whole
    log = (run_dir / "log.txt").read_text()
    assert str(pretrained) in log
    assert "averaged" in log
    assert "head." in log
    # Frozen: still the pretrained one.
    _, before = state_of(pretrained)
    _, after = state_of(run_dir)
    name = "backbone.patch_embed.weight"
    if whole[0] == "finetune":
        assert torch.equal(after[name]["weight"], before[name]["ema"])
        assert set(after[name]) == {"weight"}
    moved = "backbone.blocks.0.mlp.down.weight"
    assert not torch.equal(after[moved]["weight"], before[moved]["ema"])


def test_the_best_weights_are_kept_as_what_they_are(whole):
    task, run_dir = whole
    key = MAIN[task]
    rows = [row for row in read_curve(run_dir / "metrics.jsonl") if key in row]
    assert [row["step"] for row in rows] == [4, 8]
    best = max(rows, key=lambda row: (row[key], -row["step"]))
    results = json.loads((run_dir / "best" / "results.json").read_text())
    assert (results["step"], results[key]) == (best["step"], best[key])
    assert {path.name for path in run_dir.glob("best*")} == {"best", os.readlink(run_dir / "best")}
    with safe_open(run_dir / "best" / "model.safetensors", "pt") as file:
        facts = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert facts["weights"] == "ema"
    assert (int(facts["step"]), float(facts[key])) == (best["step"], best[key])
    if best["step"] == 8:
        _, state = state_of(run_dir)
        for name, tensor in weights.items():
            assert torch.equal(tensor, state[name].get("ema", state[name]["weight"])), name
    with (run_dir / "best" / "per_class.csv").open() as file:
        table = list(csv.DictReader(file))
    if task == "finetune":
        assert sum(int(row["images"]) for row in table) == 37
        assert sum(float(row["top1"] or 0) * int(row["images"]) for row in table) == pytest.approx(37 * best[key])
    else:
        assert len(table) == 11
        assert sum(int(row["annotated_pixels"]) for row in table) == 11 * 32 * 32


def test_two_ranks_score_every_image_once(whole, tmp_path):
    """Drop path, dropout and mixup depend on how the batch is split, so these are off."""
    task, _ = whole
    still = ["model.drop_path=0.0", "steps=4"]
    still += (
        ["finetune.mixup=0", "finetune.cutmix=0", "finetune.freeze_patch_embed=false"]
        if task == "finetune"
        else ["segment.dropout=0.0"]
    )
    for ranks in (1, 2):
        result = run(task, tmp_path / str(ranks), *still, options=["--gpus-per-node", str(ranks)])
        assert result.returncode == 0, result.stderr
    one, two = (curve(tmp_path / str(ranks)) for ranks in (1, 2))
    assert len(one) == len(two) == 5
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6), (row, other)


def test_killed_and_resumed_to_the_bit(whole, pretrained, tmp_path):
    task, run_dir = whole
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(task, broken, options=["--init", str(pretrained)]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not any(row["step"] >= 5 for row in (curve(broken) if (broken / "metrics.jsonl").exists() else [])):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(task, broken, options=["--init", str(pretrained)])
    assert result.returncode == 0, result.stderr
    assert curve(broken) == curve(run_dir)
    (state, tensors), (other_state, other) = state_of(broken), state_of(run_dir)
    assert state["best_score"] == other_state["best_score"]
    for name, fields in tensors.items():
        for field, tensor in fields.items():
            assert torch.equal(tensor, other[name][field]), (name, field)


def test_sharded_engines_give_the_numbers_of_ddp(whole, pretrained, tmp_path):
    task, _ = whole
    curves = {}
    for name in ("ddp", "fsdp2", "zero2"):
        options = ["--init", str(pretrained), "--gpus-per-node", "2", "--engine", name]
        result = run(task, tmp_path / name, "steps=4", options=options)
        assert result.returncode == 0, result.stderr
        curves[name] = curve(tmp_path / name)
    for name in ("fsdp2", "zero2"):
        for row, other in zip(curves["ddp"], curves[name], strict=True):
            assert row == pytest.approx(other, rel=2e-5, abs=2e-6), (name, row, other)


def test_a_finished_run_says_so(whole):
    task, run_dir = whole
    before = (run_dir / "metrics.jsonl").read_bytes()
    result = run(task, run_dir)
    assert result.returncode == 0, result.stderr
    assert "nothing to do" in result.stderr + result.stdout
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_signal_during_validation_is_heard_and_the_validation_made_up_for(pretrained, tmp_path):
    run_dir = tmp_path / "run"
    slow = ["evaluate.max_samples=2000", "evaluate.batch_size=1", "steps=4", "data.num_workers=0"]
    slow += ["finetune.freeze_patch_embed=false"]
    process = subprocess.Popen(
        command("finetune", run_dir, *slow), stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and len(curve(run_dir)) >= 4):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # step 4 is logged just before its validation starts
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert not any("top1" in row for row in curve(run_dir))
    result = run("finetune", run_dir, *slow)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in curve(run_dir) if "top1" in row] == [4]


def test_the_best_weights_can_be_loaded(whole):
    task, run_dir = whole
    trained = load_trained(run_dir / "best")
    names = (*map(str, range(10)), *(["background"] if task == "segment" else []))
    assert trained.class_names == load_trained(run_dir).class_names == names
    with torch.inference_mode():
        scores = trained.task.logits(torch.zeros(1, 3, 32, 32))
    assert (scores if task == "finetune" else scores.logits).shape[1] == (10 if task == "finetune" else 11)


def test_a_validation_that_cannot_score_loses_no_step(pretrained, tmp_path):
    image_folder(tmp_path / "data" / "train", num_classes=2, per_class=6, size=(40, 40))
    image_folder(tmp_path / "data" / "val", num_classes=2, per_class=3, size=(40, 40))
    good = {path: path.read_bytes() for path in (tmp_path / "data" / "val").rglob("*.jpg")}
    for path in good:
        path.write_bytes(b"broken")
    run_dir = tmp_path / "run"
    more = ["data.expected_num_samples=null", "global_batch_size=6", "steps=4", "evaluate.every_epochs=2"]
    options = ["--data", str(tmp_path / "data"), "--init", str(pretrained)]
    failed = run("finetune", run_dir, *more, options=options)
    assert failed.returncode == 1, failed.stderr
    assert "validation at step 4: there is nothing to score" in failed.stderr
    assert state_of(run_dir)[0]["step"] == 4
    for path, content in good.items():
        path.write_bytes(content)
    again = run("finetune", run_dir, *more, options=options)
    assert again.returncode == 0, again.stderr
    assert "validation at step 4: eval_loss" in again.stderr
