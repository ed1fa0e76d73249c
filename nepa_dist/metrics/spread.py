"""How embeddings are spread: over the sphere (uniformity) and against a Gaussian (SIGReg). Imports torch only.

Both are means over random projections of what the embeddings' characteristic function says there, so ranks exchange sums of
cosines and sines and never embeddings; the result equals that of one process that holds all rows. Every rank must draw the
same projections, which the seed does.

Legend: n rows over all ranks, D width, M directions, K knots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nepa_dist.metrics.collapse import AllReduce, reduce_sums

NUM_FREQUENCIES = 1024
"""Frequencies of the uniformity; its logarithm is uncertain by about 1 / sqrt(this)."""
NUM_DIRECTIONS = 256
NUM_KNOTS = 17
CUTOFF = 3.0
_CHUNK_ROWS = 8192


@torch.no_grad()
def spread_metrics(x: Tensor, *, seed: int, all_reduce: AllReduce | None = None) -> dict[str, Tensor]:
    """Uniformity and the SIGReg statistic of one set of embeddings.

    Uniformity (arXiv 2005.10242) is log mean exp(-2 |u_i - u_j|^2) over pairs of different unit rows. The kernel is the mean of
    cos(w (u_i - u_j)) over w from a normal with standard deviation 2, so the mean over pairs is that of |phi(w)|^2.

    The SIGReg statistic (LeJEPA, arXiv 2511.08544) is the mean over unit directions a of the integral over t in [0, 3] of
    |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) by the trapezoid rule, with phi of x a. Not times 2 n as published, so that it does
    not depend on the number of rows; 0 for an isotropic standard Gaussian, 0.2 if all rows are zero.

    Args:
        x: ``[n, D]`` float; n may differ between ranks.
        seed: of the frequencies and directions, the same on all ranks.
        all_reduce: sums a tensor over ranks; None in one process.

    Returns:
        0-d float64 tensors ``embedding_uniformity`` (NaN of a single row) and ``embedding_sigreg``.
    """
    D, device = x.shape[1], x.device
    generator = torch.Generator().manual_seed(seed)
    frequencies = (2 * torch.randn(D, NUM_FREQUENCIES, generator=generator)).to(device)
    directions = torch.nn.functional.normalize(torch.randn(D, NUM_DIRECTIONS, generator=generator), dim=0).to(device)
    knots = torch.linspace(0, CUTOFF, NUM_KNOTS, device=device)

    count = torch.full((), len(x), dtype=torch.float64, device=device)
    sphere = torch.zeros(2, NUM_FREQUENCIES, dtype=torch.float64, device=device)
    line = torch.zeros(2, NUM_KNOTS, NUM_DIRECTIONS, dtype=torch.float64, device=device)
    for rows in torch.split(x.float(), _CHUNK_ROWS):
        # A zero vector counts as the direction (1, ..., 1)/sqrt(D), as in the collapse gauges.
        norm = rows.norm(dim=1, keepdim=True)
        angles = torch.where(norm == 0, D**-0.5, rows / norm) @ frequencies
        sphere += torch.stack([angles.cos().sum(0, dtype=torch.float64), angles.sin().sum(0, dtype=torch.float64)])
        projected = rows @ directions
        for k, knot in enumerate(knots.unbind()):
            angles = projected * knot
            line[0, k] += angles.cos().sum(0, dtype=torch.float64)
            line[1, k] += angles.sin().sum(0, dtype=torch.float64)
    count, sphere, line = reduce_sums([count, sphere, line], all_reduce)

    pairs = ((sphere / count).square().sum(0).mean() * count - 1) / (count - 1)
    target = torch.exp(-knots.double().square() / 2)
    weight = target * CUTOFF / (NUM_KNOTS - 1)
    weight[[0, -1]] /= 2
    cos, sin = (line / count).unbind()
    error = (cos - target[:, None]).square() + sin.square()
    return {
        # The estimate of a mean that is nearly zero may fall below it.
        "embedding_uniformity": torch.where(count > 1, pairs.clamp(min=math.exp(-8)).log(), torch.nan),
        "embedding_sigreg": (weight[:, None] * error).sum(0).mean(),
    }
