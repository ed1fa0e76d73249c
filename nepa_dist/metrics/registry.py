"""Every number of a run, once: its name, type, unit, meaning and how ranks are combined. Imports no torch.

Log lines, the Prometheus endpoint, the plots, the dashboards and the alerts all take their names from :data:`METRICS`. A
metric's key is its name; a family with a label has one key per label value, ``family.value`` (such as
``embedding_mean_cosine.target``). To add a metric, add one line to the table.

Names follow the Prometheus conventions: base units (seconds, bytes, ratios in [0, 1]) in the name, counters end in ``_total``.
Facts about a job (its number, commit, versions) are labels of ``run_info`` and ``build_info`` alone; a label ``rank`` is only
where the rank is the question.
"""

from __future__ import annotations

import difflib
from typing import Any

from nepa_dist.metrics.metric import NUMBERED, Kind, Metric

TENSORS = ("target", "pred", "pooled")
"""Which embeddings a collapse metric describes: the targets, the predictions of them, or the mean prediction of each image."""
SINKS = ("jsonl", "console", "log", "prometheus", "tensorboard", "wandb")
"""Names of all places that metrics are written to."""
GROUPS = ("embed", "attn", "mlp", "norm", "head")
"""Parts of the parameters; norm holds LayerScale too."""
DEPTHS = ("first", "middle", "last")
"""Blocks that are looked into."""
PHASES = (
    *("data_wait", "host_to_device", "forward", "backward", "communication", "optimizer"),
    *("checkpoint_stall", "evaluation", "other"),
)
"""Where time goes; together the time since the start. communication is what the backward pass does not hide."""
REFUSALS = ("method", "token", "path")
"""Why the endpoint does not serve a request."""
STEP_BUCKETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 60.0)
SAVE_BUCKETS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0)
SCRAPE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0)


def _gauge(name: str, unit: str, help: str, *label: Any, **options: Any) -> Metric:
    return Metric(name, "gauge", unit, help, *label, **options)


def _counter(name: str, unit: str, help: str, *label: Any, **options: Any) -> Metric:
    return Metric(name, "counter", unit, help, *label, **options)


def _collapse(name: str, unit: str, help: str, *, tensors: tuple[str, ...] = TENSORS, when: str = "pretraining") -> Metric:
    return Metric(name, "gauge", unit, help, "tensor", tensors, when=when)


def _rank(name: str, kind: Kind, unit: str, help: str) -> Metric:
    return Metric(name, kind, unit, help, "rank", ranks="rank", when="more than one rank")


def _node(name: str, kind: Kind, unit: str, help: str) -> Metric:
    return Metric(name, kind, unit, help, "node", ranks="node", when="more than one node")


_CUDA = "on a GPU"
_FINE = "fine-tuning"
_SEGMENT = "segmentation"
_KNN = "metrics.knn_every"
_VALIDATED = "fine-tuning and segmentation"

_TABLE = (
    # Progress
    Metric("run_info", "info", "", "1; its labels describe this start of the run: job, commit, engine, precision."),
    Metric("build_info", "info", "", "1; its labels are the versions of this program and of what it runs on."),
    _gauge("step", "steps", "Optimizer steps done; goes back when a run resumes from an earlier checkpoint."),
    _gauge("planned_steps", "steps", "The last step of the run."),
    _gauge("epoch", "ratio", "Passes over the training data: samples_seen / number of training images."),
    _gauge("samples_seen", "images", "Images drawn since the start of training; goes back like step."),
    _counter("steps_total", "steps", "Optimizer steps that this process has done, also those that a resume repeats."),
    _counter("samples_total", "images", "Images that this process's steps have drawn, over all ranks."),
    _counter("tokens_total", "tokens", "Tokens that passed through the blocks in this process's steps, over all ranks."),
    _gauge("eta_seconds", "seconds", "Estimated time to the last step: steps left x recent time per step."),
    _gauge("start_timestamp_seconds", "seconds", "Unix time at which this process started to train.", ranks="main"),
    _gauge("first_start_timestamp_seconds", "seconds", "Unix time at which the run was started for the first time."),
    _gauge("last_step_timestamp_seconds", "seconds", "Unix time at which the newest step was over.", ranks="main"),
    _counter("restarts_total", "", "Times that the run was continued after its first start."),
    _counter("preemptions_total", "", "Times that a signal stopped the run, which saved and ended."),
    _counter("lost_steps_total", "steps", "Logged steps that were done again because they came after a checkpoint."),
    _counter("productive_seconds_total", "seconds", "Time of the steps that count: lost ones and waits for disks do not."),
    _gauge("goodput_ratio", "ratio", "productive_seconds_total / time since the first start, restarts included."),
    # Optimisation
    _gauge("loss", "", "Training loss of the step, mean over the global batch, with the weighted regulariser.", ranks="mean"),
    _gauge("loss_max", "", "Training loss of the rank where it is highest.", ranks="max"),
    _gauge("loss_ema", "", "Moving average of the loss over the steps, weight 0.02 on the newest."),
    _gauge(
        "anti_collapse_loss",
        "",
        "The regulariser on the targets (SIGReg or VICReg) before its weight.",
        ranks="mean",
        when="objective.anti_collapse",
    ),
    _gauge("grad_norm", "", "L2 norm of the gradient of all parameters, before clipping."),
    _gauge("grad_clipped_ratio", "ratio", "Share of the steps of the log interval whose gradient was clipped."),
    _gauge("group_grad_norm", "", "L2 norm of the gradient of a part of the parameters, before clipping.", "group", GROUPS),
    _gauge("param_norm", "", "L2 norm of all parameters that learn."),
    _gauge("update_ratio", "ratio", "L2 norm of a step's change of the parameters / L2 norm of the parameters."),
    _gauge(
        "spike_ratio",
        "ratio",
        "Share of the last 128 steps more than 6 deviations above their mean.",
        "signal",
        ("loss", "grad"),
    ),
    _gauge("attention_logit_max", "", "Largest |q k| / sqrt(head width) in a block, over some images.", "block", DEPTHS, "max"),
    _gauge("layer_scale_abs_mean", "", "Mean |gamma| of a block's two LayerScales.", "block", DEPTHS, when="model.layer_scale"),
    _gauge("lr", "", "Learning rate of the step."),
    _gauge("weight_decay", "", "Weight decay of the parameters that decay."),
    _gauge("ema_decay", "ratio", "Decay per step of the averaged weights.", when="optim.ema_decay"),
    _gauge("applied", "", "1 if the optimizer applied the step, 0 if the step was skipped."),
    _counter("skipped_steps_total", "steps", "Steps not applied because their gradient was not finite."),
    _counter("nonfinite_steps_total", "steps", "Steps whose loss or gradient was not finite.", "reason", ("loss", "gradient")),
    _gauge("data_digest", "", "Digest of the step's ids, crops and flips: equal in runs that saw the same data.", ranks="sum"),
    _gauge("aux_loss", "", "Loss of segmentation's auxiliary head, before its weight.", ranks="mean", when=_SEGMENT),
    # Validation, of the averaged weights where there are any
    _gauge("eval_loss", "", "Mean cross-entropy over the validation split.", when=_FINE),
    _gauge("top1", "ratio", "Share of validation images whose class is the first guess.", when=_FINE),
    _gauge("top5", "ratio", "Share of validation images whose class is among the first five guesses.", when=_FINE),
    _gauge("miou", "ratio", "Mean over the classes of intersection over union, on the validation split.", when=_SEGMENT),
    _gauge("macc", "ratio", "Mean over the classes of the share of annotated pixels that are predicted right.", when=_SEGMENT),
    _gauge("aacc", "ratio", "Share of annotated pixels that are predicted right.", when=_SEGMENT),
    _gauge(
        "best_score", "ratio", "Best top1 or miou of the run so far; these weights are in its folder best.", when=_VALIDATED
    ),
    _gauge("eval_seconds", "seconds", "Time that the newest validation took.", ranks="main", when=_VALIDATED),
    _gauge(
        "knn_top1",
        "ratio",
        "k-NN accuracy of the middle block on a few validation images, beside pretraining.",
        ranks="main",
        when=_KNN,
    ),
    _gauge("knn_step", "steps", "Step of the weights that knn_top1 is of: it is measured while training goes on.", when=_KNN),
    _gauge("knn_seconds", "seconds", "Time that the newest k-NN measurement took, beside training.", when=_KNN),
    _counter("knn_failures_total", "", "k-NN measurements that failed; training went on.", when=_KNN),
    _counter("knn_skipped_total", "", "k-NN measurements left out, since the one before was still running.", when=_KNN),
    # Speed and memory
    _gauge("images_per_second", "images/second", "Images of all ranks per second, over the log interval."),
    _gauge("tokens_per_second", "tokens/second", "Tokens through the blocks of all ranks per second, over the log interval."),
    _gauge("step_seconds", "seconds", "Wall time per step, mean over the log interval.", ranks="main"),
    _gauge("step_expected_seconds", "seconds", "Median wall time of the last 100 steps.", ranks="main"),
    Metric("step_duration_seconds", "histogram", "seconds", "Wall time of each step.", ranks="main", buckets=STEP_BUCKETS),
    _gauge(
        "data_wait_seconds", "seconds", "Time per step that the host waited for a batch, over the log interval.", ranks="main"
    ),
    _counter(
        "time_seconds_total",
        "seconds",
        "Where this process's time went; the phases add up to all of it.",
        "phase",
        PHASES,
        "main",
    ),
    _gauge("mfu", "ratio", "Model FLOPs utilisation: model operations per second / peak of the devices.", when="peak known"),
    _gauge("peak_flops_per_second", "FLOP/s", "Peak of one device that mfu assumes.", when="peak known"),
    _counter("model_flops_total", "FLOP", "Operations of this process's steps by formula, forward and backward, all ranks."),
    _gauge("memory_bytes", "bytes", "Peak memory allocated on the accelerator; on a CPU, the resident set.", ranks="max"),
    _gauge("memory_reserved_bytes", "bytes", "Memory that the allocator holds on the accelerator.", ranks="main", when=_CUDA),
    _gauge("memory_capacity_bytes", "bytes", "Memory of the accelerator.", ranks="main", when=_CUDA),
    _counter("allocation_retries_total", "", "Allocations that had to free cached memory first.", ranks="main", when=_CUDA),
    _gauge("host_memory_bytes", "bytes", "Peak resident set of this process, without its workers.", ranks="main"),
    _rank("rank_compute_seconds_total", "counter", "seconds", "Time of a rank in its forward passes and copies to the device."),
    _rank("rank_data_wait_seconds_total", "counter", "seconds", "Time that a rank stood still for data."),
    _rank("rank_memory_bytes", "gauge", "bytes", "Like memory_bytes, of each rank."),
    _rank("rank_heartbeat_timestamp_seconds", "gauge", "seconds", "Unix time of a rank's newest report, by its own clock."),
    _rank(
        "straggler_score",
        "gauge",
        "ratio",
        "Median over ranks of own time (compute and data) / this rank's, at most 1: 0.5 is half as fast.",
    ),
    _node("node_step", "gauge", "steps", "Optimizer steps that the first rank of a node has seen done."),
    _node("node_heartbeat_timestamp_seconds", "gauge", "seconds", "Unix time of the newest of them, by the node's clock."),
    _node("node_data_wait_seconds_total", "counter", "seconds", "Time that the rank of a node that waits most stood still."),
    _node("node_memory_bytes", "gauge", "bytes", "Like memory_bytes, of the node's rank that has most."),
    _node("node_host_memory_available_bytes", "gauge", "bytes", "Memory of a node that processes can still take."),
    # Data, disks and checkpoints
    _counter("bad_samples_total", "images", "Different images that could not be read and were replaced.", ranks="sum"),
    _gauge("checkpoint_seconds", "seconds", "Time that writing the newest checkpoint took, beside training.", ranks="main"),
    Metric(
        "checkpoint_duration_seconds",
        "histogram",
        "seconds",
        "Time that writing each checkpoint took.",
        ranks="main",
        buckets=SAVE_BUCKETS,
    ),
    _gauge("checkpoint_stall_seconds", "seconds", "Time that the loop stood still for the newest checkpoint.", ranks="main"),
    _gauge("checkpoint_bytes", "bytes", "Size of the newest checkpoint.", ranks="main"),
    _gauge("checkpoint_step", "steps", "Step of the newest checkpoint on disk.", ranks="main"),
    _gauge("checkpoint_last_success_timestamp_seconds", "seconds", "Unix time at which it was written.", ranks="main"),
    _gauge("checkpoint_interval_seconds", "seconds", "Time between checkpoints: checkpoint.every x median step.", ranks="main"),
    _counter("checkpoints_total", "", "Checkpoints that this process has written and committed.", ranks="main"),
    _counter("checkpoint_failures_total", "", "Checkpoints that could not be written."),
    _gauge("storage_free_bytes", "bytes", "Free space for this user.", "mount", ("run", "data"), "main"),
    _gauge("storage_size_bytes", "bytes", "Size of the file system.", "mount", ("run", "data"), "main"),
    _gauge(
        "storage_free_inodes",
        "files",
        "Files that can still be made; absent where there is no limit.",
        "mount",
        ("run", "data"),
        "main",
    ),
    # Of the metrics themselves
    _counter("sink_failures_total", "", "Failed calls to this sink of the metrics.", "sink", SINKS, "main"),
    Metric("scrape_seconds", "histogram", "seconds", "Time to answer a scrape.", ranks="main", buckets=SCRAPE_BUCKETS),
    _counter("scrapes_refused_total", "", "Requests that the endpoint did not serve.", "reason", REFUSALS, "main"),
    # Collapse, with n the embeddings of the global batch: see nepa_dist/metrics/collapse.py
    _collapse(
        "embedding_mean_cosine",
        "ratio",
        "Mean cosine over all pairs of embeddings, (n |mean unit vector|^2 - 1) / (n - 1): about 0 if diverse, 1 if constant.",
    ),
    _collapse(
        "embedding_std_ratio",
        "ratio",
        "Standard deviation of unit vectors, mean over dimensions, x sqrt(width) (arXiv 2011.10566): 1 isotropic, 0 constant.",
    ),
    _collapse(
        "embedding_effective_rank",
        "",
        "exp(entropy) of the shares of the singular values of centred embeddings (Roy & Vetterli 2007), from 1 to the width.",
    ),
    _collapse("embedding_effective_rank_initial", "", "embedding_effective_rank of the run's first step."),
    _collapse("embedding_rankme", "", "The same of embeddings that are not centred (arXiv 2210.02885)."),
    _collapse("embedding_rms", "", "Root mean square of the entries of embeddings."),
    _collapse(
        "embedding_uniformity",
        "",
        "log mean exp(-2 |difference|^2) over pairs of unit vectors (arXiv 2005.10242): -4 spread, 0 constant.",
    ),
    _collapse("embedding_sigreg", "", "Distance of random projections from a standard Gaussian (arXiv 2511.08544): 0 none."),
    _gauge("prediction_cosine", "ratio", "Mean cosine of prediction and target.", when="pretraining"),
    _gauge(
        "prediction_skill_const",
        "ratio",
        "(c - b) / (1 - b), c the prediction's cosine, b the best constant's.",
        when="pretraining",
    ),
    _gauge(
        "prediction_skill_copy",
        "ratio",
        "(c - b) / (1 - b), c the prediction's cosine, b the current embedding's.",
        when="pretraining",
    ),
    _gauge(
        "prediction_variance_ratio", "ratio", "Variance of unit predictions / variance of unit targets.", when="pretraining"
    ),
    _gauge(
        "cross_image_cosine",
        "ratio",
        "Mean cosine of a prediction and another image's target at its place.",
        when="pretraining",
    ),
    _gauge(
        "future_leak_ratio",
        "ratio",
        "Largest change of earlier predictions when later patches change / largest one.",
        ranks="max",
        when="pretraining",
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
    if metric is not None and (key in metric.keys or (metric.label in NUMBERED and value.isdecimal())):
        return metric, value if dot else None
    known = [known_key for metric in METRICS.values() for known_key in metric.keys]
    match = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(name, known, n=1)
    nearest = f"; did you mean {match[0]!r}?" if match else ""
    raise KeyError(f"unknown metric {key!r}{nearest} (metrics are declared in nepa_dist/metrics/registry.py)")


def prometheus_name(metric: Metric) -> str:
    """The metric's name at the Prometheus endpoint: its own with the prefix ``nepa_``."""
    return f"nepa_{metric.name}"
