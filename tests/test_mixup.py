"""Mixup and CutMix: the published mixing, soft labels that sum to 1, draws by (seed, step, micro-batch) alone."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nepa_dist.data.mixup import Mix, Mixup
from nepa_dist.data.order import micro_batch_positions

NUM = 2000
KEY = {"seed": 1, "step": 2, "micro_batch": 3}


def _batch(num: int = 4, height: int = 10, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(np.random.RandomState(0).randn(num, 3, height, width).astype(np.float32))
    return images, torch.arange(num) % 5


def _draws(mixup: Mixup, height: int = 224, width: int = 224) -> list[Mix]:
    return [mixup.draw(height, width, seed=0, step=step, micro_batch=0) for step in range(NUM)]


def test_mixup_blends_each_image_with_its_mirror_in_the_batch() -> None:
    mixup = Mixup(num_classes=5, cutmix_alpha=0.0, label_smoothing=0.1)
    images, labels = _batch()
    weight, box = mixup.draw(10, 12, **KEY)
    assert box is None
    assert 0 < weight < 1
    mixed, targets = mixup(images, labels, **KEY)
    for i in range(4):
        torch.testing.assert_close(mixed[i], weight * images[i] + (1 - weight) * images[3 - i])
        wanted = torch.full((5,), 0.1 / 5)
        wanted[labels[i]] += 0.9 * weight
        wanted[labels[3 - i]] += 0.9 * (1 - weight)
        torch.testing.assert_close(targets[i], wanted)


def test_cutmix_takes_a_box_from_the_mirror_and_weighs_by_area() -> None:
    mixup = Mixup(num_classes=5, mixup_alpha=0.0, label_smoothing=0.0)
    images, labels = _batch()
    boxes = 0
    for step in range(60):
        key = {"seed": 0, "step": step, "micro_batch": 0}
        weight, box = mixup.draw(10, 12, **key)
        mixed, targets = mixup(images, labels, **key)
        assert box is not None
        x, y, w, h = box
        inside = torch.zeros(10, 12, dtype=torch.bool)
        inside[y : y + h, x : x + w] = True
        assert weight == pytest.approx(1 - inside.sum().item() / 120)
        for i in range(4):
            assert torch.equal(mixed[i][:, ~inside], images[i][:, ~inside])
            assert torch.equal(mixed[i][:, inside], images[3 - i][:, inside])
            assert targets[i, labels[i]] == pytest.approx(weight)
            assert targets[i, labels[3 - i]] == pytest.approx(1 - weight, abs=1e-6)
        boxes += 0 < w * h < 120
    assert boxes > 40


def test_soft_labels_by_hand() -> None:
    mixup = Mixup(num_classes=4, label_smoothing=0.2)
    wanted = torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]])
    torch.testing.assert_close(mixup.soft_labels(torch.tensor([1, 3])), wanted)
    hard = Mixup(num_classes=4, label_smoothing=0.0).soft_labels(torch.tensor([1, 3]))
    assert torch.equal(hard, torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]]))


@pytest.mark.parametrize("options", [{"prob": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}])
def test_without_mixing_only_the_labels_are_smoothed(options: dict[str, float]) -> None:
    mixup = Mixup(num_classes=5, **options)  # type: ignore[arg-type]
    images, labels = _batch()
    mixed, targets = mixup(images, labels, **KEY)
    assert torch.equal(mixed, images)
    assert torch.equal(targets, mixup.soft_labels(labels))


def test_the_draws_follow_the_recipe() -> None:
    draws = _draws(Mixup(num_classes=2))
    cut = np.array([draw.box is not None for draw in draws])
    assert abs(cut.mean() - 0.5) < 4 * 0.5 / math.sqrt(NUM)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 x 0.8 + 1)).
    weights = np.array([draw.weight for draw in draws])[~cut]
    variance = 1 / (4 * 2.6)
    assert abs(weights.mean() - 0.5) < 4 * math.sqrt(variance / len(weights))
    assert weights.var() == pytest.approx(variance, rel=0.1)
    # Beta(1, 1) is uniform.
    uniform = np.sort([draw.weight for draw in _draws(Mixup(num_classes=2, mixup_alpha=1.0, cutmix_alpha=0.0))])
    assert np.abs(uniform - (np.arange(NUM) + 0.5) / NUM).max() < 2.0 / math.sqrt(NUM)
    mixed = np.array([draw.weight < 1 for draw in _draws(Mixup(num_classes=2, prob=0.3, cutmix_alpha=0.0))])
    assert abs(mixed.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / NUM)
    switched = np.array([draw.box is not None for draw in _draws(Mixup(num_classes=2, switch_prob=0.2))])
    assert abs(switched.mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / NUM)


def test_the_boxes_have_the_images_proportions_and_any_place() -> None:
    draws = _draws(Mixup(num_classes=2, mixup_alpha=0.0), height=100, width=200)
    boxes = np.array([draw.box for draw in draws])
    x, y, w, h = boxes.T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + w <= 200).all()
    assert (y + h <= 100).all()
    whole = (x > 0) & (x + w < 200) & (y > 0) & (y + h < 100)
    assert np.abs(w[whole] - 2 * h[whole]).max() <= 4  # both sides are rounded down to even numbers
    # The centre is uniform; only the centres of boxes that are not clipped can be seen, so both sides are equally likely.
    for left, right in ((x == 0, x + w == 200), (y == 0, y + h == 100)):
        only = left ^ right
        assert abs(left[only].mean() - 0.5) < 4 * 0.5 / math.sqrt(only.sum())
    # Unclipped, the area would be uniform with mean 1/2; half of each side's overhang is lost.
    assert 0.2 < (w * h / 20000).mean() < 0.5


def test_neighbouring_keys_are_independent() -> None:
    mixup = Mixup(num_classes=2, cutmix_alpha=0.0)
    steps = np.array([draw.weight for draw in _draws(mixup)])
    micros = np.array([mixup.draw(8, 8, seed=0, step=0, micro_batch=micro).weight for micro in range(NUM)])
    seeds = np.array([mixup.draw(8, 8, seed=seed, step=0, micro_batch=0).weight for seed in range(NUM)])
    for one, two in ((steps[1:], steps[:-1]), (micros[1:], micros[:-1]), (seeds[1:], seeds[:-1]), (steps, micros)):
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(NUM)


def test_the_key_decides_and_nothing_else() -> None:
    mixup = Mixup(num_classes=5)
    images, labels = _batch()
    first, targets = mixup(images, labels, **KEY)
    np.random.seed(99)
    random.seed(99)
    torch.manual_seed(99)
    again, other = mixup(images, labels, **KEY)
    assert torch.equal(first, again)
    assert torch.equal(targets, other)
    for name in KEY:
        assert not torch.equal(first, mixup(images, labels, **(KEY | {name: 77}))[0]), name


def test_drawing_leaves_the_global_generators_alone() -> None:
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index,union-attr]
    Mixup(num_classes=5)(*_batch(), **KEY)
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_meaning_of_a_key_does_not_change() -> None:
    # A change here changes what every run sees: a resumed run would no longer repeat its batches.
    draws = [Mixup(num_classes=2).draw(224, 224, seed=0, step=step, micro_batch=0) for step in range(4)]
    assert [draw.box for draw in draws] == [None, (0, 46, 107, 178), None, (149, 62, 75, 144)]
    assert [draw.weight for draw in draws] == pytest.approx(
        [0.8624631195486172, 0.6204161352040816, 0.9844658927851362, 0.7847576530612245], abs=1e-9
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_number_of_ranks_does_not_matter(world_size: int) -> None:
    mixup = Mixup(num_classes=5)
    images, labels = _batch(8)
    accumulation = 4 // world_size
    mixed = torch.empty_like(images)
    targets = torch.empty(8, 5)
    for rank in range(world_size):
        for micro in range(accumulation):
            at = micro_batch_positions(0, micro, rank, global_batch_size=8, world_size=world_size, micro_batch_size=2)
            rows = slice(at.start, at.stop)
            index = rank * accumulation + micro
            mixed[rows], targets[rows] = mixup(images[rows], labels[rows], seed=0, step=0, micro_batch=index)
    for index in range(4):
        rows = slice(2 * index, 2 * index + 2)
        wanted = mixup(images[rows], labels[rows], seed=0, step=0, micro_batch=index)
        assert torch.equal(mixed[rows], wanted[0])
        assert torch.equal(targets[rows], wanted[1])


def test_the_argument_its_layout_and_its_dtype_are_kept() -> None:
    images, labels = _batch()
    last = images.contiguous(memory_format=torch.channels_last)
    before = last.clone()
    for mixup in (Mixup(num_classes=5, mixup_alpha=0.0), Mixup(num_classes=5, cutmix_alpha=0.0)):
        mixed, _ = mixup(last, labels, **KEY)
        assert torch.equal(last, before)
        assert torch.equal(mixed, mixup(images, labels, **KEY)[0])
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        half, targets = mixup(images.bfloat16(), labels, **KEY)
        assert half.dtype == torch.bfloat16
        assert targets.dtype == torch.float32


def test_the_middle_of_an_odd_batch_stays() -> None:
    images, labels = _batch(5)
    for mixup in (Mixup(num_classes=5, mixup_alpha=0.0), Mixup(num_classes=5, cutmix_alpha=0.0)):
        mixed, targets = mixup(images, labels, **KEY)
        torch.testing.assert_close(mixed[2], images[2])
        torch.testing.assert_close(targets[2], mixup.soft_labels(labels)[2])


@settings(max_examples=80, deadline=None)
@given(
    classes=st.integers(1, 30),
    num=st.integers(1, 9),
    size=st.sampled_from([(1, 1), (8, 8), (20, 3000), (3000, 20), (33, 17)]),
    smoothing=st.floats(0, 1),
    alphas=st.tuples(st.sampled_from([0.0, 0.01, 0.8, 1.0, 5.0]), st.sampled_from([0.0, 0.01, 1.0, 5.0])),
    step=st.integers(0, 2**40),
)
def test_soft_labels_are_a_distribution(
    classes: int, num: int, size: tuple[int, int], smoothing: float, alphas: tuple[float, float], step: int
) -> None:
    mixup = Mixup(classes, mixup_alpha=alphas[0], cutmix_alpha=alphas[1], label_smoothing=smoothing)
    images = torch.arange(num * 3 * size[0] * size[1]).view(num, 3, *size).float()
    mixed, targets = mixup(images, torch.arange(num) % classes, seed=0, step=step, micro_batch=0)
    assert mixed.shape == images.shape
    assert targets.shape == (num, classes)
    assert targets.dtype == torch.float32
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(num))
    assert mixed.min() >= images.min()
    assert mixed.max() <= images.max() * (1 + 1e-6)


def test_bad_arguments_are_refused() -> None:
    for options in ({"mixup_alpha": -1.0}, {"cutmix_alpha": math.nan}, {"prob": 1.2}, {"label_smoothing": -0.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Mixup(num_classes=5, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes"):
        Mixup(num_classes=0)
    mixup, (images, labels) = Mixup(num_classes=5), _batch()
    with pytest.raises(ValueError, match="floating-point images"):
        mixup(images.byte(), labels, **KEY)
    with pytest.raises(ValueError, match="int64 labels"):
        mixup(images, labels[:2], **KEY)
    with pytest.raises(RuntimeError, match="out of bounds"):  # an unknown label
        mixup(images, labels - 1, **KEY)
