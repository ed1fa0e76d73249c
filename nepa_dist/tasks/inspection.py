"""Looks into a model with a few images beside training: attention logits, LayerScale, and whether the future leaks.

One or two forward passes without gradients through the engine, so that weights which an engine shards are whole while they are
looked at. Nothing that training computes later depends on them: random numbers are keyed by the step.

Legend: B images, T tokens, D width, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nepa_dist.metrics.registry import DEPTHS
from nepa_dist.model import Attention, LayerScale
from nepa_dist.tasks.base import Task

NUM_IMAGES = 4
"""Images of the micro-batch that are looked at."""

Forward = Callable[[Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


@torch.no_grad()
def inspect(
    task: Task, forward: Forward, batch: Mapping[str, Tensor], all_reduce_max: Callable[[Tensor], Tensor], *, audit: bool
) -> dict[str, Tensor]:
    """Measure what no loss shows. A collective.

    Args:
        task: whose blocks are looked into.
        forward: the engine's root.
        batch: a training micro-batch, as :meth:`Task.forward` takes it.
        all_reduce_max: largest over ranks, in place.
        audit: in pretraining, test for a future leak too, with a second forward pass.

    Returns:
        0-d fp32 tensors, equal on all ranks: ``attention_logit_max.*``, ``layer_scale_abs_mean.*`` if the model has it, and
        ``future_leak_ratio``: where patches in the second half of each image are replaced by those of another image (of the
        negative, if there is but one), the largest change of a prediction before them over the largest prediction.
    """
    few = {name: tensor[:NUM_IMAGES] for name, tensor in batch.items()}
    seen: dict[str, Tensor] = {}
    task.looked_into, training = True, task.training
    task.eval()
    try:
        # Compiled blocks would be compiled again for the hooks.
        with torch.compiler.set_stance("force_eager"):
            with _watched(task, seen):
                hidden = forward(few)[1].get("hidden")
            largest = [seen[f"attention_logit_max.{depth}"] for depth in DEPTHS]
            names = [f"attention_logit_max.{depth}" for depth in DEPTHS]
            if audit and hidden is not None:
                changed, num_same = _change_the_future(few["images"], task.backbone.config.patch_size)
                difference = (forward({**few, "images": changed})[1]["hidden"] - hidden)[:, :num_same]
                largest.append(difference.abs().max().float() / hidden.abs().max().float())
                names.append("future_leak_ratio")
    finally:
        task.looked_into = False
        task.train(training)
    worst = all_reduce_max(torch.stack(largest))
    return seen | dict(zip(names, worst.unbind(), strict=True))


def _change_the_future(images: Tensor, patch_size: int) -> tuple[Tensor, int]:
    """Images [B, 3, height, width] with other patches after the middle, and the number of tokens (CLS first) that are not."""
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    num_kept = (rows * columns + 1) // 2
    other = images.roll(1, 0) if len(images) > 1 else -images
    patch = torch.arange(rows * columns, device=images.device).view(rows, columns)
    kept = (patch < num_kept).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    return torch.where(kept, images, other), 1 + num_kept


@contextmanager
def _watched(task: Task, seen: dict[str, Tensor]) -> Iterator[None]:
    """Within the context, what passes through the first, middle and last block is measured into ``seen``."""
    blocks = task.backbone.blocks
    handles = []
    for depth, index in zip(DEPTHS, (0, len(blocks) // 2, len(blocks) - 1), strict=True):
        block: Any = blocks[index]
        handles.append(block.attn.register_forward_pre_hook(functools.partial(_see_logits, seen, depth)))
        if isinstance(block.ls1, LayerScale):
            for scale in (block.ls1, block.ls2):
                handles.append(scale.register_forward_pre_hook(functools.partial(_see_scale, seen, depth)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _see_logits(seen: dict[str, Tensor], depth: str, attention: nn.Module, arguments: tuple[Any, ...]) -> None:
    assert isinstance(attention, Attention)
    x, rotary, causal = arguments
    largest = torch.zeros((), device=x.device)
    for image in x.split(1):  # [H, T, T] of one image is the most that is held
        q, k, _ = (part.float() for part in attention.heads(image, rotary))
        logits = (q @ k.transpose(-1, -2)).abs() * q.shape[-1] ** -0.5
        largest = torch.maximum(largest, (logits.tril() if causal else logits).max())
    seen[f"attention_logit_max.{depth}"] = largest


def _see_scale(seen: dict[str, Tensor], depth: str, scale: nn.Module, arguments: tuple[Any, ...]) -> None:
    assert isinstance(scale, LayerScale)
    half, key = scale.gamma.abs().mean().float() / 2, f"layer_scale_abs_mean.{depth}"
    seen[key] = seen[key] + half if key in seen else half
