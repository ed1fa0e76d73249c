"""The reference page of all metrics, docs/metrics.md."""

from __future__ import annotations

from nepa_dist.metrics import registry
from nepa_dist.metrics.metric import NUMBERED, Metric

_HEAD = """# All metrics

Written by `make dashboards` from `nepa_dist/metrics/registry.py`. At the Prometheus endpoint each has this name and the label
`run`; in `metrics.jsonl`, and at TensorBoard and wandb, the key is the name without `nepa_`, and behind a dot (at the trackers
a slash) the value of its label. Histograms and what has a label `rank` or `node` are at the endpoint alone.

| name | type | label | of the ranks | only | what it is |
|---|---|---|---|---|---|
"""
_RANKS = {
    "run": "the run",
    "mean": "mean",
    "max": "largest",
    "sum": "sum",
    "main": "rank 0",
    "rank": "each",
    "node": "each node's",
}


def page() -> str:
    """The Markdown of the page."""
    return _HEAD + "".join(_row(metric) for metric in registry.METRICS.values())


def _row(metric: Metric) -> str:
    label = ""
    if metric.label is not None:
        label = f"`{metric.label}`" if metric.label in NUMBERED else f"`{metric.label}`: {', '.join(metric.label_values)}"
    cells = (f"`{registry.prometheus_name(metric)}`", metric.kind, label, _RANKS[metric.ranks], metric.when, metric.help)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
