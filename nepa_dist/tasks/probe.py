"""How much the features of a frozen backbone know about the labels: k nearest neighbours and a linear classifier, per layer.

The protocol, the same for every layer, model and run:

- The backbone is frozen and in eval mode. Images are resized and centre-cropped, not augmented; one pass gives all layers.
- A feature is one vector per image: the mean of the patch tokens, the last token, or CLS. ``embed`` is the input of the
  blocks (raw patch embeddings), a number is the output of that block, ``final`` is the output of the last LayerNorm.
- k-NN: the mean of the training features is subtracted (it would make all angles small), then cosine distance, k = 20,
  one vote per neighbour; a tie goes to the smallest label.
- Linear: each channel is standardised with the mean and deviation of the training features, then multinomial logistic
  regression with an L2 penalty, C = 0.1 (scikit-learn's scale: the penalty is |W|^2 / 2C beside the *sum* of the losses),
  L-BFGS, at most 1000 iterations. Nothing is tuned on the test split.
- Reported is top-1 accuracy on the test split.

What to expect: the paper's own linear probe of the last layer of NEPA-B on ImageNet is poor, 11.3 % from the last token and
14.1 % from the mean (arXiv 2512.16922, Table 6), because the output predicts patch embeddings. Look at the middle layers.

Legend: B batch, T tokens (CLS first), D width, n images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from nepa_dist.model import Features, VisionTransformer

Layer = int | Literal["embed", "final"]
Pooling = Literal["mean", "last", "cls"]
Array = NDArray[Any]

LINEAR_MAX_ITER = 1000


class ProbeRow(NamedTuple):
    """The result for one layer."""

    layer: Layer
    pooling: Pooling
    knn: float
    """Top-1 in [0, 1]."""
    linear: float
    """Top-1 in [0, 1]."""
    converged: bool
    """Whether the linear classifier reached its tolerance within the iterations."""


@torch.inference_mode()
def extract_features(
    backbone: VisionTransformer,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    layers: Sequence[Layer],
    pooling: Pooling = "mean",
    causal: bool = True,
) -> tuple[dict[Layer, NDArray[np.float32]], NDArray[np.int64]]:
    """Run the frozen backbone once and keep one vector per image and layer.

    Args:
        backbone: used in eval mode; the mode of each of its modules is restored after.
        batches: ``images`` [B, 3, H, W] float, normalised; ``labels`` [B].
        layers: ``embed``, ``final``, or indices of blocks (negative ones count from the end).
        pooling: ``mean`` of the patch tokens, ``last`` token, or ``cls``.
        causal: whether a token sees only itself and earlier ones, as in pretraining.

    Returns:
        Features [n, D] by layer, and labels [n].

    Raises:
        ValueError: no or unknown layers, unknown pooling, no batches, or CLS is asked for where it has not seen the image.
    """
    _check_request(layers, pooling, causal)
    device = next(backbone.parameters()).device
    taps = [layer for layer in dict.fromkeys(layers) if isinstance(layer, int)]
    features: dict[Layer, list[Array]] = {layer: [] for layer in layers}
    labels: list[Array] = []
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        for batch in batches:
            out = backbone(batch["images"].to(device), causal=causal, taps=taps)
            for layer, parts in features.items():
                parts.append(_pool(_tokens(out, layer), pooling).float().cpu().numpy())
            labels.append(batch["labels"].cpu().numpy().astype(np.int64))
    finally:
        for module, training in modes:
            module.training = training
    if not labels:
        raise ValueError("there are no batches to extract features from: the data is empty")
    return {layer: np.concatenate(parts) for layer, parts in features.items()}, np.concatenate(labels)


def knn_accuracy(train_x: Array, train_y: Array, test_x: Array, test_y: Array, *, k: int = 20) -> float:
    """Classify each test image by its nearest training images; the protocol is in the module's docstring.

    Args:
        train_x: features [n_train, D].
        train_y: labels [n_train].
        test_x: features [n_test, D].
        test_y: labels [n_test].
        k: number of neighbours.

    Returns:
        Top-1 accuracy in [0, 1].

    Raises:
        ValueError: labels are missing, there are fewer than two classes to learn, shapes do not fit, a feature is not finite,
            or k is not between 1 and n_train.
    """
    from sklearn.neighbors import KNeighborsClassifier

    _check_data(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(train_x):
        raise ValueError(
            f"k = {k} neighbours were asked for, but there are {len(train_x)} training images; give k from 1 to that"
        )
    mean = train_x.mean(axis=0, dtype=np.float64).astype(np.float32)
    classifier = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute", weights="uniform")
    classifier.fit(train_x - mean, train_y)
    return float((classifier.predict(test_x - mean) == test_y).mean())


def linear_accuracy(train_x: Array, train_y: Array, test_x: Array, test_y: Array, *, C: float = 0.1) -> float:
    """Classify with a linear layer on standardised features; the protocol is in the module's docstring.

    Warns (``RuntimeWarning``) if the classifier did not converge: the accuracy is then a lower bound of the protocol's.

    Args:
        train_x: features [n_train, D].
        train_y: labels [n_train].
        test_x: features [n_test, D].
        test_y: labels [n_test].
        C: inverse strength of the penalty, positive.

    Returns:
        Top-1 accuracy in [0, 1].

    Raises:
        ValueError: labels are missing, there are fewer than two classes to learn, shapes do not fit, or a feature is not
            finite.
    """
    accuracy, converged = _fit_linear(train_x, train_y, test_x, test_y, C)
    if not converged:
        warnings.warn(_not_converged("the linear probe"), RuntimeWarning, stacklevel=2)
    return accuracy


def probe_layers(
    backbone: VisionTransformer,
    train_batches: Iterable[Mapping[str, Tensor]],
    test_batches: Iterable[Mapping[str, Tensor]],
    *,
    layers: Sequence[Layer],
    pooling: Pooling = "mean",
    causal: bool = True,
    k: int = 20,
    C: float = 0.1,
) -> list[ProbeRow]:
    """Run both probes on each layer. Warns (``RuntimeWarning``) for each linear probe that did not converge.

    Args:
        backbone: see :func:`extract_features`, also for the batches, layers, pooling and causal.
        train_batches: what the probes learn from.
        test_batches: what they are judged on.
        layers: in the order of the result.
        pooling: how tokens become one vector.
        causal: how the backbone attends.
        k: neighbours.
        C: inverse strength of the linear probe's penalty.

    Raises:
        ValueError: as for the functions that do the work; a feature's error names the layer.
    """
    train_x, train_y = extract_features(backbone, train_batches, layers=layers, pooling=pooling, causal=causal)
    test_x, test_y = extract_features(backbone, test_batches, layers=layers, pooling=pooling, causal=causal)
    rows = []
    for layer in train_x:
        data = (train_x[layer], train_y, test_x[layer], test_y)
        try:
            knn = knn_accuracy(*data, k=k)
            linear, converged = _fit_linear(*data, C)
        except ValueError as error:
            raise ValueError(f"probe of layer {layer}: {error}") from error
        if not converged:
            warnings.warn(_not_converged(f"the linear probe of layer {layer}"), RuntimeWarning, stacklevel=2)
        rows.append(ProbeRow(layer, pooling, knn, linear, converged))
    return rows


def _check_request(layers: Sequence[Layer], pooling: Pooling, causal: bool) -> None:
    if not layers:
        raise ValueError("there are no layers to probe; give 'embed', 'final' or indices of blocks")
    for layer in layers:
        if not isinstance(layer, int) and layer not in ("embed", "final"):
            raise ValueError(f"layer {layer!r} is neither 'embed', 'final' nor the index of a block")
    if pooling not in ("mean", "last", "cls"):
        raise ValueError(f"pooling {pooling!r} is none of 'mean', 'last', 'cls'")
    if pooling == "cls" and (causal or "embed" in layers):
        where = "with causal attention" if causal else "in layer 'embed'"
        raise ValueError(f"pooling 'cls' {where} gives every image the same feature: CLS comes first and has seen no patch")


def _tokens(out: Features, layer: Layer) -> Tensor:
    """Tokens [B, T, D] of a layer."""
    if layer == "embed":
        return out.embed
    return out.hidden if layer == "final" else out.taps[layer]


def _pool(tokens: Tensor, pooling: Pooling) -> Tensor:
    """Tokens [B, T, D] to one vector [B, D]."""
    if pooling == "mean":
        return tokens[:, 1:].float().mean(dim=1)
    return tokens[:, -1] if pooling == "last" else tokens[:, 0]


def _fit_linear(train_x: Array, train_y: Array, test_x: Array, test_y: Array, C: float) -> tuple[float, bool]:
    """Top-1 accuracy, and whether the fit converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    _check_data(train_x, train_y, test_x, test_y)
    scaler = StandardScaler().fit(train_x)
    classifier = LogisticRegression(C=C, solver="lbfgs", max_iter=LINEAR_MAX_ITER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classifier.fit(scaler.transform(train_x), train_y)
    converged = True
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            converged = False  # the caller says so in its own words
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return float((classifier.predict(scaler.transform(test_x)) == test_y).mean()), converged


def _not_converged(what: str) -> str:
    return (
        f"{what} did not converge in {LINEAR_MAX_ITER} iterations: its accuracy is a lower bound; a smaller C converges sooner"
    )


def _check_data(train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> None:
    for split, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(x) or x.shape[1] != train_x.shape[1]:
            raise ValueError(f"the {split} features {x.shape} and labels {y.shape} must be [n, D] and [n], n > 0, with one D")
        if not np.isfinite(x).all():
            raise ValueError(f"{int((~np.isfinite(x)).any(axis=1).sum())} of {len(x)} {split} features are not finite")
        if (unlabelled := int((y < 0).sum())) == len(y):
            raise ValueError(f"the {split} data has no labels; a probe needs data with classes")
        if unlabelled:
            raise ValueError(f"{unlabelled} of {len(y)} {split} images have no label")
    if len(np.unique(train_y)) < 2:
        raise ValueError(f"all {len(train_y)} training images are of class {train_y[0]}; a probe needs at least two classes")
