"""The sections of the configuration that say what is trained: the backbone and the objective. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from nepa_dist import presets
from nepa_dist.config_base import Section, nearest


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


_FREE = {"preset", "mlp_ratio", "mlp_hidden_dim", "image_size", "drop_path", "rope_rescale", "layer_scale_init", "init_std"}
"""Settings that neither shape tensors nor change what is computed from them. The MLP is compared by its width in effect."""


def other_settings(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Settings that change what a model computes and differ, so that the weights of one are of no use to the other."""
    free = _FREE if ours.rope else _FREE - {"image_size"}

    def settings(model: ModelConfig) -> dict[str, Any]:
        values = {key: value for key, value in model.model_dump().items() if key not in free}
        return values | {"mlp_hidden_dim": model.mlp_hidden_dim_}

    before, after = settings(theirs), settings(ours)
    changed = [key for key in after if before[key] != after[key]]
    if not before["qk_norm_affine"] and after["qk_norm_affine"]:
        changed.remove("qk_norm_affine")
    return [f"model.{key}: {before[key]!r} there, {after[key]!r} here" for key in changed]


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
