"""Classification with the pretrained backbone (arXiv 2512.16922 section 3.3).

Legend: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from nepa_dist.config import ModelConfig
from nepa_dist.heads.classifier import ClassifierHead, Pool
from nepa_dist.model import VisionTransformer
from nepa_dist.tasks.base import Task


class FinetuneTask(Task):
    """The backbone, a classifier, and cross-entropy.

    Args:
        model: the backbone.
        num_classes: C.
        pool: see :class:`ClassifierHead`.
        causal: keep the causal attention of pretraining (the paper's starred rows); default looks both ways.
        seed: of the backbone's initial weights.
    """

    head: ClassifierHead

    def __init__(
        self, model: ModelConfig, num_classes: int, *, pool: Pool = "mean", causal: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.causal = causal
        self.backbone = VisionTransformer(model, seed=seed)
        self.head = ClassifierHead(model.embed_dim, num_classes, pool=pool, norm_eps=model.norm_eps)

    def logits(self, images: Tensor) -> Tensor:
        """Class scores [B, C] of images [B, 3, H, W]."""
        scores: Tensor = self.head(self.backbone(images, causal=self.causal).hidden)
        return scores

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of ``batch["labels"]`` [B] in fp32; see :meth:`Task.forward`."""
        return F.cross_entropy(self.logits(batch["images"]).float(), batch["labels"]), {}
