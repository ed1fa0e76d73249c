"""``python -m nepa_dist.score WEIGHTS --data DATA``: accuracy or mIoU of a trained model on a validation split.

WEIGHTS is whatever :func:`nepa_dist.trained.load_trained` reads: the folder of a run, its ``best`` folder, a checkpoint,
exported weights, official fine-tuned weights. Every image counts once. The same measurement as during training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.config import Config, ConfigError
from nepa_dist.config_load import load_config
from nepa_dist.data.classes import class_names, known_names
from nepa_dist.data.containers import Container
from nepa_dist.data.device import usable_device
from nepa_dist.data.loader import EvalLoader
from nepa_dist.data.open import open_split
from nepa_dist.data.order import spread
from nepa_dist.data.transforms import eval_transform
from nepa_dist.data.whole import WholeImages
from nepa_dist.run_folder import write_text
from nepa_dist.tasks.base import Scores, Task
from nepa_dist.tasks.finetune import FinetuneTask
from nepa_dist.tasks.segment import SegmentTask
from nepa_dist.trained import load_trained
from nepa_dist.validation import measure

_SETTINGS = (
    "data.",
    "evaluate.",
    "engine.precision=",
    "segment.window=",
    "segment.stride=",
    "segment.eval_scales=",
    "segment.eval_flip=",
    "segment.reduce_zero_label=",
)
"""Beginnings of what ``--set`` takes: settings that a score depends on and that are not those of the model."""


def score(task: Task, config: Config, device: torch.device, names: Sequence[str] = ()) -> Scores:
    """Measure a task on the validation split of ``config.data``.

    Args:
        task: classification or segmentation, in evaluation mode; moved to the device.
        config: its data, how images are resized (``evaluate``), precision (``engine.precision``).
        device: where the model runs.
        names: of the model's classes, for data that has none for them; others in the data are pointed out.

    Raises:
        DataError: there is no validation split.
        ValueError: nothing can be scored, or the data has classes that the model has not.
    """
    container = open_split(config.data, "val", image_size=config.model.image_size)
    _check_classes(task, config, container)
    found = known_names(config, container)
    if different := next((pair for pair in zip(found, names, strict=False) if pair[0] != pair[1]), None):
        print(
            f"{config.data.source} calls a class {different[0]!r} that the model calls {different[1]!r}: class c of the one is "
            "taken for c of the other",
            file=sys.stderr,
        )
    ids = spread(len(container), config.evaluate.max_samples)
    if isinstance(task, SegmentTask):
        batches = iter(WholeImages(container, config, ids))
    else:
        batches = iter(
            EvalLoader(
                container,
                config.data,
                image_size=config.model.image_size,
                batch_size=config.evaluate.batch_size,
                indices=ids,
                labels=True,
                transform=eval_transform(config),
            )
        )
    sums, bad = measure(task.to(device), batches, config, device)
    for name, reason in bad:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return task.score(sums, found or list(names) or class_names(config, container))


def _check_classes(task: Task, config: Config, container: Container) -> None:
    found, known, source = len(container.class_names), config.num_classes or 0, config.data.source
    if not isinstance(task, FinetuneTask) or found == known:
        return  # masks are checked one by one
    if found > known:
        raise ValueError(f"{source} has {found} classes and the model {known}: it was trained on other data")
    if found:
        print(
            f"{source} has {found} classes and the model {known}: class c of the one is taken for c of the other",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nepa_dist.score", description="Accuracy or mIoU of a trained model on a validation split."
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="folder of a run, its best/, a checkpoint or weights")
    parser.add_argument("--data", metavar="DATA", help="default: the run's own; needed for weights of others")
    parser.add_argument("--raw", action="store_true", help="use the weights themselves, not their average")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json and per_class.csv there")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="evaluate.resize=1.05, segment.eval_flip=true, ..."
    )
    args = parser.parse_args(argv)
    try:
        device = usable_device(args.device)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
        trained = load_trained(args.weights, ema=not args.raw)
        if not isinstance(trained.task, FinetuneTask | SegmentTask):
            raise ValueError(
                f"{args.weights} is a pretrained model: it has no classes. Probe it with python -m nepa_dist.evaluate"
            )
        config = _config(trained.config, args.data, args.set)
        if isinstance(trained.task, SegmentTask):
            trained.task.config = config.segment
        result = score(trained.task, config, device, trained.class_names)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    except (ValueError, OSError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.weights}: {trained.origin}, on {config.data.source}")
    for name, value in result.values.items():
        print(f"  {name:<10}{value:.4f}")
    try:
        if args.out is not None:
            write_text(args.out / "results.json", json.dumps(result.values, indent=2) + "\n")
            write_text(args.out / "per_class.csv", result.per_class)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _config(config: Config, source: str | None, overrides: list[str]) -> Config:
    """The configuration of the weights, with other data and other settings of the evaluation."""
    if strange := [item for item in overrides if not item.startswith(_SETTINGS)]:
        known = ", ".join(name.rstrip(".=") for name in _SETTINGS)
        raise ConfigError([f"--set {item}: only {known} matter here" for item in strange])
    layers = config.model_dump(mode="json")
    if source is not None:
        layers["data"]["source"] = source
    return load_config(overrides=overrides, base=layers)


if __name__ == "__main__":
    sys.exit(main())
