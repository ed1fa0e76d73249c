"""Schedule, parameter groups, and AdamW with the moving average in its state."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nepa_dist.config import Config, OptimConfig
from nepa_dist.optim import AdamWEMA, learning_rate, param_groups
from nepa_dist.plan import make_plan
from nepa_dist.tasks.pretrain import PretrainTask

SIZES = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def test_learning_rate_of_the_published_recipe():
    config = Config(epochs=1600)  # NEPA-B on ImageNet: batch 4096, base 3e-4, warm-up 2.5 %
    plan = make_plan(config, 1281167)
    assert plan.steps == 500456
    assert plan.peak_lr == pytest.approx(4.8e-3)
    assert plan.warmup_steps == 12511
    assert learning_rate(0, plan, config.optim) == 0
    assert learning_rate(plan.warmup_steps, plan, config.optim) == pytest.approx(4.8e-3)
    middle = plan.warmup_steps + (plan.steps - plan.warmup_steps) // 2
    assert learning_rate(middle, plan, config.optim) == pytest.approx(2.4e-3, rel=1e-4)
    assert 0 < learning_rate(plan.steps - 1, plan, config.optim) < 1e-12
    values = [learning_rate(step, plan, config.optim) for step in range(0, plan.steps, 1000)]
    peak = values.index(max(values))
    assert values[:peak] == sorted(values[:peak])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_learning_rate_ends_at_min_lr_and_needs_no_warmup():
    config = Config(steps=10, optim=OptimConfig(min_lr=1e-4, warmup_steps=0))
    plan = make_plan(config, 5000)
    assert learning_rate(0, plan, config.optim) == pytest.approx(plan.peak_lr)
    assert learning_rate(10, plan, config.optim) == pytest.approx(1e-4)


def test_biases_norms_and_layer_scale_do_not_decay():
    task = PretrainTask(Config(model=SIZES).model)
    decay, plain = param_groups(task.named_parameters(), 0.05, task.lr_layer)
    names = {id(p): name for name, p in task.named_parameters()}
    assert decay["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0
    assert {names[id(p)].rpartition(".")[2] for p in plain["params"]} == {"bias", "weight", "gamma"}
    assert all("norm" in names[id(p)] for p in plain["params"] if names[id(p)].endswith("weight"))
    assert "backbone.cls_token" in {names[id(p)] for p in decay["params"]}
    assert len(decay["params"]) + len(plain["params"]) == len(names)


def test_groups_are_made_of_what_learns_by_layer_and_decay():
    task = PretrainTask(Config(model=SIZES | {"depth": 2}).model)
    task.backbone.patch_embed.requires_grad_(False)
    groups = param_groups(task.named_parameters(), 0.05, lambda name: int(name.split(".")[2]) if ".blocks." in name else -1)
    assert [(group["layer"], group["weight_decay"]) for group in groups] == [
        (-1, 0.05),
        (-1, 0),
        (0, 0.05),
        (0, 0),
        (1, 0.05),
        (1, 0),
    ]
    names = {id(p): name for name, p in task.named_parameters()}
    assert {names[id(p)] for p in groups[0]["params"]} == {"backbone.cls_token"}
    assert all(names[id(p)].startswith("backbone.blocks.1.") for group in groups[4:] for p in group["params"])
    frozen = {"backbone.patch_embed.weight", "backbone.patch_embed.bias"}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(set(names.values()) - frozen)


def train(optimizer, module, steps, seed=0, found_inf=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        module(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.found_inf = found_inf
        optimizer.step()
        optimizer.zero_grad()
        yield [p.detach().clone() for p in module.parameters()]


def make(ema_decay=0.9):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = AdamWEMA(param_groups(module.named_parameters(), 0.05, lambda name: 0), OptimConfig(ema_decay=ema_decay))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    return module, optimizer


def test_weights_are_those_of_torch_adamw():
    module, optimizer = make()
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    groups = param_groups(plain.named_parameters(), 0.05, lambda name: 0)
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False)
    ours_by_step, theirs_by_step = train(optimizer, module, 5, found_inf=torch.zeros(())), train(reference, plain, 5)
    for ours, theirs in zip(ours_by_step, theirs_by_step, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_average_starts_as_a_copy_after_the_first_update_and_then_decays():
    module, optimizer = make(ema_decay=0.9)
    expected = None
    for weights in train(optimizer, module, 4):
        expected = weights if expected is None else [0.9 * e + 0.1 * w for e, w in zip(expected, weights, strict=True)]
        for average, parameter in zip(expected, module.parameters(), strict=True):
            torch.testing.assert_close(optimizer.state[parameter]["ema"], average)


def test_a_skipped_step_changes_nothing_to_the_bit():
    module, optimizer = make()
    list(train(optimizer, module, 3))
    states = [{"weight": p.detach(), **optimizer.state[p]} for p in module.parameters()]
    before = [{field: tensor.clone() for field, tensor in state.items()} for state in states]
    module(torch.full((8, 4), math.nan)).mean().backward()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for parameter, saved in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, saved["weight"])
        for field in ("step", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(optimizer.state[parameter][field], saved[field]), field
    assert saved["step"] == 3


def test_without_a_decay_no_average_is_kept():
    module, optimizer = make(ema_decay=None)
    list(train(optimizer, module, 1))
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in module.parameters())


def test_all_averages_move_in_one_kernel_and_the_host_reads_nothing():
    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    module, optimizer = make()
    module(torch.ones(8, 4)).mean().backward()
    optimizer.found_inf = torch.zeros(())
    with Calls() as calls:
        optimizer.step()
    assert calls.names.count("_fused_adamw_") == len(optimizer.param_groups) == 2
    assert calls.names.count("_fused_sgd_") == 1
    assert not {"lerp_", "_foreach_lerp_", "_local_scalar_dense"} & set(calls.names)


def test_an_average_that_was_loaded_goes_on_from_there():
    module, optimizer = make(ema_decay=0.75)
    optimizer.keep_average = True
    for parameter in module.parameters():
        optimizer.state[parameter]["ema"].fill_(2.0)
    (weights,) = train(optimizer, module, 1)
    for weight, parameter in zip(weights, module.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[parameter]["ema"], 1.5 + 0.25 * weight)
