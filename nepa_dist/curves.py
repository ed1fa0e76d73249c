"""The curves of a run: loss, gradient norm, collapse and validation, drawn from ``metrics.jsonl``.

matplotlib is loaded when the first picture is drawn, and torch is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nepa_dist.metrics.sinks import read_curve
from nepa_dist.pictures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = Mapping[str, tuple[list[float], list[float]]]
"""Lines by their name in the legend: x values, y values."""

_COLORS = ("#1f6fb4", "#d9711c", "#2c8c4a", "#a03aa0", "#7a6a52", "#4d4d4d")
_SMOOTH_MIN_POINTS = 20  # fewer points are shown as they are


def plot_curves(run_dir: str | Path) -> list[Path]:
    """Draw the curves of a run into ``<run_dir>/figures``.

    ``loss.png``, ``grad_norm.png`` (logarithmic), ``collapse.png`` (mean cosine and effective rank of targets and
    predictions), ``validation.png`` (top-1 and top-5, or mIoU and accuracies), ``knn.png`` (accuracy beside pretraining); each
    only if the run has values for it. Loss and gradient norm show a moving average with the raw values behind it, and mark
    where steps were skipped.

    Args:
        run_dir: folder of a run, with ``metrics.jsonl``.

    Returns:
        The files made; none if nothing has been logged yet.

    Raises:
        FileNotFoundError: ``run_dir`` is not a folder.
        ValueError: ``metrics.jsonl`` is damaged; the message names the line.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not the folder of a run")
    file = run_dir / "metrics.jsonl"
    rows = read_curve(file) if file.exists() else []
    figures, title = run_dir / "figures", run_dir.resolve().name
    skipped = _skipped_steps(rows)
    paths = []
    for key, label, log_y in (("loss", "loss", False), ("grad_norm", "gradient norm before clipping", True)):
        series = {key: _points(rows, key, positive=log_y)}
        if series[key][0]:
            path = figures / f"{key}.png"
            plot_lines(path, series, xlabel="step", ylabel=label, title=title, log_y=log_y, smooth=True, marks=skipped)
            paths.append(path)
    panels: dict[str, Series] = {}
    for ylabel, family in (("mean pairwise cosine", "embedding_mean_cosine"), ("effective rank", "embedding_effective_rank")):
        lines = {name: _points(rows, f"{family}.{key}") for name, key in (("targets", "target"), ("predictions", "pred"))}
        if lines := {name: points for name, points in lines.items() if points[0]}:
            panels[ylabel] = lines
    if panels:
        paths.append(_plot_panels(figures / "collapse.png", panels, title))
    scores = {name: _points(rows, name) for name in ("top1", "top5", "miou", "macc", "aacc")}
    if scores := {name: points for name, points in scores.items() if points[0]}:
        path = figures / "validation.png"
        plot_lines(path, scores, xlabel="step", ylabel="share, averaged weights", title=title)
        paths.append(path)
    accuracy = _points(rows, "knn_top1", step="knn_step")
    if accuracy[0]:
        path = figures / "knn.png"
        plot_lines(path, {"knn_top1": accuracy}, xlabel="step", ylabel="k-NN top-1 beside training", title=title)
        paths.append(path)
    return paths


def plot_lines(
    path: str | Path,
    series: Series,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_y: bool = False,
    smooth: bool = False,
    marks: Sequence[float] = (),
) -> None:
    """Draw lines into one PNG file.

    Args:
        path: the file; its folder is made if missing.
        series: the lines; a legend is shown if there are two or more.
        xlabel: what x is, with unit.
        ylabel: what y is, with unit.
        title: above the picture.
        log_y: logarithmic y axis; all values must be positive.
        smooth: draw a moving average, with the raw line pale behind it.
        marks: x values of skipped steps, marked at the lower edge.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _draw(axes, series, ylabel, smooth=smooth)
        if log_y:
            axes.set_yscale("log")
        if marks:
            label = f"skipped steps ({len(marks)})"
            edge = axes.get_xaxis_transform()
            axes.plot(marks, [0.015] * len(marks), "|", color="#c01818", ms=9, mew=1.5, transform=edge, label=label)
        if len(series) > 1 or marks:
            axes.legend(frameon=False)
        axes.set_xlabel(xlabel)

    save_figure(Path(path), title, (7.2, 4.0), draw)


def _plot_panels(path: Path, panels: Mapping[str, Series], title: str) -> Path:
    """One panel below the other with a common step axis; keys of ``panels`` are the y labels."""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        for axes, (ylabel, series) in zip(grid[:, 0], panels.items(), strict=True):
            _draw(axes, series, ylabel)
            axes.legend(frameon=False)
        grid[-1, 0].set_xlabel("step")

    save_figure(path, title, (7.2, 3.1 * len(panels)), draw)
    return path


def _draw(axes: Axes, series: Series, ylabel: str, *, smooth: bool = False) -> None:
    for index, (name, (x, y)) in enumerate(series.items()):
        color = _COLORS[index % len(_COLORS)]
        marker = "o" if len(x) < _SMOOTH_MIN_POINTS else ""
        if smooth and len(x) >= _SMOOTH_MIN_POINTS:
            axes.plot(x, y, color=color, alpha=0.25, lw=0.9)
            y = _moving_average(y)
        axes.plot(x, y, color=color, lw=1.6, marker=marker, ms=3.5, label=name)
    axes.set_ylabel(ylabel)
    axes.grid(True, color="#e4e4e4", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _points(
    rows: Sequence[Mapping[str, float]], key: str, *, step: str = "step", positive: bool = False
) -> tuple[list[float], list[float]]:
    """Steps and values of one key; NaN where a value cannot be drawn, so that the line breaks; empty if none can.

    Rows with the same ``step``, which may be another key, are one point.
    """
    points = list({row[step]: row[key] for row in rows if key in row and step in row}.items())
    values = [y if math.isfinite(y) and (y > 0 or not positive) else math.nan for _, y in points]
    if all(math.isnan(y) for y in values):
        return [], []
    return [x for x, _ in points], values


def _skipped_steps(rows: Sequence[Mapping[str, float]]) -> list[float]:
    """Logged steps that were skipped, or before which the count of skipped steps went up."""
    skipped, count = [], 0.0
    for row in rows:
        total = row.get("skipped_steps_total", count)
        if row.get("applied") == 0 or total > count:
            skipped.append(row["step"])
        count = total
    return skipped


def _moving_average(values: Sequence[float]) -> list[float]:
    """Mean over about 1 % of the points on either side, so that it does not lag behind; NaN stays NaN and counts nowhere."""
    import numpy as np

    y = np.asarray(values)
    valid = ~np.isnan(y)
    total, count = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(valid, y, 0.0), valid))
    index, half = np.arange(len(y)), max(2, len(y) // 100)
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    mean = (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)
    return [float(value) for value in np.where(valid, mean, np.nan)]
