"""Source ``ilsvrc2012``: the archives of ImageNet-1K as they are downloaded, read in place.

One folder holds ``ILSVRC2012_img_train.tar`` (a tar archive of one tar archive per class), ``ILSVRC2012_img_val.tar`` and
``ILSVRC2012_devkit_t12.tar.gz``; only those of the split are needed, and without the kit a file with the validation labels.
Opening reads the headers once; a sample is then one read at its place.

Samples are called as in the usual folders, ``n01440764/n01440764_10026.JPEG`` and
``n01751748/ILSVRC2012_val_00000001.JPEG``, and class c is the c-th of the sorted WordNet ids.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.imagenet_labels import DEVKIT, WNID, Devkit, read_devkit, read_val_labels
from data_prep.sources import SourceError, Split, fingerprint, listed, one_line
from data_prep.tarscan import Member, scan
from nepa_dist.data.folder import EXTENSIONS

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"

_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
_SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)
# Reading a header is mostly waiting for the file system.
_THREADS = 16


class ImageNetSource:
    """Images of one split in their archive.

    Args:
        root: folder with the archives.
        split: which part.
        val_labels: file with the labels of the validation images, see :func:`data_prep.imagenet_labels.read_val_labels`.

    Raises:
        SourceError: a file is missing, damaged or hostile, or the labels do not fit the images.
    """

    kind = "ilsvrc2012"
    has_masks = False

    def __init__(self, root: Path, split: Split, val_labels: Path | None = None) -> None:
        self.split = split
        self._path = (root / (TRAIN if split == "train" else VAL)).absolute()
        self._descriptor: int | None = None
        self.num_ignored = 0
        devkit = read_devkit(root / DEVKIT) if (root / DEVKIT).exists() else None
        if split == "train":
            names, members, classes = self._train(devkit)
        else:
            names, members, classes = self._val(root, devkit, val_labels)
        self.class_names = classes
        self.class_titles = [devkit.titles[wnid] for wnid in classes] if devkit else []
        if not len(names):
            raise SourceError(f"{self._path} holds no images")
        # Arrays, for objects of 1.3 million samples would be copied into every forked worker.
        rank = np.argsort(names, kind="stable")
        self._names = names[rank]
        self._offsets, self._sizes = members[rank, 0], members[rank, 1]
        index = {wnid.encode(): label for label, wnid in enumerate(classes)}
        self._labels = np.array([index[name.partition(b"/")[0]] for name in self._names], np.int32)
        self.fingerprint = fingerprint(split, self._names.tolist(), self._sizes)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """``<WordNet id>/<file name>``."""
        return one_line(bytes(self._names[index]))

    def label(self, index: int) -> int:
        """Rank of the image's WordNet id among all classes."""
        return int(self._labels[index])

    def read(self, index: int) -> bytes:
        """The image file. Raises OSError if it cannot be read."""
        size = int(self._sizes[index])
        data = os.pread(self._open(), size, int(self._offsets[index]))
        if len(data) != size:
            raise OSError(f"{self._path} became shorter while it was read: {len(data)} of {size} bytes of {self.name(index)}")
        return data

    def read_mask(self, index: int) -> None:
        """None: there are no masks."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def _open(self) -> int:
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise SourceError(f"{self._path} is missing") from None
        return self._descriptor

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def _scan(self) -> list[Member]:
        """The plain files of the outermost archive."""
        descriptor = self._open()
        return scan(descriptor, 0, os.fstat(descriptor).st_size, str(self._path))

    def _train(self, devkit: Devkit | None) -> tuple[NDArray[Any], NDArray[np.int64], list[str]]:
        classes = self._scan()
        wnids = class_archives(classes, str(self._path))
        if devkit and (strange := sorted(set(wnids) - set(devkit.titles))):
            raise SourceError(f"{self._path} holds classes that {DEVKIT} does not know:{listed(strange)}")
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = list(pool.map(self._class, wnids, classes))
        self.num_ignored = sum(ignored for _, _, ignored in parts)
        names = np.concatenate([names for names, _, _ in parts]) if parts else np.array([], "S1")
        members = np.concatenate([members for _, members, _ in parts]) if parts else np.empty((0, 2), np.int64)
        return names, members, sorted(devkit.titles) if devkit else sorted(wnids)

    def _class(self, wnid: str, archive: Member) -> tuple[NDArray[Any], NDArray[np.int64], int]:
        """Names and (offset, size) of the images of one class, and the number of other files."""
        where = f"{self._path}: {wnid}.tar"
        members = scan(self._open(), archive.offset, archive.size, where)
        images = flat_images(members, where)
        if not images:
            raise SourceError(f"{where} holds no images")
        names = np.array([b"%s/%s" % (wnid.encode(), image.name) for image in images])
        return names, np.array([(image.offset, image.size) for image in images], np.int64), len(members) - len(images)

    def _val(
        self, root: Path, devkit: Devkit | None, val_labels: Path | None
    ) -> tuple[NDArray[Any], NDArray[np.int64], list[str]]:
        members = self._scan()
        images = flat_images(members, str(self._path))
        self.num_ignored = len(members) - len(images)
        files = [one_line(image.name) for image in images]
        classes = sorted(devkit.titles) if devkit else _train_classes(root)
        if val_labels is not None:
            labels, classes = read_val_labels(val_labels, files, classes)
        elif devkit:
            labels = _truth(files, devkit, self._path)
        else:
            raise SourceError(
                f"{self._path} holds no labels: put {DEVKIT} beside it, or pass a file with the labels of the validation images"
            )
        names = [f"{wnid}/".encode() + image.name for wnid, image in zip(labels, images, strict=True)]
        places = np.array([(image.offset, image.size) for image in images], np.int64).reshape(-1, 2)
        return np.array(names), places, classes


def class_archives(members: list[Member], where: str) -> list[str]:
    """WordNet ids of the class archives in the training archive.

    Raises:
        SourceError: a member is no ``n########.tar``.
    """
    wnids = [one_line(member.name).removesuffix(".tar") for member in members]
    for member, wnid in zip(members, wnids, strict=True):
        if not WNID.fullmatch(wnid) or not member.name.endswith(b".tar"):
            raise SourceError(f"{where}: {one_line(member.name)!r} is no class archive (n########.tar)")
    return wnids


def flat_images(members: list[Member], where: str) -> list[Member]:
    """The image files among the members; hidden files and those of other names are left out.

    Raises:
        SourceError: a member lies in a folder.
    """
    for member in members:
        if b"/" in member.name:
            raise SourceError(f"{where}: {one_line(member.name)!r} lies in a folder; the archive of a split has none")
    return [m for m in members if m.name.lower().endswith(_SUFFIXES) and not m.name.startswith(b".")]


def _train_classes(root: Path) -> list[str]:
    """Sorted WordNet ids from the training archive, [] where there is none."""
    path = root / TRAIN
    if not path.exists():
        return []
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return sorted(class_archives(scan(descriptor, 0, os.fstat(descriptor).st_size, str(path)), str(path)))
    finally:
        os.close(descriptor)


def _truth(files: list[str], devkit: Devkit, path: Path) -> list[str]:
    """WordNet id of each validation image: line k of the ground truth is for the image with number k in its name."""
    numbers = []
    for file in files:
        if not (found := _VAL_NAME.fullmatch(file)):
            raise SourceError(f"{path}: {file!r} is not named ILSVRC2012_val_########.JPEG, so its label is unknown")
        numbers.append(int(found[1]))
    wanted = range(1, len(devkit.truth) + 1)
    missing = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in sorted(set(wanted) - set(numbers))]
    extra = [file for file, number in zip(files, numbers, strict=True) if number not in wanted]
    if missing or extra:
        raise SourceError(
            f"{path} and the ground truth in {DEVKIT} ({len(wanted)} images) differ; missing {len(missing)}, without label "
            f"{len(extra)}:{listed([*missing, *extra])}"
        )
    return [devkit.truth[number - 1] for number in numbers]
