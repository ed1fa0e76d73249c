"""Parameter groups, AdamW that also keeps the moving average of the weights, and the learning rate as a pure function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nepa_dist.config import OptimConfig
from nepa_dist.plan import Plan


def learning_rate(step: int, plan: Plan, optim: OptimConfig, layer: int = 0) -> float:
    """Linear warm-up from 0, then half a cosine or a straight line down to ``min_lr``, less for lower layers.

    With a decay d, layer k below the head has d^k times the rate. The decay stays, or rises linearly to 1 over the run (paper,
    appendix E.4: 0.35 to 1 for B, 0.60 to 1 for L). With ``layer_warmup`` a layer of factor f warms up in 1 - f of the steps,
    at least one (released code).

    Args:
        step: number of finished updates, 0 for the first one. As in the released recipe the very first update of a
            warm-up has learning rate 0.
        plan: steps, warm-up and peak.
        optim: schedule, ``min_lr``, decay.
        layer: how many times the decay applies; -1 is what has the rate of the head, where one is given.
    """
    decay = optim.layer_decay
    if optim.layer_decay_schedule == "linear":
        decay += (1 - decay) * step / plan.steps
    factor = decay ** max(layer, 0)
    peak = optim.head_lr if layer < 0 and optim.head_lr is not None else plan.peak_lr
    warmup = max(1, round(plan.warmup_steps * (1 - factor))) if optim.layer_warmup else plan.warmup_steps
    if step < warmup:
        return factor * peak * step / warmup
    progress = min((step - warmup) / max(1, plan.steps - warmup), 1.0)
    shape = 1 - progress if optim.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * progress))
    return factor * (optim.min_lr + (peak - optim.min_lr) * shape)


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, lr_layer: Callable[[str], int]
) -> list[dict[str, Any]]:
    """Parameters that learn, by layer of the learning rate and by whether they decay; no group is empty.

    Tensors with two or more dimensions decay; biases, norms and LayerScale do not (paper, appendix).

    Args:
        named: parameters by name; frozen ones are left out.
        weight_decay: of those that decay.
        lr_layer: see :meth:`nepa_dist.tasks.base.Task.lr_layer`.

    Returns:
        Groups as for ``torch.optim``, ascending by ``layer``, of each layer those that decay first.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault((lr_layer(name), parameter.ndim < 2), []).append(parameter)
    return [
        {"params": groups[layer, plain], "layer": layer, "weight_decay": 0.0 if plain else weight_decay}
        for layer, plain in sorted(groups)
    ]


class AdamWEMA(torch.optim.AdamW):
    """Fused AdamW whose state also holds the exponential moving average of each parameter.

    The average is optimizer state like the moments: whatever shards, saves or skips them does the same to it. It is a copy
    of the weight after the first update (released recipe; not with ``keep_average``, for averages that were loaded) and then
    ``ema += (1 - decay) * (weight - ema)``.

    When ``found_inf`` (0-d fp32 on the device, 0 or 1) is 1, a step changes nothing: weights, moments, average and step count
    stay as they are to the bit. Nothing is read by the host.

    Args:
        groups: as for ``torch.optim.AdamW``.
        optim: betas, eps and ``ema_decay``; without a decay no average is kept.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        super().__init__(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)
        self.ema_decay = optim.ema_decay
        self.found_inf: Tensor | None = None
        self.observe: Callable[[Tensor, Mapping[str, Any], Mapping[str, Any], Tensor | None], None] | None = None
        """Called with each tensor that a step moved, its state, its group and ``found_inf``, while its gradient is there."""
        self.keep_average = False
        self.begin(self._parameters())

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """Drop all state and start it anew for these tensors, which an engine may step in place of the parameters.

        Args:
            parameters: fp32 tensors that hold the initial weights, in any shape.
        """
        self.state.clear()
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if self.ema_decay is not None:
                state["ema"] = parameter.detach().clone()

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient, then their averages."""
        loss: float | None = super().step(closure)
        moved = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if self.observe is not None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.observe(parameter, self.state[parameter], group, self.found_inf)
        if self.ema_decay is None or not moved:
            return loss
        states = [self.state[parameter] for parameter in moved]
        # An engine may call this for a part of the parameters at a time; those of one call have made equally many steps.
        steps = torch.stack([state["step"] for state in states]).amax()
        weight = torch.where((steps <= 1) & (not self.keep_average), 1.0, 1 - self.ema_decay)
        _lerp_([state["ema"] for state in states], moved, weight, self.found_inf)
        return loss


def _lerp_(averages: list[Tensor], parameters: list[Tensor], weight: Tensor, found_inf: Tensor | None) -> None:
    """``average += weight * (parameter - average)`` for all of them in one kernel, unless ``found_inf`` is 1.

    The weight (0-d) stays on the device. torch's own foreach lerp takes a weight from there for one tensor at a time, a kernel
    each. Its fused SGD does not: with the average as weight that decays, and the parameter as gradient to ascend, it is this.
    """
    torch._fused_sgd_(
        averages,
        parameters,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=weight,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=found_inf,
    )
