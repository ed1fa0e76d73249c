"""The UPerNet head and its loss: shapes, independence of the batch's split, initial weights, cost, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nepa_dist.heads import upernet_cost
from nepa_dist.heads.upernet import FeaturePyramid, UPerNetHead, average_regions
from nepa_dist.model import init_weights
from nepa_dist.tasks.pixel_loss import segmentation_loss

D, C = 16, 5
SMALL = {"channels": 16, "pool_scales": (1, 2, 3), "aux_channels": 8}


def _head(*, seed: int = 0, dropout: float = 0.1) -> UPerNetHead:
    head = UPerNetHead(D, C, dropout=dropout, **SMALL)
    init_weights(head, seed, std=0.2)
    return head


def _maps(batch: int = 2, grid: tuple[int, int] = (3, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, D, *grid, generator=generator) for _ in range(4)]


@pytest.mark.parametrize(("grid", "size"), [((3, 5), (43, 70)), ((1, 1), (14, 14)), ((4, 2), (7, 9))])
def test_any_grid_gives_scores_of_any_size(grid: tuple[int, int], size: tuple[int, int]) -> None:
    head = _head()
    logits, auxiliary = head(_maps(1, grid), size)
    assert auxiliary is not None
    assert logits.shape == auxiliary.shape == (1, C, *size)
    assert logits.isfinite().all()
    assert auxiliary.isfinite().all()
    evaluated = head.eval()(_maps(1, grid), size)
    assert evaluated.logits.shape == (1, C, *size)
    assert evaluated.auxiliary is None


def test_each_map_reaches_the_scores_and_only_the_third_the_auxiliary_ones() -> None:
    maps = [x.requires_grad_() for x in _maps()]
    logits, auxiliary = _head()(maps, (12, 20))
    assert auxiliary is not None
    assert all(bool(grad.any()) for grad in torch.autograd.grad(logits.square().sum(), maps))
    grads = torch.autograd.grad(auxiliary.square().sum(), maps, allow_unused=True)
    assert [grad is not None for grad in grads] == [False, False, True, False]


def test_the_neck_makes_strides_of_a_quarter_to_two_and_keeps_the_border_of_odd_maps() -> None:
    maps = _maps()
    pyramid = FeaturePyramid(D)(maps)
    assert [tuple(x.shape[2:]) for x in pyramid] == [(12, 20), (6, 10), (3, 5), (2, 3)]
    assert pyramid[2] is maps[2]
    expected = F.max_pool2d(maps[3], 2, ceil_mode=True)
    torch.testing.assert_close(pyramid[3], expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(18, 18), (7, 5), (2, 1)])
@pytest.mark.parametrize("scale", [1, 2, 3, 6])
def test_regions_are_those_of_adaptive_pooling(size: tuple[int, int], scale: int) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(average_regions(x, scale), F.adaptive_avg_pool2d(x, scale))


def test_every_parameter_learns_from_the_two_losses_together() -> None:
    head = _head()
    logits, auxiliary = head(_maps(), (12, 20))
    assert auxiliary is not None
    target = torch.arange(2 * 12 * 20).view(2, 12, 20) % C
    (segmentation_loss(logits, target)[0] + segmentation_loss(auxiliary, target)[0]).backward()
    idle = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_any_split_of_a_batch_gives_the_same_scores_and_gradients() -> None:
    whole, parts = _head(dropout=0.0), _head(dropout=0.0)
    maps, target = _maps(3), torch.arange(3 * 12 * 20).view(3, 12, 20) % C
    target[0, :, :15] = 255  # the parts have unequal numbers of labelled pixels
    logits = whole(maps, (12, 20)).logits
    loss, count = segmentation_loss(logits, target)
    (loss / count).backward()
    for rows in (slice(0, 1), slice(1, 3)):
        part = parts([x[rows] for x in maps], (12, 20)).logits
        torch.testing.assert_close(part, logits[rows])
        (segmentation_loss(part, target[rows])[0] / count).backward()
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = _head(seed=3).state_dict()
    torch.manual_seed(2)
    second, other = _head(seed=3).state_dict(), _head(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.1.weight"], other["classifier.1.weight"])
    assert first["neck.up4.1.weight"].eq(1).all()
    assert first["neck.up4.1.bias"].eq(0).all()
    assert first["neck.up2.weight"].std().item() == pytest.approx(0.2, rel=0.1)
    assert not torch.equal(first["smooth.0.0.weight"], first["smooth.1.0.weight"])


@pytest.mark.parametrize(("grid", "training"), [((3, 5), True), ((4, 4), False)])
def test_the_cost_formulas_agree_with_a_count(grid: tuple[int, int], training: bool) -> None:
    head = _head().train(training)
    assert upernet_cost.num_parameters(D, C, **SMALL) == sum(p.numel() for p in head.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(_maps(1, grid), (8, 8))
    counted = sum(n for operation, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(operation))
    assert upernet_cost.forward_flops(D, C, grid, training=training, **SMALL) == counted


def test_the_cost_of_the_default_head_is_counted_with_its_default_sizes() -> None:
    with torch.device("meta"):
        head = UPerNetHead(768, 150)
    assert upernet_cost.num_parameters(768, 150) == sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_as_one_graph(training: bool) -> None:
    torch.compiler.reset()
    head = _head(dropout=0.0).train(training)
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="eager")
    for got, expected in zip(compiled(_maps(), (12, 20)), head(_maps(), (12, 20)), strict=True):
        torch.testing.assert_close(got, expected)


def test_three_maps_are_too_few() -> None:
    with pytest.raises(ValueError, match="4 blocks, got 3"):
        _head()(_maps()[:3], (8, 8))


def test_the_loss_is_the_mean_cross_entropy_times_the_labelled_pixels() -> None:
    logits = torch.randn(2, C, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.arange(24).view(2, 3, 4) % C
    target[1] = 255
    total, count = segmentation_loss(logits.bfloat16(), target.to(torch.uint8))
    assert total.dtype == torch.float32
    assert count.item() == 12
    expected = F.cross_entropy(logits.bfloat16().float(), target, ignore_index=255)
    torch.testing.assert_close(total / count, expected)


def test_masks_without_a_label_give_no_loss_and_no_gradient() -> None:
    logits = torch.zeros(1, C, 2, 2, requires_grad=True)
    total, count = segmentation_loss(logits, torch.full((1, 2, 2), 255))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need targets \[1, 2, 3\], got \[1, 3, 2\]"):
        segmentation_loss(torch.zeros(1, C, 2, 3), torch.zeros(1, 3, 2, dtype=torch.long))


@pytest.mark.parametrize(("width", "channels", "classes", "side", "patch"), [(192, 192, 50, 12, 8), (96, 128, 150, 16, 14)])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_memory_formula_agrees_with_what_is_kept(
    width: int, channels: int, classes: int, side: int, patch: int, bf16: bool
) -> None:
    head = UPerNetHead(width, classes, channels=channels, aux_channels=64).train()
    maps = [torch.randn(1, width, side, side, requires_grad=True) for _ in range(4)]
    weights = {parameter.untyped_storage().data_ptr() for parameter in head.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    size = (side * patch, side * patch)
    target = torch.zeros(1, *size, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=bf16):
        scores = head(maps, size)
        assert scores.auxiliary is not None
        losses = [segmentation_loss(part, target)[0] for part in (scores.logits, scores.auxiliary)]
    formula = upernet_cost.activation_bytes(
        width, classes, (side, side), patch, channels=channels, aux_channels=64, low_bytes=2 if bf16 else 4
    )
    assert len(losses) == 2
    assert formula == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.12)
