"""Classification with the pretrained backbone (arXiv 2512.16922 section 3.3 and Table 5).

Legend: B batch, C classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_dist.config import FinetuneConfig, ModelConfig
from nepa_dist.data.mixup import Mixup
from nepa_dist.heads.classifier import ClassifierHead
from nepa_dist.tasks.base import HEAD_LAYER, Scores, Task, layer_of

TOP = 5


class FinetuneTask(Task):
    """The backbone, a classifier, and cross-entropy with soft targets.

    Args:
        model: the backbone.
        config: ``num_classes`` is set.
        seed: of the initial weights, mixup and cutmix.

    Raises:
        ValueError: the number of classes is not set.
    """

    head: ClassifierHead

    def __init__(self, model: ModelConfig, config: FinetuneConfig, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        if config.num_classes is None:
            raise ValueError("finetune.num_classes is not set")
        self.config = config
        self.num_classes = config.num_classes
        self.causal = config.causal
        self.head = ClassifierHead(model.embed_dim, config.num_classes, pool=config.pool, norm_eps=model.norm_eps)
        self.mixup = Mixup(
            config.num_classes,
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            switch_prob=config.cutmix_probability,
            prob=config.mix_probability,
            label_smoothing=config.label_smoothing,
        )
        self.backbone.patch_embed.requires_grad_(not config.freeze_patch_embed)

    def lr_layer(self, name: str) -> int:
        """See :meth:`Task.lr_layer`. As released, the last norm of the backbone has the classifier's rate."""
        if name.startswith(("head.linear.", "backbone.norm.")):
            return HEAD_LAYER
        return layer_of(name, len(self.backbone.blocks))

    def logits(self, images: Tensor) -> Tensor:
        """Class scores [B, C] of images [B, 3, H, W]."""
        features = self.backbone(images, causal=self.causal, rope_scale=self._rope_scale(images.device))
        scores: Tensor = self.head(features.hidden)
        return scores

    def prepare(self, batch: dict[str, Tensor], *, step: int, micro_batch: int) -> dict[str, Tensor]:
        """Mix images and labels; ``targets`` [B, C] are the soft labels. See :meth:`Task.prepare`."""
        images, targets = self.mixup(batch["images"], batch["labels"], seed=self.seed, step=step, micro_batch=micro_batch)
        return batch | {"images": images, "targets": targets}

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy with ``batch["targets"]`` [B, C] in fp32; see :meth:`Task.forward`."""
        log_probabilities = self.logits(batch["images"]).float().log_softmax(1)
        return -(batch["targets"].float() * log_probabilities).sum(1).mean(), {}

    def measure(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums of loss, top-1 and top-5 hits and images, the last three by class. See :meth:`Task.measure`."""
        known = batch["labels"] >= 0
        labels = batch["labels"][known]
        scores = self.logits(batch["images"])[known].float()
        ranked = scores.topk(min(TOP, self.num_classes), dim=1).indices == labels[:, None]
        zeros = torch.zeros(self.num_classes, dtype=torch.int64, device=labels.device)
        return {
            "loss": F.cross_entropy(scores, labels, reduction="none").double().sum(),
            "images": zeros.index_add(0, labels, torch.ones_like(labels)),
            "top1": zeros.index_add(0, labels, ranked[:, 0].long()),
            "top5": zeros.index_add(0, labels, ranked.any(1).long()),
        }

    def score(self, sums: Mapping[str, Tensor], class_names: list[str]) -> Scores:
        """Top-1, top-5 and mean loss over all images. See :meth:`Task.score`.

        Raises:
            ValueError: no image has been counted.
        """
        images, top1, top5 = (sums[key].tolist() if sums else [] for key in ("images", "top1", "top5"))
        total = sum(images)
        if total == 0:
            raise ValueError("there is nothing to score: no validation image has a label and can be read")
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["class", "name", "top1", "top5", "images"])
        for index, count in enumerate(images):
            shares = [f"{hits[index] / count:.6f}" if count else "" for hits in (top1, top5)]
            table.writerow([index, class_names[index], *shares, count])
        values = {"eval_loss": float(sums["loss"]) / total, "top1": sum(top1) / total, "top5": sum(top5) / total}
        return Scores(values, "top1", text.getvalue())
