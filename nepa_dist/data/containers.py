"""Where sample i is: a folder, a prepared split, the embedded digits. A container knows nothing of order, rank or epoch."""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nepa_dist.config import DataConfig
from nepa_dist.data.index import MANIFEST

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
"""Endings of image files, in any case."""

DIGITS = "digits"
"""The source that names the embedded data set. A folder of that name is reached as ``./digits``."""

_SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)
_SHARDS = (b".tar", b".mds", b".beton")
_LAYOUT = "expected FOLDER/train/<class>/* and FOLDER/val/<class>/*"


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Sample:
    """One sample as its container holds it."""

    image: bytes | NDArray[np.uint8]
    """A whole image file, or RGB pixels [H, W, 3] that need no decoding."""
    label: int
    """Index into the container's class_names; -1 is unknown."""
    mask: NDArray[np.integer[Any]] | None = None
    """[H, W], the class of each pixel."""


class Container(Protocol):
    """Random access to the samples of one split. Implementations can be pickled and forked: no open files."""

    class_names: list[str]
    """Class c of the labels is class_names[c]; empty if there are no labels."""
    fingerprint: str
    """SHA-256, hexadecimal, of the names and sizes of the samples; it goes into checkpoints."""
    num_ignored: int
    """Files beside the samples that are no images by their name."""

    def __len__(self) -> int:
        """Number of samples N."""

    def read(self, index: int) -> Sample:
        """Sample 0 <= index < N. Raises OSError if it cannot be read."""

    def name(self, index: int) -> str:
        """What to call a sample in a message: a path or an id."""


def open_container(
    source: str | None,
    split: Literal["train", "val"],
    *,
    image_size: int,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
) -> Container:
    """Open one split of a data set.

    Args:
        source: ``digits``, or a folder that holds ``train`` and ``val``, or (for the train split) the images themselves; the
            parts may be prepared splits, and then a URL that holds them will do as well.
        split: which part.
        image_size: pixels, the side at which embedded scenes are drawn; folders do not use it.
        cache_dir, cache_bytes: of what comes from a URL, see :class:`nepa_dist.data.remote.RemoteContainer`.

    Raises:
        DataError: source is None, is no folder, has another layout, cannot be read or holds no images.
    """
    if source is None:
        raise DataError("data.source is not set: pass --data FOLDER or --data digits")
    if source == DIGITS:
        from nepa_dist.data.digits import DigitScenes  # it imports Sample from here

        return DigitScenes(split, image_size)
    if "://" in source:
        from nepa_dist.data.remote import RemoteContainer

        return RemoteContainer(f"{source.rstrip('/')}/{split}", cache_dir=cache_dir, cache_bytes=cache_bytes)
    root = _existing_folder(source)
    if os.path.isfile(root / split / MANIFEST):
        from nepa_dist.data.prepared import PreparedContainer

        return PreparedContainer(root / split)
    for folder in (root / split, root):
        _refuse_shards(folder)
    parts = [name for name in ("train", "val") if os.path.isdir(root / name)]
    if split in parts:
        return FolderContainer(root / split, split, class_roots=[root / part for part in parts])
    if parts:
        raise DataError(f"{root} has {parts[0]}/ but no {split}/: {_LAYOUT}")
    if split == "val":
        raise DataError(f"{root} has no val/ folder, so there is no validation split: {_LAYOUT}")
    return FolderContainer(root, split)


def _refuse_shards(folder: Path) -> None:
    """Raise DataError for a folder of shards that is no prepared split. Archives beside folders or images are none."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except OSError:
        return  # it is missing, or whoever reads it next will say why it cannot be read
    names = [os.fsencode(entry.name).lower() for entry in entries]
    if MANIFEST.encode() in names:
        here = folder.absolute()
        if here.name in ("train", "val"):
            raise DataError(f"{folder} is one prepared split: name the folder that holds it, {here.parent}")
        raise DataError(
            f"{folder} is one prepared split under another name: a data set holds its splits as OUT/train and OUT/val; "
            f"mkdir OUT, mv {folder} OUT/train, then name OUT"
        )
    if b"plan.json" in names:
        raise DataError(f"{folder} is a prepared split that is not finished: run the same python -m data_prep command again")
    shards = [entry.name for entry, name in zip(entries, names, strict=True) if name.endswith(_SHARDS)]
    if shards and not any(os.path.isdir(e.path) or n.endswith(_SUFFIXES) for e, n in zip(entries, names, strict=True)):
        raise DataError(f"{folder} holds shards ({min(shards)}, ...) without an index: python -m data_prep adopt {folder}")


def open_split(config: DataConfig, split: Literal["train", "val"], *, image_size: int) -> Container:
    """:func:`open_container` of the source, and with the cache, that a configuration names."""
    cache_bytes = None if config.cache_gigabytes is None else round(config.cache_gigabytes * 1e9)
    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    return open_container(config.source, split, image_size=image_size, cache_dir=cache_dir, cache_bytes=cache_bytes)


class FolderContainer:
    """Image files below a folder.

    The first folder in a file's path below the root is its class; a file in the root itself has label -1. Hidden names are
    passed over; other files that are no images by name are counted in ``num_ignored``. A symbolic link to a folder is
    followed, but no folder is entered twice, and its own place in the tree counts before a link to it.

    Args:
        root: the folder.
        split: goes into the fingerprint.
        class_roots: folders whose sub-folders together are the classes, so that a label means the same in every split even
            where one lacks a class; default: root.

    Raises:
        DataError: a folder cannot be read or there are no images.
    """

    def __init__(self, root: Path, split: str, class_roots: Sequence[Path] = ()) -> None:
        self.root = root
        self.num_ignored = 0
        self._root = os.fsencode(os.path.abspath(root))
        files = sorted(self._scan())
        if not files:
            endings = ", ".join(EXTENSIONS)
            raise DataError(f"{root} holds no images ({self.num_ignored} files ignored); images end in {endings} (any case)")
        names = [name for name, _ in files]
        # One blob and arrays instead of a list: reading a python string in a forked worker would copy its memory page.
        self._blob = np.frombuffer(b"".join(names), np.uint8)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.class_names, self._labels = self._classes(names, class_roots or [root])
        digest = hashlib.sha256(split.encode() + b"\0" + b"\0".join(names) + b"\0")
        digest.update(np.array([size for _, size in files], "<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> Sample:
        """The bytes of file ``index`` and its label. Raises OSError if the file cannot be read."""
        with open(self._root + b"/" + self._relative(index), "rb") as file:
            return Sample(file.read(), self.label(index))

    def label(self, index: int) -> int:
        """Class of file ``index``; -1 is unknown."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Path of file ``index`` relative to the root."""
        return _printable(self._relative(index))

    def _relative(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])].tobytes()

    def _scan(self) -> Iterator[tuple[bytes, int]]:
        """Relative name and size in bytes of every image file, in no particular order."""
        seen: set[tuple[int, int]] = set()
        folders = deque([b""])
        while folders:
            folder = folders.popleft()
            for entry in _list_folder(self._root + b"/" + folder, seen):
                relative = folder + entry.name
                if _is_folder(entry):
                    if entry.is_symlink():
                        folders.append(relative + b"/")  # after all real folders
                    else:
                        folders.appendleft(relative + b"/")
                    continue
                size = _file_size(entry) if entry.name.lower().endswith(_SUFFIXES) else None
                if size is None:
                    self.num_ignored += 1
                else:
                    yield relative, size

    def _classes(self, names: list[bytes], roots: Sequence[Path]) -> tuple[list[str], NDArray[np.int32]]:
        """Class names and the label of each file."""
        firsts = [name.partition(b"/")[0] if b"/" in name else b"" for name in names]
        if not any(firsts):
            return [], np.full(len(names), -1, np.int32)
        found = {entry.name for root in roots for entry in _list_folder(os.fsencode(root), set()) if _is_folder(entry)}
        classes = sorted(found)
        index = {name: i for i, name in enumerate(classes)} | {b"": -1}
        return [_printable(name) for name in classes], np.array([index[folder] for folder in firsts], np.int32)


def _list_folder(path: bytes, seen: set[tuple[int, int]]) -> list[os.DirEntry[bytes]]:
    """Entries that are not hidden, sorted by name; none if the folder, under any name, is in ``seen``."""
    try:
        info = os.stat(path)
        if (info.st_dev, info.st_ino) in seen:
            return []
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(path) as entries:
            return sorted((e for e in entries if not e.name.startswith(b".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {_printable(path)}: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _file_size(entry: os.DirEntry[bytes]) -> int | None:
    """Size in bytes; -1 for a name that leads nowhere (reading it will report it); None for what is no file, such as a pipe."""
    try:
        info = entry.stat()
    except OSError:
        return -1
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def _existing_folder(source: str) -> Path:
    root = Path(source).expanduser()
    if os.path.isdir(root):
        return root
    if os.path.exists(root):
        raise DataError(f"data.source {source} is a file; it must be a folder of images (unpack an archive first)")
    folder = root.absolute().parent
    try:
        siblings = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        raise DataError(f"data.source {source}: neither this folder nor {folder} can be found") from None
    near = difflib.get_close_matches(root.name, [*siblings, DIGITS], n=1)
    hint = "" if not near else f"; did you mean {DIGITS if near == [DIGITS] else root.parent / near[0]}?"
    raise DataError(f"data.source {source}: no such folder{hint}")


def _printable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
