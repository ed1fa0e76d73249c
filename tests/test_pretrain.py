"""The NEPA objective and its ablation switches."""

import pytest
import torch
import torch.nn.functional as F

from nepa_dist.config import ModelConfig, ObjectiveConfig
from nepa_dist.tasks.pretrain import PretrainTask, next_embedding_loss
from nepa_dist.tasks.regularizers import random_directions, sigreg, vicreg

MODEL = ModelConfig(image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, layer_scale_init=0.5)


def batch(size=3, dtype=torch.float32):
    return {"images": torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)}


def task(dtype=torch.float32, **objective):
    return PretrainTask(MODEL, ObjectiveConfig(**objective)).to(dtype)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def test_loss_is_the_mean_cosine_with_the_next_embedding():
    hidden, embed = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = -F.cosine_similarity(hidden[:, :4], embed[:, 1:], dim=-1).mean()
    torch.testing.assert_close(next_embedding_loss(hidden, embed), expected)
    torch.testing.assert_close(next_embedding_loss(hidden[:, :4], embed), expected)
    same_place = -F.cosine_similarity(hidden, embed, dim=-1).mean()
    torch.testing.assert_close(next_embedding_loss(hidden, embed, shift=False), same_place)
    with pytest.raises(ValueError, match="does not cover"):
        next_embedding_loss(hidden[:, :3], embed)


def test_loss_of_bf16_inputs_is_computed_in_fp32():
    hidden, embed = torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    loss = next_embedding_loss(hidden, embed)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_embedding_loss(hidden.float(), embed.float()), atol=0, rtol=0)


def test_stop_gradient_is_on_the_target_only():
    hidden, embed = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    next_embedding_loss(hidden, embed).backward()
    assert hidden.grad is not None
    assert embed.grad is None
    next_embedding_loss(hidden, embed, stop_grad=False).backward()
    assert embed.grad.abs().sum() > 0


def test_leaving_out_the_last_token_changes_nothing():
    losses, grads = [], []
    for drop in (True, False):
        module = task(torch.float64, drop_last_token=drop).eval()
        loss, _ = module(batch(dtype=torch.float64))
        assert loss.dtype == torch.float64
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(module))
    assert (losses[0] - losses[1]).abs() < 1e-15
    for name, gradient in grads[0].items():
        assert (gradient - grads[1][name]).abs().max() < 1e-15, name


def test_last_token_is_fed_where_it_matters():
    assert ObjectiveConfig().drops_last_token
    assert not ObjectiveConfig(shift=False).drops_last_token
    assert not ObjectiveConfig(causal=False).drops_last_token
    for objective in ({"shift": False}, {"causal": False}):
        loss, _ = task(**objective)(batch())
        assert loss.isfinite()


def test_masking_replaces_inputs_but_not_targets():
    module = task(mask_ratio=0.5)
    embed = torch.randn(4, 17, 32)
    masked = module.head(embed)
    is_token = (masked == module.head.mask_token).all(-1)
    assert torch.equal(is_token.sum(1), torch.full((4,), 8))  # half of 16 patches, never CLS
    assert not is_token[:, 0].any()
    assert torch.equal(masked[~is_token], embed[~is_token])
    assert len({tuple(row.tolist()) for row in is_token}) > 1  # drawn per image
    loss, _ = module(batch())
    loss.backward()
    assert module.head.mask_token.grad.abs().sum() > 0
    assert "head.mask_token" not in dict(task().named_parameters())


@pytest.mark.parametrize("kind", ["sigreg", "vicreg"])
def test_regulariser_is_weighted_logged_and_reaches_the_patch_embedding(kind):
    plain, _ = task()(batch())
    module = task(anti_collapse=kind, anti_collapse_weight=0.5)
    loss, logs = module(batch())
    torch.testing.assert_close(loss, plain + 0.5 * logs["anti_collapse_loss"])
    assert logs["anti_collapse_loss"] > 0
    loss.backward()
    assert module.backbone.patch_embed.weight.grad.abs().sum() > 0


def test_sigreg_prefers_the_isotropic_gaussian():
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(4000, 16, generator=generator)
    directions = random_directions(16, 64, seed=3, device=torch.device("cpu"))
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(64))
    assert torch.equal(directions, random_directions(16, 64, seed=3, device=torch.device("cpu")))
    scores = {
        "gauss": sigreg(gauss, directions),
        "collapsed": sigreg(gauss[:1].expand(4000, -1), directions),
        "one axis": sigreg(gauss * torch.eye(16)[0], directions),
        "wide": sigreg(gauss * 3, directions),
        "two points": sigreg(gauss.sign(), directions),
    }
    assert scores["gauss"] < 2e-3
    assert all(score > 2 * scores["gauss"] for name, score in scores.items() if name != "gauss"), scores


def test_vicreg_is_zero_for_decorrelated_unit_variance_and_large_for_a_constant():
    x = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    assert vicreg(x * 1.2) < 0.01
    torch.testing.assert_close(vicreg(torch.ones(10, 8)), torch.tensor(0.99))  # 1 - sqrt(1e-4)
    assert vicreg(x[:, :1].expand(-1, 8)) > 0.2  # fully correlated


def test_rope_rescale_of_a_step_is_the_same_everywhere_and_changes_with_the_step():
    one, two = task().train(), task().train()
    scales = []
    for step in (0, 1, 0):
        for module in (one, two):
            module.begin_step(step, observe=False)
        assert torch.equal(one.rope_scale, two.rope_scale)
        torch.manual_seed(step + 100)  # the global generator has no say
        assert torch.equal(one(batch())[0], two(batch())[0])
        scales.append(one.rope_scale.item())
    assert scales[0] == scales[2] != scales[1]
    assert all(0.5 <= scale < 2 for scale in scales)


def test_health_describes_an_observed_step_once():
    module = task()
    module.begin_step(0, observe=False)
    module(batch())
    assert module.health() == ({}, {})
    module.begin_step(1, observe=True)
    loss, _ = module(batch())
    gauges, spectra = module.health(audit_seed=3)
    torch.testing.assert_close(gauges["prediction_cosine"].float(), -loss.detach(), atol=1e-6, rtol=0)
    assert {"embedding_uniformity.target", "embedding_sigreg.pooled", "embedding_rms.pred"} <= gauges.keys()
    assert spectra.keys() == {"target", "pred", "pooled"}
    assert module.health() == ({}, {})
