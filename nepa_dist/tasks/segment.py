"""Semantic segmentation with UPerNet on the backbone's intermediate outputs (arXiv 2512.16922 section 3.3).

The paper publishes the crop, the batch and the number of steps; what it leaves open is that of MMSegmentation's recipe for MAE.

Legend: B batch, C classes, D width, H and W height and width in pixels, h and w rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nepa_dist.config import ModelConfig, SegmentConfig
from nepa_dist.heads.upernet import PixelLogits, UPerNetHead
from nepa_dist.metrics.segmentation import ConfusionMatrix, scores_csv
from nepa_dist.model import init_weights
from nepa_dist.tasks.base import Scores, Task, layer_of
from nepa_dist.tasks.pixel_loss import IGNORE, segmentation_loss
from nepa_dist.tasks.sliding import label_map, mean_probabilities, slide_logits, whole_logits


class SegmentTask(Task):
    """The backbone, UPerNet, and cross-entropy over labelled pixels.

    Args:
        model: the backbone; ``image_size`` is the crop.
        config: ``num_classes`` is set.
        seed: of the initial weights.

    Raises:
        ValueError: the number of classes is not set, or the backbone has fewer than four blocks.
    """

    head: UPerNetHead
    weighs = True

    def __init__(self, model: ModelConfig, config: SegmentConfig, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        if config.num_classes is None:
            raise ValueError("segment.num_classes is not set")
        self.config = config
        self.num_classes = config.num_classes
        self.causal = config.causal
        self.taps = config.taps_of(model.depth)
        self.head = UPerNetHead(
            model.embed_dim,
            config.num_classes,
            channels=config.channels,
            aux_channels=config.aux_channels,
            dropout=config.dropout,
        )
        init_weights(self.head, seed, std=None)
        self.backbone.patch_embed.requires_grad_(not config.freeze_patch_embed)
        # Behind all taps: nothing that is trained depends on them.
        for part in (*self.backbone.blocks[max(self.taps) + 1 :], self.backbone.norm):
            part.requires_grad_(False)
        self.head.auxiliary.requires_grad_(config.aux_weight > 0)

    def lr_layer(self, name: str) -> int:
        """See :meth:`Task.lr_layer`. As in MMSegmentation, the head's rate is one decay above that of the last block."""
        if name.startswith("head."):
            return 0
        return 1 + layer_of(name, len(self.backbone.blocks))

    def logits(self, images: Tensor) -> PixelLogits:
        """Class scores [B, C, H, W] of images [B, 3, H, W], H and W multiples of the patch size."""
        features = self.backbone(images, causal=self.causal, taps=self.taps, rope_scale=self._rope_scale(images.device))
        B, _, D = features.embed.shape
        maps = [features.taps[tap][:, 1:].mT.reshape(B, D, *features.grid) for tap in self.taps]
        scores: PixelLogits = self.head(maps, (images.shape[2], images.shape[3]))
        return scores

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Number of labelled pixels; see :meth:`Task.weight`."""
        return (batch["masks"] != IGNORE).sum()

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over the labelled pixels of ``batch["masks"]`` [B, H, W]; see :meth:`Task.forward`."""
        scores = self.logits(batch["images"])
        total, count = segmentation_loss(scores.logits, batch["masks"])
        loss = total / count.clamp(min=1)
        if scores.auxiliary is None or self.config.aux_weight == 0:
            return loss, {}
        auxiliary = segmentation_loss(scores.auxiliary, batch["masks"])[0] / count.clamp(min=1)
        return loss + self.config.aux_weight * auxiliary, {"aux_loss": auxiliary.detach()}

    def predict(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Most likely class of each pixel of whole images of any size, as the configuration evaluates.

        Args:
            images: [B, 3, H, W], normalised.
            size: (height, width) of the result; those of the annotation.

        Returns:
            [B, *size] int64.
        """
        config, model = self.config, self.backbone.config

        def score(window: Tensor) -> Tensor:
            return self.logits(window).logits

        def slide(scaled: Tensor) -> Tensor:
            crop = model.image_size
            return slide_logits(score, scaled, crop=crop, stride=config.stride_of(crop), num_classes=self.num_classes)

        def whole(scaled: Tensor) -> Tensor:
            return whole_logits(score, scaled, patch_size=model.patch_size)

        probabilities = mean_probabilities(
            slide if config.window == "slide" else whole,
            images,
            patch_size=model.patch_size,
            ratios=config.eval_scales,
            flip=config.eval_flip,
        )
        return label_map(probabilities, size)

    def measure(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pixels by annotated and predicted class. See :meth:`Task.measure`."""
        masks = batch["masks"].long()
        confusion = ConfusionMatrix(self.num_classes, device=masks.device)
        confusion.update(self.predict(batch["images"], (masks.shape[1], masks.shape[2])), masks)
        return {"confusion": confusion.matrix}

    def score(self, sums: Mapping[str, Tensor], class_names: list[str]) -> Scores:
        """mIoU, mAcc and aAcc. See :meth:`Task.score`.

        Raises:
            ValueError: no pixel has been counted.
        """
        if not sums:
            raise ValueError("there is nothing to score: no validation image has a mask and can be used")
        confusion = ConfusionMatrix(self.num_classes)
        confusion.matrix = sums["confusion"].cpu()
        scores = confusion.scores()
        values = {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc}
        return Scores(values, "miou", scores_csv(scores, class_names))
