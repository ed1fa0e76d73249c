"""Which file system a path is on, from the kernel's list of mounts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple


class Mount(NamedTuple):
    """A mounted file system; both empty if it is not known."""

    kind: str
    """As the kernel calls it: ext4, nfs4, lustre, fuse.sshfs, tmpfs, ..."""
    point: str
    """Folder it is mounted at."""


def find_mount(path: Path, mounts: str | None = None) -> Mount:
    """The file system that a path is on.

    Args:
        path: need not exist.
        mounts: the content of ``/proc/self/mountinfo``; default: read it.
    """
    best = Mount("", "")
    try:
        text = mounts if mounts is not None else Path("/proc/self/mountinfo").read_text(errors="backslashreplace")
        place = os.path.realpath(path)
    except OSError:
        return best
    for line in text.splitlines():
        mount, _, rest = line.partition(" - ")
        parts = mount.split()
        if len(parts) < 5 or not parts[4].startswith("/") or not rest:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), parts[4])
        # Of two mounts at the same place the later one is seen.
        if os.path.commonpath([point, place]) == point and len(point) >= len(best.point):
            best = Mount(rest.split()[0], point)
    return best
