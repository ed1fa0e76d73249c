"""Free space where a run writes and reads. Looked at from a thread: a file system that hangs must not hang the loop."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 30.0


class StorageWatch:
    """Looks at mounts now and then; :attr:`values` holds what was found last, by metric key.

    Args:
        mounts: path by its name in the registry; those that do not exist are left out.
    """

    def __init__(self, mounts: Mapping[str, Path]) -> None:
        self.values: dict[str, float] = {}
        self._mounts = mounts
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="storage", daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.values = {key: value for name, path in self._mounts.items() for key, value in _look(name, path).items()}
            if self._closing.wait(SECONDS_BETWEEN_LOOKS):
                return

    def close(self) -> None:
        """Look no more; does not wait for a look that hangs."""
        self._closing.set()


def _look(name: str, path: Path) -> dict[str, float]:
    try:
        found = os.statvfs(path)
    except OSError:
        return {}
    values = {
        f"storage_free_bytes.{name}": float(found.f_bavail * found.f_frsize),
        f"storage_size_bytes.{name}": float(found.f_blocks * found.f_frsize),
    }
    if found.f_files:  # some file systems have no such limit and say 0
        values[f"storage_free_inodes.{name}"] = float(found.f_favail)
    return values
