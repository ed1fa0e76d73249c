"""The classification task: its loss, which learning rate each part gets, what is frozen, and exact scores."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nepa_dist.config import Config, ConfigError, FinetuneConfig, ModelConfig
from nepa_dist.config_load import load_config
from nepa_dist.engines.build import build_engine
from nepa_dist.optim import learning_rate
from nepa_dist.plan import make_plan
from nepa_dist.tasks.base import HEAD_LAYER
from nepa_dist.tasks.build import build_task
from nepa_dist.tasks.finetune import FinetuneTask

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(image_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)


def make(**config):
    return FinetuneTask(MODEL, FinetuneConfig(num_classes=7, **config), seed=3)


def batch(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randn(size, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, 7, (size,), generator=generator),
    }


def test_the_zero_head_starts_at_the_uniform_prediction():
    task = make()
    loss, _ = task(task.prepare(batch(), step=0, micro_batch=0))
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_the_loss_is_cross_entropy_with_the_smoothed_mixed_labels():
    task = make(mixup=0.8, cutmix=0.0, label_smoothing=0.1).eval()
    torch.nn.init.normal_(task.head.linear.weight)
    plain = batch()
    mixed = task.prepare(dict(plain), step=5, micro_batch=2)
    weight = task.mixup.draw(32, 32, seed=3, step=5, micro_batch=2).weight
    hard = F.one_hot(plain["labels"], 7) * 0.9 + 0.1 / 7
    torch.testing.assert_close(mixed["targets"], hard * weight + hard.flip(0) * (1 - weight))
    torch.testing.assert_close(mixed["images"], plain["images"] * weight + plain["images"].flip(0) * (1 - weight))
    expected = F.cross_entropy(task.logits(mixed["images"]), mixed["targets"])
    torch.testing.assert_close(task(mixed)[0], expected)
    other = task.prepare(dict(plain), step=5, micro_batch=3)
    assert not torch.equal(other["images"], mixed["images"])


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16_params"])
def test_soft_labels_are_exact_in_every_precision(precision):
    config = Config.model_validate(
        {
            "task": "finetune",
            "model": {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
            "finetune": {"num_classes": 7},
            "engine": {"precision": precision, "device": "cpu"},
            "global_batch_size": 4,
        }
    )
    task = build_task(config).train()
    engine = build_engine(task, config, make_plan(config, 4), torch.device("cpu"))
    batch = {"images": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 3])}
    loss, _ = engine.model(task.prepare(batch, step=0, micro_batch=0))
    assert loss.item() == pytest.approx(math.log(7), abs=1e-5)
    engine.close()


def test_the_patch_embedding_is_frozen_and_cls_is_not():
    frozen = {name for name, p in make().named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.patch_embed.weight", "backbone.patch_embed.bias"}
    assert all(p.requires_grad for p in make(freeze_patch_embed=False).parameters())


def test_layers_count_from_the_head_down():
    task = make()
    layers = {name: task.lr_layer(name) for name, _ in task.named_parameters()}
    assert layers["head.linear.weight"] == layers["backbone.norm.bias"] == HEAD_LAYER
    assert layers["head.norm.weight"] == layers["backbone.blocks.3.ls1.gamma"] == 0
    assert layers["backbone.blocks.0.attn.qkv.weight"] == 3
    assert layers["backbone.cls_token"] == 4


def peaks(recipe, images=1281167):
    """Peak of each layer's learning rate and its epoch, from the top block down, for a recipe on ImageNet-1K."""
    config = load_config([ROOT / f"configs/finetune/{recipe}.yaml"], base={"task": "finetune"})
    plan = make_plan(config, images)
    steps_per_epoch = images / config.global_batch_size
    found = []
    for layer in (HEAD_LAYER, *range(config.model.depth)):
        rates = [
            (learning_rate(step, plan, config.optim, layer), -step) for step in range(0, plan.steps, 1 if layer < 1 else 25)
        ]
        rate, step = max(rates)
        found.append((rate, -step / steps_per_epoch))
    return found


def test_the_released_layer_wise_schedule():
    """arXiv 2512.16922's scripts: reference figures of the layer-dependent warm-up."""
    base = peaks("vit_b_gelu")
    head, top, middle, bottom = base[0], base[1], base[1 + 5], base[1 + 11]
    assert head[0] == pytest.approx(1e-3)
    assert top == (pytest.approx(6e-3), pytest.approx(0, abs=0.01))
    assert middle == (pytest.approx(7.0e-4, rel=0.01), pytest.approx(17.7, abs=0.1))
    assert bottom == (pytest.approx(5.3e-5, rel=0.01), pytest.approx(19.8, abs=0.1))
    large = peaks("vit_l_gelu")
    assert large[1 + 11] == (pytest.approx(1.7e-4, rel=0.01), pytest.approx(28.7, abs=0.1))
    assert large[1 + 23] == (pytest.approx(5.4e-6, rel=0.01), pytest.approx(30, abs=0.1))


def test_the_papers_layer_decay_rises_to_one():
    for recipe, decay in (("vit_b", 0.35), ("vit_l", 0.60)):
        config = load_config([ROOT / f"configs/finetune/{recipe}.yaml"], base={"task": "finetune"})
        plan = make_plan(config, 1281167)
        assert plan.peak_lr == pytest.approx(4e-3)
        for step in (plan.warmup_steps, plan.steps // 2, plan.steps - 1):
            share = step / plan.steps
            ratio = learning_rate(step, plan, config.optim, 3) / learning_rate(step, plan, config.optim, 0)
            assert ratio == pytest.approx((decay + (1 - decay) * share) ** 3)
        assert learning_rate(plan.steps - 1, plan, config.optim, 9) == pytest.approx(
            learning_rate(plan.steps - 1, plan, config.optim, 0), rel=1e-3
        )


@pytest.mark.parametrize(("off", "fine"), [([], False), (["finetune.mixup=0", "finetune.cutmix=0"], True)])
def test_a_single_image_has_no_partner_to_mix_with(off, fine):
    config = load_config(overrides=["global_batch_size=4", "micro_batch_size=1", "steps=9", *off], base={"task": "finetune"})
    if fine:
        assert make_plan(config, 100).micro_batch_size == 1
        return
    with pytest.raises(ConfigError, match="mixup and cutmix need two images in a micro-batch"):
        make_plan(config, 100)


def test_scores_count_every_labelled_image_once():
    task = make().eval()
    torch.nn.init.normal_(task.head.linear.weight)
    data = batch(size=50, seed=1)
    data["labels"][[3, 17]] = -1
    task.requires_grad_(False)
    whole = task.measure(data)
    parts = [task.measure({key: value[part] for key, value in data.items()}) for part in (slice(0, 20), slice(20, 50))]
    for name in whole:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])
    logits, known = task.logits(data["images"]), data["labels"] >= 0
    scores = task.score(whole, ["zero", "one", *"abcde"])
    right = (logits.argmax(1) == data["labels"])[known]
    assert scores.values["top1"] == pytest.approx(right.double().mean().item())
    fifth = logits[known].topk(5).indices.eq(data["labels"][known][:, None]).any(1)
    assert scores.values["top5"] == pytest.approx(fifth.double().mean().item())
    assert scores.values["eval_loss"] == pytest.approx(F.cross_entropy(logits[known], data["labels"][known]).item(), rel=1e-6)
    lines = scores.per_class.splitlines()
    assert lines[0] == "class,name,top1,top5,images"
    assert lines[1].startswith("0,zero,")
    assert sum(int(line.split(",")[-1]) for line in lines[1:]) == 48


def test_the_number_of_classes_must_be_known():
    config = Config(task="finetune", model=MODEL)
    with pytest.raises(ValueError, match=r"finetune.num_classes"):
        build_task(config)
