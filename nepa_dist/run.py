"""What one rank of a run works with, from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config
from nepa_dist.data.containers import Container
from nepa_dist.engines.base import Engine
from nepa_dist.engines.mesh import World
from nepa_dist.metrics.profile import Stopwatch
from nepa_dist.plan import Plan
from nepa_dist.state import TrainState
from nepa_dist.tasks.base import Task


@dataclass
class Run:
    """The parts that :mod:`nepa_dist.train` puts together."""

    config: Config
    plan: Plan
    world: World
    task: Task
    engine: Engine
    store: CheckpointStore
    state: TrainState
    container: Container
    num_parameters: int
    """Of the whole task, counted before an engine cuts it."""
    watch: Stopwatch = field(init=False)
    """Where the time of a step goes."""

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.world.device, self.task.backbone.patch_embed)
