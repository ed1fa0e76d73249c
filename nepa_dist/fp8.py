"""Linear layers of the blocks in fp8, by torchao: operands of their products are rounded to 8 bits, weights stay as they are.

A CPU rounds the operands all the same and then multiplies them as they are (emulation), slower than without fp8. So its effect
on the loss can be told anywhere, its speed on a GPU alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

FIRST_CAPABILITY = (8, 9)
"""Compute capability from which on an Nvidia GPU multiplies in fp8: Ada and Hopper."""
_MULTIPLE = 16
"""The kernels take widths that are multiples of this."""


def convert(blocks: Iterable[nn.Module], recipe: str, device: torch.device) -> None:
    """Have the linear layers of ``blocks`` multiply in fp8, forward and backward, in place; parameters and their names stay.

    Args:
        blocks: of a transformer.
        recipe: ``tensorwise``, one scale for each operand, or ``rowwise``, one for each row of it.
        device: where they will run.

    Raises:
        ValueError: torchao is missing, or the GPU has no fp8.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(f"engine.fp8 {recipe} needs torchao ({error}): pip install 'nepa-dist[fp8]'") from error
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FIRST_CAPABILITY:
        gpu = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        raise ValueError(f"engine.fp8 {recipe}: {gpu} has no fp8; use off")
    # The sum over tokens, whose number may be odd, is padded to what the kernels take.
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=device.type != "cuda", pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=_fits)


def _fits(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear) and not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)
