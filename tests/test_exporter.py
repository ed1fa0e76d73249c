"""The endpoint serves what Prometheus expects, does not slow a step, and leaves nothing behind."""

import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nepa_dist.metrics.exporter import PrometheusExporter


@pytest.fixture
def exporter():
    exporter = PrometheusExporter("127.0.0.1", 0, {"name": "vit_s", "git": 'a"b\\c'})
    yield exporter
    exporter.close()


def scrape(exporter, method="GET"):
    request = urllib.request.Request(f"http://127.0.0.1:{exporter.port}/metrics", method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(s.name, tuple(s.labels.values())): s.value for family in families.values() for s in family.samples}
    return families, samples


def test_before_the_first_step_the_run_is_known(exporter):
    families, samples = scrape(exporter)
    assert [name for (name, _), value in samples.items() if value] == ["nepa_run_info"]
    assert families["nepa_run_info"].samples[0].labels == {"name": "vit_s", "git": 'a"b\\c'}


def test_values_have_type_help_and_labels(exporter):
    exporter.write(10, {"loss": -0.75, "embedding_mean_cosine.target": 0.2, "embedding_mean_cosine.pred": 0.3})
    exporter.write(20, {"loss": -0.8, "skipped_steps_total": 3.0, "sink_failures_total.jsonl": 1.0})
    families, samples = scrape(exporter)
    assert samples["nepa_loss", ()] == -0.8
    assert samples["nepa_step", ()] == 20
    assert samples["nepa_last_step_timestamp_seconds", ()] > 1.6e9
    assert samples["nepa_embedding_mean_cosine", ("target",)] == 0.2, "values stay until they are replaced"
    assert samples["nepa_embedding_mean_cosine", ("pred",)] == 0.3
    assert samples["nepa_skipped_steps_total", ()] == 3
    assert samples["nepa_sink_failures_total", ("jsonl",)] == 1
    assert families["nepa_loss"].type == "gauge"
    assert families["nepa_skipped_steps"].type == "counter"
    assert families["nepa_embedding_mean_cosine"].samples[0].labels == {"tensor": "target"}
    assert all(family.documentation for family in families.values())
    assert not any(name.endswith("_created") for name, _ in samples)


def test_non_finite_values_are_served(exporter):
    exporter.write(1, {"loss": float("nan"), "grad_norm": float("inf")})
    _, samples = scrape(exporter)
    assert samples["nepa_loss", ()] != samples["nepa_loss", ()]
    assert samples["nepa_grad_norm", ()] == float("inf")


def test_a_counter_goes_on_after_a_restart(exporter):
    exporter.write(100, {"restarts_total": 2.0})
    _, samples = scrape(exporter)
    assert samples["nepa_restarts_total", ()] == 2


def test_only_reading_is_offered(exporter):
    with pytest.raises(urllib.error.HTTPError) as caught:
        scrape(exporter, method="POST")
    assert caught.value.code == 405


def test_scrapes_see_whole_steps_while_the_run_goes_on(exporter):
    exporter.write(0, {"loss": 0.0, "lr": 0.0})
    stop = threading.Event()

    def train():
        step = 0
        while not stop.is_set():
            step += 1
            exporter.write(step, {"loss": float(step), "lr": float(step)})

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(20):
            _, samples = scrape(exporter)
            assert samples["nepa_loss", ()] == samples["nepa_lr", ()] == samples["nepa_step", ()]
    finally:
        stop.set()
        thread.join()


def test_a_reader_that_says_nothing_blocks_nobody(exporter):
    with socket.create_connection(("127.0.0.1", exporter.port)):
        exporter.write(1, {"loss": 1.0})
        assert scrape(exporter)[1]["nepa_loss", ()] == 1


def test_a_taken_port_is_an_error_that_says_what_to_do(exporter):
    with pytest.raises(OSError, match=rf"127\.0\.0\.1:{exporter.port}.*metrics\.prometheus_port"):
        PrometheusExporter("127.0.0.1", exporter.port, {})


def test_close_frees_the_port():
    first = PrometheusExporter("127.0.0.1", 0, {})
    first.close()
    second = PrometheusExporter("127.0.0.1", first.port, {})
    assert second.port == first.port
    second.close()


def test_a_forked_worker_does_not_keep_the_port(exporter):
    """The trainer may be killed while its workers live on."""
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.read(read, 1)  # until the test is done
        os._exit(0)
    try:
        exporter.close()
        PrometheusExporter("127.0.0.1", exporter.port, {}).close()
    finally:
        os.write(write, b".")
        os.waitpid(worker, 0)


def test_the_room_loads_no_torch():
    code = (
        "import sys, nepa_dist.metrics.meter, nepa_dist.metrics.sinks, nepa_dist.metrics.exporter, nepa_dist.visualize;"
        "print([m for m in ('torch', 'matplotlib', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
