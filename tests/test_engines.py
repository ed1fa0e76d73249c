"""Every engine on real gloo ranks against one plain process: the same numbers, skipped steps, state that moves."""

import math

import pytest
import torch
import torch.distributed as dist

from nepa_dist.config import Config
from nepa_dist.engines.base import StateMismatchError
from nepa_dist.engines.build import build_engine
from nepa_dist.plan import make_plan
from nepa_dist.tasks.pretrain import PretrainTask
from spawn import run_ranks

# An odd width of the MLP: shards are uneven, and CLS has one row for all ranks.
MODEL = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_hidden_dim": 37}
STEPS, BATCH = 10, 16
HSDP = ("hsdp", 4, {"shard_size": 2})
ENGINES = [("ddp", 2, {}), ("fsdp2", 2, {}), HSDP, ("zero1", 2, {}), ("zero2", 2, {}), ("zero3", 2, {})]
VARIANTS = [
    ("fsdp2", 2, {"reshard_after_forward": False}),
    ("ddp", 2, {"activation_checkpointing": "selective"}),
    ("fsdp2", 2, {"activation_checkpointing": "full"}),
    ("zero2", 2, {"activation_checkpointing": "selective"}),
    ("zero3", 2, {"activation_checkpointing": "full"}),
    ("ddp", 1, {"activation_checkpointing": "selective", "compile": True}),
    pytest.param("fsdp2", 2, {"activation_checkpointing": "full", "compile": True}, marks=pytest.mark.slow),
    pytest.param("zero2", 2, {"compile": True}, marks=pytest.mark.slow),
]


class Saved(dict):
    """A checkpoint in memory."""

    def names(self):
        return list(self)

    def read(self, name):
        return self[name]


def make(name, ranks, make_task=PretrainTask, **engine):
    optim = {"ema_decay": 0.5, "clip_grad_norm": 0.05}  # a clip that bites
    config = Config.model_validate(
        {
            "model": MODEL,
            "steps": STEPS,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH // ranks // 2,  # accumulation 2
            "optim": optim,
            "engine": {"precision": "fp32", "name": name, **engine},
            "cluster": {"gpus_per_node": ranks},
        }
    )
    plan = make_plan(config, 100)
    task = make_task(config.model, config.objective, seed=3)
    device = torch.device("cuda" if config.engine.device == "cuda" else "cpu")
    return task, build_engine(task, config, plan, device), plan


def update(task, engine, plan, step, rank, ranks, poison=False, lr=lambda layer: 1e-3, scale=1.0):
    task.train()
    task.begin_step(step, observe=False)
    for group in engine.param_groups:
        group["lr"] = lr(group["layer"])
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
    images = images.to(task.backbone.cls_token.device)
    losses = []
    for micro, part in enumerate(images.chunk(plan.grad_accum_steps)):
        loss, _ = engine.model({"images": part * math.nan if poison else part})
        engine.backward(loss * scale, last=micro == plan.grad_accum_steps - 1)
        losses.append(loss.item())
    result = engine.step()
    return sum(losses) / len(losses), result.grad_norm.item(), result.applied.item()


def snapshot(engine):
    return Saved({name: {field: t.clone() for field, t in state.items()} for name, state in engine.named_state()})


def train(name, engine_options, steps=STEPS, start=None, poison_rank=None, first=0):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    task, engine, plan = make(name, ranks, **engine_options)
    if start is not None:
        engine.load_named_state(start)
    rows, states = [], []
    for step in range(first, first + steps):
        rows.append(update(task, engine, plan, step, rank, ranks, poison=step == 2 and rank == poison_rank))
        states.append(snapshot(engine))
    with engine.weights(ema=True):
        averaged = {name: state["weight"].clone() for name, state in engine.named_state()}
    after = snapshot(engine)
    engine.close()
    return rows, states, averaged, after


def assert_equal(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, state in one.items():
        assert state.keys() == other[name].keys() == {"weight", "exp_avg", "exp_avg_sq", "step", "ema"}
        for field, tensor in state.items():
            torch.testing.assert_close(tensor, other[name][field], **tolerance, msg=lambda m, n=name, f=field: f"{n} {f}: {m}")


def meet_huge_gradients(name, options):
    """Gradients of one rank that are finite, and so large that the sum of their squares is not."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    task, engine, plan = make(name, ranks, **options)
    update(task, engine, plan, 0, rank, ranks)
    before = snapshot(engine)
    row = update(task, engine, plan, 1, rank, ranks, scale=1e25 if rank == 0 else 1.0)
    after = snapshot(engine)
    engine.close()
    return row, before, after


PRECISIONS = ("fp32", "bf16_autocast", "bf16_params")


def everything(name, options):
    """All that is tested of one engine, in one set of processes: they take longer to start than to work."""
    ranks = dist.get_world_size()
    results = {precision: train(name, {**options, "precision": precision}) for precision in PRECISIONS}
    results["bf16 reduced"] = train(name, {**options, "reduce_dtype": "bf16"}, 3)
    results["huge"] = meet_huge_gradients(name, options)
    for precision in PRECISIONS:
        low = {**options, "precision": precision}
        results[f"{precision} poisoned"] = train(name, low, 5, None, ranks - 1)
        # Ten steps at once, and six, then a fresh engine for four more.
        results[f"{precision} resumed"] = train(name, low, 4, results[precision][1][5], None, 6)
    return results


@pytest.fixture(scope="module")
def plain():
    return train("ddp", {})


@pytest.fixture(scope="module")
def plain_low():
    return {precision: train("ddp", {"precision": precision}) for precision in PRECISIONS[1:]}


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine[0])
def results(request):
    name, ranks, options = request.param
    return run_ranks(everything, ranks, name, options, timeout=280)


def assert_equals_plain(results, plain):
    rows, states, averaged, _ = plain
    losses = [sum(step) / len(results) for step in zip(*([row[0] for row in result[0]] for result in results), strict=True)]
    assert losses == pytest.approx([row[0] for row in rows], abs=1e-6)
    for rank_rows, rank_states, rank_averaged, after in results:
        assert [row[1] for row in rank_rows] == pytest.approx([row[1] for row in rows], rel=1e-5)
        assert_equal(rank_states[-1], states[-1], atol=3e-6, rtol=1e-3)
        for key, tensor in averaged.items():
            torch.testing.assert_close(rank_averaged[key], tensor, atol=3e-6, rtol=1e-3)
            assert torch.equal(rank_averaged[key], rank_states[-1][key]["ema"])
        assert_equal(after, rank_states[-1], atol=0, rtol=0)  # swapped back


def test_every_engine_equals_plain(plain, results):
    assert_equals_plain([result["fp32"] for result in results], plain)


@pytest.mark.parametrize(("name", "ranks", "options"), VARIANTS)
def test_what_saves_memory_or_time_changes_no_number(plain, name, ranks, options):
    assert_equals_plain(run_ranks(train, ranks, name, options, timeout=280), plain)


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_what_is_computed_again_is_computed_in_the_same_precision(plain_low, precision, kind):
    rows, states, _, _ = train("ddp", {"precision": precision, "activation_checkpointing": kind})
    assert rows == plain_low[precision][0]
    assert_equal(states[-1], plain_low[precision][1][-1], atol=0, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_bf16_agrees_with_plain(plain_low, results, precision):
    rows, states, _, _ = plain_low[precision]
    curves = [[row[0] for row in result[precision][0]] for result in results]
    assert [sum(step) / len(results) for step in zip(*curves, strict=True)] == pytest.approx([row[0] for row in rows], abs=2e-3)
    for rank_rows, rank_states, _, _ in [result[precision] for result in results]:
        assert [row[1] for row in rank_rows] == pytest.approx([row[1] for row in rows], rel=2e-2)
        for key, state in rank_states[-1].items():
            for field in ("weight", "ema"):
                assert state[field].dtype == torch.float32
                torch.testing.assert_close(state[field], states[-1][key][field], atol=3e-3, rtol=0)


def test_gradients_can_be_reduced_in_bf16(plain, results):
    expected = [row[1] for row in plain[0][:3]]
    norms = [row[1] for row in results[0]["bf16 reduced"][0]]
    assert norms == pytest.approx(expected, rel=1e-2)
    assert norms != pytest.approx(expected, rel=1e-6)  # digits are lost: it took effect


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_on_one_rank_skips_the_step_on_all_to_the_bit(results, precision):
    for rows, states, _, _ in [result[f"{precision} poisoned"] for result in results]:
        assert [row[2] for row in rows] == [1, 1, 0, 1, 1]
        assert_equal(states[2], states[1], atol=0, rtol=0)


def test_gradients_too_large_for_a_norm_skip_the_step(results):
    for row, before, after in [result["huge"] for result in results]:
        assert row[1:] == (math.inf, 0)
        assert_equal(after, before, atol=0, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume_is_exact_to_the_bit(results, precision):
    for result in results:
        whole, resumed = result[precision], result[f"{precision} resumed"]
        assert resumed[0] == whole[0][6:]
        assert_equal(resumed[1][-1], whole[1][-1], atol=0, rtol=0)


def test_state_moves_between_engines_and_ranks(plain):
    rows, states, _, _ = plain
    # Plain -> 2 shards -> 2 replicas of 2 shards -> plain, one step each.
    half = run_ranks(train, 2, "fsdp2", {}, 1, states[1], None, 2)
    assert half[0][0][0][1] == pytest.approx(rows[2][1], rel=1e-5)
    quarter = run_ranks(train, 4, "hsdp", {"shard_size": 2}, 1, half[0][1][0], None, 3)
    assert quarter[0][0][0][1] == pytest.approx(rows[3][1], rel=1e-5)
    last = train("ddp", {}, 1, quarter[0][1][0], None, 4)
    assert last[0][0][0] == pytest.approx(rows[4][0], abs=1e-6)
    assert_equal(last[1][0], states[4], atol=3e-6, rtol=1e-3)


def _load_wrong(saved):
    _, engine, _ = make("fsdp2", dist.get_world_size())
    before = snapshot(engine)
    with pytest.raises(StateMismatchError, match=r"missing in the checkpoint: backbone\.cls_token"):
        engine.load_named_state(saved)
    assert_equal(snapshot(engine), before, atol=0, rtol=0)
    return True


def test_a_checkpoint_that_does_not_fit_changes_nothing(plain):
    saved = Saved(plain[1][0])
    saved["head.extra"] = saved.pop("backbone.cls_token")
    assert run_ranks(_load_wrong, 2, saved) == [True, True]
