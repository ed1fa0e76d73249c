"""Files that are either whole or not there: temporary names, atomic commits, leftovers of killed processes, digests.

Any number of processes on any number of machines write to one folder without locks: each writes under a name of its own and
renames; whoever makes the same file makes the same bytes, so the last rename changes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from pathlib import Path

SUMS = "SHA256SUMS"
"""Digests of every file of a prepared split but itself; ``sha256sum -c`` reads it too."""

_TEMP = re.compile(r"\.tmp-.+-(?P<pid>[0-9]+)-(?P<place>[0-9a-f]{8})")
_STALE_SECONDS = 3600


class PrepError(RuntimeError):
    """Preparation cannot go on, or what there is is damaged; ``problems`` holds one line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UsageError(ValueError):
    """A mistake of the user; the message says what to do."""


def temp_path(path: Path) -> Path:
    """Where to write a file before it gets its name: in the same folder, unique to this process on this machine."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}-{_place()}")


def commit(temp: Path, path: Path) -> None:
    """Give a finished file its name, durably: the bytes first, then the name.

    Raises:
        OSError: the file system refuses.
    """
    flush(temp)
    os.rename(temp, path)
    flush(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file atomically; a file that has these bytes already is left alone.

    Raises:
        OSError: the file system refuses; the old file is as it was.
    """
    try:
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    except FileNotFoundError:
        pass
    temp = temp_path(path)
    try:
        temp.write_bytes(data)
        commit(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def create_file(path: Path, data: bytes) -> bool:
    """Write a whole file atomically unless there is one: of several processes that try, one returns True.

    On a file system without hard links the last of several that try at the same moment wins, and all return True.

    Raises:
        OSError: the file system refuses.
    """
    temp = temp_path(path)
    try:
        temp.write_bytes(data)
        flush(temp)
        try:
            os.link(temp, path)
        except FileExistsError:
            return False
        except OSError:
            if path.exists():
                return False
            os.rename(temp, path)
        flush(path.parent)
        return True
    finally:
        temp.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> list[str]:
    """Remove what dead processes left half written.

    A file is a leftover if its process ran on this machine and is gone, or if nothing was written to it for an hour. Call it
    while this process writes nothing.

    Returns:
        Names of the removed files.
    """
    removed = []
    for name in sorted(os.listdir(folder)):
        match = _TEMP.fullmatch(name)
        if match and _is_leftover(folder / name, int(match["pid"]), match["place"]):
            (folder / name).unlink(missing_ok=True)  # another process may sweep too
            removed.append(name)
    return removed


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, lower-case hex. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_sums(digests: dict[str, str]) -> bytes:
    """The content of ``SHA256SUMS`` from file name -> digest."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def read_sums(path: Path) -> dict[str, str]:
    """Read ``SHA256SUMS``: file name -> digest.

    Raises:
        PrepError: it is missing, damaged, or names something outside its folder.
    """
    if not path.is_file():
        raise PrepError(f"{path} is missing")
    try:
        body = path.read_bytes()
        lines = body.decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PrepError(f"{path} cannot be read: {error}") from None
    digests: dict[str, str] = {}
    for number, line in enumerate(lines[:-1], 1):
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not is_plain(name) or name in digests:
            raise PrepError(f"{path} is damaged in line {number}")
        digests[name] = digest
    if to_sums(digests) != body:
        raise PrepError(f"{path} is damaged")
    return digests


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in the folder itself."""
    return name not in ("", ".", "..") and not re.search(r"[/\0\n]", name)


def human_bytes(size: float) -> str:
    """A size for people: ``1.5 GB``; decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _is_leftover(path: Path, pid: int, place: str) -> bool:
    try:
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            return True
    except FileNotFoundError:
        return False
    if place != _place():
        return False
    if pid == os.getpid():  # of an earlier process with this id: nothing is swept while this one writes
        return True
    return not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process of this machine is alive. One that is dead may be listed for long, where nobody asks for its end."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # of another user, or nothing can be known
        return True
    return state not in ("Z", "X")


def _place() -> str:
    """Which machine process ids belong to: containers of one host name may count them apart."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]
