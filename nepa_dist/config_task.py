"""The sections of the configuration that belong to one task each: fine-tuning and segmentation. Imports no torch.

"Paper" is arXiv 2512.16922 (section 3.3, Table 5), "released" the official scripts; segmentation numbers that the paper does
not give are those of MMSegmentation's MAE recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nepa_dist.config_base import Section

Share = Annotated[float, Field(ge=0, le=1)]


class FinetuneConfig(Section):
    """Classification with the pretrained backbone."""

    num_classes: int | None = Field(None, gt=1)
    """Default: the classes of the data."""
    causal: bool = False
    """Keep the causal attention of pretraining (the paper's starred rows). Off: every token sees every other (released)."""
    pool: Literal["mean", "last"] = "mean"
    """mean of the patch tokens and a LayerNorm (released), or the last token (paper)."""
    freeze_patch_embed: bool = True
    """Keep the patch embedding as pretrained (paper Table 1d: 73.1 -> 77.4)."""
    label_smoothing: Share = 0.1
    """Paper."""
    mixup: float = Field(0.8, ge=0)
    """Alpha of mixup (paper); 0 is off."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of cutmix (paper); 0 is off."""
    mix_probability: Share = 1.0
    """Share of micro-batches that are mixed at all (released)."""
    cutmix_probability: Share = 0.5
    """Share of mixed micro-batches that get cutmix where both are on (released)."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


class SegmentConfig(Section):
    """Semantic segmentation with UPerNet on the backbone's intermediate outputs."""

    num_classes: int | None = Field(None, gt=1)
    """Default: the classes of the data."""
    reduce_zero_label: bool = True
    """Mask value 0 is no class and c is class c - 1 (ADE20K's layout). Off: the value is the class. 255 is always ignored."""
    causal: bool = False
    freeze_patch_embed: bool = False
    taps: tuple[int, int, int, int] | None = None
    """Blocks whose outputs are used, from 0; default: those at 1/4, 2/4, 3/4 and the whole of the depth."""
    channels: int = Field(512, gt=0)
    """Width of the pyramid (arXiv 1807.10221)."""
    aux_channels: int = Field(256, gt=0)
    aux_weight: float = Field(0.4, ge=0)
    """Weight of the auxiliary head's loss; 0 leaves the loss out."""
    dropout: float = Field(0.1, ge=0, lt=1)
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Random scale of training, factor on the size at which the short side is the crop."""
    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""
    window: Literal["slide", "whole"] = "slide"
    """Evaluation on overlapping windows of the training crop, or on whole images."""
    stride: int | None = Field(None, gt=0)
    """Pixels between two windows; default: two thirds of the crop."""
    eval_scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Multi-scale evaluation averages over these factors."""
    eval_flip: bool = False
    """Average with the mirrored image as well."""

    def taps_of(self, depth: int) -> tuple[int, int, int, int]:
        """Taps in effect for a backbone of ``depth`` blocks."""
        return self.taps or (depth // 4 - 1, depth // 2 - 1, 3 * depth // 4 - 1, depth - 1)

    def stride_of(self, crop: int) -> int:
        """Stride in effect for windows of ``crop`` pixels."""
        return self.stride or max(1, 2 * crop // 3)

    @model_validator(mode="after")
    def _check(self) -> SegmentConfig:
        low, high = self.scale_range
        if not 0 < low <= high:
            raise ValueError(f"scale_range must be 0 < low <= high, got {low}, {high}")
        if self.taps is not None and not 0 <= self.taps[0] <= self.taps[1] <= self.taps[2] <= self.taps[3]:
            raise ValueError(f"taps are block numbers from 0 that do not go back, got {list(self.taps)}")
        if not self.eval_scales:
            raise ValueError("eval_scales is empty; [1.0] evaluates the image as it is")
        return self


class EvaluateConfig(Section):
    """Evaluation on the validation split during training."""

    every_epochs: float = Field(1.0, gt=0)
    """Epochs between two evaluations; the last step is always evaluated."""
    batch_size: int = Field(128, gt=0)
    """Images per forward pass of one rank."""
    max_samples: int | None = Field(None, gt=0)
    """Evaluate no more than this many images, spread evenly over the split; null: all."""
    resize: Annotated[float, Field(ge=1)] = 1.0
    """Short side of a validation image before the central crop, as a factor on the image size (released: B 256 / 224)."""
    squash: bool = False
    """Resize to a square of that side instead, which changes the aspect ratio (released L)."""
    bicubic: bool = True
    """Bicubic interpolation (released); off: bilinear."""
