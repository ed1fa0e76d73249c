"""Random erasing: timm's rectangles, normal noise, draws by key alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nepa_dist.data.erasing import draw_erasing, erase

NUM = 2000


def _drawn(height: int, width: int, **options: float) -> np.ndarray:
    return np.array([draw_erasing(height, width, seed=1, epoch=0, sample_id=i, **options) for i in range(NUM)])  # type: ignore[arg-type]


def test_a_quarter_of_the_samples_is_erased() -> None:
    erased = (_drawn(224, 224)[:, 2] > 0).mean()
    assert abs(erased - 0.25) < 4 * math.sqrt(0.25 * 0.75 / NUM)
    assert not _drawn(224, 224, probability=0.0).any()


def test_rectangles_have_timms_area_ratio_and_place() -> None:
    x, y, w, h, keys = _drawn(300, 200, probability=1.0).T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + w <= 200).all()
    assert (y + h <= 300).all()
    share, ratio = w * h / 60000, h / w
    assert 0.019 < share.min() < 0.025
    assert 0.32 < share.max() < 0.34
    assert 0.28 < ratio.min() < 0.32
    assert 3.1 < ratio.max() < 3.5
    assert len(set(keys.tolist())) == NUM
    # Placed uniformly: the free room to the left has half of the free room on average.
    for start, size, side in ((x, w, 200), (y, h, 300)):
        place = (start + 0.5) / (side - size + 1)
        assert abs(place.mean() - 0.5) < 4 / math.sqrt(12 * NUM)
    # In a square image, where every rectangle fits at once, the area is uniform.
    _, _, w, h, _ = _drawn(1000, 1000, probability=1.0, area=(0.02, 0.1)).T  # type: ignore[arg-type]
    assert abs((w * h / 1e6).mean() - 0.06) < 4 * 0.08 / math.sqrt(12 * NUM)


def test_neighbours_are_independent() -> None:
    erased = _drawn(224, 224, probability=0.5)[:, 2] > 0
    assert abs(np.corrcoef(erased[1:], erased[:-1])[0, 1]) < 4 / math.sqrt(NUM)
    w = _drawn(224, 224, probability=1.0)[:, 2]
    assert abs(np.corrcoef(w[1:], w[:-1])[0, 1]) < 4 / math.sqrt(NUM)


def _batch(num: int, **options: float) -> tuple[torch.Tensor, np.ndarray]:
    rows = np.array([draw_erasing(48, 64, seed=0, epoch=3, sample_id=i, **options) for i in range(num)])  # type: ignore[arg-type]
    return torch.full((num, 3, 48, 64), 9.0), rows


def test_noise_fills_the_rectangle_and_nothing_else() -> None:
    images, rows = _batch(40, probability=0.5)
    assert erase(images, rows) is images
    assert 5 < (rows[:, 2] > 0).sum() < 35
    for image, (x, y, w, h, _) in zip(images, rows.tolist(), strict=True):
        inside = torch.zeros(48, 64, dtype=torch.bool)
        inside[y : y + h, x : x + w] = True
        assert (image[:, ~inside] == 9).all()
        assert (image[:, inside] != 9).all()


def test_noise_is_standard_normal() -> None:
    images, rows = _batch(200, probability=1.0)
    noise = erase(images, rows)
    values = noise[noise != 9]
    num = len(values)
    assert num > 100_000
    assert abs(values.mean()) < 4 / math.sqrt(num)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / num)
    for limit in (-2.0, -1.0, 0.0, 1.0, 2.0):
        share = 0.5 * (1 + math.erf(limit / math.sqrt(2)))
        assert abs((values < limit).float().mean() - share) < 4 * math.sqrt(share * (1 - share) / num)
    # Neither neighbours in a row, nor channels, nor two samples go together.
    x, y, w, h, _ = rows[rows[:, 2] * rows[:, 3] > 800][0].tolist()
    sample = int((rows[:, 2] * rows[:, 3] > 800).argmax())
    block = noise[sample, :, y : y + h, x : x + w]
    for one, two in ((block[:, :, 1:], block[:, :, :-1]), (block[:, 1:], block[:, :-1]), (block[:1], block[1:2])):
        together = torch.stack([one.flatten(), two.flatten()])
        assert abs(torch.corrcoef(together)[0, 1]) < 4 / math.sqrt(one.numel())
    starts = torch.stack([noise[i, :, y, x] for i, (x, y, _, _, _) in enumerate(rows.tolist())])
    assert len(starts.unique()) == starts.numel()


def test_the_neighbours_in_the_batch_do_not_matter() -> None:
    images, rows = _batch(12, probability=0.7)
    together = erase(images.clone(), rows)
    for i in range(12):
        assert torch.equal(erase(images[i : i + 1].clone(), rows[i : i + 1])[0], together[i])
    flipped = erase(images.clone(), rows[::-1].copy()).flip(0)
    assert torch.equal(flipped, together)


def test_near_keys_have_nothing_in_common() -> None:
    images = erase(torch.zeros(2, 3, 32, 32), [(0, 0, 20, 20, 4), (0, 0, 20, 20, 5)])
    one, two = images[:, :, :20, :20].flatten(1)
    assert torch.isin(one, two).float().mean() < 0.01


def test_memory_layout_and_dtype_are_kept() -> None:
    images, rows = _batch(8, probability=1.0)
    wanted = erase(images.clone(), rows)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(erase(last, rows), wanted)
    assert last.is_contiguous(memory_format=torch.channels_last)
    half = erase(images.bfloat16(), [tuple(row) for row in rows.tolist()])
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, wanted.bfloat16())


@settings(max_examples=80, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), sample=st.integers(0, 2**40))
def test_any_size_gives_a_rectangle_inside_or_none(height: int, width: int, sample: int) -> None:
    row = draw_erasing(height, width, seed=0, epoch=0, sample_id=sample, probability=1.0)
    assert row == draw_erasing(height, width, seed=0, epoch=0, sample_id=sample, probability=1.0)
    x, y, w, h, key = row
    assert 0 <= x <= width - w
    assert 0 <= y <= height - h
    assert (w == 0) == (h == 0)
    assert w < width
    assert h < height
    assert 0 <= key < 2**32
    image = torch.full((1, 3, height, width), 9.0)
    assert (erase(image, [row]) != 9).sum() == 3 * w * h


def test_bad_arguments_are_refused() -> None:
    for options in ({"probability": 1.1}, {"area": (0.0, 0.3)}, {"area": (0.4, 0.3)}, {"ratio": (0.0, 3.0)}):
        with pytest.raises(ValueError, match="random erasing needs"):
            draw_erasing(32, 32, seed=0, epoch=0, sample_id=0, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2 images need erasings of shape \(2, 5\), got \(1, 5\)"):
        erase(torch.zeros(2, 3, 8, 8), [(0, 0, 0, 0, 0)])
