"""The segmentation task: taps, an exact mean over labelled pixels, what is frozen, scores on whole images, and bad masks."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nepa_dist.config import Config, ConfigError, ModelConfig, SegmentConfig
from nepa_dist.config_load import load_config
from nepa_dist.data.classes import resolve_classes
from nepa_dist.data.containers import Sample
from nepa_dist.data.decode import BadImage
from nepa_dist.data.open import open_container
from nepa_dist.data.segment_augment import class_mask
from nepa_dist.data.whole import WholeImages
from nepa_dist.intake import weighted
from nepa_dist.tasks.build import build_task
from nepa_dist.tasks.segment import SegmentTask

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(image_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
SMALL = {"num_classes": 5, "channels": 16, "aux_channels": 8, "dropout": 0.0}


def make(**config):
    return SegmentTask(MODEL, SegmentConfig(**{**SMALL, **config}), seed=3)


def batch(size=4, seed=0):
    """Images and masks with very different numbers of labelled pixels; one has none."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 5, (size, 32, 32), generator=generator, dtype=torch.uint8)
    for index in range(size):
        masks[index, (32 * index) // (size - 1) :] = 255
    return {"images": torch.randn(size, 3, 32, 32, generator=generator), "masks": masks}


@pytest.mark.parametrize(("depth", "taps"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (4, (0, 1, 2, 3)), (6, (0, 2, 3, 5))])
def test_taps_are_at_the_quarters(depth, taps):
    assert SegmentConfig().taps_of(depth) == taps


def test_every_split_of_a_global_batch_has_the_loss_and_gradient_of_the_whole():
    """Pixel by pixel: a mean of means would weigh a pixel more where its micro-batch has few labelled ones."""
    whole = batch()
    task = make()
    loss, logs = task(whole)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    scores = task.logits(whole["images"])
    labelled = F.cross_entropy(scores.logits, whole["masks"].long(), ignore_index=255)
    torch.testing.assert_close(loss, labelled + 0.4 * logs["aux_loss"])
    task.zero_grad()
    parts = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(4)]
    run = SimpleNamespace(
        task=task,
        plan=SimpleNamespace(grad_accum_steps=4),
        world=SimpleNamespace(world_size=1, all_reduce=lambda tensor: tensor),
    )
    total = 0.0
    for inputs, share in weighted(run, parts):
        part, _ = task(inputs)
        (part * share / 4).backward()
        total += (part * share / 4).item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(task.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    task, data = make(), batch()
    data["masks"][:] = 255
    loss, _ = task(data)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in task.parameters())


def test_all_that_is_trained_gets_a_gradient():
    for config in ({}, {"aux_weight": 0.0}, {"freeze_patch_embed": True}, {"taps": (0, 0, 1, 3)}):
        task = make(**config)
        task(batch())[0].backward()
        without = {name for name, p in task.named_parameters() if p.requires_grad and p.grad is None}
        assert without == set(), config
        assert not task.backbone.norm.weight.requires_grad


def test_rates_fall_from_the_head_down():
    task = make()
    assert task.lr_layer("head.fuse.0.weight") == 0
    assert task.lr_layer("backbone.blocks.3.norm1.weight") == 1
    assert task.lr_layer("backbone.patch_embed.weight") == 5


@pytest.mark.parametrize("options", [{}, {"window": "whole"}, {"eval_scales": (0.5, 1.0, 1.5), "eval_flip": True}])
def test_whole_images_of_any_size_are_scored_at_the_size_of_their_masks(options):
    task = make(stride=16, **options).eval()
    images, masks = torch.randn(1, 3, 45, 70), torch.randint(0, 5, (1, 90, 140), dtype=torch.uint8)
    with torch.inference_mode():
        sums = task.measure({"images": images, "masks": masks})
        predicted = task.predict(images, (90, 140))
    assert predicted.shape == (1, 90, 140)
    confusion = np.zeros((5, 5), int)
    np.add.at(confusion, (masks.numpy().ravel(), predicted.numpy().ravel()), 1)
    assert np.array_equal(sums["confusion"].numpy(), confusion)
    scores = task.score(sums, list("abcde"))
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    assert scores.values["miou"] == pytest.approx((confusion.diagonal() / union).mean())
    assert scores.per_class.splitlines()[1].startswith("0,a,")


@pytest.mark.parametrize("recipe", ["vit_tiny", "vit_s", "vit_b", "vit_l", "vit_h", "vit_b_gelu", "vit_l_gelu"])
def test_every_recipe_builds_with_taps_in_the_backbone(recipe):
    config = load_config([ROOT / f"configs/segment/{recipe}.yaml"], ["segment.num_classes=150"], base={"task": "segment"})
    assert config.model.image_size % config.model.patch_size == 0
    with torch.device("meta"):
        task = build_task(config)
    assert task.taps[-1] == config.model.depth - 1


def test_masks_count_from_zero_and_strange_values_are_named():
    mask = np.array([[0, 1, 150], [255, 2, 3]], np.uint8)
    reduced = class_mask(mask, SegmentConfig(num_classes=150))
    assert reduced.tolist() == [[255, 0, 149], [255, 1, 2]]
    plain = SegmentConfig(num_classes=151, reduce_zero_label=False)
    assert class_mask(mask, plain).tolist() == mask.tolist()
    with pytest.raises(BadImage, match=r"values from 1 to 150, but there are 11 classes, 1 to 11"):
        class_mask(mask, SegmentConfig(num_classes=11))
    with pytest.raises(BadImage, match="values from 256 to 256"):
        class_mask(np.full((2, 2), 256, np.uint16), SegmentConfig(num_classes=150))
    with pytest.raises(BadImage, match="but there are 150 classes, 0 to 149"):
        class_mask(mask, SegmentConfig(num_classes=150, reduce_zero_label=False))


class Pairs:
    """A container of pairs, some of them broken."""

    class_names = ["a", "b"]  # noqa: RUF012
    num_ignored = 0
    fingerprint = "0" * 64

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]

    def name(self, index):
        return f"pair {index}"


def test_whole_images_come_in_order_and_bad_ones_are_named():
    image, mask = np.zeros((50, 60, 3), np.uint8), np.ones((50, 60), np.uint8)
    container = Pairs(
        [
            Sample(image, -1, mask),
            Sample(image, -1, mask[:-1]),
            Sample(image, -1, mask * 9),
            Sample(image, -1, None),
            OSError("gone"),
            Sample(image.transpose(1, 0, 2), -1, mask.T),
        ]
    )
    config = Config(task="segment", model=MODEL, segment=SegmentConfig(num_classes=2))
    batches = list(WholeImages(container, config, range(6)))
    assert [batch.ids.tolist() for batch in batches] == [[0], [], [], [], [], [5]]
    assert batches[0].images.shape == (1, 32, 38, 3)
    assert batches[5].images.shape == (1, 38, 32, 3)
    assert batches[5].masks.shape == (1, 60, 50)
    reasons = [batch.bad[0] for batch in batches[1:5]]
    assert [reason.name for reason in reasons] == ["pair 1", "pair 2", "pair 3", "pair 4"]
    assert "60x49 pixels, the image 60x50" in reasons[0].reason
    assert "there are 2 classes" in reasons[1].reason
    assert "no mask" in reasons[2].reason
    assert "gone" in reasons[3].reason


def test_an_iteration_that_is_left_early_ends_its_thread():
    sample = Sample(np.zeros((40, 40, 3), np.uint8), -1, np.ones((40, 40), np.uint8))
    config = Config(task="segment", model=MODEL, segment=SegmentConfig(num_classes=2))
    iterator = iter(WholeImages(Pairs([sample] * 50), config, range(50)))
    next(iterator)
    assert "validation images" in [thread.name for thread in threading.enumerate()]
    iterator.close()
    assert "validation images" not in [thread.name for thread in threading.enumerate()]


def test_classes_come_from_the_data_unless_given(tmp_path):
    digits = open_container("digits", "train", image_size=32)
    finetune = Config(task="finetune", model=MODEL)
    assert resolve_classes(finetune, digits).num_classes == 10
    too_few = Config.model_validate({"task": "finetune", "finetune": {"num_classes": 9}})
    with pytest.raises(ConfigError, match=r"finetune.num_classes is 9, but .* has 10 classes"):
        resolve_classes(too_few, digits)
    assert resolve_classes(Config(), digits) == Config()
    unlabelled = Pairs([Sample(np.zeros((8, 8, 3), np.uint8), -1, None)])
    unlabelled.class_names = []
    with pytest.raises(ConfigError, match="has 0 classes"):
        resolve_classes(finetune, unlabelled)
    with pytest.raises(ConfigError, match="has no masks"):
        resolve_classes(Config(task="segment", model=MODEL), unlabelled)


def test_taps_and_strides_that_do_not_fit_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        load_config([], ["segment.taps=[0,1,2,12]", "segment.stride=600", "segment.num_classes=300"], base={"task": "segment"})
    text = "\n".join(caught.value.problems)
    assert "blocks 0 to 11" in text
    assert "segment.stride 600" in text
    assert "at most 255" in text
