"""The page of speed, time, ranks, nodes and memory."""

from __future__ import annotations

from nepa_dist.metrics.panels import MFU, PHASES, RUN, SPEED, Dashboard, Panel

_NODES = "more than one node"


def quantile(q: float, histogram: str, how: str = "rate", window: str = "$__rate_interval") -> str:
    """PromQL of a quantile of one of the registry's histograms, by run."""
    return f"histogram_quantile({q}, sum by (run, le) ({how}(nepa_{histogram}_bucket{RUN}[{window}])))"


THROUGHPUT = Dashboard(
    "nepa-throughput",
    "NEPA: throughput and stragglers",
    (
        (
            "Speed",
            (
                SPEED,
                Panel("Tokens per second", ("tokens_per_second",)),
                MFU,
                Panel("Model operations per second", ("model_flops_total",)),
            ),
        ),
        (
            "Steps",
            (
                Panel("Time per step", ("step_seconds", "step_expected_seconds")),
                Panel(
                    "Time per step, quantiles",
                    queries=tuple(
                        (
                            quantile(q, "step_duration_seconds"),
                            f"{{{{run}}}} p{round(100 * q)}",
                        )
                        for q in (0.5, 0.95, 0.99)
                    ),
                    unit="s",
                ),
                PHASES,
            ),
        ),
        (
            "Ranks",
            (
                Panel(
                    "Straggler score (slowest 10)",
                    queries=((f"bottomk(10, nepa_straggler_score{RUN})", "{{run}} rank {{rank}}"),),
                    unit="percentunit",
                    when="more than one rank",
                ),
                Panel(
                    "Computing by rank (most 10)",
                    queries=(
                        (
                            f"topk(10, rate(nepa_rank_compute_seconds_total{RUN}[$__rate_interval]))",
                            "{{run}} rank {{rank}}",
                        ),
                    ),
                    unit="percentunit",
                    when="more than one rank",
                ),
                Panel(
                    "Waiting for data by rank (most 10)",
                    queries=(
                        (
                            f"topk(10, rate(nepa_rank_data_wait_seconds_total{RUN}[$__rate_interval]))",
                            "{{run}} rank {{rank}}",
                        ),
                    ),
                    unit="percentunit",
                    when="more than one rank",
                ),
                Panel(
                    "Age of the oldest rank's report",
                    queries=((f"time() - min by (run) (nepa_rank_heartbeat_timestamp_seconds{RUN})", "{{run}}"),),
                    unit="s",
                    when="more than one rank",
                ),
            ),
        ),
        (
            "Nodes",
            (
                Panel("Steps by node", ("node_step",), when=_NODES),
                Panel(
                    "Age of each node's newest step",
                    queries=((f"time() - nepa_node_heartbeat_timestamp_seconds{RUN}", "{{run}} node {{node}}"),),
                    unit="s",
                    when=_NODES,
                ),
                Panel("Waiting for data by node", ("node_data_wait_seconds_total",), when=_NODES),
                Panel("Memory by node", ("node_memory_bytes",), when=_NODES),
                Panel("Host memory that is left by node", ("node_host_memory_available_bytes",), when=_NODES),
                Panel(
                    "Endpoints that answer",
                    queries=(('sum by (run) (up{job="nepa", run=~"$run"})', "{{run}}"),),
                    unit="short",
                ),
            ),
        ),
        (
            "Memory",
            (
                Panel("Memory, worst rank", ("memory_bytes",)),
                Panel(
                    "Memory by rank (most 10)",
                    queries=((f"topk(10, nepa_rank_memory_bytes{RUN})", "{{run}} rank {{rank}}"),),
                    unit="bytes",
                    when="more than one rank",
                ),
                Panel("Held by the allocator", ("memory_reserved_bytes", "memory_capacity_bytes"), when="on a GPU"),
                Panel("Allocation retries", ("allocation_retries_total",), when="on a GPU"),
                Panel("Host memory", ("host_memory_bytes",)),
            ),
        ),
    ),
)
