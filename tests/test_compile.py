"""Compilation: every preset and task is compiled whole, without a break, and without a graph of its own for each block."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from nepa_dist.config import Config
from nepa_dist.engines.prepare import keep_compiled, prepare
from nepa_dist.presets import PRESETS
from nepa_dist.tasks.build import build_task

SMALL = {"embed_dim": 16, "num_heads": 2, "image_size": 32, "patch_size": 8}
BATCH = {
    "images": torch.randn(2, 3, 32, 32),
    "targets": torch.full((2, 5), 0.2),
    "masks": torch.zeros(2, 32, 32, dtype=torch.uint8),
}


def compiled_task(monkeypatch, backend, task, model, **engine):
    config = Config.model_validate(
        {
            "task": task,
            "model": SMALL | model,
            "finetune": {"num_classes": 5},
            "segment": {"num_classes": 5, "channels": 8, "aux_channels": 8},
            "engine": {"compile": True, **engine},
        }
    )
    compile_ = torch.compile
    module = build_task(config).train()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend, **options))
        prepare(module, config.engine, torch.device("cpu"))
    return module


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", ["pretrain", "finetune", "segment"])
def test_no_graph_breaks_and_few_graphs(monkeypatch, task, preset, precision):
    backend = CompileCounterWithBackend("eager")
    model = {"preset": preset} | ({"drop_path": 0.2} if task != "pretrain" else {})
    module = compiled_task(monkeypatch, backend, task, model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = module(BATCH)
        loss.backward()
    assert not counters["graph_break"]
    # Pretraining: a block and the loss. The others: the first block drops no paths, all others share one graph at their rates.
    assert backend.frame_count == 2
    assert counters["stats"]["unique_graphs"] == 2


def test_a_graph_break_is_an_error(monkeypatch):
    module = compiled_task(monkeypatch, "eager", "pretrain", {"depth": 1})
    attention = module.backbone.blocks[0].attn
    attention.attend = lambda q, k, v, causal: torch._dynamo.graph_break() or v
    with pytest.raises(torch._dynamo.exc.Unsupported):
        module(BATCH)


def test_drop_path_drops_whole_branches_at_its_rate():
    config = Config.model_validate({"model": SMALL | {"depth": 2, "drop_path": 0.25}})
    block = build_task(config).train().backbone.blocks[1]
    torch.manual_seed(0)
    branch = block._drop(torch.ones(4000, 3, 2))
    values = branch[:, 0, 0]
    assert torch.equal(branch, values[:, None, None].expand_as(branch))
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert values.mean() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(block.eval()._drop(torch.ones(4, 3, 2)), torch.ones(4, 3, 2))


def test_what_is_compiled_is_kept_in_the_run_root(tmp_path, tiny_images, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    settings = ["image_size=32", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"]
    settings = [f"model.{value}" for value in settings] + ["steps=1", "global_batch_size=2", "data.num_workers=0"]
    settings += ["engine.compile=true", "engine.device=cpu", "metrics.prometheus=false"]
    sets = [part for setting in settings for part in ("--set", setting)]
    submit = str(Path(__file__).parents[1] / "jobs/submit.py")
    command = [
        sys.executable,
        submit,
        "pretrain",
        "vit_tiny",
        "--data",
        str(tiny_images),
        "--run-dir",
        str(tmp_path / "a"),
        *sets,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert list((tmp_path / ".compiled").rglob("*.so"))
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["a", "images"]


def test_a_cache_of_ones_own_is_respected(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    keep_compiled(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def saved_for_backward(loss):
    """Shape and dtype of what the loss keeps of bf16 predictions and targets [2, 9, 64] until backward."""
    saved = []
    hidden = torch.randn(2, 9, 64, dtype=torch.bfloat16, requires_grad=True)
    embed = torch.randn(2, 9, 64, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append((x.numel(), x.dtype)) or x, lambda x: x):
        value = loss(hidden, embed, shift=True, stop_grad=True)
    value.backward()
    return value.item(), hidden.grad, saved


def test_the_compiled_loss_keeps_no_copies_in_fp32():
    task = build_task(Config.model_validate({"model": SMALL | {"depth": 1}}))
    torch.manual_seed(0)
    value, gradient, saved = saved_for_backward(task._loss)
    assert any(numel >= 2 * 8 * 64 and dtype == torch.float32 for numel, dtype in saved)
    task.compile_loss()
    torch.manual_seed(0)
    compiled_value, compiled_gradient, compiled_saved = saved_for_backward(task._loss)
    assert not any(numel >= 2 * 8 * 64 and dtype == torch.float32 for numel, dtype in compiled_saved)
    assert compiled_value == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(compiled_gradient, gradient, atol=1e-5, rtol=1e-2)
