"""Compare the step with other implementations of NEPA, in one process: ``python -m benchmarks.reference --batch 8``.

Forward, backward, clip and update; ours also keeps the moving average, the others do not. Arms:

ours        this project, compiled (``--eager`` adds it uncompiled)
plain       the model as Hugging Face's library would write it (:mod:`benchmarks.plain_nepa`), torch's AdamW; the same loss
            from the same weights as ours is checked before anything is timed
stable      stable-pretraining's NEPA, if it is installed: ``pip install stable-pretraining==0.1.8``, best in an environment of
            its own. It has 256 tokens and no CLS, as much arithmetic as ours
--other     any other by import path, ``package.module:make``: ``make(config)`` returns a module, images [B, 3, S, S] to a loss
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain_nepa import PlainNepa
from benchmarks.rounds import Arm, measure, place, ratio, spread
from benchmarks.step import (
    RESULTS,
    count,
    find_peak,
    make_config,
    natural_images,
    project_arm,
    random_images,
    utilisation,
    write,
)
from nepa_dist import presets
from nepa_dist.config import Config, ConfigError, ModelConfig
from nepa_dist.engines.mesh import join_world
from nepa_dist.official import to_official
from nepa_dist.tasks.pretrain import PretrainTask

STABLE = "stable-pretraining"
TOLERANCE = 1e-5
"""Of the loss in fp32, between ours and plain."""


def plain_model(config: Config) -> PlainNepa:
    """The plain implementation with the initial weights of ours."""
    task = PretrainTask(config.model, config.objective, seed=config.seed)
    plain = PlainNepa(config.model)
    plain.load_state_dict(to_official(task.state_dict(), config)[0])
    return plain


def loss_difference(config: Config, images: Tensor) -> float:
    """Largest difference of the losses of ours and plain, same weights, fp32, without the random rescale of RoPE."""
    # Blocks that count: LayerScale begins at 1e-5, which would hide a difference between them.
    config = config.model_copy(update={"model": config.model.model_copy(update={"layer_scale_init": 0.5})})
    task = PretrainTask(config.model, config.objective, seed=config.seed).to(images.device).eval()
    plain = plain_model(config).to(images.device).eval()
    with torch.no_grad():
        ours, _ = task({"images": images})
        return float((ours - plain(images)).abs())


def stable_model(model: ModelConfig) -> nn.Module:
    """stable-pretraining's NEPA at the size of ours.

    Raises:
        ImportError: it is not installed.
    """
    from stable_pretraining.methods.nepa import NEPA

    return NEPA(
        img_size=model.image_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_hidden_dim_ / model.embed_dim,
        use_swiglu=model.gated_mlp,
    )


def training_arm(
    name: str, module: nn.Module, loss_of: Callable[[Any], Tensor], images: Tensor, precision: str, *, compiled: bool
) -> Arm:
    """The step as a plain training script has it: autocast, backward, clip, torch's AdamW.

    Args:
        name: of the arm.
        module: images to whatever ``loss_of`` takes the loss from.
        loss_of: output of the module to the loss.
        images: [B, 3, S, S].
        precision: fp32 or bf16_autocast.
        compiled: with torch.compile of the whole module.
    """
    module.to(images.device).train()
    call = torch.compile(module) if compiled else module
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision != "fp32"):
            loss = loss_of(call(images))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Arm(name, step, len(images))


def make_arms(args: argparse.Namespace, precision: str, images: Tensor) -> tuple[list[Arm], dict[str, str], Config]:
    """All arms of one precision, the reasons for those that cannot be, and the configuration of ours."""
    device = images.device
    config = make_config(args.model, args.batch, 1, precision=precision, compile=True, device=args.device)
    arms, failed = [project_arm("ours", config, images, device)], {}
    if args.eager:
        eager = config.model_copy(update={"engine": config.engine.model_copy(update={"compile": False})})
        arms.append(project_arm("ours eager", eager, images, device))
    compiled = (False, True) if args.compile_others else (False,)
    for suffix in compiled:
        word = " compiled" if suffix else ""
        arms.append(training_arm(f"plain{word}", plain_model(config), lambda loss: loss, images, precision, compiled=suffix))
        try:
            stable = stable_model(config.model)
        except ImportError as error:
            failed["stable"] = f"{error}; pip install stable-pretraining==0.1.8"
        else:
            arms.append(training_arm(f"stable{word}", stable, lambda out: out.loss, images, precision, compiled=suffix))
        for path in args.other:
            module, _, attribute = path.partition(":")
            made = getattr(importlib.import_module(module), attribute)(config)
            arms.append(training_arm(f"{path}{word}", made, lambda loss: loss, images, precision, compiled=suffix))
    return arms, failed, config


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all arms in every precision."""
    # As a run in fp32 does it: no TF32 in convolutions, which is nothing to the other precisions.
    device = join_world(make_config(args.model, 1, 1, device=args.device, precision="fp32").engine, 1).device
    about = place(device)
    with contextlib.suppress(PackageNotFoundError):
        about["versions"][STABLE] = version(STABLE)
    size = make_config(args.model, 1, 1).model.image_size
    if args.data is None:
        images = random_images(args.batch, size, device)
    else:
        images = natural_images(args.data, args.batch, size, device)
    difference = loss_difference(make_config(args.model, args.batch, 1), images[:2])
    if difference > TOLERANCE:
        raise SystemExit(f"error: ours and plain differ by {difference:.2g} in the loss of the same weights")
    tables = {}
    for precision in args.precision:
        arms, failed, config = make_arms(args, precision, images)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        found = measure(arms, device, dtype, rounds=args.rounds, steps=args.steps, warmup=args.warmup)
        peak, source = find_peak(device, precision, found.matmul_rates)
        rows = {}
        for arm in arms:
            speed = spread([arm.images / value for value in found.seconds[arm.name]])
            rows[arm.name] = {
                "images_per_second": speed,
                "mfu": utilisation(config, speed["median"], peak),
                "ratio": ratio(found.seconds, "ours", arm.name),
                "peak_bytes": found.peak_bytes[arm.name],
            }
        ceiling = 1 / utilisation(config, 1.0, peak)["causal"]
        tables[precision] = {
            "arms": rows,
            "peak_tflops": peak / 1e12,
            "peak_from": source,
            "images_per_second_at_peak": ceiling,
            "failed": failed,
            "seconds": found.seconds,
        }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": about,
        "model": args.model,
        "batch": args.batch,
        "images": "random" if args.data is None else f"natural, from {args.data.name}",
        "cuda": device.type == "cuda",
        "loss_difference": difference,
        "precisions": tables,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    about = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"# NEPA implementations, {report['model']}, {about['device']}, {report['date']}",
        "",
        f"    {report['command']}",
        "",
        f"Commit {about['commit']}; Python {about['python']}, {versions}; {about['cores']} cores, {about['threads']} threads, "
        f"load {about['load_at_start']} at the start. Forward, backward, clip, update of {report['batch']} images "
        f"({report['images']}) in one process, interleaved round by round; median (lowest - highest). The ratio is taken "
        "within each round.",
        "",
        f"Ours and plain, same weights, fp32: the losses differ by {report['loss_difference']:.1g}.",
    ]
    for precision, table in report["precisions"].items():
        lines += [
            "",
            f"## {precision}",
            "",
            f"At the peak of {table['peak_tflops']:.3f} TFLOP/s ({table['peak_from']}) all of them would give "
            f"{table['images_per_second_at_peak']:.2f} images/s.",
            "",
            "| arm | images/s | of peak (causal count) | ours is faster by | memory of a step, MB |",
            "|---|---|---|---|---|",
        ]
        for name, row in table["arms"].items():
            speed, times, mfu = row["images_per_second"], row["ratio"], row["mfu"]["causal"]
            lines.append(
                f"| {name} | **{speed['median']:.3g}** ({speed['low']:.3g} - {speed['high']:.3g}) | {mfu:.1%} | "
                f"{times['median']:.2f}x ({times['low']:.2f} - {times['high']:.2f}) | {row['peak_bytes'] / 1e6:.0f} |"
            )
        lines += [f"\nNot measured: {name}: {reason}" for name, reason in table["failed"].items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b_gelu", choices=list(presets.PRESETS))
    parser.add_argument("--batch", type=count, default=8)
    parser.add_argument("--precision", nargs="+", default=["bf16_autocast", "fp32"], choices=["fp32", "bf16_autocast"])
    parser.add_argument("--eager", action="store_true", help="this project uncompiled as well")
    parser.add_argument("--compile-others", action="store_true", help="the others compiled as well")
    parser.add_argument("--other", nargs="*", default=[], metavar="MODULE:FUNCTION", help="more implementations")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="natural images, at any depth; default: random")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=count, metavar="N", help="of a CPU; default: all cores")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--steps", type=count, default=1, help="per round and arm")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        report = benchmark(args)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    report["command"] = shlex.join(["python", "-m", "benchmarks.reference", *(sys.argv[1:] if argv is None else argv)])
    write(report, to_markdown(report), args.out, "reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
