"""Attention, activation checkpointing and compilation, applied to the blocks of a backbone in one order for every engine.

The order is attention, checkpoint, compile, shard. A block keeps its class and its parameters keep their names: only the
function behind ``block(...)`` is replaced, so the hooks of an engine stay outside of what is compiled or computed again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nepa_dist.attention import choose_attention
from nepa_dist.config import ConfigError, EngineConfig
from nepa_dist.linear import Linear, prefers_onednn

if TYPE_CHECKING:
    from nepa_dist.tasks.base import Task

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    torch.ops.nepa_dist.linear.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""Operations whose results selective checkpointing keeps: they take the time, the rest takes the memory."""


def keep_compiled(folder: Path) -> None:
    """Have what is compiled kept in ``folder``, for the next start; TORCHINDUCTOR_CACHE_DIR, where it is set, is kept."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve()))


def prepare(task: Task, config: EngineConfig, device: torch.device) -> None:
    """Choose the attention of ``task.backbone``, wrap the forward of every block and compile the task's loss, in place.

    Args:
        task: the module to train.
        config: ``attention``, ``patch_embed``, ``activation_checkpointing`` and ``compile``.
        device: where it will run.

    Raises:
        ConfigError: the device does not have this attention.
    """
    try:
        attend = choose_attention(config.attention, device)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    task.backbone.patch_embed.as_matmul = config.patch_embed == "matmul"
    onednn = device.type == "cpu" and config.precision == "fp32" and prefers_onednn()
    for part in task.backbone.modules():
        if isinstance(part, Linear):
            part.onednn = onednn
    for block in cast(Any, task.backbone.blocks):
        block.attn.attend = attend
        forward: Callable[..., Any] = block.forward
        if config.activation_checkpointing != "none":
            forward = _checkpointed(forward, selective=config.activation_checkpointing == "selective")
        if config.compile:
            # A part that cannot be compiled is an error: run in between, it would cost more than compiling saves.
            forward = torch.compile(forward, fullgraph=True)
        if forward is not block.forward:
            block.forward = forward
    if config.compile:
        task.compile_loss()


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
