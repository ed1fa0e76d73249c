"""What an optimizer step did to the parameters: gradient norms by group, size of the update. Taken inside the step, on request.

An engine's optimizer steps tensors of its own kind: whole parameters, shards, or flat tensors that hold parts of many. A census
is told which part of which parameter lies where, and adds up squares; only the sums cross between ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nepa_dist.metrics.registry import GROUPS


class Part(NamedTuple):
    """Where a part of a parameter lies in a tensor that the optimizer steps."""

    name: str
    tensor: Tensor
    offset: int
    numel: int


def whole(named: Iterable[tuple[str, Tensor]]) -> list[Part]:
    """Parts of an optimizer that steps each of these tensors as a whole."""
    return [Part(name, tensor, 0, tensor.numel()) for name, tensor in named if tensor.requires_grad]


def group_of(name: str) -> str:
    """The group that a parameter is counted in, one of GROUPS, by its name."""
    if name.startswith("head."):
        return "head"
    if name.startswith(("backbone.cls_token", "backbone.patch_embed", "backbone.pos_embed")):
        return "embed"
    if ".attn.qkv" in name or ".attn.proj" in name:
        return "attn"
    return "mlp" if ".mlp." in name else "norm"


class Census:
    """Sums of squares over one optimizer step.

    Args:
        parts: of every parameter that learns and of which this rank steps something.
        device: where the sums are.
        process_group: ranks that together step each element once; None where each rank steps all of them.
    """

    def __init__(self, parts: Iterable[Part], device: torch.device, process_group: dist.ProcessGroup | None) -> None:
        self._parts: dict[Tensor, list[tuple[int, int, int]]] = {}
        for name, tensor, offset, numel in parts:
            if numel:
                self._parts.setdefault(tensor, []).append((offset, numel, GROUPS.index(group_of(name))))
        self._process_group = process_group
        self._sums = torch.zeros(len(GROUPS) + 2, dtype=torch.float64, device=device)

    def add(self, parameter: Tensor, state: Mapping[str, Any], options: Mapping[str, Any], found_inf: Tensor | None) -> None:
        """Count a tensor that AdamW has just stepped.

        Args:
            parameter: the tensor; its gradient is still that of the step.
            state: its moments and step count, after the step.
            options: of its group: lr, weight_decay, betas, eps.
            found_inf: 1 if the step changed nothing.
        """
        assert parameter.grad is not None
        gradient = parameter.grad.reshape(-1)
        for offset, numel, index in self._parts.get(parameter, ()):
            self._sums[index] += gradient.narrow(0, offset, numel).norm().double().square()
        (beta1, beta2), lr, decay, steps = options["betas"], options["lr"], options["weight_decay"], state["step"]
        root = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(options["eps"])
        adam = (state["exp_avg"] / (1 - beta1**steps)).div_(root)
        # The step was w <- (1 - lr decay) w - lr adam; from the w after it follows the change.
        change = adam.add_(parameter.detach(), alpha=decay).mul_(lr / (1 - lr * decay))
        moved = 1.0 if found_inf is None else 1 - found_inf
        self._sums[-2] += change.norm().double().square() * moved
        self._sums[-1] += parameter.detach().norm().double().square()

    def take(self, norm: Tensor, clip: float | None) -> dict[str, Tensor]:
        """The gauges of the step. A collective of the process group.

        Args:
            norm: of the whole gradient before clipping, 0-d.
            clip: largest norm; the gradients that were counted have been scaled to it.

        Returns:
            0-d tensors: ``group_grad_norm.*`` before clipping, ``param_norm`` and ``update_ratio`` after the step.
        """
        if self._process_group is not None:
            dist.all_reduce(self._sums, group=self._process_group)
        norms = self._sums.sqrt()
        self._sums = torch.zeros_like(self._sums)
        scale = 1.0 if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)
        gauges = {f"group_grad_norm.{group}": norms[index] / scale for index, group in enumerate(GROUPS)}
        return gauges | {"param_norm": norms[-1], "update_ratio": norms[-2] / norms[-1]}
