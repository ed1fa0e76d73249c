"""The benchmark of the kernels: a short run ends in a report, and what it compares is the same function."""

import json

import pytest
import torch

from benchmarks import kernels
from benchmarks.pieces import make_pieces
from nepa_dist import fused
from nepa_dist.config_model import ModelConfig
from nepa_dist.presets import PRESETS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}
SHORT = ["--batch", "2", "--rounds", "2", "--calls", "1", "--warmup", "1", "--device", DEVICE.type]
needs_triton = pytest.mark.skipif(fused.load() is not None, reason="needs Triton")


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit_l", SMALL)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@needs_triton
def test_a_run_writes_a_report(small_model, tmp_path):
    assert kernels.main(["--model", "vit_l", *SHORT, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("kernels_vit_l_*20*.json")
    report, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert text == kernels.to_markdown(report)
    rows = {(row["name"], row["by"], row["way"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 1 + 4 * 4 + 2 * 4 + 4 * 3
    for row in rows.values():
        if row["group"] == "attention" and row["by"] != "sdpa":
            continue
        found = row["milliseconds"]
        assert 0 < found["low"] <= found["median"] <= found["high"]
        assert (row["tb_per_second"] > 0) == (row["group"] in ("copy", "kernel"))
        assert (row["tflops"] > 0) == (row["group"] in ("attention", "product"))
    if DEVICE.type == "cpu":
        assert "engine.attention flash needs a GPU" in rows["attention", "flash", "forward"]["failed"]
        assert "| attention | cudnn | backward | not here: engine.attention cudnn needs a GPU" in text
    n, D, H = 2 * 16, 64, 192
    assert rows["activation", "ours", "forward"]["bytes"] == n * 3 * H * 2
    assert rows["add_norm", "compiled", "backward"]["bytes"] == n * D * 18
    assert rows["qkv", f"{n} x {D} x {3 * D}", "gradient of input"]["flops"] == 2 * n * D * 3 * D
    assert rows["attention", "sdpa", "forward"]["flops"] == 4 * 2 * 2 * 32 * 16 * 17 // 2


@needs_triton
@pytest.mark.parametrize("model", [{}, {"gated_mlp": False, "activation": "gelu", "qk_norm_affine": True}])
def test_both_sides_are_the_same_function(model):
    torch.manual_seed(0)
    pieces = [make() for make in make_pieces(ModelConfig.model_validate(SMALL | model), 2, 16, DEVICE)]
    assert [piece.name for piece in pieces] == ["heads", "add_norm", "activation", "add"]
    for piece in pieces:
        ours = piece.ours(*piece.inputs)
        ours = ours if isinstance(ours, tuple) else (ours,)
        plain = piece.plain(*piece.inputs)
        gradients = tuple(torch.randn_like(out) for out in ours)
        ours_back = torch.autograd.grad(ours, piece.inputs, gradients)
        plain_back = piece.pull([value.detach() for value in piece.inputs], gradients)
        assert len(plain_back) == len(piece.inputs)
        pairs = zip((*ours, *ours_back), (*(plain if isinstance(plain, tuple) else (plain,)), *plain_back), strict=True)
        for number, (one, other) in enumerate(pairs):
            assert one.shape == other.shape
            error = (one.float() - other.float()).norm() / other.float().norm()
            assert error < 0.02, (piece.name, number)


def test_a_gpu_begins_when_all_calls_are_queued(monkeypatch):
    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("event")

        def elapsed_time(self, end):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append(cycles), raising=False)
    seconds = kernels.time_calls(lambda: seen.append("call"), 3, torch.device("cuda"), issue_seconds=0.5)
    assert seconds == pytest.approx(0.002)
    assert seen == ["wait", 2_000_000_000, "event", "call", "call", "call", "event", "wait"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 1
    assert capsys.readouterr().err == "error: this benchmark needs a GPU, and there is none\n"


@needs_triton
def test_a_cpu_needs_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.main(["--device", "cpu"]) == 1
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
