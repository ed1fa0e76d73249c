"""What makes a step faster does not change what is learned: loss curves with and without it."""

import itertools

import pytest
import torch

from nepa_dist.config import Config
from nepa_dist.engines.build import build_engine
from nepa_dist.plan import make_plan
from nepa_dist.tasks.build import build_task

MODEL = {"image_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "layer_scale_init": 0.1}
STEPS = 40
TOLERANCE = {"fp32": 1e-5, "bf16_autocast": 1e-3}
"""Largest difference of the loss at any of the steps."""


def curve(precision, device="cpu", **engine):
    """The loss of each step, trained with these settings of the engine."""
    config = Config.model_validate(
        {
            "model": MODEL,
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "optim": {"base_lr": 0.03, "warmup_steps": 5},
            "engine": {"precision": precision, **engine},
        }
    )
    task = build_task(config).train()
    engine_ = build_engine(task, config, make_plan(config, 100), torch.device(device))
    generator = torch.Generator().manual_seed(0)
    # Smooth pictures, of which something can be learned.
    coarse = torch.randn(4, 8, 3, 8, 8, generator=generator)
    batches = [torch.nn.functional.interpolate(images, size=64, mode="bilinear") for images in coarse]
    batches = [images.to(device) for images in batches]
    losses = []
    for step, images in zip(range(STEPS), itertools.cycle(batches), strict=False):
        task.begin_step(step, observe=False)
        for group in engine_.param_groups:
            group["lr"] = 1e-3
        loss, _ = engine_.model({"images": images})
        engine_.backward(loss, last=True)
        engine_.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    "faster",
    [
        {"attention": "dense"},
        {"attention": "dense", "compile": True},
        {"compile": True, "activation_checkpointing": "full"},
        {"compile": True, "activation_checkpointing": "selective"},
    ],
    ids=["dense", "compiled", "compiled, full", "compiled, selective"],
)
def test_the_loss_curve_stays(precision, faster):
    before, after = curve(precision, attention="sdpa"), curve(precision, **faster)
    assert before[-1] < before[0] - 0.05  # it learns
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) < TOLERANCE[precision]
