"""Serves the newest values of a run to Prometheus over HTTP. Imports no torch.

A step only replaces a dictionary; a scrape reads whichever dictionary is there. Neither waits for the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nepa_dist.metrics import registry


class PrometheusExporter:
    """A sink that keeps the last value of every key and serves them all, on a thread of its own.

    Counters show the absolute values that they are given, so a resumed run goes on from where it was. ``nepa_step`` and
    ``nepa_last_step_timestamp_seconds`` come from the calls themselves. ``nepa_run_info`` is 1 and carries the labels of
    ``info``.

    Args:
        address: address to bind to; 127.0.0.1 keeps the endpoint on this machine, as it has no password.
        port: TCP port; 0 takes a free one, see ``port``.
        info: labels that describe this run; names are letters, digits and underscores.

    Raises:
        OSError: the address cannot be bound, for instance because another process has the port.
    """

    name = "prometheus"

    def __init__(self, address: str, port: int, info: Mapping[str, str]) -> None:
        self._values = _Values(info)
        scraped = CollectorRegistry()
        scraped.register(self._values)
        try:
            self._server, self._thread = start_http_server(port, addr=address, registry=scraped)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"cannot serve metrics on {address}:{port}: {reason}; "
                "set metrics.prometheus_port to another port, or to 0 for a free one, and check metrics.prometheus_address"
            ) from error
        self.port: int = self._server.server_port
        # A forked loader worker has a copy of the listening socket and would keep the port when the trainer is killed.
        os.register_at_fork(after_in_child=self._server.socket.close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Replace the values of these keys; the others keep theirs."""
        self._values.update({**values, "step": step, "last_step_timestamp_seconds": time.time()})

    def event(self, message: str) -> None:
        """Messages have no place in a metric."""

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Values(Collector):
    """The last value of every key, as Prometheus families with their help text."""

    def __init__(self, info: Mapping[str, str]) -> None:
        self._info = dict(info)
        self._values: dict[str, float] = {}

    def update(self, values: Mapping[str, float]) -> None:
        self._values = {**self._values, **values}  # a new dictionary: a scrape in progress keeps the old one

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        info = GaugeMetricFamily("nepa_run_info", "1; its labels describe this start of the run.", labels=list(self._info))
        info.add_metric(list(self._info.values()), 1)
        yield info
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for key, value in self._values.items():
            metric, label_value = registry.lookup(key)
            if metric.name not in families:
                family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                labels = [metric.label] if metric.label else []
                families[metric.name] = family(registry.prometheus_name(metric), metric.help, labels=labels)
            families[metric.name].add_metric([label_value] if label_value is not None else [], value)
        yield from families.values()
