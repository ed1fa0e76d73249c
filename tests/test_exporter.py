"""The endpoint serves what Prometheus expects, does not slow a step, and leaves nothing behind."""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nepa_dist.metrics.exporter import MAX_CONNECTIONS, PrometheusExporter


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


def request(exporter, path="/metrics", **headers):
    with urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{exporter.port}{path}", headers=headers), timeout=10
    ) as answer:
        return answer.status, answer.read().decode()


def status(exporter, path="/metrics", method="GET", **headers):
    asked = urllib.request.Request(f"http://127.0.0.1:{exporter.port}{path}", headers=headers, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_but_reading_the_metrics_is_answered_and_refusals_are_counted(exporter):
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert status(exporter, method=method) == 405
    assert status(exporter, path="/etc/passwd") == 404
    text = request(exporter)[1]
    assert 'nepa_scrapes_refused_total{reason="method"} 5.0' in text
    assert 'nepa_scrapes_refused_total{reason="path"} 1.0' in text


def test_with_a_token_nobody_reads_without_it():
    exporter = PrometheusExporter("127.0.0.1", 0, {}, run="r", token="s3cret")
    try:
        assert status(exporter) == 401
        assert status(exporter, Authorization="Bearer wrong") == 401
        assert status(exporter, Authorization="Bearer s3cret") == 200
        text = request(exporter, Authorization="Bearer s3cret")[1]
        assert 'nepa_scrapes_refused_total{reason="token",run="r"} 2.0' in text.replace(
            'run="r",reason="token"', 'reason="token",run="r"'
        )
        assert "s3cret" not in text
    finally:
        exporter.close()


def test_over_tls(tmp_path):
    import ssl

    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    exporter = PrometheusExporter("127.0.0.1", 0, {}, tls=(str(cert), str(key)))
    try:
        context = ssl.create_default_context(cafile=str(cert))
        with socket.create_connection(("127.0.0.1", exporter.port)):  # says nothing, and shakes no hand
            url = f"https://127.0.0.1:{exporter.port}/metrics"
            with urllib.request.urlopen(url, context=context, timeout=10) as answer:
                assert b"nepa_run_info" in answer.read()
        with pytest.raises(OSError):  # noqa: PT011 - reset or a bad answer, by platform
            request(exporter)
    finally:
        exporter.close()


def test_a_certificate_that_cannot_be_read_is_an_error():
    with pytest.raises(OSError):  # noqa: PT011 - whatever the file system says
        PrometheusExporter("127.0.0.1", 0, {}, tls=("/nonexistent/cert.pem", None))


def test_clients_that_never_finish_harm_nobody_and_are_bounded(exporter):
    exporter.write(1, {"loss": 1.0})
    slow = [socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(MAX_CONNECTIONS - 1)]
    try:
        for connection in slow:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow:")
        assert status(exporter) == 200
        slow.append(socket.create_connection(("127.0.0.1", exporter.port)))
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:  # the last place is taken now; one more is turned away
            try:
                request(exporter)
            except (OSError, http.client.HTTPException):
                break
        else:
            raise AssertionError("there is no bound")
        before = threading.active_count()
        exporter.write(2, {"loss": 2.0})  # a step does not care
        assert threading.active_count() <= before
    finally:
        for connection in slow:
            connection.close()
    deadline = time.monotonic() + 20
    while True:  # places become free when clients go
        try:
            assert "nepa_loss 2.0" in request(exporter)[1]
            break
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline


def test_many_scrapers_at_a_time_are_all_answered(exporter):
    values = {f"straggler_score.{rank}": 1.0 for rank in range(512)} | {"loss": 1.0}
    answers = []

    def scrape_often():
        for _ in range(10):
            answers.append(request(exporter)[1].count("nepa_straggler_score{"))

    exporter.write(1, values)
    threads = [threading.Thread(target=scrape_often) for _ in range(20)]
    for thread in threads:
        thread.start()
    for step in range(2, 30):
        exporter.write(step, values)
    for thread in threads:
        thread.join(60)
    assert answers == [512] * 200


def test_it_answers_while_the_trainer_hangs():
    """The trainer waits for ever in a native call that lets other threads run, as a collective does."""
    code = (
        "import socket, sys; from nepa_dist.metrics.exporter import PrometheusExporter as E;"
        "e = E('127.0.0.1', 0, {}); e.write(7, {'loss': 1.0}); print(e.port, flush=True);"
        "a, b = socket.socketpair(); a.recv(1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert "nepa_step 7.0" in answer.read().decode()
    finally:
        process.kill()
        process.wait()


def test_steps_fill_a_histogram(exporter):
    for step, seconds in enumerate([0.01, 0.3, 0.3, 100.0], 1):
        exporter.beat(step, step_duration_seconds=seconds)
    _, samples = scrape(exporter)
    assert samples["nepa_step_duration_seconds_bucket", ("0.05",)] == 1
    assert samples["nepa_step_duration_seconds_bucket", ("0.35",)] == 3
    assert samples["nepa_step_duration_seconds_bucket", ("60.0",)] == 3
    assert samples["nepa_step_duration_seconds_bucket", ("+Inf",)] == samples["nepa_step_duration_seconds_count", ()] == 4
    assert samples["nepa_step_duration_seconds_sum", ()] == pytest.approx(100.61)
    assert samples["nepa_step", ()] == 4


def test_every_series_carries_the_run():
    exporter = PrometheusExporter("127.0.0.1", 0, {"git": "abc"}, run="big", build={"torch": "2"})
    try:
        exporter.write(3, {"loss": 1.0, "embedding_rms.target": 2.0})
        families, _ = scrape(exporter)
        assert all(sample.labels["run"] == "big" for family in families.values() for sample in family.samples)
    finally:
        exporter.close()
