"""Every metric is declared once, with a name that Prometheus accepts, and is found by its key."""

import re
import urllib.request

import pytest

from nepa_dist.metrics.exporter import PrometheusExporter
from nepa_dist.metrics.metric import NUMBERED
from nepa_dist.metrics.registry import METRICS, SINKS, lookup, prometheus_name

COLLAPSE = ("embedding_mean_cosine", "embedding_std_ratio", "embedding_effective_rank")
KEYS_OF_THE_LOOP = [
    *("step", "epoch", "samples_seen", "eta_seconds", "start_timestamp_seconds", "restarts_total"),
    *("loss", "anti_collapse_loss", "grad_norm", "lr", "applied", "skipped_steps_total"),
    *("images_per_second", "step_seconds", "data_wait_seconds", "memory_bytes"),
    *("bad_samples_total", "checkpoint_seconds", "checkpoint_failures_total", "sink_failures_total.jsonl"),
    *(f"{family}.{tensor}" for family in COLLAPSE for tensor in ("target", "pred")),
    *("prediction_cosine", "prediction_skill_const", "prediction_skill_copy"),
]


@pytest.mark.parametrize("key", KEYS_OF_THE_LOOP)
def test_lookup_finds_every_key(key):
    metric, label_value = lookup(key)
    assert key == (metric.name if label_value is None else f"{metric.name}.{label_value}")


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_declarations_follow_the_prometheus_conventions(metric):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert prometheus_name(metric) == f"nepa_{metric.name}"
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    base = metric.name.removesuffix("_total")
    assert (metric.unit == "seconds") == base.endswith("_seconds")
    assert (metric.unit == "bytes") == base.endswith("_bytes")
    assert (metric.kind == "histogram") == bool(metric.buckets)
    assert metric.help.endswith(".")
    assert (metric.label in (None, *NUMBERED)) == (not metric.label_values)
    assert (metric.label if metric.label in NUMBERED else None) == (metric.ranks if metric.ranks in NUMBERED else None)
    assert METRICS[metric.name] is metric


def test_no_metric_is_declared_twice():
    import nepa_dist.metrics.registry as registry

    names = [metric.name for metric in registry._TABLE]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("los", "loss"),
        ("grad_norms", "grad_norm"),
        ("embedding_mean_cosine", "embedding_mean_cosine."),
        ("embedding_mean_cosine.targets", "embedding_mean_cosine.target"),
        ("loss.target", "loss"),
        ("loss.", "loss"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(key, nearest):
    with pytest.raises(KeyError) as caught:
        lookup(key)
    assert repr(key) in caught.value.args[0]
    assert f"did you mean '{nearest}" in caught.value.args[0]


def test_a_rank_is_any_number():
    assert lookup("straggler_score.511") == (METRICS["straggler_score"], "511")
    for key in ("straggler_score.a", "straggler_score", "straggler_score.-1"):
        with pytest.raises(KeyError):
            lookup(key)


def test_there_are_enough_families_and_few_series(monkeypatch):
    """All endpoints of a run on 64 nodes with 8 GPUs each, when everything that is declared has a value."""
    assert len(METRICS) >= 60
    monkeypatch.setattr("nepa_dist.metrics.exporter.OWN_SECONDS", 0.0)
    values = {key: 1.0 for metric in METRICS.values() if metric.kind != "histogram" for key in metric.keys}
    values |= {f"{metric.name}.{rank}": 1.0 for metric in METRICS.values() if metric.label == "rank" for rank in range(512)}
    of_node = {f"{metric.name}.0": 1.0 for metric in METRICS.values() if metric.label == "node"}
    main = PrometheusExporter("127.0.0.1", 0, {"git": "abc"}, run="big", build={"torch": "2"})
    other = PrometheusExporter("127.0.0.1", 0, None, run="big")
    try:
        main.write(1, {**values, **of_node})
        main.beat(2, step_duration_seconds=1.0)
        main.observe("checkpoint_duration_seconds", 1.0)
        other.show(of_node)
        series = [num_series(exporter) for exporter in (main, other)]
    finally:
        main.close()
        other.close()
    assert series[0] > 512 * sum(metric.label == "rank" for metric in METRICS.values())
    assert series[0] + 63 * series[1] <= 5000


def num_series(exporter):
    """Of a scrape after the first, which has the endpoint's own histogram too."""
    for _ in range(100):
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        if "nepa_scrape_seconds_count" in text:
            return sum(not line.startswith("#") for line in text.splitlines())
    raise AssertionError("no histogram")


def test_every_sink_has_a_failure_counter():
    for sink in SINKS:
        assert lookup(f"sink_failures_total.{sink}")[1] == sink
