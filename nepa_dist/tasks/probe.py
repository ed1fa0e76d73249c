"""How much the features of a frozen backbone know about the labels: three probes, per layer.

The protocol, the same for every layer, model and run:

- The backbone is frozen and in evaluation mode, in fp32. Images are resized and centre-cropped, not augmented.
- k-NN and linear see one vector per image: the mean of the patch tokens, the last token, or CLS. Attentive sees all patch
  tokens (:mod:`nepa_dist.tasks.attentive`).
- k-NN: the mean of the training features is subtracted (it would make all angles small), then the k nearest by cosine vote
  with weight exp(cosine / 0.07) (arXiv 1805.01978 section 3.4, as DINO does); a tie goes to the smallest label.
- Linear: each channel is standardised with the mean and deviation of the training features, then multinomial logistic
  regression with an L2 penalty, C = 0.1 (scikit-learn's scale: the penalty is |W|^2 / 2C beside the *sum* of the losses, none
  on the bias). The problem has one optimum; L-BFGS from zero stops where no partial derivative of the mean loss is above 1e-4,
  or after 1000 iterations.
- Nothing is tuned on the test split. Reported is top-1 accuracy on it.

What to expect: the paper's own linear probe of the last layer of NEPA-B on ImageNet is poor, 11.3 % from the last token and
14.1 % from the mean (arXiv 2512.16922, Table 6), because the output predicts patch embeddings. Look at the middle layers.

Legend: D width, C classes, n images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_dist.tasks.attentive import ATTENTIVE_EPOCHS, ImageSource, attentive_accuracy
from nepa_dist.tasks.features import Array, Layer, Pooling, check_labels, check_layers, extract_features

if TYPE_CHECKING:
    from nepa_dist.model import VisionTransformer

Probe = Literal["knn", "linear", "attentive"]

PROBES: tuple[Probe, ...] = ("knn", "linear", "attentive")
KNN_TEMPERATURE = 0.07
LINEAR_MAX_ITER = 1000
LINEAR_TOLERANCE = 1e-4
CHUNK_BYTES = 1 << 28
"""Largest intermediate result of k-NN and linear, bytes."""

_CPU = torch.device("cpu")


class ProbeRow(NamedTuple):
    """The result for one layer."""

    layer: Layer
    pooling: Pooling
    """Of k-NN and linear."""
    top1: dict[str, float]
    """Accuracy in [0, 1] by probe: ``knn_10``, ``knn_20``, ..., ``linear``, ``attentive``."""
    converged: bool = True
    """Whether the linear classifier reached its tolerance within the iterations."""


def probe_layers(
    backbone: VisionTransformer,
    train: ImageSource,
    test: ImageSource,
    *,
    layers: Sequence[Layer],
    probes: Sequence[Probe] = ("knn", "linear"),
    pooling: Pooling = "mean",
    causal: bool = True,
    ks: Sequence[int] = (10, 20),
    C: float = 0.1,
    epochs: int = ATTENTIVE_EPOCHS,
    seed: int = 0,
    cache_bytes: int = 0,
) -> list[ProbeRow]:
    """Run probes on each layer. Warns (``RuntimeWarning``) for each linear probe that did not converge.

    Args:
        backbone: its device does the work, also that of the probes.
        train: what the probes learn from.
        test: what they are judged on.
        layers: in the order of the result; see :func:`nepa_dist.tasks.features.extract_features`.
        probes: which of them.
        pooling: how tokens become one vector, for k-NN and linear.
        causal: how the backbone attends.
        ks: numbers of neighbours.
        C: inverse strength of the linear probe's penalty.
        epochs, seed, cache_bytes: of the attentive probe, see :func:`nepa_dist.tasks.attentive.attentive_accuracy`.

    Raises:
        ValueError: as for the functions that do the work; a feature's error names the layer.
    """
    check_layers(layers)
    device = next(backbone.parameters()).device
    rows = {layer: ProbeRow(layer, pooling, {}) for layer in layers}
    if "knn" in probes or "linear" in probes:
        train_x, train_y = extract_features(backbone, train.batches(), layers=layers, pooling=pooling, causal=causal)
        test_x, test_y = extract_features(backbone, test.batches(), layers=layers, pooling=pooling, causal=causal)
        for layer in list(train_x):
            data = (train_x.pop(layer), train_y, test_x.pop(layer), test_y)
            try:
                if "knn" in probes:
                    found = knn_accuracy(*data, ks=ks, device=device)
                    rows[layer].top1.update({f"knn_{k}": value for k, value in found.items()})
                if "linear" in probes:
                    rows[layer].top1["linear"], converged = linear_accuracy(*data, C=C, device=device)
                    rows[layer] = rows[layer]._replace(converged=converged)
            except ValueError as error:
                raise ValueError(f"probe of layer {layer}: {error}") from error
            if not rows[layer].converged:
                what = f"the linear probe of layer {layer} did not converge in {LINEAR_MAX_ITER} iterations"
                warnings.warn(f"{what}; a smaller C converges sooner", RuntimeWarning, stacklevel=2)
    if "attentive" in probes:
        accuracies = attentive_accuracy(
            backbone, train, test, layers=layers, causal=causal, epochs=epochs, seed=seed, cache_bytes=cache_bytes
        )
        for layer, accuracy in accuracies.items():
            rows[layer].top1["attentive"] = accuracy
    return list(rows.values())


def knn_accuracy(
    train_x: Array, train_y: Array, test_x: Array, test_y: Array, *, ks: Sequence[int] = (10, 20), device: torch.device = _CPU
) -> dict[int, float]:
    """Classify each test image by its nearest training images; the protocol is in the module's docstring.

    Args:
        train_x: features [n_train, D].
        train_y: labels [n_train].
        test_x: features [n_test, D].
        test_y: labels [n_test].
        ks: numbers of neighbours.
        device: does the work.

    Returns:
        Top-1 accuracy in [0, 1] by k.

    Raises:
        ValueError: labels are missing, there are fewer than two classes to learn, shapes do not fit, a feature is not finite,
            or a k is not between 1 and n_train.
    """
    _check_data(train_x, train_y, test_x, test_y)
    for k in ks:
        if not 1 <= k <= len(train_x):
            raise ValueError(
                f"k = {k} neighbours were asked for, but there are {len(train_x)} training images; give k from 1 to that"
            )
    train, test = (torch.from_numpy(x).to(device) for x in (train_x, test_x))
    mean, _ = _moments(train)
    train, test = train - mean, test - mean
    for x in (train, test):
        x.div_(x.norm(dim=1, keepdim=True).clamp_min_(1e-12))
    classes, indices = np.unique(train_y, return_inverse=True)
    labels, truth = torch.from_numpy(indices).to(device), torch.from_numpy(test_y)
    most = max(ks)
    rows = min(_rows_per_chunk(len(train)), _rows_per_chunk(4 * most * len(classes)))
    correct = dict.fromkeys(ks, 0)
    for part, expected in zip(test.split(rows), truth.split(rows), strict=True):
        cosine, nearest = (part @ train.T).topk(most)
        # Not scatter_add: its order of additions, and so a tie, would be random on a GPU.
        votes = F.one_hot(labels[nearest], len(classes)) * (cosine / KNN_TEMPERATURE).exp()[:, :, None]
        for k in ks:
            winner = votes[:, :k].sum(dim=1).argmax(dim=1).cpu()
            correct[k] += int((torch.from_numpy(classes)[winner] == expected).sum())
    return {k: count / len(test) for k, count in correct.items()}


def linear_accuracy(
    train_x: Array, train_y: Array, test_x: Array, test_y: Array, *, C: float = 0.1, device: torch.device = _CPU
) -> tuple[float, bool]:
    """Classify with a linear layer on standardised features; the protocol is in the module's docstring.

    Args:
        train_x: features [n_train, D].
        train_y: labels [n_train].
        test_x: features [n_test, D].
        test_y: labels [n_test].
        C: inverse strength of the penalty, positive.
        device: does the work.

    Returns:
        Top-1 accuracy in [0, 1], and whether the fit converged: if not, it is not yet that of the protocol.

    Raises:
        ValueError: labels are missing, there are fewer than two classes to learn, shapes do not fit, or a feature is not
            finite.
    """
    _check_data(train_x, train_y, test_x, test_y)
    train, test = (torch.from_numpy(x).to(device) for x in (train_x, test_x))
    mean, std = _moments(train)
    std[std <= 1e-6 * mean.abs()] = 1.0  # a constant channel becomes 0, not its rounding error
    train, test = (x.sub(mean).div_(std) for x in (train, test))
    classes, indices = np.unique(train_y, return_inverse=True)
    weight, bias, converged = _minimise(train, torch.from_numpy(indices).to(device), len(classes), C)
    predicted = torch.cat([(part @ weight + bias).argmax(dim=1) for part in test.split(_rows_per_chunk(len(classes)))])
    return float((classes[predicted.cpu().numpy()] == test_y).mean()), converged


def _minimise(x: Tensor, y: Tensor, num_classes: int, C: float) -> tuple[Tensor, Tensor, bool]:
    """Weight [D, C] and bias [C] of the logistic regression, and whether L-BFGS converged.

    The loss is summed over parts of the data, so that the logits of all images need not be in memory at once.
    """
    n, rows = len(x), _rows_per_chunk(num_classes)
    weight = torch.zeros(x.shape[1], num_classes, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)

    def loss() -> Tensor:
        optimizer.zero_grad()
        # Sums in fp64: near the optimum the line search compares losses that differ by less than fp32 can tell.
        value = weight.double().square().sum() / (2 * C * n)
        value.backward()
        total = value.detach()
        for part, target in zip(x.split(rows), y.split(rows), strict=True):
            value = F.cross_entropy(torch.addmm(bias, part, weight), target, reduction="none").double().sum() / n
            value.backward()
            total = total + value.detach()
        return total

    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=LINEAR_MAX_ITER,
        tolerance_grad=LINEAR_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss)
    loss()
    assert weight.grad is not None
    assert bias.grad is not None
    slope = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    return weight.detach(), bias.detach(), slope <= LINEAR_TOLERANCE


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of features [n, D], summed in fp64, part by part."""
    parts = x.split(_rows_per_chunk(2 * x.shape[1]))
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(x)
    square = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts]).sum(dim=0) / len(x)
    return mean.float(), square.sqrt().float()


def _rows_per_chunk(width: int) -> int:
    """Rows of fp32 numbers that fit in a chunk."""
    return max(1, CHUNK_BYTES // 4 // width)


def _check_data(train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> None:
    """Raise ValueError unless features [n, D] and labels [n] can be probed."""
    for split, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(x) or x.shape[1] != train_x.shape[1]:
            raise ValueError(f"the {split} features {x.shape} and labels {y.shape} must be [n, D] and [n], n > 0, with one D")
        if not np.isfinite(x).all():
            raise ValueError(f"{int((~np.isfinite(x)).any(axis=1).sum())} of {len(x)} {split} features are not finite")
        check_labels(split, y)
    if len(np.unique(train_y)) < 2:
        raise ValueError(f"all {len(train_y)} training images are of class {train_y[0]}; a probe needs at least two classes")
