"""Which kind of source a folder is, and its opening. The kinds implement :class:`data_prep.sources.Source`."""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.sources import Source, SourceError, Split

KINDS = ("folder", "ilsvrc2012", "ade20k", "parquet")

_TABLE_FOLDERS = ("data", "train", "training", "val", "valid", "validation")


def open_source(
    path: str | os.PathLike[str],
    *,
    kind: str = "auto",
    split: Split,
    val_labels: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Open one split of a data set.

    Args:
        path: the folder that holds ``train/`` and ``val/`` or the images themselves (kind ``folder``), the ILSVRC2012
            archives (``ilsvrc2012``), ``images/`` and ``annotations/`` (``ade20k``), or Parquet or Arrow files (``parquet``).
        kind: one of KINDS, or ``auto``: what the folder looks like.
        split: which part.
        val_labels: for ``ilsvrc2012``: a text file with the labels of the validation images, see
            :func:`data_prep.imagenet_labels.read_val_labels`; default: those of the development kit.
        image_column: for ``parquet``, where several columns could be the image.
        label_column: for ``parquet``, where several columns could be the label.

    Raises:
        SourceError: the folder or the kind is unknown, an option does not belong to it, or the source cannot be used.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        hint = "; pass the folder that holds it" if root.exists() else ""
        raise SourceError(f"source {path} is not a folder{hint}")
    if split not in ("train", "val"):
        raise SourceError(f"split {split!r} is unknown; use train or val")
    kind = _guess(root) if kind == "auto" else kind
    if kind not in KINDS:
        raise SourceError(f"source kind {kind!r} is unknown; use auto, {', '.join(KINDS)}")
    homes = {"val_labels": "ilsvrc2012", "image_column": "parquet", "label_column": "parquet"}
    given = {"val_labels": val_labels, "image_column": image_column, "label_column": label_column}
    for option, value in given.items():
        if value is not None and kind != homes[option]:
            raise SourceError(f"{option} is for sources of kind {homes[option]}; {root} is of kind {kind}")
    if kind == "ilsvrc2012":
        from data_prep.imagenet import ImageNetSource

        return ImageNetSource(root, split, None if val_labels is None else Path(val_labels))
    if kind == "ade20k":
        from data_prep.ade20k import MaskedFolderSource

        return MaskedFolderSource(root, split)
    if kind == "parquet":
        from data_prep.parquet import ParquetSource

        return ParquetSource(root, split, image_column=image_column, label_column=label_column)
    from data_prep.folder import FolderSource

    return FolderSource(root, split)


def _guess(root: Path) -> str:
    """Kind of a folder by its look.

    Raises:
        SourceError: it looks like several.
    """
    parts = {entry.name for entry in root.iterdir()}
    looks = []
    if parts & {"ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"}:
        looks.append("ilsvrc2012")
    if {"images", "annotations"} <= parts:
        looks.append("ade20k")
    if any(_has_tables(root / part) for part in (".", *_TABLE_FOLDERS)):
        looks.append("parquet")
    elif parts & {"train", "val"}:
        looks.append("folder")
    if len(looks) > 1:
        raise SourceError(f"{root} looks like {' and '.join(looks)}; say which with the source kind")
    return looks[0] if looks else "folder"


def _has_tables(folder: Path) -> bool:
    try:
        return any(name.endswith((".parquet", ".arrow")) for name in os.listdir(folder))
    except OSError:  # it is not there, or may not be entered: opening it will say so
        return False
