"""What a run reports: device scalars fetched without stopping the device, timings, and the sinks they go to."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nepa_dist.config import Config
from nepa_dist.engines.base import StepResult
from nepa_dist.engines.mesh import World
from nepa_dist.metrics.exporter import PrometheusExporter
from nepa_dist.metrics.meter import Meter
from nepa_dist.metrics.sinks import ConsoleSink, JsonlSink, LogSink, Sink
from nepa_dist.plan import Plan
from nepa_dist.state import TrainState


class StepReport:
    """The scalars of one step, summed over the ranks on the device and read by the host one step later.

    Counts, such as that of ranks that were asked to stop, ride in the same reduction as the loss, so every rank learns of
    them at the same step and no further collective is needed.

    Args:
        world: the ranks.
        step: finished updates, this one included.
        lr: learning rate of the step.
        result: what the engine did; equal on all ranks.
        means: 0-d tensors to average over the ranks, by metric name.
        gauges: 0-d tensors that are equal on all ranks already.
        counts: numbers to sum over the ranks, by name.
        data_wait: seconds that the step stood still for data.
        observed: whether ``gauges`` were taken, so that the step must be logged.
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
        counts: Mapping[str, float],
        data_wait: float,
        observed: bool,
    ) -> None:
        self.step, self.lr, self.data_wait, self.observed = step, lr, data_wait, observed
        self.clock = time.perf_counter()
        self._names = [*means, *counts, *gauges, "grad_norm", "applied"]
        self._num_means, self._world_size = len(means), world.world_size
        flags = torch.tensor([float(count) for count in counts.values()], dtype=torch.float64)
        flags = flags.to(world.device, non_blocking=True)
        summed = world.all_reduce(torch.cat([_stack(means, world.device), flags]))
        equal = {**gauges, "grad_norm": result.grad_norm, "applied": result.applied}
        values = torch.cat([summed, _stack(equal, world.device)])
        self._host = values.to("cpu", non_blocking=True)
        self._ready: torch.cuda.Event | None = None
        if world.device.type == "cuda":
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> dict[str, float]:
        """Wait for the values and return them by name; counts are sums over the ranks."""
        if self._ready is not None:
            self._ready.synchronize()
        values = self._host.tolist()
        scaled = [v / self._world_size if i < self._num_means else v for i, v in enumerate(values)]
        return dict(zip(self._names, scaled, strict=True))


def _stack(values: Mapping[str, Tensor], device: torch.device) -> Tensor:
    if not values:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack([value.detach().to(device, torch.float64) for value in values.values()])


class Reporter:
    """Turns step reports into metrics and hands them to the sinks of the main rank; other ranks report nothing.

    Args:
        config: intervals and the endpoint.
        plan: total steps.
        world: the ranks.
        state: the run's state, read at each report.
    """

    def __init__(self, config: Config, plan: Plan, world: World, state: TrainState) -> None:
        self._config, self._plan, self._world, self._state = config, plan, world, state
        self.prometheus_port: int | None = None
        self._meter = Meter(self._open_sinks(config.run_dir) if world.is_main else [])
        self._checkpoint_seconds: float | None = None
        self._stall_seconds: float | None = None
        self._window_start, self._window_step, self._data_wait = time.perf_counter(), state.step, 0.0
        self._started = time.time()

    def _open_sinks(self, run_dir: Path) -> list[Sink]:
        step, metrics = self._state.step, self._config.metrics
        sinks: list[Sink] = [
            JsonlSink(run_dir / "metrics.jsonl", step),
            ConsoleSink(self._plan.steps, step),
            LogSink(run_dir / "log.txt", self._plan.steps),
        ]
        if metrics.prometheus:
            info = {"run": self._config.name, "task": self._config.task, "model": str(self._config.model.preset)}
            info |= {"engine": self._config.engine.name, "world_size": str(self._world.world_size)}
            try:
                exporter = PrometheusExporter(metrics.prometheus_address, metrics.prometheus_port, info)
            except (OSError, UnicodeError) as error:
                sinks[1].event(f"no metrics endpoint: {error}; training goes on without it")
            else:
                self.prometheus_port = exporter.port
                sinks.append(exporter)
        return sinks

    def event(self, message: str) -> None:
        """Tell people, on the terminal and in log.txt."""
        self._meter.event(message)

    def stalled(self, seconds: float) -> None:
        """Note how long the loop stood still for a checkpoint, and keep that time out of the speed of the next interval."""
        self._stall_seconds = seconds
        self._window_start += seconds

    def scored(self, step: int, values: Mapping[str, float], stall_seconds: float = 0.0) -> None:
        """Log scores, and keep the time that the loop stood still for them out of the speed of the next interval."""
        self._meter.log(step, values)
        self._window_start += stall_seconds

    def saved(self, seconds: float) -> None:
        """Note how long the newest checkpoint took to be written, in the background."""
        self._checkpoint_seconds = seconds

    def count(self, report: StepReport) -> None:
        """Take note of a step that is not logged itself."""
        self._data_wait += report.data_wait

    def log(self, report: StepReport, values: Mapping[str, float]) -> None:
        """Log one step together with what follows from the clock and the state.

        Args:
            report: the step; already counted.
            values: its metrics by name.
        """
        step, state, plan = report.step, self._state, self._plan
        steps = step - self._window_step
        seconds = (report.clock - self._window_start) / steps
        row = {
            **values,
            "lr": report.lr,
            "step": step,
            "epoch": step * self._config.global_batch_size / plan.num_samples,
            "samples_seen": step * self._config.global_batch_size,
            "images_per_second": self._config.global_batch_size / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": self._data_wait / steps,
            "eta_seconds": (plan.steps - step) * seconds,
            "memory_bytes": _peak_memory(self._world.device),
            "skipped_steps_total": state.skipped_steps,
            "bad_samples_total": len(state.bad_samples),
            "checkpoint_failures_total": state.checkpoint_failures,
            "restarts_total": state.restarts,
            "start_timestamp_seconds": self._started,
            "last_step_timestamp_seconds": time.time(),
        }
        if self._checkpoint_seconds is not None:
            row["checkpoint_seconds"] = self._checkpoint_seconds
        if self._stall_seconds is not None:
            row["checkpoint_stall_seconds"] = self._stall_seconds
        self._meter.log(step, row)
        self._window_start, self._window_step, self._data_wait = report.clock, step, 0.0

    def close(self) -> None:
        """Flush and close the sinks."""
        self._meter.close()


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
