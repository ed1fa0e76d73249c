"""The backbone: shapes, causality, switches, initial weights."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nepa_dist.config import ModelConfig
from nepa_dist.cost import forward_flops, num_parameters, train_flops
from nepa_dist.model import VisionTransformer
from nepa_dist.presets import PRESETS

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def small(**changes):
    return VisionTransformer(ModelConfig(**{**SMALL, **changes})).eval()


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_future_patch_cannot_change_an_earlier_prediction(preset):
    # Full width and head layout of the preset; two blocks and small patches suffice to see a leak.
    model = VisionTransformer(ModelConfig(preset=preset, depth=2, image_size=32, patch_size=8)).eval()
    with torch.no_grad():
        for block in model.blocks:  # LayerScale starts at 1e-5, which would hide a leak
            block.ls1.gamma.fill_(1)
            block.ls2.gamma.fill_(1)
        before = images(2, 3, 32, 32)
        after = before.clone()
        after[:, :, 16:24, 8:16] += 1  # row 2, column 1 of 4: patch 9, token 10
        a, b = model(before, causal=True).hidden, model(after, causal=True).hidden
        both_ways = (model(before, causal=False).hidden - model(after, causal=False).hidden)[:, :10]
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.equal(a[:, 10], b[:, 10])
    assert both_ways.abs().max() > 0


@pytest.mark.parametrize("preset", list(PRESETS))
def test_parameter_formula_counts_the_real_module(preset):
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        model = VisionTransformer(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [{name: False} for name in ("rope", "qk_norm", "layer_scale", "gated_mlp", "qkv_bias")] + [{"qk_norm_affine": True}],
)
def test_parameter_formula_follows_every_switch(changes):
    model = small(**changes)
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", ["vit_tiny", "vit_b_gelu"])
def test_flop_formula_matches_a_count_of_the_real_module(preset):
    config = ModelConfig(preset=preset, depth=2)
    model = VisionTransformer(config)
    counter = FlopCounterMode(display=False)
    # The counter knows the plain attention products, at their full size.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        model(images(1, 3, 224, 224), causal=False).hidden.sum()
    assert counter.get_total_flops() == sum(forward_flops(config, causal=False))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        model(images(1, 3, 224, 224), causal=False).hidden.sum().backward()
    assert counter.get_total_flops() == train_flops(config, causal=False)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (16, 56), (64, 40)])
@pytest.mark.parametrize("rope", [True, False])
def test_any_multiple_of_the_patch_size(height, width, rope):
    features = small(rope=rope)(images(2, 3, height, width), causal=True, taps=(0, -1))
    tokens = 1 + height // 8 * (width // 8)
    assert features.grid == (height // 8, width // 8)
    assert features.embed.shape == features.hidden.shape == features.taps[0].shape == features.taps[-1].shape == (2, tokens, 32)


def test_wrong_sizes_and_taps_are_refused():
    model = small()
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        model(images(1, 3, 32, 30), causal=True)
    with pytest.raises(ValueError, match="tap 3 is not a block"):
        model(images(1, 3, 32, 32), causal=True, taps=(3,))


def test_features_are_what_they_are_called():
    model = small()
    batch = images(2, 3, 32, 32)
    features = model(batch, causal=True, taps=(2,))
    patch = batch[:, :, 8:16, 24:32].flatten(1)  # row 1, column 3: token 1 + 7
    expected = patch @ model.patch_embed.weight.flatten(1).T + model.patch_embed.bias
    torch.testing.assert_close(features.embed[:, 8], expected)
    torch.testing.assert_close(features.embed[:, 0], model.cls_token[0].expand(2, -1))
    torch.testing.assert_close(features.hidden, model.norm(features.taps[2]))


def test_rope_makes_attention_depend_on_position_and_cls_does_not_rotate():
    from nepa_dist.model import rotary_table

    table = rotary_table(small().config, (4, 4), torch.device("cpu"))
    assert torch.equal(table.cos[0], torch.ones(16))
    assert torch.equal(table.sin[0], torch.zeros(16))
    # First patch centre is (-0.75, -0.75); the lowest index is the highest frequency, 1 turn per unit.
    assert math.isclose(table.cos[1, 0].item(), math.cos(2 * math.pi * -0.75), abs_tol=1e-6)
    # x advances along a row, y stays.
    assert torch.equal(table.cos[1, :4], table.cos[2, :4])
    assert not torch.equal(table.cos[1, 4:8], table.cos[2, 4:8])


def test_rescale_is_random_in_training_only_and_can_be_given():
    model = VisionTransformer(ModelConfig(**SMALL, layer_scale=False))
    batch = images(1, 3, 32, 32)
    first, second = model.train()(batch, causal=True).hidden, model(batch, causal=True).hidden
    assert not torch.equal(first, second)
    assert torch.equal(model(batch, causal=True, rope_scale=torch.ones(())).hidden, model.eval()(batch, causal=True).hidden)
    draws = model.rope_scale_from(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(draws, torch.tensor([0.5, 1.0, 2.0]))


def test_learned_positions_replace_rope():
    model = small(rope=False)
    assert model.pos_embed.shape == (1, 17, 32)
    constant = torch.ones(1, 3, 32, 32)
    hidden = model(constant, causal=False).hidden
    assert not torch.allclose(hidden[:, 1], hidden[:, 2])  # equal patches, told apart by position
    assert torch.equal(model(constant, causal=False).embed[:, 1], model(constant, causal=False).embed[:, 2])


def test_initial_weights():
    model = small(embed_dim=128, num_heads=2)
    weight = model.blocks[0].attn.qkv.weight
    assert abs(weight.std().item() - 0.02) < 1e-3
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0
    assert torch.equal(model.blocks[1].ls2.gamma, torch.full((128,), 1e-5))
    assert torch.equal(model.norm.weight, torch.ones(128))
    # Streams are keyed by name: equal for equal seeds, different between parameters and seeds, independent of depth.
    again, other = small(embed_dim=128, num_heads=2, depth=1), VisionTransformer(model.config, seed=1)
    assert torch.equal(again.blocks[0].mlp.down.weight, model.blocks[0].mlp.down.weight)
    assert not torch.equal(other.blocks[0].mlp.down.weight, model.blocks[0].mlp.down.weight)
    assert not torch.equal(model.blocks[0].mlp.down.weight, model.blocks[1].mlp.down.weight)


def test_drop_path_drops_whole_branches_of_single_images_in_training():
    model = VisionTransformer(ModelConfig(**{**SMALL, "depth": 2}, drop_path=0.5, layer_scale=False, rope_rescale=1)).train()
    batch = images(1, 3, 32, 32).expand(64, -1, -1, -1)
    rows = model(batch, causal=True).hidden[:, -1]
    # The last block has two branches that are in or out: at most 4 different results.
    assert 2 <= len(torch.unique(rows.round(decimals=4), dim=0)) <= 4
    rows = model.eval()(batch, causal=True).hidden[:, -1]
    assert torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-5)


@pytest.mark.parametrize("size", [(28, 42), (56, 56)])
def test_patches_are_embedded_alike_by_convolution_and_matrix_product(size):
    model = VisionTransformer(ModelConfig(image_size=28, patch_size=14, embed_dim=32, depth=1, num_heads=2))
    images = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last)
    results = []
    for model.patch_embed.as_matmul in (False, True):
        model.zero_grad()
        out = model.patch_embed(images)
        out.square().sum().backward()
        results.append((out, *(parameter.grad for parameter in model.patch_embed.parameters())))
    for convolution, product in zip(*results, strict=True):
        torch.testing.assert_close(convolution, product, atol=1e-4, rtol=1e-5)
