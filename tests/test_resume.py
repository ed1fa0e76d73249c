"""Starting from another run's weights, and going on with changed settings only where that is allowed."""

import json

import pytest
import torch
from test_downstream import run as run_task
from test_train import curve, images, run, weights  # noqa: F401 - a fixture among them

from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.metrics.sinks import read_curve


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):  # noqa: F811
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    result = run(run_dir, images, "steps=8")
    assert result.returncode == 0, result.stderr
    return run_dir


def start_from(trained, run_dir, images, what, *settings):  # noqa: F811
    return run(run_dir, images, "steps=8", *settings, options=["--init", str(trained), "--load", what])


@pytest.mark.parametrize(
    ("what", "weight", "average"),
    [("weights", "weight", "weight"), ("ema", "ema", "ema"), ("weights+ema", "weight", "ema")],
)
def test_a_run_starts_with_the_weights_of_another(images, trained, tmp_path, what, weight, average):  # noqa: F811
    # With a learning rate of 0 nothing but the averages moves; they move towards the weights.
    frozen = ("optim.base_lr=0", "optim.weight_decay=0", "optim.ema_decay=0.999999", "checkpoint.every=1", "steps=1")
    result = run(tmp_path / "run", images, *frozen, options=["--init", str(trained), "--load", what])
    assert result.returncode == 0, result.stderr
    assert f"starting with the {what} of {trained}" in (tmp_path / "run/log.txt").read_text()
    (_, source), (step, state) = weights(trained), weights(tmp_path / "run")
    assert step == 1
    for name, fields in state.items():
        assert fields["weight"].equal(source[name][weight]), name
        assert fields["step"] == 1
    if average == weight:
        assert all(fields["ema"].equal(fields["weight"]) for fields in state.values())


def test_everything_forks_a_run(images, trained, tmp_path):  # noqa: F811
    middle = CheckpointStore(trained / "checkpoints").path(4)
    result = start_from(middle, tmp_path / "fork", images, "everything")
    assert result.returncode == 0, result.stderr
    assert curve(tmp_path / "fork") == curve(trained)[4:]
    result = start_from(middle, tmp_path / "other", images, "everything", "optim.weight_decay=0.1")
    assert result.returncode == 2
    assert "optim.weight_decay: 0.05 in the checkpoint, 0.1 now" in result.stderr


def test_weights_of_another_model_are_refused_with_every_difference(images, trained, tmp_path):  # noqa: F811
    result = start_from(trained, tmp_path / "run", images, "weights", "model.depth=3", "model.qk_norm_affine=true")
    assert result.returncode == 2
    assert "holds another model (depth: 2 there, 3 here)" in result.stderr  # before anything starts
    result = start_from(trained, tmp_path / "other", images, "weights", "model.rope_theta=50", "model.qk_norm_affine=true")
    assert result.returncode == 2
    assert "model.rope_theta: 100.0 in the checkpoint, 50.0 now" in result.stderr
    assert "model.qk_norm_affine: False in the checkpoint, True now" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_start_that_is_not_there_is_refused(images, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    result = start_from(tmp_path / "empty", tmp_path / "run", images, "weights")
    assert result.returncode == 2
    assert f"--init {tmp_path / 'empty'} holds no checkpoint" in result.stderr


def test_what_is_allowed_may_differ(images, tmp_path):  # noqa: F811
    assert run(tmp_path / "run", images, "steps=8").returncode == 0
    changed = ("steps=10", "optim.weight_decay=0.1")
    refused = run(tmp_path / "run", images, *changed, options=["--allow", "steps"])
    assert refused.returncode == 2
    assert "optim.weight_decay: 0.05 -> 0.1" in refused.stderr
    assert "steps: 8 -> 10" not in refused.stderr
    result = run(tmp_path / "run", images, *changed, options=["--allow", "steps", "--allow", "optim"])
    assert result.returncode == 0, result.stderr
    assert [step for step, _, _ in curve(tmp_path / "run")] == list(range(1, 11))


def test_frozen_weights_go_on_where_averages_do(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_task("finetune", first, "steps=2", options=["--skip-check", "init"]).returncode == 0
    still = ("optim.base_lr=0", "optim.weight_decay=0", "optim.ema_decay=0.999999", "steps=1")
    result = run_task("finetune", second, *still, options=["--init", str(first), "--load", "weights+ema"])
    assert result.returncode == 0, result.stderr
    (_, source), (_, state) = weights(first), weights(second)
    for name, fields in state.items():
        assert fields.keys() == source[name].keys()
        assert fields["weight"].equal(source[name]["weight"])
        assert ("ema" in fields) == (not name.startswith("backbone.patch_embed."))
    learned = "backbone.blocks.0.mlp.down.weight"
    torch.testing.assert_close(state[learned]["ema"], source[learned]["ema"], atol=1e-6, rtol=0)

    thawed = ("finetune.freeze_patch_embed=false", "steps=3")
    allowed = ["--allow", "steps", "--allow", "finetune.freeze_patch_embed"]
    result = run_task("finetune", first, *thawed, options=allowed)
    assert result.returncode == 2
    assert "step-00000002: backbone.patch_embed.weight: the checkpoint holds ['weight']" in result.stderr
    assert "it was frozen there and is not here" in result.stderr


def test_a_best_score_is_not_compared_with_scores_of_another_measure(tmp_path):
    run_dir = tmp_path / "run"

    def go_on(steps, *settings):
        result = run_task(
            "finetune", run_dir, f"steps={steps}", *settings, options=["--allow", "steps", "--skip-check", "init"]
        )
        assert result.returncode == 0, result.stderr
        (row,) = [row for row in read_curve(run_dir / "metrics.jsonl") if "top1" in row and row["step"] == steps]
        return row, result.stderr + result.stdout

    def best(name="best"):
        return json.loads((run_dir / name / "results.json").read_text())

    first, _ = go_on(4)
    second, said = go_on(8, "evaluate.max_samples=20")
    assert "evaluate.max_samples was 37 and is 20: the best score so far" in said
    assert second["best_score"] == second["top1"] == best()["top1"]
    assert best()["step"] == 8
    assert (best("best-of-step-00000004")["step"], best("best-of-step-00000004")["top1"]) == (4, first["top1"])
    third, said = go_on(12, "evaluate.max_samples=20", "evaluate.batch_size=4")
    assert "starts anew" not in said
    assert third["best_score"] == max(second["top1"], third["top1"])
    assert best("best-of-step-00000004")["step"] == 4
    fork = tmp_path / "fork"
    forked = run_task(
        *("finetune", fork, "steps=14", "evaluate.max_samples=20"),
        options=["--init", str(run_dir), "--load", "everything", "--allow", "steps"],
    )
    assert forked.returncode == 0, forked.stderr
    assert json.loads((fork / "best" / "results.json").read_text())["step"] == 14, "the best of the other run is not here"
