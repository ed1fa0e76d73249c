r"""Memory of one rank by formula: what training keeps from step to step, and what backward needs. Imports no torch.

State, with P parameters of 4 bytes, S = ``Config.state_shards`` and W the world size, in bytes:

=========  ==============  =======================  ==============  ================
engine     weights         fp32 weights of DeepSpeed  gradients       moments, average
=========  ==============  =======================  ==============  ================
ddp        4P              -                        4P              8P, 4P
fsdp2      4P / S          -                        4P / S *        8P / S, 4P / S
hsdp       4P / S          -                        4P / S *        8P / S, 4P / S
zero1      4P (bf16: 2P)   4P / W                   8P (bf16: 4P)   8P / W, 4P / W
zero2      4P (bf16: 2P)   4P / W                   4P / W          8P / W, 4P / W
zero3      as zero2, / W   4P / W                   4P / W + bucket 8P / W, 4P / W
=========  ==============  =======================  ==============  ================

``bf16`` means precision ``bf16_params``; with ddp its copy of 2P lives during forward and backward, with fsdp2 that of a block.
With ``bf16_autocast`` backward keeps a copy of every weight as well, 2P on each rank whatever is sharded; a block that is
computed again makes its copies again.
\* With accumulation fsdp2 and hsdp keep gradients whole, 4P, until the last micro-batch reduces them. Without
``reshard_after_forward`` gathered weights add 4P (bf16: 2P) to fsdp2, hsdp and zero3; gradients of fsdp2 and hsdp take the room
that they leave, where there is no accumulation.
zero3 keeps a bucket of ``BUCKET_NUMEL`` numbers. ``tests/test_memory.py`` compares these with the tensors that are really held.

Activations, in bytes per token and block, with g = 2 for a gated MLP and 1 for a plain one, an attention that stores no T x T
matrix and ``bf16_autocast``, whose residual stream is in fp32:

======================================  ==================
kernels of this project                 28 D + (2 + 2 g) H
torch's operations, compiled            26 D + (2 + 2 g) H
torch's operations, not compiled        36 D + 4 g H
selective checkpointing                 16 D + 2 g H
full checkpointing                      4 D, and one block
======================================  ==================

A count of what autograd keeps. ViT-L with 256 images on an H200 (docs/performance.md): 71.1 GB by the first row where a step
took 73.0 GB in all, 67.8 GB by the second where it took 70.1.

Legend: D width, H hidden width of the MLP, T tokens.
"""

from __future__ import annotations

from nepa_dist import cost
from nepa_dist.config import Config, gpu_kernels
from nepa_dist.heads import upernet_cost

BUCKET_NUMEL = 50_000_000
"""DeepSpeed reduces gradients in buckets of this many numbers."""


NUM_CLASSES_IF_UNKNOWN = 150
"""Classes of ADE20K, for an estimate where the data will say how many there are."""


def head_parameters(config: Config) -> int:
    """Parameters of the task's head."""
    D, C = config.model.embed_dim, config.num_classes or NUM_CLASSES_IF_UNKNOWN
    if config.task == "segment":
        options = config.segment
        return upernet_cost.num_parameters(D, C, channels=options.channels, aux_channels=options.aux_channels)
    if config.task == "finetune":
        return (D + 1) * C + (2 * D if config.finetune.pool == "mean" else 0)
    return D if config.objective.mask_ratio > 0 else 0


def head_flops(config: Config) -> int:
    """Operations of the head's convolutions in one forward pass of one training image; those of a linear layer do not count."""
    if config.task != "segment":
        return 0
    side, options = config.model.image_size // config.model.patch_size, config.segment
    classes = config.num_classes or NUM_CLASSES_IF_UNKNOWN
    return upernet_cost.forward_flops(
        config.model.embed_dim,
        classes,
        (side, side),
        channels=options.channels,
        aux_channels=options.aux_channels,
        training=True,
    )


def num_parameters(config: Config) -> int:
    """Parameters of backbone and head."""
    return cost.num_parameters(config.model) + head_parameters(config)


def flops_per_image(config: Config, num_tokens: int) -> int:
    """Operations of forward and backward of one training image with ``num_tokens`` tokens, without recomputation."""
    return cost.train_flops(config.model, num_tokens=num_tokens, causal=config.causal) + 3 * head_flops(config)


def state_bytes(config: Config, grad_accum_steps: int) -> dict[str, int]:
    """Bytes that one rank holds for weights, gradients, moments and average, by what they are.

    Args:
        config: the run.
        grad_accum_steps: micro-batches per update.
    """
    engine, P = config.engine, num_parameters(config)
    low = engine.precision == "bf16_params"
    zero = engine.name.startswith("zero")
    optimizer_shards = config.cluster.world_size if zero else config.state_shards
    weights = (2 if zero and low else 4) * P // config.state_shards
    gradients = 4 * P // (config.state_shards if grad_accum_steps == 1 else 1)
    if engine.name == "zero1":
        gradients = (4 if low else 8) * P
    elif zero:
        gradients = 4 * P // optimizer_shards
    rows = {"weights": weights}
    if zero:
        rows["fp32 weights of the optimizer"] = 4 * P // optimizer_shards
    elif low and engine.name == "ddp":
        rows["bf16 copy of the weights"] = 2 * P
    if engine.precision == "bf16_autocast" and engine.activation_checkpointing == "none":
        rows["bf16 copies by autocast"] = 2 * P
    rows |= {"gradients": gradients, "Adam moments": 8 * P // optimizer_shards}
    if config.optim.ema_decay is not None:
        rows["EMA"] = 4 * P // optimizer_shards
    if engine.name in ("fsdp2", "hsdp", "zero3") and not engine.reshard_after_forward and config.state_shards > 1:
        gathered = (2 if low else 4) * P
        rows["gathered weights"] = gathered if zero or grad_accum_steps > 1 else max(0, gathered - gradients)
    if engine.name == "zero3":
        rows["bucket of gradients"] = 4 * min(P, BUCKET_NUMEL)
    return rows


def activation_bytes(config: Config, num_tokens: int) -> int:
    """Estimated bytes of activations that one image keeps for the backward pass (formula in the module docstring)."""
    model, engine = config.model, config.engine
    D, H = model.embed_dim, model.mlp_hidden_dim_
    gate = 2 if model.gated_mlp else 1
    low = 4 if engine.precision == "fp32" else 2
    stream = 2 if engine.precision == "bf16_params" else 4
    if gpu_kernels(model, engine):
        whole = 10 * D * low + 2 * D * stream + (1 + gate) * H * low
    elif engine.compile:
        whole = 9 * D * low + 2 * D * stream + (1 + gate) * H * low
    else:
        copies = 8 * D if engine.precision == "bf16_autocast" else 0  # of queries and keys, whose norms are in fp32
        whole = 10 * D * low + 2 * D * stream + copies + 2 * gate * H * low
    selective = 6 * D * low + D * stream + gate * H * low
    per_block = {"none": whole, "selective": min(whole, selective), "full": D * stream}[engine.activation_checkpointing]
    once = whole if engine.activation_checkpointing == "full" else 0
    backbone = (per_block * model.depth + once) * num_tokens
    return backbone + _head_activation_bytes(config)


def _head_activation_bytes(config: Config) -> int:
    if config.task != "segment":
        return 0
    side, options = config.model.image_size // config.model.patch_size, config.segment
    return upernet_cost.activation_bytes(
        config.model.embed_dim,
        config.num_classes or NUM_CLASSES_IF_UNKNOWN,
        (side, side),
        config.model.patch_size,
        channels=options.channels,
        aux_channels=options.aux_channels,
        low_bytes=4 if config.engine.precision == "fp32" else 2,
    )
