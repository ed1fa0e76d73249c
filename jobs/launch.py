"""Starts a run that has passed its checks."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs import cluster
from jobs.runs import clear_outcome
from nepa_dist.config import Config
from nepa_dist.guard import EXIT_AGAIN
from nepa_dist.run_folder import write_text


class LaunchError(RuntimeError):
    """Nothing was started; the message says why."""


def launch_local(config: Config, changes: Sequence[str] = ()) -> int:
    """Write the configuration into the run folder and run all ranks here.

    Args:
        config: a configuration without problems.
        changes: lines about settings that differ from those of the run in that folder, to be printed.

    Returns:
        The exit code of the run.

    Raises:
        LaunchError: the folder cannot be written, or a run is going on in it.
    """
    run_dir = config.run_dir
    path = run_dir / "config.yaml"
    try:
        if not run_dir.exists():
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            run_dir.mkdir(mode=0o700)
        with locked(run_dir):
            print("\n".join([f"{'resuming' if path.exists() else 'starting'} {run_dir}", *changes]), flush=True)
            write_text(path, config.to_yaml())
            clear_outcome(run_dir)
            code = cluster.run_local(run_dir, config.cluster.world_size)
    except BlockingIOError:
        raise LaunchError(f"a run is going on in {run_dir}; wait for it, stop it, or choose another --name") from None
    except OSError as error:
        raise LaunchError(f"cannot start in {run_dir}: {error}") from None
    if code == EXIT_AGAIN:
        print(f"stopped before the end; the same command continues {run_dir} from its newest checkpoint", file=sys.stderr)
    return code


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second launcher out of a run folder; the kernel gives the lock back when this process ends.

    Raises:
        BlockingIOError: another launcher holds it.
    """
    with (run_dir / ".launcher.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
