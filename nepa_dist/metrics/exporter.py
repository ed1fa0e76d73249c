"""Serves the newest values of a run to Prometheus over HTTP. Imports no torch.

A step only replaces a dictionary; a scrape reads whichever dictionary is there. Neither waits for the other, and a trainer that
hangs is still answered for by the server's threads. What is served can be read by whoever reaches the address: it holds no
paths, no settings and no secrets, and a token and TLS are there for networks that are shared.
"""

from __future__ import annotations

import hmac
import os
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nepa_dist.metrics import registry

REQUEST_SECONDS = 10.0
"""A client that says or reads nothing for this long is let go."""
MAX_CONNECTIONS = 64
"""Clients at a time; more are turned away at once."""
OWN_SECONDS = 0.5
"""Age up to which the metrics of the endpoint itself are served again."""


class PrometheusExporter:
    """A sink that keeps the last value of every key and serves them all, on threads of its own.

    Counters show the absolute values that they are given, so a resumed run goes on from where it was. ``nepa_step`` and
    ``nepa_last_step_timestamp_seconds`` come from :meth:`write` and :meth:`beat`. Every series of the run carries the label
    ``run``. Only ``GET /metrics`` is answered.

    Args:
        address: address to bind to; 127.0.0.1 keeps the endpoint on this machine.
        port: TCP port; 0 takes a free one, see ``port``.
        run: name of the run.
        info: labels of ``nepa_run_info``, with names of letters, digits and underscores; None: this endpoint does not have it.
        build: labels of ``nepa_build_info``.
        token: what ``Authorization: Bearer`` must say; None asks for nothing.
        tls: PEM files of a certificate and its key (None: in the same file), to serve HTTPS; None: HTTP.

    Raises:
        OSError: the address cannot be bound, for instance because another process has the port, or a PEM file cannot be used.
    """

    name = "prometheus"

    def __init__(
        self,
        address: str,
        port: int,
        info: Mapping[str, str] | None,
        *,
        run: str = "",
        build: Mapping[str, str] | None = None,
        token: str | None = None,
        tls: tuple[str, str | None] | None = None,
    ) -> None:
        context = None
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
        infos = {"run_info": info, "build_info": build or None}
        self._values = _Values(run, {name: labels for name, labels in infos.items() if labels is not None})
        try:
            self._server = _Server((address, port), self._values, token, context)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"cannot serve metrics on {address}:{port}: {reason}; "
                "set metrics.prometheus_port to another port, or to 0 for a free one, and check metrics.prometheus_address"
            ) from error
        self.port: int = self._server.server_port
        # A forked loader worker has a copy of the listening socket and would keep the port when the trainer is killed.
        os.register_at_fork(after_in_child=self._server.socket.close)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="prometheus", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Replace the values of these keys; the others keep theirs."""
        self._values.update({**values, "step": step, "last_step_timestamp_seconds": time.time()})

    def show(self, values: Mapping[str, float]) -> None:
        """Replace the values of these keys and nothing else."""
        self._values.update(values)

    def beat(self, step: int, **durations: float) -> None:
        """Say that a step is over.

        Args:
            step: steps done.
            durations: a value for each of these histograms.
        """
        for name, seconds in durations.items():
            self.observe(name, seconds)
        self._values.update({"step": step, "last_step_timestamp_seconds": time.time()})

    def observe(self, name: str, value: float) -> None:
        """Count a value in a histogram of the registry."""
        self._values.histograms[name].add(value)

    def event(self, message: str) -> None:
        """Messages have no place in a metric."""

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Buckets:
    """Counts of one histogram; written by the loop, read by scrapes."""

    def __init__(self, ends: Sequence[float]) -> None:
        self._ends = (*ends, float("inf"))
        self._state = ([0] * len(self._ends), 0.0)

    def add(self, value: float) -> None:
        counts, total = self._state
        self._state = ([n + (value <= end) for n, end in zip(counts, self._ends, strict=True)], total + value)

    def read(self) -> tuple[list[tuple[str, float]], float]:
        counts, total = self._state  # one read: both are of the same moment
        names = ["+Inf" if end == float("inf") else repr(end) for end in self._ends]
        return list(zip(names, map(float, counts), strict=True)), total


class _Values(Collector):
    """The last value of every key, as Prometheus families with their help text."""

    def __init__(self, run: str, infos: Mapping[str, Mapping[str, str]]) -> None:
        self.labels = {"run": run} if run else {}
        self._infos = {name: dict(labels) for name, labels in infos.items()}
        self._values: dict[str, float] = {}
        self._version = 0
        histograms = (metric for metric in registry.METRICS.values() if metric.kind == "histogram")
        self.histograms = {metric.name: _Buckets(metric.buckets) for metric in histograms if metric.name != "scrape_seconds"}
        self._cache: tuple[int, bytes] = (-1, b"")
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def update(self, values: Mapping[str, float]) -> None:
        self._values = {**self._values, **values}  # a new dictionary: a scrape in progress keeps the old one
        self._version += 1

    def text(self) -> bytes:
        """The exposition, made once for each state of the run however many ask."""
        with self._lock:
            version = self._version
            if self._cache[0] != version:
                self._cache = (version, generate_latest(self._registry))
            return self._cache[1]

    def collect(self) -> Iterable[Metric]:
        for name, labels in self._infos.items():
            metric = registry.METRICS[name]
            everything = {**self.labels, **labels}
            info = GaugeMetricFamily(registry.prometheus_name(metric), metric.help, labels=list(everything))
            info.add_metric(list(everything.values()), 1)
            yield info
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for key, value in self._values.items():
            metric, label_value = registry.lookup(key)
            if metric.name not in families:
                family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                names = [*self.labels, *([metric.label] if metric.label else [])]
                families[metric.name] = family(registry.prometheus_name(metric), metric.help, labels=names)
            own = [label_value] if label_value is not None else []
            families[metric.name].add_metric([*self.labels.values(), *own], value)
        yield from families.values()
        for name, counts in self.histograms.items():
            yield from _histogram(name, counts, self.labels)


class _Own(Collector):
    """Metrics of the endpoint itself."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self.scrapes = _Buckets(registry.METRICS["scrape_seconds"].buckets)
        self.refused = dict.fromkeys(registry.REFUSALS, 0)
        self._cache: tuple[float, bytes] = (-OWN_SECONDS, b"")
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The exposition; with many scrapers, making it for each would be most of the work."""
        now = time.monotonic()
        if now - self._cache[0] >= OWN_SECONDS:
            self._cache = (now, generate_latest(self._registry))
        return self._cache[1]

    def collect(self) -> Iterable[Metric]:
        metric = registry.METRICS["scrapes_refused_total"]
        refused = CounterMetricFamily(registry.prometheus_name(metric), metric.help, labels=[*self._labels, "reason"])
        for reason, count in self.refused.items():
            refused.add_metric([*self._labels.values(), reason], count)
        yield refused
        yield from _histogram("scrape_seconds", self.scrapes, self._labels)


def _histogram(name: str, counts: _Buckets, labels: Mapping[str, str]) -> Iterable[Metric]:
    buckets, total = counts.read()
    if buckets[-1][1]:
        metric = registry.METRICS[name]
        family = HistogramMetricFamily(registry.prometheus_name(metric), metric.help, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, total)
        yield family


class _Server(ThreadingHTTPServer):
    """A thread for each client, not more than MAX_CONNECTIONS; none of them can keep another waiting."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], values: _Values, token: str | None, tls: ssl.SSLContext | None) -> None:
        self.values, self.token, self._tls = values, token, tls
        self.own = _Own(values.labels)
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service for the host's name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(REQUEST_SECONDS)
            if self._tls is not None:  # here and not at accept: a client that says nothing holds its own thread alone
                request = self._tls.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except OSError:  # gone, silent, or no TLS
            self.shutdown_request(request)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS
    server_version, sys_version = "nepa", ""

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        server = self.server
        if self.command != "GET":
            return self._refuse(405, "method", Allow="GET")
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if server.token is not None and not hmac.compare_digest(given, f"Bearer {server.token}".encode()):
            return self._refuse(401, "token", **{"WWW-Authenticate": "Bearer"})
        if self.path.split("?")[0] not in ("/metrics", "/"):
            return self._refuse(404, "path")
        return True

    def do_GET(self) -> None:
        start = time.perf_counter()
        body = self.server.values.text() + self.server.own.text()
        self._send(200, body, **{"Content-Type": CONTENT_TYPE_LATEST})
        self.server.own.scrapes.add(time.perf_counter() - start)

    def _refuse(self, code: int, reason: str, **headers: str) -> bool:
        self.server.own.refused[reason] += 1
        self._send(code, b"", **headers)
        return False

    def _send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are counted, not logged."""


def reachable_host(address: str, host: str | None) -> str:
    """The name that a Prometheus elsewhere is told: the one given, else the address, else the node's own name."""
    return host or (socket.gethostname() if address in ("0.0.0.0", "::", "") else address)
