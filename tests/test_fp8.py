"""Linear layers in fp8: the weights stay what they are, every engine agrees, the loss keeps its course, refusals say why."""

import sys

import pytest
import torch
import torch.distributed as dist

from nepa_dist.config import Config, ConfigError
from nepa_dist.config_load import load_config
from nepa_dist.engines.build import build_engine
from nepa_dist.engines.prepare import prepare
from nepa_dist.plan import make_plan
from nepa_dist.tasks.pretrain import PretrainTask
from spawn import run_ranks
from test_loss_curves import curve

RECIPES = ("tensorwise", "rowwise")
TOLERANCE = 3e-3
"""Largest difference of the loss at any of 40 steps; bf16 against itself in another order of sums stays below 1e-3."""


def make(recipe="off", ranks=1, name="ddp", width=32, image_size=32, **engine):
    config = Config.model_validate(
        {
            "model": {
                "image_size": image_size,
                "patch_size": 8,
                "embed_dim": width,
                "depth": 2,
                "num_heads": 2,
                "qkv_bias": True,
            },
            "steps": 10,
            "global_batch_size": 4,
            "micro_batch_size": 4 // ranks,
            "engine": {"fp8": recipe, "name": name, "device": "cpu", **engine},
            "cluster": {"gpus_per_node": ranks},
        }
    )
    return config, PretrainTask(config.model, config.objective, seed=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_stay_and_the_products_are_rounded(recipe):
    config, plain = make(image_size=40)  # 25 tokens: their sum is over no multiple of 16
    images = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    prepare(plain, config.engine, torch.device("cpu"))
    config, task = make(recipe, image_size=40)
    before = dict(task.named_parameters())
    prepare(task, config.engine, torch.device("cpu"))
    after = dict(task.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    results = []
    for module in (plain, task):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = module({"images": images})
        loss.backward()
        results.append((loss.item(), module.backbone.blocks[0].attn.qkv.weight.grad))
    (loss, gradient), (other_loss, other_gradient) = results
    assert 0 < abs(loss - other_loss) < 0.02
    assert 1e-3 < (gradient - other_gradient).norm() / gradient.norm() < 0.3


def test_layers_whose_width_does_not_fit_are_left_alone():
    _, plain = make(width=24)
    config, task = make("rowwise", width=24)
    prepare(task, config.engine, torch.device("cpu"))
    kinds = {
        name: type(module).__name__ for name, module in task.backbone.blocks[0].named_modules() if hasattr(module, "weight")
    }
    plain_kinds = {
        name: type(module).__name__ for name, module in plain.backbone.blocks[0].named_modules() if hasattr(module, "weight")
    }
    assert kinds == plain_kinds


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("faster", [{}, {"compile": True}], ids=["eager", "compiled"])
def test_the_loss_curve_stays(recipe, faster):
    before, after = curve("bf16_autocast"), curve("bf16_autocast", fp8=recipe, **faster)
    differences = [abs(one - other) for one, other in zip(before, after, strict=True)]
    assert 0 < max(differences) < TOLERANCE
    assert after[-1] < after[0] - 0.05  # it learns


def losses(name, recipe):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    config, task = make(recipe, ranks, name)
    engine = build_engine(task.train(), config, make_plan(config, 100), torch.device("cpu"))
    rows = []
    for step in range(4):
        task.begin_step(step, observe=False)
        for group in engine.param_groups:
            group["lr"] = 1e-3
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        loss, _ = engine.model({"images": images.chunk(ranks)[dist.get_rank() if ranks > 1 else 0]})
        engine.backward(loss, last=True)
        engine.step()
        rows.append(loss.item())
    engine.close()
    return rows


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_engine_rounds_alike(name):
    results = run_ranks(losses, 2, name, "rowwise")  # scales by rows of tokens do not depend on the split over ranks
    mean = [sum(step) / 2 for step in zip(*results, strict=True)]
    assert mean == pytest.approx(losses("ddp", "rowwise"), abs=2e-3)


def test_fp32_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match=r"engine\.fp8 rowwise with engine\.precision fp32"):
        load_config(overrides=["engine.fp8=rowwise", "engine.precision=fp32"])


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    config, task = make("rowwise")
    with pytest.raises(ConfigError, match=r"pip install 'nepa-dist\[fp8\]'"):
        prepare(task, config.engine, torch.device("cpu"))


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    config, task = make("tensorwise")
    with pytest.raises(ConfigError, match=r"NVIDIA A100 \(compute capability 8\.0\) has no fp8"):
        prepare(task, config.engine, torch.device("cuda"))
