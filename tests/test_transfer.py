"""A task starts from the weights of another model: what moves, what stays fresh, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import FINETUNE, MODEL, PRETRAIN, SEGMENT, save_run

from nepa_dist.config import Config, ConfigError
from nepa_dist.cost import num_parameters
from nepa_dist.export import export
from nepa_dist.tasks.build import build_task
from nepa_dist.trained import load_trained
from nepa_dist.transfer import transfer


def task_of(values, **model):
    return build_task(Config.model_validate(values | {"model": MODEL | model, "seed": 7}))


@pytest.fixture
def pretrained(tmp_path):
    return save_run(tmp_path / "pretrained", PRETRAIN)


def copies(task):
    return {name: tensor.clone() for name, tensor in task.state_dict().items()}


@pytest.mark.parametrize("values", [FINETUNE, SEGMENT], ids=["finetune", "segment"])
@pytest.mark.parametrize("ema", [True, False])
def test_a_pretrained_backbone_moves_and_the_head_stays_fresh(pretrained, values, ema):
    task, source = task_of(values), load_trained(pretrained, ema=ema).task.state_dict()
    before = copies(task)
    account = transfer(task, pretrained, ema=ema)
    after = task.state_dict()
    for name, tensor in after.items():
        assert tensor.equal(source[name] if name.startswith("backbone.") else before[name]), name
    assert set(account.loaded) == {name for name in after if name.startswith("backbone.")}
    assert set(account.loaded) | set(account.fresh) == set(after), "every tensor is accounted for"
    assert account.ones == account.left_over == ()
    assert account.num_parameters == sum(after[name].numel() for name in account.loaded)
    assert account.origin == f"step 20, {'averaged' if ema else 'raw'} weights"
    frozen = [name for name, parameter in task.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, parameter in task_of(values).named_parameters() if not parameter.requires_grad]


def test_the_account_names_every_tensor(tmp_path):
    source = save_run(tmp_path / "masked", PRETRAIN | {"objective": {"mask_ratio": 0.5}})
    text = str(transfer(task_of(FINETUNE, qk_norm_affine=True), source, ema=True))
    assert text.splitlines() == [
        f"starting from {source}: step 20, averaged weights",
        f"  33 tensors loaded, {num_parameters(Config.model_validate(PRETRAIN).model):,} parameters",
        "    backbone.cls_token",
        "    backbone.patch_embed: weight, bias",
        "    backbone.blocks.0-1.norm1: weight, bias",
        "    backbone.blocks.0-1.attn.qkv: weight, bias",
        "    backbone.blocks.0-1.attn.proj: weight, bias",
        "    backbone.blocks.0-1.norm2: weight, bias",
        "    backbone.blocks.0-1.mlp.gate_up: weight, bias",
        "    backbone.blocks.0-1.mlp.down: weight, bias",
        "    backbone.blocks.0-1.ls1: gamma",
        "    backbone.blocks.0-1.ls2: gamma",
        "    backbone.norm: weight, bias",
        "  4 ones, where the source has no scale",
        "    backbone.blocks.0-1.attn.q_norm: weight",
        "    backbone.blocks.0-1.attn.k_norm: weight",
        "  4 fresh",
        "    head.norm: weight, bias",
        "    head.linear: weight, bias",
        "  1 left over in the source",
        "    head.mask_token",
        "  the head is fresh: that of the source (pretrain) has other parts",
    ]


def test_scales_that_the_source_lacks_are_ones(pretrained):
    task = task_of(FINETUNE, qk_norm_affine=True)
    with torch.no_grad():
        task.backbone.blocks[0].attn.q_norm.weight.fill_(3)
    transfer(task, pretrained, ema=True)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    same = load_trained(pretrained).task.backbone
    assert task.backbone.blocks[0].attn.q_norm.weight.equal(torch.ones(16))
    assert task.eval().backbone(images, causal=True).hidden.equal(same(images, causal=True).hidden)


def test_a_head_moves_to_a_task_that_has_the_same(tmp_path):
    source = save_run(tmp_path / "classifier", FINETUNE)
    task = task_of(FINETUNE, drop_path=0.2, image_size=56)
    account = transfer(task, source, ema=True)
    assert account.fresh == account.left_over == ()
    assert task.head.linear.weight.equal(load_trained(source).task.head.linear.weight)
    assert "head is fresh" not in str(account)


def test_a_head_of_other_classes_stays_fresh(tmp_path):
    source = save_run(tmp_path / "classifier", FINETUNE)
    task = task_of(FINETUNE | {"finetune": {"num_classes": 3}})
    account = transfer(task, source, ema=True)
    assert set(account.fresh) == {name for name in task.state_dict() if name.startswith("head.")}
    assert set(account.left_over) == set(account.fresh)
    assert "the head is fresh: shape of head.linear.weight: [5, 32], here [3, 32]" in str(account)
    assert not task.head.linear.weight.any()


def test_exported_and_official_weights_are_sources(pretrained, tmp_path):
    expected = load_trained(pretrained).task.backbone.state_dict()
    for format in ("native", "official"):
        export(pretrained, tmp_path / format, format=format, backbone_only=True)
        for ema in (True, False):
            task = task_of(FINETUNE)
            account = transfer(task, tmp_path / format, ema=ema)
            assert all(task.backbone.state_dict()[name].equal(tensor) for name, tensor in expected.items())
            assert account.origin == "step 20, averaged weights"


def refusal(task, source, *, ema=True):
    before = copies(task)
    with pytest.raises(ConfigError) as caught:
        transfer(task, source, ema=ema)
    assert all(tensor.equal(before[name]) for name, tensor in task.state_dict().items()), "the task is as it was"
    return caught.value.problems


def test_another_model_is_refused_with_every_difference(pretrained):
    other = {"embed_dim": 64, "depth": 3, "rope_theta": 50.0, "qk_norm": False, "norm_eps": 1e-6, "drop_path": 0.3}
    first, *problems = refusal(task_of(FINETUNE, **other), pretrained)
    assert first == f"init.path: {pretrained} holds another model than this run"
    for problem in (
        "model.embed_dim: 32 there, 64 here",
        "model.depth: 2 there, 3 here",
        "model.rope_theta: 100.0 there, 50.0 here",
        "model.qk_norm: True there, False here",
        "model.norm_eps: 1e-12 there, 1e-06 here",
        "model.mlp_hidden_dim: 128 there, 192 here",
        "missing: backbone.blocks.2.attn.qkv.weight",
        "shape of backbone.cls_token: [1, 1, 32], here [1, 1, 64]",
        "shape of backbone.blocks.0-1.attn.qkv.weight: [96, 32], here [192, 64]",
    ):
        assert problem in problems, problems
    assert not [problem for problem in problems if "drop_path" in problem or "head" in problem]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"patch_size": 14}, "model.patch_size: 7 there, 14 here"),
        ({"activation": "gelu"}, "model.activation: 'silu' there, 'gelu' here"),
        ({"num_heads": 4}, "model.num_heads: 2 there, 4 here"),
        ({"layer_scale": False}, "left over: backbone.blocks.0-1.ls1.gamma"),
        ({"gated_mlp": False}, "missing: backbone.blocks.0-1.mlp.up.weight"),
    ],
)
def test_one_other_setting_is_enough(pretrained, changes, problem):
    assert problem in refusal(task_of(FINETUNE, **changes), pretrained)


def test_the_same_mlp_width_may_be_given_in_another_way(pretrained):
    transfer(task_of(FINETUNE, mlp_hidden_dim=128, mlp_ratio=2), pretrained, ema=True)


def test_trained_scales_are_not_dropped(tmp_path):
    source = save_run(tmp_path / "affine", PRETRAIN | {"model": MODEL | {"qk_norm_affine": True}})
    assert "model.qk_norm_affine: True there, False here" in refusal(task_of(FINETUNE), source)


def test_learned_positions_need_the_size_of_the_source(tmp_path):
    source = save_run(tmp_path / "positions", PRETRAIN | {"model": MODEL | {"rope": False}})
    transfer(task_of(FINETUNE, rope=False), source, ema=True)
    problems = refusal(task_of(FINETUNE, rope=False, image_size=56), source)
    assert "model.image_size: 28 there, 56 here" in problems
    assert "shape of backbone.pos_embed: [1, 17, 32], here [1, 65, 32]" in problems


def test_official_weights_with_missing_keys_are_refused_with_their_names(pretrained, tmp_path):
    export(pretrained, tmp_path / "official", format="official")
    file = tmp_path / "official" / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if "layernorm" not in name}
    save_file(state, file)
    [problem] = refusal(task_of(FINETUNE), tmp_path / "official")
    assert "missing: vit_nepa.encoder.layer.0-1.layernorm_before.weight" in problem
    assert "missing: vit_nepa.layernorm.bias" in problem


def test_official_weights_without_scales_say_that_they_are_ones(tmp_path):
    source = save_run(tmp_path / "affine", PRETRAIN | {"model": MODEL | {"qk_norm_affine": True}})
    export(source, tmp_path / "official", format="official")
    file = tmp_path / "official" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "q_norm" not in name}, file)
    account = transfer(task_of(FINETUNE, qk_norm_affine=True), tmp_path / "official", ema=True)
    assert account.ones == tuple(f"backbone.blocks.{i}.attn.q_norm.weight" for i in range(2))


def test_averages_that_are_asked_for_must_be_there(pretrained, tmp_path):
    export(pretrained, tmp_path / "raw", ema=False)
    [problem] = refusal(task_of(FINETUNE), tmp_path / "raw")
    assert problem == f"init.load ema: {tmp_path / 'raw'} holds no averaged weights, only step 20, raw weights"
    transfer(task_of(FINETUNE), tmp_path / "raw", ema=False)


def test_a_source_that_holds_no_model_is_named(tmp_path):
    [problem] = refusal(task_of(FINETUNE), tmp_path / "typo")
    assert problem.startswith("init.path: there is no run and no file of weights at")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model": {"depth": 0}}))
    [problem] = refusal(task_of(FINETUNE), tmp_path / "odd")
    assert "model.depth" in problem


def test_pretraining_goes_on_from_exported_weights(tmp_path):
    """From a run it starts as before; weights alone go the way of every other task."""
    from nepa_dist.config import Config
    from nepa_dist.resume import begins_with_transfer

    (tmp_path / "config.json").write_text("{}")
    exported = {"init": {"path": str(tmp_path)}}
    assert begins_with_transfer(Config.model_validate(exported))
    assert not begins_with_transfer(Config.model_validate({"init": {"path": str(tmp_path), "load": "weights+ema"}}))
    assert not begins_with_transfer(Config.model_validate({"init": {"path": str(tmp_path / "run")}}))
    assert begins_with_transfer(Config.model_validate({"task": "finetune", "init": {"path": str(tmp_path / "run")}}))
