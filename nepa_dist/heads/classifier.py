"""Linear classifier on pooled tokens (arXiv 2512.16922 section 3.3; the released recipe adds a LayerNorm after the mean)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Pool = Literal["mean", "last"]


class ClassifierHead(nn.Module):
    """Pool the tokens, normalise, project to classes.

    Args:
        embed_dim: width D of the tokens.
        num_classes: C.
        pool: ``mean`` of the patch tokens followed by a LayerNorm (released), or the ``last`` token without one (paper).
        norm_eps: of the LayerNorm.
    """

    def __init__(self, embed_dim: int, num_classes: int, *, pool: Pool = "mean", norm_eps: float = 1e-12) -> None:
        super().__init__()
        self.pool = pool
        self.norm: nn.Module = nn.LayerNorm(embed_dim, norm_eps) if pool == "mean" else nn.Identity()
        self.linear = nn.Linear(embed_dim, num_classes)
        # A zero head starts from the uniform prediction and leaves the backbone's first gradients unperturbed (released).
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map tokens [B, T, D] (CLS first) to logits [B, C]."""
        pooled = hidden[:, 1:].mean(1) if self.pool == "mean" else hidden[:, -1]
        logits: Tensor = self.linear(self.norm(pooled))
        return logits
