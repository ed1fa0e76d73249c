"""Every metric is declared once, with a name that Prometheus accepts, and is found by its key."""

import re

import pytest

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


def test_there_are_enough_families_and_few_series():
    assert len(METRICS) >= 60
    series = 0
    for metric in METRICS.values():
        per_key = len(metric.buckets) + 3 if metric.kind == "histogram" else 1
        series += 512 if metric.label == "rank" else per_key * max(1, len(metric.label_values))
    assert series <= 5000


def test_every_sink_has_a_failure_counter():
    for sink in SINKS:
        assert lookup(f"sink_failures_total.{sink}")[1] == sink
