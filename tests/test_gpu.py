"""On one real GPU: the numbers are those of a CPU, kernels agree, nothing waits for the device, runs continue to the bit.

Skipped where there is none. ``NEPA_TEST_DEVICE=cpu`` runs what a CPU can of it, to try the tests themselves.
"""

import copy
import functools
import importlib.util
import math
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_downstream import curve as scores_of
from test_downstream import run as run_task
from test_golden import PRETRAIN, assert_outputs_and_gradients, assert_twenty_steps
from test_no_sync import run_steps
from test_train import assert_same_run, images, newest_step, run, start, wait_for_steps  # noqa: F401 - a fixture among them
from test_train import curve as rows_of

from nepa_dist import train
from nepa_dist.attention import choose_attention, dense
from nepa_dist.config import Config, EngineConfig, OptimConfig
from nepa_dist.data.batch import Batch
from nepa_dist.data.device import to_device
from nepa_dist.data.erasing import draw_erasing
from nepa_dist.engines.base import gradient_norm
from nepa_dist.engines.mesh import join_world, leave_world
from nepa_dist.fp8 import FIRST_CAPABILITY, convert
from nepa_dist.optim import AdamWEMA, param_groups
from nepa_dist.tasks.build import build_task
from spawn import run_ranks
from test_engines import PRECISIONS, assert_equal
from test_engines import train as train_engine
from test_loss_curves import MODEL, curve

DEVICE = os.environ.get("NEPA_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU")
only_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU does not have it")

TOLERANCE = {"fp32": 5e-5, "bf16_autocast": 2e-3}
"""Largest difference of the loss at any of 40 steps: sums in another order."""
FP8_TOLERANCE = 1e-2
BUSY_CYCLES = 1_500_000_000
"""Of a GPU's clock: more than half a second, many times what the host needs for a step."""


@pytest.fixture(autouse=True)
def fresh():
    """As a run in fp32 has it: no TF32; and none of the graphs of the tests before."""
    torch._dynamo.reset()
    join_world(EngineConfig(precision="fp32", device=DEVICE), 1)


@functools.cache
def plain_curve(precision):
    return curve(precision, DEVICE, attention="sdpa", kernels="torch")


def assert_same_curve(before, after, tolerance):
    difference = max(abs(a - b) for a, b in zip(before, after, strict=True))
    print(f"largest difference {difference:.2e}")
    assert after[-1] < after[0] - 0.05, "it does not learn"
    assert difference < tolerance


@pytest.mark.parametrize("name", PRETRAIN)
def test_outputs_and_gradients_are_the_official_ones(name):
    assert_outputs_and_gradients(name, DEVICE, 1e-4)


@pytest.mark.parametrize("name", PRETRAIN)
def test_twenty_steps_are_the_official_ones(name):
    assert_twenty_steps(name, DEVICE)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16_autocast", 1e-2)])
def test_it_learns_what_a_cpu_learns(precision, tolerance):
    # Autocast leaves other operations in fp32 on a GPU than on a CPU.
    assert_same_curve(curve(precision, "cpu", attention="sdpa"), plain_curve(precision), tolerance)


def attended(attend, inputs, gradient, causal):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*inputs, causal)
    out.backward(gradient.to(out.dtype))
    return [out.detach().float(), *(x.grad.float() for x in inputs)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [256, 257])
@pytest.mark.parametrize("name", ["sdpa", "dense", *(pytest.param(n, marks=only_gpu) for n in ("flash", "cudnn", "efficient"))])
def test_attention_in_bf16_is_close_to_dense_in_fp32(name, tokens, causal):
    generator = torch.Generator().manual_seed(tokens)
    # Laid out as the model gives them: B T 3 H K.
    packed = torch.randn(2, tokens, 3, 4, 64, generator=generator).to(DEVICE, torch.bfloat16)
    inputs = packed.permute(2, 0, 3, 1, 4).unbind()
    gradient = torch.randn(2, 4, tokens, 64, generator=generator).to(DEVICE, torch.bfloat16)
    exact = attended(dense, [x.float() for x in inputs], gradient, causal)
    found = attended(choose_attention(name, torch.device(DEVICE)), inputs, gradient, causal)
    for part, ours, theirs in zip(("output", "q", "k", "v"), found, exact, strict=True):
        assert (ours - theirs).norm() < 0.015 * theirs.norm(), part


@pytest.mark.parametrize(
    ("precision", "faster"),
    [
        *((precision, {"kernels": "triton"}) for precision in TOLERANCE),
        *((precision, {"kernels": "torch", "compile": True}) for precision in TOLERANCE),
        ("bf16_params", {"compile": True}),
        ("fp32", {"compile": True}),
        ("fp32", {"compile": True, "activation_checkpointing": "selective"}),
        ("fp32", {"activation_checkpointing": "selective"}),
        ("fp32", {"attention": "efficient", "compile": True}),
        ("bf16_autocast", {"compile": True}),
        ("bf16_autocast", {"compile": True, "patch_embed": "matmul"}),
        ("bf16_autocast", {"activation_checkpointing": "full"}),
        ("bf16_autocast", {"activation_checkpointing": "selective"}),
        ("bf16_autocast", {"compile": True, "activation_checkpointing": "full"}),
        ("bf16_autocast", {"compile": True, "activation_checkpointing": "selective"}),
        ("bf16_autocast", {"attention": "flash"}),
        ("bf16_autocast", {"attention": "flash", "compile": True}),
        ("bf16_autocast", {"attention": "flash", "compile": True, "activation_checkpointing": "selective"}),
        ("bf16_autocast", {"attention": "cudnn"}),
        ("bf16_autocast", {"attention": "cudnn", "compile": True}),
        ("bf16_autocast", {"attention": "cudnn", "compile": True, "activation_checkpointing": "selective"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_what_is_faster_keeps_the_loss_curve(precision, faster):
    if not ON_GPU and (faster.get("attention", "sdpa") != "sdpa" or faster.get("kernels") == "triton"):
        pytest.skip("a CPU does not have it")
    after = curve(precision, DEVICE, **{"attention": "sdpa", **faster})
    assert_same_curve(plain_curve(precision), after, TOLERANCE.get(precision, 5e-3))


@pytest.mark.parametrize("faster", [{}, {"compile": True}], ids=["eager", "compiled"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_keeps_the_loss_curve(recipe, faster):
    float8 = pytest.importorskip("torchao.float8")
    if ON_GPU and torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        pytest.skip("this GPU has no fp8")
    task = build_task(Config.model_validate({"model": MODEL}))
    convert(task.backbone.blocks, recipe, torch.device(DEVICE))
    layers = [part for part in task.backbone.blocks.modules() if isinstance(part, torch.nn.Linear)]
    assert all(type(part).__name__ == "Float8Linear" for part in layers), float8
    after = curve("bf16_autocast", DEVICE, fp8=recipe, attention="sdpa", **faster)
    assert after != plain_curve("bf16_autocast")
    assert_same_curve(plain_curve("bf16_autocast"), after, FP8_TOLERANCE)


def engine_against_plain(name):
    """In a process of its own, with a process group of one rank; the third step is poisoned."""
    join_world(EngineConfig(name=name, device=DEVICE, precision="fp32"), 1)
    results = {}
    for precision in PRECISIONS:
        options = {"precision": precision, "device": DEVICE}
        plain, other = (train_engine(engine, options, 6, None, 0) for engine in ("ddp", name))
        tolerance = {"atol": 2e-5, "rtol": 1e-3} if precision == "fp32" else {"atol": 5e-3, "rtol": 0.1}
        assert_equal(other[1][-1], plain[1][-1], check_device=False, **tolerance)
        results[precision] = plain[0], other[0]
    leave_world()
    return results


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_every_engine_equals_plain(name):
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    (results,) = run_ranks(engine_against_plain, 1, name, init=False, timeout=200)
    for precision, (plain, other) in results.items():
        assert [row[2] for row in plain] == [row[2] for row in other] == [1, 1, 0, 1, 1, 1]
        of_loss, of_norm = (5e-6, 1e-4) if precision == "fp32" else (2e-3, 2e-2)
        for (loss, norm, applied), (other_loss, other_norm, _) in zip(plain, other, strict=True):
            if applied:
                assert other_loss == pytest.approx(loss, abs=of_loss), precision
                assert other_norm == pytest.approx(norm, rel=of_norm), precision


@contextmanager
def without_waiting(step):
    if step == 1 or not ON_GPU:  # constants and handles that are kept are made in the first step
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Busy:
    """Gives the GPU long work before each step but the first few; notes whether the host was through before the GPU."""

    def __init__(self):
        self.ahead = []

    @contextmanager
    def __call__(self, step):
        if step < 4 or not ON_GPU:
            yield
            return
        torch.cuda._sleep(BUSY_CYCLES)
        end = torch.cuda.Event()
        end.record()
        yield
        self.ahead.append(not end.query())


def pretraining(precision="bf16_autocast", **engine):
    objective = {"mask_ratio": 0.4, "anti_collapse": "sigreg"} if precision == "fp32" else {}
    return {"engine": {"precision": precision, "device": DEVICE, **engine}, "objective": objective}


def fine_tuning(images):  # noqa: F811
    return {
        "task": "finetune",
        "finetune": {"num_classes": 3, "mixup": 0.8, "cutmix": 1.0},
        "engine": {"device": DEVICE},
        "data": {"source": str(images), "num_workers": 1, "augment": {"erase_probability": 1.0}},
    }


@pytest.mark.parametrize(
    "settings",
    [pretraining(), pretraining("fp32"), pretraining("bf16_params"), pretraining(compile=True), fine_tuning],
    ids=["bf16_autocast", "fp32", "bf16_params", "compiled", "fine-tuning"],
)
def test_a_step_waits_for_nothing(monkeypatch, tmp_path, tiny_images, settings):
    monkeypatch.setattr(train, "Validator", lambda *_: None)
    settings = settings if isinstance(settings, dict) else settings(tiny_images)
    run_steps(monkeypatch, tmp_path, tiny_images, without_waiting, steps=5, **settings)


@pytest.mark.parametrize("settings", [pretraining(), fine_tuning], ids=["pretraining", "fine-tuning"])
def test_the_host_is_through_with_a_step_while_the_gpu_is_still_busy(monkeypatch, tmp_path, tiny_images, settings):
    monkeypatch.setattr(train, "Validator", lambda *_: None)
    settings = settings if isinstance(settings, dict) else settings(tiny_images)
    # One micro-batch of one block: a GPU takes about a thousand kernels before the host must wait to give it more.
    model = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    busy = Busy()
    run_steps(monkeypatch, tmp_path, tiny_images, busy, steps=6, model=model, micro_batch_size=4, **settings)
    assert busy.ahead == ([True] * 3 if ON_GPU else [])


def make_batch(index):
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(0, 256, (8, 64, 64, 3), generator=generator, dtype=torch.uint8)
    masks = torch.randint(0, 5, (8, 64, 64), generator=generator, dtype=torch.uint8)
    labels, ids = torch.arange(8) + index, torch.arange(8) * (index + 1)
    if ON_GPU:
        pixels, masks, labels, ids = (tensor.pin_memory() for tensor in (pixels, masks, labels, ids))
    erasings = [draw_erasing(64, 64, seed=0, epoch=index, sample_id=sample, probability=0.5) for sample in range(8)]
    return Batch(pixels, labels, ids, (), masks, 0, np.array(erasings, np.int64))


def test_batches_of_the_side_stream_arrive_whole_while_the_gpu_computes():
    device, mean, std = torch.device(DEVICE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    side = 2048 if ON_GPU else 32
    matrix = torch.randn(side, side, device=device) / math.sqrt(side)
    batches, kept = [make_batch(index) for index in range(60)], []
    for batch in batches:
        for _ in range(4):  # work that is queued before the batch, and not done when the next one is copied
            matrix = matrix @ matrix
            matrix = matrix / matrix.norm()
        moved = to_device(batch, device, mean, std)
        kept.append({name: tensor.clone() for name, tensor in moved.items()})
        del moved  # its memory may be used again: by then the clones must be made
    for batch, copies in zip(batches, kept, strict=True):
        plain = to_device(batch, CPU, mean, std)
        assert copies.keys() == plain.keys()
        assert copies["images"].device.type == DEVICE
        # erfinv, which makes the noise, is another polynomial on a GPU.
        torch.testing.assert_close(copies.pop("images").cpu(), plain.pop("images"), atol=1e-4, rtol=1e-5)
        assert all(torch.equal(copies[name].cpu(), plain[name]) for name in plain)


def test_the_optimizer_does_what_it_does_on_a_cpu():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 5))
    modules = [module, copy.deepcopy(module).to(DEVICE)]
    optim = OptimConfig(ema_decay=0.9)
    optimizers = [AdamWEMA(param_groups(each.named_parameters(), 0.05, lambda name: 0), optim) for each in modules]
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        gradients = [torch.randn(p.shape, generator=generator) for p in module.parameters()]
        for each, optimizer in zip(modules, optimizers, strict=True):
            parameters = list(each.parameters())
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.to(parameter.device) * (math.nan if step == 2 else 1)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            norm = gradient_norm(parameters)
            torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, norm)
            optimizer.found_inf = 1 - norm.isfinite().float()
            optimizer.step()
    for parameter, other in zip(*(each.parameters() for each in modules), strict=True):
        ours, theirs = ({"weight": p.detach(), **o.state[p]} for p, o in ((parameter, optimizers[0]), (other, optimizers[1])))
        assert set(ours) == set(theirs) == {"weight", "step", "exp_avg", "exp_avg_sq", "ema"}
        assert theirs["step"].item() == 3
        for field, tensor in ours.items():
            assert theirs[field].device.type == DEVICE
            torch.testing.assert_close(theirs[field].cpu(), tensor, atol=1e-6, rtol=1e-6, msg=lambda m, f=field: f"{f}: {m}")


COMMAND = ("metrics.prometheus=false", f"engine.device={DEVICE}")
LONG = ("steps=240", "checkpoint.every=20", *COMMAND)


def kill_in_the_middle(run_dir, images, settings):  # noqa: F811
    process = start(run_dir, images, *LONG, *settings)
    wait_for_steps(run_dir, 50, process)
    process.kill()
    process.communicate(timeout=60)  # until its rank has ended too, which holds the other end
    assert newest_step(run_dir / "metrics.jsonl") < 240, "the run was over before it was killed"
    shutil.rmtree(sorted((run_dir / "checkpoints").glob("step-*"))[-1])  # so that steps are done again
    result = run(run_dir, images, *LONG, *settings)
    assert result.returncode == 0, result.stderr
    assert "continuing from" in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize("settings", [("engine.deterministic=true",), ("engine.patch_embed=matmul",)], ids=lambda s: s[0])
def test_a_killed_run_continues_to_the_bit(images, tmp_path, settings):  # noqa: F811
    """Without engine.deterministic cuDNN may take a kernel with atomic sums for the gradient of a convolution.

    All else in a step is free of them: cuBLAS on one stream, norms and attention over few keys sum in one order.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = run(whole, images, *LONG, *settings)
    assert result.returncode == 0, result.stderr
    kill_in_the_middle(broken, images, settings)
    assert_same_run(whole, broken)


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
def test_a_killed_run_that_is_compiled_continues(images, tmp_path, precision):  # noqa: F811
    kill_in_the_middle(tmp_path / "run", images, ("engine.compile=true", f"engine.precision={precision}"))
    rows = rows_of(tmp_path / "run")
    assert [step for step, *_ in rows] == list(range(1, 241))
    assert rows[-1][1] < rows[0][1]


def test_compiled_fine_tuning_with_dropped_paths_validates_the_last_partial_batch_too(tmp_path):
    settings = ("engine.compile=true", "steps=4", "data.augment.erase_probability=1.0")
    result = run_task("finetune", tmp_path / "run", *COMMAND, "finetune.freeze_patch_embed=false", *settings)
    assert result.returncode == 0, result.stderr
    rows = scores_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert any("top1" in row for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
