"""A block on the project's kernels is the same function as the block itself: outputs and all gradients.

Without a GPU Triton interprets the kernels (tests/conftest.py); with one they run on it.
"""

import sys
import types
import unittest.mock

import pytest
import torch

import nepa_dist
from nepa_dist import fused
from nepa_dist.config import Config, ConfigError, EngineConfig
from nepa_dist.engines.prepare import prepare
from nepa_dist.model import Block, rotary_table
from nepa_dist.plan import cross_field_problems
from nepa_dist.tasks.build import build_task

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL = {"preset": "vit_tiny", "image_size": 64, "patch_size": 16, "depth": 2, "layer_scale_init": 0.5, "qkv_bias": True}
PLAIN = {"gated_mlp": False, "activation": "gelu", "qk_norm_affine": True}
only_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="too large for a CPU")
needs_triton = pytest.mark.skipif(fused.load() is not None, reason="needs Triton")


def make_block(**model):
    torch.manual_seed(0)
    config = Config.model_validate({"model": MODEL | model})
    block = build_task(config).train().backbone.blocks[1].to(DEVICE)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 0.3)
    return config.model, block


def results(block, forward, images, rotary, dtype):
    """Output, gradient of the input and those of all parameters, by name."""
    generator = torch.Generator().manual_seed(0)
    T, D = len(rotary.cos), block.norm1.weight.numel()
    x = torch.randn(images, T, D, generator=generator).to(DEVICE).requires_grad_()
    weights = torch.randn(images, T, D, generator=generator).to(DEVICE)
    block.zero_grad()
    torch.manual_seed(1)  # of drop path
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bf16"):
        y = forward(x, rotary, True)
    assert y.dtype == torch.float32
    (y * weights).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in block.named_parameters()}


def errors(one, other):
    return {name: ((one[name] - other[name]).norm() / (one[name].norm() + 1e-6)).item() for name in one}


def run_both(dtype, images=3, **model):
    config, block = make_block(**model)
    side = config.image_size // config.patch_size
    rotary = rotary_table(config, (side, side), DEVICE)
    plain = results(block, block.forward, images, rotary, dtype)
    ours = results(block, types.MethodType(fused.block_forward, block), images, rotary, dtype)
    exact = results(block, block.forward, images, rotary, "fp32")
    return plain, ours, exact


@needs_triton
@pytest.mark.parametrize(
    "model",
    [{}, PLAIN, {"qkv_bias": False}, {"embed_dim": 160, "num_heads": 2}, {"drop_path": 0.5}],
    ids=["gated", "plain and affine", "no bias", "heads of 80", "drop path"],
)
def test_it_is_the_same_function_in_fp32(model):
    plain, ours, _ = run_both("fp32", images=7 if "drop_path" in model else 3, **model)
    assert max(errors(plain, ours).values()) < 1e-5
    assert plain.keys() == ours.keys()


@needs_triton
@pytest.mark.parametrize(
    "model",
    [
        {},
        PLAIN,
        pytest.param({"preset": "vit_l", "image_size": 224, "patch_size": 14}, marks=only_gpu),
        pytest.param({"preset": "vit_l_gelu", "image_size": 224, "patch_size": 14}, marks=only_gpu),
    ],
    ids=["gated", "plain and affine", "vit_l", "vit_l_gelu"],
)
def test_in_bf16_it_is_as_exact_as_the_block(model):
    plain, ours, exact = run_both("bf16", **model)
    of_plain, of_ours = errors(exact, plain), errors(exact, ours)
    # Triton's interpreter cuts what it stores in bf16 off, a GPU rounds: errors are twice as large.
    allowed = 1.25 if DEVICE.type == "cuda" else 2.5
    for name, error in of_ours.items():
        assert error < allowed * of_plain[name] + 2e-3, name


@needs_triton
def test_many_tokens_for_each_program_are_added_up(monkeypatch):
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    monkeypatch.setattr(fused, "ROW_PROGRAMS", 3)
    plain, ours, _ = run_both("fp32", images=9)
    assert max(errors(plain, ours).values()) < 1e-5


@needs_triton
def test_frozen_parameters_and_who_looks_into_a_block():
    config, block = make_block()
    rotary = rotary_table(config, (4, 4), DEVICE)
    forward = types.MethodType(fused.block_forward, block)
    x = torch.randn(2, 17, 192, device=DEVICE)
    seen = []
    handle = block.attn.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    with torch.no_grad():
        torch.testing.assert_close(forward(x, rotary, False), block(x, rotary, False))
    handle.remove()
    assert seen == [x.shape] * 2
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("mlp" in name)
    forward(x, rotary, True).sum().backward()
    assert all((p.grad is not None) == ("mlp" in name) for name, p in block.named_parameters())


def settings(**values):
    engine = {"kernels": "triton", **values.pop("engine", {})}
    return Config.model_validate({"model": MODEL | values, "engine": engine})


@pytest.mark.parametrize(
    ("values", "device", "message"),
    [
        ({}, "cpu", "engine.kernels triton: they need a GPU, not a cpu; use auto or torch"),
        ({"qk_norm": False}, "cuda", "model.qk_norm is off"),
        ({"engine": {"name": "zero3"}}, "cuda", "zero3 has a layer's weights only while that layer runs"),
    ],
)
def test_where_they_cannot_be_used_it_says_why(values, device, message):
    config = settings(**values)
    with pytest.raises(ConfigError, match=message):
        prepare(build_task(config), config.engine, torch.device(device))


def test_what_no_device_can_run_is_refused_before_work_starts_and_all_of_it_at_once():
    engine = {"name": "zero3", "device": "cpu"}
    found = [text for text in cross_field_problems(settings(qk_norm=False, rope=False, engine=engine)) if "kernels" in text]
    assert found == [
        "engine.kernels triton: model.qk_norm is off, model.rope is off, "
        "zero3 has a layer's weights only while that layer runs, they need a GPU, not a cpu; use auto or torch"
    ]
    assert not [text for text in cross_field_problems(settings()) if "kernels" in text]
    assert not [text for text in cross_field_problems(settings(engine={**engine, "kernels": "auto"})) if "kernels" in text]


def test_without_triton_it_says_so_and_auto_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "nepa_dist.kernels", None)
    monkeypatch.delattr(nepa_dist, "kernels", raising=False)
    config = settings()
    with pytest.raises(ConfigError, match="Triton is missing"):
        prepare(build_task(config), config.engine, torch.device("cuda"))
    assert not fused.wanted(config.model, settings(engine={"kernels": "auto"}).engine, torch.device("cuda"))


@needs_triton
def test_without_a_compiler_it_says_so_and_auto_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(fused, "kernels_obstacle", lambda *_: None)
    config, auto = settings(), EngineConfig(kernels="auto")
    assert fused.wanted(config.model, auto, DEVICE)
    assert not caplog.records
    broken = unittest.mock.MagicMock(**{"add_forward.__getitem__.side_effect": RuntimeError("Failed to find C compiler")})
    monkeypatch.setattr(fused, "kernels", fused.kernels)  # put back after the test
    monkeypatch.setitem(sys.modules, "nepa_dist.kernels", broken)
    monkeypatch.setattr(nepa_dist, "kernels", broken)
    with pytest.raises(ValueError, match=r"cannot run a kernel here \(RuntimeError: Failed to find C compiler\)"):
        fused.wanted(config.model, config.engine, DEVICE)
    assert not fused.wanted(config.model, auto, DEVICE)
    assert "Failed to find C compiler" in caplog.text


def test_a_cpu_keeps_its_blocks():
    config = settings(engine={"kernels": "auto"})
    task = build_task(config)
    prepare(task, config.engine, torch.device("cpu"))
    assert "forward" not in vars(task.backbone.blocks[0])


@needs_triton
def test_a_gradient_of_a_gradient_is_refused():
    config, block = make_block()
    x = torch.randn(1, 17, 192, device=DEVICE, requires_grad=True)
    y = fused.block_forward(block, x, rotary_table(config, (4, 4), DEVICE), True)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Grids:
    """Kernels that do nothing but say how many programs they would be."""

    def __init__(self):
        self.seen = {}

    def __getattr__(self, name):
        kernel = unittest.mock.MagicMock()
        kernel.__getitem__.side_effect = lambda grid: self.seen.update({name: grid}) or (lambda *_, **__: None)
        return kernel


def test_a_large_batch_has_no_more_programs_than_a_gpu_takes(monkeypatch):
    """Of a grid a GPU takes 2^31 programs along the first axis and 65,535 along the others."""
    grids = Grids()
    monkeypatch.setattr(fused, "kernels", grids)
    config = Config.model_validate({"model": MODEL | {"image_size": 224, "patch_size": 14}}).model
    with torch.device("meta"):
        block = Block(config, 0.0)
        rotary = rotary_table(config, (16, 16), torch.device("meta"))
        block.attn.attend = lambda q, k, v, causal: q + k + v
        x = torch.empty(16384, 257, config.embed_dim, requires_grad=True)
        fused.block_forward(block, x, rotary, True).sum().backward()
    assert len(grids.seen) == 8
    for name, (first, *others) in grids.seen.items():
        assert first < 2**31, name
        assert all(other < 2**16 for other in others), name
