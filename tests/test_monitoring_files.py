"""Dashboards and alerts name only what the registry has, are what the pages say, and each alert has its paragraph."""

import json
import re

import pytest
import yaml

from monitoring import reference
from nepa_dist.metrics.registry import METRICS, prometheus_name
from prometheus_server import MONITORING, ROOT, needs_promtool

DASHBOARDS = sorted((MONITORING / "grafana/dashboards").glob("*.json"))
GROUPS = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


def series_names():
    names = set()
    for metric in METRICS.values():
        full = prometheus_name(metric)
        names |= {f"{full}_{part}" for part in ("bucket", "sum", "count")} if metric.kind == "histogram" else {full}
    return names


def names_in(expression):
    """Series that an expression names, without those in the values of labels."""
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"(?<![\w:])(?:\w+:)?nepa_[\w:]+", bare))


def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_there_are_enough_of_them():
    assert len(DASHBOARDS) >= 6
    assert len(ALERTS) >= 14
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_name_only_what_exists(rule):
    names = names_in(rule["expr"])
    assert names or "up{" in rule["expr"]
    assert names <= series_names() | RECORDED


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_severity_and_a_paragraph(rule):
    assert rule["labels"]["severity"] in ("warning", "critical")
    page, anchor = rule["annotations"]["runbook"].split("#")
    assert anchor == rule["alert"].lower()
    text = (ROOT / page).read_text()
    heading = f"### {rule['alert']}\n"
    assert heading in text
    assert len(text.split(heading)[1].split("\n#")[0].split()) >= 30, "a paragraph that helps"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_name_only_what_exists_and_are_complete(path):
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == f"nepa-{path.stem}"
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "run"]
    # label_values would hide finished runs.
    assert "max_over_time" in dashboard["templating"]["list"][1]["query"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken = set()
    for panel in panels(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, "panels lie on each other"
        taken |= cells
        for target in panel["targets"]:
            names = names_in(target["expr"])
            assert names or "ALERTS" in target["expr"] or "up{" in target["expr"]
            assert names <= series_names() | RECORDED


def test_every_metric_is_on_a_dashboard():
    text = "".join(path.read_text() for path in DASHBOARDS)
    missing = [name for name in METRICS if f"nepa_{name}" not in text]
    # Found on others under these names, or too many to look at.
    assert set(missing) <= {
        "embedding_effective_rank_initial",
        "nonfinite_steps_total",
        "knn_step",
        "knn_seconds",
        "knn_failures_total",
        "knn_skipped_total",
    }


def test_the_files_are_what_build_writes(tmp_path):
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is in the dev extra")
    from grafana_foundation_sdk.models.dashboard import Dashboard

    from monitoring import build

    build.main(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in DASHBOARDS]
    for path in DASHBOARDS:
        content = json.loads(path.read_text())
        assert content == json.loads((tmp_path / path.name).read_text()), "run make dashboards"
        # The SDK drops what Grafana's schema does not know.
        again = json.loads(json.dumps(Dashboard.from_json(content), default=lambda value: value.to_json()))
        assert keys(content) <= keys(again)


def test_the_page_of_all_metrics_is_what_the_registry_says():
    assert (ROOT / "docs/metrics.md").read_text() == reference.page(), "run make dashboards"
    assert reference.page().count("\n| `nepa_") == len(METRICS)


def keys(value, prefix=""):
    if isinstance(value, dict):
        return {f"{prefix}.{key}" for key in value} | {k for key, item in value.items() for k in keys(item, f"{prefix}.{key}")}
    return {k for item in value for k in keys(item, prefix)} if isinstance(value, list) else set()


@needs_promtool
def test_promtool_accepts_the_rules():
    import subprocess

    result = subprocess.run(["promtool", "check", "rules", str(MONITORING / "alerts.yml")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_images_are_pinned():
    compose = yaml.safe_load((MONITORING / "docker-compose.yml").read_text())
    for service in compose["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (MONITORING / source).exists(), source
