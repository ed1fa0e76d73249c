"""Has the embedding collapsed, and does the prediction beat trivial ones? Gauges for pretraining; imports torch only.

No single gauge is enough. Embeddings can collapse onto a constant (the mean cosine goes to 1 while the effective rank may
rise), or onto few directions (the effective rank goes to 1 while the mean cosine may fall). So both are measured, beside the
skill of the prediction over two that need no learning: the best constant, and a copy of the current embedding.

Everything follows from sums over rows, so ranks exchange sums (about 2 D^2 numbers) and never embeddings; the result equals
that of one process that holds all rows. Sums are of centred float64 values in two passes: E[x^2] - E[x]^2 loses all digits
when the mean is large beside the spread. The effective rank of few rows is too low: use at least 8 D rows.

Definitions at the edges: a zero vector counts as the direction (1, ..., 1)/sqrt(D), so embeddings that all became zero read
as collapsed; the effective rank of identical rows is 1; a skill is 0 where the baseline is exact, since nothing is left to
explain; the mean cosine of a single row, and the copy skill without a row to compare, are NaN. NaN or infinity in an input
gives NaN.

Legend: B batch, P patches, D width, n rows (B x P), all over all ranks where a sum has been reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, in place, and returns it."""

_CHUNK_ROWS = 8192  # rows that are held as float64 at a time
_EXACT = 1e-20  # below this, the error of a baseline is rounding
_RANKME_EPS = 1e-7  # arXiv 2210.02885, equation 3


@torch.no_grad()
def collapse_metrics(
    pred: Tensor, target: Tensor, current: Tensor, *, all_reduce: AllReduce | None = None, first_is_cls: bool = True
) -> dict[str, Tensor]:
    """Measure collapse of targets and predictions, and the skill of the prediction.

    Args:
        pred: ``[B, P, D]`` float; ``pred[:, i]`` predicts ``target[:, i]``.
        target: ``[B, P, D]`` float.
        current: ``[B, P, D]`` float; embedding at the position that predicts, which the copy baseline takes as its prediction.
        all_reduce: sums a tensor over ranks; None in one process. Every rank must call, and with the same D.
        first_is_cls: position 0 of ``current`` is the class token: left out of both cosines in the copy skill.

    Returns:
        0-d float64 tensors under their keys in the registry: ``embedding_*.target`` and ``embedding_*.pred`` for the mean
        cosine, the std ratio, the RMS, the effective rank and RankMe; ``prediction_cosine``, ``prediction_skill_const``,
        ``prediction_skill_copy``, ``prediction_variance_ratio`` and ``cross_image_cosine``. On CUDA the eigenvalue solver
        waits for the device; the loop calls :func:`collapse_gauges` and solves on the host.

    Raises:
        ValueError: the three shapes differ or are not ``[B, P, D]`` with at least one row.
    """
    gauges, spectra = collapse_gauges(pred, target, current, all_reduce=all_reduce, first_is_cls=first_is_cls)
    return gauges | spectral_metrics(spectra)


@torch.no_grad()
def collapse_gauges(
    pred: Tensor,
    target: Tensor,
    current: Tensor,
    *,
    pooled: Tensor | None = None,
    all_reduce: AllReduce | None = None,
    first_is_cls: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """:func:`collapse_metrics` up to the eigenvalues: nothing here waits for a device.

    Args:
        pooled: ``[B, D]`` float, one embedding of each image, described like the others (with the label ``pooled``).
        pred, target, current, all_reduce, first_is_cls: see there.

    Returns:
        The gauges without the ranks, and for each set of embeddings by its label ``[D + 1, D]`` float64: the covariance and,
        in the last row, the mean, for :func:`spectral_metrics`.

    Raises:
        ValueError: see there.
    """
    if pred.ndim != 3 or not pred.shape == target.shape == current.shape or not pred.numel():
        shapes = f"pred {tuple(pred.shape)}, target {tuple(target.shape)}, current {tuple(current.shape)}"
        raise ValueError(f"pred, target and current must share one shape [B, P, D] with at least one row; got {shapes}")
    sets = {"target": target.flatten(0, 1), "pred": pred.flatten(0, 1)} | ({} if pooled is None else {"pooled": pooled})
    moments = dict(zip(sets, _moments(list(sets.values()), all_reduce), strict=True))
    metrics: dict[str, Tensor] = {}
    for name, moment in moments.items():
        metrics |= {f"{key}.{name}": value for key, value in _describe(moment).items()}

    first = 1 if first_is_cls else 0
    pairs = ((pred, target), (pred[:, first:], target[:, first:]), (current[:, first:], target[:, first:]))
    sums = torch.stack([value for a, b in pairs for value in _error_sum(a, b)])
    error_sums, counts = reduce_sums([sums], all_reduce)[0].view(3, 2).unbind(1)
    error, error_compared, error_copy = (error_sums / counts).unbind()
    # With m = |mean of unit vectors|, the best constant's error 1 - m is (1 - m^2)/(1 + m), and 1 - m^2 is the variance.
    error_const = moments["target"].unit_variance.sum() / (1 + moments["target"].unit_mean.norm())
    metrics["prediction_cosine"] = 1 - error
    metrics["prediction_skill_const"] = _skill(error, error_const)
    metrics["prediction_skill_copy"] = _skill(error_compared, error_copy)
    metrics["prediction_variance_ratio"] = moments["pred"].unit_variance.sum() / moments["target"].unit_variance.sum()
    metrics["cross_image_cosine"] = _cross_image_cosine(pred, target, all_reduce)
    return metrics, {name: torch.cat([moment.covariance, moment.mean[None]]) for name, moment in moments.items()}


def spectral_metrics(spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Effective rank and RankMe from what :func:`collapse_gauges` gives; the slow part, on whatever device the tensors are.

    Returns:
        0-d float64 tensors ``embedding_effective_rank.*`` and ``embedding_rankme.*``.
    """
    metrics = {}
    for name, spectrum in spectra.items():
        covariance, mean = spectrum[:-1], spectrum[-1]
        metrics[f"embedding_effective_rank.{name}"] = _effective_rank(covariance)
        metrics[f"embedding_rankme.{name}"] = _effective_rank(covariance + torch.outer(mean, mean), _RANKME_EPS)
    return metrics


class _Moments(NamedTuple):
    """Of n rows, over all ranks, float64; "unit" is of the rows scaled to length 1. Variances divide by n."""

    num_rows: Tensor
    """[]"""
    mean: Tensor
    """[D]"""
    covariance: Tensor
    """[D, D]"""
    unit_mean: Tensor
    """[D]"""
    unit_variance: Tensor
    """[D]"""


def _moments(tensors: Sequence[Tensor], all_reduce: AllReduce | None) -> list[_Moments]:
    """Two passes over each ``[n, D]`` tensor: means, then centred second moments; one exchange after each."""
    sums = reduce_sums([part for x in tensors for part in _sums(x)], all_reduce)
    triples = zip(sums[0::3], sums[1::3], sums[2::3], strict=True)
    means = [(count, total / count, unit_total / count) for count, total, unit_total in triples]
    centred = [part for x, (_, mean, unit) in zip(tensors, means, strict=True) for part in _centred_sums(x, mean, unit)]
    squares = reduce_sums(centred, all_reduce)
    return [
        _Moments(count, mean, square / count, unit, unit_square / count)
        for (count, mean, unit), square, unit_square in zip(means, squares[0::2], squares[1::2], strict=True)
    ]


def _sums(x: Tensor) -> list[Tensor]:
    """Number of rows [], sum of rows [D], sum of unit rows [D]."""
    count = torch.full((), x.shape[0], dtype=torch.float64, device=x.device)
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    unit_total = torch.zeros_like(total)
    for rows in _chunks(x):
        total += rows.sum(0)
        unit_total += _unit(rows).sum(0)
    return [count, total, unit_total]


def _centred_sums(x: Tensor, mean: Tensor, unit_mean: Tensor) -> list[Tensor]:
    """Sum of outer products of centred rows [D, D], sum of squares of centred unit rows [D]."""
    outer = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    unit_square = torch.zeros_like(mean)
    for rows in _chunks(x):
        centred = rows - mean
        outer += centred.T @ centred
        unit_square += (_unit(rows) - unit_mean).square().sum(0)
    return [outer, unit_square]


def _error_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of 1 - cos (half the squared distance) over paired rows of two ``[B, P, D]`` tensors, and the number of pairs."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    for left, right in zip(_chunks(a), _chunks(b), strict=True):
        total += (_unit(left) - _unit(right)).square().sum() / 2
    return total, torch.full_like(total, a.shape[0])


def _describe(moment: _Moments) -> dict[str, Tensor]:
    # The mean cosine over pairs is (n |mu|^2 - 1)/(n - 1). With |mu|^2 = 1 - v, v the sum of variances, that is
    # 1 - v n/(n - 1), which keeps its digits near collapse.
    rows = moment.num_rows
    mean_cosine = torch.where(rows > 1, 1 - moment.unit_variance.sum() * rows / (rows - 1), torch.nan)
    return {
        "embedding_mean_cosine": mean_cosine,
        "embedding_std_ratio": moment.unit_variance.sqrt().mean() * moment.unit_variance.numel() ** 0.5,
        "embedding_rms": ((moment.covariance.trace() + moment.mean.square().sum()) / moment.mean.numel()).sqrt(),
    }


def _cross_image_cosine(pred: Tensor, target: Tensor, all_reduce: AllReduce | None) -> Tensor:
    """Mean cosine of a prediction with the target at its position in each other image, from sums over images alone."""
    positions = torch.zeros(2, *pred.shape[1:], dtype=torch.float64, device=pred.device)
    own = torch.zeros((), dtype=torch.float64, device=pred.device)
    images = max(1, _CHUNK_ROWS // pred.shape[1])
    for some_pred, some_target in zip(pred.split(images), target.split(images), strict=True):
        left, right = (_unit(part.double().flatten(0, 1)).view(part.shape) for part in (some_pred, some_target))
        positions += torch.stack([left.sum(0), right.sum(0)])
        own += (left * right).sum()
    count = torch.full_like(own, len(pred))
    positions, own, count = reduce_sums([positions, own, count], all_reduce)
    pairs = count * (count - 1) * pred.shape[1]
    return torch.where(pairs > 0, ((positions[0] * positions[1]).sum() - own) / pairs, torch.nan)


def _effective_rank(covariance: Tensor, eps: float = 0.0) -> Tensor:
    """exp(entropy) of the shares of singular values, each plus eps: roots of the eigenvalues of a matrix of second moments."""
    finite = covariance.isfinite().all()
    variances = torch.linalg.eigvalsh(torch.where(finite, covariance, 0.0))  # the solver raises on NaN
    # Rounding leaves eigenvalues of about eps x the largest where there should be none; their roots would add up.
    floor = variances.max() * variances.numel() * torch.finfo(variances.dtype).eps
    singular = torch.where(variances > floor, variances, 0.0).sqrt()
    share = singular / singular.sum()
    rank = torch.special.entr(share + eps).sum().exp()
    return torch.where(finite, torch.where(singular.sum() > 0, rank, 1.0), torch.nan)


def _skill(error: Tensor, baseline: Tensor) -> Tensor:
    """Share of the baseline's error that is gone: (cos - cos_b) / (1 - cos_b) = 1 - error / error_b."""
    return torch.where(baseline <= _EXACT, error * 0, 1 - error / baseline)


def _unit(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=1, keepdim=True)
    return torch.where(norm == 0, rows.shape[1] ** -0.5, rows / norm)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """Rows of ``[n, D]`` as float64, a few at a time to bound the memory."""
    for rows in torch.split(x, _CHUNK_ROWS):
        yield rows.double()


def reduce_sums(tensors: Sequence[Tensor], all_reduce: AllReduce | None) -> list[Tensor]:
    """Sum each tensor over ranks, all in one exchange."""
    if all_reduce is None:
        return list(tensors)
    flat = all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
