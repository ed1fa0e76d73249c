"""Pictures of a run: its curves, and what its model sees.

``python -m nepa_dist.visualize RUN`` draws the curves that are in ``metrics.jsonl``, as the trainer does when it ends.
``python -m nepa_dist.visualize RUN|WEIGHTS IMAGE...`` draws for each image the paper's figure 5: the query patch, its attention
and the similarity to its prediction, as :mod:`nepa_dist.maps` computes them.

matplotlib and torch are loaded when the first picture is drawn, so that the trainer's curves need no torch.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nepa_dist.metrics.sinks import read_curve
from nepa_dist.pictures import MapRow, draw_maps, save_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from nepa_dist.maps import Query
    from nepa_dist.trained import Trained

Series = Mapping[str, tuple[list[float], list[float]]]
"""Lines by their name in the legend: x values, y values."""

_COLORS = ("#1f6fb4", "#d9711c", "#2c8c4a", "#a03aa0", "#7a6a52", "#4d4d4d")
_SCORES = dict.fromkeys(("top1", "top5", "miou", "macc", "aacc"), "step")
_SMOOTH_MIN_POINTS = 20  # fewer points are shown as they are


def plot_curves(run_dir: str | Path) -> list[Path]:
    """Draw the curves of a run into ``<run_dir>/figures``.

    ``loss.png``, ``grad_norm.png`` (logarithmic), ``knn.png`` (accuracy beside training), ``validation.png`` (scores of
    fine-tuning and segmentation) and ``collapse.png`` (mean cosine and effective rank of targets and predictions); each only
    if the run has values for it. Loss and gradient norm show a moving average with the raw values behind it, and mark where
    steps were skipped.

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
    for name, scores, label in (("knn", {"knn_top1": "knn_step"}, "k-NN top-1"), ("validation", _SCORES, "score")):
        lines = {key: _points(rows, key, step=at) for key, at in scores.items()}
        if lines := {key: points for key, points in lines.items() if points[0]}:
            plot_lines(figures / f"{name}.png", lines, xlabel="step", ylabel=label, title=title)
            paths.append(figures / f"{name}.png")
    panels: dict[str, Series] = {}
    for ylabel, family in (("mean pairwise cosine", "embedding_mean_cosine"), ("effective rank", "embedding_effective_rank")):
        lines = {name: _points(rows, f"{family}.{key}") for name, key in (("targets", "target"), ("predictions", "pred"))}
        if lines := {name: points for name, points in lines.items() if points[0]}:
            panels[ylabel] = lines
    if panels:
        paths.append(_plot_panels(figures / "collapse.png", panels, title))
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

    A value that several rows repeat, as told by its ``step``, is one point.
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


def plot_maps(
    trained: Trained,
    image: NDArray[np.uint8],
    queries: Sequence[Query],
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    title: str,
) -> None:
    """Draw attention and similarity maps of one image into a PNG file, one row for each query patch.

    Args:
        trained: from :func:`nepa_dist.trained.load_trained`. A classifier predicts no patches: it gets no similarity map.
        image: uint8 [H, W, 3], both sides multiples of the patch size.
        queries: row and column of each query patch.
        path: the file; its folder is made if missing.
        layers: a panel of attention for each; default: one panel, the mean over all layers.
        title: above the picture.

    Raises:
        ValueError: a query is outside the grid, a layer is no block, or the size does not fit.
    """
    import torch

    from nepa_dist.data.device import normalize
    from nepa_dist.maps import attention_maps, similarity_map
    from nepa_dist.tasks.pretrain import PretrainTask

    task = trained.task
    pixels = normalize(torch.from_numpy(image.copy())[None], trained.data.mean, trained.data.std)[0]
    causal = trained.config.causal
    rows = []
    for query in queries:
        maps = attention_maps(task.backbone, pixels, query, layers=layers, causal=causal)
        if layers is None:
            named = {"mean of all layers": torch.stack(list(maps.values())).mean(dim=0).numpy()}
        else:
            named = {f"layer {layer % len(task.backbone.blocks)}": weights.numpy() for layer, weights in maps.items()}
        similarity = similarity_map(task, pixels, query).numpy() if isinstance(task, PretrainTask) else None
        rows.append(MapRow(query, named, similarity))
    draw_maps(path, image, rows, title=title)


def default_queries(rows: int, columns: int) -> list[Query]:
    """The patch in the middle, one in the upper right and one in the lower left quarter; fewer where a grid has no more."""
    queries = [(rows // 2, columns // 2), (rows // 4, 3 * columns // 4), (3 * rows // 4, columns // 4)]
    return list(dict.fromkeys(queries))


def _read_images(files: Sequence[Path], size: tuple[int, int], whole: bool, patch_size: int) -> list[NDArray[np.uint8]]:
    """Images, cropped in the middle and scaled to a size; names every image that cannot be read, not only the first.

    Args:
        files: the images.
        size: height and width, pixels.
        whole: keep the shape of each image instead: its short side gets the height, both become multiples of the patch size.
        patch_size: pixels.
    """
    import numpy as np
    from PIL import Image, ImageOps

    from nepa_dist.data.decode import BadImage, decode_image

    images, problems = [], []
    for file in files:
        try:
            image = Image.fromarray(decode_image(file.read_bytes()))
            height, width = size
            if whole:
                scale = height / min(image.size) / patch_size
                width, height = (max(1, round(side * scale)) * patch_size for side in image.size)
            images.append(np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)))
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
        except BadImage as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise ValueError("\n".join(["these images cannot be read:", *(f"  - {problem}" for problem in problems)]))
    return images


def _names(files: Sequence[Path]) -> list[str]:
    """A file name for the picture of each image; images of the same name in several folders are numbered."""
    names: list[str] = []
    for file in files:
        name, number = f"{file.stem}_maps.png", 1
        while name in names:
            number += 1
            name = f"{file.stem}-{number}_maps.png"
        names.append(name)
    return names


def _pair(text: str) -> Query:
    row, comma, column = text.partition(",")
    if not (comma and row.strip().isdecimal() and column.strip().isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COL, for example 7,12")
    return int(row), int(column)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and (width or height).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither PIXELS nor HEIGHTxWIDTH, for example 224 or 224x448")
    return int(height), int(width or height)


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers, for example 0,6,11") from None


def _run(args: argparse.Namespace) -> list[Path]:
    if not args.images:
        if paths := plot_curves(args.model):
            return paths
        raise ValueError(f"{args.model} has logged nothing that could be drawn; name images to draw maps")
    from nepa_dist.maps import check_size
    from nepa_dist.trained import load_trained

    trained = load_trained(args.model, ema=not args.raw)
    config = trained.task.backbone.config
    size = args.size or (config.image_size, config.image_size)
    for side in size:
        check_size(side, config.patch_size)
    if args.whole and size[0] != size[1]:
        raise ValueError(f"--whole keeps the shape of the image: give one size, not {size[0]}x{size[1]}")
    out = args.out or (args.model / "figures" if (args.model / "checkpoints").is_dir() else Path())
    images = _read_images(args.images, size, args.whole, config.patch_size)
    queries = [_queries(args, image.shape[0] // config.patch_size, image.shape[1] // config.patch_size) for image in images]
    paths = [out / name for name in _names(args.images)]
    for file, image, wanted, path in zip(args.images, images, queries, paths, strict=True):
        title = f"{file.name}  -  {trained.provenance.name}, {trained.origin}"
        plot_maps(trained, image, wanted, path, layers=args.layers, title=title)
    return paths


def _queries(args: argparse.Namespace, rows: int, columns: int) -> list[Query]:
    """The query patches in a grid; refuses those that are not in it."""
    from nepa_dist.maps import check_query

    for number in args.query_patch:
        if not 0 <= number < rows * columns:
            last = rows * columns - 1
            raise ValueError(f"query patch {number} is outside the grid of {rows} x {columns}: patches are 0 to {last}")
    queries = list(args.query) + [divmod(number, columns) for number in args.query_patch]
    for query in queries:
        check_query(query, rows, columns)
    return queries or default_queries(rows, columns)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nepa_dist.visualize",
        description="Draw the curves of a run, or what a query patch of an image attends to and how well it is predicted.",
    )
    parser.add_argument(
        "model", type=Path, metavar="RUN|WEIGHTS", help="folder of a run, a checkpoint or weights, or a safetensors file"
    )
    parser.add_argument(
        "images", type=Path, nargs="*", metavar="IMAGE", help="image files; the central square is used. None: the run's curves"
    )
    parser.add_argument(
        "--query", type=_pair, action="append", default=[], metavar="ROW,COL", help="query patch, from 0; repeat for more"
    )
    parser.add_argument(
        "--query-patch",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="query patch by number, row by row from 0; repeat for more",
    )
    parser.add_argument("--layers", type=_layers, metavar="0,6,11", help="a panel for each; default: the mean over all layers")
    parser.add_argument(
        "--size", type=_size, metavar="PIXELS|HxW", help="of the image that the model sees; default: as trained"
    )
    parser.add_argument("--whole", action="store_true", help="keep the shape of the image; its short side gets the size")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/figures; for weights the current folder")
    parser.add_argument("--raw", action="store_true", help="use the weights themselves, not their average")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        for path in _run(args):
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
