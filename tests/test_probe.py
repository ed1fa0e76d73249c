"""Probes: features come from the layer that was asked for, and accuracies say what the features know."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nepa_dist.tasks import probe
from nepa_dist.tasks.features import Array, extract_features
from nepa_dist.tasks.probe import knn_accuracy, linear_accuracy, probe_layers

CLASSES = 4


class FakeFeatures(NamedTuple):
    embed: Tensor
    hidden: Tensor
    taps: dict[int, Tensor]


class FakeBackbone(nn.Module):
    """Tokens are the columns of the image; block i adds i + 1, training mode adds noise, the end forgets the image."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Dropout(0.5).eval()
        self.calls: list[tuple[bool, tuple[int, ...]]] = []

    def forward(self, images: Tensor, *, causal: bool, taps: tuple[int, ...] = ()) -> FakeFeatures:
        self.calls.append((causal, tuple(taps)))
        embed = torch.cat([torch.zeros(len(images), 1, images.shape[1]), images[:, :, 0].transpose(1, 2)], dim=1) + self.anchor
        if self.training:
            embed = embed + torch.randn_like(embed) * 100
        return FakeFeatures(embed, torch.zeros_like(embed), {tap: (embed + tap + 1).bfloat16() for tap in taps})


def make_backbone() -> Any:
    return FakeBackbone()


def make_batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Images [B, 3, 1, 5] whose mean colour tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    colours = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, -1.0, 0.0]])[labels]
    images = colours[:, :, None, None] + 0.2 * torch.randn(count, 3, 1, 5, generator=generator)
    return [{"images": i, "labels": y} for i, y in zip(images.split(16), labels.split(16), strict=True)]


class Source:
    """What probes learn from: batches in order."""

    def __init__(self, count: int, seed: int) -> None:
        self.data = make_batches(count, seed)

    def __len__(self) -> int:
        return sum(len(batch["labels"]) for batch in self.data)

    def batches(self, order: Any = None, *, batch_size: Any = None) -> list[dict[str, Tensor]]:
        assert order is None
        return self.data


def knn_20(*data: Array) -> float:
    return knn_accuracy(*data, ks=(20,))[20]


def linear_top1(*data: Array, **options: float) -> float:
    return linear_accuracy(*data, **options)[0]


def make_arrays(count: int, seed: int, *, spread: float = 0.1, dim: int = 8) -> tuple[Array, Array]:
    """Features around one centre per class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    centres = np.eye(CLASSES, dim)
    return (centres[labels] + spread * rng.standard_normal((count, dim))).astype(np.float32), labels


def test_features_are_those_of_the_layer() -> None:
    batches = make_batches(40, 0)
    images = torch.cat([batch["images"] for batch in batches])
    tokens = images[:, :, 0].transpose(1, 2)  # [n, 5, 3]
    backbone = make_backbone()
    features, labels = extract_features(
        backbone, iter(batches), layers=["embed", 2, "final", 0, 2], pooling="mean", causal=True
    )
    assert list(features) == ["embed", 2, "final", 0]
    assert backbone.calls == [(True, (2, 0))] * 3, "one pass for all layers"
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % CLASSES for i in range(40)]
    assert all(x.dtype == np.float32 and x.shape == (40, 3) for x in features.values())
    np.testing.assert_allclose(features["embed"], tokens.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features[2], tokens.mean(1) + 3, atol=0.02)
    np.testing.assert_array_equal(features["final"], np.zeros((40, 3)))
    last, _ = extract_features(backbone, batches, layers=["embed"], pooling="last", causal=False)
    np.testing.assert_array_equal(last["embed"], tokens[:, -1])
    cls, _ = extract_features(backbone, batches, layers=[1], pooling="cls", causal=False)
    np.testing.assert_array_equal(cls[1], np.full((40, 3), 2))


def test_modes_are_restored_even_after_an_error() -> None:
    backbone = make_backbone()
    backbone.train()
    backbone.frozen.eval()
    extract_features(backbone, make_batches(16, 0), layers=["embed"])
    assert backbone.training
    assert not backbone.frozen.training
    with pytest.raises(KeyError):
        extract_features(backbone, [{"images": torch.zeros(1, 3, 1, 5)}], layers=["embed"])
    assert backbone.training


@pytest.mark.parametrize(
    ("layers", "pooling", "causal", "message"),
    [
        ([], "mean", True, "no layers"),
        (["middle"], "mean", True, "'middle' is neither"),
        ([0], "max", True, "pooling 'max'"),
        ([0], "cls", True, "with causal attention gives every image the same"),
        ([0, "embed"], "cls", False, "in layer 'embed' gives every image the same"),
    ],
)
def test_requests_without_meaning_are_refused(layers: Any, pooling: Any, causal: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(make_backbone(), make_batches(16, 0), layers=layers, pooling=pooling, causal=causal)


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="no batches"):
        extract_features(make_backbone(), [], layers=["embed"])


def test_separate_classes_are_found_and_noise_is_chance() -> None:
    train, test = make_arrays(200, 0), make_arrays(100, 1)
    assert knn_accuracy(*train, *test) == {10: 1.0, 20: 1.0}
    assert linear_top1(*train, *test) == 1.0
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((200, 8)).astype(np.float32), rng.standard_normal((100, 8)).astype(np.float32)
    for accuracy in (knn_20, linear_top1):
        assert accuracy(noise[0], train[1], noise[1], test[1]) < 0.5
    same = np.ones((200, 8), np.float32), np.ones((100, 8), np.float32)
    for accuracy in (knn_20, linear_top1):
        assert accuracy(same[0], train[1], same[1], test[1]) == 0.25


def test_knn_looks_at_angles_from_the_mean() -> None:
    (train_x, train_y), (test_x, test_y) = make_arrays(200, 0, spread=0.4), make_arrays(100, 1, spread=0.4)
    accuracy = knn_20(train_x, train_y, test_x, test_y)
    assert 0.5 < accuracy < 1.0
    assert knn_20(train_x + 50, train_y, test_x + 50, test_y) == pytest.approx(accuracy, abs=0.02)
    assert knn_20(train_x * 1000, train_y, test_x * 1000, test_y) == pytest.approx(accuracy, abs=0.02)


def test_near_neighbours_weigh_more_than_many() -> None:
    angles = np.radians([10.0, 14.0, 14.0])
    rows = [[np.cos(angle), np.sin(angle)] for angle in angles]
    train_x = np.array([*rows, *(-np.array(rows))], np.float32)  # mean 0
    train_y = np.array([1, 0, 0, 2, 2, 2])
    test = np.array([[2.0, 0.0]], np.float32), np.array([1])
    assert knn_accuracy(train_x, train_y, *test, ks=(1, 2, 3)) == {1: 1.0, 2: 1.0, 3: 0.0}, (
        "two at 14 degrees outweigh one at 10"
    )
    train_x[[1, 2, 4, 5]] = [[0.7, 0.7], [0.7, 0.7], [-0.7, -0.7], [-0.7, -0.7]]
    assert knn_accuracy(train_x, train_y, *test, ks=(3,)) == {3: 1.0}, "but not two at 45 degrees"


@pytest.mark.parametrize("chunk", [1, 5000, 1 << 28])
def test_numbers_are_those_of_scikit_learn(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setattr(probe, "CHUNK_BYTES", chunk)
    (train_x, train_y), (test_x, test_y) = make_arrays(300, 0, spread=0.5), make_arrays(200, 1, spread=0.5)
    train_y, test_y = train_y * 3 + 2, test_y * 3 + 2  # labels need not be 0 .. C - 1
    mean = train_x.mean(axis=0)
    for k in (1, 7, 20):
        neighbours = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = neighbours.fit(train_x - mean, train_y).score(test_x - mean, test_y)
        assert knn_accuracy(train_x, train_y, test_x, test_y, ks=(k,))[k] == expected
    scaler = StandardScaler().fit(train_x)
    for C in (0.001, 0.1):
        regression = LogisticRegression(C=C, tol=1e-5).fit(scaler.transform(train_x), train_y)
        expected = regression.score(scaler.transform(test_x), test_y)
        assert linear_top1(train_x, train_y, test_x, test_y, C=C) == pytest.approx(expected, abs=0.006)


def test_linear_uses_every_channel_whatever_its_scale() -> None:
    (train_x, train_y), (test_x, test_y) = make_arrays(200, 0), make_arrays(100, 1)
    scale = np.float32(10.0) ** np.arange(-4, 4, dtype=np.float32)
    assert linear_top1(train_x * scale, train_y, test_x * scale, test_y) == 1.0


def test_classes_that_training_lacks_count_as_wrong() -> None:
    (train_x, train_y), (test_x, test_y) = make_arrays(200, 0), make_arrays(100, 1)
    known = train_y != 3
    for accuracy in (knn_20, linear_top1):
        assert accuracy(train_x[known], train_y[known], test_x, test_y) == 0.75


@pytest.mark.parametrize("accuracy", [knn_20, linear_top1])
def test_data_that_cannot_be_probed(accuracy: Any) -> None:
    (x, y), (test_x, test_y) = make_arrays(40, 0), make_arrays(20, 1)
    with pytest.raises(ValueError, match="training data has no labels"):
        accuracy(x, np.full_like(y, -1), test_x, test_y)
    with pytest.raises(ValueError, match="1 of 20 test images have no label"):
        accuracy(x, y, test_x, np.where(np.arange(20) == 3, -1, test_y))
    with pytest.raises(ValueError, match="all 40 training images are of class 2"):
        accuracy(x, np.full_like(y, 2), test_x, test_y)
    with pytest.raises(ValueError, match="1 of 40 training features are not finite"):
        accuracy(np.where(np.arange(40)[:, None] == 0, np.nan, x), y, test_x, test_y)
    with pytest.raises(ValueError, match="must be"):
        accuracy(x, y[1:], test_x, test_y)
    with pytest.raises(ValueError, match="must be"):
        accuracy(x, y, test_x[:, 1:], test_y)


def test_more_neighbours_than_images() -> None:
    train = make_arrays(12, 0)
    with pytest.raises(ValueError, match="k = 20 neighbours were asked for, but there are 12"):
        knn_accuracy(*train, *train)


def test_the_table_shows_which_layer_knows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = probe_layers(make_backbone(), Source(128, 0), Source(64, 1), layers=["embed", 1, "final"], ks=(5, 20))
    assert [row.layer for row in rows] == ["embed", 1, "final"]
    assert all(row.pooling == "mean" and row.converged for row in rows)
    assert [row.top1 for row in rows] == [{"knn_5": x, "knn_20": x, "linear": x} for x in (1.0, 1.0, 0.25)]
    rows = probe_layers(make_backbone(), Source(128, 0), Source(64, 1), layers=[1], probes=["linear"])
    assert [row.top1 for row in rows] == [{"linear": 1.0}]


def test_an_error_names_the_layer() -> None:
    train = Source(64, 0)
    train.data[0]["images"][0] = float("inf")
    with pytest.raises(ValueError, match="probe of layer embed: 1 of 64 training features are not finite"):
        probe_layers(make_backbone(), train, Source(32, 1), layers=["embed"])


def test_a_fit_that_did_not_converge_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LINEAR_MAX_ITER", 1)
    train, test = make_arrays(200, 0), make_arrays(100, 1)
    assert linear_accuracy(*train, *test)[1] is False
    with pytest.warns(RuntimeWarning) as caught:
        rows = probe_layers(make_backbone(), Source(128, 0), Source(64, 1), layers=["embed", 0])
    assert [
        f"of layer {layer} did not converge" in str(one.message) for layer, one in zip(["embed", 0], caught, strict=True)
    ] == [True] * 2
    assert not any(row.converged for row in rows)
