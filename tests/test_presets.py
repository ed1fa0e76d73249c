"""Sizes and costs that can be checked against published numbers without building a model."""

from __future__ import annotations

import pytest

from nepa_dist.config import ModelConfig
from nepa_dist.config_load import load_config
from nepa_dist.cost import forward_flops, num_parameters, train_flops
from nepa_dist.presets import PRESETS, mlp_hidden_dim


def preset(name: str, *overrides: str) -> ModelConfig:
    """The model section of a preset with some fields changed."""
    return load_config(overrides=[f"model.preset={name}", *(f"model.{text}" for text in overrides)]).model


@pytest.mark.parametrize(("name", "count"), [("vit_b_gelu", 85_527_552), ("vit_l_gelu", 302_967_808)])
def test_released_models_have_their_official_size(name: str, count: int) -> None:
    assert num_parameters(preset(name)) == count


@pytest.mark.parametrize(("name", "width"), [("vit_b", 2048), ("vit_l", 2752), ("vit_b_gelu", 3072), ("vit_l_gelu", 4096)])
def test_hidden_width_of_the_mlp(name: str, width: int) -> None:
    assert preset(name).mlp_hidden_dim_ == width


@pytest.mark.parametrize("name", PRESETS)
def test_hidden_width_of_a_gated_mlp_fits_tensor_cores_at_the_same_size(name: str) -> None:
    width = PRESETS[name]["embed_dim"]
    gated = mlp_hidden_dim(width, 4, True)
    assert gated % 64 == 0
    assert 0 <= 3 * gated - 2 * mlp_hidden_dim(width, 4, False) < 3 * 64


# Preset, patch size, changes, millions of parameters, GFLOP of forward, of training with causal, with full attention.
# Pretraining feeds one token per patch: CLS and all patches but the last.
PUBLISHED = [
    ("vit_b_gelu", 16, (), 85.7, 34.2, 102.5, 104.6),
    ("vit_b", 16, (), 85.7, 34.2, 102.5, 104.6),
    ("vit_b_gelu", 14, (), 85.5, 44.9, 134.6, 138.2),
    ("vit_b", 14, (), 85.5, 44.9, 134.6, 138.2),
    ("vit_b", 14, ("mlp_hidden_dim=3072",), 113.9, 59.4, 178.0, 181.7),
    ("vit_l_gelu", 16, ("qk_norm_affine=false",), 303.1, 120.6, 361.5, 367.1),
    ("vit_l", 16, (), 304.8, 121.2, 363.3, 368.9),
    ("vit_l_gelu", 14, ("qk_norm_affine=false",), 303.0, 158.2, 474.2, 483.8),
    ("vit_l", 14, (), 304.6, 159.0, 476.6, 486.2),
    ("vit_l", 14, ("mlp_hidden_dim=4096",), 403.7, 209.7, 628.8, 638.4),
]


@pytest.mark.parametrize(("name", "patch", "overrides", "millions", "forward", "causal", "full"), PUBLISHED)
def test_cost_of_published_shapes(
    name: str, patch: int, overrides: tuple[str, ...], millions: float, forward: float, causal: float, full: float
) -> None:
    model = preset(name, f"patch_size={patch}", *overrides)
    tokens = model.num_patches
    assert num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.051)
    assert sum(forward_flops(model, num_tokens=tokens)) / 1e9 == pytest.approx(forward, abs=0.051)
    assert train_flops(model, num_tokens=tokens) / 1e9 == pytest.approx(causal, abs=0.051)
    assert train_flops(model, num_tokens=tokens, causal=False) / 1e9 == pytest.approx(full, abs=0.051)


def test_cost_agrees_with_timm_for_full_attention() -> None:
    """timm lists multiply-adds of one forward pass of B/16 and L/16 at 224 pixels, with a head of 1000 classes."""
    for name, multiply_adds in (("vit_b_gelu", 17.58e9), ("vit_l_gelu", 61.6e9)):
        model = preset(name, "patch_size=16")
        head = 2 * model.embed_dim * 1000
        assert sum(forward_flops(model, causal=False)) + head == pytest.approx(2 * multiply_adds, rel=2e-3)


def test_a_token_less_costs_less_and_the_default_is_cls_and_all_patches() -> None:
    model = preset("vit_tiny")
    assert forward_flops(model) == forward_flops(model, num_tokens=257)
    assert sum(forward_flops(model, num_tokens=256)) < sum(forward_flops(model))


def test_options_change_the_count_by_their_own_parameters() -> None:
    base = num_parameters(preset("vit_b"))
    assert base - num_parameters(preset("vit_b", "layer_scale=false")) == 12 * 2 * 768
    assert base - num_parameters(preset("vit_b", "qkv_bias=false")) == 12 * 3 * 768
    assert num_parameters(preset("vit_b", "qk_norm_affine=true")) - base == 12 * 2 * 64
    assert num_parameters(preset("vit_b", "rope=false")) - base == 257 * 768
    assert num_parameters(preset("vit_b", "qk_norm=false", "qk_norm_affine=true")) == base
