"""Every scalar of a run, once: its name, type, unit and meaning. Imports no torch.

Log lines, the Prometheus endpoint, the plots and the dashboards all take their names from :data:`METRICS`. A metric's key is
its name; a family with a label has one key per label value, ``family.value`` (``embedding_mean_cosine.target``). To add a
metric, add one line to the table.

Names follow the Prometheus conventions: base units (seconds, bytes, ratios in [0, 1]) in the name, counters end in ``_total``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

TENSORS = ("target", "pred")
"""Which embeddings a collapse metric describes: the targets, or the predictions of them."""
SINKS = ("jsonl", "console", "log", "prometheus")
"""Names of all places that metrics are written to."""


@dataclass(frozen=True)
class Metric:
    """One scalar, or one family of scalars that differ in a label.

    Args:
        name: key in log lines, without the label value.
        kind: counter (only grows, apart from restarts) or gauge.
        unit: seconds, bytes, steps, images ...; ratio for a share or a cosine; empty if it has none.
        help: what the number is, with its formula or source.
        label: name of the label, or None.
        label_values: all values that the label can take.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    help: str
    label: str | None = None
    label_values: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that this metric has in log lines."""
        return tuple(f"{self.name}.{value}" for value in self.label_values) if self.label else (self.name,)


_TABLE = (
    # Progress
    Metric("step", "gauge", "steps", "Optimizer steps done; goes back when a run resumes from an earlier checkpoint."),
    Metric("epoch", "gauge", "ratio", "Passes over the training data: samples_seen / number of training images."),
    Metric("samples_seen", "gauge", "images", "Images drawn since the start of training; goes back like step."),
    Metric("eta_seconds", "gauge", "seconds", "Estimated time to the last step: steps left x recent time per step."),
    Metric("start_timestamp_seconds", "gauge", "seconds", "Unix time at which this process started to train."),
    Metric("last_step_timestamp_seconds", "gauge", "seconds", "Unix time at which the newest logged step was reported."),
    Metric("restarts_total", "counter", "", "Times that the run was continued after its first start."),
    # Optimisation
    Metric("loss", "gauge", "", "Training loss of the step, mean over the global batch, with the weighted regulariser."),
    Metric("anti_collapse_loss", "gauge", "", "The regulariser on the targets (SIGReg or VICReg) before its weight."),
    Metric("grad_norm", "gauge", "", "L2 norm of the gradient of all parameters, before clipping."),
    Metric("lr", "gauge", "", "Learning rate of the step."),
    Metric("applied", "gauge", "", "1 if the optimizer applied the step, 0 if the step was skipped."),
    Metric("skipped_steps_total", "counter", "steps", "Steps not applied because their gradient was not finite."),
    Metric("data_digest", "gauge", "", "Digest of the step's ids, crops and flips: equal in runs that saw the same data."),
    Metric("aux_loss", "gauge", "", "Loss of segmentation's auxiliary head, before its weight."),
    # Validation, of the averaged weights where there are any
    Metric("eval_loss", "gauge", "", "Mean cross-entropy over the validation split."),
    Metric("top1", "gauge", "ratio", "Share of validation images whose class is the first guess."),
    Metric("top5", "gauge", "ratio", "Share of validation images whose class is among the first five guesses."),
    Metric("miou", "gauge", "ratio", "Mean over the classes of intersection over union, on the validation split."),
    Metric("macc", "gauge", "ratio", "Mean over the classes of the share of annotated pixels that are predicted right."),
    Metric("aacc", "gauge", "ratio", "Share of annotated pixels that are predicted right."),
    Metric("best_score", "gauge", "ratio", "Best top1 or miou of the run so far; these weights are in its folder best."),
    Metric("eval_seconds", "gauge", "seconds", "Time that the newest validation took."),
    Metric("knn_top1", "gauge", "ratio", "k-NN accuracy of the middle block on a few validation images, beside pretraining."),
    Metric("knn_step", "gauge", "steps", "Step of the weights that knn_top1 is of: it is measured while training goes on."),
    Metric("knn_seconds", "gauge", "seconds", "Time that the newest k-NN measurement took, beside training."),
    Metric("knn_failures_total", "counter", "", "k-NN measurements that failed; training went on."),
    # Speed and memory
    Metric("images_per_second", "gauge", "images/second", "Images of all ranks per second, over the log interval."),
    Metric("step_seconds", "gauge", "seconds", "Wall time per step, mean over the log interval."),
    Metric("data_wait_seconds", "gauge", "seconds", "Time per step spent waiting for a batch, mean over the log interval."),
    Metric("memory_bytes", "gauge", "bytes", "Peak memory allocated on the accelerator; on a CPU, the process's resident set."),
    # Health
    Metric("bad_samples_total", "counter", "images", "Different images that could not be read and were replaced."),
    Metric("checkpoint_seconds", "gauge", "seconds", "Time that writing the newest checkpoint took, beside training."),
    Metric("checkpoint_stall_seconds", "gauge", "seconds", "Time that the loop stood still for the newest checkpoint."),
    Metric("checkpoint_failures_total", "counter", "", "Checkpoints that could not be written."),
    Metric("sink_failures_total", "counter", "", "Failed calls to this sink of the metrics.", "sink", SINKS),
    # Collapse, with n the embeddings of the global batch: see nepa_dist/metrics/collapse.py
    Metric(
        "embedding_mean_cosine",
        "gauge",
        "ratio",
        "Mean cosine over all pairs of embeddings, (n |mean unit vector|^2 - 1) / (n - 1): about 0 if diverse, 1 if constant.",
        "tensor",
        TENSORS,
    ),
    Metric(
        "embedding_std_ratio",
        "gauge",
        "ratio",
        "Standard deviation of unit vectors, mean over dimensions, x sqrt(width) (arXiv 2011.10566): 1 isotropic, 0 constant.",
        "tensor",
        TENSORS,
    ),
    Metric(
        "embedding_effective_rank",
        "gauge",
        "",
        "exp(entropy) of the shares of the singular values of centred embeddings (Roy & Vetterli 2007), from 1 to the width.",
        "tensor",
        TENSORS,
    ),
    Metric("prediction_cosine", "gauge", "ratio", "Mean cosine of prediction and target."),
    Metric("prediction_skill_const", "gauge", "ratio", "(c - b) / (1 - b), c the prediction's cosine, b the best constant's."),
    Metric(
        "prediction_skill_copy", "gauge", "ratio", "(c - b) / (1 - b), c the prediction's cosine, b the current embedding's."
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}
"""All metrics by name."""


def lookup(key: str) -> tuple[Metric, str | None]:
    """Find the metric that a key belongs to.

    Args:
        key: ``name``, or ``family.value`` for a metric with a label.

    Returns:
        The metric and the label's value (None without a label).

    Raises:
        KeyError: no metric has this key; the message names the nearest one.
    """
    name, dot, value = key.partition(".")
    metric = METRICS.get(name)
    if metric is not None and key in metric.keys:
        return metric, value if dot else None
    known = [known_key for metric in METRICS.values() for known_key in metric.keys]
    match = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(name, known, n=1)
    nearest = f"; did you mean {match[0]!r}?" if match else ""
    raise KeyError(f"unknown metric {key!r}{nearest} (metrics are declared in nepa_dist/metrics/registry.py)")


def prometheus_name(metric: Metric) -> str:
    """The metric's name at the Prometheus endpoint: its own with the prefix ``nepa_``."""
    return f"nepa_{metric.name}"
