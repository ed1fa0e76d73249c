"""Starting a task from another model's weights: which tensor goes where, and an account of every one.

The backbone must be the same model. The head moves along where it is the same too; otherwise it keeps its initial weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.config import ConfigError, ModelConfig, other_settings
from nepa_dist.names import by_module, misfits
from nepa_dist.official import OfficialFormatError
from nepa_dist.tasks.base import Task
from nepa_dist.trained import Weights, WeightsError, read_weights


@dataclass(frozen=True)
class Account:
    """What became of every tensor of a task and of the source. Its text is for the log."""

    source: str
    origin: str
    """Which weights of the source: step, averaged or raw."""
    loaded: tuple[str, ...]
    num_parameters: int
    """In what was loaded."""
    ones: tuple[str, ...]
    """QK-norm weights that the source does not have; they start as ones."""
    fresh: tuple[str, ...]
    """Keep their initial weights."""
    left_over: tuple[str, ...]
    """Of the source, used nowhere."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"starting from {self.source}: {self.origin}"]
        for what, names in (
            (f"tensors loaded, {self.num_parameters:,} parameters", self.loaded),
            ("ones, where the source has no scale", self.ones),
            ("fresh", self.fresh),
            ("left over in the source", self.left_over),
        ):
            if names:
                lines += [f"  {len(names)} {what}", *(f"    {line}" for line in by_module(names))]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def transfer(task: Task, source: str | Path, *, ema: bool) -> Account:
    """Give a task the weights of another model, in place. Call it before an engine is built, on the CPU.

    Args:
        task: with its initial weights.
        source: whatever :func:`nepa_dist.trained.read_weights` reads.
        ema: take the averaged weights. Exported weights are of one kind, which the account names.

    Returns:
        The account.

    Raises:
        ConfigError: the source cannot be read, or holds another model; all problems are listed, and the task is as it was.
    """
    try:
        weights = read_weights(source, ema=ema)
    except (WeightsError, CheckpointError, OfficialFormatError) as error:
        raise ConfigError([f"init.path: {error}"]) from None
    if ema and weights.provenance.weights == "raw":
        raise ConfigError([f"init.load ema: {source} holds no averaged weights, only {weights.provenance.origin}"])
    own = task.state_dict()
    found, ones = _with_ones(weights, own, task.backbone.config)
    problems = [*other_settings(weights.config.model, task.backbone.config), *_other_tensors(found, own)]
    if problems:
        raise ConfigError([f"init.path: {source} holds another model than this run", *problems])
    head, notes = _head_problems(found, own, weights.config.task)
    taken = {name: found[name] for name in own if name in found and (_is_backbone(name) or not head)}
    with torch.no_grad():
        for name, tensor in taken.items():
            own[name].copy_(tensor)
    loaded = tuple(name for name in taken if name not in ones)
    return Account(
        source=str(source),
        origin=weights.provenance.origin,
        loaded=loaded,
        num_parameters=sum(taken[name].numel() for name in loaded),
        ones=tuple(ones),
        fresh=tuple(name for name in own if name not in taken),
        left_over=tuple(name for name in found if name not in taken),
        notes=tuple(notes),
    )


def _with_ones(weights: Weights, own: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The source's tensors and ones for scales of the QK-norm that only this model has: without a scale it is the same."""
    ones = list(weights.ones)
    if model.qk_norm_affine and not weights.config.model.qk_norm_affine:
        ones += [name for name in own if name.endswith((".q_norm.weight", ".k_norm.weight")) and name not in weights.state]
    return weights.state | {name: torch.ones_like(own[name]) for name in ones if name in own}, ones


def _other_tensors(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    theirs, ours = ({name: t.shape for name, t in state.items() if _is_backbone(name)} for state in (found, own))
    return misfits(theirs, ours, by="here")


def _head_problems(found: Mapping[str, Tensor], own: Mapping[str, Tensor], task: str) -> tuple[list[str], list[str]]:
    """Why the head stays fresh (nothing if it moves along), and what to say about it."""
    theirs, ours = ({name: t.shape for name, t in state.items() if not _is_backbone(name)} for state in (found, own))
    if not ours:
        return [], []
    if theirs.keys() != ours.keys():
        problems = [f"that of the source ({task}) has other parts" if theirs else f"the source ({task}) has none"]
    else:
        problems = misfits(theirs, ours, by="here")
    return problems, [f"the head is fresh: {'; '.join(problems)}"] if problems else []


def _is_backbone(name: str) -> bool:
    return name.startswith("backbone.")
