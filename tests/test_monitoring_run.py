"""monitoring/run.sh starts Prometheus and Alertmanager, which see a run and its alert, and ends them; compose is valid."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request

import pytest
import yaml

from jobs.cluster import free_port
from nepa_dist.metrics.discovery import LEASE_SECONDS, Target
from nepa_dist.metrics.exporter import PrometheusExporter
from prometheus_server import MONITORING, ROOT, needs_prometheus


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def wait_for(condition, seconds=40):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@needs_prometheus
@pytest.mark.skipif(shutil.which("prometheus-alertmanager") is None, reason="apt-get install prometheus-alertmanager")
def test_the_script_shows_runs_and_passes_alerts_on(tmp_path):
    """As it is, but for intervals of a second."""
    shutil.copytree(MONITORING, tmp_path / "monitoring")
    for name in ("nepa_dist", ".venv"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    config = tmp_path / "monitoring/prometheus.yml"
    config.write_text(config.read_text().replace("15s", "1s").replace("refresh_interval: 10s", "refresh_interval: 1s"))
    runs = tmp_path / "runs"
    exporter = PrometheusExporter("127.0.0.1", 0, {"git": "abc"}, run="big")
    target = Target(runs, "big", f"127.0.0.1:{exporter.port}", {})
    exporter.write(5, {"future_leak_ratio": 0.5})
    dead = runs / "prometheus/dead.json"
    dead.write_text("[]")
    os.utime(dead, (time.time() - LEASE_SECONDS - 60,) * 2)
    ports = [free_port(), free_port()]
    environment = {**os.environ, "PROMETHEUS_PORT": str(ports[0]), "ALERTMANAGER_PORT": str(ports[1])}
    with (tmp_path / "log.txt").open("w") as log:
        script = subprocess.Popen(
            ["bash", str(tmp_path / "monitoring/run.sh"), str(runs)],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{ports[0]}/api/v1/query?query=nepa_future_leak_ratio"
        wait_for(lambda: (get(url) or {"data": {"result": []}})["data"]["result"])
        alerts = wait_for(lambda: get(f"http://127.0.0.1:{ports[1]}/api/v2/alerts"))
        assert [alert["labels"]["alertname"] for alert in alerts] == ["NepaFutureLeak"]
        wait_for(lambda: not dead.exists())
        os.killpg(script.pid, signal.SIGINT)  # as Ctrl-C does
        script.wait(20)
        for port in ports:
            assert get(f"http://127.0.0.1:{port}/-/ready") is None, (tmp_path / "log.txt").read_text()
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
        target.close()
        exporter.close()


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="apt-get install docker-compose")
def test_compose_takes_the_file(tmp_path):
    command = ["docker-compose", "-f", str(MONITORING / "docker-compose.yml"), "config"]
    environment = {**os.environ, "RUN_ROOT": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    assert set(services) == {"prometheus", "alertmanager", "grafana"}
    assert f"{tmp_path}/prometheus:/etc/prometheus/targets:ro" in services["prometheus"]["volumes"]
