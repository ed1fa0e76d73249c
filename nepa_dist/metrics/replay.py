"""Turns metrics.jsonl into what Prometheus can take in afterwards: a run that no Prometheus watched is seen like any other.

``promtool tsdb create-blocks-from openmetrics FILE DIR`` makes blocks of the text. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from nepa_dist.metrics import registry


def to_openmetrics(run: str, rows: Iterable[Mapping[str, float]]) -> Iterator[str]:
    """OpenMetrics lines of a run, family by family, each series in the order of time, with the labels that a scrape would give.

    Args:
        run: its name.
        rows: of ``metrics.jsonl``, as :func:`nepa_dist.metrics.sinks.read_curve` gives them.

    Yields:
        Lines with their newline; the last one is ``# EOF``. Keys that the registry does not know are left out, and rows whose
        clock went back.
    """
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            if key == "time" or not _known(key):
                continue
            points = series.setdefault(registry.lookup(key)[0].name, {}).setdefault(key, [])
            if not points or row["time"] > points[-1][0]:
                points.append((row["time"], value))
    labels = f'run="{_escape(run)}",instance="{_escape(run)}",job="nepa"'
    for name, keys in series.items():
        metric = registry.METRICS[name]
        full = registry.prometheus_name(metric)
        family = full.removesuffix("_total") if metric.kind == "counter" else full
        yield f"# HELP {family} {_escape(metric.help)}\n# TYPE {family} {metric.kind}\n"
        for key, points in keys.items():
            _, value_of_label = registry.lookup(key)
            own = f',{metric.label}="{_escape(value_of_label)}"' if value_of_label is not None else ""
            for moment, value in points:
                yield f"{full}{{{labels}{own}}} {_number(value)} {moment:.3f}\n"
    yield "# EOF\n"


def _known(key: str) -> bool:
    try:
        registry.lookup(key)
    except KeyError:  # of another version
        return False
    return True


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    text = repr(float(value))
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(text, text)
