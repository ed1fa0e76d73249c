"""NEPA pretraining: predict the next patch embedding (arXiv 2512.16922, section 3.1 and Algorithm 1).

Legend: B batch, T tokens (CLS first), D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_dist.config import ModelConfig, ObjectiveConfig
from nepa_dist.keyed import keyed_seed
from nepa_dist.metrics.collapse import AllReduce, collapse_gauges
from nepa_dist.metrics.spread import spread_metrics
from nepa_dist.model import init_weights
from nepa_dist.tasks.base import Health, Task
from nepa_dist.tasks.regularizers import random_directions, sigreg, vicreg

SIGREG_DIRECTIONS = 256


def align(hidden: Tensor, embed: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Pair predictions with their targets.

    Args:
        hidden: z_hat [B, T, D], or [B, T - 1, D] when the last token was not fed.
        embed: z [B, T, D].
        shift: position t predicts t + 1; otherwise itself.

    Returns:
        Predictions and targets of equal shape, [B, T - 1, D] with shift and [B, T, D] without.

    Raises:
        ValueError: the shapes do not pair.
    """
    target = embed[:, 1:] if shift else embed
    if not target.shape[1] <= hidden.shape[1] <= embed.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} does not cover the targets in embed {list(embed.shape)}")
    return hidden[:, : target.shape[1]], target


def next_embedding_loss(hidden: Tensor, embed: Tensor, *, shift: bool = True, stop_grad: bool = True) -> Tensor:
    """Mean negative cosine between each prediction and the next embedding, in fp32 (fp64 stays fp64).

    Args:
        hidden: z_hat [B, T, D], or [B, T - 1, D] when the last token was not fed.
        embed: z [B, T, D]: CLS and raw patch embeddings.
        shift: position t predicts t + 1 (CLS predicts the first patch); off, each position predicts itself.
        stop_grad: no gradient through the target.

    Returns:
        0-d in [-1, 1].
    """
    prediction, target = align(hidden, embed, shift=shift)
    if stop_grad:
        target = target.detach()
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return -(F.normalize(prediction.to(dtype), dim=-1) * F.normalize(target.to(dtype), dim=-1)).sum(-1).mean()


class PretrainHead(nn.Module):
    """NEPA has no prediction head; only masking needs a parameter, the token that replaces a masked patch."""

    def __init__(self, embed_dim: int, mask_ratio: float) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        if mask_ratio > 0:
            self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))

    def forward(self, embed: Tensor) -> Tensor:
        """Replace exactly round(mask_ratio * N) patches per image, drawn anew for each image, in z [B, 1 + N, D]."""
        B, T, _ = embed.shape
        count = round(self.mask_ratio * (T - 1))
        order = torch.rand(B, T - 1, device=embed.device).argsort(dim=1)
        masked = F.pad(order < count, (1, 0))  # never CLS
        return torch.where(masked[:, :, None], self.mask_token.to(embed.dtype), embed)


class PretrainTask(Task):
    """The backbone and the NEPA objective with its ablation switches.

    Args:
        model: the backbone.
        objective: the loss.
        seed: of weights, the RoPE rescale and SIGReg's directions.
    """

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        self.objective = objective or ObjectiveConfig()
        self.head = PretrainHead(model.embed_dim, self.objective.mask_ratio)
        init_weights(self.head, seed, std=model.init_std)
        self._observe = False
        self._observed: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._draw_directions(0, torch.device("cpu"))
        self._loss = next_embedding_loss

    def compile_loss(self) -> None:
        """As one kernel each way the loss keeps no fp32 copies of predictions and targets [B, T, D]."""
        self._loss = torch.compile(next_embedding_loss, fullgraph=True)

    def begin_step(self, step: int, *, observe: bool) -> None:
        """See :meth:`Task.begin_step`."""
        super().begin_step(step, observe=observe)
        self._observe, self._observed = observe, None
        if self.objective.anti_collapse == "sigreg":
            self._draw_directions(step, self.backbone.cls_token.device)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the NEPA loss of ``batch["images"]`` [B, 3, H, W]; see :meth:`Task.forward`."""
        objective = self.objective
        features = self.backbone(
            batch["images"],
            causal=objective.causal,
            drop_last=objective.drops_last_token,
            rope_scale=self._rope_scale(batch["images"].device),
            corrupt=self.head if objective.mask_ratio > 0 and not self.looked_into else None,
        )
        embed, hidden = features.embed, features.hidden
        if self.looked_into:
            return hidden.new_zeros(()), {"hidden": hidden}
        loss = self._loss(hidden, embed, shift=objective.shift, stop_grad=objective.stop_grad)
        logs = {}
        if objective.anti_collapse != "none":
            penalty = self._anti_collapse(embed[:, 1:].flatten(0, 1))
            logs["anti_collapse_loss"] = penalty.detach()
            loss = loss + objective.anti_collapse_weight * penalty
        if self._observe:
            prediction, target = align(hidden.detach(), embed.detach(), shift=objective.shift)
            # What stands at the predicting position, for the baseline that copies it.
            self._observed = (prediction, target, embed.detach()[:, : target.shape[1]], prediction.mean(1))
        return loss, logs

    def _draw_directions(self, step: int, device: torch.device) -> None:
        seed = keyed_seed(self.seed, "sigreg", step)
        width = self.backbone.config.embed_dim
        self._directions = random_directions(width, SIGREG_DIRECTIONS, seed=seed, device=device)

    def _anti_collapse(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            if self.objective.anti_collapse == "vicreg":
                return vicreg(tokens)
            return sigreg(tokens, self._directions.to(tokens.device))

    def health(self, all_reduce: AllReduce | None = None, *, audit_seed: int | None = None) -> Health:
        """Collapse gauges and skill of the last observed step; see :meth:`Task.health`."""
        if self._observed is None:
            return Health({}, {})
        prediction, target, current, pooled = self._observed
        self._observed = None
        gauges, spectra = collapse_gauges(prediction, target, current, pooled=pooled, all_reduce=all_reduce)
        if audit_seed is not None:
            for name, x in (("target", target.flatten(0, 1)), ("pred", prediction.flatten(0, 1)), ("pooled", pooled)):
                spread = spread_metrics(x, seed=audit_seed, all_reduce=all_reduce)
                gauges |= {f"{key}.{name}": value for key, value in spread.items()}
        return Health(gauges, spectra)
