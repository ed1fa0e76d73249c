"""The benchmarks of the step: short runs end in reports, and what they compare with is the same model."""

import gzip
import json

import pytest
import torch

from benchmarks import feed, reference, rounds, start, step
from benchmarks.plain_nepa import PlainNepa
from benchmarks.rounds import KINDS, kind_of, ratio
from nepa_dist.presets import PRESETS

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SHORT = ["--batch", "2", "--rounds", "2", "--warmup", "1", "--device", "cpu"]


@pytest.fixture
def small_model(monkeypatch):
    gelu = {"gated_mlp": False, "activation": "gelu", "layer_scale_init": 0.5}
    monkeypatch.setitem(PRESETS, "vit_b_gelu", SMALL | gelu)
    monkeypatch.setitem(PRESETS, "vit_l_gelu", SMALL | gelu | {"qk_norm_affine": True})
    monkeypatch.setitem(PRESETS, "vit_b", SMALL | {"layer_scale_init": 0.5})
    # The machine's own rate, too: without AVX-512 a large product in bf16 takes minutes.
    monkeypatch.setattr(rounds, "_MATRICES", ((128, 64, 128),))


def read(folder, pattern):
    (path,) = folder.glob(f"{pattern}.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_a_run_of_the_step_writes_a_report(small_model, tmp_path):
    words = ["--model", "vit_b_gelu", "--compile", "off", "--attention", "auto", "sdpa", "--precision", "fp32", *SHORT]
    assert step.main([*words, "--out", str(tmp_path)]) == 0
    report, text = read(tmp_path, "step_vit_b_gelu_*core_20*")
    first, second = report["arms"].values()
    for row in (first, second):
        assert 0 < row["images_per_second"]["low"] <= row["images_per_second"]["median"] <= row["images_per_second"]["high"]
        assert 0 < row["mfu"]["causal"] < row["mfu"]["full"]
        assert set(row["seconds_by_kind"]) == set(KINDS)
        assert row["seconds_by_kind"]["matmul"] > 0
        assert row["seconds_by_kind"]["optimizer"] > 0
    assert len(report["ratios"]) == 1
    assert report["machine"]["commit"]
    assert text == step.to_markdown(report)
    assert "ddp fp32 eager sdpa auto auto batch 2 random" in text


def test_a_step_is_profiled_once_for_the_kernels_and_the_trace(small_model, tmp_path):
    words = ["--model", "vit_b", "--compile", "off", "--precision", "fp32", "bf16_autocast", *SHORT, "--rounds", "1"]
    assert step.main([*words, "--out", str(tmp_path), "--trace", str(tmp_path / "traces")]) == 0
    report, _ = read(tmp_path, "step_vit_b_*core_20*")
    names = [name.replace(" ", "_") + ".json.gz" for name in report["arms"]]
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == sorted(names)
    for row, name in zip(report["arms"].values(), names, strict=True):
        kernels = row["kernels"]
        times = [kernel["milliseconds"] for kernel in kernels]
        assert times == sorted(times, reverse=True)
        assert 20 < len(kernels) <= 40
        assert all(0 < len(kernel["name"]) <= 120 and kernel["calls"] >= 1 for kernel in kernels)
        assert {kernel["kind"] for kernel in kernels} <= set(KINDS) - {"idle"}
        of_products = sum(kernel["milliseconds"] for kernel in kernels if kernel["kind"] == "matmul") / 1000
        assert 0 < of_products <= 1.0001 * row["seconds_by_kind"]["matmul"]
        with gzip.open(tmp_path / "traces" / name, "rt") as file:
            events = {event["name"] for event in json.load(file)["traceEvents"]}
        assert kernels[0]["name"] in events


def test_convolutions_in_fp32_use_no_tf32(monkeypatch):
    joined = []

    def join_world(config, _):
        joined.append(config)
        raise SystemExit

    for benchmark in (step, reference):
        monkeypatch.setattr(benchmark, "join_world", join_world)
        with pytest.raises(SystemExit):
            benchmark.main(["--precision", "fp32", *SHORT])
    assert [config.precision for config in joined] == ["fp32", "fp32"]


def test_natural_images_come_from_a_folder(small_model, tiny_images, tmp_path):
    natural = step.natural_images(tiny_images, 20, 32, torch.device("cpu"))
    assert natural.shape == (20, 3, 32, 32)
    assert -1 <= natural.min() < natural.max() <= 1
    assert torch.equal(natural[0], natural[12])  # 12 images, repeated
    with pytest.raises(SystemExit):
        step.main(["--images", "natural", *SHORT])
    words = ["--model", "vit_b", "--compile", "off", "--images", "natural", "--data", str(tiny_images), *SHORT]
    assert step.main([*words, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("model", ["vit_b", "vit_b_gelu", "vit_l_gelu"])
def test_the_plain_implementation_is_the_same_function(small_model, model):
    config = step.make_config(model, 2, 1)
    assert reference.loss_difference(config, step.random_images(3, 32, torch.device("cpu"))) < 1e-6
    assert isinstance(reference.plain_model(config), PlainNepa)


def make_other(config):
    return PlainNepa(config.model)


def test_the_comparison_names_what_is_missing_and_takes_others(small_model, tmp_path, monkeypatch):
    def missing(_):
        raise ImportError("No module named 'stable_pretraining'")

    monkeypatch.setattr(reference, "stable_model", missing)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    words = ["--precision", "fp32", "--eager", "--other", "test_bench_step:make_other", *SHORT]
    assert reference.main([*words, "--out", str(tmp_path)]) == 0
    report, text = read(tmp_path, "reference_vit_b_gelu_*core_20*")
    table = report["precisions"]["fp32"]
    assert list(table["arms"]) == ["ours", "ours eager", "plain", "test_bench_step:make_other"]
    assert "pip install stable-pretraining==0.1.8" in table["failed"]["stable"]
    assert table["arms"]["ours"]["ratio"]["median"] == 1
    assert report["loss_difference"] < reference.TOLERANCE
    assert text == reference.to_markdown(report)


def test_each_arm_has_graphs_of_its_own_shapes_and_there_may_be_many(small_model, tmp_path, monkeypatch):
    symbolic, compile_ = [], torch.compile

    def backend(graph, inputs):
        symbolic.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend, **options))
    torch._dynamo.reset()
    options = ["--batch", "2", "3", "4", "--attention", "auto", "sdpa", "--precision", "fp32", "bf16_autocast"]
    words = ["--model", "vit_b", *options, "--rounds", "1", "--warmup", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert step.main(words) == 0
    assert symbolic
    assert not any(symbolic)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "zero3"], "engine.compile with engine.name zero3"),
        (["--attention", "flash", "--precision", "fp32"], "engine.attention flash computes in bf16 only"),
        (["--attention", "fast"], "invalid choice: 'fast'"),
        (["--attention", "fa3", "sdpa"], "fa3 is torch's flash kernel for the whole process: measure it by itself"),
        (["--batch", "0"], "argument --batch: must be at least 1, got 0"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--images", "natural", "--data", "nowhere"], "nowhere holds no images"),
    ],
)
def test_what_cannot_be_measured_is_refused(small_model, words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        step.main([*words, "--device", "cpu"])
    assert message in f"{caught.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "error: data.source nowhere: no such folder"),
        (["--data", "nowhere", "--rates", "0"], "--rates must be above 0"),
    ],
)
def test_a_feed_that_cannot_be_measured_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        feed.main(words)
    assert message in f"{caught.value} {capsys.readouterr().err}"


def test_a_start_that_fails_says_why(capfd):
    with pytest.raises(SystemExit, match="error: a process ended with code 1"):
        start.main(["--batch", "0"])
    assert "global_batch_size" in capfd.readouterr().err


def test_ratios_are_taken_within_rounds():
    seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 6.0, 4.0]}
    assert ratio(seconds, "ours", "theirs") == {"median": 2.0, "low": 1.0, "high": 3.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matmul"),
        ("aten::_scaled_mm", "matmul"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("aten::mkldnn_convolution", "matmul"),
        ("aten::bmm", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("triton_per_fused_native_layer_norm_mul_0", "elementwise"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_backward__to_copy_view_3", "elementwise"),
        ("triton_red_fused_addmm_linalg_vector_norm_clamp_min_div_7", "elementwise"),
        ("triton_tem_fused_addmm_gelu_2", "matmul"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("aten::_fused_sgd_", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    assert kind_of(name) == kind


def test_a_difference_of_the_implementations_shows(small_model, monkeypatch):
    config = step.make_config("vit_b_gelu", 2, 1)
    monkeypatch.setattr("benchmarks.plain_nepa.apply_rope", lambda x, cos, sin: x)
    assert reference.loss_difference(config, step.random_images(3, 32, torch.device("cpu"))) > 2 * reference.TOLERANCE
