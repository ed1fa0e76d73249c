"""What the loop takes in during one step: micro-batches on the device, and how much each counts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nepa_dist.data.device import to_device
from nepa_dist.data.loader import Batch, add_digests
from nepa_dist.run import Run


class Intake:
    """The micro-batches of one step, ready for the model, and what is known of them afterwards.

    Args:
        run: whose task prepares them.
        batches: of this rank, in order.
        bad: unreadable images are added, name to reason.
    """

    def __init__(self, run: Run, batches: Iterator[Batch], bad: dict[str, str]) -> None:
        self._run, self._batches, self._bad = run, batches, bad
        self.wait_seconds, self.digest, self.num_bad = 0.0, 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        run, accum = self._run, self._run.plan.grad_accum_steps
        for micro in range(accum):
            start = time.perf_counter()
            batch = next(self._batches)
            self.wait_seconds += time.perf_counter() - start
            self.digest = add_digests(self.digest, batch.digest)
            found = {sample.name: sample.reason for sample in batch.bad if sample.name not in run.state.bad_samples}
            self.num_bad += len(found.keys() - self._bad.keys())
            self._bad.update(found)
            inputs = to_device(batch, run.world.device, run.config.data.mean, run.config.data.std)
            yield run.task.prepare(inputs, step=run.state.step, micro_batch=run.world.rank * accum + micro)


def weighted(run: Run, intake: Iterable[dict[str, Tensor]]) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Micro-batches with a factor for their mean loss, such that the mean over the global batch is a mean over what counts.

    Where micro-batches count differently, their weights must be known on all ranks before the first backward: so they are all
    made ready first. Where all count the same the factor is None, and each is made when its turn comes.
    """
    plan, world = run.plan, run.world
    if not run.task.weighs:
        yield from ((inputs, None) for inputs in intake)
        return
    ready = list(intake)
    weights = torch.stack([run.task.weight(inputs) for inputs in ready]).double()
    total = world.all_reduce(weights.sum()).clamp(min=1)
    shares = (weights * (world.world_size * plan.grad_accum_steps) / total).float()
    yield from zip(ready, shares.unbind(), strict=True)
