"""Pictures over pixels: attention and similarity maps, segmentation masks, and the colours of classes. Imports no torch.

matplotlib is loaded when the first picture is drawn, and only its file output: no display is needed.
Suffix letters: H and W height and width in pixels, C classes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IGNORE = 255
"""Mask value of pixels without a class."""

MAX_LEGEND = 20
"""Classes that the legend of a segmentation names; it counts the rest."""

_QUERY_COLOR = "#e8112d"
_PANEL_INCHES = 3.4
_LEGEND_ROW_INCHES = 0.19
_MAX_NAME = 28  # characters of a class name in the legend
_MIN_COSINE_SPAN = 0.02  # a map flatter than this is drawn flat, not stretched until its noise shows
_CLASS_WEIGHT = 0.62  # of the class colour over the image
_LEGEND_GRAY = 167.0  # what the pale image is on average, so that the legend shows colours as they look in the picture


def save_figure(path: Path, title: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Write one PNG file, in one step: a reader sees the old or the new picture.

    Args:
        path: the file; its folder is made if missing.
        title: above the picture.
        size: width and height, inches of 150 pixels.
        draw: fills the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)  # a name of a file or a run may have dollar signs
    draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)


class MapRow(NamedTuple):
    """What is shown of one query patch."""

    query: tuple[int, int]
    """Row and column of the patch, from 0."""
    attention: Mapping[str, NDArray[np.floating[Any]]]
    """Title of the panel to weights [rows, columns]; what is missing from a sum of 1 went to CLS."""
    similarity: NDArray[np.floating[Any]] | None
    """Cosines [rows, columns] of the prediction of the query patch with every patch; None for a model that predicts none."""


def draw_maps(path: str | Path, image: NDArray[np.uint8], rows: Sequence[MapRow], *, title: str) -> None:
    """Draw the paper's figure 5 into a PNG file: the image with the query patch, its attention, its similarity; a row each.

    Each panel of maps has a colour scale of its own: from 0 to the largest weight, from the least cosine to the largest.
    Patches with a weight of exactly 0 stay gray.

    Args:
        path: the file; its folder is made if missing.
        image: uint8 [H, W, 3], as the model saw it.
        rows: one for each query, all with the same panels.
        title: above the picture.

    Raises:
        ValueError: there is no row, or the grid of a map does not divide the image.
    """
    if not rows:
        raise ValueError("there is no query patch to draw")
    for row in rows:
        for grid in (*row.attention.values(), *([] if row.similarity is None else [row.similarity])):
            if image.shape[0] % grid.shape[0] or image.shape[1] % grid.shape[1]:
                raise ValueError(f"a map of {grid.shape} patches does not divide an image of {image.shape[:2]} pixels")
    num_panels = 1 + len(rows[0].attention) + (rows[0].similarity is not None)
    aspect = min(max(image.shape[0] / image.shape[1], 0.4), 2.5)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(rows), num_panels, squeeze=False)
        for line, row in zip(grid, rows, strict=True):
            _draw_map_row(list(line), image, row)

    size = (_PANEL_INCHES * num_panels + 0.6, (_PANEL_INCHES * aspect - 0.2) * len(rows) + 0.4)
    save_figure(Path(path), title, size, draw)


def _draw_map_row(panels: list[Axes], image: NDArray[np.uint8], row: MapRow) -> None:
    panels[0].imshow(image)
    panels[0].set_title(f"query: row {row.query[0]}, column {row.query[1]}\n", fontsize=10)
    shape = next(grid.shape for grid in (*row.attention.values(), row.similarity) if grid is not None)
    for axes, (name, weights) in zip(panels[1:], row.attention.items(), strict=False):
        percent = np.where(weights > 0, 100 * weights, np.nan)  # what cannot be seen, all later patches, stays gray
        label = "share of attention, %"
        _draw_overlay(axes, image, percent, (0.0, max(100 * float(weights.max()), 1e-6)), "inferno", label)
        axes.set_title(f"attention, {name}\n{max(0.0, 100 - 100 * float(weights.sum())):.0f} % to CLS", fontsize=10)
    if row.similarity is not None:
        low, high = float(row.similarity.min()), float(row.similarity.max())
        slack = max(0.0, _MIN_COSINE_SPAN - (high - low)) / 2
        _draw_overlay(panels[-1], image, row.similarity, (low - slack, high + slack), "viridis", "cosine")
        rank = 1 + int((row.similarity > row.similarity[row.query]).sum())
        place = "most similar" if rank == 1 else f"number {rank} of {row.similarity.size}"
        panels[-1].set_title(f"similarity to the prediction\nquery is {place}", fontsize=10)
    for axes in panels:
        _outline(axes, row.query, image.shape[0] // shape[0], image.shape[1] // shape[1])
        axes.set_axis_off()


def _draw_overlay(
    axes: Axes,
    image: NDArray[np.uint8],
    values: NDArray[np.floating[Any]],
    limits: tuple[float, float],
    colors: str,
    label: str,
) -> None:
    """A map over the image in gray, one rectangle per patch, exactly over its pixels."""
    height, width = image.shape[:2]
    axes.imshow(_pale(image), cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    low, high = limits
    drawn = axes.imshow(values, cmap=colors, vmin=low, vmax=high, alpha=0.7, extent=extent, interpolation="nearest")
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=9)


def _pale(image: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
    """The image in gray, pale and of little contrast: what shines through must not change the colour that is read off."""
    pale: NDArray[np.floating[Any]] = 110 + 0.45 * image.mean(axis=2)
    return pale


def _outline(axes: Axes, query: tuple[int, int], height: int, width: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (query[1] * width - 0.5, query[0] * height - 0.5)
    for color, line in (("white", 3.6), (_QUERY_COLOR, 1.8)):
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=line))


def draw_segmentation(
    path: str | Path,
    image: NDArray[np.uint8],
    prediction: NDArray[np.integer[Any]],
    truth: NDArray[np.integer[Any]] | None,
    class_names: Sequence[str],
    colors: NDArray[np.uint8] | None = None,
    *,
    ignore: int = IGNORE,
    title: str = "segmentation",
) -> None:
    """Draw the classes of pixels over an image into a PNG file: image, prediction and, where given, truth.

    The legend names the classes that occur, the largest first, with their share of the pixels; pixels without a class are
    striped.

    Args:
        path: the file; its folder is made if missing.
        image: uint8 [H, W, 3].
        prediction: integer [H, W], class of each pixel, or ``ignore``.
        truth: integer [H, W], the same for the labels, or None.
        class_names: name of each of the C classes, by index.
        colors: uint8 [C, 3]; default: :func:`class_colors`.
        ignore: value of pixels without a class.
        title: above the picture.

    Raises:
        ValueError: a mask has another size than the image, or a value that is no class; or there is not a colour per class.
    """
    panels = {"prediction": prediction} if truth is None else {"prediction": prediction, "truth": truth}
    for name, part in panels.items():
        _check_mask(name, part, image, len(class_names), ignore)
    colors = class_colors(len(class_names)) if colors is None else colors
    if colors.shape != (len(class_names), 3):
        raise ValueError(f"the colours {colors.shape} must be [{len(class_names)}, 3], one for each class")

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, 1 + len(panels))
        grid[0].imshow(image)
        grid[0].set_title("image", fontsize=10)
        for axes, (name, part) in zip(grid[1:], panels.items(), strict=True):
            axes.imshow(_paint(image, part, colors, ignore))
            axes.set_title(name, fontsize=10)
        for axes in grid:
            axes.set_axis_off()
        for text in figure.legend(handles=legend, loc="outside right upper", frameon=False, fontsize=9).get_texts():
            text.set_parse_math(False)

    legend = _legend(panels, class_names, colors, ignore)
    aspect = min(max(image.shape[1] / image.shape[0], 0.4), 2.5)
    height = max(_PANEL_INCHES + 0.5, _LEGEND_ROW_INCHES * len(legend) + 0.2)
    save_figure(Path(path), title, (_PANEL_INCHES * aspect * (1 + len(panels)) + 3.2, height), draw)


def _check_mask(name: str, mask: NDArray[np.integer[Any]], image: NDArray[np.uint8], num_classes: int, ignore: int) -> None:
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the {name} has {mask.shape} pixels, the image {image.shape[:2]}")
    wrong = sorted({int(value) for value in np.unique(mask)} - {ignore} - set(range(num_classes)))
    if wrong:
        raise ValueError(f"the {name} holds {wrong[0]}, which is neither one of {num_classes} classes nor {ignore} (ignored)")


def _paint(
    image: NDArray[np.uint8], mask: NDArray[np.integer[Any]], colors: NDArray[np.uint8], ignore: int
) -> NDArray[np.uint8]:
    """The pale image under the colours of its classes; pixels without a class are gray stripes, which no class looks like."""
    ignored = mask == ignore
    painted = _blend(_pale(image)[:, :, None], colors[np.where(ignored, 0, mask)])
    y, x = np.indices(mask.shape)
    stripes = (x + y) // max(2, mask.shape[0] // 60) % 2
    painted[ignored] = np.where(stripes, 105, 165)[ignored][:, None]
    result: NDArray[np.uint8] = painted.round().astype(np.uint8)
    return result


def _blend(gray: NDArray[np.floating[Any]] | float, color: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
    blended: NDArray[np.floating[Any]] = gray * (1 - _CLASS_WEIGHT) + color * _CLASS_WEIGHT
    return blended


def _legend(
    masks: Mapping[str, NDArray[np.integer[Any]]], class_names: Sequence[str], colors: NDArray[np.uint8], ignore: int
) -> list[Any]:
    from matplotlib.patches import Patch

    counts = {
        name: dict(zip(*(part.tolist() for part in np.unique(mask, return_counts=True)), strict=True))
        for name, mask in masks.items()
    }
    size = next(iter(masks.values())).size
    area: dict[int, int] = {}
    for part in counts.values():
        for index, count in part.items():
            area[index] = area.get(index, 0) + count

    def shares(index: int) -> str:
        return " / ".join(f"{100 * part.get(index, 0) / size:.1f}" for part in counts.values()) + " %"

    order = sorted((index for index in area if index != ignore), key=lambda index: (-area[index], index))
    patches = [
        Patch(
            facecolor=tuple((_blend(_LEGEND_GRAY, colors[index]) / 255).tolist()),
            label=f"{_shorten(class_names[index])}  {shares(index)}",
        )
        for index in order[:MAX_LEGEND]
    ]
    if (others := len(order) - MAX_LEGEND) > 0:
        patches.append(Patch(facecolor="none", label=f"{others} other{'s' if others > 1 else ''}"))
    if ignore in area:
        patches.append(Patch(facecolor="#a5a5a5", edgecolor="#696969", hatch="////", label=f"no class  {shares(ignore)}"))
    if len(masks) > 1:
        patches.append(Patch(facecolor="none", label=f"({' / '.join(masks)}, share of pixels)"))
    return patches


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1].rstrip() + "\u2026"


def class_colors(num_classes: int) -> NDArray[np.uint8]:
    """Colours of classes, as different to the eye as can be: class i has the same colour whatever the number of classes.

    Each next colour is the one farthest from all before it, in OKLab, among saturated colours of medium lightness; grays are
    left to what has no class. They repeat after 1024.

    Args:
        num_classes: C.

    Returns:
        uint8 [C, 3].
    """
    return np.resize(_palette(), (num_classes, 3))


@functools.cache
def _palette() -> NDArray[np.uint8]:
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (chroma > 0.06) & (lab[:, 0] > 0.35) & (lab[:, 0] < 0.93)
    rgb, lab = rgb[usable], lab[usable]
    chosen = [int(chroma[usable].argmax())]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < 1024:
        distance = np.minimum(distance, ((lab - lab[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(distance.argmax()))
    palette: NDArray[np.uint8] = rgb[chosen]
    palette.setflags(write=False)  # it is shared
    return palette


def _oklab(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Lightness, green-red, blue-yellow [N, 3] of sRGB colours [N, 3] (B. Ottosson, "A perceptual color space", 2020)."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    result: NDArray[np.float64] = np.cbrt(linear @ to_cones.T) @ to_lab.T
    return result
