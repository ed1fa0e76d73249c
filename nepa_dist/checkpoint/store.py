"""A folder of checkpoints: atomic commit, verification, retention.

Layout::

    <root>/step-00000020/manifest.json              what the files must be, and what the run was; with its own digest
                         state-00000.safetensors    the tensors, see ``portable``
    <root>/.tmp-*                                   being written or deleted; leftovers of a killed run are swept at start
    <root>/replaced-step-00000020-1                 damaged or of another run: gave way to a new one of the same step; stays

A folder gets its name ``step-*`` by a rename after all its bytes are on the disk, and loses it by a rename before the first
byte is deleted. So a process may be killed at any moment: what has the name is whole. Digests find what the disk did to it
later.

One process writes to a root at a time.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nepa_dist.checkpoint.folder import flush_folder, step_name, step_of, verify_folder, write_folder
from nepa_dist.checkpoint.manifest import Manifest, as_json
from nepa_dist.checkpoint.portable import CheckpointError, Entries, StateReader

__all__ = ["CheckpointError", "CheckpointStore", "Found", "Manifest"]

_TEMP = ".tmp-"
_SAVED_AGAIN = "the run has saved this step again"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies. ``path`` and ``manifest`` are None when there is none."""

    path: Path | None
    manifest: Manifest | None
    passed_over: list[tuple[Path, str]]
    """Newer checkpoints that do not verify, and why."""


class _Place(NamedTuple):
    """Where the checkpoint of a step is and where it is made."""

    final: Path
    temp: Path


class CheckpointStore:
    """Saves and finds the checkpoints of one run.

    Args:
        root: folder of the checkpoints; made by the first save.
        keep_last: newest checkpoints that are kept.
        keep_every: checkpoints at multiples of this many steps are kept for good; None keeps none of them.
        shard_bytes: largest size of one file (a single larger entry gets a file of its own).

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(self, root: Path, *, keep_last: int = 3, keep_every: int | None = None, shard_bytes: int = 1 << 30) -> None:
        if keep_last < 1 or shard_bytes < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last {keep_last}, keep_every {keep_every} and shard_bytes {shard_bytes} must be positive")
        self.root = Path(root)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.shard_bytes = shard_bytes

    def sweep(self) -> list[str]:
        """Remove what a killed process left half written or half deleted. Call it before the first save.

        Returns:
            Names of the folders that were removed.

        Raises:
            CheckpointError: one cannot be removed.
        """
        leftovers = sorted(name for name in self._list() if name.startswith(_TEMP))
        for name in leftovers:
            try:
                _remove(self.root / name)
            except OSError as error:
                raise CheckpointError(f"cannot remove the leftover {self.root / name}: {error}") from error
        return leftovers

    def save(
        self,
        step: int,
        entries: Entries,
        meta: Mapping[str, Any],
        *,
        expected_bytes: int | None = None,
        copy: bool = True,
    ) -> Path:
        """Save a checkpoint, then delete those that need not be kept.

        If the step is there already: it is kept and returned when it verifies and its ``meta`` is the same (nothing is
        written). Otherwise the new one takes its place once it is complete. The old one is deleted if it verifies and is an
        earlier save of the same run (``config_digest`` and ``data_fingerprint`` in ``meta`` are the same, other counters are
        not); else it is moved to ``replaced-*``, with a warning.

        ``entries`` is consumed to its end whatever happens, also after an error: making it may be a collective that other
        ranks take part in.

        Args:
            step: finished optimizer updates.
            entries: see :func:`nepa_dist.checkpoint.portable.write_entries`.
            meta: JSON values to keep in the manifest.
            expected_bytes: size of the state, if known; checked against the free space before anything is written.
            copy: False if nothing changes the tensors before the call returns; see ``write_entries``.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the file system refuses (full, quota, read-only, ...). Earlier checkpoints are as they were.
            ValueError: the step is negative, ``meta`` is not JSON, or an entry is malformed.
        """
        stream = iter(entries)
        try:
            return self._save(step, stream, meta, expected_bytes, copy)
        finally:
            for _ in stream:
                pass

    def latest(self) -> Found:
        """Find the newest checkpoint that verifies in full, and say which newer ones do not.

        Raises:
            CheckpointError: the root cannot be listed.
        """
        passed_over: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                return Found(path, self.verify(path), passed_over)
            except CheckpointError as error:
                passed_over.append((path, str(error)))
        return Found(None, None, passed_over)

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, ascending; whether they verify is not looked at.

        Raises:
            CheckpointError: the root cannot be listed.
        """
        steps = (step_of(name) for name in self._list())
        return sorted(step for step in steps if step is not None)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step, whether it is there or not."""
        return self.root / step_name(step)

    @staticmethod
    def open(path: Path, *, check_digests: bool = True) -> tuple[Manifest, StateReader]:
        """Verify a checkpoint and open it.

        Args:
            path: the checkpoint's folder.
            check_digests: False where the digests were checked just before (on another rank, by :meth:`latest`).

        Raises:
            CheckpointError: as for :meth:`verify`.
        """
        manifest = CheckpointStore.verify(path, check_digests=check_digests)
        return manifest, StateReader(Path(path))

    @staticmethod
    def verify(path: Path, *, check_digests: bool = True) -> Manifest:
        """Check that a checkpoint is what was saved: the manifest, the set of files, their sizes, digests and headers.

        Args:
            path: the checkpoint's folder.
            check_digests: False checks all but the SHA-256 of the files, which takes a full read.

        Raises:
            CheckpointError: it is not; the message names the file and the reason.
        """
        return verify_folder(Path(path), check_digests=check_digests)

    def _save(self, step: int, stream: Entries, meta: Mapping[str, Any], expected: int | None, copy: bool) -> Path:
        values = as_json(meta)
        place = _Place(self.root / step_name(step), self.root / f"{_TEMP}{step_name(step)}-{os.getpid()}")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            reason = _reason_to_replace(place.final, values) if os.path.lexists(place.final) else None
            if reason == "":
                _log.info("checkpoint %s is there already", place.final)
                return place.final
            if expected is not None and expected > shutil.disk_usage(self.root).free:
                raise CheckpointError(self._explain(step, "there is not enough space", expected))
            self._commit(step, stream, values, place, reason, copy)
        except OSError as error:
            raise CheckpointError(self._explain(step, str(error), expected)) from error
        self._prune(step)
        return place.final

    def _commit(self, step: int, stream: Entries, meta: dict[str, Any], place: _Place, reason: str | None, copy: bool) -> None:
        try:
            if os.path.lexists(place.temp):  # of an earlier process with the same id
                _remove(place.temp)
            place.temp.mkdir()
            write_folder(place.temp, step, stream, meta, shard_bytes=self.shard_bytes, copy=copy)
            aside = None if reason is None else self._name_aside(place.final)
            if aside is not None:
                if reason != _SAVED_AGAIN:
                    _log.warning("checkpoint %s is replaced: %s; the old one is now %s", place.final, reason, aside)
                os.rename(place.final, aside)
            os.rename(place.temp, place.final)
        except BaseException:
            shutil.rmtree(place.temp, ignore_errors=True)
            raise
        flush_folder(self.root)
        if aside is not None and reason == _SAVED_AGAIN:
            self._delete(aside)

    def _prune(self, saved: int) -> None:
        """Delete what need not be kept. A failure costs space, not the run: it is logged and tried again at the next save."""
        steps = self.steps()
        # A newer step than the one just saved is a damaged one that this run passed over: it protects nothing.
        keep = {step for step in steps if step > saved} | set([step for step in steps if step <= saved][-self.keep_last :])
        if self.keep_every is not None:
            keep |= {step for step in steps if step % self.keep_every == 0}
        for step in steps:
            if step not in keep:
                self._delete(self.path(step))

    def _delete(self, path: Path) -> None:
        temp = self.root / f"{_TEMP}deleted-{path.name}-{os.getpid()}"
        try:
            os.rename(path, temp)
            flush_folder(self.root)  # the name must be gone on the disk before any content is
            _remove(temp)
        except OSError as error:
            _log.warning("cannot delete the old checkpoint %s: %s", path, error)

    def _list(self) -> list[str]:
        try:
            return os.listdir(self.root)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"cannot list the checkpoints in {self.root}: {error}") from error

    def _name_aside(self, path: Path) -> Path:
        number = 1
        while os.path.lexists(aside := self.root / f"replaced-{path.name}-{number}"):
            number += 1
        return aside

    def _explain(self, step: int, reason: str, expected: int | None) -> str:
        try:
            free = f"{shutil.disk_usage(self.root).free:,} bytes"
        except OSError:
            free = "unknown"
        needed = "unknown" if expected is None else f"{expected:,} bytes"
        return (
            f"the checkpoint of step {step} is not saved in {self.root}: {reason} (free: {free}, needed: {needed}). "
            "Earlier checkpoints are as they were. Check space, quota and permissions there, or lower checkpoint.keep_last"
        )


def _reason_to_replace(path: Path, meta: dict[str, Any]) -> str:
    """Why a checkpoint must give way to a new one of the same step with this ``meta``; empty if it is as good."""
    try:
        old = CheckpointStore.verify(path).meta
    except CheckpointError as error:
        return str(error)
    if old == meta:
        return ""
    same_run = all(key in meta and old.get(key) == meta[key] for key in ("config_digest", "data_fingerprint"))
    return _SAVED_AGAIN if same_run else "it is of another run or state"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
