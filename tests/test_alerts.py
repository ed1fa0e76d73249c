"""Each alert fires when what it is for happens, in made-up series and in recorded curves of failing runs, else it is silent.

The curves in ``golden/curves`` are of a vit_tiny of width 64 with 3 blocks, image 32, patch 4, batch 64, on embedded digits,
base_lr 4e-3, fp32, on a CPU: 400 steps, healthy ones with seeds 1 to 3, and the failing ones each with what their name says.
``python tests/test_alerts.py RUN...`` records runs.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nepa_dist.metrics.registry import lookup, prometheus_name
from nepa_dist.metrics.sinks import read_curve
from prometheus_server import MONITORING, needs_promtool

pytestmark = needs_promtool
CURVES = Path(__file__).parent / "golden/curves"
ALERTS = [
    rule["alert"]
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
]
POINTS = 240
"""Of each made-up series, 15 seconds apart: an hour."""
LABELS = 'run="r",instance="r",job="nepa"'


def constant(value):
    return f"{value}x{POINTS}"


def rising(by, start=0):
    return f"{start}+{by}x{POINTS}"


def jump(before, after, at=POINTS // 2):
    return f"{before}x{at} " + (" ".join([after] * (POINTS - at)) if isinstance(after, str) else f"{after}x{POINTS - at}")


HEALTHY = {
    "loss": constant(-0.5),
    **{f"nonfinite_steps_total.{reason}": constant(0) for reason in ("loss", "gradient")},
    "skipped_steps_total": constant(1),
    "spike_ratio.grad": constant(0),
    "grad_norm": constant(1),
    "embedding_mean_cosine.target": constant(0.2),
    "embedding_effective_rank.target": constant(8),
    "embedding_effective_rank_initial.target": constant(11),
    "prediction_skill_const": constant(0.6),
    "attention_logit_max.last": constant(6),
    "future_leak_ratio": constant(0),
    "step": rising(15),
    "planned_steps": constant(100000),
    "last_step_timestamp_seconds": rising(15),
    "step_expected_seconds": constant(1),
    "start_timestamp_seconds": constant(0),
    "first_start_timestamp_seconds": constant(-30000),
    "goodput_ratio": constant(0.96),
    "straggler_score.0": constant(1),
    "straggler_score.1": constant(0.97),
    "time_seconds_total.forward": rising(14),
    "time_seconds_total.data_wait": rising(1),
    "mfu": constant(0.4),
    "allocation_retries_total": constant(0),
    "checkpoint_last_success_timestamp_seconds": rising(15),
    "checkpoint_interval_seconds": constant(100),
    "checkpoint_failures_total": constant(2),
    "checkpoint_bytes": constant(1e9),
    "storage_free_bytes.run": constant(5e11),
    "storage_size_bytes.run": constant(1e12),
    "storage_free_inodes.run": constant(1e6),
    "bad_samples_total": constant(3),
    "sink_failures_total.jsonl": constant(0),
}
SCENARIOS = {
    "healthy": ({}, set()),
    "a loss that is NaN": ({"loss": jump(-0.5, "NaN")}, {"NepaLossNotFinite"}),
    "a loss that is infinite": ({"loss": jump(-0.5, "Inf")}, {"NepaLossNotFinite"}),
    "gradients that are not finite": (
        {"nonfinite_steps_total.gradient": jump(0, 5), "skipped_steps_total": jump(1, 6)},
        {"NepaLossNotFinite", "NepaStepsSkipped"},
    ),
    "a jump of the gradient": ({"grad_norm": jump(1, 30)}, {"NepaGradientSpike"}),
    "many spikes": ({"spike_ratio.grad": jump(0, 0.15)}, {"NepaGradientSpike"}),
    "constant targets": ({"embedding_mean_cosine.target": jump(0.2, 0.9)}, {"NepaCollapseConstant"}),
    "targets in few directions": ({"embedding_effective_rank.target": jump(8, 1.2)}, {"NepaCollapseRank"}),
    "predictions without skill": ({"prediction_skill_const": constant(-0.1), "step": rising(15, 30000)}, {"NepaNoSkill"}),
    "no skill yet, at the start": ({"prediction_skill_const": constant(-0.1)}, set()),
    "large attention logits": ({"attention_logit_max.last": jump(6, 47)}, {"NepaAttentionLogitGrowth"}),
    "a leak": ({"future_leak_ratio": jump(0, 0.5)}, {"NepaFutureLeak"}),
    "a hang": ({"last_step_timestamp_seconds": f"0+15x{POINTS // 2} {15 * POINTS // 2}x{POINTS // 2}"}, {"NepaStalled"}),
    "long steps are no hang": ({"step_expected_seconds": constant(400), "last_step_timestamp_seconds": constant(0)}, set()),
    "many starts": (
        {"start_timestamp_seconds": " ".join(f"{600 * i}x{POINTS // 6}" for i in range(6))},
        {"NepaRestartLoop"},
    ),
    "a slow rank": ({"straggler_score.1": jump(0.97, 0.7)}, {"NepaStraggler"}),
    "data that does not come": (
        {"time_seconds_total.data_wait": rising(8), "time_seconds_total.forward": rising(7)},
        {"NepaDataWait"},
    ),
    "half the speed": ({"mfu": jump(0.4, 0.2)}, {"NepaLowMfu"}),
    "a full GPU": ({"allocation_retries_total": jump(0, 3)}, {"NepaMemoryRetries"}),
    "little goodput": ({"goodput_ratio": constant(0.5)}, {"NepaLowGoodput"}),
    "no checkpoint for long": ({"checkpoint_last_success_timestamp_seconds": constant(60)}, {"NepaCheckpointStale"}),
    "no checkpoint ever": ({"checkpoint_last_success_timestamp_seconds": None}, {"NepaCheckpointStale"}),
    "a checkpoint that failed": ({"checkpoint_failures_total": jump(2, 3)}, {"NepaCheckpointFailed"}),
    "a full disk": ({"storage_free_bytes.run": jump(5e11, 1e10)}, {"NepaDiskLow"}),
    "a disk with room for two checkpoints": ({"checkpoint_bytes": constant(2e11)}, {"NepaDiskLow"}),
    "no inodes": ({"storage_free_inodes.run": jump(1e6, 10)}, {"NepaDiskLow"}),
    "images that cannot be read": ({"bad_samples_total": jump(3, 5)}, {"NepaCorruptSamples"}),
    "a sink that fails": ({"sink_failures_total.jsonl": jump(0, 4)}, {"NepaSinkFailing"}),
}


def series_of(key, values):
    metric, value = lookup(key)
    own = f',{metric.label}="{value}"' if value is not None else ""
    return {"series": f"{prometheus_name(metric)}{{{LABELS}{own}}}", "values": values}


def fired(folder, series, minutes, interval="15s"):
    """The alerts that fire at any time, as promtool evaluates the project's rules: those it finds against what it was told."""
    firing = 'ALERTS{{alertname="{}",alertstate="firing"}}'
    checks = [
        {
            "expr": f"(count(count_over_time({firing.format(name)}[{minutes}m])) > bool 0) or vector(0)",
            "eval_time": f"{minutes}m",
            "exp_samples": [{"labels": "{}", "value": 0}],
        }
        for name in ALERTS
    ]
    test = {"interval": interval, "input_series": series, "promql_expr_test": checks}
    path = folder / "test.yml"
    path.write_text(
        yaml.safe_dump({"rule_files": [str(MONITORING / "alerts.yml")], "evaluation_interval": "30s", "tests": [test]})
    )
    result = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    output = (result.stdout + result.stderr).replace("\\", "")
    assert ("SUCCESS" in output) == (result.returncode == 0)
    found = {name for name in ALERTS if f'alertname="{name}"' in output}
    assert output.count("got: {} 1E+00") == output.count("exp:") == len(found), output
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_happens_is_what_fires(tmp_path, name):
    changes, expected = SCENARIOS[name]
    series = [series_of(key, values) for key, values in {**HEALTHY, **changes}.items() if values is not None]
    series.append({"series": f"up{{{LABELS}}}", "values": constant(1)})
    assert fired(tmp_path, series, 58) == expected


def test_a_killed_run_is_down_and_then_gone(tmp_path):
    """The endpoint stops to answer, then its target is removed."""
    half = POINTS // 2
    series = [series_of(key, f"{values.split('x')[0]}x{half} stale") for key, values in HEALTHY.items()]
    series.append({"series": f"up{{{LABELS}}}", "values": f"1x{half} 0x4 stale"})
    assert fired(tmp_path, series, 58) == {"NepaTargetDown", "NepaRunGone"}


def test_a_finished_run_is_not_missed(tmp_path):
    half = POINTS // 2
    changed = {**HEALTHY, "step": constant(100000)}
    series = [series_of(key, f"{values.split('x')[0]}x{half} stale") for key, values in changed.items()]
    series.append({"series": f"up{{{LABELS}}}", "values": f"1x{half} stale"})
    assert fired(tmp_path, series, 58) == set()


def test_every_alert_has_a_scenario():
    covered = set().union(*(expected for _, expected in SCENARIOS.values()), {"NepaTargetDown", "NepaRunGone"})
    assert covered == set(ALERTS)


RECORDINGS = {
    "healthy_live": set(),
    "data_stall": {"NepaStalled"},
    "slow_data": {"NepaDataWait"},
    "killed_rank": {"NepaRunGone"},
    "killed_node": {"NepaTargetDown", "NepaRunGone"},
}
"""What must fire, and nothing else, on what a real Prometheus saw of real runs (tests/record_alerts.py)."""


def played(values):
    """Values of one series as promtool takes them: one that is gone ends."""
    texts, there = [], False
    for value in values:
        texts.append(repr(value) if value is not None else "stale" if there else "_")
        there = value is not None
    return " ".join(texts)


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_of_runs_that_were_hurt(tmp_path, name):
    recording = json.loads((CURVES.parent / f"alerts/{name}.json").read_text())
    up = recording.pop("up")
    series = [series_of(key, played(values)) for key, values in recording.items()]
    series.append({"series": f"up{{{LABELS}}}", "values": played(up)})
    assert fired(tmp_path, series, len(up) // 4 + 1) == RECORDINGS[name]
    assert 15 * up.count(0.0) < 90, "no target is stale for longer"


RECORDED = {
    "healthy1": set(),
    "healthy2": set(),
    "healthy3": set(),
    "no_stop_grad": {"NepaCollapseConstant"},
    "no_shift": {"NepaCollapseRank"},
    "bidirectional": {"NepaFutureLeak"},
    "high_lr_no_qk_norm": {"NepaAttentionLogitGrowth"},
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs(tmp_path, name):
    curves = json.loads((CURVES / f"{name}.json").read_text())
    length = len(curves["step"])
    series = []
    for key, values in curves.items():
        texts = ("_" if value is None else repr(value) if isinstance(value, (int, float)) else value for value in values)
        series.append(series_of(key, " ".join(texts)))
    # A row is half a minute here, whatever it was on the machine that trained.
    clocks = {"last_step_timestamp_seconds": 30, "start_timestamp_seconds": 0, "checkpoint_last_success_timestamp_seconds": 30}
    series += [series_of(key, f"0+{by}x{length}") for key, by in clocks.items()]
    assert fired(tmp_path, series, length // 2, interval="30s") >= RECORDED[name]
    if not RECORDED[name]:
        assert fired(tmp_path, series, length // 2, interval="30s") == set()


def record(run):
    """The rows of a run as one list per key, rounded; a gauge that is not in a row keeps its last value, as at the endpoint."""
    rows = read_curve(run / "metrics.jsonl")
    keys = sorted({key for row in rows for key in row if not key.endswith("timestamp_seconds") and key != "time"})
    wanted = [key for key in keys if lookup(key)[0].name not in ("time_seconds_total", "data_digest", "goodput_ratio")]
    curves = {}
    for key in wanted:
        last, values = None, []
        for row in rows:
            last = float(f"{row[key]:.5g}") if key in row else last
            values.append(last)
        curves[key] = values
    return curves


if __name__ == "__main__":
    CURVES.mkdir(parents=True, exist_ok=True)
    for folder in map(Path, sys.argv[1:]):
        (CURVES / f"{folder.name}.json").write_text(json.dumps(record(folder), separators=(",", ":")) + "\n")
