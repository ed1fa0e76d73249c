"""The configuration of a run: every field with its type, unit, default and source. Imports no torch.

Files and ``--set`` are layered over these defaults in :mod:`nepa_dist.config_load`; what follows from a configuration (steps,
accumulation) is in :mod:`nepa_dist.plan`.

Each field states its unit and where the default comes from. "Paper" is arXiv 2512.16922; "released" is the official code.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from nepa_dist import presets


class ConfigError(ValueError):
    """One or more problems in a configuration; ``problems`` holds each as a sentence."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the configuration:\n{lines}")


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """``; did you mean ...?`` with the known key that is most like ``key``; empty if none is."""
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix + match[0]!r}?" if match else ""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as booleans; pydantic would take them for 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is a truth value, not a number or a text (quote a text)")
        return value


Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """The backbone. ``preset`` fills the size; every other field given beside it wins over the preset."""

    preset: str | None = None
    """Name in ``nepa_dist.presets.PRESETS``."""
    image_size: int = Field(224, gt=0)
    """Pixels, side of the square that training uses. The model itself takes any multiple of the patch size."""
    patch_size: int = Field(14, gt=0)
    """Pixels (paper)."""
    in_channels: int = Field(3, gt=0)
    embed_dim: int = Field(192, gt=0)
    """Width D."""
    depth: int = Field(12, gt=0)
    """Number of blocks."""
    num_heads: int = Field(3, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of a plain MLP over D; a gated MLP gets two thirds of it, rounded up to 64 (same parameter count)."""
    mlp_hidden_dim: int | None = Field(None, gt=0)
    """Hidden width H given exactly; overrides mlp_ratio."""
    gated_mlp: bool = True
    """activation(gate(x)) * up(x); with silu this is SwiGLU (paper). The released weights have it off."""
    activation: Literal["silu", "gelu"] = "silu"
    """silu (paper) or exact gelu (released)."""
    qkv_bias: bool = True
    qk_norm: bool = True
    """LayerNorm without bias over the head width of queries and keys, before RoPE (paper)."""
    qk_norm_affine: bool = False
    """Learned scale in the QK-norm: off (paper), on in the released L and in all fine-tune configs."""
    layer_scale: bool = True
    layer_scale_init: float = 1e-5
    """Released."""
    rope: bool = True
    """2-D axial RoPE. Off: learned absolute positions are added to the input."""
    rope_theta: float = Field(100.0, gt=1)
    """Base of the frequencies (released)."""
    rope_rescale: float = Field(2.0, ge=1)
    """In training, coordinates are multiplied by one log-uniform draw from [1/x, x] per step (released); 1 is off."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth of the last block; rises linearly from 0 at the first. 0 in pretraining."""
    norm_eps: float = Field(1e-12, gt=0)
    """Of every LayerNorm (released)."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the truncated normal of all weights (released)."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("preset") is None:
            return values
        name = values["preset"]
        if not isinstance(name, str) or name not in presets.PRESETS:
            raise ValueError(f"unknown preset {name!r}{nearest(str(name), presets.PRESETS)}")
        return {**presets.PRESETS[name], **values}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        problems = []
        if self.embed_dim % self.num_heads:
            problems.append(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        elif self.rope and self.head_dim % 4:
            problems.append(f"RoPE needs a head width that is a multiple of 4, got {self.embed_dim} / {self.num_heads}")
        if self.image_size % self.patch_size:
            low = self.image_size // self.patch_size * self.patch_size
            near = f"{low} or {low + self.patch_size}" if low else f"{self.patch_size}"
            problems.append(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; nearest: {near}")
        if self.mlp_hidden_dim_ < 1:
            problems.append(f"mlp_ratio {self.mlp_ratio} gives the MLP a hidden width of 0")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def head_dim(self) -> int:
        """Head width K."""
        return self.embed_dim // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches N of a training image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def mlp_hidden_dim_(self) -> int:
        """Hidden width H in effect."""
        return self.mlp_hidden_dim or presets.mlp_hidden_dim(self.embed_dim, self.mlp_ratio, self.gated_mlp)


class ObjectiveConfig(Section):
    """What pretraining minimises, and the switches of the paper's ablations (paper Table 1)."""

    shift: bool = True
    """Position t predicts the embedding of position t + 1. Off: its own."""
    causal: bool = True
    """Each position sees only itself and earlier ones."""
    stop_grad: bool = True
    """No gradient through the target."""
    mask_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of patches whose input is replaced by a learned token; all targets stay predicted."""
    drop_last_token: bool = True
    """Do not feed the last patch: its output enters no loss and nothing sees it. In effect only with shift and causal."""
    anti_collapse: Literal["none", "sigreg", "vicreg"] = "none"
    """Regulariser on the targets beside (or instead of) the stop-gradient: SIGReg (arXiv 2511.08544), VICReg (2105.04906)."""
    anti_collapse_weight: float = Field(1.0, ge=0)
    """Weight of the regulariser in the loss; see configs/ablate for one that keeps the targets apart."""

    @property
    def drops_last_token(self) -> bool:
        """Whether the last token is really left out: without shift it is a target of its own, without causality it is seen."""
        return self.drop_last_token and self.shift and self.causal


class AugmentConfig(Section):
    """Random resized crop and flip (released: torchvision's defaults, bilinear with antialias)."""

    crop: Literal["random_resized", "center"] = "random_resized"
    """center: short side to the image size, then the middle; no randomness."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area over the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height, drawn log-uniformly."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        problems = []
        for name, (low, high), limit in (("scale", self.scale, 1.0), ("ratio", self.ratio, float("inf"))):
            if not 0 < low <= high <= limit:
                problems.append(f"{name} must be 0 < low <= high{' <= 1' if name == 'scale' else ''}, got {low}, {high}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class DataConfig(Section):
    """Where images come from and how they are read."""

    source: str | None = Field(None, min_length=1)
    """``digits`` (embedded) or a folder: ``train/<class>/*``, ``<class>/*`` or a flat folder of images."""
    expected_num_samples: int | None = Field(None, gt=0)
    """Images in the training split, for a dry run where the data is out of reach. The counted number wins."""
    augment: AugmentConfig = AugmentConfig()
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted on the device from pixels in [0, 1] (released)."""
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    """Divided by, on the device (released)."""
    num_workers: int | None = Field(None, ge=0)
    """Loader processes per rank; default: the cores of this rank less one, at most 8. 0 loads in the trainer's process."""
    prefetch_batches: int = Field(2, gt=0)
    """Micro-batches each worker keeps ready."""
    max_bad_samples: int = Field(100, ge=0)
    """Different unreadable images that a run survives, each replaced and named; one more ends it."""


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
    ema_decay: float | None = Field(0.9999, gt=0, lt=1)
    """Decay per step of the moving average of the weights (paper); null keeps none."""


class EngineConfig(Section):
    """How the model is placed on devices."""

    name: Literal["ddp", "fsdp2", "hsdp"] = "ddp"
    """ddp: every rank holds everything; fsdp2: weights, gradients and state sharded over all ranks; hsdp: sharded within groups
    of ``shard_size`` ranks, replicated between them."""
    shard_size: int | None = Field(None, gt=0)
    """Ranks that share one copy of the state with hsdp; default: those of a node."""
    reshard_after_forward: bool = True
    """fsdp2, hsdp: free gathered weights between forward and backward; off saves a gather and costs the memory."""
    precision: Literal["fp32", "bf16_autocast"] = "bf16_autocast"
    """bf16_autocast (paper): fp32 weights, matrix products in bf16. fp16 is not offered: its range needs loss scaling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """Only deterministic kernels on a GPU, slower; CPUs are deterministic as they are."""
    timeout_seconds: float = Field(600.0, gt=0)
    """A collective that waits longer than this fails."""


class GuardConfig(Section):
    """When a run that goes wrong must end."""

    max_consecutive_checkpoint_failures: int = Field(3, gt=0)
    """Checkpoints in a row that cannot be written before the run ends with an error; the earlier ones stay."""
    max_consecutive_skips: int = Field(10, gt=0)
    """Steps in a row with a non-finite gradient (each is skipped and counted) before the run ends with an error."""


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


class MetricsConfig(Section):
    """What is measured and where it goes. ``metrics.jsonl`` is always written."""

    every: int = Field(10, gt=0)
    """Steps between two lines."""
    collapse_every: int = Field(50, gt=0)
    """Steps between two readings of the collapse gauges."""
    prometheus: bool = True
    """Serve the metrics over HTTP from rank 0."""
    prometheus_address: str = "127.0.0.1"
    """Address the endpoint binds to."""
    prometheus_port: int = Field(0, ge=0, le=65535)
    """0 takes a free port; run.json and the log name it."""


class ClusterConfig(Section):
    """Where the run executes. The only section that names a site."""

    launcher: Literal["local", "slurm"] = "local"
    nodes: int = Field(1, gt=0)
    gpus_per_node: int = Field(1, gt=0)
    """Processes per node, one per GPU."""

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.nodes * self.gpus_per_node


class Config(Section):
    """One run."""

    task: Literal["pretrain"] = "pretrain"
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
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
            rule = "1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit"
            raise ValueError(f"{value!r} cannot name a run (--name, or the last part of --run-dir): it takes {rule}")
        return value

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run_root) / self.name

    @property
    def state_shards(self) -> int:
        """Ranks that share one copy of weights, gradients and optimizer state."""
        if self.engine.name == "hsdp":
            return self.engine.shard_size or self.cluster.gpus_per_node
        return self.cluster.world_size if self.engine.name == "fsdp2" else 1

    def identity(self) -> dict[str, Any]:
        """The settings that shape the numbers of a run, by dotted key: not its name, its place, or how often it reports."""
        return _identity(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 of :meth:`identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The whole configuration as YAML that :func:`load_config` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_NOT_IDENTITY = {"name", "run_root", "cluster", "checkpoint", "metrics", "guard", "micro_batch_size"}
_NOT_IDENTITY |= {f"data.{key}" for key in DataConfig.model_fields if key not in ("augment", "mean", "std")}
# Every engine gives the same numbers; a run may move between them.
_NOT_IDENTITY |= {f"engine.{key}" for key in EngineConfig.model_fields if key != "precision"}


def _identity(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in _NOT_IDENTITY:
            continue
        flat |= _identity(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def changed_keys(old: Mapping[str, Any], new: Config) -> list[tuple[str, Any, Any]]:
    """Settings that shape the numbers of a run and differ between a saved configuration and a new one.

    Args:
        old: a configuration as nested mappings, as saved with a run.
        new: the configuration to compare with.

    Returns:
        (dotted key, old value, new value); a key that one side lacks has None there.
    """
    before, after = _identity(old), new.identity()
    keys = [*after, *(key for key in before if key not in after)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
