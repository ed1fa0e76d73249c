"""A run on two nodes (two processes with LOCAL_RANK 0): a real Prometheus sees each, and which one is frozen."""

import json
import os
import signal
import subprocess
import sys

import pytest

from jobs.cluster import free_port
from monitoring.build import queries
from monitoring.pages import DASHBOARDS
from nepa_dist.metrics.discovery import FOLDER
from nepa_dist.metrics.registry import METRICS, prometheus_name
from prometheus_server import ROOT, Prometheus, needs_prometheus

pytestmark = needs_prometheus
NODES = "more than one node"
SETTINGS = {
    "name": "live",
    "data": {"source": "digits", "num_workers": 0},
    "model": {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "global_batch_size": 8,
    "steps": 100000,
    "metrics": {"every": 2},
    "engine": {"precision": "fp32", "device": "cpu"},
    "guard": {"hang_seconds": 1e6},
    "cluster": {"nodes": 2, "gpus_per_node": 1},
}


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / FOLDER).mkdir()
    (root / "live").mkdir()
    (root / "live/config.yaml").write_text(json.dumps({**SETTINGS, "run_root": str(root)}))  # JSON is YAML
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    logs = [open(root / f"rank-{rank}.txt", "w") for rank in range(2)]  # noqa: SIM115
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "jobs.runner", str(root / "live")],
            cwd=ROOT, env={**os.environ, **world, "RANK": str(rank)}, stdout=logs[rank], stderr=logs[rank],
        )
        for rank in range(2)
    ]  # fmt: skip
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus") / "state", root / FOLDER)
    try:
        prometheus.wait_for(lambda: (prometheus.value('nepa_node_step{node="1"}') or 0) >= 4, 120, "the second node's steps")
        yield root, nodes, prometheus
    finally:
        for node in nodes:
            node.kill()
            node.wait()
        for log in logs:
            log.close()
        prometheus.close()


def test_each_node_has_a_port_of_its_own_and_serves_what_it_sees(two_nodes):
    root, _, prometheus = two_nodes
    assert sorted(path.name for path in (root / FOLDER).glob("*.json")) == ["live.json", "live@node-1.json"]
    prometheus.wait_for(lambda: prometheus.value('count(up{run="live"} == 1)') == 2, 30, "both nodes")
    assert prometheus.value('up{instance="live"}') == prometheus.value('up{instance="live/1", node="1"}') == 1
    for metric in METRICS.values():
        found = {sample["metric"].get("instance"): sample for sample in prometheus.query(prometheus_name(metric))}
        if metric.label == "node":
            assert {sample["metric"]["node"] for sample in found.values()} == {"0", "1"}, metric.name
            assert set(found) == {"live", "live/1"}
        elif not metric.name.startswith("scrape") and metric.kind != "histogram":
            assert set(found) <= {"live"}, f"{metric.name} is not told twice"
    assert prometheus.value('count(nepa_rank_memory_bytes{instance="live"})') == 2, "rank 0 has the numbers of all ranks"


def test_the_panels_of_nodes_show_them(two_nodes):
    _, _, prometheus = two_nodes
    for page in DASHBOARDS:
        for panel in (panel for _, row in page.rows for panel in row if panel.when == NODES):
            for expression, _ in queries(panel):
                ready = expression.replace("$run", "live").replace("$__rate_interval", "30s")
                prometheus.wait_for(lambda ready=ready: len(prometheus.query(ready)) == 2, 30, ready)


def test_the_node_that_is_frozen_is_the_one_that_does_not_answer(two_nodes):
    _, nodes, prometheus = two_nodes
    nodes[1].send_signal(signal.SIGSTOP)
    prometheus.wait_for(lambda: prometheus.value('up{instance="live/1"}') == 0, 30, "the frozen node")
    before = prometheus.value('nepa_step{run="live"}')
    assert prometheus.value('up{instance="live"}') == 1, "rank 0 waits for it, and answers"
    alert = 'ALERTS{alertname="NepaTargetDown"}'  # fires when it was pending for 30 s
    prometheus.wait_for(lambda: prometheus.query(alert), 30, "the alert")
    assert [sample["metric"]["instance"] for sample in prometheus.query(alert)] == ["live/1"]
    nodes[1].send_signal(signal.SIGCONT)
    prometheus.wait_for(lambda: (prometheus.value('nepa_step{run="live"}') or 0) > before, 60, "steps again")
    prometheus.wait_for(lambda: not prometheus.query(alert), 30, "the end of the alert")


def test_both_targets_go_when_the_run_ends(two_nodes):
    root, nodes, _ = two_nodes
    nodes[0].send_signal(signal.SIGTERM)
    assert [node.wait(60) for node in nodes] == [75, 75], (root / "rank-0.txt").read_text()
    assert not list((root / FOLDER).glob("*.json"))
