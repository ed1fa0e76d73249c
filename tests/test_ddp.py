"""The DDP engine on two gloo ranks against one process: the same numbers, skipped steps, state that moves."""

import math

import pytest
import torch

from nepa_dist.config import Config, ConfigError, EngineConfig
from nepa_dist.engines.base import StateMismatchError
from nepa_dist.engines.build import build_engine
from nepa_dist.engines.mesh import World, join_world
from nepa_dist.plan import make_plan
from nepa_dist.tasks.pretrain import PretrainTask
from spawn import run_ranks

MODEL = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "rope_rescale": 1.0}
CPU = torch.device("cpu")
STEPS, BATCH = 4, 8


def make(ranks, **changes):
    optim = {"ema_decay": 0.5, "clip_grad_norm": 0.05}  # a clip that bites
    settings = {"model": MODEL, "steps": STEPS, "global_batch_size": BATCH, "optim": optim, "engine": {"precision": "fp32"}}
    config = Config.model_validate({**settings, "cluster": {"gpus_per_node": ranks}, **changes})
    plan = make_plan(config, 100)
    task = PretrainTask(config.model, config.objective, seed=3)
    return task, build_engine(task, config, plan, CPU), plan


def batch(step, rank=0, ranks=1, micro=0, micros=1):
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return {"images": images.chunk(ranks)[rank].chunk(micros)[micro]}


def update(engine, plan, step, rank=0, ranks=1, poison=False):
    for group in engine.param_groups:
        group["lr"] = 0.01
    losses = []
    for micro in range(plan.grad_accum_steps):
        inputs = batch(step, rank, ranks, micro, plan.grad_accum_steps)
        if poison:
            inputs["images"] = inputs["images"] * math.nan
        loss, _ = engine.model(inputs)
        engine.backward(loss, last=micro == plan.grad_accum_steps - 1)
        losses.append(loss.item())
    result = engine.step()
    return sum(losses) / len(losses), float(result.grad_norm), float(result.applied)


def snapshot(engine):
    return {name: {field: t.clone() for field, t in state.items()} for name, state in engine.named_state()}


def train(rank=0, ranks=1, poison_rank=None, **changes):
    _, engine, plan = make(ranks, **changes)
    rows, states = [], []
    for step in range(STEPS):
        poison = step == 2 and rank == poison_rank
        rows.append(update(engine, plan, step, rank, ranks, poison))
        states.append(snapshot(engine))
    engine.close()
    return rows, states


def assert_equal(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, state in one.items():
        assert state.keys() == other[name].keys() == {"weight", "exp_avg", "exp_avg_sq", "step", "ema"}
        for field, tensor in state.items():
            torch.testing.assert_close(tensor, other[name][field], **tolerance, msg=lambda m, n=name, f=field: f"{n} {f}: {m}")


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_two_ranks_equal_one_process(micro_batch_size):
    rows, states = train(micro_batch_size=8)
    both = run_ranks(_train_rank, 2, None, micro_batch_size)
    mean_losses = [sum(losses) / 2 for losses in zip(*([row[0] for row in r] for r, _ in both), strict=True)]
    assert mean_losses == pytest.approx([row[0] for row in rows], abs=1e-6)
    for rank_rows, rank_states in both:
        assert [row[1] for row in rank_rows] == pytest.approx([row[1] for row in rows], rel=1e-5)
        # Adam divides by the root of tiny squares, so weights agree less sharply than gradients.
        assert_equal(rank_states[-1], states[-1], atol=2e-6, rtol=1e-4)


def _train_rank(poison_rank, micro_batch_size):
    import torch.distributed as dist

    return train(dist.get_rank(), dist.get_world_size(), poison_rank, micro_batch_size=micro_batch_size)


def test_nan_on_one_rank_skips_the_step_on_all_to_the_bit():
    for rows, states in run_ranks(_train_rank, 2, 1, 2):
        assert [row[2] for row in rows] == [1, 1, 0, 1]
        assert not math.isfinite(rows[2][1])
        assert_equal(states[2], states[1], atol=0, rtol=0)
        assert float(states[3]["backbone.cls_token"]["step"]) == 3


def test_state_moves_to_another_engine_and_continues_to_the_bit():
    class Saved(dict):
        def names(self):
            return list(self)

        def read(self, name):
            return self[name]

    _, engine, plan = make(1)
    update(engine, plan, 0)
    saved = Saved(snapshot(engine))
    expected = update(engine, plan, 1)
    _, other, plan = make(1)
    other.load_named_state(saved)
    assert update(other, plan, 1) == expected
    assert_equal(snapshot(other), snapshot(engine), atol=0, rtol=0)

    renamed = Saved(saved)
    renamed["head.extra"] = renamed.pop("backbone.cls_token")
    before = snapshot(other)
    with pytest.raises(StateMismatchError) as caught:
        other.load_named_state(renamed)
    assert "missing in the checkpoint: backbone.cls_token [1, 1, 32]" in str(caught.value)
    assert "unknown to the model: head.extra" in str(caught.value)
    assert_equal(snapshot(other), before, atol=0, rtol=0)


def test_averaged_weights_are_swapped_in_and_out():
    task, engine, plan = make(1)
    for step in range(3):
        update(engine, plan, step)
    state = snapshot(engine)
    name = "backbone.blocks.0.mlp.down.weight"
    with engine.weights(ema=True):
        assert torch.equal(task.state_dict()[name], state[name]["ema"])
    with engine.weights(ema=False):
        assert torch.equal(task.state_dict()[name], state[name]["weight"])
    assert_equal(snapshot(engine), state, atol=0, rtol=0)
    assert not torch.equal(state[name]["ema"], state[name]["weight"])


def test_a_wrong_last_flag_is_an_error():
    _, engine, _ = make(1, micro_batch_size=4)
    loss, _ = engine.model(batch(0, micros=2))
    with pytest.raises(RuntimeError, match="micro-batch 1 of 2"):
        engine.backward(loss, last=True)


def test_bf16_autocast_keeps_weights_and_loss_in_fp32():
    task, engine, plan = make(1, engine={"precision": "bf16_autocast"})
    loss, _ = engine.model(batch(0))
    assert loss.dtype == torch.float32
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    exact, _ = make(1)[1].model(batch(0))
    assert loss.item() == pytest.approx(exact.item(), abs=2e-3)
    assert loss.item() != exact.item()  # something did run in bf16
    assert plan.grad_accum_steps == 1


def _count_graphs():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compile_ = torch.compile
    torch.compile = lambda function, **options: compile_(function, backend=backend, **options)
    _, engine, plan = make(2, model=MODEL | {"embed_dim": 256}, engine={"compile": True})
    update(engine, plan, 0, torch.distributed.get_rank(), 2)
    engine.close()
    return len(graphs)


def test_a_compiled_block_stays_whole_on_several_ranks():
    # A block of 3 MB is more than DDP's first bucket, at whose border a graph of a module within DDP is split by default.
    assert run_ranks(_count_graphs, 2) == [2, 2]  # the block and the loss


def test_world_without_peers_reduces_and_gathers_alone():
    world = World(0, 0, 1, 1, CPU)
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert world.all_reduce(torch.ones(2)).tolist() == [1, 1]


def test_a_world_that_is_not_the_configured_one_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 3, but cluster\.nodes x cluster\.gpus_per_node is 2"):
        join_world(EngineConfig(device="cpu"), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.device is cuda, but local rank 0 has no GPU: this machine has 0"):
        join_world(EngineConfig(device="cuda"), 1)
