"""What follows from a configuration: steps, accumulation, peak learning rate, and whether the fields fit. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from nepa_dist.config import Config, ConfigError, kernels_obstacle


class Plan(NamedTuple):
    """What follows from a configuration and the size of the data."""

    num_samples: int
    steps: int
    warmup_steps: int
    micro_batch_size: int
    grad_accum_steps: int
    peak_lr: float
    num_tokens: int
    """Tokens that pass through the blocks per image."""


def make_plan(config: Config, num_samples: int) -> Plan:
    """Derive steps, accumulation and peak learning rate.

    Args:
        config: the run.
        num_samples: images in the training split.

    Raises:
        ConfigError: the global batch does not divide, and the message names the nearest values that do; or a micro-batch has
            nothing to mix.
    """
    if problems := batch_problems(config):
        raise ConfigError(problems)
    if num_samples <= 0:
        raise ConfigError([f"data.source {config.data.source!r} holds no images"])
    share = config.global_batch_size // config.cluster.world_size
    micro = config.micro_batch_size or max(d for d in range(1, min(share, 128) + 1) if share % d == 0)
    if micro == 1 and config.task == "finetune" and config.finetune.mixes:
        problem = "mixup and cutmix need two images in a micro-batch, and micro_batch_size is 1: "
        raise ConfigError([problem + "make it even, or set finetune.mixup=0 and finetune.cutmix=0"])
    steps = config.steps or max(1, round(config.epochs * num_samples / config.global_batch_size))
    optim = config.optim
    if problems := _warmup_problems(config, steps):
        raise ConfigError(problems)
    warmup = optim.warmup_steps if optim.warmup_steps is not None else round(optim.warmup_ratio * steps)
    return Plan(
        num_samples=num_samples,
        steps=steps,
        warmup_steps=warmup,
        micro_batch_size=micro,
        grad_accum_steps=share // micro,
        peak_lr=_peak_lr(config),
        num_tokens=1 + config.model.num_patches - config.drops_last_token,
    )


def _peak_lr(config: Config) -> float:
    return config.optim.base_lr * config.global_batch_size / 256


def _warmup_problems(config: Config, steps: int | None) -> list[str]:
    warmup = config.optim.warmup_steps
    if warmup is None or steps is None or warmup <= steps:
        return []
    return [f"optim.warmup_steps {warmup} is more than the run's {steps} steps"]


def batch_problems(config: Config) -> list[str]:
    """Sentences about a global batch that the ranks and the micro-batch do not divide."""
    total, world = config.global_batch_size, config.cluster.world_size
    unit = world * (config.micro_batch_size or 1)
    if total % unit == 0:
        return []
    low = total // unit * unit
    near = " or ".join(str(v) for v in (low, low + unit) if v)
    micro = config.micro_batch_size
    problem = f"global_batch_size {total} is not a multiple of "
    problem += f"micro_batch_size {micro} x world size {world} = {unit}" if micro else f"the world size {world}"
    problem += f"; nearest global_batch_size: {near}"
    if micro and total % world == 0:
        share = total // world
        near_micro = range(max(1, micro - 4096), min(share, micro + 4096) + 1)
        fits = sorted((d for d in near_micro if share % d == 0), key=lambda d: (abs(d - micro), d))[:2] or [1]
        problem += f"; or micro_batch_size: {' or '.join(map(str, sorted(fits)))}"
    return [problem]


def cross_field_problems(config: Config) -> list[str]:
    """Sentences about fields that do not fit each other, all of them."""
    problems = batch_problems(config)
    objective, optim = config.objective, config.optim
    patches, masked = config.model.num_patches, round(objective.mask_ratio * config.model.num_patches)
    if objective.mask_ratio and masked in (0, patches):
        which = "all" if masked else "none"
        problems.append(f"objective.mask_ratio {objective.mask_ratio} masks {which} of the {patches} patches")
    problems += _warmup_problems(config, config.steps)
    problems += _engine_problems(config)
    problems += _task_problems(config)
    if config.cluster.world_size % config.state_shards:
        problems.append(f"engine.shard_size {config.state_shards} does not divide the world size {config.cluster.world_size}")
    peak = _peak_lr(config)
    if optim.min_lr > peak:
        problems.append(f"optim.min_lr {optim.min_lr:g} is more than the peak learning rate {peak:g} (base_lr x batch / 256)")
    if config.model.in_channels != 3:
        problems.append(f"model.in_channels {config.model.in_channels}: the data loader makes RGB images, so training needs 3")
    return problems


def _task_problems(config: Config) -> list[str]:
    """Sentences about settings of the task that do not fit the model."""
    model, segment, problems = config.model, config.segment, []
    if config.task == "segment":
        if segment.taps is None and model.depth < 4:
            problems.append(f"segment.taps: a backbone of {model.depth} blocks has no quarters; name four blocks")
        elif max(segment.taps_of(model.depth)) >= model.depth:
            problems.append(f"segment.taps {list(segment.taps or ())}: the model has blocks 0 to {model.depth - 1}")
        if segment.stride_of(model.image_size) > model.image_size:
            problems.append(
                f"segment.stride {segment.stride} is more than the crop {model.image_size}: pixels would be left out"
            )
        if segment.num_classes is not None and segment.num_classes > 255:
            problems.append(f"segment.num_classes {segment.num_classes}: masks are bytes and 255 is ignored, so at most 255")
    optim = config.optim
    if optim.head_lr is not None and config.task != "finetune":
        problems.append(f"optim.head_lr is for fine-tuning; it has no effect on {config.task}")
    if optim.layer_warmup and (optim.layer_decay == 1 or optim.layer_decay_schedule != "fixed"):
        problems.append("optim.layer_warmup needs optim.layer_decay below 1 and optim.layer_decay_schedule: fixed")
    if config.task == "pretrain" and optim.layer_decay < 1:
        problems.append("optim.layer_decay is for fine-tuning and segmentation; in pretraining all layers learn alike")
    if config.metrics.knn_every is not None and config.task != "pretrain":
        problems.append(f"metrics.knn_every is for pretraining; {config.task} is measured by its own validation")
    return problems


def _engine_problems(config: Config) -> list[str]:
    """Sentences about engine settings that cannot work together."""
    engine = config.engine
    zero = engine.name.startswith("zero")
    problems = []
    if engine.compile and engine.name == "zero3":
        problems.append(
            "engine.compile with engine.name zero3: DeepSpeed gathers weights in hooks inside the block, which a compiled one "
            "does not call; use fsdp2, which shards as much, or compile: false"
        )
    if engine.activation_checkpointing == "selective" and engine.name == "zero3":
        problems.append(
            "engine.activation_checkpointing selective with engine.name zero3: DeepSpeed frees weights inside the block, and "
            "not at the same place when the block is computed again; use full, or fsdp2"
        )
    if engine.fp8 != "off" and engine.precision == "fp32":
        problems.append(f"engine.fp8 {engine.fp8} with engine.precision fp32: all else is in bf16 then; use bf16_autocast")
    if zero and engine.deterministic and engine.device != "cpu":
        problems.append("engine.deterministic with DeepSpeed: its bucketed reductions promise no order; use ddp or fsdp2")
    if engine.shard_size is not None and engine.name != "hsdp":
        problems.append(f"engine.shard_size has no effect with engine.name {engine.name}; it belongs to hsdp")
    # Of torch's kernels on a GPU; without its own choice, what one of them does not take is an error in the first step.
    kernel, model = engine.attention, config.model
    if kernel in ("flash", "cudnn", "fa3") and engine.precision == "fp32":
        problems.append(f"engine.attention {kernel} computes in bf16 only, and engine.precision is fp32; use sdpa or efficient")
    if kernel in ("efficient", "cudnn") and engine.precision != "fp32" and model.head_dim % 8:
        width = f"{model.embed_dim} / {model.num_heads}"
        problems.append(f"engine.attention {kernel} needs a head width that is a multiple of 8, got {width}; use sdpa")
    device = "cuda" if engine.device == "auto" else engine.device
    if engine.kernels == "triton" and (reason := kernels_obstacle(model, engine, device)):
        problems.append(f"engine.kernels triton: {reason}; use auto or torch")
    return problems
