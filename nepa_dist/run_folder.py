"""The folder of a run, which explains itself.

```
runs/NAME/
  config.yaml        the resolved configuration; repeat the run with --config FILE --name OTHER
  run.json           one entry per start: versions, git state, world, seed, where it continued, the metrics endpoint
  log.txt            what the run said, with times
  metrics.jsonl      one line per logged step
  checkpoints/       see nepa_dist.checkpoint.store
  best/              fine-tuning and segmentation: the weights with the best score, and their results; a link to best-N/
  figures/           loss, gradient norm and collapse curves
  logs/              output of the other ranks
```
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

SNAPSHOT = "SNAPSHOT.json"
"""In the root of code that was copied for a job (:mod:`jobs.snapshot`): what it is a copy of."""
PACKAGES = ("torch", "numpy", "pillow", "safetensors", "scikit-learn", "pydantic", "prometheus-client", "deepspeed")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old or the new text, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for any content."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a part of it would keep a full disk full
        temporary.unlink(missing_ok=True)
        raise


def write_linked_folder(link: Path, files: Mapping[str, bytes]) -> None:
    """Replace all files of a folder in one step: a reader, and whoever comes after a kill, finds all old or all new files.

    The files lie in ``NAME-1``, ``NAME-2``, ... beside the link ``NAME``, which is moved when the new ones are on disk. Such
    folders that no link points to are removed: leftovers of a kill, and what was replaced. One process may write at a time.

    Args:
        link: ``NAME``. In a copy of it that was made without links it is a plain folder, which is replaced too; there alone a
            kill at the wrong moment leaves no folder.
        files: content by name.

    Raises:
        OSError: a file cannot be written; the old ones are as they were.
    """
    parent, new_link = link.parent, link.with_name(f".{link.name}.new")
    new_link.unlink(missing_ok=True)
    _remove_unlinked(link)
    folder = next(path for number in itertools.count(1) if not os.path.lexists(path := parent / f"{link.name}-{number}"))
    try:
        folder.mkdir()
        for name, content in files.items():
            write_bytes(folder / name, content)
        _flush_folder(folder)
        new_link.symlink_to(folder.name)
        if link.is_dir() and not link.is_symlink():
            link.rename(folder.with_name(f"{folder.name}-0"))
        os.replace(new_link, link)
        _flush_folder(parent)
    finally:
        new_link.unlink(missing_ok=True)
        _remove_unlinked(link)


def keep_linked_folder(link: Path, name: str) -> None:
    """Give the folder behind a link a name of its own as well, so that it stays when the link is moved.

    Args:
        link: of :func:`write_linked_folder`; nothing happens if there is none.
        name: what has that name already stays.
    """
    other = link.with_name(name)
    if os.path.lexists(other) or not link.exists():
        return
    if link.is_symlink():
        other.symlink_to(os.readlink(link))
    else:
        link.rename(other)


def _remove_unlinked(link: Path) -> None:
    """Remove the folders ``NAME-N`` that no link beside them points to."""
    entries = list(os.scandir(link.parent))
    kept = {name for entry in entries if entry.is_symlink() for name in (entry.name, Path(os.readlink(entry.path)).name)}
    for entry in entries:
        if re.fullmatch(rf"{re.escape(link.name)}-[\d-]+", entry.name) and entry.name not in kept:
            shutil.rmtree(entry.path, ignore_errors=True)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_start(**facts: Any) -> dict[str, Any]:
    """Facts about this start: time, host, command, versions, git state, and what the caller adds."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(),
        **facts,
    }


def append_start(run_dir: Path, start: dict[str, Any]) -> None:
    """Add an entry to ``run.json``; earlier ones stay. A damaged file is set aside."""
    starts = _read_starts(run_dir)
    if starts is None:
        os.replace(run_dir / "run.json", run_dir / "run.json.damaged")
    write_text(run_dir / "run.json", json.dumps({"starts": [*(starts or []), start]}, indent=2) + "\n")


def count_starts(run_dir: Path) -> int:
    """How often the run has begun to train so far."""
    return len(_read_starts(run_dir) or [])


def past_starts(run_dir: Path) -> tuple[float | None, int]:
    """Unix time of the run's first start, None if there was none, and the steps that its restarts have lost so far."""
    starts = _read_starts(run_dir) or []
    try:
        first = datetime.fromisoformat(starts[0]["started"]).timestamp() if starts else None
        return first, sum(int(start.get("lost_steps", 0)) for start in starts)
    except (KeyError, TypeError, ValueError, AttributeError):  # edited by hand
        return None, 0


def _read_starts(run_dir: Path) -> list[dict[str, Any]] | None:
    """Entries of run.json; None if the file is damaged, which must not stop a run."""
    path = run_dir / "run.json"
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (ValueError, KeyError, TypeError):
        return None


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape a run."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """Commit of the code and the files that differ from it; of a snapshot what it was made of; empty outside both.

    Args:
        folder: root of the project; default: of the code that runs.
    """
    folder = folder or Path(__file__).resolve().parents[1]
    if (folder / SNAPSHOT).exists():
        try:
            taken = json.loads((folder / SNAPSHOT).read_text(encoding="utf-8"))
        except ValueError:
            return {}
        return {name: taken[name] for name in ("commit", "changed_files") if name in taken} | {"snapshot": taken.get("digest")}

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"commit": commit, "changed_files": (git("status", "--porcelain") or "").splitlines()}
