"""Implementations of attention are one function up to rounding; what a device lacks is refused by name."""

import pytest
import torch

from nepa_dist.attention import DENSE_TOKENS, choose_attention, dense, few_dense, sdpa
from nepa_dist.config import Config, ConfigError
from nepa_dist.engines.build import build_engine
from nepa_dist.plan import cross_field_problems, make_plan
from nepa_dist.tasks.build import build_task

CPU = torch.device("cpu")


def attended(function, dtype, causal, tokens):
    generator = torch.Generator().manual_seed(tokens)
    inputs = [torch.randn(2, 3, tokens, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    out = function(*inputs, causal)
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    return [out.detach().double(), *(x.grad.double() for x in inputs)]


@pytest.mark.parametrize("tokens", [1, 5, 128, 129, 256, 257, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_dense_is_sdpa(causal, tokens):
    for ours, theirs in zip(
        attended(dense, torch.float64, causal, tokens), attended(sdpa, torch.float64, causal, tokens), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # the softmax is in fp32


@pytest.mark.parametrize("causal", [True, False])
def test_dense_in_bf16_is_close_to_the_exact_result(causal):
    exact = attended(sdpa, torch.float64, causal, 256)
    for ours, theirs in zip(attended(dense, torch.bfloat16, causal, 256), exact, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_causal_token_does_not_depend_on_later_ones():
    q, k, v = (torch.randn(1, 2, 200, 4) for _ in range(3))
    before = dense(q, k, v, True)
    k[:, :, 150:], v[:, :, 150:] = 7.0, 9.0
    after = dense(q, k, v, True)
    assert torch.equal(before[:, :, :150], after[:, :, :150])
    assert not torch.equal(before[:, :, 150:], after[:, :, 150:])


def test_a_cpu_stores_the_scores_of_few_tokens_only(monkeypatch):
    assert choose_attention("auto", CPU) is few_dense
    assert choose_attention("auto", torch.device("cuda")) is sdpa
    called = []
    monkeypatch.setattr("nepa_dist.attention.dense", lambda *_: called.append("dense"))
    monkeypatch.setattr("nepa_dist.attention.sdpa", lambda *_: called.append("sdpa"))
    for tokens in (DENSE_TOKENS, DENSE_TOKENS + 1):
        few_dense(*(torch.zeros(1, 1, tokens, 2) for _ in range(3)), True)
    assert called == ["dense", "sdpa"]


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn", "fa3"])
def test_what_a_cpu_lacks_is_a_configuration_error(name):
    config = Config.model_validate(
        {"model": {"image_size": 32, "patch_size": 8, "depth": 1}, "engine": {"attention": name}, "steps": 1}
    )
    with pytest.raises(ConfigError, match=f"engine.attention {name} needs a GPU"):
        build_engine(build_task(config), config, make_plan(config, 10), CPU)


def test_fa3_that_is_not_installed_is_said_so():
    with pytest.raises(ValueError, match="FlashAttention-3 cannot be used"):
        choose_attention("fa3", torch.device("cuda"))


@pytest.mark.parametrize(
    ("attention", "precision", "num_heads", "problem"),
    [
        ("flash", "fp32", 3, "engine.attention flash computes in bf16 only"),
        ("cudnn", "fp32", 3, "engine.attention cudnn computes in bf16 only"),
        ("fa3", "fp32", 3, "engine.attention fa3 computes in bf16 only"),
        ("efficient", "fp32", 3, None),
        ("flash", "bf16_autocast", 16, None),
        ("cudnn", "bf16_params", 16, "engine.attention cudnn needs a head width that is a multiple of 8, got 192 / 16"),
        ("efficient", "bf16_autocast", 16, "engine.attention efficient needs a head width that is a multiple of 8"),
        ("auto", "fp32", 16, None),
    ],
)
def test_a_kernel_that_does_not_take_the_model_is_refused_before_work_starts(attention, precision, num_heads, problem):
    engine = {"attention": attention, "precision": precision}
    config = Config.model_validate({"engine": engine, "model": {"embed_dim": 192, "num_heads": num_heads}})
    found = [text for text in cross_field_problems(config) if "engine.attention" in text]
    assert (problem is None and not found) or (len(found) == 1 and found[0].startswith(problem))
