"""How many classes the head has: as the configuration says, or as the data does."""

from __future__ import annotations

from collections.abc import Sequence

from nepa_dist.config import Config, ConfigError
from nepa_dist.data.containers import Container
from nepa_dist.data.decode import BadImage
from nepa_dist.data.segment_augment import class_mask

_LOOKED_AT = 8
"""Masks that are tried before a run begins."""


def resolve_classes(config: Config, container: Container) -> Config:
    """Fill in the number of classes and check that the data has what the task needs.

    Args:
        config: of a run.
        container: its training split; a few samples may be read.

    Returns:
        The same configuration; with ``num_classes`` of its task where that was left to the data.

    Raises:
        ConfigError: the data has no classes, no masks, more classes than the configuration, or masks that do not fit it.
        OSError: the first sample cannot be read.
    """
    if config.task == "pretrain":
        return config
    source, found = config.data.source, len(_names(config, container))
    if config.task == "segment" and container.read(0).mask is None:
        hint = "prepare a folder with images/ and annotations/ (docs/data.md)"
        raise ConfigError([f"data.source {source} has no masks, which segmentation needs: {hint}"])
    given = config.num_classes
    if config.task == "finetune" and found < 2:
        raise ConfigError(
            [f"data.source {source} has {found} classes; fine-tuning needs train/<class>/ folders or labelled shards"]
        )
    if given is None and found < 2:
        raise ConfigError([f"segment.num_classes is not set, and data.source {source} has no class table: set it"])
    if config.task == "finetune" and given is not None and given < found:
        raise ConfigError([f"finetune.num_classes is {given}, but data.source {source} has {found} classes"])
    if given is None:
        section = getattr(config, config.task).model_copy(update={"num_classes": found})
        config = config.model_copy(update={config.task: section})
    if config.task == "segment" and (reason := _why_no_mask_fits(config, container)):
        raise ConfigError([f"data.source {source}: none of its first masks can be used; {reason}"])
    return config


def check_validation(config: Config, train: Container, val: Container) -> None:
    """Check that the validation split can be scored, and that its classes are those of training.

    Args:
        config: of a run that is validated.
        train: its training split.
        val: its validation split; one sample may be read.

    Raises:
        ConfigError: a class number means something else in the two splits, or there is nothing to compare with.
    """
    source, names = config.data.source, _names(config, val)
    if config.task == "finetune" and not names:
        raise ConfigError([f"the validation split of data.source {source} has no labels, which fine-tuning is scored by"])
    if config.task == "segment" and not _may_have_masks(val):
        raise ConfigError([f"the validation split of data.source {source} has no masks, which segmentation is scored by"])
    if problem := other_classes(_names(config, train), names):
        raise ConfigError([f"data.source {source}: {problem}"])


def other_classes(train: Sequence[str], val: Sequence[str]) -> str | None:
    """How a class number may mean another class in the validation split than in the training split; None if it cannot.

    Args:
        train: names of the classes, in order; none if they are not known.
        val: likewise. It may lack classes at the end.
    """
    if not train or list(val) == list(train[: len(val)]):
        return None
    index = next((i for i, (a, b) in enumerate(zip(train, val, strict=False)) if a != b), len(train))
    here = f"{train[index]!r} in train" if index < len(train) else "unknown in train"
    return (
        f"class {index} is {val[index]!r} in val and {here} ({len(val)} and {len(train)} classes): "
        "prepare both splits from one folder (docs/data.md)"
    )


def _why_no_mask_fits(config: Config, container: Container) -> str | None:
    """What is wrong with the last of the first masks if all are; a single one is left to the loader, which replaces it."""
    reason = None
    for index in range(min(_LOOKED_AT, len(container))):
        try:
            mask = container.read(index).mask
            if mask is not None:
                class_mask(mask, config.segment)
                return None
        except (OSError, BadImage) as error:
            reason = f"{container.name(index)}: {error}"
    return reason


def _may_have_masks(container: Container) -> bool:
    try:
        return container.read(0).mask is not None
    except (OSError, BadImage):
        return True  # this one is damaged; it is left out and named when its turn comes


def class_names(config: Config, container: Container) -> list[str]:
    """Names of the head's classes: those of the data, or numbers where it names another number of them."""
    return known_names(config, container) or [str(index) for index in range(config.num_classes or 0)]


def known_names(config: Config, container: Container) -> list[str]:
    """Names that the data has for the head's classes; none where it names another number of them, or there is no head."""
    names = _names(config, container)
    return names if len(names) == config.num_classes else []


def _names(config: Config, container: Container) -> list[str]:
    """What the data calls its classes; masks may have others than labels have."""
    names = container.class_names
    return list(getattr(container, "mask_names", names) if config.task == "segment" else names)
