"""The code of a job: what was submitted is what runs, also after a requeue and whatever happens to the working tree.

A snapshot is a folder ``code/<first digits of its digest>`` with the files that git tracks, as they lie in the working tree,
new ones in the packages, and those that ``--include`` names. Beside them: ``SNAPSHOT.json`` (digest, commit, the SHA-256 of
every file), ``SNAPSHOT.diff`` (what differs from the commit) and ``packages.txt`` (what is installed). The digest goes into the
configuration of the run, and with it into its checkpoints. Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from jobs.cluster import REPO_ROOT
from nepa_dist.config_cluster import looks_secret
from nepa_dist.run_folder import SNAPSHOT, git_state

CODE = "code"
"""Folder of snapshots in that of a run, pipeline or sweep."""
MAX_BYTES = 64 * 1024 * 1024
_PACKAGES = ("jobs", "nepa_dist", "data_prep", "configs", "pyproject.toml")
"""What is taken where there is no git; new files in them are taken always."""
_SECRET_NAMES = re.compile(r"(^|/)(\.env(\..*)?|\.netrc|\.pypirc|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|p12|pfx|key))$")
_SECRET_TEXT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bhf_[A-Za-z0-9]{34}\b|"
    rb"\bxox[baprs]-[A-Za-z0-9-]{10,}|\bsk-[A-Za-z0-9]{32,}"
)
_SECRET_MARKS = (b"PRIVATE KEY-----", b"AKIA", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"hf_", b"xox", b"sk-")
"""Each match of the above has one of these; they are found faster."""
_MIN_SECRET = 8


class SnapshotError(ValueError):
    """The code cannot be taken, or is not what was taken; the message says why."""


class Snapshot(NamedTuple):
    """The files that a snapshot has, read but not yet written."""

    root: Path
    files: dict[str, bytes]
    """Path, with / and below the root, to content; in the order of the paths."""
    executable: frozenset[str]
    """Those that may be executed."""

    @property
    def digest(self) -> str:
        """SHA-256 of paths, contents and modes."""
        return _digest({name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}, self.executable)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(map(len, self.files.values()))


def read_tree(include: Sequence[str] = (), root: Path = REPO_ROOT) -> Snapshot:
    """Read the files of the project.

    Args:
        include: patterns, below the root, of files that git does not track.
        root: of the project.

    Raises:
        SnapshotError: a pattern names nothing or something outside, or the files are too many bytes.
        OSError: a file cannot be read.
    """
    names = set(_tracked(root))
    for pattern in include:
        found = {name for path in _matches(root, pattern) for name in _files_below(root, path)}
        if not found:
            raise SnapshotError(f"--include {pattern}: no such file below {root}")
        names |= found
    files: dict[str, bytes] = {}
    executable = set()
    total = 0
    for name in sorted(names):
        path = root / name
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue  # tracked, and deleted in the working tree
        if stat.S_ISLNK(info.st_mode) and not path.resolve().is_relative_to(root.resolve()):
            raise SnapshotError(f"{path} is a link to {os.readlink(path)}, outside of the project: replace it by a copy")
        if not path.is_file():
            continue
        total += path.stat().st_size
        if total > MAX_BYTES:
            raise SnapshotError(f"the code is more than {MAX_BYTES >> 20} MiB at {name}: what git tracks must be code")
        files[name] = path.read_bytes()
        if info.st_mode & 0o100:
            executable.add(name)
    return Snapshot(root, files, frozenset(executable))


@functools.lru_cache(maxsize=8)
def _cached_tree(include: tuple[str, ...]) -> Snapshot:
    return read_tree(include)


def read_code(include: Sequence[str]) -> Snapshot:
    """:func:`read_tree` of this project, once per command: what the checks saw is what its jobs get."""
    return _cached_tree(tuple(include))


def secrets_in(snapshot: Snapshot, environment: Mapping[str, str]) -> list[str]:
    """Sentences about files that look like secrets, or that hold the value of a variable that does. No value is shown."""
    values = {
        name: value.encode()
        for name, value in environment.items()
        if looks_secret(name) and len(value) >= _MIN_SECRET and not os.path.exists(value)
    }
    problems = []
    for name, content in snapshot.files.items():
        if _SECRET_NAMES.search(name):
            problems.append(f"{name} has the name of a file of secrets: do not track it (git rm --cached)")
        if any(mark in content for mark in _SECRET_MARKS) and (match := _SECRET_TEXT.search(content)):
            line = content.count(b"\n", 0, match.start()) + 1
            problems.append(f"{name}, line {line}, looks like a key: remove it, and have it replaced where it came from")
        problems += [f"{name} holds the value of ${variable}" for variable, value in values.items() if value in content]
    return problems


def write_snapshot(snapshot: Snapshot, folder: Path) -> Path:
    """Write a snapshot below ``folder``, unless it is there; returns its path. It is read-only.

    Raises:
        OSError: it cannot be written.
    """
    digest = snapshot.digest
    target = folder / CODE / digest[:12]
    if target.is_dir():
        return target
    (folder / CODE).mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = folder / CODE / f".{digest[:12]}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    extra = {
        SNAPSHOT: json.dumps(_describe(snapshot, digest), indent=1).encode(),
        "SNAPSHOT.diff": _git(snapshot.root, "diff", "HEAD", "--binary") or b"",
        "packages.txt": "".join(f"{line}\n" for line in _packages()).encode(),
    }
    for name, content in {**snapshot.files, **extra}.items():
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o500 if name in snapshot.executable else 0o400)
    os.replace(temporary, target)
    return target


def verify_snapshot(path: Path, digest: str) -> None:
    """Check that a snapshot is what was submitted.

    Raises:
        SnapshotError: a file is missing, changed, or belongs to another user.
    """
    try:
        described = json.loads((path / SNAPSHOT).read_bytes())
        files, executable = described["files"], frozenset(described["executable"])
        if os.stat(path).st_uid != os.geteuid():
            raise SnapshotError(f"{path} belongs to another user")
        found = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"the code in {path} is not what was submitted: {error}") from None
    changed = [name for name in files if found[name] != files[name]]
    if changed or _digest(found, executable) != digest:
        raise SnapshotError(f"the code in {path} is not what was submitted: {', '.join(changed[:5]) or SNAPSHOT} changed")


def _digest(files: Mapping[str, str], executable: frozenset[str]) -> str:
    lines = [f"{name}\0{digest}\0{name in executable}\n" for name, digest in files.items()]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _describe(snapshot: Snapshot, digest: str) -> dict[str, object]:
    files = {name: hashlib.sha256(content).hexdigest() for name, content in snapshot.files.items()}
    return {"digest": digest, **git_state(snapshot.root), "executable": sorted(snapshot.executable), "files": files}


def _tracked(root: Path) -> Iterator[str]:
    listed = _git(root, "ls-files", "-z", "--cached")
    if listed is not None:
        new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *_PACKAGES) or b""
        yield from (os.fsdecode(name) for name in (listed + new).split(b"\0") if name)
        return
    for package in _PACKAGES:
        yield from _files_below(root, root / package)


def _matches(root: Path, pattern: str) -> Iterator[Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise SnapshotError(f"--include {pattern}: name files below {root}")
    try:
        yield from root.glob(pattern)
    except (ValueError, NotImplementedError) as error:
        raise SnapshotError(f"--include {pattern}: {error}") from None


def _files_below(root: Path, path: Path) -> Iterator[str]:
    if path.is_file():
        yield path.relative_to(root).as_posix()
        return
    for folder, names, files in os.walk(path):
        names[:] = [name for name in names if name != "__pycache__"]
        yield from ((Path(folder) / name).relative_to(root).as_posix() for name in files)


def _packages() -> list[str]:
    return sorted({f"{found.metadata['Name']}=={found.version}" for found in metadata.distributions()}, key=str.lower)


def _git(root: Path, *arguments: str) -> bytes | None:
    """Output of git in a project that is a repository of its own; None otherwise."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
