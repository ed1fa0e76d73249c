"""Scores of images of any size: windows, padding, scales and mirroring."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nepa_dist.tasks.sliding import label_map, mean_probabilities, slide_logits, whole_logits, window_starts

C = 4


def _images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * 100 + width))


def _pointwise(images: Tensor) -> Tensor:
    """Logits of a pixel from that pixel alone, so that windows and padding cannot change them."""
    weight = torch.linspace(-1, 1, C * 3).view(C, 3)
    return torch.einsum("cd,bdhw->bchw", weight, images) + torch.arange(C).view(C, 1, 1)


@pytest.mark.parametrize("size", [(8, 8), (17, 9), (5, 23), (3, 3), (9, 8), (1, 31)])
@pytest.mark.parametrize("stride", [1, 5, 8])
def test_windows_put_together_are_the_whole(size: tuple[int, int], stride: int) -> None:
    images, shapes = _images(*size), set()

    def model(window: Tensor) -> Tensor:
        shapes.add(tuple(window.shape))
        return _pointwise(window)

    logits = slide_logits(model, images, crop=8, stride=stride, num_classes=C)
    torch.testing.assert_close(logits, _pointwise(images))
    assert shapes == {(2, 3, 8, 8)}


def test_overlapping_windows_are_averaged() -> None:
    # Width 5, crop 4, stride 2: windows at 0 and, flush with the border, at 1.
    numbers = iter([1.0, 4.0])
    logits = slide_logits(
        lambda window: torch.full((1, 1, 4, 4), next(numbers)), torch.zeros(1, 3, 4, 5), crop=4, stride=2, num_classes=1
    )
    assert logits[0, 0].tolist() == [[1.0, 2.5, 2.5, 2.5, 4.0]] * 4


@pytest.mark.parametrize(
    ("length", "starts"),
    [(518, [0]), (300, [0]), (519, [0, 1]), (863, [0, 345]), (864, [0, 345, 346]), (1208, [0, 345, 690])],
)
def test_windows_start_at_equal_steps_and_end_at_the_border(length: int, starts: list[int]) -> None:
    assert window_starts(length, 518, 345) == starts


def test_small_images_are_filled_up_with_zeros_at_the_bottom_and_the_right() -> None:
    seen: list[Tensor] = []

    def model(images: Tensor) -> Tensor:
        seen.append(images)
        return _pointwise(images)

    images = _images(3, 5)
    slide_logits(model, images, crop=8, stride=4, num_classes=C)
    whole_logits(model, images, patch_size=4)
    for padded, shape in zip(seen, [(2, 3, 8, 8), (2, 3, 4, 8)], strict=True):
        assert padded.shape == shape
        assert torch.equal(padded[:, :, :3, :5], images)
        assert padded.abs().sum() == pytest.approx(images.abs().sum().item())


@pytest.mark.parametrize("size", [(8, 12), (7, 13), (1, 1)])
def test_whole_images_keep_their_size(size: tuple[int, int]) -> None:
    images = _images(*size)
    logits = whole_logits(lambda x: _pointwise(x).bfloat16(), images, patch_size=4)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, _pointwise(images).bfloat16().float())


def test_one_scale_without_mirroring_is_the_softmax_of_the_logits() -> None:
    images = _images(11, 6)
    logits_fn = partial(slide_logits, _pointwise, crop=4, stride=3, num_classes=C)
    torch.testing.assert_close(mean_probabilities(logits_fn, images, patch_size=4), logits_fn(images).softmax(1))


def test_scales_are_multiples_of_the_patch_and_their_probabilities_are_averaged() -> None:
    sizes = []

    def model(images: Tensor) -> Tensor:
        sizes.append(tuple(images.shape[2:]))
        logits = torch.zeros(len(images), 2, *images.shape[2:])
        logits[:, 1] = float(len(sizes))  # another answer at each scale
        return logits

    probabilities = mean_probabilities(model, _images(30, 45), patch_size=14, ratios=(0.1, 0.5, 1.0, 2.0))
    assert sizes == [(14, 14), (14, 28), (30, 45), (56, 84)]
    assert probabilities.shape == (2, 2, 30, 45)
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]).sigmoid().mean().item()
    torch.testing.assert_close(probabilities[:, 1], torch.full((2, 30, 45), expected))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 30, 45))


def test_mirroring_changes_nothing_for_a_model_that_looks_at_pixels_alone() -> None:
    images = _images(6, 9)
    flipped = mean_probabilities(_pointwise, images, patch_size=1, flip=True)
    torch.testing.assert_close(flipped, _pointwise(images).softmax(1))


def test_mirroring_averages_left_and_right() -> None:
    def model(images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[2:])
        logits[..., 0, :, 0] = 2.0  # class 0 in the first column, whatever the image
        return logits

    probabilities = mean_probabilities(model, _images(2, 3, 1), patch_size=1, flip=True)
    edge = (torch.tensor(2.0).sigmoid().item() + 0.5) / 2
    torch.testing.assert_close(probabilities[0, 0], torch.tensor([[edge, 0.5, edge]] * 2))


def test_scores_become_classes_at_the_size_of_the_mask() -> None:
    scores = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert label_map(scores, (2, 4)).tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1]]]


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_leaves_out_pixels_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride {stride} must be"):
        slide_logits(_pointwise, _images(9, 9), crop=8, stride=stride, num_classes=C)


def test_wrong_scores_and_ratios_are_refused() -> None:
    with pytest.raises(ValueError, match=r"returned logits \[2, 4, 8, 8\] for a window, expected \[2, 7, 8, 8\]"):
        slide_logits(_pointwise, _images(9, 9), crop=8, stride=8, num_classes=7)
    for ratios in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="ratios must be"):
            mean_probabilities(_pointwise, _images(4, 4), patch_size=1, ratios=ratios)
