"""The task that a configuration names."""

from __future__ import annotations

from nepa_dist.config import Config, ConfigError
from nepa_dist.tasks.base import Task
from nepa_dist.tasks.finetune import FinetuneTask
from nepa_dist.tasks.pretrain import PretrainTask
from nepa_dist.tasks.segment import SegmentTask


def build_task(config: Config) -> Task:
    """The task that a configuration names, with its initial weights, on the CPU.

    Raises:
        ConfigError: the number of classes is not known.
    """
    if config.task == "pretrain":
        return PretrainTask(config.model, config.objective, seed=config.seed)
    if config.num_classes is None:
        raise ConfigError([f"{config.task}.num_classes is not set, and the data does not say how many classes there are"])
    if config.task == "finetune":
        return FinetuneTask(config.model, config.finetune, seed=config.seed)
    return SegmentTask(config.model, config.segment, seed=config.seed)
