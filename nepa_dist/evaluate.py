"""What a backbone has learned: its loss and skill on held-out images, and probes of its layers against an untrained twin.

``python -m nepa_dist.evaluate RUN|WEIGHTS`` reads a run (its newest checkpoint that verifies, averaged weights where there are
any), a checkpoint, exported or official weights; it prints a table and writes ``evaluation.json`` and ``figures/probe.png``.

The objective is measured in fp32 on 512 images spread over the validation split: centre crops, no masking, no random rescale.
The protocol of the probes is that of :mod:`nepa_dist.tasks.probe` and :mod:`nepa_dist.tasks.attentive`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from nepa_dist.arguments import joined
from nepa_dist.checkpoint.host_memory import available_bytes
from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.config import DataConfig
from nepa_dist.data.classes import other_classes
from nepa_dist.data.containers import Container
from nepa_dist.data.device import to_device, usable_device
from nepa_dist.data.loader import EvalLoader
from nepa_dist.data.open import open_split
from nepa_dist.data.order import spread
from nepa_dist.metrics.collapse import collapse_metrics
from nepa_dist.model import VisionTransformer
from nepa_dist.probe_report import Evaluation, format_evaluation, write_evaluation
from nepa_dist.tasks.attentive import ATTENTIVE_BATCH_SIZE, ATTENTIVE_EPOCHS, ATTENTIVE_LR, ATTENTIVE_WEIGHT_DECAY
from nepa_dist.tasks.features import Layer, Pooling, check_pooling
from nepa_dist.tasks.pretrain import PretrainTask, align, next_embedding_loss
from nepa_dist.tasks.probe import CHUNK_BYTES, KNN_TEMPERATURE, PROBES, Probe, probe_layers
from nepa_dist.trained import Trained, load_trained

BATCH_SIZE = 128
NUM_OBJECTIVE_IMAGES = 512
LINEAR_C = 0.1


class Plan(NamedTuple):
    """What is to be measured."""

    probes: tuple[Probe, ...] = ("knn", "linear")
    layers: tuple[Layer, ...] | None = None
    """None: all, from the input of the blocks to the output of the norm."""
    pooling: Pooling = "mean"
    """Of k-NN and linear."""
    ks: tuple[int, ...] = (10, 20)
    num_train: int | None = 5000
    """Training images that the probes learn from, spread evenly over the split; None: all."""
    num_test: int | None = 2000
    """Validation images that they are judged on, likewise."""
    bidirectional: bool = False
    """Every token sees every other, whatever the backbone was trained with."""
    untrained: bool = True
    """Probe the same model with its initial weights too."""
    epochs: int = ATTENTIVE_EPOCHS
    """Of the attentive probe."""
    seed: int = 0
    """Of the attentive probe."""


def evaluate(trained: Trained, source: str | None, plan: Plan, device: torch.device) -> Evaluation:
    """Measure objective and probes of a model.

    Args:
        trained: from :func:`nepa_dist.trained.load_trained`.
        source: data with labels and a validation split; default: what the model was trained on.
        plan: what is measured, and with how many images.
        device: where the backbone and the probes run.

    Raises:
        DataError: the data has no validation split.
        ValueError: the data has no labels, fewer than two classes, or other ones in its two splits; a layer or a k that is not
            there; too little memory.
    """
    data = trained.data if source is None else trained.data.model_copy(update={"source": source})
    backbone = trained.task.backbone
    causal = trained.config.causal and not plan.bidirectional
    layers = _layers(plan, backbone.config.depth, causal)
    size = backbone.config.image_size
    containers = [open_split(data, split, image_size=size) for split in ("train", "val")]
    for container, split in zip(containers, ("training", "validation"), strict=True):
        if len(container.class_names) < 2:
            raise ValueError(f"the {split} split of {data.source} has fewer than two classes; a probe needs labels")
    if problem := other_classes(*(container.class_names for container in containers)):
        raise ValueError(f"{data.source}: {problem}")
    train, test = (_Images(c, data, size, n, device) for c, n in zip(containers, (plan.num_train, plan.num_test), strict=True))
    for k in plan.ks if "knn" in plan.probes else ():
        if k > len(train):
            raise ValueError(f"k = {k} neighbours were asked for, but there are {len(train)} training images (--k)")
    _check_memory(backbone, plan, len(layers), len(train), len(test), device)
    objective = None
    if isinstance(trained.task, PretrainTask):
        held_out = _Images(containers[1], data, size, NUM_OBJECTIVE_IMAGES, device)
        objective = _measure_objective(trained.task.to(device), held_out)
    rows = []
    for model in [backbone] + ([VisionTransformer(backbone.config, seed=trained.task.seed)] if plan.untrained else []):
        rows.append(
            probe_layers(
                model.to(device),
                train,
                test,
                layers=layers,
                probes=plan.probes,
                pooling=plan.pooling,
                causal=causal,
                ks=plan.ks,
                C=LINEAR_C,
                epochs=plan.epochs,
                seed=plan.seed,
                cache_bytes=(available_bytes() or 0) // 2,
            )
        )
    origin = trained.provenance
    return Evaluation(
        name=origin.name,
        step=origin.step,
        weights=origin.weights,
        origin=origin.origin,
        data=str(data.source),
        causal=causal,
        pooling=plan.pooling,
        num_train=len(train),
        num_test=len(test),
        num_classes=len(containers[0].class_names),
        protocol=_protocol(plan),
        objective=objective,
        trained=rows[0],
        untrained=rows[1] if plan.untrained else [],
    )


def _layers(plan: Plan, depth: int, causal: bool) -> list[Layer]:
    """The layers to probe, each once, blocks counted from 0; refuses what the model does not have."""
    every: list[Layer] = ["embed", *range(depth), "final"]
    if plan.pooling == "cls":
        every.remove("embed")  # where it knows nothing
    wanted = every if plan.layers is None else list(plan.layers)
    for layer in wanted:
        if isinstance(layer, int) and not -depth <= layer < depth:
            raise ValueError(f"layer {layer} is not a block: the model has {depth}, numbered from 0 to {depth - 1}")
    layers = list(dict.fromkeys(layer % depth if isinstance(layer, int) else layer for layer in wanted))
    if "knn" in plan.probes or "linear" in plan.probes:
        check_pooling(layers, plan.pooling, causal)
    return layers


def _protocol(plan: Plan) -> dict[str, float]:
    settings: dict[str, float] = {}
    if "knn" in plan.probes:
        settings["knn_temperature"] = KNN_TEMPERATURE
    if "linear" in plan.probes:
        settings["linear_C"] = LINEAR_C
    if "attentive" in plan.probes:
        settings |= {"attentive_epochs": plan.epochs, "attentive_lr": ATTENTIVE_LR, "attentive_seed": plan.seed}
        settings |= {"attentive_batch_size": ATTENTIVE_BATCH_SIZE, "attentive_weight_decay": ATTENTIVE_WEIGHT_DECAY}
    return settings


def _check_memory(
    backbone: VisionTransformer, plan: Plan, num_layers: int, num_train: int, num_test: int, device: torch.device
) -> None:
    """Refuse what would not fit before any work is done: an estimate on the safe side, pixels and activations included."""
    D, tokens = backbone.config.embed_dim, 1 + backbone.config.num_patches
    one_layer = 0 if plan.probes == ("attentive",) else 4 * D * (num_train + num_test)
    images = 4 * BATCH_SIZE * tokens * D * (num_layers + 16)
    working = 2 * one_layer + images + 4 * CHUNK_BYTES
    host = one_layer * (num_layers + 1) + (working if device.type == "cpu" else 0)
    rooms = [("host memory", host, available_bytes())]
    if device.type == "cuda":
        rooms.append((f"memory of {device}", working, torch.cuda.mem_get_info(device)[0]))
    for what, needed, free in rooms:
        if free is not None and needed > free:
            raise ValueError(
                f"{num_layers} layers of width {D} with {num_train} + {num_test} images need about {needed / 1e9:.1f} GB of "
                f"{what}, and {free / 1e9:.1f} GB are free; take fewer layers (--layers) or images (--num-train, --num-test)"
            )


class _Images:
    """At most ``count`` images of a container, spread evenly over it, as device batches; can be read again in any order."""

    def __init__(self, container: Container, data: DataConfig, size: int, count: int | None, device: torch.device) -> None:
        self._container, self._data, self._size, self._device = container, data, size, device
        self._indices = spread(len(container), count)
        self._numbers = {index: number for number, index in enumerate(self._indices)}
        self._left_out: set[str] = set()

    def __len__(self) -> int:
        return len(self._indices)

    def batches(self, order: Sequence[int] | None = None, *, batch_size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """See :class:`nepa_dist.tasks.attentive.ImageSource`; says once of each image that is left out."""
        indices = self._indices if order is None else [self._indices[i] for i in order]
        loader = EvalLoader(
            self._container, self._data, image_size=self._size, batch_size=batch_size or BATCH_SIZE, indices=indices
        )
        for batch in loader:
            for bad in batch.bad:
                if bad.name not in self._left_out:
                    print(f"left out: {bad.name}: {bad.reason}", file=sys.stderr)
                    self._left_out.add(bad.name)
            if len(batch.ids):
                numbers = torch.tensor([self._numbers[index] for index in batch.ids.tolist()])
                yield to_device(batch, self._device, self._data.mean, self._data.std) | {"numbers": numbers}


@torch.inference_mode()
def _measure_objective(task: PretrainTask, images: _Images) -> dict[str, float]:
    objective = task.objective
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    losses, sizes = [], []
    for batch in images.batches():
        features = task.backbone(batch["images"], causal=objective.causal)
        loss = next_embedding_loss(features.hidden, features.embed, shift=objective.shift)
        prediction, target = align(features.hidden, features.embed, shift=objective.shift)
        parts.append((prediction, target, features.embed[:, : target.shape[1]]))
        losses.append(float(loss))
        sizes.append(len(target))
    if not parts:
        raise ValueError("no image of the validation split can be read")
    prediction, target, current = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    return {"loss": mean, **{name: float(value) for name, value in collapse_metrics(prediction, target, current).items()}}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _count(text: str) -> int | None:
    return None if text == "all" else _positive(text)


def _probe_list(text: str) -> tuple[Probe, ...]:
    if strange := set(text.split(",")) - set(PROBES):
        raise argparse.ArgumentTypeError(f"{min(strange)!r} is none of {', '.join(PROBES)}")
    return tuple(probe for probe in PROBES if probe in text.split(","))


def _layer_list(text: str) -> tuple[Layer, ...] | None:
    layers: list[Layer] = []
    for part in text.split(","):
        if part in ("embed", "final"):
            layers.append("embed" if part == "embed" else "final")
        elif part.removeprefix("-").isdecimal():
            layers.append(int(part))
        elif text != "all":
            raise argparse.ArgumentTypeError(f"{part!r} is no layer: 'embed', 'final' or the index of a block, as in 3,5,final")
    return tuple(layers) or None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nepa_dist.evaluate", description="Probe the layers of a backbone.")
    add = parser.add_argument
    add("model", type=Path, metavar="RUN|WEIGHTS", help="folder of a run, a checkpoint or weights, or a file of weights")
    add("--data", metavar="NAME|FOLDER", help="labelled data with a validation split; default: the run's own")
    add("--probes", type=_probe_list, default=Plan().probes, metavar="LIST", help="of knn,linear,attentive (knn,linear)")
    add("--layers", type=_layer_list, metavar="LIST", help="embed, blocks from 0 or -1 for the last, final: 3,-1,final (all)")
    add("--pooling", choices=get_args(Pooling), default="mean", help="tokens to one feature, for knn and linear (mean)")
    add("--k", type=_numbers, default=Plan().ks, metavar="LIST", help="numbers of neighbours (10,20)")
    add("--num-train", type=_count, default=5000, metavar="N", help="images that the probes learn from, or all (5000)")
    add("--num-test", type=_count, default=2000, metavar="N", help="images that they are judged on, or all (2000)")
    add("--bidirectional", action="store_true", help="every token sees every other; default: as the backbone was trained")
    add("--no-untrained", action="store_true", help="leave the untrained twin out: half the time")
    add("--epochs", type=_positive, default=ATTENTIVE_EPOCHS, metavar="N", help=f"of the attentive probe ({ATTENTIVE_EPOCHS})")
    add("--seed", type=int, default=0, metavar="N", help="of the attentive probe (0)")
    add("--raw", action="store_true", help="use the weights themselves, not their average")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, metavar="DIR", help="where the results go; default: the run's folder, for weights the current one")
    return parser.parse_args(joined(argv))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parse(argv)
    logging.basicConfig(format="%(message)s")
    plan = Plan(
        args.probes,
        args.layers,
        args.pooling,
        args.k,
        args.num_train,
        args.num_test,
        args.bidirectional,
        not args.no_untrained,
        args.epochs,
        args.seed,
    )
    out = args.out or (args.model if (args.model / "checkpoints").is_dir() else Path())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the linear probe", RuntimeWarning)  # the table says so
            device = usable_device(args.device)
            out.mkdir(parents=True, exist_ok=True)
            result = evaluate(load_trained(args.model, ema=not args.raw), args.data, plan, device)
        print(format_evaluation(result), flush=True)  # before anything can go wrong with the folder
        paths = write_evaluation(out, result)
    except (CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"wrote {path}" for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
