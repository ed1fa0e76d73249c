"""The engine that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nepa_dist.config import Config
from nepa_dist.engines.base import Engine
from nepa_dist.engines.ddp import DDPEngine
from nepa_dist.engines.fsdp import FSDPEngine
from nepa_dist.engines.zero import ZeroEngine
from nepa_dist.plan import Plan

if TYPE_CHECKING:
    from nepa_dist.tasks.base import Task


def build_engine(task: Task, config: Config, plan: Plan, device: torch.device) -> Engine:
    """Place a task on ``device`` with the engine that the configuration names."""
    if config.engine.name == "ddp":
        return DDPEngine(task, config, plan, device)
    if config.engine.name in ("fsdp2", "hsdp"):
        return FSDPEngine(task, config, plan, device)
    return ZeroEngine(task, config, plan, device)
