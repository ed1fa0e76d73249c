"""Ranks and devices: who this process is, and the process group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nepa_dist.config import ConfigError, EngineConfig

ValueT = TypeVar("ValueT")


class World(NamedTuple):
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Largest over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: ValueT) -> list[ValueT]:
        """The values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def join_world(config: EngineConfig, world_size: int) -> World:
    """Read the torchrun-style environment, choose the device, make the process group.

    Args:
        config: device and time-out.
        world_size: ranks that the configuration expects.

    Raises:
        ConfigError: the environment has another number of ranks, or the device does not exist.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size != world_size:
        raise ConfigError([f"WORLD_SIZE is {size}, but cluster.nodes x cluster.gpus_per_node is {world_size}"])
    device = _choose_device(config.device, local_rank)
    if device.type == "cuda":
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    if size > 1 or config.name != "ddp":
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            # One rank has nobody to meet.
            store=None if size > 1 else dist.HashStore(),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=config.timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    return World(rank, local_rank, size, local_size, device)


def leave_world() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _choose_device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError([f"engine.device is {name}, but local rank {local_rank} has no GPU: this machine has {count}"])
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
