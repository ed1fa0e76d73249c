"""What the loop and the engines know of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from nepa_dist.config import Config
from nepa_dist.metrics.collapse import AllReduce
from nepa_dist.model import VisionTransformer


class Task(nn.Module, ABC):
    """A backbone, a head, and the loss that trains them.

    Parameters are named ``backbone.*`` and ``head.*`` in every checkpoint. The loss is computed inside ``forward``, so that
    hooks of an engine and compilation see the whole graph.
    """

    backbone: VisionTransformer
    head: nn.Module

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one micro-batch.

        Args:
            batch: ``images`` [B, 3, H, W] float32, normalised; ``labels`` and ``ids`` [B] int64.

        Returns:
            The mean loss (0-d, fp32) and further 0-d values to log, by metric name.
        """

    def begin_step(self, step: int, *, observe: bool) -> None:
        """Prepare for one optimizer update.

        Args:
            step: number of finished updates; keys everything random that belongs to the step and not to a sample.
            observe: keep from the step's last micro-batch what :meth:`health` needs.
        """

    def health(self, all_reduce: AllReduce | None = None) -> dict[str, Tensor]:
        """Gauges of the representation from the last observed step, 0-d tensors by metric name. A collective."""
        return {}


def build_task(config: Config) -> Task:
    """The task that a configuration names, with its initial weights, on the CPU."""
    from nepa_dist.tasks.pretrain import PretrainTask

    return {"pretrain": PretrainTask}[config.task](config.model, config.objective, seed=config.seed)
