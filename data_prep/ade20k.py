"""Source ``ade20k``: images with class masks, in the layout of ADE20K's scene parsing challenge.

::

    images/training/X.jpg        annotations/training/X.png      split train
    images/validation/Y.jpg      annotations/validation/Y.png    split val
    objectInfo150.csv or .txt    the class table, if there is one (any ``objectInfo*``)

Value 0 of a mask is no class, value c is class c of the table, counted from 1; so class_names[c - 1] is its name.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from data_prep.sources import SourceError, Split, fingerprint, listed, one_line
from nepa_dist.data.folder import EXTENSIONS

_FOLDERS = {"train": "training", "val": "validation"}
_IMAGES = tuple(f".{extension}".encode() for extension in EXTENSIONS)


class MaskedFolderSource:
    """Images of one split and their masks.

    Args:
        root: folder with ``images`` and ``annotations``.
        split: which part.

    Raises:
        SourceError: a folder is missing or has folders inside; there are no images; images and annotations do not pair up by
            the stems of their names (all are checked, 20 are named); the class table cannot be understood.
    """

    kind = "ade20k"
    has_masks = True

    def __init__(self, root: Path, split: Split) -> None:
        self.split = split
        part = _FOLDERS[split]
        self._images, self._annotations = (os.fsencode((root / kind / part).absolute()) for kind in ("images", "annotations"))
        images, more = _list(self._images, _IMAGES)
        masks, others = _list(self._annotations, (b".png",))
        self.num_ignored = more + others
        if not images:
            raise SourceError(f"{root / 'images' / part} holds no images")
        self._names = sorted(images)
        self._masks = _pair(self._names, sorted(masks), part)
        self.class_names = _class_table(root)
        self.class_titles = list(self.class_names)
        names = [b"%s\0%s" % pair for pair in zip(self._names, self._masks, strict=True)]
        sizes = [(images[image], masks[mask]) for image, mask in zip(self._names, self._masks, strict=True)]
        self.fingerprint = fingerprint(split, names, np.array(sizes, np.int64))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """File name of an image."""
        return one_line(self._names[index])

    def label(self, index: int) -> int:
        """-1: an image has no single class."""
        return -1

    def read(self, index: int) -> bytes:
        """The image file. Raises OSError if it cannot be read."""
        with open(self._images + b"/" + self._names[index], "rb") as file:
            return file.read()

    def read_mask(self, index: int) -> bytes:
        """The annotation. Raises OSError if it cannot be read."""
        with open(self._annotations + b"/" + self._masks[index], "rb") as file:
            return file.read()


def _list(folder: bytes, suffixes: tuple[bytes, ...]) -> tuple[dict[bytes, int], int]:
    """Name -> size in bytes of the files with one of the suffixes, and the number of others; hidden names are passed over."""
    shown = one_line(folder)
    files: dict[bytes, int] = {}
    ignored = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    raise SourceError(f"{shown} holds the folder {one_line(entry.name)!r}; this layout has files alone")
                if entry.name.lower().endswith(suffixes) and entry.is_file():
                    files[entry.name] = entry.stat().st_size
                else:
                    ignored += 1
    except OSError as error:
        raise SourceError(f"cannot read the folder {shown}: {error.strerror}") from None
    return files, ignored


def _pair(images: list[bytes], masks: list[bytes], part: str) -> list[bytes]:
    """Name of each image's mask."""
    of_stem = {os.path.splitext(mask)[0]: mask for mask in masks}
    stems = [os.path.splitext(image)[0] for image in images]
    seen: set[bytes] = set()
    problems = []
    for image, stem in zip(images, stems, strict=True):
        if stem in seen:
            problems.append(f"images/{part}/{one_line(image)}: another image has the same annotation")
        seen.add(stem)
        if stem not in of_stem:
            problems.append(f"images/{part}/{one_line(image)} has no annotation annotations/{part}/{one_line(stem)}.png")
    problems += [
        f"annotations/{part}/{one_line(mask)} has no image" for mask in masks if of_stem[os.path.splitext(mask)[0]] != mask
    ]
    problems += [f"annotations/{part}/{one_line(mask)} has no image" for stem, mask in of_stem.items() if stem not in seen]
    if problems:
        raise SourceError(f"{len(problems)} images and annotations of {part} do not pair up:{listed(problems)}")
    return [of_stem[stem] for stem in stems]


def _class_table(root: Path) -> list[str]:
    """Names of classes 1, 2, ... from ``objectInfo*.csv`` or ``.txt`` (columns Idx and Name), [] if there is none."""
    tables = sorted(path for path in root.glob("objectInfo*") if path.suffix in (".csv", ".txt"))
    if not tables:
        return []
    path = tables[0]  # .csv before .txt: the release has the same table twice
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file, delimiter="\t" if path.suffix == ".txt" else ",")
        columns = [name.strip() for name in header]
        idx, name = columns.index("Idx"), columns.index("Name")
        rows = [line for line in lines if line]
        table = {int(row[idx]): row[name].strip() for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, IndexError) as error:
        raise SourceError(f"{path} is no class table with the columns Idx and Name: {error!r}") from None
    if len(table) != len(rows) or sorted(table) != list(range(1, len(table) + 1)) or not all(table.values()):
        raise SourceError(f"{path}: Idx must be 1, 2, ... and every class needs a Name")
    return [table[number] for number in sorted(table)]
