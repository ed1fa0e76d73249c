"""DeepSpeed engines: the numbers of plain DDP in every precision, and the places where DeepSpeed left alone would fail."""

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nepa_dist.config import ConfigError, EngineConfig
from nepa_dist.engines import zero
from nepa_dist.engines.base import StateMismatchError
from nepa_dist.engines.mesh import join_world, leave_world
from spawn import run_ranks
from test_engines import BATCH, Saved, assert_equal, make, snapshot, update

ZERO = ("zero1", "zero2", "zero3")
PRECISIONS = ("fp32", "bf16_autocast", "bf16_params")
CASES = [(name, precision) for name in ZERO for precision in PRECISIONS]
STEPS = {"fp32": 10, "bf16_autocast": 5, "bf16_params": 5}
POISON, RESUME = 2, 3
"""The step in which one rank has a NaN; the step after which a fresh engine takes over."""
VARIANTS = {
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "bf16": {"reduce_dtype": "bf16"},
    "kept gathered": {"reshard_after_forward": False},
    "kept whole": {},
    "small buckets": {},
}
CHECKPOINTED = [("zero1", "full"), ("zero2", "full"), ("zero3", "full"), ("zero2", "selective")]
ROUNDED = [(name, "bf16") for name in ZERO]
ELSEWHERE = [("zero2", "small buckets"), ("zero3", "small buckets"), ("zero3", "kept gathered"), ("zero3", "kept whole")]
ROOT = Path(__file__).resolve().parents[1]


def digest(saved):
    """Of every bit: -0.0 is not 0.0."""
    sha = hashlib.sha256()
    for name, state in saved.items():
        for field, tensor in sorted(state.items()):
            sha.update(f"{name} {field} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


@torch.no_grad()
def evaluate(task, engine):
    task.eval()
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    return engine.model({"images": images})[0].item()


def steps_of(task, engine, plan, steps, poison_rank=None):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return [update(task, engine, plan, s, rank, ranks, poison=s == POISON and rank == poison_rank) for s in steps]


def run_case(name, precision):
    """Everything that is asked of one engine in one precision."""
    options, last = {"precision": precision}, STEPS[precision]
    task, engine, plan = make(name, dist.get_world_size(), **options)
    seen = {"first": digest(snapshot(engine))}
    rows = steps_of(task, engine, plan, range(POISON))
    seen["before_skip"] = snapshot(engine)
    rows += steps_of(task, engine, plan, [POISON], poison_rank=1)
    seen["skipped"] = digest(snapshot(engine))
    rows += steps_of(task, engine, plan, range(POISON + 1, RESUME + 1))
    middle, seen["middle_loss"] = snapshot(engine), None
    if name != "ddp":
        seen["middle_loss"] = evaluate(task, engine)
    rows += steps_of(task, engine, plan, range(RESUME + 1, last))
    seen["final"] = snapshot(engine)
    with engine.weights(ema=True):
        seen["averaged"], seen["averaged_loss"] = snapshot(engine), evaluate(task, engine)
    seen["loss"], seen["swapped_back"] = evaluate(task, engine), digest(snapshot(engine))
    held = weakref.ref(engine._optimizer)
    engine.close()
    seen["released"] = held() is None  # though the task lives
    if name != "ddp":
        task, engine, plan = make(name, dist.get_world_size(), **options)
        engine.load_named_state(middle)
        seen["loaded"] = digest(snapshot(engine)) == digest(middle)
        seen["loaded_loss"] = evaluate(task, engine)
        seen["resumed_rows"] = steps_of(task, engine, plan, range(RESUME + 1, last))
        seen["resumed"] = digest(snapshot(engine))
        engine.close()
    return seen | {"rows": rows}


def run_variant(name, variant):
    """The steps before the skipped one, with one setting changed."""
    zero.WHOLE_NUMEL, zero.BUCKET_NUMEL = 100, 50_000_000
    if variant == "small buckets":
        zero.BUCKET_NUMEL = 1
    if variant == "kept whole":
        zero.WHOLE_NUMEL = 10_000
    task, engine, plan = make(name, dist.get_world_size(), **VARIANTS[variant])
    rows = steps_of(task, engine, plan, range(POISON))
    final = snapshot(engine)
    engine.model({"images": torch.zeros(2, 3, 32, 32)})
    gathered = task.backbone.blocks[0].attn.qkv.weight.numel() > 0
    engine.close()
    return {"rows": rows, "final": final, "gathered": gathered}


def run_all():
    zero.WHOLE_NUMEL = 100  # of this small model's matrices none would be sharded otherwise
    linear = torch.nn.functional.linear
    cases = {(name, precision): run_case(name, precision) for precision in PRECISIONS for name in ("ddp", *ZERO)}
    variants = {case: run_variant(*case) for case in CHECKPOINTED + ROUNDED + ELSEWHERE}
    return cases, variants, torch.nn.functional.linear is linear


@pytest.fixture(scope="module")
def ranks():
    """What two ranks saw, which made all engines one after the other."""
    return run_ranks(run_all, 2, timeout=280)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_numbers_are_those_of_ddp(ranks, name, precision):
    loss, norm = (1e-6, 1e-5) if precision == "fp32" else (2e-3, 5e-3)
    for cases, _, _ in ranks:
        seen, plain = cases[name, precision], cases["ddp", precision]
        assert [row[0] for row in seen["rows"]] == pytest.approx([row[0] for row in plain["rows"]], abs=loss, nan_ok=True)
        assert [row[1] for i, row in enumerate(seen["rows"]) if i != POISON] == pytest.approx(
            [row[1] for i, row in enumerate(plain["rows"]) if i != POISON], rel=norm
        )
        # From equal weights the gradients are equal in bf16 too: they are accumulated and reduced in fp32.
        assert seen["rows"][0] == (
            pytest.approx(plain["rows"][0][0], abs=1e-6),
            pytest.approx(plain["rows"][0][1], rel=1e-5),
            1,
        )
        assert seen["averaged_loss"] == pytest.approx(plain["averaged_loss"], abs=loss)
        tolerance = {"atol": 3e-6, "rtol": 1e-3} if precision == "fp32" else {"atol": 5e-4, "rtol": 1e-2}
        assert_equal(seen["final"], plain["final"], **tolerance)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_initial_weights_are_the_exact_ones(ranks, name, precision):
    for cases, _, _ in ranks:
        assert cases[name, precision]["first"] == cases["ddp", "fp32"]["first"]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_nan_on_one_rank_skips_the_step_on_all_to_the_bit(ranks, name, precision):
    for cases, _, _ in ranks:
        seen = cases[name, precision]
        assert [row[2] for row in seen["rows"]] == [float(step != POISON) for step in range(STEPS[precision])]
        assert not torch.tensor(seen["rows"][POISON][1]).isfinite()
        assert seen["skipped"] == digest(seen["before_skip"])


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_model_computes_with_the_averages_and_gets_its_weights_back(ranks, name, precision):
    for cases, _, _ in ranks:
        seen = cases[name, precision]
        assert {key: state["ema"] for key, state in seen["final"].items()}.keys() == seen["averaged"].keys()
        for key, state in seen["final"].items():
            assert torch.equal(seen["averaged"][key]["weight"], state["ema"])
        assert seen["averaged_loss"] != seen["loss"]
        assert seen["swapped_back"] == digest(seen["final"])


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_fresh_engine_continues_to_the_bit(ranks, name, precision):
    for cases, _, _ in ranks:
        seen = cases[name, precision]
        assert seen["loaded"]
        assert seen["loaded_loss"] == seen["middle_loss"]  # the bf16 copy follows the loaded fp32 weights
        assert seen["resumed_rows"] == seen["rows"][RESUME + 1 :]
        assert seen["resumed"] == digest(seen["final"])


def test_all_ranks_see_the_same_state(ranks):
    (one, _, _), (other, _, _) = ranks
    for case in CASES:
        assert digest(one[case]["final"]) == digest(other[case]["final"])


def test_closing_leaves_nothing_behind(ranks):
    for cases, _, same_linear in ranks:
        assert same_linear
        assert all(cases[case]["released"] for case in CASES)


@pytest.mark.parametrize(("name", "variant"), CHECKPOINTED)
def test_checkpointed_blocks_have_the_same_gradients(ranks, name, variant):
    for cases, variants, _ in ranks:
        plain, seen = cases[name, "fp32"], variants[name, variant]
        assert seen["rows"] == plain["rows"][:POISON]
        assert digest(seen["final"]) == digest(plain["before_skip"])


@pytest.mark.parametrize(("name", "variant"), ROUNDED)
def test_gradients_may_travel_in_bf16(ranks, name, variant):
    for cases, variants, _ in ranks:
        norms = [row[1] for row in cases[name, "fp32"]["rows"][:POISON]]
        rounded = [row[1] for row in variants[name, variant]["rows"]]
        assert rounded != norms
        assert rounded == pytest.approx(norms, rel=5e-3)


@pytest.mark.parametrize(("name", "variant"), ELSEWHERE)
def test_where_tensors_lie_changes_no_number(ranks, name, variant):
    for cases, variants, _ in ranks:
        assert_equal(variants[name, variant]["final"], cases[name, "fp32"]["before_skip"], atol=3e-6, rtol=1e-3)


def test_weights_are_gathered_only_while_they_are_needed(ranks):
    for _, variants, _ in ranks:
        gathered = {variant for (name, variant), seen in variants.items() if name == "zero3" and seen["gathered"]}
        assert gathered == {"kept gathered", "kept whole"}


def step_twice(name, ranks):
    task, engine, plan = make(name, ranks)
    rows = steps_of(task, engine, plan, range(2))
    final = snapshot(engine)
    engine.close()
    return rows, final


def run_four():
    zero.WHOLE_NUMEL = 100
    return {name: step_twice(name, 4) for name in ("ddp", *ZERO)}


@pytest.mark.slow
def test_four_ranks():
    for seen in run_ranks(run_four, 4):
        for name in ZERO:
            for row, plain in zip(seen[name][0], seen["ddp"][0], strict=True):
                assert row == (pytest.approx(plain[0], abs=1e-6), pytest.approx(plain[1], rel=1e-5), 1.0)
            assert_equal(seen[name][1], seen["ddp"][1], atol=3e-6, rtol=1e-3)


def check_misuse():
    _, engine, _ = make("zero2", 1)
    before = snapshot(engine)
    renamed = Saved({("head.extra" if key == "backbone.cls_token" else key): state for key, state in before.items()})
    with pytest.raises(StateMismatchError, match=r"missing in the checkpoint: backbone\.cls_token(.|\n)*unknown.*head\.extra"):
        engine.load_named_state(renamed)
    assert digest(snapshot(engine)) == digest(before)
    bent = Saved(before | {"backbone.norm.bias": {k: torch.zeros(1, 2) for k in before["backbone.norm.bias"]}})
    with pytest.raises(StateMismatchError, match=r"backbone\.norm\.bias: .*\[1, 2\] in the checkpoint and \[24\] in the model"):
        engine.load_named_state(bent)
    late = {key: dict(state) for key, state in before.items()}
    late["backbone.norm.bias"]["step"] = torch.tensor(7.0)
    with pytest.raises(StateMismatchError, match=r"backbone\.norm\.bias: step is 7 in the checkpoint, but 0"):
        engine.load_named_state(Saved(late))
    loss, _ = engine.model({"images": torch.zeros(2, 3, 32, 32)})
    with pytest.raises(RuntimeError, match="micro-batch 1 of 2 was announced with last=True"):
        engine.backward(loss, last=True)
    engine.close()


def check_alone():
    """One process without a launcher, and a process group that ends and comes again."""
    states = []
    for name in ("zero1", "zero3", "zero1"):
        join_world(EngineConfig(name=name, precision="fp32", device="cpu"), 1)
        states.append(step_twice(name, 1))
        if len(states) == 2:
            check_misuse()
        leave_world()
    assert_equal(states[0][1], states[1][1], atol=3e-6, rtol=1e-3)
    assert digest(states[0][1]) == digest(states[2][1])
    join_world(EngineConfig(name="zero1", precision="bf16_params", device="cpu"), 1)
    make("zero1", 1, precision="bf16_params")[1].close()
    leave_world()


def run_python(code, folder):
    """A fresh interpreter at home in an empty folder."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RANK", "LOCAL_", "WORLD_", "MASTER_"))
    }
    environment |= {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "TRITON_CACHE_DIR": str(folder / "triton")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_one_process_is_silent_writes_nothing_and_compiles_nothing(tmp_path):
    result = run_python("import test_zero; test_zero.check_alone()", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_deepspeed_is_imported_only_for_its_engines(tmp_path):
    code = "import sys, nepa_dist.train, nepa_dist.engines.zero, nepa_dist.engines.fsdp; "
    code += "from test_engines import make; make('ddp', 1); print('deepspeed' in sys.modules)"
    result = run_python(code, tmp_path)
    assert result.stdout == "False\n", result.stderr


def test_missing_deepspeed_names_the_extra(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"pip install 'nepa-dist\[deepspeed\]'"):
        make("zero1", 1)


@pytest.mark.parametrize("version", ["0.18.9", "0.19.7", "0.20.0", "1.19.8"])
def test_other_version_names_both(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ConfigError, match=rf"deepspeed {version} is installed, .* need deepspeed >=0\.19\.8,<0\.20"):
        make("zero3", 1)
