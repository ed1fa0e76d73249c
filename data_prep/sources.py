"""What a prepared split is made from: one view of image folders, the ILSVRC2012 archives, ADE20K's layout and Parquet files.

A sample's id is the rank of its name among all names, sorted by their bytes. So the images of a folder and the same images
in the archives it was unpacked from have the same ids, names, labels and fingerprint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]
KINDS = ("folder", "ilsvrc2012", "ade20k", "parquet")

LOST = (FileNotFoundError, PermissionError)
"""Errors of reading a sample that are about this sample alone; others are about the disk or the network."""

_TABLE_FOLDERS = ("data", "train", "training", "val", "valid", "validation")


class SourceError(ValueError):
    """A source cannot be used; the message says what is wrong, where, and what to do."""


class Source(Protocol):
    """Random access to the images of one split. Can be pickled and forked."""

    kind: str
    """One of KINDS."""
    split: Split
    class_names: list[str]
    """Class c of the labels is class_names[c]; with masks, the class of value c + 1. Empty if no class is known."""
    class_titles: list[str]
    """Names for people, one per class, or empty."""
    fingerprint: str
    """SHA-256, hexadecimal, of names and sizes; it knows neither the machine nor the path."""
    has_masks: bool
    """Every sample has a class mask, or none has."""
    num_ignored: int
    """Files beside the samples that are none by their name."""

    def __len__(self) -> int:
        """Number of samples N, at least 1."""

    def name(self, index: int) -> str:
        """Where sample ``index`` comes from, relative to the source; one line, without control characters."""

    def label(self, index: int) -> int:
        """Class of a sample; -1 is unknown."""

    def read(self, index: int) -> bytes:
        """The image file. Raises OSError if it cannot be read, BadImage if the source holds none for this sample."""

    def read_mask(self, index: int) -> bytes | None:
        """The PNG with the class of each pixel, None without masks. Raises OSError if it cannot be read."""


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
    # Imported here, for these modules import this one.
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


def one_line(name: str | bytes) -> str:
    """A name as text without line breaks and other control characters, which are written as escapes."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fingerprint(split: str, names: Iterable[bytes], sizes: NDArray[np.int64]) -> str:
    """Digest of the names and sizes of a split in the order of ids, as folders of images have it too."""
    digest = hashlib.sha256(split.encode() + b"\0" + b"\0".join(names) + b"\0")
    digest.update(sizes.astype("<i8").tobytes())
    return digest.hexdigest()


def listed(problems: list[str], most: int = 20) -> str:
    """Problems for a message, one per line, the first ``most`` of them."""
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join(["", *problems[:most], *more])


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
