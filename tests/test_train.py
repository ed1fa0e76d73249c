"""Whole runs, from the command line: resume to the bit, signals, bad images, full disks, refusals."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.metrics.sinks import read_curve

ROOT = Path(__file__).parents[1]
SMALL = [
    *("model.image_size=32", "model.patch_size=8", "model.embed_dim=32", "model.depth=2", "model.num_heads=2"),
    *("global_batch_size=8", "micro_batch_size=4", "steps=40", "checkpoint.every=4"),
    *("metrics.every=1", "metrics.collapse_every=6"),
    *(
        "data.num_workers=1",
        "engine.precision=fp32",
        "engine.device=cpu",
        "optim.base_lr=0.03",
        "optim.ema_decay=0.9",
        "data.augment.flip=0.5",
    ),
]


def command(run_dir, data, *settings, options=()):
    sets = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    script = [sys.executable, str(ROOT / "jobs/submit.py"), "pretrain", "vit_tiny", "--cluster", "local"]
    return [*script, "--data", str(data), "--run-dir", str(run_dir), *options, *sets]


def run(run_dir, data, *settings, options=(), **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = command(run_dir, data, *settings, options=options)
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment, check=False, **kwargs)


def start(run_dir, data, *settings, options=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = command(run_dir, data, *settings, options=options)
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_steps(run_dir, count, process):
    """Until the run has logged ``count`` steps beyond those of its earlier starts."""
    file = run_dir / "metrics.jsonl"
    wanted = newest_step(file) + count
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if newest_step(file) >= wanted:
            return
        if process.poll() is not None:
            raise AssertionError(f"the run ended early with {process.returncode}:\n{process.stdout.read()}")
        time.sleep(0.02)
    raise AssertionError("the run did not get to the step in time")


def newest_step(file):
    return max((row["step"] for row in read_curve(file)), default=0) if file.exists() else 0


def curve(run_dir):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_curve(run_dir / "metrics.jsonl")]


def weights(run_dir):
    found = CheckpointStore(run_dir / "checkpoints").latest()
    _, reader = CheckpointStore.open(found.path)
    return found.manifest.step, {name: reader.read(name) for name in reader.names()}


def assert_same_run(one, other):
    assert curve(one) == curve(other)
    (step, state), (other_step, other_state) = weights(one), weights(other)
    assert step == other_step
    assert state.keys() == other_state.keys()
    for name, fields in state.items():
        for field, tensor in fields.items():
            assert torch.equal(tensor, other_state[name][field]), (name, field)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 noisy images: an epoch is 3 updates, so resuming happens in the middle of epochs."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(24):
        folder = root / f"class{index % 3}"
        folder.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((40 + index, 48), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    result = run(run_dir, images)
    assert result.returncode == 0, result.stderr
    return run_dir


def test_a_run_folder_explains_itself(unbroken):
    assert {"config.yaml", "run.json", "log.txt", "metrics.jsonl", "checkpoints", "figures"} <= set(os.listdir(unbroken))
    start = json.loads((unbroken / "run.json").read_text())["starts"][0]
    assert start["world_size"] == 1
    assert start["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {path.name for path in (unbroken / "figures").iterdir()} == {"loss.png", "grad_norm.png", "collapse.png"}
    rows = read_curve(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["samples_seen"] == 40 * 8
    assert 0 < rows[5]["embedding_effective_rank.target"] <= 32
    # Newest three are kept.
    assert CheckpointStore(unbroken / "checkpoints").steps() == [32, 36, 40]
    assert "finished 40 steps" in (unbroken / "log.txt").read_text()


def test_the_resolved_configuration_repeats_the_run(unbroken, images, tmp_path):
    result = run(tmp_path / "again", images, options=["--config", str(unbroken / "config.yaml")])
    assert result.returncode == 0, result.stderr
    assert_same_run(unbroken, tmp_path / "again")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_twice_and_resumed_to_the_bit(images, unbroken, tmp_path, ranks):
    options = ["--gpus-per-node", str(ranks)]
    whole = unbroken
    if ranks > 1:
        whole = tmp_path / "whole"
        assert run(whole, images, options=options).returncode == 0
    broken = tmp_path / "broken"
    for _ in range(2):
        process = start(broken, images, options=options)
        wait_for_steps(broken, 6, process)
        process.kill()
        process.wait()
    # The newest one is lost as well: otherwise the kill may come before anything was logged beyond it.
    shutil.rmtree(sorted((broken / "checkpoints").glob("step-*"))[-1])
    result = run(broken, images, options=options)
    assert result.returncode == 0, result.stderr
    assert_same_run(whole, broken)
    log = (broken / "log.txt").read_text()
    assert log.count("continuing from") == 2
    # What had been logged after the checkpoint is kept aside, not lost.
    assert (broken / "metrics.superseded.jsonl").exists()


def test_two_ranks_give_the_numbers_of_one(images, unbroken, tmp_path):
    result = run(tmp_path / "two", images, options=["--gpus-per-node", "2"])
    assert result.returncode == 0, result.stderr
    for (step, loss, norm), (other_step, other_loss, other_norm) in zip(curve(unbroken), curve(tmp_path / "two"), strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, abs=2e-6)
        assert norm == pytest.approx(other_norm, rel=1e-4)


def test_a_run_continues_on_other_engines_and_ranks(images, unbroken, tmp_path):
    for engine, ranks, code in (("ddp", "1", 75), ("fsdp2", "2", 75), ("fsdp2", "1", 0)):
        options = ["--engine", engine, "--gpus-per-node", ranks]
        process = start(tmp_path / "run", images, options=options)
        if code == 75:
            wait_for_steps(tmp_path / "run", 3, process)
            process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=90)[0]
        assert process.returncode == code, output
    assert "continuing from" in output
    for (step, loss, norm), (other_step, other_loss, other_norm) in zip(curve(unbroken), curve(tmp_path / "run"), strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, abs=2e-6)
        assert norm == pytest.approx(other_norm, rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_saves_and_asks_to_be_run_again(images, unbroken, tmp_path, number):
    ranks = "2" if number == signal.SIGUSR2 else "1"
    process = start(tmp_path / "run", images, options=["--gpus-per-node", ranks])
    wait_for_steps(tmp_path / "run", 5, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert f"stopped by {number.name}" in output
    step, _ = weights(tmp_path / "run")
    assert step == curve(tmp_path / "run")[-1][0] < 40
    if ranks == "1":
        assert run(tmp_path / "run", images).returncode == 0
        assert_same_run(unbroken, tmp_path / "run")


def test_a_finished_run_says_so_and_does_nothing(unbroken, images):
    before = {path: path.stat().st_mtime_ns for path in sorted((unbroken / "checkpoints").rglob("*"))}
    lines = (unbroken / "metrics.jsonl").read_text()
    result = run(unbroken, images)
    assert result.returncode == 0
    assert "this run is finished" in result.stdout + result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in sorted((unbroken / "checkpoints").rglob("*"))}
    assert lines == (unbroken / "metrics.jsonl").read_text()


def test_other_settings_in_the_same_folder_are_refused(unbroken, images):
    result = run(unbroken, images, "optim.weight_decay=0.1")
    assert result.returncode == 2
    assert "optim.weight_decay: 0.05 -> 0.1" in result.stderr


def test_other_images_under_the_same_run_are_refused(images, tmp_path):
    assert run(tmp_path / "run", images, "guard.max_consecutive_skips=3").returncode == 0
    os.rename(tmp_path / "run/checkpoints/step-00000040", tmp_path / "elsewhere")
    extra = tmp_path / "more"
    extra.mkdir()
    for path in images.rglob("*.png"):
        os.link(path, extra / path.name)
    result = run(tmp_path / "run", extra, "guard.max_consecutive_skips=3")
    assert result.returncode == 2
    assert "holds other images than those the run began with" in result.stderr


def test_a_damaged_checkpoint_is_passed_over(images, unbroken, tmp_path):
    process = start(tmp_path / "run", images)
    wait_for_steps(tmp_path / "run", 14, process)
    process.kill()
    process.wait()
    newest = CheckpointStore(tmp_path / "run/checkpoints").latest().path
    shard = next(newest.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = run(tmp_path / "run", images)
    assert result.returncode == 0, result.stderr
    assert f"passed over the damaged checkpoint {newest}" in (tmp_path / "run/log.txt").read_text()
    assert_same_run(unbroken, tmp_path / "run")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(images, tmp_path):
    assert run(tmp_path / "run", images, "steps=5", "checkpoint.every=4").returncode == 0
    for manifest in (tmp_path / "run/checkpoints").glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"step"', '"stop"', 1))
    before = (tmp_path / "run/metrics.jsonl").read_text()
    result = run(tmp_path / "run", images, "steps=5", "checkpoint.every=4")
    assert result.returncode == 2
    assert "no checkpoint verifies" in result.stderr
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def spoil(root, number):
    """Make ``number`` of the images unreadable in different ways; returns their names."""
    files = sorted(root.rglob("*.png"))[:number]
    contents = [b"", b"this is text", files[0].read_bytes()[:60]]
    for index, file in enumerate(files):
        file.write_bytes(contents[index % 3])
    return [str(file.relative_to(root)) for file in files]


def copy_of(images, root):
    for path in images.rglob("*.png"):
        target = root / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root


def test_unreadable_images_are_named_counted_once_and_survived(images, tmp_path):
    data = copy_of(images, tmp_path / "data")
    names = spoil(data, 3)
    for folder, ranks in (("one", "1"), ("two", "2")):
        result = run(tmp_path / folder, data, options=["--gpus-per-node", ranks])
        assert result.returncode == 0, result.stderr
        log = (tmp_path / folder / "log.txt").read_text()
        for name in names:
            assert log.count(f"unreadable image replaced: {name}") == 1
        assert read_curve(tmp_path / folder / "metrics.jsonl")[-1]["bad_samples_total"] == 3
    losses = [[loss for _, loss, _ in curve(tmp_path / folder)] for folder in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def test_too_many_unreadable_images_end_the_run(images, tmp_path):
    data = copy_of(images, tmp_path / "data")
    spoil(data, 5)
    result = run(tmp_path / "run", data, "data.max_bad_samples=3")
    assert result.returncode == 1
    assert "more than data.max_bad_samples = 3" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_divergence_is_skipped_counted_and_ends_the_run(images, tmp_path):
    result = run(tmp_path / "run", images, "optim.base_lr=1e38", "optim.warmup_steps=3", "guard.max_consecutive_skips=4")
    assert result.returncode == 1
    output = result.stdout + result.stderr
    assert "5 steps in a row had a non-finite gradient" in output
    assert "Traceback" not in output
    rows = read_curve(tmp_path / "run/metrics.jsonl")
    assert rows[-1]["applied"] == 0
    assert rows[-1]["skipped_steps_total"] >= 4


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_checkpoint_that_cannot_be_written_harms_nothing(images, tmp_path):
    assert run(tmp_path / "run", images, "model.depth=4", "checkpoint.keep_last=9", "steps=24").returncode == 0
    store = CheckpointStore(tmp_path / "run/checkpoints")
    for step in (16, 20, 24):
        os.rename(store.root / f"step-{step:08}", tmp_path / f"step-{step}")
    result = run(tmp_path / "run", images, "model.depth=4", "checkpoint.keep_last=9", "steps=24", preexec_fn=limit_file_size)
    assert result.returncode == 1
    output = result.stdout + result.stderr
    assert "checkpoint at step 16 failed" in output
    assert "the newest one is of step 12" in output
    assert store.steps() == [4, 8, 12]
    assert store.latest().manifest.step == 12
    assert not [name for name in os.listdir(store.root) if not name.startswith("step-")]


def test_a_second_trainer_is_kept_out(images, tmp_path):
    process = start(tmp_path / "run", images, "steps=4000")
    wait_for_steps(tmp_path / "run", 2, process)
    second = run(tmp_path / "run", images, "steps=4000")
    assert second.returncode == 2
    assert "a run is going on" in second.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


def test_metrics_endpoint_serves_the_run(images, tmp_path):
    import urllib.request

    process = start(tmp_path / "run", images, "steps=4000")
    wait_for_steps(tmp_path / "run", 8, process)
    endpoint = json.loads((tmp_path / "run/run.json").read_text())["starts"][0]["metrics_endpoint"]
    text = urllib.request.urlopen(endpoint, timeout=10).read().decode()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    values = {line.split()[0]: line.split()[1] for line in text.splitlines() if not line.startswith("#")}
    assert float(values['nepa_step{run="run"}']) >= 8
    for name in ("loss", "grad_norm", "lr", "images_per_second", "skipped_steps_total"):
        assert f'nepa_{name}{{run="run"}}' in values
    assert 'nepa_embedding_mean_cosine{run="run",tensor="target"}' in values
