"""Activation checkpointing and compilation, applied to the blocks of a backbone in one fixed order for every engine.

The order is checkpoint, compile, shard. A block keeps its class and its parameters keep their names: only the function behind
``block(...)`` is replaced, so the hooks of an engine stay outside of what is compiled or computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nepa_dist.config import EngineConfig

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""Operations whose results selective checkpointing keeps: they take the time, the rest takes the memory."""


def prepare(task: nn.Module, config: EngineConfig) -> None:
    """Wrap the forward of every block of ``task.backbone`` in place.

    Args:
        task: the module to train.
        config: ``activation_checkpointing`` and ``compile``.
    """
    for block in task.get_submodule("backbone.blocks").children():
        forward: Callable[..., Any] = block.forward
        if config.activation_checkpointing != "none":
            forward = _checkpointed(forward, selective=config.activation_checkpointing == "selective")
        if config.compile:
            forward = torch.compile(forward)
        if forward is not block.forward:
            block.forward = forward


def _checkpointed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = _selective_contexts

    @functools.wraps(forward)
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, **options)

    return run


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
