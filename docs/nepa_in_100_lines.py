"""NEPA, all of it: a vision transformer learns to predict the embedding of the next patch (arXiv 2512.16922).

An image is cut into patches; each becomes a vector z_t. A causal transformer reads z_0 .. z_t and outputs a guess of z_(t+1).
The loss is minus the cosine between guess and truth. No decoder, no masks, no second view, no teacher: what keeps z from
collapsing onto one point is that no gradient flows into the truth (`detach` below).

Run it: `python docs/nepa_in_100_lines.py` (scikit-learn's handwritten digits, half a minute; a number changes the steps).
Letters: B images, T tokens (one CLS, then the patches), D width, H heads, K = D / H head width.
"""

import math
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


def rope_tables(grid: int, K: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K]: half of the frequencies turn with the row of a patch, half with its column; CLS is not turned."""
    centre = (torch.arange(grid) + 0.5) / grid * 2 - 1  # in (-1, 1), whatever the size of the image
    frequency = 2 * math.pi * 100.0 ** (-torch.arange(K // 4) / (K // 4))
    row, column = (each.flatten().outer(frequency) for each in torch.meshgrid(centre, centre, indexing="ij"))
    angle = F.pad(torch.cat([row, column, row, column], dim=1), (0, 0, 1, 0))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + K / 2) of the last axis of x [B, H, T, K] by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Block(nn.Module):
    """Causal attention, then SwiGLU, each on a normalised copy and added back, scaled by a vector that starts near zero."""

    def __init__(self, D: int, H: int, grid: int) -> None:
        super().__init__()
        self.H, hidden = H, D * 8 // 3
        self.cos, self.sin = rope_tables(grid, D // H)
        self.norm1, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm2, self.gate_up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * hidden), nn.Linear(hidden, D)
        self.scale1, self.scale2 = nn.Parameter(torch.full((D,), 1e-5)), nn.Parameter(torch.full((D,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.H, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        q, k = (rotate(F.layer_norm(each, each.shape[-1:]), self.cos, self.sin) for each in (q, k))  # QK-norm, RoPE
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x.add(self.scale1 * self.out(heads.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x.add(self.scale2 * self.down(F.silu(gate) * up))


class Nepa(nn.Module):
    """Images [B, 1, S, S] -> embeddings z and predictions, both [B, T, D]; prediction t is of z at t + 1."""

    def __init__(self, image: int = 8, patch: int = 2, D: int = 64, depth: int = 4, H: int = 4) -> None:
        super().__init__()
        self.cls, self.patch_embed = nn.Parameter(torch.empty(1, 1, D)), nn.Conv2d(1, D, patch, stride=patch)
        self.blocks, self.norm = nn.Sequential(*(Block(D, H, image // patch) for _ in range(depth))), nn.LayerNorm(D)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)  # a large bias in the patch embedding would make all z alike from the start
            elif parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patch_embed(images).flatten(2).mT  # row by row, as we read
        z = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1)
        return z, self.norm(self.blocks(z))


def train(steps: int = 500, batch: int = 64, peak_lr: float = 2e-3) -> tuple[Nepa, list[float]]:
    """Train, print the loss and the skill (0: the best constant guess, 1: a perfect one); return the model and all losses."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images).float()[:, None] / 8 - 1  # [1797, 1, 8, 8] in [-1, 1]
    model, losses = Nepa(), []
    groups = [{"params": [p], "weight_decay": 0.05 if p.ndim > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, steps, pct_start=0.025, cycle_momentum=False)
    for step in range(steps):
        z, predicted = model(images[torch.randint(len(images), (batch,))])
        target = z[:, 1:].detach()
        loss = -F.cosine_similarity(predicted[:, :-1], target, dim=-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            constant = F.normalize(target, dim=-1).mean((0, 1)).norm().item()  # what the best constant guess reaches
            print(f"step {step:4d}  loss {losses[-1]:.4f}  skill {1 - (1 + losses[-1]) / (1 - constant):.3f}")
    return model, losses


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a model only waits for more
    train(*map(int, sys.argv[1:2]))
