"""What a run reports: the scalars of its steps, what follows from clock and state, and the sinks they go to."""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from nepa_dist.config import Config
from nepa_dist.endpoint import describe_run, node_values, open_on_each_node
from nepa_dist.engines.mesh import World
from nepa_dist.memory import flops_per_image
from nepa_dist.metrics.collapse import spectral_metrics
from nepa_dist.metrics.meter import Meter
from nepa_dist.metrics.profile import peak_flops
from nepa_dist.metrics.registry import PHASES
from nepa_dist.metrics.sinks import ConsoleSink, JsonlSink, LogSink, Sink
from nepa_dist.metrics.storage import StorageWatch
from nepa_dist.metrics.trackers import open_trackers
from nepa_dist.metrics.windows import Median, MovingAverage, SpikeRatio
from nepa_dist.plan import Plan
from nepa_dist.run_folder import past_starts
from nepa_dist.state import TrainState
from nepa_dist.step_report import OF_RANKS, StepReport

MAX_WAITING_ROWS = 2
"""Rows that wait for an eigenvalue solver beside training; then the loop waits for it."""


class Reporter:
    """Turns step reports into metrics and hands them to the sinks of the main rank. Of the other ranks, the first one of each
    node serves what it sees. Made by all ranks together.

    Args:
        config: intervals and the endpoint.
        plan: total steps.
        world: the ranks.
        state: the run's state, read at each report; the time of the steps is added to it.
    """

    def __init__(self, config: Config, plan: Plan, world: World, state: TrainState) -> None:
        self._config, self._plan, self._world, self._state = config, plan, world, state
        self._started, self._start_step = time.time(), state.step
        first, lost = past_starts(config.run_dir)
        self._first_started, self.lost_steps = first or self._started, 0
        describe = partial(describe_run, config, state.restarts, _device_name(world.device))
        self._endpoint, notes = open_on_each_node(config, world, describe)
        self._meter = Meter([])
        self._rows: deque[tuple[int, dict[str, float], Future[dict[str, float]] | None]] = deque()
        self._storage: StorageWatch | None = None
        if world.is_main:
            self._open(config.run_dir, notes)
        self._lost_steps = lost + self.lost_steps
        self._solver = ThreadPoolExecutor(1, thread_name_prefix="eigenvalues")
        self._device = _DeviceFacts(config, world.device)
        self._saves: dict[str, float] = {}
        self._times = dict.fromkeys(PHASES, 0.0)
        self._nonfinite = {"loss": 0, "gradient": 0}
        self._spikes = {"loss": SpikeRatio(), "grad": SpikeRatio()}
        self._median, self._loss_ema = Median(), MovingAverage()
        self._own_seconds = [0.0] * world.world_size
        self._clipped = 0
        self._begin = self._last_clock = self._window_start = time.perf_counter()
        self._window_step, self._data_wait, self._data_wait_total = state.step, 0.0, 0.0

    def _open(self, run_dir: Path, notes: list[str]) -> None:
        step = self._state.step
        jsonl, console = JsonlSink(run_dir / "metrics.jsonl", step), ConsoleSink(self._plan.steps, step)
        self.lost_steps = jsonl.superseded_step - step
        sinks: list[Sink] = [jsonl, console, LogSink(run_dir / "log.txt", self._plan.steps)]
        if self._endpoint.exporter is not None:
            sinks.append(self._endpoint.exporter)
        sinks += open_trackers(self._config, step, jsonl.superseded_step)
        self._meter = Meter(sinks, failed=["prometheus"] if notes else [])
        for note in notes:
            self.event(note)
        mounts = {"run": run_dir} | ({"data": Path(self._config.data.source)} if self._config.data.source else {})
        self._storage = StorageWatch(mounts)

    @property
    def endpoint(self) -> str | None:
        """Address that the metrics are served at."""
        return self._endpoint.url

    def event(self, message: str) -> None:
        """Tell people, on the terminal and in log.txt, after the steps that were logged before."""
        self._write_rows(wait=True)
        self._meter.event(message)

    def mine(self, step: int) -> dict[str, float] | None:
        """What this rank tells of itself in a step that will be logged; None if it will not be."""
        if step % self._config.metrics.every and step != self._plan.steps and not self.observes(step):
            return None
        compute = sum(self._times[phase] for phase in ("host_to_device", "forward"))
        memory = _peak_memory(self._world.device)
        numbers = (compute, self._data_wait_total, memory, time.time())
        return dict(zip(OF_RANKS[1:], numbers, strict=True))

    def observes(self, step: int) -> bool:
        """Whether the gauges of a step are taken: at its interval, and of the first step of a run."""
        return step == 1 or step % self._config.metrics.collapse_every == 0 or self.audits(step)

    def audits(self, step: int) -> bool:
        """Whether the costly ones are taken too."""
        return step == 1 or step % self._config.metrics.audit_every == 0

    def stalled(self, seconds: float) -> None:
        """Note how long the loop stood still for a checkpoint, and keep that time out of the speed of the next interval."""
        self._saves["checkpoint_stall_seconds"] = seconds
        self._pass("checkpoint_stall", seconds)

    def scored(self, step: int, values: Mapping[str, float], stall_seconds: float = 0.0) -> None:
        """Log scores, and keep the time that the loop stood still for them out of the speed of the next interval."""
        self._write_rows(wait=True)
        self._meter.log(step, values)
        self._pass("evaluation", stall_seconds)

    def _pass(self, phase: str, seconds: float) -> None:
        self._times[phase] += seconds
        self._window_start += seconds
        self._last_clock += seconds

    def saved(self, step: int, seconds: float, num_bytes: int) -> None:
        """Note a checkpoint that is on disk, and how long it took to be written in the background."""
        if self._endpoint.exporter is not None:
            self._endpoint.exporter.observe("checkpoint_duration_seconds", seconds)
        self._saves |= {
            "checkpoint_seconds": seconds,
            "checkpoint_bytes": num_bytes,
            "checkpoint_step": step,
            "checkpoint_last_success_timestamp_seconds": time.time(),
            "checkpoints_total": self._saves.get("checkpoints_total", 0) + 1,
        }

    def count(self, report: StepReport, values: Mapping[str, float]) -> None:
        """Take note of a step, whether it is logged or not.

        Args:
            report: the step; has been read.
            values: what it read.
        """
        seconds = report.clock - self._last_clock
        self._last_clock = report.clock
        self._state.productive_seconds += seconds
        self._data_wait += report.data_wait
        self._data_wait_total += report.data_wait
        for phase, passed in report.phases.items():
            self._times[phase] += passed
        self._median.add(seconds)
        self._loss_ema.add(values["loss"])
        self._spikes["loss"].add(values["loss"])
        self._spikes["grad"].add(values["grad_norm"])
        self._nonfinite["loss"] += not math.isfinite(values["loss"])
        self._nonfinite["gradient"] += not math.isfinite(values["grad_norm"])
        clip = self._config.optim.clip_grad_norm
        self._clipped += clip is not None and values["grad_norm"] > clip
        if (exporter := self._endpoint.exporter) is not None:
            if self._world.is_main:
                exporter.beat(report.step, step_duration_seconds=seconds)
            if self._config.cluster.nodes > 1:
                exporter.show(node_values(self._world, report.step, report.of_ranks))

    def log(self, report: StepReport, values: Mapping[str, float]) -> None:
        """Log one step together with what follows from the clock and the state.

        Args:
            report: the step; already counted.
            values: its metrics by name.
        """
        if not self._world.is_main:
            return
        steps = report.step - self._window_step
        seconds = (report.clock - self._window_start) / steps
        row = {
            **values,
            **self._progress(report, seconds),
            **self._optimisation(report, steps),
            **self._speed(report, seconds, steps),
            **self._of_ranks(report),
            **self._saves,
            **(self._storage.values if self._storage else {}),
        }
        solved = self._solver.submit(_solve, report.spectra) if report.spectra else None
        self._rows.append((report.step, row, solved))
        self._write_rows(wait=len(self._rows) > MAX_WAITING_ROWS)
        self._window_start, self._window_step, self._data_wait, self._clipped = report.clock, report.step, 0.0, 0

    def _write_rows(self, *, wait: bool) -> None:
        """Hand rows on, in order, up to the first one whose eigenvalues are not there."""
        while self._rows and (wait or self._rows[0][2] is None or self._rows[0][2].done()):
            step, row, solved = self._rows.popleft()
            if solved is not None:
                row |= solved.result()
                if step == 1:
                    name = "embedding_effective_rank."
                    self._state.initial_ranks = {
                        key.removeprefix(name): value
                        for key, value in row.items()
                        if key.startswith(name) and math.isfinite(value)
                    }
            row |= {f"embedding_effective_rank_initial.{name}": x for name, x in self._state.initial_ranks.items()}
            self._meter.log(step, row)

    def _progress(self, report: StepReport, seconds: float) -> dict[str, float]:
        state, plan, step, batch = self._state, self._plan, report.step, self._config.global_batch_size
        done, now = step - self._start_step, time.time()
        return {
            "step": step,
            "planned_steps": plan.steps,
            "epoch": step * batch / plan.num_samples,
            "samples_seen": step * batch,
            "steps_total": done,
            "samples_total": done * batch,
            "tokens_total": done * batch * plan.num_tokens,
            "eta_seconds": (plan.steps - step) * seconds,
            "start_timestamp_seconds": self._started,
            "first_start_timestamp_seconds": self._first_started,
            "last_step_timestamp_seconds": now,
            "restarts_total": state.restarts,
            "preemptions_total": state.preemptions,
            "lost_steps_total": self._lost_steps,
            "productive_seconds_total": state.productive_seconds,
            "goodput_ratio": min(1.0, state.productive_seconds / max(now - self._first_started, 1e-9)),
        }

    def _optimisation(self, report: StepReport, steps: int) -> dict[str, float]:
        state, optim = self._state, self._config.optim
        row = {
            "lr": report.lr,
            "weight_decay": optim.weight_decay,
            "loss_ema": self._loss_ema.value,
            "grad_clipped_ratio": self._clipped / steps,
            "skipped_steps_total": state.skipped_steps,
            "bad_samples_total": len(state.bad_samples),
            "checkpoint_failures_total": state.checkpoint_failures,
            "checkpoint_interval_seconds": self._config.checkpoint.every * self._median.value,
        }
        row |= {f"spike_ratio.{name}": spikes.ratio for name, spikes in self._spikes.items()}
        row |= {f"nonfinite_steps_total.{name}": count for name, count in self._nonfinite.items()}
        return row if optim.ema_decay is None else row | {"ema_decay": optim.ema_decay}

    def _speed(self, report: StepReport, seconds: float, steps: int) -> dict[str, float]:
        images = self._config.global_batch_size / seconds
        done = (report.step - self._start_step) * self._config.global_batch_size
        passed = sum(self._times.values()) - self._times["other"]
        self._times["other"] = max(self._times["other"], report.clock - self._begin - passed)
        row = {
            "images_per_second": images,
            "tokens_per_second": images * self._plan.num_tokens,
            "step_seconds": seconds,
            "step_expected_seconds": self._median.value,
            "data_wait_seconds": self._data_wait / steps,
            "model_flops_total": done * flops_per_image(self._config, self._plan.num_tokens),
            **{f"time_seconds_total.{phase}": passed for phase, passed in self._times.items()},
            **self._device.memory(),
        }
        if (peak := self._device.peak) is not None:
            row["peak_flops_per_second"] = peak
            row["mfu"] = images * flops_per_image(self._config, self._plan.num_tokens) / (peak * self._world.world_size)
        return row

    def _of_ranks(self, report: StepReport) -> dict[str, float]:
        found = report.of_ranks
        if not found:  # the end of a run that gives up
            return {"memory_bytes": _peak_memory(self._world.device)}
        row = {"loss_max": max(found["loss"], key=lambda loss: math.inf if math.isnan(loss) else loss)}
        row["memory_bytes"] = max(found["memory_bytes"])
        if self._world.world_size == 1:
            return row
        own = [a + b for a, b in zip(found["compute_seconds"], found["data_wait_seconds"], strict=True)]
        passed = [now - before for now, before in zip(own, self._own_seconds, strict=True)]
        self._own_seconds, middle = own, sorted(passed)[len(passed) // 2]
        for rank, seconds in enumerate(passed):
            row[f"straggler_score.{rank}"] = min(1.0, middle / seconds) if seconds > 0 else 1.0
            row[f"rank_compute_seconds_total.{rank}"] = found["compute_seconds"][rank]
            row[f"rank_data_wait_seconds_total.{rank}"] = found["data_wait_seconds"][rank]
            row[f"rank_memory_bytes.{rank}"] = found["memory_bytes"][rank]
            row[f"rank_heartbeat_timestamp_seconds.{rank}"] = found["heartbeat"][rank]
        return row

    def close(self) -> None:
        """Flush and close the sinks."""
        self._write_rows(wait=True)
        self._solver.shutdown()
        if self._storage is not None:
            self._storage.close()
        self._endpoint.close()
        if not self._world.is_main and self._endpoint.exporter is not None:
            self._endpoint.exporter.close()  # else it is one of the sinks
        self._meter.close()


class _DeviceFacts:
    """What a device can do and holds, and what an image costs."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._cuda = config, device
        given = config.metrics.peak_tflops
        self.peak = given * 1e12 if given else peak_flops(_device_name(device), fp32=config.engine.precision == "fp32")

    def memory(self) -> dict[str, float]:
        """Memory of the host and of the accelerator's allocator."""
        row = {"host_memory_bytes": _resident_set()}
        if self._cuda.type == "cuda":
            stats = torch.cuda.memory_stats(self._cuda)
            row["memory_reserved_bytes"] = float(stats["reserved_bytes.all.current"])
            row["allocation_retries_total"] = float(stats["num_alloc_retries"])
            row["memory_capacity_bytes"] = float(torch.cuda.get_device_properties(self._cuda).total_memory)
        return row


def _solve(spectra: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {key: float(value) for key, value in spectral_metrics(spectra).items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _peak_memory(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _resident_set()


def _resident_set() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
