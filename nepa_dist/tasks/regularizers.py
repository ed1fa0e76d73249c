"""Regularisers on embeddings that keep them from collapsing without a stop-gradient.

Legend: n samples (tokens of all images), D width, M random directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def sigreg(x: Tensor, directions: Tensor, *, num_points: int = 17, cutoff: float = 3.0) -> Tensor:
    """Sketched isotropic Gaussian regularisation: Epps-Pulley distance of random projections from N(0, 1).

    For each direction a: integral over t of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), where phi is the empirical
    characteristic function of x a, by the trapezoid rule on [0, cutoff]. The published statistic is 2 n times this (n from the
    test, 2 for the negative half of the axis). It is left out, so that a weight means the same for every batch size; weights
    are therefore larger than the published ones (complete collapse to zero gives 0.2).

    Args:
        x: [n, D].
        directions: [D, M] with columns of unit length, the same on all ranks.
        num_points: knots of the quadrature.
        cutoff: largest t.

    Returns:
        Mean over the directions, 0-d fp32; 0 for an isotropic standard Gaussian.

    Source: LeJEPA, arXiv 2511.08544, section 4 (knots and cutoff from its published code).
    """
    projected = x.float() @ directions  # [n, M]
    spacing = cutoff / (num_points - 1)
    total = torch.zeros(projected.shape[1], device=x.device)
    for k in range(num_points):
        target = math.exp(-((k * spacing) ** 2) / 2)
        # Recomputed in backward: what all knots keep together would be larger than the rest of the model.
        error = checkpoint(_squared_error, projected, k * spacing, target, use_reentrant=False, preserve_rng_state=False)
        end = 0.5 if k in (0, num_points - 1) else 1.0
        total = total + end * spacing * target * error
    return total.mean()


def _squared_error(projected: Tensor, t: float, target: float) -> Tensor:
    """|phi(t) - target|^2 per direction, [M], with phi the empirical characteristic function of each column [n]."""
    angles = projected * t
    return (angles.cos().mean(0) - target).square() + angles.sin().mean(0).square()


def random_directions(dim: int, count: int, *, seed: int, device: torch.device) -> Tensor:
    """Unit columns [dim, count], drawn on the CPU so that every rank and device gets the same ones."""
    directions = torch.randn(dim, count, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = directions / directions.norm(dim=0, keepdim=True)
    # From page-locked memory the copy runs beside the computation; from any other it would wait for the device.
    return (unit.pin_memory() if device.type == "cuda" else unit).to(device, non_blocking=True)


def vicreg(x: Tensor, *, covariance_weight: float = 0.04, eps: float = 1e-4) -> Tensor:
    """Variance hinge plus weighted squared covariance.

    Args:
        x: [n, D].
        covariance_weight: of the covariance term relative to the variance term (published: 1 to 25).
        eps: added to the variance under the root.

    Returns:
        mean_d max(0, 1 - std_d) + covariance_weight * sum_{i != j} C_ij^2 / D, 0-d fp32.

    Source: VICReg, arXiv 2105.04906, equations 1 to 4.
    """
    x = x.float()
    centred = x - x.mean(0)
    covariance = centred.T @ centred / max(len(x) - 1, 1)
    variance = covariance.diagonal()
    hinge = torch.relu(1 - torch.sqrt(variance + eps)).mean()
    off_diagonal = (covariance.square().sum() - variance.square().sum()) / x.shape[1]
    penalty: Tensor = hinge + covariance_weight * off_diagonal
    return penalty
