"""What must hold of a job before it is submitted: its paths, its container, its secrets, its code. Imports no torch."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from jobs import snapshot
from jobs.findings import Check, Context, Finding, good, note, problem
from jobs.slurm import INHERITED
from nepa_dist.config_cluster import is_hostile
from nepa_dist.data.mounts import find_mount

LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs", "vfat", "exfat")
"""That one node alone sees, unless it exports them."""


def check_submitit(context: Context) -> Iterator[Finding]:
    """The library that writes the script is there."""
    if not context.is_slurm:
        return
    try:
        import submitit
    except ImportError:
        yield problem("submitit is not installed: pip install 'nepa-dist[slurm]'")
    else:
        yield good(f"version {submitit.__version__}")


def check_paths(context: Context) -> Iterator[Finding]:
    """No path in the script has characters that SLURM, a container or a terminal would change."""
    if not context.is_slurm:
        return
    where = context.config.cluster
    folder = str(_job_folder(context))  # holds the run and the code
    bad = False
    for text in (folder, sys.executable):
        if is_hostile(text):
            bad = True
            yield problem(f"{text!r} has a control character or a line break: choose another --run-dir")
        elif set(text) & set("%\\"):
            bad = True
            yield problem(f"{text}: SLURM does not take % and \\ of a path as they are; choose another --run-dir")
        elif where.container and set(text) & set(":,"):
            bad = True
            yield problem(f"{text}: a container cannot mount a path with : or ,; choose another --run-dir")
    if not bad:
        yield good(folder)


def check_shared(context: Context) -> Iterator[Finding]:
    """Run folder, data and interpreter lie where all nodes see them."""
    if not context.is_slurm:
        return
    config = context.config
    places = {"run folder": str(context.run_dir)}
    if config.data.source and os.path.isabs(config.data.source) and os.path.exists(config.data.source):
        places["data"] = config.data.source
    if config.cluster.container is None:
        places["interpreter"] = config.cluster.python or sys.executable
    fine = []
    for what, place in places.items():
        mount = find_mount(Path(place))
        shared = any(Path(place).is_relative_to(folder) for folder in config.cluster.shared)
        if mount.kind in LOCAL_FILE_SYSTEMS and not shared:
            found = note if what == "interpreter" else problem  # each node may have one of its own in that place
            yield found(
                f"the {what}, {place}, is on {mount.kind} at {mount.point}, which other nodes do not see: use a shared file "
                f"system, or name {Path(place).parent} in cluster.shared if they do"
            )
        else:
            fine.append(f"{what} on {'a file system named as shared' if shared else mount.kind or 'an unknown file system'}")
    if len(fine) == len(places):
        yield good(", ".join(fine))


def check_container(context: Context) -> Iterator[Finding]:
    """The image and what is mounted into it are there."""
    where = context.config.cluster
    if not context.is_slurm or where.container is None:
        return
    wrong = False
    image = where.container
    if re.match(r"[./~]", image) and not Path(image).expanduser().exists():
        wrong = True
        yield problem(f"cluster.container {image} does not exist: build it (docs/slurm.md), or correct the path")
    for text in where.container_mounts:
        folder = text.split(":")[0]
        if not Path(folder).exists():
            wrong = True
            yield problem(f"cluster.container_mounts: {folder} does not exist")
    mounts = [Path(text.split(":")[0]) for text in (str(_job_folder(context)), *where.container_mounts)]
    needed = {"data": context.config.data.source, "--init": context.config.init.path}
    if where.secrets and where.container_runtime == "pyxis":  # which does not mount the home of the user, as apptainer does
        needed["file of secrets"] = os.path.expanduser(where.secrets_file)
    for what, place in needed.items():
        if place and os.path.isabs(place) and not any(Path(place).is_relative_to(folder) for folder in mounts):
            wrong = True
            yield problem(f"the {what} {place} is in no folder of cluster.container_mounts: add it")
    if not wrong:
        yield good(f"{image} with {where.container_runtime}")


def check_site(context: Context) -> Iterator[Finding]:
    """The shell file of the site can be read, and is not one that anybody may change."""
    where = context.config.cluster
    if not context.is_slurm or where.source is None:
        return
    path = Path(where.source).expanduser()
    if not path.is_file():
        yield problem(f"cluster.source {path} is no file")
    elif path.stat().st_mode & stat.S_IWOTH:
        yield problem(f"cluster.source {path} can be changed by everybody: chmod o-w")
    else:
        yield good(str(path))


def check_secrets(context: Context) -> Iterator[Finding]:
    """Secrets lie in a file that only its owner reads; none comes along with the environment."""
    where = context.config.cluster
    if not context.is_slurm:
        return
    names = [name for name in where.inherit if re.search("TOKEN|SECRET|PASSW|_KEY", name)]
    for name in names:
        yield problem(
            f"cluster.inherit {name} looks like a secret: name it in cluster.secrets, its value in {where.secrets_file}"
        )
    path = Path(where.secrets_file).expanduser()
    if where.secrets and not path.is_file():
        yield problem(f"cluster.secrets: there is no {path}; write lines NAME=VALUE into it and chmod 600")
    elif where.secrets and path.stat().st_mode & 0o077:
        yield problem(f"{path} can be read by others: chmod 600 {path}")
    elif where.secrets:
        given = {line.partition("=")[0].strip() for line in path.read_text(errors="replace").splitlines()}
        missing = [name for name in where.secrets if name not in given]
        if missing:
            yield problem(f"{path} has no {', '.join(missing)}")
        else:
            yield good(f"{', '.join(where.secrets)} in {path}")
    elif not names:
        yield good(f"none; of this shell only {', '.join((*INHERITED, *where.inherit))} come along")


def check_snapshot(context: Context) -> Iterator[Finding]:
    """The code can be taken, and holds no secrets."""
    if not context.is_slurm:
        return
    try:
        code = snapshot.read_code(context.args.include)
    except (snapshot.SnapshotError, OSError) as error:
        yield problem(str(error))
        return
    secrets = snapshot.secrets_in(code, os.environ)
    yield from map(problem, secrets)
    if not secrets:
        yield good(f"{len(code.files)} files, {code.num_bytes / 1e6:.1f} MB, {code.digest[:12]}")


def check_endpoint(context: Context) -> Iterator[Finding]:
    """The files that the metrics endpoint is protected with can be read; without them a run would serve nothing."""
    metrics = context.config.metrics
    names = ("prometheus_token_file", "prometheus_tls_cert", "prometheus_tls_key")
    given = {name: path for name in names if metrics.prometheus and (path := getattr(metrics, name)) is not None}
    missing = [name for name, path in given.items() if not os.access(path, os.R_OK)]
    yield from (
        problem(f"metrics.{name} {given[name]} cannot be read, so there would be no metrics endpoint") for name in missing
    )
    if given and not missing:
        yield good(f"{', '.join(given)}: readable")


def _job_folder(context: Context) -> Path:
    return Path(getattr(context.args, "job_folder", None) or context.run_dir)


JOB_CHECKS: dict[str, Check] = {
    "submitit": check_submitit,
    "paths": check_paths,
    "shared": check_shared,
    "container": check_container,
    "site": check_site,
    "secrets": check_secrets,
    "snapshot": check_snapshot,
    "endpoint": check_endpoint,
}
