"""The metrics endpoint of a run: opened with what the configuration says, and made known in the run root."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from nepa_dist.config import Config
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


def open_endpoint(config: Config, info: Mapping[str, str], build: Mapping[str, str], say: Callable[[str], None]) -> Endpoint:
    """Serve the metrics and write the file that Prometheus finds them by. What fails is said, and training goes on.

    Args:
        config: ``metrics.prometheus*``, the run's name and root.
        info: labels of ``nepa_run_info``.
        build: labels of ``nepa_build_info``.
        say: takes messages for people.
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
        return Endpoint(None, None, None)
    host = reachable_host(metrics.prometheus_address, metrics.prometheus_host)
    scheme = "http" if tls is None else "https"
    endpoint = f"{f'[{host}]' if ':' in host else host}:{exporter.port}"
    target = None
    try:
        target = Target(Path(config.run_root), config.name, endpoint, {"task": config.task, "__scheme__": scheme})
    except OSError as error:
        say(f"Prometheus will not find this run by itself: {error}")
    return Endpoint(exporter, target, f"{scheme}://{endpoint}/metrics")


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
    build = {"version": metadata.version("nepa-dist")}
    return info, build | {name: found[name] for name in ("torch", "deepspeed") if name in found}
