"""Linear layers by oneDNN: the same numbers, only where they are meant to be, and compiled and checkpointed like any other."""

import pytest
import torch

from nepa_dist import linear
from nepa_dist.config import Config
from nepa_dist.engines import prepare as preparing
from nepa_dist.linear import Linear
from nepa_dist.tasks.build import build_task

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")
SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "layer_scale_init": 0.5}


@pytest.fixture
def calls(monkeypatch):
    """Counts what oneDNN computes; no layer is too small."""
    monkeypatch.setattr(linear, "FEWEST_PRODUCTS", 0)
    counted = []
    product = linear._product
    monkeypatch.setattr(linear, "_product", lambda *args: counted.append(1) or product(*args))
    return counted


def results(layer, x):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    out.backward(torch.ones_like(out).cumsum(-1))
    return out, x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24)])
def test_outputs_and_gradients_are_those_of_torch(calls, shape):
    torch.manual_seed(0)
    layer, x = Linear(24, 40), torch.randn(shape)
    expected = results(layer, x)
    assert not calls
    layer.onednn = True
    for ours, theirs in zip(results(layer, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert len(calls) == 3


def test_what_is_not_meant_for_it_stays_with_torch(calls, monkeypatch):
    layer = Linear(8, 8)
    layer.onednn = True
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 8)).dtype == torch.bfloat16
    layer.double()(torch.ones(2, 8, dtype=torch.float64))
    without_bias = Linear(8, 8, bias=False)
    without_bias.onednn = True
    without_bias(torch.ones(2, 8))
    monkeypatch.setattr(linear, "FEWEST_PRODUCTS", 2 * 8 * 8 + 1)
    layer.float()(torch.ones(2, 8))
    assert not calls


@pytest.mark.parametrize(
    ("preferred", "device", "precision", "used"),
    [
        (True, "cpu", "fp32", True),
        (False, "cpu", "fp32", False),
        (True, "cuda", "fp32", False),
        (True, "cpu", "bf16_autocast", False),
    ],
)
def test_engines_ask_for_it_on_such_processors_in_fp32(monkeypatch, preferred, device, precision, used):
    monkeypatch.setattr(preparing, "prefers_onednn", lambda: preferred)
    config = Config.model_validate({"model": SMALL, "engine": {"precision": precision}})
    task = build_task(config)
    preparing.prepare(task, config.engine, torch.device(device))
    layers = [part for part in task.modules() if isinstance(part, Linear)]
    assert len(layers) == 4 * 2
    assert {layer.onednn for layer in layers} == {used}


@pytest.mark.parametrize("engine", [{"compile": True}, {"activation_checkpointing": "selective"}])
def test_a_task_learns_the_same(calls, monkeypatch, engine):
    monkeypatch.setattr(preparing, "prefers_onednn", lambda: True)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="aot_eager", **options))
    gradients = []
    for settings in ({"precision": "bf16_autocast"}, {"precision": "fp32", **engine}):
        config = Config.model_validate({"model": SMALL, "engine": settings})
        task = build_task(config)
        preparing.prepare(task, config.engine, torch.device("cpu"))
        torch.manual_seed(0)
        loss, _ = task.eval()({"images": torch.randn(2, 3, 32, 32)})
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in task.named_parameters()})
    assert len(calls) == 3 * 4 * 2
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-4, msg=name)
