"""What a run will cost, from formulas alone: parameters, operations, steps, memory. Imports no torch; for ``--dry-run``."""

from __future__ import annotations

from nepa_dist import cost
from nepa_dist.config import Config
from nepa_dist.memory import NUM_CLASSES_IF_UNKNOWN, activation_bytes, flops_per_image, head_flops, head_parameters, state_bytes
from nepa_dist.plan import Plan, make_plan
from nepa_dist.step_time import FABRICS, Fabric, Gpu, gpu_of, step_time


def build_report(config: Config, num_samples: int | None, note: str = "") -> str:
    """Describe a run before it starts.

    Args:
        config: the run; its batch must divide.
        num_samples: images in the training split; None if unknown.
        note: where that number comes from, one sentence or more lines.

    Returns:
        A summary in aligned rows, then the whole configuration as YAML; ends with a newline.

    Raises:
        ConfigError: the global batch does not divide, or num_samples is not positive.
    """
    plan = make_plan(config, 1 if num_samples is None else num_samples)
    steps = None if num_samples is None and config.steps is None else plan.steps
    sections = [
        ("Model", _model_rows(config, plan)),
        ("Schedule", _schedule_rows(config, plan, num_samples, steps, note)),
        (f"Memory per rank, engine {config.engine.name} (estimate)", _memory_rows(config, plan)),
        (f"Time on {gpu_of(config).name}s (a model, docs/performance.md)", _time_rows(config, plan, steps)),
    ]
    width = 2 + max(len(label) for _, rows in sections for label, _ in rows)
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {label:<{width}}{value}" for label, value in rows), ""]
    return "\n".join([*lines, "Configuration", config.to_yaml()])


def _model_rows(config: Config, plan: Plan) -> list[tuple[str, str]]:
    model = config.model
    mlp = f"{'gated ' if model.gated_mlp else ''}{model.activation} MLP of width {model.mlp_hidden_dim_}"
    patches = f"{plan.num_tokens - 1} of {model.num_patches} patches of {model.patch_size} pixels"
    rows = [
        ("model", f"{model.preset or 'custom'}: width {model.embed_dim}, {model.depth} blocks, {model.num_heads} heads, {mlp}"),
        ("parameters", f"{cost.num_parameters(model):,} (backbone){_head(config)}"),
        ("tokens per image", f"{plan.num_tokens} (CLS + {patches})"),
    ]
    if flops := head_flops(config):
        rows.append(("per image, UPerNet", f"{_si(flops, 'FLOP')} forward, {_si(3 * flops, 'FLOP')} with backward"))
    for causal in (True, False):
        forward = sum(cost.forward_flops(model, num_tokens=plan.num_tokens, causal=causal))
        both = cost.train_flops(model, num_tokens=plan.num_tokens, causal=causal)
        kind = "causal" if causal else "full"
        used = "" if causal == config.causal else " (not what this run does; for comparison)"
        text = f"{_si(forward, 'FLOP')} forward, {_si(both, 'FLOP')} with backward{used}"
        rows.append((f"per image, {kind} attention", text))
    return rows


def _head(config: Config) -> str:
    """The head's parameters, if it has any."""
    if not (number := head_parameters(config)):
        return ""
    known = config.task == "pretrain" or config.num_classes is not None
    return f" + {number:,} (head{'' if known else f', if there are {NUM_CLASSES_IF_UNKNOWN} classes'})"


def _schedule_rows(config: Config, plan: Plan, num_samples: int | None, steps: int | None, note: str) -> list[tuple[str, str]]:
    factors = f"world size {config.cluster.world_size} x micro-batch {plan.micro_batch_size}"
    batch = f"{config.global_batch_size} = {factors} x accumulation {plan.grad_accum_steps}"
    known = "unknown" if num_samples is None else f"{num_samples:,}"
    rows = [("training images", known), *(("", line) for line in note.splitlines()), ("global batch", batch)]
    if steps is None:
        length = f"unknown: {config.epochs:g} epochs of an unknown number of images"
        rows += [("steps", length), ("warm-up", _unknown_warmup(config))]
    else:
        images = steps * config.global_batch_size
        epochs = "" if num_samples is None else f" = {images / num_samples:.4g} epochs"
        given = f" (steps is given, epochs {config.epochs:g} has no effect)" if config.steps else ""
        rows += [("steps", f"{steps:,}, {images:,} images{epochs}{given}")]
        rows += [("warm-up", f"{plan.warmup_steps:,} steps")]
    optim = config.optim
    rows.append(("peak learning rate", f"{plan.peak_lr:.4g} = {optim.base_lr:g} x {config.global_batch_size} / 256"))
    return rows


def _unknown_warmup(config: Config) -> str:
    optim = config.optim
    return f"{optim.warmup_ratio:.3g} of the steps" if optim.warmup_steps is None else f"{optim.warmup_steps:,} steps"


def _memory_rows(config: Config, plan: Plan) -> list[tuple[str, str]]:
    states = state_bytes(config, plan.grad_accum_steps)
    activations = plan.micro_batch_size * activation_bytes(config, plan.num_tokens)
    engine = config.engine
    how = f"{plan.micro_batch_size} images, {engine.precision}, {'' if engine.compile else 'not '}compiled"
    if engine.activation_checkpointing != "none":
        how += f", {engine.activation_checkpointing} checkpointing"
    return [
        *((name, _si(size, "B")) for name, size in states.items()),
        ("activations", f"{_si(activations, 'B')} ({how})"),
        ("sum", f"{_si(sum(states.values()) + activations, 'B')}, without buffers of libraries and of the allocator"),
    ]


def _time_rows(config: Config, plan: Plan, steps: int | None) -> list[tuple[str, str]]:
    gpu, world = gpu_of(config), config.cluster.world_size
    flops = flops_per_image(config, plan.num_tokens)
    rows = [("training", "unknown, as the number of steps is")]
    if steps is not None:
        rows = [("training", _si(flops * steps * config.global_batch_size, "FLOP"))]
    # Within a node all fabrics are the same.
    for fabric in FABRICS if config.cluster.nodes > 1 else FABRICS[:1]:
        rows += _fabric_rows(config, plan, steps, gpu, fabric)
    given, kind = config.cluster.gpu_type, " (cluster.gpu_type names another)"
    if given:
        kind = "" if gpu.name.lower() in given.lower() else f" (there are no figures for cluster.gpu_type {given})"
    rows.append(("assumes", f"{gpu.name}{kind}, rates and link speeds as in nepa_dist/step_time.py; {world} ranks, no waits"))
    return rows


def _fabric_rows(config: Config, plan: Plan, steps: int | None, gpu: Gpu, fabric: Fabric) -> list[tuple[str, str]]:
    """Step, speed and duration with one kind of links."""
    world, time = config.cluster.world_size, step_time(config, plan, gpu, fabric)
    parts = {"matrix products": time.matmul, "attention": time.attention, "the rest": time.elementwise}
    if time.launches:
        parts["waiting for the host"] = time.launches
    parts["optimizer"] = time.optimizer
    where = f", {fabric.name}" if config.cluster.nodes > 1 else ""
    text = " + ".join(f"{name} {1e3 * value:.3g}" for name, value in parts.items())
    if world > 1:
        text += f" + communication {1e3 * time.exposed:.3g} (of {1e3 * time.communication:.3g}, the rest is hidden)"
    rate = config.global_batch_size / time.total
    peak = gpu.peak_fp32 if config.engine.precision == "fp32" else gpu.peak_bf16
    share = rate / world * flops_per_image(config, plan.num_tokens) / peak
    rows = [
        (f"step{where}", f"{1e3 * time.total:.4g} ms: {text}"),
        ("images per second", f"{rate:,.0f}, {rate / world:,.0f} per GPU, {share:.0%} of {peak / 1e12:.0f} TFLOP/s"),
    ]
    if steps is not None:
        hours = steps * time.total / 3600
        total = f"{hours * world:,.0f}" if hours * world >= 100 else f"{hours * world:.3g}"
        rows.append(("GPU-hours", f"{total}, {hours:.3g} hours or {hours / 24:.2g} days at world size {world}"))
    return rows


def _si(value: float, unit: str) -> str:
    """A number with a decimal prefix, at four digits."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    power = 0
    while value >= 999.95 and power < len(prefixes) - 1:
        value /= 1000
        power += 1
    return f"{value:.4g} {prefixes[power]}{unit}"
