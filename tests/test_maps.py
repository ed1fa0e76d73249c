"""Attention and similarity maps: the model's own numbers, at the patch that they are said to be of."""

import pytest
import torch
from torch import nn

from nepa_dist.config import ModelConfig, ObjectiveConfig
from nepa_dist.maps import attention_maps, attention_row, similarity_map
from nepa_dist.model import Features, VisionTransformer
from nepa_dist.presets import PRESETS
from nepa_dist.tasks.pretrain import PretrainTask

SMALL = {"image_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
VARIANTS = {
    "paper": {},
    "no rope": {"rope": False},
    "no qk norm": {"qk_norm": False},
    "affine qk norm": {"qk_norm_affine": True},
    **{name: {**PRESETS[name], "embed_dim": 16, "depth": 2, "num_heads": 2} for name in PRESETS},
}


def lively(module, seed=0):
    """Weights so large that attention is far from even, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.eval()


def image_of(height, width, seed=0):
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def record_attention(backbone, image, causal):
    """Input, rotation and output of the attention of each block in a plain forward pass."""
    seen = []
    hooks = [
        block.attn.register_forward_hook(lambda module, args, out: seen.append((module, args[0], args[1], out)))
        for block in backbone.blocks
    ]
    with torch.no_grad():
        backbone(image[None], causal=causal)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_times_values_are_the_output_of_the_models_attention(variant, causal):
    backbone = lively(VisionTransformer(ModelConfig(**SMALL | VARIANTS[variant])))
    image = image_of(8, 12)
    for layer, (attention, x, rotary, expected) in enumerate(record_attention(backbone, image, causal)):
        tokens = x.shape[1]
        rows = torch.stack([attention_row(attention, x, rotary, token=t, causal=causal) for t in range(tokens)], dim=2)
        values = attention.qkv(x).chunk(3, dim=-1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
        output = attention.proj((rows @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)
        shown = attention_maps(backbone, image, (1, 1), layers=[layer], causal=causal)[layer]
        torch.testing.assert_close(shown.flatten(), rows[0, :, 1 + 4, 1:].mean(dim=0))


@pytest.mark.parametrize("variant", ["paper", "no rope"])
@pytest.mark.parametrize("size", [(4, 4), (12, 12), (8, 20), (24, 16)])
def test_any_size_gives_a_map_of_its_grid(size, variant):
    task = lively(PretrainTask(ModelConfig(**SMALL | VARIANTS[variant])))
    query = (size[0] // 4 - 1, 0)
    maps = attention_maps(task.backbone, image_of(*size), query)
    similarity = similarity_map(task, image_of(*size), query)
    assert list(maps) == [0, 1, 2]
    for grid in (*maps.values(), similarity):
        assert grid.shape == (size[0] // 4, size[1] // 4)
        assert grid.dtype == torch.float32
        assert torch.isfinite(grid).all()
    assert similarity.abs().max() <= 1 + 1e-6


def test_patches_after_the_query_get_exactly_nothing_under_causal_attention():
    backbone = lively(VisionTransformer(ModelConfig(**SMALL)))
    for weights in attention_maps(backbone, image_of(12, 12), (1, 1)).values():
        flat = weights.flatten()
        assert (flat[:5] > 0).all()
        assert (flat[5:] == 0).all()
        assert 0 < flat.sum() < 1, "CLS has its share and the rest is not rescaled"
    for weights in attention_maps(backbone, image_of(12, 12), (1, 1), causal=False).values():
        assert (weights > 0).all()


def test_without_queries_and_keys_attention_is_even():
    backbone = lively(VisionTransformer(ModelConfig(**SMALL)))
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.weight[:32] = 0
            block.attn.qkv.bias[:32] = 0
    for weights in attention_maps(backbone, image_of(12, 12), (1, 2)).values():
        torch.testing.assert_close(weights.flatten(), torch.tensor([1 / 7] * 6 + [0.0] * 3))
    for weights in attention_maps(backbone, image_of(12, 12), (0, 0), causal=False).values():
        torch.testing.assert_close(weights, torch.full((3, 3), 0.1))


def test_a_model_that_looks_for_its_like_finds_it():
    """Queries and keys that are the input itself, scaled up: a patch attends to those of its own colour, in equal shares."""
    backbone = lively(VisionTransformer(ModelConfig(**SMALL | {"rope": False, "qk_norm": False, "depth": 1})))
    with torch.no_grad():
        backbone.pos_embed.zero_()
        backbone.blocks[0].attn.qkv.weight[:32] = 30 * torch.eye(16).repeat(2, 1)
        backbone.blocks[0].attn.qkv.bias.zero_()
        backbone.blocks[0].norm1.weight.fill_(1)
        backbone.blocks[0].norm1.bias.zero_()
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    image = (2.0 * colours - 1).repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, 12, 12)
    both_ways = attention_maps(backbone, image, (1, 1), causal=False)[0]
    torch.testing.assert_close(both_ways, colours / 3, atol=1e-4, rtol=0)
    causal = attention_maps(backbone, image, (1, 1))[0]
    torch.testing.assert_close(causal.flatten(), torch.tensor([0.5, 0, 0, 0, 0.5, 0, 0, 0, 0]), atol=1e-4, rtol=0)


def test_layers_are_named_as_they_were_asked_for():
    backbone = lively(VisionTransformer(ModelConfig(**SMALL)))
    image = image_of(12, 12)
    every = attention_maps(backbone, image, (2, 2))
    some = attention_maps(backbone, image, (2, 2), layers=[-1, 0])
    assert list(some) == [-1, 0]
    assert torch.equal(some[-1], every[2])
    assert torch.equal(some[0], every[0])
    assert not torch.allclose(every[0], every[2])


def test_drawing_leaves_the_model_as_it_was():
    backbone = lively(VisionTransformer(ModelConfig(**SMALL)))
    image = image_of(12, 12)
    before = backbone(image[None], causal=True).hidden
    attention_maps(backbone, image, (0, 1))
    assert torch.equal(backbone(image[None], causal=True).hidden, before)
    with pytest.raises(RuntimeError):  # the model fails inside; what was hooked on is off again all the same
        attention_maps(backbone, image.double(), (0, 1))
    assert not any(block.attn._forward_pre_hooks for block in backbone.blocks)


class Oracle(nn.Module):
    """A backbone that predicts the next embedding perfectly."""

    def __init__(self, backbone):
        super().__init__()
        self.config, self.inner = backbone.config, backbone

    def forward(self, images, *, causal):
        features = self.inner(images, causal=causal)
        return Features(features.embed, features.embed.roll(-1, dims=1), {}, features.grid)


@pytest.mark.parametrize("query", [(0, 0), (0, 4), (1, 0), (1, 3), (2, 4)])
def test_a_perfect_prediction_is_most_similar_to_the_query(query):
    task = PretrainTask(ModelConfig(**SMALL), seed=3)
    task.backbone = Oracle(task.backbone)
    similarity = similarity_map(task.eval(), image_of(12, 20), query)
    assert divmod(int(similarity.argmax()), 5) == query
    assert similarity[query] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("shift", "expected"), [(True, (0, 2)), (False, (1, 0))])
def test_an_untrained_model_predicts_what_stands_at_the_predicting_token(shift, expected):
    """LayerScale starts near 0, so z_hat is about z: of the patch before the query with the shift, of itself without."""
    task = PretrainTask(ModelConfig(**SMALL | {"embed_dim": 64}), ObjectiveConfig(shift=shift), seed=1).eval()
    similarity = similarity_map(task, image_of(12, 12), (1, 0))
    assert divmod(int(similarity.argmax()), 3) == expected


@pytest.mark.parametrize(
    ("size", "query", "message"),
    [
        ((12, 12), (3, 0), r"query 3,0 is outside the grid of 3 x 3 patches: rows are 0 to 2, columns 0 to 2"),
        ((8, 12), (2, 0), r"outside the grid of 2 x 3 patches"),
        ((12, 12), (0, -1), r"query 0,-1 is outside"),
        ((12, 14), (0, 0), r"size 14 is not a multiple of the patch size 4; nearest: 12 or 16"),
        ((2, 12), (0, 0), r"size 2 is not a multiple of the patch size 4; nearest: 4 or 8"),
    ],
)
def test_what_does_not_fit_is_named(size, query, message):
    task = PretrainTask(ModelConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=message):
        attention_maps(task.backbone, image_of(*size), query)
    with pytest.raises(ValueError, match=message):
        similarity_map(task, image_of(*size), query)


def test_a_layer_that_is_not_there_and_a_model_in_training_are_refused():
    task = PretrainTask(ModelConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=r"layer 3 is not a block: the model has 3, numbered from 0 to 2"):
        attention_maps(task.backbone, image_of(12, 12), (0, 0), layers=[0, 3])
    with pytest.raises(ValueError, match="evaluation mode"):
        similarity_map(task.train(), image_of(12, 12), (0, 0))
