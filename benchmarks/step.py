"""Time the training step: ``python -m benchmarks.step --model vit_b_gelu --batch 8 --compile on off``.

A step is that of the loop: forward, backward, clip, update and average, on images that lie on the device. Every combination of
the options is an arm. Reports images per second, model FLOPs utilisation (MFU; causal and full count, as the PaLM paper defines
it), peak memory and where the time of a step goes. With several GPUs: ``torchrun --nproc-per-node 8 -m benchmarks.step ...``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from benchmarks.rounds import KINDS, Arm, breakdown, file_stem, measure, place, ratio, spread
from nepa_dist import cost, presets
from nepa_dist.config import Config, ConfigError, EngineConfig
from nepa_dist.data.device import normalize
from nepa_dist.engines.build import build_engine
from nepa_dist.engines.mesh import World, join_world, leave_world
from nepa_dist.metrics.profile import peak_flops
from nepa_dist.plan import cross_field_problems, make_plan
from nepa_dist.tasks.pretrain import PretrainTask

RESULTS = Path(__file__).resolve().parent / "results"
_SWITCH = {"on": True, "off": False}
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def make_config(model: str, batch: int, world_size: int, **engine: Any) -> Config:
    """A run whose steps are timed.

    Args:
        model: name of a preset.
        batch: images of one rank.
        world_size: ranks.
        **engine: settings of the engine.

    Raises:
        ConfigError: the settings do not fit each other.
    """
    config = Config.model_validate(
        {
            "model": {"preset": model},
            "global_batch_size": batch * world_size,
            "micro_batch_size": batch,
            "steps": 10**6,
            "engine": engine,
            "cluster": {"gpus_per_node": world_size},
        }
    )
    if problems := cross_field_problems(config):
        raise ConfigError(problems)
    return config


def project_arm(name: str, config: Config, images: Tensor, device: torch.device) -> Arm:
    """The step of this project.

    Args:
        name: of the arm.
        config: from :func:`make_config`.
        images: [B, 3, H, W] on the device, normalised.
        device: where it runs.
    """
    task = PretrainTask(config.model, config.objective, seed=config.seed)
    engine = build_engine(task, config, make_plan(config, 10**6), device)
    task.train()
    count = itertools.count()

    def step() -> Tensor:
        task.begin_step(next(count), observe=False)
        for group in engine.param_groups:
            group["lr"] = 1e-4
        loss, _ = engine.model({"images": images})
        engine.backward(loss, last=True)
        engine.step()
        return loss.detach()

    return Arm(name, step, config.global_batch_size)


def random_images(batch: int, size: int, device: torch.device) -> Tensor:
    """Normal noise [B, 3, S, S], in the memory layout that the loader's batches have."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, size, size, 3, generator=generator)
    return images.permute(0, 3, 1, 2).to(device)


def natural_images(folder: Path, batch: int, size: int, device: torch.device) -> Tensor:
    """The first images of a folder, at any depth, resized and normalised with mean and std 0.5; repeated if they are few."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _ENDINGS][:batch]
    if not paths:
        raise SystemExit(f"error: {folder} holds no images")
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in paths]
    rows = torch.from_numpy(np.stack([pixels[k % len(pixels)] for k in range(batch)]))
    return normalize(rows.to(device), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def join(engine: dict[str, Any]) -> World:
    """The ranks that torchrun started, or this process alone; with a process group, which engines that shard need."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    # As a run in fp32 does it: no TF32 in convolutions, which is nothing to the other precisions.
    config = make_config("vit_b", 1, world_size, precision="fp32", **engine)
    return join_world(config.engine, world_size)


def utilisation(config: Config, images_per_second: float, peak: float) -> dict[str, float]:
    """MFU of one rank by both counts of attention: operations of forward and backward alone, without recomputation."""
    tokens = make_plan(config, 10**6).num_tokens
    rate = images_per_second / config.cluster.world_size / peak
    return {
        kind: rate * cost.train_flops(config.model, num_tokens=tokens, causal=kind == "causal") for kind in ("causal", "full")
    }


def find_peak(device: torch.device, precision: str, rates: Sequence[float]) -> tuple[float, str]:
    """The rate that MFU is a share of, and where it is from: the data sheet for a known GPU, else what was measured."""
    if device.type == "cuda" and (known := peak_flops(torch.cuda.get_device_name(device), fp32=precision == "fp32")):
        return known, "the GPU's data sheet"
    return max(rates), "the best matrix product of this run"


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all arms; on every rank."""
    options = [args.batch, args.precision, args.compile, args.engine, args.attention, args.kernels, args.patch_embed]
    options += [args.fp8, args.images]
    combinations = list(itertools.product(*options))
    sharded = next((name for name in args.engine if name != "ddp"), "ddp")
    world = join({"name": sharded, "device": args.device})
    about = place(world.device)
    arms, configs = [], {}
    for batch, precision, compiled, engine, attention, kernels, patches, fp8, kind in combinations:
        how = "compiled" if _SWITCH[compiled] else "eager"
        rounded = "" if fp8 == "off" else f"fp8 {fp8} "
        name = f"{engine} {precision} {how} {attention} {kernels} {patches} {rounded}batch {batch} {kind}"
        settings = {"name": engine, "precision": precision, "compile": _SWITCH[compiled], "attention": attention}
        settings |= {"kernels": kernels, "patch_embed": patches, "fp8": fp8}
        config = make_config(args.model, batch, world.world_size, device=args.device, **settings)
        size = config.model.image_size
        if kind == "random":
            images = random_images(batch, size, world.device)
        else:
            images = natural_images(args.data, batch, size, world.device)
        configs[name] = config
        arms.append(project_arm(name, config, images, world.device))
    dtype = torch.float32 if set(args.precision) == {"fp32"} else torch.bfloat16
    found = measure(arms, world.device, dtype, rounds=args.rounds, steps=args.steps, warmup=args.warmup)
    rows = {}
    for arm in arms:
        config = configs[arm.name]
        rate = {key: arm.images / value for key, value in spread(found.seconds[arm.name]).items()}
        peak, source = find_peak(world.device, config.engine.precision, found.matmul_rates)
        trace = args.trace / f"{arm.name.replace(' ', '_')}.json.gz" if args.trace and world.is_main else None
        profiled = breakdown(arm.step, world.device, trace)
        rows[arm.name] = {
            "images_per_second": {"median": rate["median"], "low": rate["high"], "high": rate["low"]},
            "mfu": utilisation(config, rate["median"], peak),
            "peak_tflops": peak / 1e12,
            "peak_from": source,
            "peak_bytes": found.peak_bytes[arm.name],
            "seconds_by_kind": profiled.seconds,
            "kernels": profiled.kernels,
        }
    first = arms[0].name
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": about,
        "model": args.model,
        "world_size": world.world_size,
        "rank": world.rank,
        "cuda": world.device.type == "cuda",
        "matmul_tflops": {key: value / 1e12 for key, value in spread(found.matmul_rates).items()},
        "arms": rows,
        "ratios": {arm.name: ratio(found.seconds, first, arm.name) for arm in arms[1:] if arm.images == arms[0].images},
        "seconds": found.seconds,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    about, rate = report["machine"], report["matmul_tflops"]
    lines = [
        f"# Step of {report['model']}, {about['device']}, {report['date']}",
        "",
        f"    {report['command']}",
        "",
        f"Commit {about['commit']}; Python {about['python']}, torch {about['versions']['torch']}; {report['world_size']} "
        f"ranks, {about['cores']} cores, {about['threads']} threads, load {about['load_at_start']} at the start. Arms "
        "interleaved round by round; median (lowest - highest).",
        "",
        f"Matrix products in the same rounds: {rate['median']:.3f} TFLOP/s ({rate['low']:.3f} - {rate['high']:.3f}).",
        "",
        "| arm | images/s | MFU causal | MFU full | of | memory of a step, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["arms"].items():
        speed = row["images_per_second"]
        lines.append(
            f"| {name} | **{speed['median']:.4g}** ({speed['low']:.4g} - {speed['high']:.4g}) | {row['mfu']['causal']:.1%} | "
            f"{row['mfu']['full']:.1%} | {row['peak_tflops']:.3f} TFLOP/s, {row['peak_from']} | {row['peak_bytes'] / 1e6:.0f} |"
        )
    lines += ["", "Where the time of a step goes, milliseconds:", "", f"| arm | {' | '.join(KINDS)} |", "|---" * 7 + "|"]
    for name, row in report["arms"].items():
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * row['seconds_by_kind'][kind]:.1f}" for kind in KINDS) + " |")
    if report["ratios"]:
        first = next(iter(report["arms"]))
        lines += ["", f"How many times as fast `{first}` is, within each round:", "", "| as | ratio |", "|---|---|"]
        lines += [
            f"| {name} | **{value['median']:.2f}** ({value['low']:.2f} - {value['high']:.2f}) |"
            for name, value in report["ratios"].items()
        ]
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], text: str, out: Path, prefix: str) -> None:
    """Print a report and keep it as JSON and Markdown, named by model, hardware and date."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{prefix}_{file_stem(report['model'], report['machine'], report['date'], cuda=report['cuda'])}"
    (out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{stem}.md").write_text(text)
    print(text)


def count(text: str) -> int:
    """A number of the command line that is at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b", choices=list(presets.PRESETS))
    parser.add_argument("--batch", type=count, nargs="+", default=[64], metavar="B", help="images of one rank")
    parser.add_argument("--precision", nargs="+", default=["bf16_autocast"], choices=["fp32", "bf16_autocast", "bf16_params"])
    parser.add_argument("--compile", nargs="+", default=["on"], choices=list(_SWITCH))
    parser.add_argument("--engine", nargs="+", default=["ddp"], choices=["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"])
    attention = get_args(EngineConfig.model_fields["attention"].annotation)
    parser.add_argument("--attention", nargs="+", default=["auto"], choices=attention, help="values of engine.attention")
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=["auto", "torch", "triton"])
    parser.add_argument("--patch-embed", nargs="+", default=["auto"], choices=["auto", "conv", "matmul"])
    parser.add_argument("--fp8", nargs="+", default=["off"], choices=["off", "tensorwise", "rowwise"])
    parser.add_argument("--images", nargs="+", default=["random"], choices=["random", "natural"])
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images for natural, at any depth")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=count, metavar="N", help="of a CPU; default: all cores")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--steps", type=count, default=1, help="per round and arm")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each arm before the first round")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the report goes")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="Chrome traces of one step of each arm, by rank 0")
    args = parser.parse_args(argv)
    if "natural" in args.images and args.data is None:
        parser.error("--images natural needs --data FOLDER")
    if "fa3" in args.attention and len(set(args.attention)) > 1:
        parser.error("fa3 is torch's flash kernel for the whole process: measure it by itself")
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        report = benchmark(args)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    ranks = report["world_size"]
    start = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    report["command"] = shlex.join([*start, "-m", "benchmarks.step", *(sys.argv[1:] if argv is None else argv)])
    if report["rank"] == 0:
        write(report, to_markdown(report), args.out, "step")
    if dist.is_initialized():
        leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
