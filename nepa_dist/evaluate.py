"""What a run has learned: loss and skill on held-out images, and probes of every layer against an untrained backbone.

``python -m nepa_dist.evaluate RUN`` reads the newest checkpoint that verifies, uses the averaged weights where there are any,
prints a table and writes ``RUN/evaluation.json`` and ``RUN/figures/probe.png``.

The objective is measured in fp32 on 512 images spread over the validation split: centre crops, no masking, no random rescale.
The protocol of the probes is that of :mod:`nepa_dist.tasks.probe`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config
from nepa_dist.data.containers import Container, open_split
from nepa_dist.data.device import to_device
from nepa_dist.data.loader import EvalLoader
from nepa_dist.metrics.collapse import collapse_metrics
from nepa_dist.run_folder import write_text
from nepa_dist.tasks.pretrain import PretrainTask, align, next_embedding_loss
from nepa_dist.tasks.probe import Layer, Pooling, ProbeRow, probe_layers
from nepa_dist.visualize import plot_lines

BATCH_SIZE = 128
NUM_OBJECTIVE_IMAGES = 512
POOLED = {"mean": "mean of the patch tokens", "last": "last token", "cls": "CLS"}


class Loaded(NamedTuple):
    """A trained task and where it comes from."""

    task: PretrainTask
    config: Config
    step: int
    weights: str
    """``ema`` or ``raw``."""


class Evaluation(NamedTuple):
    """The result for one run."""

    step: int
    weights: str
    num_train: int
    num_test: int
    k: int
    """Neighbours of the k-NN probe."""
    objective: dict[str, float]
    """Loss, skills and collapse gauges on validation images, by metric name."""
    trained: list[ProbeRow]
    untrained: list[ProbeRow]


def load_run(run_dir: Path, *, ema: bool = True) -> Loaded:
    """Load the task of a run from its newest checkpoint that verifies, in evaluation mode, on the CPU.

    Args:
        run_dir: folder of the run.
        ema: use the averaged weights if the run keeps them.

    Raises:
        CheckpointError: there is no checkpoint that verifies.
    """
    store = CheckpointStore(run_dir / "checkpoints")
    found = store.latest()
    if found.path is None:
        damaged = "".join(f"\n  - {path}: {reason}" for path, reason in found.passed_over)
        raise CheckpointError(f"{run_dir} has no checkpoint that can be used{damaged}")
    manifest, reader = store.open(found.path, check_digests=False)
    config = Config.model_validate(manifest.meta["config"])
    task = PretrainTask(config.model, config.objective, seed=config.seed)
    field = "ema" if ema and config.optim.ema_decay is not None else "weight"
    task.load_state_dict({name: reader.read(name, [field])[field] for name in reader.names()}, strict=True)
    return Loaded(task.eval(), config, manifest.step, "ema" if field == "ema" else "raw")


def evaluate(
    loaded: Loaded,
    source: str | None,
    *,
    num_train: int,
    num_test: int,
    device: torch.device,
    pooling: Pooling = "mean",
) -> Evaluation:
    """Measure objective and probes of a loaded run.

    Args:
        loaded: from :func:`load_run`.
        source: data with labels and a validation split; default: the run's own.
        num_train: training images that the probes learn from, spread evenly over the split.
        num_test: validation images that they are judged on.
        device: where the backbone runs.
        pooling: how the tokens of a layer become one feature.

    Raises:
        DataError: the data has no validation split.
        ValueError: the data has no labels, or fewer than two classes.
    """
    config = loaded.config
    if source is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    splits = [open_split(config.data, split, image_size=config.model.image_size) for split in ("train", "val")]
    train, test = (_Batches(c, config, n, device) for c, n in zip(splits, (num_train, num_test), strict=True))
    objective = _measure_objective(loaded.task.to(device), _Batches(splits[1], config, NUM_OBJECTIVE_IMAGES, device))
    layers: list[Layer] = ["embed", *range(config.model.depth), "final"]
    causal = config.objective.causal
    fresh = PretrainTask(config.model, config.objective, seed=config.seed).to(device)
    k = min(20, len(train))
    rows = [
        probe_layers(t.backbone, train, test, layers=layers, pooling=pooling, causal=causal, k=k) for t in (loaded.task, fresh)
    ]
    return Evaluation(loaded.step, loaded.weights, len(train), len(test), k, objective, *rows)


class _Batches:
    """A subset of a container, spread evenly over it (classes may be in order), as device batches; can be iterated again."""

    def __init__(self, container: Container, config: Config, count: int, device: torch.device) -> None:
        total = len(container)
        self._indices = [i * total // count for i in range(count)] if count < total else list(range(total))
        self._data, self._device = config.data, device
        self._loader = EvalLoader(
            container, config.data, image_size=config.model.image_size, batch_size=BATCH_SIZE, indices=self._indices
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._loader:
            for bad in batch.bad:
                print(f"left out: {bad.name}: {bad.reason}", file=sys.stderr)
            if len(batch.ids):
                yield to_device(batch, self._device, self._data.mean, self._data.std)


@torch.inference_mode()
def _measure_objective(task: PretrainTask, batches: _Batches) -> dict[str, float]:
    objective = task.objective
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    losses, sizes = [], []
    for batch in batches:
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


def format_evaluation(result: Evaluation) -> str:
    """The result as text: the objective, then one row per layer."""
    objective = result.objective
    lines = [
        f"step {result.step}, {result.weights} weights, held-out images",
        f"  loss                                  {objective['loss']:8.4f}",
        f"  skill over the best constant          {objective['prediction_skill_const']:8.3f}   (0 no better, 1 perfect)",
        f"  skill over copying the current patch  {objective['prediction_skill_copy']:8.3f}",
        f"  mean cosine of targets                {objective['embedding_mean_cosine.target']:8.3f}   (1 is collapse)",
        f"  effective rank of targets             {objective['embedding_effective_rank.target']:8.1f}",
        "",
        f"top-1 accuracy in %, {POOLED[result.trained[0].pooling]}, "
        f"{result.num_train} training and {result.num_test} test images",
        f"{'':>8}{f'k-NN (k = {result.k})':>24}{'linear':>24}",
        f"{'layer':>8}{'trained':>12}{'untrained':>12}{'trained':>12}{'untrained':>12}",
    ]
    for row, base in zip(result.trained, result.untrained, strict=True):
        values = (row.knn, base.knn, row.linear, base.linear)
        lines.append(f"{row.layer!s:>8}" + "".join(f"{100 * value:12.1f}" for value in values))
    if not all(row.converged for row in (*result.trained, *result.untrained)):
        lines.append("some linear probes did not converge: a lower bound")
    return "\n".join(lines)


def write_evaluation(run_dir: Path, result: Evaluation) -> list[Path]:
    """Write ``evaluation.json`` and ``figures/probe.png``; returns their paths."""
    values: dict[str, Any] = result._asdict()
    for side in ("trained", "untrained"):
        values[side] = [row._asdict() for row in values[side]]
    write_text(run_dir / "evaluation.json", json.dumps(values, indent=2) + "\n")
    depth = [float(index) for index in range(len(result.trained))]
    series = {
        f"{kind} {side}": (depth, [100 * getattr(row, field) for row in rows])
        for kind, field in (("k-NN", "knn"), ("linear", "linear"))
        for side, rows in (("trained", result.trained), ("untrained", result.untrained))
    }
    picture = run_dir / "figures" / "probe.png"
    picture.parent.mkdir(exist_ok=True)
    plot_lines(picture, series, xlabel="blocks passed (last point: final norm)", ylabel="top-1 accuracy, %", title=run_dir.name)
    return [run_dir / "evaluation.json", picture]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nepa_dist.evaluate", description="Probe a pretraining run.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--data", metavar="NAME|FOLDER", help="labelled data with a validation split; default: the run's own")
    parser.add_argument(
        "--num-train", type=_positive, default=5000, metavar="N", help="images that the probes learn from (5000)"
    )
    parser.add_argument("--num-test", type=_positive, default=2000, metavar="N", help="images that they are judged on (2000)")
    parser.add_argument("--pooling", choices=["mean", "last"], default="mean", help="tokens to one feature: mean or last token")
    parser.add_argument("--raw", action="store_true", help="use the weights themselves, not their average")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded = load_run(args.run, ema=not args.raw)
        result = evaluate(
            loaded, args.data, num_train=args.num_train, num_test=args.num_test, device=device, pooling=args.pooling
        )
        paths = write_evaluation(args.run, result)
    except (CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(format_evaluation(result))
    print("\n".join(f"wrote {path}" for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
