"""A real run of two ranks, watched by a real Prometheus through discovery: killed, restarted, every dashboard's query."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from monitoring.build import queries
from monitoring.pages import DASHBOARDS
from nepa_dist.metrics.discovery import FOLDER
from nepa_dist.metrics.registry import METRICS, prometheus_name
from prometheus_server import ROOT, Prometheus, needs_prometheus

pytestmark = needs_prometheus
SETTINGS = [
    *("model.image_size=32", "model.patch_size=8", "model.embed_dim=32", "model.depth=3", "model.num_heads=2"),
    *("global_batch_size=8", "micro_batch_size=2", "steps=100000", "checkpoint.every=30", "optim.ema_decay=0.9"),
    *("metrics.every=2", "metrics.collapse_every=10", "metrics.audit_every=20", "metrics.peak_tflops=1"),
    *("data.num_workers=0", "engine.precision=fp32", "engine.device=cpu", "objective.anti_collapse=sigreg"),
]
ABSENT = {"on a GPU", "fine-tuning", "segmentation", "fine-tuning and segmentation", "more than one node"}
"""Conditions that this run does not meet."""


class LiveRun:
    def __init__(self, run_root):
        self.run_dir = run_root / "live"
        self.process = None

    def start(self):
        sets = [part for setting in SETTINGS for part in ("--set", setting)]
        script = [sys.executable, str(ROOT / "jobs/submit.py"), "pretrain", "vit_tiny", "--cluster", "local"]
        script += ["--data", "digits", "--run-dir", str(self.run_dir), "--gpus-per-node", "2", *sets]
        self.process = subprocess.Popen(
            script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip

    @property
    def target_file(self):
        return self.run_dir.parent / FOLDER / "live.json"

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / FOLDER).mkdir()
    live = LiveRun(root)
    live.start()
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus") / "state", root / FOLDER)
    try:
        prometheus.wait_for(lambda: (prometheus.value('nepa_step{run="live"}') or 0) >= 40, 150, "step 40")
        yield live, prometheus
    finally:
        if live.process.poll() is None:
            live.kill()
        prometheus.close()


def endpoint(live):
    return json.loads(live.target_file.read_text())[0]["targets"][0]


def exposition(live):
    with urllib.request.urlopen(f"http://{endpoint(live)}/metrics", timeout=10) as response:
        return response.read().decode()


def test_every_metric_of_the_registry_is_really_there(watched):
    live, prometheus = watched
    # It is in the second answer: an endpoint has nothing to tell about scrapes before the first.
    prometheus.wait_for(lambda: "nepa_scrape_seconds_bucket" in exposition(live), 30, "the time of a scrape")
    text = exposition(live)
    for metric in METRICS.values():
        full = prometheus_name(metric) + ("_bucket" if metric.kind == "histogram" else "")
        found = f"\n{full}{{" in text
        if metric.when in ABSENT:
            assert not found, f"{metric.name} is not only for {metric.when}"
        elif not metric.name.startswith("knn"):  # its interval is off by default
            assert found, f"{metric.name} is declared and never produced"
        if found and metric.label_values and metric.name != "storage_free_inodes":
            values = {value for value in metric.label_values if f'{metric.label}="{value}"' in text}
            assert values >= set(metric.label_values) - {"data", "tensorboard", "wandb"}, metric.name
    lint = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    assert text.count('rank="1"') == 5, "few families are by rank"


def test_every_query_of_every_dashboard_gives_curves(watched):
    _, prometheus = watched
    waiting = {}
    for page in DASHBOARDS:
        for panel in (panel for _, row in page.rows for panel in row):
            for expression, _ in queries(panel):
                ready = expression.replace("$run", "live").replace("$__rate_interval", "30s").replace("$__range", "1h")
                found = prometheus.query(ready)  # raises if Prometheus cannot parse or evaluate it
                if not found and not panel.when:
                    waiting[f"{page.uid}, {panel.title}: {ready}"] = ready
                if panel.when in ABSENT:
                    assert not found, f"{panel.title} says that it is only for {panel.when}"
    # A rate needs two scrapes, and a recorded one an evaluation after that.
    deadline = time.monotonic() + 120
    while waiting and time.monotonic() < deadline:
        time.sleep(1)
        waiting = {name: ready for name, ready in waiting.items() if not prometheus.query(ready)}
    assert not waiting, "\n".join(waiting)


def test_no_alert_fires_on_a_healthy_start(watched):
    _, prometheus = watched
    firing = {sample["metric"]["alertname"] for sample in prometheus.query('ALERTS{alertstate="firing"}')}
    # Two ranks on a crowded machine may really be unequal.
    assert firing <= {"NepaStraggler", "NepaDataWait", "NepaLowMfu", "NepaGradientSpike"}


def test_a_run_that_is_killed_and_restarted_stays_one_series(watched):
    live, prometheus = watched
    before, last = endpoint(live), prometheus.value('nepa_step{run="live"}')
    live.kill()
    prometheus.wait_for(lambda: prometheus.value('up{run="live"}') == 0, 30, "the kill")
    assert live.target_file.exists(), "nobody removed the target of a killed run yet"
    live.start()
    prometheus.wait_for(lambda: live.target_file.exists() and endpoint(live) != before, 60, "the new endpoint")
    seconds = prometheus.wait_for(lambda: prometheus.value('up{run="live"}') == 1, 30, "visible again")
    assert seconds <= 30
    prometheus.wait_for(lambda: (prometheus.value('nepa_step{run="live"}') or 0) > last, 120, "steps after the old ones")
    assert prometheus.value('count(up{job="nepa"})') == 1, "no stale target"
    # Through the restart, on another port: one series.
    assert prometheus.value('count(max_over_time(nepa_step{run="live"}[10m]))') == 1
    assert prometheus.value('max_over_time(nepa_restarts_total{run="live"}[5m])') == 1
    assert prometheus.value('nepa_lost_steps_total{run="live"}') > 0
    assert 0 < prometheus.value('nepa_goodput_ratio{run="live"}') < 1


def test_a_run_that_ends_takes_its_target_away_and_stays_selectable(watched):
    live, prometheus = watched
    assert live.stop() == 75
    assert not live.target_file.exists()
    prometheus.wait_for(lambda: not prometheus.query('up{job="nepa"}'), 30, "the target's end")
    assert not prometheus.query('nepa_step{run="live"}')
    found = prometheus.query("max by (run) (max_over_time(nepa_step[1h]))")
    assert [sample["metric"]["run"] for sample in found] == ["live"]
