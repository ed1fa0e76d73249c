"""Parameters, gradients and optimizer state sharded over the ranks (FSDP2); with replicas of the shards, HSDP.

Each block is one unit, the rest of the task is the root. The optimizer works on the local shards as plain tensors: they share
their storage with the DTensors that FSDP gathers, so AdamW, the moving average and the skipping of a step are those of every
other engine, and nothing of the optimizer is ever gathered but to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nepa_dist.config import Config
from nepa_dist.engines.base import (
    NamedStateSource,
    ParameterState,
    StepResult,
    check_fields,
    check_state,
    copy_state,
    gradient_norm,
)
from nepa_dist.engines.census import Census, whole
from nepa_dist.engines.native import NativeEngine, swap
from nepa_dist.optim import AdamWEMA, param_groups
from nepa_dist.plan import Plan

if TYPE_CHECKING:
    from nepa_dist.tasks.base import Task


class FSDPEngine(NativeEngine):
    """See :class:`NativeEngine`.

    Args:
        task: the module to train; its parameters become shards on ``device``.
        config: precision, clipping, optimizer; ``engine.name`` fsdp2 or hsdp.
        plan: micro-batches per update.
        device: of this rank.
    """

    def __init__(self, task: Task, config: Config, plan: Plan, device: torch.device) -> None:
        super().__init__(task, config, plan, device)
        mesh = _mesh(config, device)
        self._shard_group = mesh["shard"].get_group()
        _shard(self._task, mesh, config)
        self._root = self._task
        self._parameters = {name: cast(DTensor, p) for name, p in task.named_parameters()}
        self._shards = {
            name: nn.Parameter(p.to_local().detach(), requires_grad=p.requires_grad) for name, p in self._parameters.items()
        }
        groups = param_groups(self._shards.items(), config.optim.weight_decay, task.lr_layer)
        self._optimizer = AdamWEMA(groups, config.optim)
        self._census = Census(whole(self._shards.items()), device, self._shard_group)

    def _refresh(self) -> None:
        """Point the optimizer's tensors at the storage of the shards: FSDP moves uneven ones at its first forward."""
        for name, parameter in self._parameters.items():
            self._shards[name].data = parameter.to_local().detach()

    def _average_gradients(self, enabled: bool) -> None:
        # Gradients stay whole on each rank until the last micro-batch, whose backward reduces and scatters their sum.
        cast(FSDPModule, self._task).set_requires_gradient_sync(enabled)

    @torch.no_grad()
    def step(self, *, observe: bool = False) -> StepResult:
        """Clip, update unless the norm is not finite, clear."""
        self._refresh()
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            self._shards[name].grad = None if gradient is None else cast(DTensor, gradient).to_local()
        shards = list(self._shards.values())
        squares = gradient_norm(shards).square()
        dist.all_reduce(squares, group=self._shard_group)
        self._task.zero_grad(set_to_none=True)  # the shards hold what the update needs
        return self._update(shards, squares.sqrt(), observe=observe)

    def _state(self, name: str) -> dict[str, Tensor]:
        """Local shards of one parameter's state; ``step`` is whole."""
        shard = self._shards[name]
        return {"weight": shard.detach(), **self._optimizer.state.get(shard, {})}

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Full state of every parameter, gathered one at a time."""
        self._refresh()
        for name, parameter in self._parameters.items():
            yield name, {field: self._gather(parameter, value) for field, value in self._state(name).items()}

    @staticmethod
    def _gather(parameter: DTensor, value: Tensor) -> Tensor:
        if value.dim() == 0:
            return value
        mesh, placements = parameter.device_mesh, parameter.placements
        shard = DTensor.from_local(value, mesh, placements, shape=parameter.shape, stride=parameter.stride())
        return shard.full_tensor()

    def load_named_state(self, source: NamedStateSource, *, keep_average: bool = False) -> None:
        """Set every parameter's state; each rank keeps its shard of what it reads."""
        self._optimizer.keep_average = keep_average
        check_state({name: list(p.shape) for name, p in self._parameters.items()}, source)
        self._refresh()
        for name, parameter in self._parameters.items():
            shards, whole = self._state(name), source.read(name)
            shapes = {field: value.shape if value.dim() == 0 else parameter.shape for field, value in shards.items()}
            check_fields(name, shapes, whole)
            copy_state(name, shards, {field: self._cut(parameter, value) for field, value in whole.items()})

    def _cut(self, parameter: DTensor, value: Tensor) -> Tensor:
        if value.dim() == 0:
            return value
        whole = value.to(self._device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()

    @torch.no_grad()
    def _swap(self) -> None:
        self._refresh()
        for shard, state in self._optimizer.state.items():
            swap(shard, state["ema"])
        # What a forward has gathered is stale now.
        for module in self._task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def close(self) -> None:
        """Drop the shards and the model."""
        del self._parameters, self._shards
        super().close()


def _mesh(config: Config, device: torch.device) -> DeviceMesh:
    world, size = config.cluster.world_size, config.state_shards
    if config.engine.name == "hsdp":
        return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def _shard(task: nn.Module, mesh: DeviceMesh, config: Config) -> None:
    reshard = config.engine.reshard_after_forward
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.engine.precision == "bf16_params" else None,
        reduce_dtype=torch.bfloat16 if config.engine.reduce_dtype == "bf16" else torch.float32,
        # The engine casts the batch; tables of RoPE, which are inputs of the blocks, stay in fp32.
        cast_forward_inputs=False,
    )
    for block in task.get_submodule("backbone.blocks").children():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(task, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
