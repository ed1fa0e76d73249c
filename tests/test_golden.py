"""The model equals the official one: figures in tests/golden were recorded from it (random weights, eval mode, fp32).

Each file holds official weights, an input batch, outputs, and for pretraining the loss, gradients and 20 optimizer steps.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nepa_dist.config import OptimConfig
from nepa_dist.engines.base import gradient_norm
from nepa_dist.export import load_official, to_official
from nepa_dist.optim import AdamWEMA, param_groups

GOLDEN = Path(__file__).parent / "golden"
PRETRAIN = ["pretrain_gelu", "pretrain_swiglu"]


def load(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weight/"): value for key, value in tensors.items() if key.startswith("weight/")}
    return load_official(weights, config), weights, tensors


@pytest.mark.parametrize("name", PRETRAIN)
def test_embeddings_predictions_loss_and_gradients(name):
    task, _, golden = load(name)
    features = task.backbone(golden["pixel_values"], causal=True)
    torch.testing.assert_close(features.embed, golden["input_embedding"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.hidden, golden["prediction"], atol=1e-5, rtol=0)
    loss, _ = task({"images": golden["pixel_values"]})
    torch.testing.assert_close(loss, golden["loss"], atol=1e-5, rtol=0)
    loss.backward()
    for parameter in task.parameters():  # to_official translates names, so let it translate the gradients too
        parameter.data = parameter.grad
    gradients, _ = to_official(task)
    for key, value in gradients.items():
        expected = golden[f"grad/{key}"]
        # Relative to the tensor's norm; the gradient of a key bias is zero up to rounding, hence the floor.
        assert (value - expected).norm() <= 1e-5 * expected.norm() + 1e-8, key


@pytest.mark.parametrize("name", PRETRAIN)
def test_twenty_optimizer_steps(name):
    task, _, golden = load(name)
    optimizer = AdamWEMA(param_groups(task.named_parameters(), 0.05, task.lr_layer), OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    parameters = list(task.parameters())
    for step in range(20):
        loss, _ = task({"images": golden["pixel_values"]})
        optimizer.zero_grad()
        loss.backward()
        norm = gradient_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()
        torch.testing.assert_close(loss.detach(), golden["trajectory/loss"][step], atol=1e-4, rtol=0)
        torch.testing.assert_close(norm, golden["trajectory/grad_norm"][step], atol=1e-4, rtol=1e-4)


def test_bidirectional_classifier():
    task, _, golden = load("classify_bidirectional")
    torch.testing.assert_close(task.logits(golden["pixel_values"]), golden["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*PRETRAIN, "classify_bidirectional"])
def test_weights_go_back_unchanged(name):
    task, weights, _ = load(name)
    state, config = to_official(task)
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    again = load_official(state, config)
    assert all(torch.equal(a, b) for a, b in zip(task.state_dict().values(), again.state_dict().values(), strict=True))
