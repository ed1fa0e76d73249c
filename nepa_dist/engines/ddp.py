"""Every rank holds the whole model; gradients are averaged. With one process this is plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from nepa_dist.config import Config
from nepa_dist.engines.base import NamedStateSource, ParameterState, StepResult, check_state, copy_state, gradient_norm
from nepa_dist.engines.census import Census, whole
from nepa_dist.engines.native import NativeEngine, in_bf16, swap
from nepa_dist.optim import AdamWEMA, param_groups
from nepa_dist.plan import Plan

if TYPE_CHECKING:
    from nepa_dist.tasks.base import Task


def _reduce_in_bf16(bucket: Any) -> torch.futures.Future[Tensor]:
    """Average a bucket over the ranks in bf16. (torch's own hook refuses gloo, which can do it.)"""
    work = dist.all_reduce(bucket.buffer().bfloat16() / dist.get_world_size(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))
    return future


class _Bf16Copy(nn.Module):
    """Runs a module on a bf16 copy of its weights, made anew in each forward; gradients arrive at the fp32 ones."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        return functional_call(self.module, in_bf16(dict(self.module.named_parameters())), (batch,))


class DDPEngine(NativeEngine):
    """See :class:`NativeEngine`."""

    def __init__(self, task: Task, config: Config, plan: Plan, device: torch.device) -> None:
        super().__init__(task, config, plan, device)
        groups = param_groups(task.named_parameters(), config.optim.weight_decay, task.lr_layer)
        self._optimizer = AdamWEMA(groups, config.optim)
        self._census = Census(whole(task.named_parameters()), device, None)
        self._root = _Bf16Copy(self._task) if self._bf16 else self._task
        if dist.is_initialized() and dist.get_world_size() > 1:
            devices = [device] if device.type == "cuda" else None
            if config.engine.compile:
                # It would split the graph of each block at the borders of gradient buckets. Single blocks are compiled, so
                # gradients are there block by block anyhow; and not all releases of torch can split a checkpointed one.
                torch._dynamo.config.optimize_ddp = False
            # Weights are equal by construction: keyed initialisation, one checkpoint.
            self._root = DistributedDataParallel(self._root, device_ids=devices, gradient_as_bucket_view=True, init_sync=False)
            if config.engine.reduce_dtype == "bf16":
                self._root.register_comm_hook(None, lambda _, bucket: _reduce_in_bf16(bucket))

    def _average_gradients(self, enabled: bool) -> None:
        if isinstance(self._root, DistributedDataParallel):
            self._root.require_backward_grad_sync = enabled

    @torch.no_grad()
    def step(self, *, observe: bool = False) -> StepResult:
        """Clip, update unless the norm is not finite, clear."""
        parameters = list(self._task.parameters())
        return self._update(parameters, gradient_norm(parameters), observe=observe)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"weight": parameter.detach(), **self._optimizer.state.get(parameter, {})}

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Full state of every parameter."""
        for name, parameter in self._task.named_parameters():
            yield name, self._state(parameter)

    def load_named_state(self, source: NamedStateSource, *, keep_average: bool = False) -> None:
        """Set every parameter's state; nothing changes if names do not fit."""
        self._optimizer.keep_average = keep_average
        parameters = dict(self._task.named_parameters())
        check_state({name: list(p.shape) for name, p in parameters.items()}, source)
        for name, parameter in parameters.items():
            copy_state(name, self._state(parameter), source.read(name))

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, state in self._optimizer.state.items():
            swap(parameter, state["ema"])
