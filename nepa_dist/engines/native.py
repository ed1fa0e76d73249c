"""What the engines share that step with this project's own optimizer: micro-batches, clipping, skipping."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nepa_dist.config import Config
from nepa_dist.engines.base import StepResult
from nepa_dist.engines.census import Census
from nepa_dist.engines.prepare import prepare
from nepa_dist.optim import AdamWEMA
from nepa_dist.plan import Plan

if TYPE_CHECKING:
    from nepa_dist.tasks.base import Task


class NativeEngine(ABC):
    """See :class:`nepa_dist.engines.base.Engine`. A subclass sets ``_root`` and ``_optimizer``.

    Args:
        task: the module to train; moved to ``device``.
        config: precision, clipping and optimizer.
        plan: micro-batches per update.
        device: of this rank.
    """

    _root: nn.Module
    """The module that is called: the task, or what wraps it."""
    _optimizer: AdamWEMA
    _census: Census

    def __init__(self, task: Task, config: Config, plan: Plan, device: torch.device) -> None:
        self._task = task.to(device)
        prepare(self._task, config.engine, device)
        self._device = device
        self._accum = plan.grad_accum_steps
        self._clip = config.optim.clip_grad_norm
        self._autocast = config.engine.precision == "bf16_autocast"
        self._bf16 = config.engine.precision == "bf16_params"
        self._micro = 0

    @abstractmethod
    def _average_gradients(self, enabled: bool) -> None:
        """Say before a forward whether its backward averages over the ranks."""

    def model(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward one micro-batch."""
        self._average_gradients(self._micro + 1 == self._accum)
        if self._bf16:
            batch = images_in_bf16(batch)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            loss, logs = self._root(batch)
        return loss, logs

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]:
        """Groups whose ``lr`` the loop sets."""
        return self._optimizer.param_groups

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate ``loss / grad_accum_steps``."""
        self._micro += 1
        if last != (self._micro == self._accum):
            raise RuntimeError(f"micro-batch {self._micro} of {self._accum} was announced with last={last}")
        (loss / self._accum).backward()

    @abstractmethod
    def _swap(self) -> None:
        """Exchange weights and averages."""

    @contextmanager
    def weights(self, *, ema: bool) -> Iterator[None]:
        """Swap the averages in for the duration of the context."""
        if not ema:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def close(self) -> None:
        """Drop the model before the process group ends: a living DDP module can abort a finished process at exit."""
        del self._root, self._optimizer, self._task, self._census
        gc.collect()

    def _update(self, parameters: Sequence[Tensor], norm: Tensor, *, observe: bool) -> StepResult:
        """Clip the gradients of ``parameters`` by their global norm and update, unless the norm is not finite."""
        applied = norm.isfinite().float()
        if self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(parameters), self._clip, norm)
        self._optimizer.found_inf = 1 - applied
        self._optimizer.observe = self._census.add if observe else None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._micro = 0
        return StepResult(norm, applied, self._census.take(norm, self._clip) if observe else {})


def images_in_bf16(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch for weights in bf16. What a loss takes besides stays exact: soft labels in bf16 would not add up to 1."""
    return {**batch, "images": batch["images"].bfloat16()}


def in_bf16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those of floating point in bf16."""
    return {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}


def swap(weight: Tensor, average: Tensor) -> None:
    """Exchange the contents of a weight and its average."""
    held = weight.detach().clone()
    weight.copy_(average)
    average.copy_(held)
