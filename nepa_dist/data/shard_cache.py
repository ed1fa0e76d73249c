"""The cache of remote shards: a folder on a local disk that the processes of a machine share.

What they agree by lies in the folder alone: a file is there only once it is complete and its checksum is right, and locks are
``flock`` locks, which the kernel lets go when a process dies. So nothing has to be cleaned up after a kill.

::

    CACHE/.lock                              held while room is made
    CACHE/<digest>.nepa-cache/manifest.json  index.npy  names.txt  shard-00000.tar ...
    CACHE/<digest>.nepa-cache/.lock-NAME     held by the one process that fetches NAME
    CACHE/<digest>.nepa-cache/.tmp-NAME      NAME, while it is fetched

The digest is that of the manifest: a data set that was made anew is another one. When the cache is full, whole shards are
deleted: first those that no process has open, and of these the one that was opened longest ago. A reader that has a deleted
shard open reads on.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from nepa_dist.data.containers import DataError
from nepa_dist.data.index import INDEX, INDEX_DTYPE, MANIFEST, NAMES, Manifest, ManifestError, ShardRecord, read_manifest

_SUFFIX = ".nepa-cache"
_MAX_MANIFEST = 1 << 26
_MAX_NAME = 4096


class Expected(NamedTuple):
    """What a file must be."""

    size: int | None
    """Bytes; None: not known."""
    limit: int
    """Bytes that it may have at most."""
    sha256: str | None


class Source(Protocol):
    """Where the files come from."""

    shown: str
    """What to call it in a message."""

    def fetch(self, name: str, out: BinaryIO, expected: Expected) -> None:
        """Write a file into ``out`` from its start. Raises DataError if it cannot be had or is not what it must be."""


class ShardCache:
    """The files of one split in the cache folder.

    Args:
        source: of the split.
        root: the cache folder, made if it is missing.
        limit: bytes that all shards in it may take together; None: no limit.

    Raises:
        DataError: from any method: the folder cannot be used, or a file cannot be had.
    """

    def __init__(self, source: Source, root: Path, limit: int | None) -> None:
        self.limit = limit
        self.folder = root  # open_split names it
        self._source = source
        self._root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the cache folder {root} cannot be made: {error.strerror}") from None

    def open_split(self) -> None:
        """Fetch manifest, index and names."""
        with tempfile.TemporaryFile() as file:
            self._source.fetch(MANIFEST, file, Expected(None, _MAX_MANIFEST, None))
            size = file.tell()
            file.seek(0)
            data = file.read(size)
        self.folder = self._root / f"{hashlib.sha256(data).hexdigest()[:16]}{_SUFFIX}"
        with _errors_of(self._root):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            temporary = self.folder / f".tmp-{MANIFEST}-{os.getpid()}-{threading.get_ident()}"
            temporary.write_bytes(data)
            try:
                manifest = self._read_manifest(temporary)
                os.replace(temporary, self.folder / MANIFEST)
            finally:
                temporary.unlink(missing_ok=True)
        count = manifest.num_samples
        index_limit = count * INDEX_DTYPE.itemsize + _MAX_NAME
        for name, limit, sha256 in (
            (INDEX, index_limit, manifest.index_sha256),
            (NAMES, count * _MAX_NAME, manifest.names_sha256),
        ):
            os.close(self._open(name, Expected(None, limit, sha256)))

    def open_shard(self, shard: ShardRecord) -> int:
        """A file descriptor of a shard, fetched if need be. As long as it is open, the shard counts as in use."""
        return self._open(shard.name, Expected(shard.bytes, shard.bytes, shard.sha256))

    def _read_manifest(self, path: Path) -> Manifest:
        try:
            return read_manifest(path)
        except ManifestError as error:
            raise DataError(str(error).replace(str(path), f"{self._source.shown}/{MANIFEST}")) from None

    def _open(self, name: str, expected: Expected) -> int:
        path = self.folder / name
        with _errors_of(self._root):
            if (descriptor := _open_cached(path, expected)) is not None:
                return descriptor
            with _locked(self.folder / f".lock-{name}"):
                # While this process waited, the one that held the lock has fetched it.
                if (descriptor := _open_cached(path, expected)) is None:
                    descriptor = self._fetch(path, expected)
                return descriptor

    def _fetch(self, path: Path, expected: Expected) -> int:
        """Fetch a file under its lock and open it; its room is taken from the start, so that the limit holds meanwhile."""
        temporary = path.with_name(f".tmp-{path.name}")  # that of a process that was killed is overwritten
        try:
            with open(temporary, "w+b") as file:
                self._reserve(file, expected.size or 0)
                self._source.fetch(path.name, file, expected)
                file.truncate(file.tell())
                file.flush()
                os.fsync(file.fileno())
            # Opened before it can be deleted.
            descriptor = _open_locked(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return descriptor

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Give a new file its size, after deleting old shards until it fits."""
        if self.limit is None:
            return
        with _locked(self._root / ".lock"):
            shards = [
                _Cached.of(path) for path in self._root.glob(f"*{_SUFFIX}/*") if path.name not in (MANIFEST, INDEX, NAMES)
            ]
            total = sum(shard.size for shard in shards if shard is not None)
            for shard in sorted((shard for shard in shards if shard is not None and shard.evictable), key=_Cached.order):
                if total + size <= self.limit:
                    break
                shard.path.unlink(missing_ok=True)
                total -= shard.size
            file.truncate(size)


class _Cached(NamedTuple):
    """A shard, or part of one, in the cache."""

    path: Path
    size: int
    evictable: bool
    in_use: bool
    opened: float

    @classmethod
    def of(cls, path: Path) -> _Cached | None:
        """None for a lock, and for what is gone by now."""
        if path.name.startswith(".lock-"):
            return None
        unfinished = path.name.startswith(".tmp-")
        lock = path.with_name(path.name.replace(".tmp-", ".lock-", 1)) if unfinished else path
        try:
            info = path.stat()
            in_use = not _is_free(lock)
        except FileNotFoundError:
            return None
        return cls(path, info.st_size, not (unfinished and in_use), in_use, info.st_mtime)

    def order(self) -> tuple[bool, float]:
        """The first is deleted first."""
        return self.in_use, self.opened


def _open_cached(path: Path, expected: Expected) -> int | None:
    """A file descriptor of a file of the cache; None if it is not there."""
    try:
        descriptor = _open_locked(path)
    except FileNotFoundError:
        return None
    if expected.size is not None and os.fstat(descriptor).st_size != expected.size:
        os.close(descriptor)
        return None  # someone else wrote it; it is replaced
    with suppress(OSError):
        os.utime(path)
    return descriptor


def _open_locked(path: Path) -> int:
    """Open a file and mark it as in use."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_free(path: Path) -> bool:
    """Whether no process holds a lock on a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; it is made if it is missing, and stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _errors_of(root: Path) -> Iterator[None]:
    """Turn an OSError into a message about the cache."""
    try:
        yield
    except OSError as error:
        no_locks = error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
        hint = "it has no file locks; choose a folder on a local disk" if no_locks else error.strerror
        raise DataError(f"the cache folder {root} cannot be used: {hint}") from None
