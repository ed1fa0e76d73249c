"""A real Prometheus for tests: Debian's package, on a free port of the loopback address, in a folder of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from jobs.cluster import free_port

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "monitoring"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here: apt-get install prometheus")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no server here: apt-get install prometheus")


class Prometheus:
    """Runs with the project's own configuration, but for shorter intervals unless ``seconds`` is 15."""

    def __init__(self, folder: Path, targets: Path, seconds: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = (MONITORING / "prometheus.yml").read_text()
        for old, new in (("15s", f"{seconds}s"), ("refresh_interval: 10s", "refresh_interval: 1s")):
            assert old in text
            text = text.replace(old, new)
        (folder / "prometheus.yml").write_text(text)
        shutil.copy(MONITORING / "alerts.yml", folder)
        (folder / "targets").symlink_to(targets)
        subprocess.run(["promtool", "check", "config", str(folder / "prometheus.yml")], check=True, capture_output=True)
        self.url = f"http://127.0.0.1:{free_port()}"
        arguments = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        arguments += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=error"]
        self._process = subprocess.Popen(["prometheus", *arguments])
        self.wait_for(lambda: self.get("/-/ready") is not None, 30, "the server")

    def get(self, path: str, **parameters: str) -> bytes | None:
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        try:
            with urllib.request.urlopen(f"{self.url}{path}{query}", timeout=10) as response:
                return bytes(response.read())
        except OSError:
            return None

    def query(self, expression: str) -> list[dict]:
        """Samples of an instant query; fails if Prometheus refuses it."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return list(json.load(response)["data"]["result"])

    def value(self, expression: str) -> float | None:
        """Value of the only sample; None without one."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    @staticmethod
    def wait_for(condition, seconds: float, what: str) -> float:
        """Poll; returns the seconds that it took."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < seconds, f"{what}: not within {seconds} s"
            time.sleep(0.2)
        return time.monotonic() - start

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
