"""The result of probing as text, as JSON and as a picture of accuracy against depth. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nepa_dist.pictures import save_figure
from nepa_dist.run_folder import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nepa_dist.tasks.features import Layer, Pooling
    from nepa_dist.tasks.probe import ProbeRow

POOLED = {"mean": "mean of the patch tokens", "last": "last token", "cls": "CLS"}

_COLORS = ("#1f6fb4", "#d9711c", "#2c8c4a", "#a03aa0", "#7a6a52", "#4d4d4d")
_MAX_TICKS = 16


class Evaluation(NamedTuple):
    """What was measured of a model, and how."""

    name: str
    """Of the run or the weights."""
    step: int | None
    weights: str
    """``ema``, ``raw`` or ``unknown``."""
    origin: str
    """The last two in words."""
    data: str
    causal: bool
    """How the backbone attended while it was probed."""
    pooling: Pooling
    """Of k-NN and linear."""
    num_train: int
    num_test: int
    num_classes: int
    protocol: dict[str, float]
    """Settings of the probes by name."""
    objective: dict[str, float] | None
    """Loss, skills and collapse gauges on validation images, by metric name; None for a model that predicts no patches."""
    trained: list[ProbeRow]
    untrained: list[ProbeRow]
    """The same model with its initial weights; empty if it was left out."""


def format_evaluation(result: Evaluation) -> str:
    """The result as text: the objective, then one row per layer."""
    lines = [f"{result.name}, {result.origin}"]
    if result.objective is not None:
        lines += _objective_lines(result.objective)
    attention = "causal" if result.causal else "bidirectional"
    names = list(result.trained[0].top1)
    pooled = f", {POOLED[result.pooling]}" if names != ["attentive"] else ""
    images = f"{result.num_train} training and {result.num_test} test images of {result.num_classes} classes"
    lines += ["", f"top-1 accuracy in %, {attention} attention{pooled}, {images}"]
    sides = [("trained", result.trained)] + ([("untrained", result.untrained)] if result.untrained else [])
    width = 11 if result.untrained else 16
    lines.append(f"{'':>7}" + "".join(f"{probe_name(name):>{width * len(sides)}}" for name in names))
    if len(sides) > 1:
        lines.append(f"{'layer':>7}" + "".join(f"{side:>{width}}" for _ in names for side, _ in sides))
    for index, row in enumerate(result.trained):
        values = [rows[index].top1[name] for name in names for _, rows in sides]
        lines.append(f"{row.layer!s:>7}" + "".join(f"{100 * value:{width}.1f}" for value in values))
    if not all(row.converged for row in (*result.trained, *result.untrained)):
        lines.append("some linear probes did not converge")
    return "\n".join(lines)


def _objective_lines(objective: dict[str, float]) -> list[str]:
    rows = [
        ("loss", "loss", "8.4f", ""),
        ("skill over the best constant", "prediction_skill_const", "8.3f", "   (0 no better, 1 perfect)"),
        ("skill over copying the current patch", "prediction_skill_copy", "8.3f", ""),
        ("mean cosine of targets", "embedding_mean_cosine.target", "8.3f", "   (1 is collapse)"),
        ("effective rank of targets", "embedding_effective_rank.target", "8.1f", ""),
    ]
    return ["", "objective on held-out images"] + [
        f"  {text:<38}{objective[key]:{form}}{note}" for text, key, form, note in rows
    ]


def probe_name(key: str) -> str:
    """``knn_20`` -> ``k-NN, k = 20``; other keys are words."""
    kind, _, k = key.partition("_")
    return f"k-NN, k = {k}" if kind == "knn" else key


def write_evaluation(folder: Path, result: Evaluation) -> list[Path]:
    """Write ``evaluation.json`` and ``figures/probe.png`` in a folder, each in one step; returns their paths."""
    values: dict[str, Any] = result._asdict()
    for side in ("trained", "untrained"):
        values[side] = [row._asdict() for row in values[side]]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "evaluation.json", json.dumps(values, indent=2) + "\n")
    picture = folder / "figures" / "probe.png"
    draw_depth(picture, result)
    return [folder / "evaluation.json", picture]


def draw_depth(path: Path, result: Evaluation) -> None:
    """Draw accuracy against depth into a PNG file: a colour per probe, solid for the model, dashed for the untrained one."""
    layers: list[Layer] = [row.layer for row in result.trained]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for color, name in zip(_COLORS * 9, result.trained[0].top1, strict=False):
            for style, side, rows in (("-", "", result.trained), ("--", " (untrained)", result.untrained)):
                if rows:
                    values = [100 * row.top1[name] for row in rows]
                    axes.plot(values, style, color=color, lw=1.7, marker="o", ms=3.5, label=probe_name(name) + side)
        chance = 100 / result.num_classes
        axes.axhline(chance, color="#888888", lw=1, ls=":", label=f"chance ({chance:.3g} %)")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("top-1 accuracy, %")
        _label_layers(axes, layers)
        axes.grid(True, color="#e4e4e4", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))

    attention = "causal" if result.causal else "bidirectional"
    images = f"{result.num_train} + {result.num_test} images, {result.data}"
    title = f"{result.name}, {result.origin}\n{images}, {attention} attention"
    save_figure(path, title, (8.2, 4.2), draw)


def _label_layers(axes: Axes, layers: list[Layer]) -> None:
    every = -(-len(layers) // _MAX_TICKS)
    shown = [i for i in range(len(layers)) if i % every == 0 or isinstance(layers[i], str)]
    axes.set_xticks(shown, [str(layers[i]) for i in shown])
    axes.set_xlabel("output of block" + (" (embed: their input, final: after the norm)" if "final" in layers else ""))
