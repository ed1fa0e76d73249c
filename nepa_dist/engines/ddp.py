"""Every rank holds the whole model; gradients are averaged. With one process this is plain PyTorch."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nepa_dist.config import Config
from nepa_dist.engines.base import NamedStateSource, ParameterState, StepResult, check_state, copy_state, gradient_norm
from nepa_dist.optim import AdamWEMA, param_groups
from nepa_dist.plan import Plan


class DDPEngine:
    """See :class:`nepa_dist.engines.base.Engine`.

    Args:
        task: the module to train; moved to ``device``.
        config: precision, clipping and optimizer.
        plan: micro-batches per update.
        device: of this rank.
    """

    def __init__(self, task: nn.Module, config: Config, plan: Plan, device: torch.device) -> None:
        self._task = task.to(device)
        self._device = device
        self._accum = plan.grad_accum_steps
        self._clip = config.optim.clip_grad_norm
        self._autocast = config.engine.precision == "bf16_autocast"
        self._optimizer = AdamWEMA(param_groups(task.parameters(), config.optim.weight_decay), config.optim)
        self._root: nn.Module = self._task
        if dist.is_initialized() and dist.get_world_size() > 1:
            devices = [device] if device.type == "cuda" else None
            # Weights are equal by construction: keyed initialisation, one checkpoint.
            self._root = DistributedDataParallel(self._task, device_ids=devices, gradient_as_bucket_view=True, init_sync=False)
        self._micro = 0

    def model(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward one micro-batch."""
        self._micro += 1
        if isinstance(self._root, DistributedDataParallel):
            # DDP decides in forward whether this backward will average; only the last micro-batch does.
            self._root.require_backward_grad_sync = self._micro == self._accum
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            loss, logs = self._root(batch)
        return loss, logs

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]:
        """Groups whose ``lr`` the loop sets."""
        return self._optimizer.param_groups

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate ``loss / grad_accum_steps``."""
        if last != (self._micro == self._accum):
            raise RuntimeError(f"micro-batch {self._micro} of {self._accum} was announced with last={last}")
        (loss / self._accum).backward()

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip, update unless the norm is not finite, clear."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = gradient_norm(parameters)
        applied = norm.isfinite().float()
        if self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        self._optimizer.found_inf = 1 - applied
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._micro = 0
        return StepResult(norm, applied)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"weight": parameter.detach(), **self._optimizer.state[parameter]}

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Full state of every parameter."""
        for name, parameter in self._task.named_parameters():
            yield name, self._state(parameter)

    def load_named_state(self, source: NamedStateSource) -> None:
        """Set every parameter's state; nothing changes if names do not fit."""
        parameters = dict(self._task.named_parameters())
        check_state({name: list(p.shape) for name, p in parameters.items()}, source)
        for name, parameter in parameters.items():
            copy_state(name, self._state(parameter), source.read(name))

    @contextmanager
    def weights(self, *, ema: bool) -> Iterator[None]:
        """Swap the averages in for the duration of the context."""
        if not ema:
            yield
            return
        pairs = [(p, self._optimizer.state[p]["ema"]) for p in self._task.parameters() if "ema" in self._optimizer.state[p]]
        self._swap(pairs)
        try:
            yield
        finally:
            self._swap(pairs)

    @staticmethod
    @torch.no_grad()
    def _swap(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for weight, average in pairs:
            held = weight.detach().clone()
            weight.copy_(average)
            average.copy_(held)

    def close(self) -> None:
        """Drop the model before the process group ends: a living DDP module can abort a finished process at exit."""
        del self._root, self._optimizer, self._task
        gc.collect()
