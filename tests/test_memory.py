"""The memory that a dry run predicts for weights, gradients and optimizer is what an engine really holds."""

import gc

import pytest
import torch
import torch.distributed as dist

from nepa_dist.config import Config
from nepa_dist.engines.build import build_engine
from nepa_dist.memory import state_bytes
from nepa_dist.plan import make_plan
from nepa_dist.tasks.pretrain import PretrainTask
from spawn import run_ranks

MODEL = {"image_size": 32, "patch_size": 8, "embed_dim": 256, "depth": 3, "num_heads": 4}
CASES = [
    ("ddp", 1, {}),
    ("ddp", 2, {"precision": "bf16_params"}),
    ("fsdp2", 2, {}),
    ("fsdp2", 2, {"accum": 2}),
    ("fsdp2", 2, {"reshard_after_forward": False}),
    ("fsdp2", 2, {"reshard_after_forward": False, "precision": "bf16_params"}),
    ("fsdp2", 2, {"reshard_after_forward": False, "accum": 2}),
    ("hsdp", 4, {"shard_size": 2}),
    ("zero3", 2, {"reshard_after_forward": False}),
    *(
        (f"zero{stage}", 2, {"precision": precision, "accum": 2})
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16_params")
    ),
]


def held_bytes() -> int:
    """Bytes of all storages that a living tensor points to, each once."""
    gc.collect()
    storages = {}
    for tensor in [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]:
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if type(part) in (torch.Tensor, torch.nn.Parameter):
                storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


def measure(name, options):
    """The most that is held after a forward or a backward of the second step."""
    ranks, accum = dist.get_world_size(), options.pop("accum", 1)
    config = Config.model_validate(
        {
            "model": MODEL,
            "steps": 2,
            "global_batch_size": accum * ranks,
            "micro_batch_size": 1,
            "engine": {"name": name, "precision": "fp32", **options},
            "cluster": {"gpus_per_node": ranks},
        }
    )
    before = held_bytes()
    task = PretrainTask(config.model, config.objective, seed=0)
    engine = build_engine(task, config, make_plan(config, 10), torch.device("cpu"))
    for step in range(2):
        task.begin_step(step, observe=False)
        held = 0
        for micro in range(accum):
            loss, logs = engine.model({"images": torch.zeros(1, 3, 32, 32)})
            held = max(held, held_bytes() - before)
            engine.backward(loss, last=micro == accum - 1)
            del loss, logs
            held = max(held, held_bytes() - before)
        engine.step()
    engine.close()
    predicted = state_bytes(config, accum)
    predicted.pop("bf16 copy of the weights", None)  # lives during forward and backward only
    return held, sum(predicted.values())


@pytest.mark.parametrize(("name", "ranks", "options"), CASES)
def test_predicted_state_is_what_is_held(name, ranks, options):
    for held, predicted in run_ranks(measure, ranks, name, options):
        assert held == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_autocast_keeps_a_copy_of_the_weights_unless_blocks_are_computed_again(checkpointing):
    engine = {"precision": "bf16_autocast", "activation_checkpointing": checkpointing}
    config = Config.model_validate(
        {"model": MODEL, "steps": 2, "global_batch_size": 1, "micro_batch_size": 1, "engine": engine}
    )
    task = PretrainTask(config.model, config.objective, seed=0)
    placed = build_engine(task, config, make_plan(config, 10), torch.device("cpu"))
    shapes = {tuple(sorted(p.shape)) for block in task.backbone.blocks for p in block.parameters() if p.ndim == 2}
    kept = {}

    def keep(tensor):
        if tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no other one gets its place
        return tensor

    task.begin_step(0, observe=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = placed.model({"images": torch.zeros(1, 3, 32, 32)})
    predicted = state_bytes(config, 1).get("bf16 copies by autocast", 0)
    held = sum(storage.nbytes() for storage in kept.values())
    assert held == pytest.approx(predicted, rel=0.1)  # embeddings, biases and norms are not among those counted here
    loss.backward()
    placed.close()
