"""One HTML page that compares runs: the panels of the overview, with curves that can be looked at closely.

The page holds its data and its script; it needs neither a server nor a network. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nepa_dist.metrics import registry
from nepa_dist.metrics.panels import OVERVIEW, Panel
from nepa_dist.metrics.sinks import read_curve
from nepa_dist.run_folder import write_text

MAX_POINTS = 1500
"""Points of a curve; of longer ones every n-th is taken, with the extremes between."""
MORE = (
    Panel("Cross-image cosine and prediction cosine", ("cross_image_cosine", "prediction_cosine")),
    Panel("Largest attention logit", ("attention_logit_max",)),
    Panel("Future leak", ("future_leak_ratio",)),
    Panel("Gradient norm by group", ("group_grad_norm",), log=True),
    Panel("Update / weights", ("update_ratio",), log=True),
    Panel("Where time goes, seconds", ("time_seconds_total",)),
    Panel("Validation scores", ("top1", "top5", "miou")),
)
"""What the dashboards show on other pages."""


def write_report(path: Path, runs: Sequence[Path]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        runs: folders of runs, each with ``metrics.jsonl``.

    Raises:
        FileNotFoundError: a folder holds no run.
        OSError: a file cannot be read or written.
        ValueError: a file is damaged.
    """
    curves = {}
    for run in runs:
        file = run / "metrics.jsonl"
        if not file.exists():
            raise FileNotFoundError(f"{run} is not the folder of a run: it has no metrics.jsonl")
        name = run.resolve().name
        while name in curves:
            name += "'"
        curves[name] = read_curve(file)
    panels = [_panel(panel, curves) for panel in (*(p for _, row in OVERVIEW.rows for p in row), *MORE)]
    shown = [panel for panel in panels if panel["lines"]]
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # Without a "<" nothing in the data can end the script element, or change how it is read.
    data = json.dumps({"runs": list(curves), "panels": shown}, allow_nan=False).replace("<", "\\u003c")
    write_text(path, template.replace("/*DATA*/null", data))


def _panel(panel: Panel, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    keys = [key for name in panel.keys for key in (registry.METRICS[name].keys if name in registry.METRICS else (name,))]
    helps = [registry.lookup(key)[0] for key in keys]
    lines = []
    for index, (_, rows) in enumerate(curves.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                x, y = zip(*_thin(points), strict=True)
                lines.append({"run": index, "key": key, "x": x, "y": [v if math.isfinite(v) else None for v in y]})
    about = " ".join(dict.fromkeys(f"{metric.name}: {metric.help}" for metric in helps))
    return {"title": panel.title, "about": about, "log": panel.log, "lines": lines}


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS of them; of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = -(-len(points) // (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        broken = [point for point in stretch if not math.isfinite(point[1])]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1]), *broken[:1]}
        kept += sorted(ends)
    return kept
