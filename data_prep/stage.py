"""Copy a prepared split to a disk of the node, once per node, so that training reads no network.

All processes of a node may call it at once: one copies, the others wait for it. The lock is one of the kernel on an open file,
so it goes with the process that holds it, however that ends. Every file is hashed while it is copied and gets its name when it
is whole; the manifest comes last. An interrupted copy goes on where it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.files import (
    SUMS,
    PrepError,
    UsageError,
    commit,
    human_bytes,
    read_sums,
    sha256_of,
    sweep,
    temp_path,
    write_file,
)
from data_prep.progress import Meter
from nepa_dist.data.index import MANIFEST, ManifestError, read_manifest

_BLOCK = 4 << 20
_THREADS = 4
"""Copies at a time: hashing takes one core each."""

_log = logging.getLogger(__name__)


class Staged(NamedTuple):
    """What a call did."""

    folder: Path
    """Where the copy is."""
    copied_files: int
    copied_bytes: int
    kept_files: int
    """Files that were there already."""
    seconds: float
    """Including the wait for another process."""


def stage_split(folder: Path, dest: Path, *, check: bool = False, threads: int = _THREADS, quiet: bool = False) -> Staged:
    """Copy one prepared split.

    Args:
        folder: of the split.
        dest: where it goes: made if missing; a copy of the same split is completed, and left alone if it is whole.
        check: hash the files of a finished copy, instead of looking at their sizes.
        threads: files that are copied at a time.
        quiet: show no progress.

    Raises:
        UsageError: ``folder`` is no finished split, ``dest`` holds another one, or there is not enough space.
        PrepError: a file of the source is damaged.
        OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    source = _read_source(folder)
    if dest.exists() and dest.samefile(folder):
        raise UsageError(f"{dest} is {folder} itself; the copy needs another folder")
    with _lock(dest):
        try:
            dest.mkdir(exist_ok=True)
        except FileExistsError:
            raise UsageError(f"{dest} is a file; the copy needs a folder") from None
        sweep(dest)
        kept = _kept(source, dest, check)
        missing = {name: file for name, file in source.files.items() if name not in kept}
        size = sum(file.bytes for file in missing.values())
        if not missing and (dest / MANIFEST).exists():
            return Staged(dest, 0, 0, len(kept), time.monotonic() - started)
        _check_space(dest, size)
        (dest / MANIFEST).unlink(missing_ok=True)  # while a file is missing the copy is not whole
        with Meter(f"stage {folder.name}", source.num_samples, quiet=quiet) as meter:
            _copy_all(source, missing, dest, threads, meter)
        write_file(dest / SUMS, source.sums)
        write_file(dest / MANIFEST, source.manifest)
        return Staged(dest, len(missing), size, len(kept), time.monotonic() - started)


class _File(NamedTuple):
    bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class _Source:
    folder: Path
    num_samples: int
    manifest: bytes
    sums: bytes
    files: dict[str, _File]
    """All files but the manifest and the digests."""


def _read_source(folder: Path) -> _Source:
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is no finished split: it has no {MANIFEST}; prepare it first")
    try:
        manifest = read_manifest(folder / MANIFEST)
    except ManifestError as error:
        raise PrepError(str(error)) from None
    sums = read_sums(folder / SUMS)
    body = (folder / MANIFEST).read_bytes()
    if hashlib.sha256(body).hexdigest() != sums.pop(MANIFEST, None):
        raise PrepError(f"{folder}: {MANIFEST} does not have the SHA-256 that {SUMS} names: one of the two is damaged")
    counts = {shard.name: shard.num_samples for shard in manifest.shards}
    if lost := sorted(set(counts) - set(sums)):
        raise PrepError(f"{folder / SUMS} does not name {lost[0]}")
    files, problems = {}, []
    for name, digest in sums.items():
        try:
            info = (folder / name).stat()
        except OSError as error:
            problems.append(f"{folder / name}: {error.strerror}")
            continue
        if not stat.S_ISREG(info.st_mode):
            problems.append(f"{folder / name} is no plain file")
        files[name] = _File(info.st_size, digest, counts.get(name, 0))
    if problems:
        raise PrepError(*problems)
    return _Source(folder, manifest.num_samples, body, (folder / SUMS).read_bytes(), files)


def _kept(source: _Source, dest: Path, check: bool) -> set[str]:
    """Files of the copy that are as they should be. Those of an unfinished copy are hashed: who knows what wrote them."""
    finished = (dest / MANIFEST).exists()
    if finished and (dest / MANIFEST).read_bytes() != source.manifest:
        raise UsageError(
            f"{dest} holds another prepared split; jobs may be reading it. Stage into another folder, or delete this one first"
        )
    same_sums = finished and (dest / SUMS).is_file() and (dest / SUMS).read_bytes() == source.sums
    kept = set()
    for name, file in source.files.items():
        try:
            info = (dest / name).lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(info.st_mode) or info.st_size != file.bytes:
            continue
        if (same_sums and not check) or sha256_of(dest / name) == file.sha256:
            kept.add(name)
    return kept


def _check_space(dest: Path, size: int) -> None:
    free = shutil.disk_usage(dest).free
    if size > free:
        raise UsageError(
            f"{dest} has {human_bytes(free)} free, the copy needs {human_bytes(size)} more; "
            "stage to another disk, or prepare a smaller set (such as --policy short224)"
        )


def _copy_all(source: _Source, missing: dict[str, _File], dest: Path, threads: int, meter: Meter) -> None:
    stop = threading.Event()
    done = sum(file.num_samples for name, file in source.files.items() if name not in missing)
    meter.add(done, 0)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        copies = {pool.submit(_copy, source.folder / name, dest / name, missing[name], stop): name for name in missing}
        try:
            for copy in as_completed(copies):
                copy.result()
                file = missing[copies[copy]]
                meter.add(file.num_samples, file.bytes)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _copy(path: Path, dest: Path, file: _File, stop: threading.Event) -> None:
    """Copy one file; what arrives has the digest."""
    temp = temp_path(dest)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as reader, temp.open("wb") as writer:
            while not stop.is_set() and (block := reader.read(_BLOCK)):
                digest.update(block)
                writer.write(block)
        if stop.is_set():
            return
        if digest.hexdigest() != file.sha256:
            raise PrepError(f"{path} does not have the SHA-256 that {SUMS} names: it is damaged; verify the source")
        commit(temp, dest)
    finally:
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(dest: Path) -> Iterator[None]:
    """One process of this node at a time; a file beside ``dest`` carries the lock and stays."""
    path = dest.parent / f".{dest.name}.lock"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UsageError(f"cannot stage to {dest}: {error}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("another process stages to %s; waiting for it", dest)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
