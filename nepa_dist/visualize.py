"""Pictures of what a model sees: ``python -m nepa_dist.visualize RUN|WEIGHTS IMAGE...``

For each image the paper's figure 5: the query patch, its attention and the similarity to its prediction, as computed by
:mod:`nepa_dist.maps`. Of a segmentation model the classes over the image, beside the true ones where they are known. Without
images, the curves of the run.

matplotlib and torch are loaded when the first picture is drawn.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nepa_dist.arguments import joined
from nepa_dist.curves import plot_curves
from nepa_dist.pictures import MapRow, draw_maps, draw_segmentation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nepa_dist.config import Config, DataConfig, ModelConfig
    from nepa_dist.gallery import Shown
    from nepa_dist.maps import Query
    from nepa_dist.tasks.segment import SegmentTask
    from nepa_dist.trained import Trained


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


def plot_segmentation(
    task: SegmentTask, data: DataConfig, image: Shown, class_names: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw the classes that a model sees in one image, and those of its mask where it has one, into a PNG file.

    Args:
        task: in evaluation mode.
        data: mean and std.
        image: of any size.
        class_names: of the model's classes.
        path: the file; its folder is made if missing.
        title: above the picture.
    """
    import torch

    from nepa_dist.data.device import normalize
    from nepa_dist.data.segment_augment import class_mask, resize_for_evaluation

    crop = task.backbone.config.image_size
    resized = torch.from_numpy(resize_for_evaluation(image.pixels, (4 * crop, crop)).copy())
    with torch.inference_mode():
        prediction = task.predict(normalize(resized[None], data.mean, data.std), image.pixels.shape[:2])[0]
    truth = None if image.mask is None else class_mask(image.mask, task.config)
    draw_segmentation(path, image.pixels, prediction.numpy(), truth, class_names, title=title)


def default_queries(rows: int, columns: int) -> list[Query]:
    """The patch in the middle, one in the upper right and one in the lower left quarter; fewer where a grid has no more."""
    queries = [(rows // 2, columns // 2), (rows // 4, 3 * columns // 4), (3 * rows // 4, columns // 4)]
    return list(dict.fromkeys(queries))


def _pair(text: str) -> Query:
    row, comma, column = text.partition(",")
    if not (comma and row.strip().isdecimal() and column.strip().isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COL, for example 7,12")
    return int(row), int(column)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, for example 0,6,11") from None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and (width or height).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither PIXELS nor HEIGHTxWIDTH, for example 224 or 224x448")
    return int(height), int(width or height)


def _run(args: argparse.Namespace) -> Iterator[Path]:
    """Draw what was asked for; gives the files as they are made."""
    if not args.model.exists():
        raise ValueError(f"there is no run and no file of weights at {args.model}")
    if not args.images and not args.samples:
        paths = plot_curves(args.model) if args.model.is_dir() else []
        if not paths:
            raise ValueError("there is nothing to draw: name image files, or --samples of the validation split")
        yield from paths
        return
    from nepa_dist.gallery import from_files, from_samples
    from nepa_dist.tasks.segment import SegmentTask
    from nepa_dist.trained import load_trained

    trained = load_trained(args.model, ema=not args.raw)
    data = trained.config.data if args.data is None else trained.config.data.model_copy(update={"source": args.data})
    images = [*from_files(args.images), *from_samples(data, args.samples, trained.config.model.image_size)]
    is_run = (args.model / "checkpoints").is_dir()
    out = args.out or (args.model / "figures" if is_run else Path())
    where = f"{args.model.absolute().name}, {trained.origin}"
    if isinstance(trained.task, SegmentTask) and not (args.query or args.query_patch or args.layers):
        if args.size or args.whole:
            raise ValueError(
                "--size and --whole are for maps: the classes of a segmentation model are drawn over the whole image, at the "
                "size it is evaluated at. Leave them out, or add --query or --layers to draw maps"
            )
        names = trained.class_names or _class_names(trained.config, data)
        for image in images:
            path = out / f"{image.name}_segmentation.png"
            plot_segmentation(trained.task, trained.data, image, names, path, title=f"{image.name}  -  {where}")
            yield path
        return
    images = _fitted(args, images, trained.task.backbone.config)
    patch_size = trained.task.backbone.config.patch_size
    queries = [_queries(args, *(side // patch_size for side in image.pixels.shape[:2])) for image in images]
    for image, wanted in zip(images, queries, strict=True):
        path = out / f"{image.name}_maps.png"
        plot_maps(trained, image.pixels, wanted, path, layers=args.layers, title=f"{image.name}  -  {where}")
        yield path


def _fitted(args: argparse.Namespace, images: list[Shown], model: ModelConfig) -> list[Shown]:
    """The images as the model is to see them."""
    from nepa_dist.gallery import cropped, whole
    from nepa_dist.maps import check_size

    height, width = args.size or (model.image_size, model.image_size)
    for side in (height, width):
        check_size(side, model.patch_size)
    if not args.whole:
        return cropped(images, height, width)
    if height != width:
        raise ValueError(f"--whole keeps the shape of the image: give one size, not {height}x{width}")
    return whole(images, height, model.patch_size)


def _class_names(config: Config, data: DataConfig) -> list[str]:
    """Names of the model's classes as the data has them; numbers where it is out of reach."""
    from nepa_dist.data.classes import class_names
    from nepa_dist.data.containers import DataError
    from nepa_dist.data.open import open_split

    try:
        return class_names(config, open_split(data, "val", image_size=config.model.image_size))
    except DataError:
        return [str(index) for index in range(config.num_classes or 0)]


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
        description="Draw what a patch attends to and predicts, the classes that a segmentation model sees, or a run's curves.",
    )
    parser.add_argument(
        "model", type=Path, metavar="RUN|WEIGHTS", help="folder of a run, a checkpoint or weights, or a safetensors file"
    )
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files; without any, the run's curves")
    parser.add_argument(
        "--samples", type=_numbers, default=[], metavar="0,5,7", help="images of the validation split, by number"
    )
    parser.add_argument("--data", metavar="DATA", help="whose validation split; default: that of the run")
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
    parser.add_argument("--layers", type=_numbers, metavar="0,6,11", help="a panel for each; default: the mean over all layers")
    parser.add_argument(
        "--size", type=_size, metavar="PIXELS|HxW", help="of the central part that the model sees; default: as trained"
    )
    parser.add_argument("--whole", action="store_true", help="the model sees the whole image; its short side gets the size")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/figures; for weights the current folder")
    parser.add_argument("--raw", action="store_true", help="use the weights themselves, not their average")
    args = parser.parse_args(joined(argv))
    logging.basicConfig(format="%(message)s")
    try:
        for path in _run(args):
            print(f"wrote {path}", flush=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
