"""The model of a step's time: its limits, and the volumes that the literature gives."""

import math
import subprocess
import sys

import pytest

from nepa_dist.config import Config
from nepa_dist.plan import make_plan
from nepa_dist.step_time import FABRICS, GPUS, Fabric, gpu_of, num_parameters, step_time, volumes

ENGINES = ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
FAST, SLOW = FABRICS


def settings(name, nodes=8, per_node=8, micro=64, accum=1, **engine):
    config = Config.model_validate(
        {
            "model": {"preset": "vit_l"},
            "engine": {"name": name, **engine},
            "global_batch_size": nodes * per_node * micro * accum,
            "micro_batch_size": micro,
            "steps": 10,
            "cluster": {"nodes": nodes, "gpus_per_node": per_node},
        }
    )
    return config, make_plan(config, 10**6)


def estimate(*args, fabric=FAST, gpu=GPUS["h100"], **kwargs):
    return step_time(*settings(*args, **kwargs), gpu, fabric)


@pytest.mark.parametrize("name", ENGINES)
def test_one_gpu_communicates_nothing(name):
    time = estimate(name, nodes=1, per_node=1)
    assert time.exposed == time.communication == 0
    assert time.total == time.compute + time.optimizer


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("accum", [1, 4])
def test_with_unlimited_links_nothing_is_exposed_and_slower_ones_never_help(name, accum):
    unlimited = estimate(name, accum=accum, fabric=Fabric("", math.inf, math.inf))
    fast, slow = estimate(name, accum=accum), estimate(name, accum=accum, fabric=SLOW)
    assert unlimited.exposed == unlimited.communication == 0
    assert 0 < fast.exposed < slow.exposed
    for time in (fast, slow):
        assert time.exposed <= time.communication
        assert time.total >= unlimited.total
    # What cannot hide takes what the links take.
    assert slow.exposed > slow.communication - slow.compute


P = 304_571_392


@pytest.mark.parametrize(
    ("name", "engine", "per_parameter"),
    [
        # In bf16, bytes per parameter at many ranks: two of everything that ZeRO's paper counts as one number.
        ("ddp", {}, 2 * 2),
        ("zero1", {}, 2 * 2),
        ("zero2", {}, 2 * 2),
        ("zero3", {}, 3 * 2),
        ("fsdp2", {}, 3 * 2),
        ("fsdp2", {"reshard_after_forward": False}, 2 * 2),
        ("fsdp2", {"reduce_dtype": "fp32"}, 2 * 2 + 4),
        ("ddp", {"reduce_dtype": "fp32"}, 2 * 4),
        ("zero2", {"reduce_dtype": "fp32", "precision": "bf16_autocast"}, 2 * 4),
    ],
)
def test_volumes_are_those_of_the_textbook(name, engine, per_parameter):
    config, plan = settings(name, **{"precision": "bf16_params", "reduce_dtype": "bf16", **engine})
    assert num_parameters(config) == P
    assert sum(volumes(config, plan)) == pytest.approx(per_parameter * P * 63 / 64)


def test_hsdp_sends_an_eighth_between_the_nodes():
    config, plan = settings("hsdp", precision="bf16_params", reduce_dtype="bf16")
    volume = volumes(config, plan)
    assert volume.gathered + volume.reduced == pytest.approx(3 * 2 * P * 7 / 8)
    assert volume.reduced_between == pytest.approx(2 * 2 * P / 8 * 7 / 8)
    alone = volumes(*settings("hsdp", nodes=1))
    assert alone.reduced_between == 0


def test_accumulation_repeats_what_each_micro_batch_sends():
    for name, gathers, reductions in (("ddp", 1, 1), ("fsdp2", 4, 1), ("zero1", 1, 1), ("zero2", 1, 4), ("zero3", 4, 4)):
        once, often = volumes(*settings(name)), volumes(*settings(name, accum=4))
        assert often.gathered == gathers * once.gathered, name
        assert often.reduced == reductions * once.reduced, name
        assert often.gathered_after == once.gathered_after, name


def test_a_smaller_batch_per_gpu_hides_less():
    shares = [estimate("ddp", micro=micro, fabric=SLOW) for micro in (256, 64, 16)]
    hidden = [1 - time.exposed / time.communication for time in shares]
    assert hidden == sorted(hidden, reverse=True)
    assert hidden[0] > hidden[-1]


def test_computation_follows_batch_checkpointing_compilation_and_precision():
    plain = estimate("ddp", compile=True)
    double = estimate("ddp", compile=True, micro=128)
    assert double.matmul == pytest.approx(2 * plain.matmul)
    assert estimate("ddp", compile=True, activation_checkpointing="full").matmul == pytest.approx(4 / 3 * plain.matmul)
    selective = estimate("ddp", compile=True, activation_checkpointing="selective")
    assert selective.matmul == plain.matmul
    assert selective.elementwise > plain.elementwise
    assert plain.elementwise < estimate("ddp").elementwise
    by_torch = estimate("ddp", compile=True, kernels="torch").elementwise
    assert plain.elementwise < by_torch < estimate("ddp", kernels="torch").elementwise
    assert estimate("ddp", compile=True, precision="fp32").matmul > 10 * plain.matmul
    assert estimate("zero3").elementwise == estimate("ddp", kernels="torch").elementwise
    assert estimate("ddp", compile=True, gpu=GPUS["h200"]).elementwise < plain.elementwise
    # A tiny batch is as slow as the host starts its kernels.
    tiny = estimate("ddp", nodes=1, per_node=1, micro=1)
    assert tiny.launches > 0
    assert tiny.compute == pytest.approx(120 * 24 * 7.5e-6)


@pytest.mark.parametrize(
    ("model", "kernels", "images_per_second"),
    [("vit_l", "auto", 928.6), ("vit_l", "torch", 840.5), ("vit_b", "auto", 2988)],
)
def test_one_gpu_takes_what_was_measured(model, kernels, images_per_second):
    # benchmarks/results/step_vit_*_nvidia-h200_2026-11-26.md
    config, _ = settings("ddp", nodes=1, per_node=1, micro=256, compile=True, kernels=kernels)
    config = Config.model_validate(config.model_dump() | {"model": {"preset": model}})
    seconds = step_time(config, make_plan(config, 10**6), GPUS["h200"], FAST).total
    assert 256 / seconds == pytest.approx(images_per_second, rel=0.06)


def test_sharded_optimizers_take_a_share_of_the_time():
    whole = estimate("ddp").optimizer
    for name, shards in (("fsdp2", 64), ("hsdp", 8), ("zero1", 64), ("zero2", 64), ("zero3", 64)):
        assert estimate(name).optimizer == pytest.approx(whole / shards), name


def test_the_gpu_is_the_one_that_the_cluster_names():
    config, _ = settings("ddp")
    assert gpu_of(config).name == "H100"
    named = config.model_copy(update={"cluster": config.cluster.model_copy(update={"gpu_type": "nvidia_h200"})})
    assert gpu_of(named).name == "H200"


def test_it_imports_no_torch():
    code = "import sys, nepa_dist.step_time; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
