"""Reading a prepared split (see :mod:`nepa_dist.data.index`): a table lookup, then one slice of a shard.

It knows no container format: the index says where the image and the mask of a sample lie. Index and names are mapped into
memory, so that workers share them. A shard is mapped on a local disk and read with pread elsewhere: page faults over a network
are slow, and one that fails ends the process with SIGBUS where a read raises an OSError.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import resource
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nepa_dist.data.containers import DataError, Sample
from nepa_dist.data.decode import BadImage
from nepa_dist.data.index import INDEX, MANIFEST, NAMES, RAW, Manifest, ManifestError, read_index, read_manifest
from nepa_dist.data.mounts import find_mount

Access = Literal["auto", "mmap", "pread"]

_RECORD = struct.Struct("<IBHHiQIIQII")  # INDEX_DTYPE; unpacking is several times faster than indexing an array
_MAX_OPEN = 512
_MAX_LISTED = 10
_REMOTE = ("lustre", "nfs", "gpfs", "beegfs", "ceph", "cifs", "smb", "9p", "wekafs", "panfs", "pvfs", "orangefs", "afs", "fuse")
"""File systems, by the start of their names, whose pages come over a network or through another process."""


def crc32c_function() -> Callable[[bytes | memoryview], int]:
    """The CRC-32C (Castagnoli) of bytes.

    Raises:
        DataError: the package that computes it is not installed.
    """
    try:
        from crc32c import crc32c
    except ImportError:
        raise DataError("checksums need the package crc32c: pip install crc32c") from None
    return crc32c


def decode_mask(data: bytes) -> NDArray[np.integer[Any]]:
    """Class numbers [H, W] of a PNG with one channel: gray with 8 or 16 bits, or a palette, whose indices they are.

    Raises:
        BadImage: it is something else, or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
                    raise BadImage(f"the mask is a {image.mode} image, not one of class numbers")
                return np.asarray(image.convert("L") if image.mode == "1" else image)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise almost anything in a decoder
        raise BadImage(f"the mask cannot be decoded: {error or type(error).__name__}") from error


class PreparedContainer:
    """One split that ``python -m data_prep`` made, in any of its formats. Random access, see
    :class:`nepa_dist.data.containers.Container`.

    It can be forked and pickled; open files do not go into a pickle. The fingerprint is that of the content, so a run can move
    from one container to another.

    Args:
        folder: of the split; it holds ``manifest.json``.
        access: how shards are read; ``auto`` maps them on a local file system and reads them with pread on others.
        check: compare the checksum of each image and mask when it is read.
        max_open: shards that are open at a time in each process; no more than half of what the system allows.

    Raises:
        DataError: the split is incomplete, damaged or not finished; all shards that are missing or of a wrong size are named.
    """

    num_ignored = 0

    def __init__(self, folder: Path, *, access: Access = "auto", check: bool = False, max_open: int = _MAX_OPEN) -> None:
        self.folder = Path(folder)
        self.manifest = _manifest(self.folder)
        self.class_names = self.manifest.class_names
        self.fingerprint = self.manifest.content_sha256
        self._mapped = access == "mmap" or (access == "auto" and is_local(self.folder))
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = max_open if allowed == resource.RLIM_INFINITY else max(1, min(max_open, allowed // 2))
        self._crc32c = crc32c_function() if check else None
        self._check_shards()
        self._check_index()
        self._reset()

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def shards(self) -> NDArray[np.int64]:
        """Shard of each sample, int64 [N]."""
        return _index(self.folder, self.manifest)["shard"].astype(np.int64)

    def read(self, index: int) -> Sample:
        """Sample ``index``: the image file, or for raw pixels a read-only array [H, W, 3]; its label; its mask if it has one.

        Raises:
            OSError: it cannot be read, or fails the check.
            BadImage: the mask is damaged.
        """
        fields = self._fields(index)
        shard, encoding, height, width, label, offset, length, crc, mask_offset, mask_length, mask_crc = fields
        file = self._open(shard)
        data: bytes | memoryview
        data = file.view(offset, length) if encoding == RAW else file.read(offset, length)
        if len(data) != length:
            raise OSError(f"{self._where(index)}: the shard is shorter than it was when it was opened")
        if self._crc32c is not None and self._crc32c(data) != crc:
            raise OSError(f"{self._where(index)}: the image is damaged (wrong checksum)")
        image: Any = np.frombuffer(data, np.uint8).reshape(height, width, 3) if encoding == RAW else data
        if not mask_length:
            return Sample(image, label)
        mask = file.read(mask_offset, mask_length)
        if self._crc32c is not None and self._crc32c(mask) != mask_crc:
            raise OSError(f"{self._where(index)}: the mask is damaged (wrong checksum)")
        return Sample(image, label, decode_mask(mask))

    def name(self, index: int) -> str:
        """Where sample ``index`` came from, and the shard it is in."""
        shard = self.manifest.shards[self._fields(index)[0]].name
        return f"{self._source_name(index)} ({shard})"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_buffer", "_files", "_names")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        """Map the index; no shard is open."""
        index = _index(self.folder, self.manifest)
        self._buffer = np.asarray(index).view(np.uint8).data
        self._files: dict[int, _Mapped | _Positioned] = {}
        self._names: tuple[mmap.mmap, NDArray[np.int64]] | None = None

    def _fields(self, index: int) -> tuple[int, ...]:
        """The record of a sample, in the order of INDEX_DTYPE."""
        if not 0 <= index < self.manifest.num_samples:
            raise IndexError(f"sample {index} of {self.manifest.num_samples}")
        return _RECORD.unpack_from(self._buffer, index * _RECORD.size)

    def _open(self, shard: int) -> _Mapped | _Positioned:
        """The shard, opened now if need be. A forked process goes on with its parent's files: neither way of reading moves a
        position that they would share."""
        if (file := self._files.get(shard)) is not None:
            return file
        while len(self._files) >= self._max_open:
            # The first one opened: with random reads as good as any. Views of it that are still in use keep it alive.
            del self._files[next(iter(self._files))]
        descriptor = self._open_descriptor(shard)
        file = _Mapped(descriptor) if self._mapped else _Positioned(descriptor)
        self._files[shard] = file
        return file

    def _open_descriptor(self, shard: int) -> int:
        """A file descriptor of the shard, which the caller closes."""
        return os.open(self.folder / self.manifest.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)

    def _check_shards(self) -> None:
        problems = [] if os.path.isfile(self.folder / NAMES) else [f"{NAMES}: no such file"]
        for shard in self.manifest.shards:
            try:
                size = os.stat(self.folder / shard.name).st_size
            except OSError as error:
                problems.append(f"{shard.name}: {error.strerror}")
                continue
            if size != shard.bytes:
                problems.append(f"{shard.name}: {size} bytes instead of {shard.bytes}")
        if problems:
            listed = problems[:_MAX_LISTED]
            more = [f"and {len(problems) - len(listed)} more"] if len(problems) > len(listed) else []
            lines = "".join(f"\n  - {line}" for line in listed + more)
            count = f"{len(problems)} of {len(self.manifest.shards) + 1} files"
            raise DataError(f"{self.folder}: {count} cannot be used; copy or prepare them again:{lines}")

    def _check_index(self) -> None:
        """Compare the index with the manifest and look for values that a reader would stumble over."""
        path = self.folder / INDEX
        index = _index(self.folder, self.manifest)
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.manifest.index_sha256:
                raise DataError(f"{path} is damaged or of another split: its SHA-256 is not the one in {MANIFEST}")
        labels = index["label"]
        if labels.min() < -1 or labels.max() >= len(self.class_names):
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise DataError(f"{path} has labels from {found}, but {MANIFEST} names {len(self.class_names)} classes")
        pixels = index["height"].astype(np.int64) * index["width"] * 3
        if ((index["encoding"] == RAW) & (index["length"] != pixels)).any() or (index["encoding"] > RAW).any():
            raise DataError(f"{path} has images of an unknown encoding, or raw ones that do not fill their pixels")

    def _source_name(self, index: int) -> str:
        if self._names is None:
            self._names = self._map_names()
        names, ends = self._names
        start = int(ends[index - 1]) + 1 if index else 0
        return names[start : int(ends[index])].decode("utf-8", "backslashreplace")

    def _map_names(self) -> tuple[mmap.mmap, NDArray[np.int64]]:
        """``names.txt`` and where its lines end; made when the first name is asked for."""
        path = self.folder / NAMES
        try:
            with open(path, "rb") as file:
                names = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise DataError(f"{path} cannot be read: {error}") from None
        ends = np.flatnonzero(np.frombuffer(names, np.uint8) == ord("\n"))
        if len(ends) != len(self):
            raise DataError(f"{path} has {len(ends)} lines for {len(self)} samples")
        return names, ends

    def _where(self, index: int) -> str:
        return f"sample {index} ({self.name(index)})"


class _Mapped:
    """A shard in memory. It is closed when nothing uses it any more."""

    def __init__(self, descriptor: int) -> None:
        try:
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # it is empty
            raise OSError(str(error)) from None
        finally:
            os.close(descriptor)

    def read(self, offset: int, length: int) -> bytes:
        return self._map[offset : offset + length]

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(self._map)[offset : offset + length]


class _Positioned:
    """A shard that is read with pread. It is closed when nothing uses it any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        while len(data) < length and (more := os.pread(self._descriptor, length - len(data), offset + len(data))):
            data += more
        return data

    view = read


def is_local(folder: Path, mounts: str | None = None) -> bool:
    """Whether a folder is on a disk of this machine, as far as the kernel's list of mounts tells.

    Args:
        folder: any folder.
        mounts: the content of ``/proc/self/mountinfo``; default: read it. Without it nothing is called local.
    """
    kind = find_mount(folder, mounts).kind
    return bool(kind) and not kind.startswith(_REMOTE)


def _manifest(folder: Path) -> Manifest:
    try:
        return read_manifest(folder / MANIFEST)
    except ManifestError as error:
        raise DataError(str(error)) from None


def _index(folder: Path, manifest: Manifest) -> NDArray[Any]:
    try:
        return read_index(folder / INDEX, manifest)
    except ManifestError as error:
        raise DataError(str(error)) from None
