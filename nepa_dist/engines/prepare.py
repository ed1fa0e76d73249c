"""Attention, fp8, kernels, checkpointing and compilation, applied to the blocks of a backbone in one order for every engine.

The order is attention, fp8, kernels, checkpoint, compile, shard. A block keeps its class and its parameters keep their names:
only the function behind ``block(...)`` is replaced, so the hooks of an engine stay outside of what is compiled or computed
again.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from nepa_dist.attention import choose_attention
from nepa_dist.config import ConfigError, EngineConfig
from nepa_dist.fp8 import convert
from nepa_dist.fused import block_forward, wanted
from nepa_dist.linear import Linear, prefers_onednn

if TYPE_CHECKING:
    from nepa_dist.tasks.base import Task

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Around a forward and around its repetition in backward."""

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_mm.default,
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
    """Choose attention and products of ``task.backbone``, wrap the forward of every block, compile the task's loss; in place.

    Args:
        task: the module to train.
        config: ``attention``, ``fp8``, ``kernels``, ``patch_embed``, ``activation_checkpointing`` and ``compile``.
        device: where it will run.

    Raises:
        ConfigError: the device does not have this attention, no fp8, or cannot run the kernels.
    """
    try:
        attend = choose_attention(config.attention, device)
        if config.fp8 != "off":
            convert(cast(Any, task.backbone.blocks), config.fp8, device)
        fused = wanted(task.backbone.config, config, device)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    fastest = "matmul" if device.type == "cuda" else "conv"
    task.backbone.patch_embed.as_matmul = (fastest if config.patch_embed == "auto" else config.patch_embed) == "matmul"
    onednn = device.type == "cpu" and config.precision == "fp32" and prefers_onednn()
    for part in task.backbone.modules():
        if isinstance(part, Linear):
            part.onednn = onednn
    for block in cast(Any, task.backbone.blocks):
        block.attn.attend = attend
        # Bound as a method is, so that all blocks share what is compiled.
        forward: Callable[..., Any] = types.MethodType(block_forward, block) if fused else block.forward
        if config.activation_checkpointing != "none":
            # A compiled block gets its parameters as inputs, which are kept like others.
            copied = config.name == "ddp" and config.precision == "bf16_params" and not config.compile
            selective = config.activation_checkpointing == "selective"
            forward = _checkpointed(forward, block if copied else None, selective=selective)
        if config.compile:
            # A part that cannot be compiled is an error: run in between, it would cost more than compiling saves.
            forward = torch.compile(forward, fullgraph=True)
        if forward != block.forward:
            block.forward = forward
    if config.compile:
        task.compile_loss()


def _checkpointed(forward: Callable[..., Any], block: nn.Module | None, *, selective: bool) -> Callable[..., Any]:
    """``forward``, computed again in backward; with ``block``, with the parameters that it had in forward, which are copies."""
    # Without a policy there is no context_fn: torch.compile takes none but that of one.
    options: dict[str, Any] = {"context_fn": _selective_contexts} if selective else {}

    @functools.wraps(forward)
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        if block is None:
            return checkpoint(forward, *args, use_reentrant=False, **options)
        contexts = options.get("context_fn", noop_context_fn)
        again = functools.partial(_again_with, block, dict(block.named_parameters()), contexts)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=again)

    return run


def _again_with(block: nn.Module, parameters: dict[str, Tensor], contexts: Callable[[], Contexts]) -> Contexts:
    forward, again = contexts()
    return forward, _holding(block, parameters, again)


@contextmanager
def _holding(block: nn.Module, parameters: dict[str, Tensor], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Within the context these are the block's parameters."""
    places = {name: block.get_submodule(name.rpartition(".")[0])._parameters for name in parameters}
    before = {name: place[name.rpartition(".")[2]] for name, place in places.items()}
    try:
        for name, place in places.items():
            place[name.rpartition(".")[2]] = cast(nn.Parameter, parameters[name])
        with inner:
            yield
    finally:
        for name, place in places.items():
            place[name.rpartition(".")[2]] = before[name]


def _selective_contexts() -> Contexts:
    contexts: Contexts = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
