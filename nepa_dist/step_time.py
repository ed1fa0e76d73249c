r"""How long a step takes on a cluster, by formula: for ``--dry-run``. Imports no torch.

A model. Its shares of what a GPU can do are those of one H200, where it is within 5 % of ViT-L and ViT-B (docs/performance.md);
nothing with several GPUs has confirmed it. A step is computation, the communication that it does not hide, and the optimizer.
Every constant below says where it is from. Latency, waiting for data and stragglers are left out: a real step is slower.

Computation of one micro-batch, the larger of what the GPU needs and what the host needs to start its kernels:

- matrix products: operations of the linear layers / MATMUL_SHARE of the peak;
- attention: operations by the full count / ATTENTION_SHARE of the peak;
- all else is bound by memory, bytes per token and block by TRAFFIC; and with bf16 the casts of weights and gradients, 12 bytes
  per parameter.

Communication over a ring of n ranks, V bytes: (n - 1) / n V for a gather or a reduce-scatter, twice that for an all-reduce.
With P parameters, w bytes each when gathered and g when reduced, per update, where ``micro`` is for each micro-batch:

=========  =====================================  ===============================  ======================
engine     gathers                                reductions                       hidden behind
=========  =====================================  ===============================  ======================
ddp        -                                      all-reduce P g                   the last backward
fsdp2      P w before and after forward, micro    reduce-scatter P g               forward, backward
hsdp       the same, in the node                  the same, all-reduce P g / S     forward, backward
zero1      P w after the update                   reduce-scatter P g               nothing
zero2      P w after the update                   reduce-scatter P g, micro        nothing
zero3      as fsdp2                               reduce-scatter P g, micro        forward, backward
=========  =====================================  ===============================  ======================

DeepSpeed overlaps by default only in stage 3. Of what is hidden behind L blocks at least one L-th stays visible: the first
gather and the last reduction have nothing to hide behind. Source of volumes: ZeRO (arXiv 1910.02054, section 7), HSDP from its
two rings.

Legend: D width, H hidden width of the MLP, T tokens, S ranks of a shard group.
"""

from __future__ import annotations

from typing import NamedTuple

from nepa_dist import cost
from nepa_dist.config import Config, gpu_kernels
from nepa_dist.memory import head_flops, num_parameters
from nepa_dist.plan import Plan


class Gpu(NamedTuple):
    """What one GPU can do."""

    name: str
    peak_bf16: float
    """Dense operations per second (data sheet)."""
    peak_fp32: float
    """The same in fp32 without tensor cores (data sheet)."""
    memory_bandwidth: float
    """Bytes per second (data sheet)."""


class Fabric(NamedTuple):
    """Links between the GPUs."""

    name: str
    in_node: float
    """Bytes per second of a ring in a node."""
    between_nodes: float
    """Bytes per second that leave a node, over all its network cards together."""


GPUS = {
    "h100": Gpu("H100", 989e12, 67e12, 3.35e12),
    "h200": Gpu("H200", 989e12, 67e12, 4.8e12),
    "a100": Gpu("A100", 312e12, 19.5e12, 2.0e12),
}
LINK_SHARE = 0.875
"""Of a network card's speed that a large collective gets: 350 GB/s of 8 x 400 Gb/s (published nccl-tests of H100 nodes)."""
_NVLINK = 0.8 * 450e9  # a direction of NVLink 4 (data sheet), at the usual share of a ring
FABRICS = (
    Fabric("8 x 400 Gb/s per node", _NVLINK, LINK_SHARE * 8 * 400e9 / 8),
    Fabric("1 x 100 Gb/s per node", _NVLINK, LINK_SHARE * 100e9 / 8),
)
MATMUL_SHARE = 0.69
"""Of the bf16 peak, in a whole step of these models, where an H200 lowers its clock for want of power: 0.68 in ViT-L, 0.77 in
ViT-B, 0.65 to 0.74 of large products alone."""
ATTENTION_SHARE = 0.195
"""Of the peak, by attention over 256 tokens of head width 64, forward and backward: cuDNN's on an H200, 0.19 and 0.20."""
MEMORY_SHARE = 0.78
"""Of the data sheet's bandwidth, by kernels between products on an H200: 0.74 to 0.89 each; a plain copy reaches 0.89."""


class Traffic(NamedTuple):
    """Bytes per token and block of a way to run what lies between the products: ``of_width`` D + ``of_hidden`` H."""

    of_width: int
    gated: int
    """``of_hidden`` of a gated MLP."""
    plain: int
    """``of_hidden`` of a plain one."""


TRAFFIC = {
    ("kernels", True): Traffic(92, 16, 10),
    ("kernels", False): Traffic(122, 16, 10),
    ("torch", True): Traffic(134, 24, 12),
    ("torch", False): Traffic(390, 49, 30),
}
"""By who makes the kernels, and whether blocks are compiled. Counted: each tensor once for each kernel that reads or writes it;
the last row is a guess from published steps of ViTs with RoPE that are not compiled."""
KERNELS_PER_BLOCK = {False: 120, True: 65}
"""Forward and backward, by whether it is compiled: 40 of a forward, thrice that with backward; compiled, counted in a trace."""
LAUNCH_SECONDS = 7.5e-6
"""Host time to start one kernel: 5 to 10 microseconds, assumed; a trace on an H200 has 65, with the profiler's own work."""


class StepTime(NamedTuple):
    """Seconds of one update."""

    matmul: float
    attention: float
    elementwise: float
    launches: float
    """What the host takes longer to start kernels than the GPU to run them."""
    exposed: float
    """Communication that is not hidden."""
    optimizer: float
    communication: float
    """All of it, hidden or not; not part of the total."""

    @property
    def compute(self) -> float:
        """Forward and backward."""
        return self.matmul + self.attention + self.elementwise + self.launches

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.exposed + self.optimizer


def gpu_of(config: Config) -> Gpu:
    """The GPU that the cluster's ``gpu_type`` names, an H100 if it names none that is known."""
    kind = (config.cluster.gpu_type or "").lower()
    return next((gpu for name, gpu in GPUS.items() if name in kind), GPUS["h100"])


def step_time(config: Config, plan: Plan, gpu: Gpu, fabric: Fabric) -> StepTime:
    """Estimate an update of a run.

    Args:
        config: model, engine, precision, ranks.
        plan: micro-batches.
        gpu: of every rank.
        fabric: links between them.
    """
    matmul, attention, elementwise = _compute(config, plan, gpu)
    device = matmul + attention + elementwise
    kernels = KERNELS_PER_BLOCK[config.engine.compile] * config.model.depth * plan.grad_accum_steps
    launches = max(0.0, kernels * LAUNCH_SECONDS - device)
    compute = device + launches
    exposed, communication = _communication(config, plan, fabric, forward=compute / 3, backward=compute * 2 / 3)
    return StepTime(matmul, attention, elementwise, launches, exposed, _optimizer(config, gpu), communication)


def _compute(config: Config, plan: Plan, gpu: Gpu) -> tuple[float, float, float]:
    """Seconds of matrix products, attention and all else in forward and backward of one update."""
    model, engine, T = config.model, config.engine, plan.num_tokens
    D, H = model.embed_dim, model.mlp_hidden_dim_
    images = plan.micro_batch_size * plan.grad_accum_steps
    fp32 = engine.precision == "fp32"
    peak = gpu.peak_fp32 if fp32 else gpu.peak_bf16
    attention_ops = 3 * model.depth * T * 4 * T * D
    linear_ops = cost.train_flops(model, num_tokens=T, causal=False) - attention_ops + 3 * head_flops(config)
    per_token = TRAFFIC["kernels" if gpu_kernels(model, engine) else "torch", engine.compile]
    hidden = per_token.gated if model.gated_mlp else per_token.plain
    traffic = (per_token.of_width * D + hidden * H) * T * model.depth * (2 if fp32 else 1)
    again = {"none": (0.0, 0.0), "selective": (0.0, 1 / 3), "full": (1 / 3, 1 / 3)}[engine.activation_checkpointing]
    casts = 0 if fp32 else 12 * num_parameters(config) * plan.grad_accum_steps
    return (
        images * linear_ops * (1 + again[0]) / (MATMUL_SHARE * peak),
        images * attention_ops * (1 + again[0]) / (ATTENTION_SHARE * peak),
        (images * traffic * (1 + again[1]) + casts) / (MEMORY_SHARE * gpu.memory_bandwidth),
    )


def _optimizer(config: Config, gpu: Gpu) -> float:
    """Norm reads 4 bytes of each parameter, clipping moves 8, AdamW 28, the average 12."""
    shards = config.cluster.world_size if config.engine.name.startswith("zero") else config.state_shards
    moved = 32 + (8 if config.optim.clip_grad_norm else 0) + (12 if config.optim.ema_decay else 0)
    return moved * num_parameters(config) / shards / (MEMORY_SHARE * gpu.memory_bandwidth)


class Volume(NamedTuple):
    """Bytes that each rank sends per update."""

    gathered: float
    """Weights that are gathered before they are used, for forward and for backward alike."""
    gathered_after: float
    """Weights that are gathered after the update."""
    reduced: float
    """Gradients, within the shard group or, without one, over all ranks."""
    reduced_between: float
    """Gradients, between replicas of the shards."""


def volumes(config: Config, plan: Plan) -> Volume:
    """What each rank sends in one update, by the table of the module."""
    engine, ranks, P = config.engine, config.cluster.world_size, num_parameters(config)
    accum = plan.grad_accum_steps
    shards = config.state_shards if engine.name == "hsdp" else ranks
    weight = P * (2 if engine.precision == "bf16_params" else 4) * (shards - 1) / shards
    gradient = P * (2 if engine.reduce_dtype == "bf16" else 4) * (shards - 1) / shards
    replicas = ranks // shards
    if engine.name == "ddp":
        return Volume(0, 0, 2 * gradient, 0)
    if engine.name in ("zero1", "zero2"):
        return Volume(0, weight, gradient * (accum if engine.name == "zero2" else 1), 0)
    gathers = (2 if engine.reshard_after_forward else 1) * accum * weight
    between = 2 * (replicas - 1) / replicas * P / shards * (2 if engine.reduce_dtype == "bf16" else 4)
    return Volume(gathers, 0, gradient * (accum if engine.name == "zero3" else 1), between)


def _communication(config: Config, plan: Plan, fabric: Fabric, *, forward: float, backward: float) -> tuple[float, float]:
    """Seconds of communication that are not hidden, and all of them."""
    engine, cluster, accum = config.engine, config.cluster, plan.grad_accum_steps
    volume = volumes(config, plan)
    per_node = min(cluster.gpus_per_node, cluster.world_size)
    group = config.state_shards if engine.name == "hsdp" else cluster.world_size
    bandwidth = fabric.in_node if group <= per_node else min(fabric.in_node, fabric.between_nodes)
    gather, after, reduce = (part / bandwidth for part in volume[:3])
    # All ranks of a node send their own shard at once over what leaves it.
    between = volume.reduced_between * per_node / fabric.between_nodes
    everything = gather + after + reduce + between
    if engine.name in ("zero1", "zero2"):
        return everything, everything
    in_forward = gather / (2 if engine.reshard_after_forward else 1)
    last = backward / accum  # gradients travel behind the last backward alone, but for zero3
    span = backward if engine.name == "zero3" else last
    visible = 1 / config.model.depth
    exposed = _visible(in_forward, forward, visible)
    in_backward = gather - in_forward
    if span == backward:
        return exposed + _visible(in_backward + reduce + between, backward, visible), everything
    # Gathers of the earlier micro-batches have their own backward, those of the last share it with the reductions.
    early = in_backward * (accum - 1) / accum
    exposed += _visible(early, backward - last, visible)
    return exposed + _visible(in_backward - early + reduce + between, last, visible), everything


def _visible(seconds: float, behind: float, least: float) -> float:
    """What is left of communication behind a computation that all but a share ``least`` of both can overlap."""
    return max(seconds * least, seconds - behind * (1 - least))
