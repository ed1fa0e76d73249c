"""One checkpoint: the folder of a manifest and its files, written and verified."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nepa_dist.checkpoint.manifest import Manifest
from nepa_dist.checkpoint.portable import CheckpointError, Entries, StateReader, write_durably, write_entries

_MANIFEST = "manifest.json"
_NOT_PLAIN = "is a link or a folder; a checkpoint holds plain files"


def write_folder(
    folder: Path, step: int, entries: Entries, meta: dict[str, Any], *, shard_bytes: int, copy: bool = True
) -> None:
    """Write what makes a checkpoint to a folder and flush it. The rename that makes it count is the caller's.

    Args:
        folder: exists and is empty.
        step: finished optimizer updates.
        entries: see ``write_entries``, as ``shard_bytes`` and ``copy``.
        meta: as :func:`nepa_dist.checkpoint.manifest.as_json` gives it.

    Raises:
        OSError: a file cannot be written.
        ValueError: an entry is malformed.
    """
    files = write_entries(folder, entries, shard_bytes=shard_bytes, copy=copy)
    manifest = Manifest(step, datetime.now(UTC).isoformat(timespec="seconds"), meta, tuple(files))
    write_durably(folder / _MANIFEST, manifest.to_bytes())
    flush_folder(folder)


def verify_folder(path: Path, *, check_digests: bool = True) -> Manifest:
    """See :meth:`nepa_dist.checkpoint.store.CheckpointStore.verify`."""
    try:
        manifest = _read_manifest(path)
        for problem in _file_problems(path, manifest, check_digests):
            raise CheckpointError(problem)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    StateReader(path)
    return manifest


def list_damage(path: Path) -> list[str]:
    """All that :func:`verify_folder` would object to, each with the file and the reason; empty if all is as it was saved."""
    try:
        if problems := list(_file_problems(path, _read_manifest(path), check_digests=True)):
            return problems
        StateReader(path)
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"checkpoint {path} cannot be read: {error}"]
    return []


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint.

    Raises:
        ValueError: the step is negative.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step whose checkpoint has this folder name; None if it is no such name."""
    match = re.fullmatch(r"step-([0-9]{8,})", name)
    return int(match[1]) if match and name == step_name(int(match[1])) else None


def flush_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to that gets its name when the block ends: it is there whole, or, after an error, not at all.

    Args:
        target: does not exist; folders above it are made.

    Raises:
        OSError: it cannot be made.
    """
    temp = target.parent / f".tmp-{target.name}-{os.getpid()}"
    temp.mkdir(parents=True)
    try:
        yield temp
        os.rename(temp, target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    flush_folder(target.parent)


def _read_manifest(path: Path) -> Manifest:
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"checkpoint {path} is not a folder")
    file = path / _MANIFEST
    if not os.access(path, os.X_OK):
        raise CheckpointError(f"no permission to look into {path}")
    if not os.path.lexists(file):
        raise CheckpointError(f"{file} is missing")
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(f"{file} {_NOT_PLAIN}")
    try:
        manifest = Manifest.from_bytes(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} {error}") from None
    if step_of(path.name) not in (None, manifest.step):
        raise CheckpointError(f"{file} is of step {manifest.step}, not of the folder's")
    return manifest


def _file_problems(path: Path, manifest: Manifest, check_digests: bool) -> Iterator[str]:
    """What is wrong with the files beside the manifest, cheap checks first; at most one problem per file."""
    present = {entry.name: entry for entry in os.scandir(path)}
    expected = {file.name: file for file in manifest.files}
    sound = []
    for name in sorted((present.keys() | expected.keys()) - {_MANIFEST}):
        if name in present and not present[name].is_file(follow_symlinks=False):
            yield f"{path / name} {_NOT_PLAIN}"
        elif name not in present:
            yield f"{path / name} is missing"
        elif name not in expected:
            yield f"{path / name} is not part of the checkpoint"
        elif (size := present[name].stat(follow_symlinks=False).st_size) != expected[name].bytes:
            yield f"{path / name} has {size} bytes; {expected[name].bytes} were saved"
        else:
            sound.append(expected[name])
    for file in sound if check_digests else []:
        try:
            with (path / file.name).open("rb") as content:
                same = hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
        except OSError as error:
            yield f"{path / file.name} cannot be read: {error}"
        else:
            if not same:
                yield f"{path / file.name} does not match its SHA-256: the content has changed since it was saved"
