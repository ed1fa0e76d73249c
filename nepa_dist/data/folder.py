"""Image files below a folder as a container."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nepa_dist.data.containers import DataError, Sample

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
"""Endings of image files, in any case."""

SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)


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
                size = _file_size(entry) if entry.name.lower().endswith(SUFFIXES) else None
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


def _printable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
