"""mIoU and its relatives, against numpy and against numbers counted by hand."""

from __future__ import annotations

import csv
import io
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nepa_dist.metrics.segmentation import ConfusionMatrix, SegmentationScores, scores_csv


def _scores(prediction: list[list[int]], target: list[list[int]], num_classes: int) -> SegmentationScores:
    confusion = ConfusionMatrix(num_classes)
    confusion.update(torch.tensor(prediction), torch.tensor(target))
    return confusion.scores()


def _reference(prediction: NDArray[np.int64], target: NDArray[np.int64], num_classes: int) -> tuple[float, float, float]:
    keep = target != 255
    ious, accs = [], []
    for c in range(num_classes):
        p, t = (prediction == c) & keep, (target == c) & keep
        if (p | t).any():
            ious.append((p & t).sum() / (p | t).sum())
        if t.any():
            accs.append((p & t).sum() / t.sum())
    return float(np.mean(ious)), float(np.mean(accs)), float((prediction == target)[keep].mean())


@settings(max_examples=50, deadline=None)
@given(num_classes=st.integers(1, 6), ignored=st.floats(0, 0.9), right=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_agrees_with_numpy(num_classes: int, ignored: float, right: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, target = rng.integers(0, num_classes, (2, 3, 5, 4))
    target = np.where(rng.random(target.shape) < right, prediction, target)
    target[rng.random(target.shape) < ignored] = 255
    target[0, 0, 0] = 0
    confusion = ConfusionMatrix(num_classes)
    for one, other in zip(prediction, target, strict=True):  # image by image, as small types
        confusion.update(torch.from_numpy(one.astype(np.uint8)), torch.from_numpy(other.astype(np.uint8)))
    scores = confusion.scores()
    assert (scores.miou, scores.macc, scores.aacc) == pytest.approx(_reference(prediction, target, num_classes))


def test_annotations_scored_against_themselves_are_perfect_whatever_stands_on_ignored_pixels() -> None:
    target = torch.arange(4 * 30 * 40).view(4, 30, 40) % 7
    prediction = target.clone()
    target[:, :5], prediction[:, :5] = 255, 99
    confusion = ConfusionMatrix(150)
    confusion.update(prediction, target)
    scores = confusion.scores()
    assert (scores.miou, scores.macc, scores.aacc) == (1.0, 1.0, 1.0)
    assert sum(scores.annotated) == 4 * 25 * 40


def test_a_shifted_copy_scores_what_it_does_by_hand() -> None:
    # Two halves; the prediction lies one column further right. Class 0: 4 of 6 pixels. Class 1: 2 of 4.
    scores = _scores([[0, 0, 0, 1], [0, 0, 0, 1]], [[0, 0, 1, 1], [0, 0, 1, 1]], 2)
    assert scores.iou == [pytest.approx(4 / 6), pytest.approx(2 / 4)]
    assert scores.acc == [1.0, pytest.approx(2 / 4)]
    assert scores.miou == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert scores.macc == pytest.approx(3 / 4)
    assert scores.aacc == pytest.approx(6 / 8)
    assert (scores.annotated, scores.predicted) == ([4, 4], [6, 2])


def test_a_class_that_is_only_predicted_lowers_miou_and_an_absent_one_does_not() -> None:
    scores = _scores([[0, 2]], [[0, 0]], 4)
    assert scores.iou[:3:2] == [0.5, 0.0]
    assert math.isnan(scores.iou[1])
    assert math.isnan(scores.iou[3])
    assert [math.isnan(share) for share in scores.acc] == [False, True, True, True]
    assert scores.miou == 0.25
    assert scores.macc == 0.5


def test_ranks_add_up_and_reading_changes_nothing() -> None:
    here, there, both = ConfusionMatrix(2), ConfusionMatrix(2), ConfusionMatrix(2)
    masks = torch.tensor([[0, 1, 1], [1, 1, 0]]), torch.tensor([[0, 0, 1], [1, 255, 1]])
    here.update(masks[0][0], masks[1][0])
    there.update(masks[0][1], masks[1][1])
    both.update(*masks)
    for _ in range(2):
        assert here.scores(lambda counts: counts.add_(there.matrix)) == both.scores()
    assert here.matrix.sum() == 3


@pytest.mark.parametrize("where", ["annotation", "prediction"])
def test_a_value_that_is_no_class_is_named_and_nothing_is_counted(where: str) -> None:
    good, bad = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[150, 0, 150], [-1, 149, 1]])
    confusion = ConfusionMatrix(150)
    expected = f"the {where} has values outside [0, 150): -1 (1 pixels), 150 (2 pixels);"
    with pytest.raises(ValueError, match=re.escape(expected)):
        confusion.update(*((good, bad) if where == "annotation" else (bad, good)))
    assert not confusion.matrix.any()


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="none of them: got 300, 255"):
        ConfusionMatrix(300)
    confusion = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=r"shape \[2, 3\], the annotation \[3, 2\]"):
        confusion.update(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))
    confusion.update(torch.zeros(2, dtype=torch.long), torch.full((2,), 255))
    with pytest.raises(ValueError, match="nothing to score"):
        confusion.scores()


def test_tables_show_every_class() -> None:
    scores = _scores([[0, 0, 1, 0]], [[0, 0, 1, 1]], 3)
    names = ["wall, brick", "a|b", "sky"]
    rows = list(csv.DictReader(io.StringIO(scores_csv(scores, names))))
    assert [row["name"] for row in rows] == names
    assert [row["iou"] for row in rows] == ["0.666667", "0.500000", ""]
    assert [row["annotated_pixels"] for row in rows] == ["2", "2", "0"]
    assert [row["predicted_pixels"] for row in rows] == ["3", "1", "0"]
    with pytest.raises(ValueError, match="1 names for 3 classes"):
        scores_csv(scores, ["wall"])
