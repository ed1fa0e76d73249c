"""Writes the Grafana dashboards and docs/metrics.md: make dashboards. Needs grafana-foundation-sdk (in the dev extra).

Every query, unit and help text follows from the metric registry and the pages; the files in grafana/dashboards are what this
writes, and a test says when they are not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

if not __package__:  # started as a file: the folder above holds the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from monitoring.pages import DASHBOARDS
from monitoring.reference import page as reference_page
from nepa_dist.metrics import registry
from nepa_dist.metrics.metric import Metric
from nepa_dist.metrics.panels import RUN, Dashboard, Panel

FOLDER = Path(__file__).parent / "grafana/dashboards"
REFERENCE = Path(__file__).parents[1] / "docs/metrics.md"
WIDTH, HEIGHT = 8, 8
"""Of a panel, in Grafana's grid of 24 columns."""
UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "percentunit", "FLOP/s": "flops"}
_SIGNED = ("embedding_", "prediction_", "cross_image_")
"""Ratios that are cosines or skills: shown as numbers, for they are no shares."""
_NOT_IN_TYPES = {"auto", "auto_min", "auto_count", "placement"}
"""Keys of variables and links that the SDK writes and the types of our Grafana do not know (check_schema.sh)."""


def queries(panel: Panel) -> list[tuple[str, str]]:
    """PromQL and legend of each curve of a panel.

    Raises:
        KeyError: the registry lacks one of its keys.
    """
    found = list(panel.queries)
    for key in panel.keys:
        metric, value = _metric(key)
        selector = RUN if value is None else f'{{run=~"$run", {metric.label}="{value}"}}'
        series = f"{registry.prometheus_name(metric)}{selector}"
        if metric.kind == "counter":
            series = f"rate({series}[$__rate_interval])"
        name = f" {metric.name}" if len({_metric(other)[0].name for other in panel.keys}) > 1 else ""
        label = "" if metric.label is None else f" {{{{{metric.label}}}}}"
        found.append((series, f"{{{{run}}}}{name}{label}"))
    return found


def unit(panel: Panel) -> str:
    """Grafana's name of a panel's unit."""
    if panel.unit or not panel.keys:
        return panel.unit or "none"
    metric, _ = _metric(panel.keys[0])
    if metric.kind == "counter":
        return {"seconds": "percentunit", "FLOP": "flops"}.get(metric.unit, "cps")
    if metric.unit == "ratio" and metric.name.startswith(_SIGNED):
        return "none"
    return "none" if metric.name == "epoch" else UNITS.get(metric.unit, "short" if metric.unit else "none")


def _metric(key: str) -> tuple[Metric, str | None]:
    return (registry.METRICS[key], None) if key in registry.METRICS else registry.lookup(key)


def _description(panel: Panel) -> str:
    helps = list(dict.fromkeys(f"{_metric(key)[0].name}: {_metric(key)[0].help}" for key in panel.keys))
    return "\n\n".join([*helps, *([f"Only for: {panel.when}."] if panel.when else [])])


def _source() -> common_models.DataSourceRef:
    return common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")


def _panel(panel: Panel, x: int, y: int) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(_description(panel))
        .datasource(_source())
        .unit(unit(panel))
        .grid_pos(models.GridPos(h=HEIGHT, w=WIDTH, x=x, y=y))
        .show_points(common_models.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST).placement(_BOTTOM).show_legend(True)
        )
    )
    if panel.log:
        scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)
        built = built.scale_distribution(scale)
    for index, (expression, legend) in enumerate(queries(panel)):
        target = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + index)).range()
        built = built.with_target(target)
    return built


_BOTTOM = common_models.LegendPlacement.BOTTOM


def build(page: Dashboard) -> str:
    """The JSON of one dashboard."""
    built = (
        dashboard.Dashboard(page.title)
        .uid(page.uid)
        .tags(["nepa"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("30s")
        .link(
            dashboard.DashboardLink("NEPA")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["nepa"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(_source())
            # label_values would list only those that run now.
            .query("query_result(max by (run) (max_over_time(nepa_step[$__range])))")
            .regex('/run="([^"]+)"/')
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
        )
    )
    y, number = 0, 0
    for title, panels in page.rows:
        number += 1
        built = built.with_row(dashboard.Row(title).id(number).grid_pos(models.GridPos(h=1, w=24, x=0, y=y)))
        y += 1
        for index, panel in enumerate(panels):
            number += 1
            column, row = index % 3, index // 3
            built = built.with_panel(_panel(panel, column * WIDTH, y + row * HEIGHT).id(number))
        y += -(-len(panels) // 3) * HEIGHT
    content = json.loads(JSONEncoder(sort_keys=True, indent=2).encode(built.build()))
    for item in (*content["templating"]["list"], *content["links"]):
        for key in _NOT_IN_TYPES:
            item.pop(key, None)
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def main(folder: Path) -> None:
    """Write every dashboard into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in DASHBOARDS:
        path = folder / f"{page.uid.removeprefix('nepa-')}.json"
        path.write_text(build(page), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(FOLDER)
    REFERENCE.write_text(reference_page(), encoding="utf-8")
    print(REFERENCE)
