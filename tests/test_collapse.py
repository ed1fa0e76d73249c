"""The collapse gauges equal their definitions, on one process and split over ranks, and read as they should at the extremes."""

import threading
from functools import partial

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from nepa_dist.metrics.collapse import collapse_gauges, collapse_metrics, spectral_metrics
from nepa_dist.metrics.registry import lookup
from nepa_dist.metrics.spread import spread_metrics
from nepa_dist.tasks.regularizers import random_directions, sigreg


def batch(seed=0, shape=(6, 7, 12)):
    """Correlated predictions, targets and current embeddings with a mean and unequal spread per dimension."""
    generator = torch.Generator().manual_seed(seed)
    target, noise, current = (torch.randn(shape, generator=generator) for _ in range(3))
    scale = torch.linspace(0.1, 2, shape[-1])
    target = target * scale + 0.5
    return target + 0.7 * noise, target, 0.5 * target + current


def brute_force(x):
    """The gauges of [n, D], straight from their definitions."""
    x = x.double()
    unit = normalize(x, dim=1)
    cosines = unit @ unit.T
    off_diagonal = cosines[~torch.eye(len(x), dtype=torch.bool)]
    share = torch.linalg.svdvals(x - x.mean(0))
    share = share[share > 1e-12 * share.max()]
    share = share / share.sum()
    return {
        "embedding_mean_cosine": off_diagonal.mean(),
        "embedding_std_ratio": unit.std(0, correction=0).mean() * x.shape[1] ** 0.5,
        "embedding_rms": x.square().mean().sqrt(),
        "embedding_effective_rank": torch.exp(-(share * share.log()).sum()),
    }


def on_ranks(function, per_rank):
    """Run ``function(*args, all_reduce)`` in one thread per rank, with an all_reduce that sums over them; results by rank."""
    barrier, inbox = threading.Barrier(len(per_rank), timeout=20), [None] * len(per_rank)
    results = [None] * len(per_rank)

    def run(rank, args):
        def all_reduce(tensor):
            inbox[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(sum(inbox))
            barrier.wait()
            return tensor

        results[rank] = function(*args, all_reduce=all_reduce)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(per_rank)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def tensor_metrics(x):
    """The gauges of one set of embeddings [n, D]."""
    metrics = collapse_metrics(*[x[None]] * 3)
    names = [name.removesuffix(".target") for name in metrics if name.endswith(".target")]
    return {name: metrics[f"{name}.target"] for name in names if "rankme" not in name}


@pytest.mark.parametrize("n", [5, 40, 300])
def test_gauges_of_one_tensor_equal_brute_force(n):
    x = batch(shape=(1, n, 12))[1][0]
    metrics = tensor_metrics(x)
    for key, expected in brute_force(x).items():
        torch.testing.assert_close(metrics[key], expected, rtol=1e-7, atol=1e-9, msg=key)


def test_rows_converted_in_parts_equal_all_at_once(monkeypatch):
    tensors = batch()
    expected = collapse_metrics(*tensors)
    monkeypatch.setattr("nepa_dist.metrics.collapse._CHUNK_ROWS", 8)
    for key, value in collapse_metrics(*tensors).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=key)


def test_gauges_of_a_batch_equal_brute_force():
    pred, target, current = batch()
    metrics = collapse_metrics(pred, target, current)
    for name, x in (("target", target), ("pred", pred)):
        for key, expected in brute_force(x.flatten(0, 1)).items():
            torch.testing.assert_close(metrics[f"{key}.{name}"], expected, rtol=1e-6, atol=1e-9, msg=f"{key}.{name}")
    assert all(lookup(key) and value.ndim == 0 for key, value in metrics.items())


@pytest.mark.parametrize("first_is_cls", [True, False])
def test_skills_equal_their_definitions(first_is_cls):
    pred, target, current = (x.double() for x in batch())
    metrics = collapse_metrics(pred, target, current, first_is_cls=first_is_cls)
    cosine = cosine_similarity(pred, target, dim=-1)
    best_constant = normalize(normalize(target, dim=-1).mean((0, 1)), dim=0)
    const = cosine_similarity(best_constant.expand_as(target), target, dim=-1).mean()
    first = int(first_is_cls)
    copy = cosine_similarity(current, target, dim=-1)[:, first:].mean()
    expected = {
        "prediction_cosine": cosine.mean(),
        "prediction_skill_const": (cosine.mean() - const) / (1 - const),
        "prediction_skill_copy": (cosine[:, first:].mean() - copy) / (1 - copy),
    }
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_the_class_token_is_left_out_of_the_copy_skill_alone():
    pred, target, current = batch()
    changed = current.clone()
    changed[:, 0] = -1e3
    before, after = collapse_metrics(pred, target, current), collapse_metrics(pred, target, changed)
    assert before == after
    assert collapse_metrics(pred, target, current, first_is_cls=False) != collapse_metrics(
        pred, target, changed, first_is_cls=False
    )


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (1, 4, 2, 1)])
def test_ranks_together_equal_one_process(sizes):
    tensors = batch(shape=(8, 7, 12))
    expected = collapse_metrics(*tensors)
    per_rank = zip(*(x.split(sizes) for x in tensors), strict=True)
    for metrics in on_ranks(collapse_metrics, list(per_rank)):
        assert metrics.keys() == expected.keys()
        for key, value in metrics.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=key)


def test_a_large_mean_beside_a_small_spread_keeps_its_digits():
    spread = torch.randn(2000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-3
    x = (10 + spread).float()
    metrics = tensor_metrics(x)
    assert metrics["embedding_effective_rank"] == pytest.approx(16, abs=0.1)
    expected = brute_force(x)
    for key, value in metrics.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-7, atol=1e-12, msg=key)
    assert 0 < metrics["embedding_mean_cosine"] < 1
    # The spread in the plane across the mean is 1e-3 / (10 sqrt(16)) per dimension, times sqrt(16).
    assert metrics["embedding_std_ratio"] == pytest.approx(1e-4, rel=0.1)


def test_isotropic_embeddings_read_as_diverse():
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(2))
    metrics = tensor_metrics(x)
    assert metrics["embedding_mean_cosine"] == pytest.approx(0, abs=0.01)
    assert metrics["embedding_std_ratio"] == pytest.approx(1, abs=0.02)
    assert metrics["embedding_effective_rank"] == pytest.approx(16, abs=0.2)


@pytest.mark.parametrize("constant", [1.7, 0.0])
def test_constant_embeddings_read_as_collapsed(constant):
    """Zero has no direction, yet embeddings that are all zero must not look diverse."""
    target = torch.full((3, 5, 8), constant)
    metrics = collapse_metrics(target, target, target)
    assert metrics["embedding_mean_cosine.target"] == pytest.approx(1, abs=1e-12)
    assert metrics["embedding_std_ratio.target"] == pytest.approx(0, abs=1e-9)
    assert metrics["embedding_effective_rank.target"] == pytest.approx(1, abs=1e-6)
    assert metrics["prediction_skill_const"] == 0
    assert metrics["prediction_skill_copy"] == 0


def test_embeddings_along_one_line_have_rank_one_and_low_mean_cosine():
    """The collapse that the mean cosine alone does not show."""
    signs = torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    metrics = tensor_metrics(signs * torch.linspace(0.5, 1, 8))
    assert metrics["embedding_effective_rank"] == pytest.approx(1, abs=1e-6)
    assert metrics["embedding_mean_cosine"] < 0


def test_a_perfect_prediction_has_skill_one():
    _, target, current = batch()
    metrics = collapse_metrics(3 * target, target, current)
    for key in ("prediction_cosine", "prediction_skill_const", "prediction_skill_copy"):
        assert metrics[key] == pytest.approx(1, abs=1e-6)


def test_copying_has_no_skill_over_copying():
    _, target, current = batch()
    assert collapse_metrics(current, target, current)["prediction_skill_copy"] == pytest.approx(0, abs=1e-12)


def test_the_best_constant_has_no_skill_over_it():
    _, target, current = batch()
    constant = normalize(target, dim=-1).mean((0, 1)).expand_as(target)
    assert collapse_metrics(constant, target, current)["prediction_skill_const"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_gives_nan_and_no_error(bad):
    pred, target, current = batch()
    target[0, 2, 3] = bad
    metrics = collapse_metrics(pred, target, current)
    for key, value in metrics.items():
        assert value.isnan() == (not key.endswith(".pred")), key


def test_what_cannot_be_measured_is_nan():
    metrics = collapse_metrics(*(x[:1, :1] for x in batch()))
    assert metrics["embedding_mean_cosine.target"].isnan()
    assert metrics["prediction_skill_copy"].isnan()
    assert metrics["embedding_effective_rank.target"] == 1


def test_inputs_may_be_half_precision_and_need_a_gradient():
    pred, target, current = (x.bfloat16() for x in batch())
    metrics = collapse_metrics(pred.requires_grad_(), target, current)
    exact = collapse_metrics(pred.double(), target.double(), current.double())
    for key, value in metrics.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, exact[key], msg=key)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 4), (2, 2, 4)), ((6, 4),) * 3, ((0, 3, 4),) * 3])
def test_wrong_shapes_are_an_error(shapes):
    with pytest.raises(ValueError, match=r"\[B, P, D\]"):
        collapse_metrics(*(torch.zeros(shape) for shape in shapes))


def test_rankme_equals_its_definition():
    pred, target, current = batch()
    singular = torch.linalg.svdvals(target.flatten(0, 1).double())
    share = singular / singular.sum() + 1e-7
    expected = torch.exp(-(share * share.log()).sum())
    torch.testing.assert_close(collapse_metrics(pred, target, current)["embedding_rankme.target"], expected, rtol=1e-6, atol=0)


def test_cross_image_cosine_equals_its_definition():
    pred, target, current = (x.double() for x in batch())
    B = len(pred)
    pairs = [cosine_similarity(pred[i], target[j], dim=-1).mean() for i in range(B) for j in range(B) if i != j]
    found = collapse_metrics(pred, target, current)["cross_image_cosine"]
    torch.testing.assert_close(found, torch.stack(pairs).mean(), rtol=1e-9, atol=1e-12)


def test_one_embedding_per_image_is_described_too():
    pred, target, current = batch()
    pooled = pred.mean(1)
    gauges, spectra = collapse_gauges(pred, target, current, pooled=pooled)
    expected = brute_force(pooled)
    for key, value in (gauges | spectral_metrics(spectra)).items():
        if key.endswith(".pooled") and "rankme" not in key:
            torch.testing.assert_close(value, expected[key.removesuffix(".pooled")], rtol=1e-6, atol=1e-9, msg=key)


def uniformity(x):
    unit = normalize(x.double(), dim=1)
    distances = torch.cdist(unit, unit)[~torch.eye(len(x), dtype=torch.bool)]
    return torch.exp(-2 * distances.square()).mean().log()


@pytest.mark.parametrize("spread", [0.05, 0.5, 5.0])
def test_uniformity_is_near_its_definition(spread):
    x = 1 + spread * torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    found = spread_metrics(x, seed=3)["embedding_uniformity"]
    assert float(found) == pytest.approx(float(uniformity(x)), abs=0.12)


def test_sigreg_is_that_of_the_regulariser_and_tells_a_gaussian_from_a_constant():
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert spread_metrics(x, seed=3)["embedding_sigreg"] < 1e-3
    assert spread_metrics(0 * x, seed=3)["embedding_sigreg"] == pytest.approx(0.2, abs=0.02)
    directions = random_directions(16, 256, seed=0, device=torch.device("cpu"))
    ours, theirs = spread_metrics(2 * x + 1, seed=3)["embedding_sigreg"], sigreg(2 * x + 1, directions)
    assert ours == pytest.approx(float(theirs), rel=0.05)


def test_the_spread_does_not_depend_on_the_ranks():
    x = batch(shape=(1, 90, 12))[1][0]
    expected = spread_metrics(x, seed=5)
    for metrics in on_ranks(partial(spread_metrics, seed=5), [(part,) for part in x.split([20, 25, 0, 45])]):
        for key, value in metrics.items():
            assert lookup(f"{key}.target")
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-9, msg=key)
