"""The configuration of a run: every field with its type, unit, default and source. Imports no torch.

Files and ``--set`` are layered over these defaults in :mod:`nepa_dist.config_load`; what follows from a configuration (steps,
accumulation) is in :mod:`nepa_dist.plan`.

Each field states its unit and where the default comes from. "Paper" is arXiv 2512.16922; "released" is the official code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from nepa_dist.config_base import ConfigError, Decay, Section, nearest
from nepa_dist.config_cluster import ClusterConfig
from nepa_dist.config_data import AugmentConfig, DataConfig
from nepa_dist.config_model import ModelConfig, ObjectiveConfig, other_settings
from nepa_dist.config_task import EvaluateConfig, FinetuneConfig, SegmentConfig

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GuardConfig",
    "InitConfig",
    "MetricsConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Section",
    "SegmentConfig",
    "changed_keys",
    "may_differ",
    "name_problem",
    "nearest",
    "other_settings",
]


class OptimConfig(Section):
    """AdamW, the schedule and the moving average of the weights."""

    base_lr: float = Field(3e-4, ge=0)
    """Peak learning rate per 256 images; the peak in effect is base_lr * global_batch_size / 256 (paper)."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate that the cosine ends at, one step after the last (paper: 0)."""
    warmup_ratio: float = Field(0.025, ge=0, le=1)
    """Share of the steps with linear warm-up from 0 (paper: 40 of 1600 epochs)."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of warm-up given exactly; overrides warmup_ratio."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Paper."""
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    """On parameters with two or more dimensions; biases, norms and LayerScale have none (paper)."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Largest global L2 norm of the gradient (released)."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """After the warm-up: half a cosine (paper), or a polynomial of power 1, a straight line (segmentation)."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each block has this times the learning rate of the block above it; 1 is off. For fine-tuning and segmentation."""
    layer_decay_schedule: Literal["linear", "fixed"] = "linear"
    """linear: the decay rises to 1 over the run (paper, appendix E.4); fixed: it stays (released)."""
    layer_warmup: bool = False
    """A block with factor f warms up in 1 - f of the warm-up steps: none at the top, nearly all at the bottom (released)."""
    head_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the classifier and the last norm, not per 256 images (released: 1e-3); null: as the rest."""
    ema_decay: float | None = Field(0.9999, gt=0, lt=1)
    """Decay per step of the moving average of the weights (paper); null keeps none."""


class EngineConfig(Section):
    """How the model is placed on devices."""

    name: Literal["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = "ddp"
    """ddp: every rank holds everything; fsdp2: weights, gradients and state sharded over all ranks; hsdp: sharded within groups
    of ``shard_size`` ranks, replicated between them; zero1, zero2, zero3: DeepSpeed, which shards the optimizer state, the
    gradients as well, the weights as well."""
    shard_size: int | None = Field(None, gt=0)
    """Ranks that share one copy of the state with hsdp; default: those of a node."""
    reshard_after_forward: bool = True
    """fsdp2, hsdp, zero3: free gathered weights between forward and backward; off saves a gather and costs the memory."""
    precision: Literal["fp32", "bf16_autocast", "bf16_params"] = "bf16_autocast"
    """bf16_autocast (paper): fp32 weights, matrix products in bf16. bf16_params: forward and backward on a bf16 copy of the
    weights, which are kept and updated in fp32."""
    fp8: Literal["off", "tensorwise", "rowwise"] = "off"
    """Round the operands of the blocks' linear layers to 8 bits, with one scale for each tensor, or for each of its rows, which
    is slower and more exact. For wide models on a GPU that has fp8; first see what it does to the loss: docs/performance.md."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of gradients while they are averaged over the ranks; bf16 halves the traffic and loses digits."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What backward computes again instead of keeping it: full, everything within a block; selective, all but the results of
    matrix products and of attention."""
    compile: bool = False
    """torch.compile each block: the first step takes a minute, the others are faster."""
    attention: Literal["auto", "sdpa", "dense", "flash", "efficient", "cudnn", "fa3"] = "auto"
    """Implementation of attention. auto: on a GPU sdpa, on a CPU dense up to 512 tokens. sdpa: torch's own choice. dense: the
    scores are stored. flash, efficient, cudnn: that kernel of torch, or an error. fa3: FlashAttention-3, if it is installed."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What runs between the matrix products of a block. triton: one kernel of this project each way, or an error. torch: its
    operations, as compile fuses them. auto: triton on a GPU, where the model has LayerScale, QK-norm and RoPE and the engine is
    not zero3, else torch."""
    patch_embed: Literal["auto", "conv", "matmul"] = "auto"
    """How patches are embedded: as a convolution, or as a matrix product over inputs padded to a multiple of 64. auto: the
    product on a GPU, the convolution on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """Only deterministic kernels on a GPU, slower; CPUs are deterministic as they are."""
    timeout_seconds: float = Field(600.0, gt=0)
    """A collective that waits longer than this fails."""

    @field_validator("precision", mode="before")
    @classmethod
    def _say_why_not_fp16(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half", "fp16_autocast", "fp16_params"):
            raise ValueError(
                f"{value} is not offered: its range is too small for these gradients without loss scaling, which skips steps "
                "that other precisions take; use bf16_autocast"
            )
        return value


def kernels_obstacle(model: ModelConfig, engine: EngineConfig, device: str) -> str | None:
    """Why blocks cannot run on this project's kernels on a kind of device (cuda, cpu), or None if they can."""
    reasons = [f"model.{name} is off" for name in ("layer_scale", "qk_norm", "rope") if not getattr(model, name)]
    if engine.name == "zero3":
        reasons.append("zero3 has a layer's weights only while that layer runs")
    if device != "cuda":
        reasons.append(f"they need a GPU, not a {device}")
    return ", ".join(reasons) or None


def gpu_kernels(model: ModelConfig, engine: EngineConfig) -> bool:
    """Whether blocks will run on this project's kernels, as far as settings tell: with a GPU, unless they ask for a CPU."""
    return engine.kernels != "torch" and kernels_obstacle(model, engine, "cpu" if engine.device == "cpu" else "cuda") is None


class GuardConfig(Section):
    """When a run that goes wrong must end."""

    max_consecutive_checkpoint_failures: int = Field(3, gt=0)
    """Checkpoints in a row that cannot be written before the run ends with an error; the earlier ones stay."""
    max_consecutive_skips: int = Field(10, gt=0)
    """Steps in a row with a non-finite gradient (each is skipped and counted) before the run ends with an error."""
    hang_seconds: float = Field(60.0, gt=0, le=1e6)
    """A rank that finishes no step for this long, and for hang_factor times its median step, writes the stacks of all its
    threads to logs/ and ends with exit code 75. A million is never."""
    hang_factor: float = Field(10.0, ge=1)
    """Median steps that hang_seconds must also cover."""


class InitConfig(Section):
    """What a new run starts from. Without effect once the run has a checkpoint of its own."""

    path: str | None = Field(None, min_length=1)
    """Folder of another run (its newest checkpoint that verifies), or of one checkpoint. null: random weights."""
    load: Literal["weights", "ema", "weights+ema", "everything"] = "weights"
    """weights: the average starts as a copy; ema: the averaged weights, as weights; weights+ema: both; everything: moments,
    step and counters as well, so that the new run goes on where the other stands."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int = Field(1000, gt=0)
    """Steps between two checkpoints. The last step is always saved."""
    keep_last: int = Field(3, gt=0)
    """Newest checkpoints that are kept."""
    keep_every: int | None = Field(None, gt=0)
    """Checkpoints at multiples of this many steps are kept for good."""
    shard_bytes: int = Field(1 << 30, gt=0)
    """Largest size of one file, bytes (a single larger parameter still gets its own file)."""
    allow: tuple[str, ...] = ()
    """Settings, by dotted key or section, that may differ from those of the checkpoint a run continues from."""


class MetricsConfig(Section):
    """What is measured and where it goes. ``metrics.jsonl`` is always written."""

    every: int = Field(10, gt=0)
    """Steps between two lines."""
    collapse_every: int = Field(50, gt=0)
    """Steps between two readings of the collapse gauges."""
    knn_every: int | None = Field(None, gt=0)
    """Steps between two k-NN probes of the averaged weights during pretraining, beside the loop; null: none."""
    audit_every: int = Field(1000, gt=0)
    """Steps between two readings of the costly gauges: uniformity, SIGReg statistic, future leak."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device that the utilisation (mfu) is a share of, 1e12 operations per second; null: by the GPU's name."""
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that get the logged steps as well: event files in the run's folder tensorboard, Weights & Biases."""
    wandb_project: str = Field("nepa-dist", min_length=1)
    """Where wandb puts the run."""
    prometheus: bool = True
    """Serve the metrics over HTTP: those of the run from rank 0, and of each further node its own."""
    prometheus_address: str = "127.0.0.1"
    """Address the endpoint binds to: the default keeps it on this machine."""
    prometheus_host: str | None = Field(None, min_length=1)
    """Name by which a Prometheus elsewhere reaches the endpoint; null: the address, or the node's name if that is 0.0.0.0."""
    prometheus_port: int = Field(0, ge=0, le=65535)
    """0 takes a free port; run.json and the log name it. A port that is taken is replaced by a free one."""
    prometheus_token_file: str | None = Field(None, min_length=1)
    """File with a bearer token that every scrape must give; null: none is asked for."""
    prometheus_tls_cert: str | None = Field(None, min_length=1)
    """PEM file with the certificate (and chain) to serve HTTPS; null: plain HTTP."""
    prometheus_tls_key: str | None = Field(None, min_length=1)
    """PEM file with its key; null: it is in the certificate's file."""


class Config(Section):
    """One run."""

    task: Literal["pretrain", "finetune", "segment"] = "pretrain"
    name: str = "pretrain"
    """Name of the run; its folder is run_root/name."""
    run_root: str = "runs"
    seed: int = Field(1337, ge=0, lt=2**63)
    """Of weights, order and augmentation (released)."""
    epochs: float = Field(100.0, gt=0, le=1e9)
    """Passes over the data; sets the number of steps unless ``steps`` is given."""
    steps: int | None = Field(None, gt=0)
    """Optimizer updates of the whole run, given exactly."""
    global_batch_size: int = Field(4096, gt=0)
    """Images per optimizer update over all ranks (paper)."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Images per forward pass of one rank; default: the largest divisor of the rank's share that is at most 128."""
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    segment: SegmentConfig = SegmentConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if problem := name_problem(value):
            raise ValueError(problem)
        return value

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run_root) / self.name

    @property
    def num_classes(self) -> int | None:
        """Classes of the head, if the task has one and they are given."""
        return {"finetune": self.finetune.num_classes, "segment": self.segment.num_classes}.get(self.task)

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and earlier ones in this task."""
        return {"finetune": self.finetune.causal, "segment": self.segment.causal}.get(self.task, self.objective.causal)

    @property
    def drops_last_token(self) -> bool:
        """Whether the last patch is left out of the blocks; only pretraining does without it."""
        return self.task == "pretrain" and self.objective.drops_last_token

    @property
    def state_shards(self) -> int:
        """Ranks that share one copy of weights, gradients and optimizer state."""
        if self.engine.name == "hsdp":
            return self.engine.shard_size or self.cluster.gpus_per_node
        return self.cluster.world_size if self.engine.name in ("fsdp2", "zero3") else 1

    def identity(self) -> dict[str, Any]:
        """The settings that shape the numbers of a run, by dotted key: not its name, its place, or how often it reports."""
        return _identity(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 of :meth:`identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The whole configuration as YAML that :func:`nepa_dist.config_load.load_config` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


RESERVED_NAMES = ("best", "checkpoints", "code", "figures", "job", "logs", "prometheus")
"""Folders in that of a run, or beside runs, that are no runs."""


def name_problem(text: str) -> str:
    """Why a text cannot name a run, or a folder of runs; empty if it can."""
    if text in RESERVED_NAMES:
        return f"{text!r} cannot name a run: other things have that name in the folders of runs"
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        return ""
    rule = "1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    return f"{text!r} cannot name a run (--name, or the last part of --run-dir): it takes {rule}"


_NOT_IDENTITY = {"name", "run_root", "cluster", "checkpoint", "evaluate", "metrics", "guard", "micro_batch_size"}
_NOT_IDENTITY |= {f"data.{key}" for key in DataConfig.model_fields if key not in ("augment", "block_shards", "mean", "std")}
# Every engine gives the same numbers, but for what rounds them; a run may move between them.
_NOT_IDENTITY |= {f"engine.{key}" for key in EngineConfig.model_fields if key not in ("precision", "reduce_dtype", "fp8")}


_SECTION_OF_TASK = {"pretrain": "objective", "finetune": "finetune", "segment": "segment"}


def _identity(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    others = set() if prefix else set(_SECTION_OF_TASK.values()) - {_SECTION_OF_TASK[values["task"]]}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in _NOT_IDENTITY | others:
            continue
        flat |= _identity(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def changed_keys(old: Mapping[str, Any], new: Config) -> list[tuple[str, Any, Any]]:
    """Settings that shape the numbers of a run and differ between a saved configuration and a new one.

    Args:
        old: a configuration as nested mappings, as saved with a run.
        new: the configuration to compare with; what its ``checkpoint.allow`` names may differ, and where a run began (``init``)
            does not matter any more.

    Returns:
        (dotted key, old value, new value); a key that one side lacks has None there.
    """
    before, after = _identity(old), new.identity()
    keys = [*after, *(key for key in before if key not in after)]
    differing = [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
    return [item for item in differing if not may_differ(item[0], new)]


def may_differ(key: str, config: Config) -> bool:
    """Whether ``checkpoint.allow`` names a setting, or a section that it is in; ``init`` always may."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in ("init", *config.checkpoint.allow))
