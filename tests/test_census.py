"""What observed steps say of gradients, updates, attention and leaks is right, and the same from every engine."""

import math

import pytest
import torch
import torch.distributed as dist

from nepa_dist.config import ObjectiveConfig
from nepa_dist.engines.census import group_of
from nepa_dist.metrics.registry import DEPTHS, GROUPS, lookup
from nepa_dist.tasks.inspection import inspect
from nepa_dist.tasks.pretrain import PretrainTask
from spawn import run_ranks
from test_engines import BATCH, make, snapshot


def largest(tensor):
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def step(name, ranks, observe=True, clip_bites=True, **objective):
    """Two updates, the second one observed: gauges, the state before and after, what the inspection found."""
    rank = dist.get_rank() if dist.is_initialized() else 0

    def make_task(model, _, seed):
        return PretrainTask(model, ObjectiveConfig(**objective), seed=seed)

    task, engine, plan = make(name, ranks, make_task)
    for number in range(2):
        task.train()
        task.begin_step(number, observe=False)
        for group in engine.param_groups:
            group["lr"] = 1e-2
        images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(number)).chunk(ranks)[rank]
        for micro, part in enumerate(images.chunk(plan.grad_accum_steps)):
            loss, _ = engine.model({"images": part})
            engine.backward(loss, last=micro == plan.grad_accum_steps - 1)
        before = snapshot(engine)
        result = engine.step(observe=observe and number == 1)
    seen = inspect(task, engine.model, {"images": part}, largest if ranks > 1 else lambda x: x, audit=True)
    gauges = {key: float(value) for key, value in {**result.gauges, **seen}.items()}
    after = snapshot(engine)
    engine.close()
    return gauges, float(result.grad_norm), before, after


@pytest.fixture(scope="module")
def alone():
    return step("ddp", 1)


def test_gradient_norms_of_the_groups_add_up_to_the_whole(alone):
    gauges, norm, _, _ = alone
    total = math.sqrt(sum(gauges[f"group_grad_norm.{group}"] ** 2 for group in GROUPS))
    assert norm > 0.05, "the clip must bite, or the test shows less"
    assert total == pytest.approx(norm, rel=1e-5)
    assert gauges["group_grad_norm.head"] == 0
    assert all(gauges[f"group_grad_norm.{group}"] > 0 for group in GROUPS if group != "head")


def test_the_update_is_what_the_weights_moved_by(alone):
    gauges, _, before, after = alone
    moved = math.sqrt(sum(((after[name]["weight"] - before[name]["weight"]).double() ** 2).sum() for name in before))
    size = math.sqrt(sum((fields["weight"].double() ** 2).sum() for fields in after.values()))
    assert gauges["param_norm"] == pytest.approx(size, rel=1e-6)
    assert gauges["update_ratio"] == pytest.approx(moved / size, rel=1e-4)


@pytest.mark.parametrize(("name", "ranks"), [("fsdp2", 2), ("zero1", 2), ("zero3", 2)])
def test_every_engine_gives_the_same_gauges(alone, name, ranks):
    for gauges, norm, _, _ in run_ranks(step, ranks, name, ranks):
        assert norm == pytest.approx(alone[1], rel=1e-4)
        assert gauges.keys() == alone[0].keys()
        for key in gauges:
            if not key.startswith("attention"):  # the ranks look at other images
                assert gauges[key] == pytest.approx(alone[0][key], rel=2e-3), key


def test_every_gauge_is_in_the_registry(alone):
    assert all(lookup(key) for key in alone[0])
    assert {f"layer_scale_abs_mean.{depth}" for depth in DEPTHS} <= alone[0].keys()


def test_a_step_that_is_not_observed_has_no_gauges():
    gauges, _, _, _ = step("ddp", 1, observe=False)
    assert not [key for key in gauges if key.startswith(("group", "update", "param"))]


def test_with_a_causal_mask_the_future_does_not_leak(alone):
    assert alone[0]["future_leak_ratio"] == 0
    gauges, _, _, _ = step("ddp", 1, causal=False)
    assert gauges["future_leak_ratio"] > 1e-4


def test_the_inspection_leaves_the_task_as_it_was():
    task, engine, _ = make("ddp", 1)
    batch = {"images": torch.randn(3, 3, 32, 32)}
    task.train()
    task.begin_step(0, observe=False)
    expected = engine.model(batch)[0].item()
    inspect(task, engine.model, batch, lambda x: x, audit=True)
    assert task.training
    assert not task.looked_into
    assert engine.model(batch)[0].item() == expected
    assert not any(module._forward_pre_hooks for module in task.modules())


def test_attention_logits_are_those_of_the_definition():
    task, engine, _ = make("ddp", 1)
    images = torch.randn(2, 3, 32, 32)
    seen = inspect(task, engine.model, {"images": images}, lambda x: x, audit=False)
    task.eval()
    with torch.no_grad():
        block = task.backbone.blocks[0]
        caught = []
        handle = block.attn.register_forward_pre_hook(lambda _, arguments: caught.append(arguments))
        task({"images": images})
        handle.remove()
        x, rotary, _ = caught[0]
        q, k, _ = block.attn.heads(x, rotary)
        expected = max(
            abs(float(q[b, h, i] @ k[b, h, j])) / math.sqrt(q.shape[-1])
            for b in range(2)
            for h in range(q.shape[1])
            for i in range(q.shape[2])
            for j in range(i + 1)
        )
    assert float(seen["attention_logit_max.first"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("backbone.cls_token", "embed"),
        ("backbone.patch_embed.weight", "embed"),
        ("backbone.blocks.3.attn.qkv.weight", "attn"),
        ("backbone.blocks.3.attn.q_norm.weight", "norm"),
        ("backbone.blocks.0.mlp.down.bias", "mlp"),
        ("backbone.blocks.0.ls1.gamma", "norm"),
        ("backbone.norm.bias", "norm"),
        ("head.mask_token", "head"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group
