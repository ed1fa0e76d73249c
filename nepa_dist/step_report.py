"""The scalars of one step, on their way from the devices of all ranks to the host of each."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from nepa_dist.engines.base import StepResult
from nepa_dist.engines.mesh import World
from nepa_dist.metrics.profile import Marks

OF_RANKS = ("loss", "compute_seconds", "data_wait_seconds", "memory_bytes", "heartbeat")
"""What each rank tells of itself in a step that is logged, in one row of numbers."""


class StepReport:
    """The scalars of one step, summed over the ranks on the device and read by the host one step later.

    Counts, such as that of ranks that were asked to stop, ride in the same reduction as the loss, so every rank learns of
    them at the same step and no further collective is needed. So do the numbers of single ranks: each adds its own to a row
    where the others add nothing.

    Args:
        world: the ranks.
        step: finished updates, this one included.
        lr: learning rate of the step.
        result: what the engine did; equal on all ranks.
        means: 0-d tensors to average over the ranks, by metric name.
        gauges: 0-d tensors that are equal on all ranks already.
        spectra: matrices whose eigenvalues the main rank finds beside training; see ``metrics.collapse.spectral_metrics``.
        counts: numbers to sum over the ranks, by name.
        mine: of this rank, the numbers of OF_RANKS but the loss; None where the step is not logged.
        data_wait: seconds that the step stood still for data.
        observed: whether ``gauges`` were taken, so that the step must be logged.
        marks: of where the step's time went.
    """

    def __init__(
        self,
        world: World,
        *,
        step: int,
        lr: float,
        result: StepResult,
        means: Mapping[str, Tensor],
        gauges: Mapping[str, Tensor],
        spectra: Mapping[str, Tensor],
        counts: Mapping[str, float],
        mine: Mapping[str, float] | None,
        data_wait: float,
        observed: bool,
        marks: Marks,
    ) -> None:
        self.step, self.lr, self.data_wait, self.observed = step, lr, data_wait, observed
        self.clock, self._marks = time.perf_counter(), marks
        self.phases: dict[str, float] = {}
        self.of_ranks: dict[str, list[float]] = {}
        equal = {**gauges, **result.gauges, "grad_norm": result.grad_norm, "applied": result.applied}
        self._names = [*means, *counts, *equal]
        self._num_means, self._world_size = len(means), world.world_size
        own = torch.zeros(0 if mine is None else world.world_size, len(OF_RANKS), dtype=torch.float64)
        if mine is not None:
            own[world.rank, 1:] = torch.tensor([mine[name] for name in OF_RANKS[1:]], dtype=torch.float64)
        self._num_own = own.numel()
        flags = torch.tensor([float(count) for count in counts.values()], dtype=torch.float64)
        host = torch.cat([flags, own.flatten()]).to(world.device, non_blocking=True)
        if mine is not None:
            host[len(flags) + world.rank * len(OF_RANKS)] = means["loss"].detach()
        summed = world.all_reduce(torch.cat([_stack(means, world.device), host]))
        split = len(means) + len(flags)
        values = torch.cat([summed[:split], _stack(equal, world.device), summed[split:]])
        self._host = values.to("cpu", non_blocking=True)
        self.spectra = {name: x.to("cpu", non_blocking=True) for name, x in spectra.items()} if world.is_main else {}
        self._ready: torch.cuda.Event | None = None
        if world.device.type == "cuda":
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> dict[str, float]:
        """Wait for the values and return them by name; counts are sums over the ranks."""
        if self._ready is not None:
            self._ready.synchronize()
        self.phases = self._marks.read()
        values = self._host.tolist()
        if self._num_own:
            rows = values[-self._num_own :]
            self.of_ranks = {name: rows[i :: len(OF_RANKS)] for i, name in enumerate(OF_RANKS)}
            values = values[: -self._num_own]
        scaled = [v / self._world_size if i < self._num_means else v for i, v in enumerate(values)]
        return dict(zip(self._names, scaled, strict=True))


def _stack(values: Mapping[str, Tensor], device: torch.device) -> Tensor:
    if not values:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack([value.detach().to(device, torch.float64) for value in values.values()])
