"""The model equals the official one: figures in tests/golden were recorded from it (random weights, eval mode, fp32).

Each file holds official weights, an input batch, outputs, and for pretraining the loss, gradients and 20 optimizer steps.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nepa_dist.config import Config, OptimConfig
from nepa_dist.engines.base import gradient_norm
from nepa_dist.official import from_official, to_official
from nepa_dist.optim import AdamWEMA, param_groups
from nepa_dist.tasks.build import build_task
from nepa_dist.transfer import transfer

GOLDEN = Path(__file__).parent / "golden"
PRETRAIN = ["pretrain_gelu", "pretrain_swiglu"]


def read(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weight/"): value for key, value in tensors.items() if key.startswith("weight/")}
    return weights, config, tensors


def load(name):
    weights, config, tensors = read(name)
    state, config, ones = from_official(weights, config)
    assert not ones
    task = build_task(config).eval()
    task.load_state_dict(state, strict=True)
    return task, config, weights, tensors


def assert_outputs_and_gradients(name, device="cpu", tolerance=1e-5):
    task, config, _, golden = load(name)
    task, images = task.to(device), golden["pixel_values"].to(device)
    features = task.backbone(images, causal=True)
    torch.testing.assert_close(features.embed.cpu(), golden["input_embedding"], atol=tolerance, rtol=0)
    torch.testing.assert_close(features.hidden.cpu(), golden["prediction"], atol=tolerance, rtol=0)
    loss, _ = task({"images": images})
    torch.testing.assert_close(loss.cpu(), golden["loss"], atol=tolerance, rtol=0)
    loss.backward()
    # to_official translates names, so let it translate the gradients too.
    gradients, _ = to_official({name: parameter.grad.cpu() for name, parameter in task.named_parameters()}, config)
    for key, value in gradients.items():
        expected = golden[f"grad/{key}"]
        # Relative to the tensor's norm; the gradient of a key bias is zero up to rounding, hence the floor.
        assert (value - expected).norm() <= tolerance * expected.norm() + tolerance / 1000, key


@pytest.mark.parametrize("name", PRETRAIN)
def test_embeddings_predictions_loss_and_gradients(name):
    assert_outputs_and_gradients(name)


def assert_twenty_steps(name, device="cpu"):
    task, _, _, golden = load(name)
    task, images = task.to(device), golden["pixel_values"].to(device)
    optimizer = AdamWEMA(param_groups(task.named_parameters(), 0.05, task.lr_layer), OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    parameters = list(task.parameters())
    for step in range(20):
        loss, _ = task({"images": images})
        optimizer.zero_grad()
        loss.backward()
        norm = gradient_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()
        torch.testing.assert_close(loss.detach().cpu(), golden["trajectory/loss"][step], atol=1e-4, rtol=0)
        torch.testing.assert_close(norm.cpu(), golden["trajectory/grad_norm"][step], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PRETRAIN)
def test_twenty_optimizer_steps(name):
    assert_twenty_steps(name)


def test_bidirectional_classifier():
    task, _, _, golden = load("classify_bidirectional")
    torch.testing.assert_close(task.logits(golden["pixel_values"]), golden["logits"], atol=1e-5, rtol=0)


def test_a_published_classifier_moves_into_a_fine_tuning_run(tmp_path):
    weights, settings, golden = read("classify_bidirectional")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(weights, tmp_path / "model.safetensors")
    recipe = {"task": "finetune", "model": from_official(weights, settings).config.model, "finetune": {"num_classes": 10}}
    task = build_task(Config.model_validate(recipe)).eval()
    account = transfer(task, tmp_path, ema=False)
    assert account.fresh == account.left_over == ()
    torch.testing.assert_close(task.logits(golden["pixel_values"]), golden["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*PRETRAIN, "classify_bidirectional"])
def test_weights_go_back_unchanged(name):
    task, config, weights, _ = load(name)
    state, official_config = to_official(task.state_dict(), config)
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    again = from_official(state, official_config)
    assert (again.config.model, again.config.finetune) == (config.model, config.finetune)
    assert all(torch.equal(again.state[key], tensor) for key, tensor in task.state_dict().items())
