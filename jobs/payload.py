"""What a rank checks before it runs what a job was given, and the secrets that it reads on its node."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from jobs.cluster import REPO_ROOT
from jobs.snapshot import verify_snapshot
from nepa_dist.config import ClusterConfig, Config, ConfigError


def refuse_foreign(run_dir: Path) -> None:
    """Refuse a run folder or a configuration that another user owns or may change.

    Raises:
        ConfigError: naming the place.
    """
    problems = []
    for path in (run_dir, run_dir / "config.yaml"):
        info = path.stat()
        if info.st_uid != os.geteuid():
            problems.append(f"{path} belongs to user {info.st_uid}, this job to user {os.geteuid()}: submit a run of your own")
        elif info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problems.append(f"{path} can be changed by others: chmod go-w {path}")
    if problems:
        raise ConfigError(problems)


def check_code(config: Config, rank: int) -> None:
    """The code that runs is the snapshot that was submitted; rank 0 reads all of it.

    Raises:
        ConfigError, SnapshotError: it is not.
    """
    digest = config.cluster.snapshot
    if digest is None:
        return
    if REPO_ROOT.name != digest[:12]:
        raise ConfigError([f"this job was submitted with the code {digest[:12]}, but {REPO_ROOT} runs"])
    if rank == 0:
        verify_snapshot(REPO_ROOT, digest)


def read_secrets(cluster: ClusterConfig) -> dict[str, str]:
    """The variables that ``cluster.secrets`` names, from the file on this node.

    Raises:
        ConfigError: the file is missing, belongs to another user, can be read by others, or lacks one of them. No value is
            shown.
    """
    if not cluster.secrets:
        return {}
    path = Path(cluster.secrets_file).expanduser()
    try:
        info, text = path.stat(), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cluster.secrets_file {path}: {error}"]) from None
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise ConfigError([f"cluster.secrets_file {path} belongs to another user or can be read by others: chmod 600 {path}"])
    pairs = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    given = {name.strip(): value.strip() for name, value in pairs.items()}
    if missing := [name for name in cluster.secrets if name not in given]:
        raise ConfigError([f"cluster.secrets_file {path} has no {', '.join(missing)}"])
    return {name: given[name] for name in cluster.secrets}
