"""The metrics endpoints of a run: opened with what the configuration says, and made known in the run root.

Rank 0 serves the run: what is global, and the numbers of all ranks, which come to it with the loss. On each further node the
first rank serves what it sees itself, without asking anybody, so that a node that is gone or frozen can be told from one that
waits for it.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nepa_dist import __version__
from nepa_dist.config import Config
from nepa_dist.engines.mesh import World
from nepa_dist.metrics.discovery import Target
from nepa_dist.metrics.exporter import PrometheusExporter, reachable_host
from nepa_dist.run_folder import git_state, versions


class Endpoint(NamedTuple):
    """What is open; any of it may be missing."""

    exporter: PrometheusExporter | None
    target: Target | None
    url: str | None

    def close(self) -> None:
        """Take the run off the list. The exporter is a sink and is closed with the others."""
        if self.target is not None:
            self.target.close()


NOTHING = Endpoint(None, None, None)


def open_endpoint(
    config: Config,
    info: Mapping[str, str] | None,
    build: Mapping[str, str] | None,
    say: Callable[[str], None],
    node: int | None = None,
) -> Endpoint:
    """Serve the metrics and write the file that Prometheus finds them by. What fails is said, and training goes on.

    Args:
        config: ``metrics.prometheus*``, the run's name and root.
        info: labels of ``nepa_run_info``; None on further nodes.
        build: labels of ``nepa_build_info``; None on further nodes.
        say: takes messages for people.
        node: number of a further node; None for the endpoint of the run.
    """
    metrics = config.metrics
    exporter = None
    try:
        token = None
        if metrics.prometheus_token_file is not None:
            token = Path(metrics.prometheus_token_file).read_text(encoding="utf-8").strip()
            if not token:
                raise OSError(f"metrics.prometheus_token_file {metrics.prometheus_token_file} is empty")
        tls = None if metrics.prometheus_tls_cert is None else (metrics.prometheus_tls_cert, metrics.prometheus_tls_key)

        def serve(port: int) -> PrometheusExporter:
            return PrometheusExporter(
                metrics.prometheus_address, port, info, run=config.name, build=build, token=token, tls=tls
            )

        try:
            exporter = serve(metrics.prometheus_port)
        except OSError as error:
            if metrics.prometheus_port == 0:
                raise
            exporter = serve(0)
            say(f"{error}; using port {exporter.port} instead")
    except (OSError, UnicodeError) as error:
        say(f"no metrics endpoint: {error}; training goes on without it")
        return NOTHING
    host = reachable_host(metrics.prometheus_address, metrics.prometheus_host)
    scheme = "http" if tls is None else "https"
    endpoint = f"{f'[{host}]' if ':' in host else host}:{exporter.port}"
    target = None
    try:
        labels = {"task": config.task, "__scheme__": scheme}
        target = Target(Path(config.run_root), config.name, endpoint, labels, node)
    except OSError as error:
        say(f"Prometheus will not find this run by itself: {error}")
    return Endpoint(exporter, target, f"{scheme}://{endpoint}/metrics")


def open_on_each_node(
    config: Config, world: World, describe: Callable[[], tuple[Mapping[str, str], Mapping[str, str]]]
) -> tuple[Endpoint, list[str]]:
    """Open the endpoint of this rank, if it has one. A collective where there are several nodes.

    An address of the loopback interface can be reached on its own machine alone, so with one the nodes on other machines than
    that of rank 0 open none.

    Args:
        config: as for :func:`open_endpoint`.
        world: the ranks.
        describe: gives the labels of the run; called on rank 0.

    Returns:
        The endpoint, and on all ranks what the nodes had to say.
    """
    notes: list[str] = []
    if not config.metrics.prometheus:
        return NOTHING, notes
    if config.cluster.nodes == 1:
        return (open_endpoint(config, *describe(), notes.append) if world.is_main else NOTHING), notes
    endpoint = NOTHING
    host = os.uname().nodename
    beside_main = world.gather(host)[0] == host
    if world.is_main:
        endpoint = open_endpoint(config, *describe(), notes.append)
    elif world.local_rank == 0 and (beside_main or not _is_loopback(config.metrics.prometheus_address)):
        node = world.rank // world.local_world_size
        endpoint = open_endpoint(config, None, None, lambda note: notes.append(f"node {node}: {note}"), node)
    return endpoint, [note for part in world.gather(notes) for note in part]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return address == "localhost"


def node_values(world: World, step: int, of_ranks: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What the first rank of a node tells of it, by key.

    Args:
        world: the ranks.
        step: steps done.
        of_ranks: numbers of all ranks (``step_report.OF_RANKS``); empty where the step is not logged.
    """
    node = world.rank // world.local_world_size
    values = {"node_step": float(step), "node_heartbeat_timestamp_seconds": time.time()}
    if of_ranks:
        own = slice(node * world.local_world_size, (node + 1) * world.local_world_size)
        values["node_data_wait_seconds_total"] = max(of_ranks["data_wait_seconds"][own])
        values["node_memory_bytes"] = max(of_ranks["memory_bytes"][own])
        if (available := _available_memory()) is not None:
            values["node_host_memory_available_bytes"] = available
    return {f"{name}.{node}": value for name, value in values.items()}


def _available_memory() -> float | None:
    """Of this machine, in bytes, as the kernel estimates it; None where it does not."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def describe_run(config: Config, restarts: int, device_name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Labels of ``nepa_run_info`` and of ``nepa_build_info``; no paths and no settings but those that name the run."""
    found = {name.replace("-", "_"): version for name, version in versions().items()}
    git = git_state()
    info = {
        "task": config.task,
        "model": str(config.model.preset or "custom"),
        "engine": config.engine.name,
        "precision": config.engine.precision,
        "world_size": str(config.cluster.world_size),
        "nodes": str(config.cluster.nodes),
        "device": device_name,
        "host": os.uname().nodename,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
        "restart": str(restarts),
        "git": str(git.get("commit", ""))[:12],
        "config_digest": config.digest()[:12],
    }
    build = {"version": __version__}
    return info, build | {name: found[name] for name in ("torch", "deepspeed") if name in found}
