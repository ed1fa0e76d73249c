"""Fine-tuning on every engine: frozen parameters, and layers that learn at rates of their own."""

import pytest
import torch
import torch.distributed as dist

from nepa_dist.config import Config
from nepa_dist.engines import zero
from nepa_dist.engines.base import StateMismatchError
from nepa_dist.tasks.base import HEAD_LAYER, layer_of
from nepa_dist.tasks.build import build_task
from nepa_dist.tasks.pretrain import PretrainTask
from spawn import run_ranks
from test_engines import MODEL, Saved, make, snapshot, update

FROZEN = {
    "embedding": ("backbone.patch_embed.",),
    # Nothing that comes into a block requires a gradient; one row of CLS for all ranks.
    "below": ("backbone.cls_token", "backbone.patch_embed.", "backbone.blocks.0."),
}
RATES = {HEAD_LAYER: 2e-3, 0: 1e-3, 1: 5e-4, 2: 0.0}
LEARNED = {"weight", "exp_avg", "exp_avg_sq", "step", "ema"}
STEPS, RESUME = 4, 2
PRECISIONS = {"embedding": ("fp32", "bf16_params"), "below": ("fp32",)}
OTHERS = ("fsdp2", "zero1", "zero2", "zero3")
CASES = [(name, frozen) for name in ("ddp", *OTHERS, "hsdp") for frozen in FROZEN]
PRECISE_CASES = [(*case, precision) for case in CASES for precision in PRECISIONS[case[1]]]


class LayeredTask(PretrainTask):
    def __init__(self, *args, frozen, other_seed=False, **options):
        super().__init__(*args, **(options | {"seed": 4} if other_seed else options))
        self.seed = 3  # of what is drawn by step
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN[frozen]))

    def lr_layer(self, name):
        return HEAD_LAYER if name.startswith("backbone.norm.") else layer_of(name, 2)


def build(name, frozen, precision="fp32", other_seed=False):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    options = {"shard_size": 2} if name == "hsdp" else {}

    def make_task(*args, **settings):
        return LayeredTask(*args, frozen=frozen, other_seed=other_seed, **settings)

    return make(name, ranks, make_task, precision=precision, **options)


def steps_of(task, engine, plan, steps):
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return [update(task, engine, plan, step, rank, ranks, lr=RATES.__getitem__) for step in steps]


def run_case(name, frozen, precision="fp32"):
    task, engine, plan = build(name, frozen, precision)
    seen = {"groups": [(group["layer"], group["weight_decay"]) for group in engine.param_groups], "first": snapshot(engine)}
    seen["rows"] = steps_of(task, engine, plan, range(RESUME))
    middle = snapshot(engine)
    seen["rows"] += steps_of(task, engine, plan, range(RESUME, STEPS))
    seen["final"] = snapshot(engine)
    with engine.weights(ema=True):
        seen["averaged"] = snapshot(engine)
    seen["swapped_back"] = snapshot(engine)
    engine.close()
    # Other weights to begin with: what is frozen must come from the checkpoint, in the forward too.
    task, engine, plan = build(name, frozen, precision, other_seed=True)
    engine.load_named_state(Saved(middle))
    seen["loaded"] = same_bits(snapshot(engine), middle)
    seen["resumed_rows"] = steps_of(task, engine, plan, range(RESUME, STEPS))
    seen["resumed"] = same_bits(snapshot(engine), seen["final"])
    engine.close()
    return seen


def run_cases(names):
    zero.WHOLE_NUMEL = 100  # of this small model's matrices none would be sharded otherwise
    return {
        (n, frozen, precision): run_case(n, frozen, precision)
        for n in names
        for frozen in FROZEN
        for precision in PRECISIONS[frozen]
    }


def same_bits(one, other):
    return list(one) == list(other) and all(
        state.keys() == other[name].keys() and all(torch.equal(tensor, other[name][field]) for field, tensor in state.items())
        for name, state in one.items()
    )


def is_frozen(name, frozen):
    return name.startswith(FROZEN[frozen])


@pytest.fixture(scope="module")
def plain():
    return {frozen: run_case("ddp", frozen) for frozen in FROZEN}


@pytest.fixture(scope="module")
def ranks():
    """By rank, of 2 and of 4 (HSDP)."""
    two = run_ranks(run_cases, 2, ("ddp", *OTHERS), timeout=280)
    four = run_ranks(run_cases, 4, ("hsdp",), timeout=280)
    return [*two, *four]


def of(ranks, name, frozen, precision="fp32"):
    return [cases[name, frozen, precision] for cases in ranks if (name, frozen, precision) in cases]


@pytest.mark.parametrize(("name", "frozen"), CASES)
def test_numbers_are_those_of_plain(plain, ranks, name, frozen):
    expected = plain[frozen]
    assert len(of(ranks, name, frozen)) == (4 if name == "hsdp" else 2)
    losses = zip(*([row[0] for row in seen["rows"]] for seen in of(ranks, name, frozen)), strict=True)
    assert [sum(step) / len(step) for step in losses] == pytest.approx([row[0] for row in expected["rows"]], abs=1e-6)
    for seen in of(ranks, name, frozen):
        assert [row[1] for row in seen["rows"]] == pytest.approx([row[1] for row in expected["rows"]], rel=1e-5)
        assert [row[2] for row in seen["rows"]] == [1] * STEPS
        assert list(seen["final"]) == list(expected["final"])
        for key, state in seen["final"].items():
            assert state.keys() == ({"weight"} if is_frozen(key, frozen) else LEARNED)
            for field, tensor in state.items():
                torch.testing.assert_close(tensor, expected["final"][key][field], atol=3e-6, rtol=1e-3)


@pytest.mark.parametrize(("name", "frozen"), CASES)
def test_each_layer_learns_at_its_rate(plain, ranks, name, frozen):
    layers = (HEAD_LAYER, 0) if frozen == "below" else (HEAD_LAYER, 0, 1, 2)
    pairs = [(layer, decay) for layer in layers for decay in (0.05, 0.0)]
    pairs = [pair for pair in pairs if pair not in ((HEAD_LAYER, 0.05), (2, 0.0))]  # norms alone; CLS alone
    for seen in [plain[frozen], *of(ranks, name, frozen)]:
        assert seen["groups"] == pairs
        for key, state in seen["final"].items():
            still = key == "backbone.cls_token" or is_frozen(key, frozen)
            assert torch.equal(state["weight"], seen["first"][key]["weight"]) == still, key


@pytest.mark.parametrize(("name", "frozen", "precision"), PRECISE_CASES)
def test_frozen_weights_are_exact_whatever_happens(plain, ranks, name, frozen, precision):
    for seen in of(ranks, name, frozen, precision):
        for when in ("first", "final", "averaged", "swapped_back"):
            for key in filter(lambda key: is_frozen(key, frozen), seen[when]):
                assert seen[when][key]["weight"].dtype == torch.float32
                assert torch.equal(seen[when][key]["weight"], plain[frozen]["first"][key]["weight"])
        for key, state in seen["averaged"].items():
            if not is_frozen(key, frozen):
                assert torch.equal(state["weight"], seen["final"][key]["ema"])
        assert same_bits(seen["swapped_back"], seen["final"])


@pytest.mark.parametrize(("name", "frozen", "precision"), PRECISE_CASES)
def test_resume_is_exact_to_the_bit(ranks, name, frozen, precision):
    for seen in of(ranks, name, frozen, precision):
        assert seen["loaded"]
        assert seen["resumed_rows"] == seen["rows"][RESUME:]
        assert seen["resumed"]


TASKS = {
    "pretrain": {},
    "masked, learned positions": {"model": {"rope": False}, "objective": {"mask_ratio": 0.4}},
    "without shift": {"objective": {"shift": False, "stop_grad": False, "anti_collapse": "sigreg"}},
    "finetune": {"task": "finetune"},
    "last token": {"task": "finetune", "finetune": {"pool": "last", "freeze_patch_embed": False}},
    "segment": {"task": "segment"},
    "no auxiliary loss": {"task": "segment", "segment": {"aux_weight": 0, "freeze_patch_embed": True}},
    "low taps": {"task": "segment", "segment": {"taps": [0, 1, 1, 2]}},
}


@pytest.mark.parametrize("settings", TASKS.values(), ids=TASKS)
def test_all_that_a_task_does_not_freeze_learns(settings):
    """DDP fails where a parameter has no gradient, and DeepSpeed would decay it."""
    size = {"channels": 8, "aux_channels": 8, "num_classes": 3}
    values = {"finetune": {"num_classes": 3}} | settings
    values |= {"model": MODEL | {"depth": 4} | settings.get("model", {}), "segment": size | settings.get("segment", {})}
    values["finetune"] = {"num_classes": 3} | values["finetune"]
    task = build_task(Config.model_validate(values))
    task.begin_step(0, observe=False)
    batch = {"images": torch.randn(2, 3, 32, 32), "targets": torch.full((2, 3), 1 / 3)}
    loss, _ = task(batch | {"masks": torch.ones(2, 32, 32, dtype=torch.uint8)})
    loss.backward()
    still = {name for name, parameter in task.named_parameters() if parameter.grad is None}
    assert still == {name for name, parameter in task.named_parameters() if not parameter.requires_grad}


def refuse():
    zero.WHOLE_NUMEL = 100
    for name in ("ddp", *OTHERS):
        _, engine, _ = build(name, "embedding")
        held = Saved(snapshot(engine))
        trained = Saved(held | {"backbone.patch_embed.bias": dict.fromkeys(LEARNED, torch.zeros(24))})
        with pytest.raises(StateMismatchError, match=r"patch_embed\.bias: .*'exp_avg'.* needs \['weight'\]; it is frozen here"):
            engine.load_named_state(trained)
        key = "backbone.blocks.1.mlp.down.bias"
        with pytest.raises(StateMismatchError, match=rf"{key}: the checkpoint holds \['weight'\].*; it was frozen there"):
            engine.load_named_state(Saved(held | {key: {"weight": torch.zeros(24)}}))
        bent = Saved(held | {"backbone.patch_embed.bias": {"weight": torch.zeros(12)}})  # the size of a shard
        with pytest.raises(StateMismatchError, match=r"patch_embed\.bias: weight is \[12\] in the checkpoint and \[24\]"):
            engine.load_named_state(bent)
        engine.close()
    return True


def test_a_checkpoint_that_froze_something_else_is_refused_with_the_reason():
    assert run_ranks(refuse, 2) == [True, True]
