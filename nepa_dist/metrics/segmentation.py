"""How well predicted masks fit annotated ones: intersection over union and pixel accuracy, per class and as means.

All pixels of a data set go into one matrix of counts before anything is divided, so the result does not depend on batches,
ranks or their order. As in MMSegmentation, a mean leaves out the classes for which its ratio is 0 / 0:

- IoU, pixels in annotation and prediction over pixels in either: left out where neither has the class. A class that is only
  predicted counts with 0.
- Accuracy, the share of annotated pixels that are predicted right: left out where the class is not annotated.

Legend: C classes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nepa_dist.metrics.collapse import AllReduce

_COLUMNS = ("class", "name", "iou", "accuracy", "annotated_pixels", "predicted_pixels")


class SegmentationScores(NamedTuple):
    """Shares in [0, 1]; NaN for a class whose ratio is 0 / 0. Lists have one entry per class."""

    miou: float
    """Mean of ``iou`` without NaN."""
    macc: float
    """Mean of ``acc`` without NaN."""
    aacc: float
    """Share of all annotated pixels that are predicted right."""
    iou: list[float]
    acc: list[float]
    annotated: list[int]
    """Pixels with this class in the annotation."""
    predicted: list[int]
    """Pixels with this class in the prediction, among those that are annotated at all."""


class ConfusionMatrix:
    """Counts of pixels by annotated and predicted class.

    Args:
        num_classes: C.
        ignore: annotated value of pixels that do not count; no class may have it.
        device: where predictions and targets are, and the counts.

    Raises:
        ValueError: there is no class, or ``ignore`` is in [0, C).
    """

    matrix: Tensor
    """int64 [C, C], row annotated, column predicted."""

    def __init__(self, num_classes: int, ignore: int = 255, device: torch.device | str = "cpu") -> None:
        if num_classes < 1 or 0 <= ignore < num_classes:
            raise ValueError(f"need at least one class, and an ignored value that is none of them: got {num_classes}, {ignore}")
        self.num_classes, self.ignore = num_classes, ignore
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count the pixels of some masks.

        Args:
            prediction: [..., H, W] integer, in [0, C) wherever the target is not ``ignore``.
            target: same shape, integer, in [0, C) or ``ignore``.

        Raises:
            ValueError: the shapes differ, or a value is no class. Nothing is counted then.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"the prediction has shape {list(prediction.shape)}, the annotation {list(target.shape)}")
        keep = target != self.ignore
        annotated, predicted = target[keep].long(), prediction[keep].long()
        self._check(
            "the annotation", annotated, f"only {self.ignore} is ignored; check num_classes and how the masks are numbered"
        )
        self._check("the prediction", predicted, "does the model have as many classes as num_classes says?")
        counts = torch.bincount(annotated * self.num_classes + predicted, minlength=self.num_classes**2)
        self.matrix += counts.view_as(self.matrix)

    def _check(self, what: str, labels: Tensor, hint: str) -> None:
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong) == 0:
            return
        values, counts = wrong.unique(return_counts=True)
        found = [f"{value} ({count} pixels)" for value, count in zip(values.tolist(), counts.tolist(), strict=True)]
        shown = ", ".join(found[:10]) + (f" and {len(found) - 10} other values" if len(found) > 10 else "")
        raise ValueError(f"{what} has values outside [0, {self.num_classes}): {shown}; {hint}")

    def scores(self, all_reduce: AllReduce | None = None) -> SegmentationScores:
        """Compute the scores of everything counted so far. The counts stay as they are.

        Args:
            all_reduce: sums a tensor over ranks; None in one process. Every rank must call.

        Raises:
            ValueError: no pixel has been counted.
        """
        total = (self.matrix if all_reduce is None else all_reduce(self.matrix.clone())).cpu()
        if not total.any():
            raise ValueError("there is nothing to score: no annotated pixel has been counted")
        right, annotated, predicted = total.diagonal(), total.sum(1), total.sum(0)
        iou = right.double() / (annotated + predicted - right)
        acc = right.double() / annotated
        return SegmentationScores(
            miou=float(iou.nanmean()),
            macc=float(acc.nanmean()),
            aacc=float(right.sum().double() / annotated.sum()),
            iou=iou.tolist(),
            acc=acc.tolist(),
            annotated=annotated.tolist(),
            predicted=predicted.tolist(),
        )


def scores_csv(scores: SegmentationScores, names: Sequence[str] | None = None) -> str:
    """The scores of each class as CSV with a header; a share that is NaN is an empty field.

    Args:
        scores: to show.
        names: of the classes, in order.

    Raises:
        ValueError: there are not as many names as classes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(scores, names))
    return text.getvalue()


def _rows(scores: SegmentationScores, names: Sequence[str] | None) -> Iterator[list[str]]:
    if names is None:
        names = [""] * len(scores.iou)
    if len(names) != len(scores.iou):
        raise ValueError(f"{len(names)} names for {len(scores.iou)} classes")

    def share(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.6f}"

    for index, (name, iou, acc, annotated, predicted) in enumerate(
        zip(names, scores.iou, scores.acc, scores.annotated, scores.predicted, strict=True)
    ):
        yield [str(index), name, share(iou), share(acc), str(annotated), str(predicted)]
