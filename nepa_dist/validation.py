"""Validation during training: every image once over all ranks, on a copy of the averaged weights, and the best weights so far.

Each rank holds a whole copy of the model in evaluation mode while it lasts. So ranks need not do the same number of forwards,
whatever engine trains: windows of large images and a split that does not divide by the ranks need no padding. Sums over ranks
are exact counts.

The best weights are written to ``RUN/best``: ``model.safetensors`` (whose metadata has step and score), ``config.json``,
``results.json`` and ``per_class.csv``, all of them in one step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from nepa_dist.config import Config
from nepa_dist.data.batch import Batch
from nepa_dist.data.classes import check_validation, class_names, known_names
from nepa_dist.data.device import to_device
from nepa_dist.data.loader import EvalLoader
from nepa_dist.data.open import open_split
from nepa_dist.data.order import spread
from nepa_dist.data.transforms import eval_transform
from nepa_dist.data.whole import WholeImages
from nepa_dist.engines.base import Engine
from nepa_dist.engines.mesh import World
from nepa_dist.guard import RunAborted, StopFlag
from nepa_dist.labels import write_labels
from nepa_dist.provenance import Kind, Provenance, Result
from nepa_dist.reporting import Reporter
from nepa_dist.run import Run
from nepa_dist.run_folder import keep_linked_folder, versions, write_linked_folder
from nepa_dist.tasks.base import Scores, Task
from nepa_dist.tasks.build import build_task
from nepa_dist.watchdog import Watchdog

BEST = "best"
"""Folder of the best weights, in the run's."""


class Validator:
    """Validates a run at its interval. Make it before threads are started: it forks the loader's workers.

    Args:
        run: what is validated; its state notes the results.
        stop: asked between batches, so that a signal need not wait for the end of a long validation.

    Raises:
        DataError: the data has no validation split.
        ConfigError: it has other classes than the training split, or nothing to score.
    """

    def __init__(self, run: Run, stop: StopFlag) -> None:
        self._run, self._stop = run, stop
        config, plan, world = run.config, run.plan, run.world
        steps_per_epoch = plan.num_samples / config.global_batch_size
        self._every = max(1, round(config.evaluate.every_epochs * steps_per_epoch))
        self._container = open_split(config.data, "val", image_size=config.model.image_size)
        check_validation(config, run.container, self._container)
        self._ids = spread(len(self._container), config.evaluate.max_samples)[world.rank :: world.world_size]
        self._batches: Iterator[Batch] | None = None
        self._loader: EvalLoader | None = None
        if config.task != "segment":
            self._loader = EvalLoader(
                self._container,
                config.data,
                image_size=config.model.image_size,
                batch_size=config.evaluate.batch_size,
                indices=self._ids,
                pin_memory=world.device.type == "cuda",
                labels=True,
                transform=eval_transform(config),
                passes=plan.steps // self._every + 2,
            )
            self._batches = iter(self._loader)

    @property
    def pending(self) -> bool:
        """Whether the step that the run stands at is to be validated and has not been."""
        step = self._run.state.step
        due = step > 0 and (step % self._every == 0 or step >= self._run.plan.steps)
        return due and self._run.state.evaluated_step < step

    def validate(self, reporter: Reporter, watchdog: Watchdog) -> bool:
        """Score the averaged weights (the weights themselves where none are kept) and keep them if they are the best.

        A collective.

        Args:
            reporter: told the scores.
            watchdog: told of each batch; what only waits for other ranks or for the disk is no hang.

        Returns:
            False if a signal came first: the scores are thrown away, and the step stays pending.

        Raises:
            RunAborted: nothing could be scored.
        """
        run, state, start = self._run, self._run.state, time.perf_counter()
        with watchdog.pause():
            task = replica(run.config, run.engine, run.world)

        def go_on() -> bool:
            watchdog.beat()
            return not self._stop.is_set

        sums, bad = measure(task, self._pass(), run.config, run.world.device, go_on)
        with watchdog.pause():
            parts = run.world.gather((self._stop.is_set, {name: tensor.cpu() for name, tensor in sums.items()}, bad))
            if any(stopped for stopped, _, _ in parts):
                return False
            for name, reason in sorted({pair for _, _, found in parts for pair in found}):
                reporter.event(f"left out of the validation: {name}: {reason}")
            try:
                scores = task.score(add_up([part for _, part, _ in parts]), class_names(run.config, self._container))
            except ValueError as error:  # alike on all ranks
                raise RunAborted(f"validation at step {state.step}: {error}") from None
            state.evaluated_step, score = state.step, scores.values[scores.main]
            better = state.best_score is None or score > state.best_score
            if better and run.world.gather(run.world.is_main and self._keep(task, scores, reporter))[0]:
                state.best_score, state.best_step = score, state.step
        seconds = time.perf_counter() - start
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.values.items())
        reporter.event(f"validation at step {state.step}: {shown}{' (best so far)' if state.best_step == state.step else ''}")
        values = scores.values | {"eval_seconds": seconds}
        if state.best_score is not None:
            values["best_score"] = state.best_score
        reporter.scored(state.step, values, seconds)
        return True

    def close(self) -> None:
        """End the workers."""
        if self._loader is not None:
            self._loader.close()

    def _pass(self) -> Iterator[Batch]:
        if self._batches is None or self._loader is None:
            yield from WholeImages(self._container, self._run.config, self._ids)
            return
        for _ in range(self._loader.batches_per_pass):
            yield next(self._batches)

    def _keep(self, task: Task, scores: Scores, reporter: Reporter) -> bool:
        """Write the weights; returns whether that worked."""
        run = self._run
        folder, step = run.config.run_dir / BEST, run.state.step
        kind: Kind = "raw" if run.config.optim.ema_decay is None else "ema"
        names = known_names(run.config, run.container)
        provenance = Provenance(
            kind,
            run.config.name,
            step,
            run.state.samples_seen,
            run.config.digest(),
            run.container.fingerprint,
            versions(),
            tuple(Result(f"{name}, validation split", value, step) for name, value in scores.values.items()),
        )
        facts = {"format": "pt", scores.main: repr(scores.values[scores.main])} | provenance.to_metadata()
        state = {name: tensor.contiguous() for name, tensor in task.state_dict().items()}
        try:
            if run.state.best_score is None and run.state.best_step:  # resumed with another measure
                keep_linked_folder(folder, f"{BEST}-of-step-{run.state.best_step:08d}")
            write_linked_folder(
                folder,
                {
                    "model.safetensors": safetensors.torch.save(state, facts),
                    "config.json": _json(run.config.model_dump(mode="json") | write_labels(names)),
                    "per_class.csv": scores.per_class.encode(),
                    "results.json": _json({"step": step, "weights": kind, **scores.values}),
                },
            )
        except OSError as error:
            reporter.event(f"the best weights so far cannot be written to {folder}: {error}; training goes on")
            return False
        return True


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def measure(
    task: Task, batches: Iterable[Batch], config: Config, device: torch.device, go_on: Callable[[], bool] = lambda: True
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Add up what a task measures over batches.

    Args:
        task: in evaluation mode, on the device.
        batches: of the validation split.
        config: normalisation and precision.
        device: where the task is.
        go_on: asked after each batch; False ends it.

    Returns:
        The sums by name, and name and reason of each sample that was left out.
    """
    sums: dict[str, Tensor] = {}
    bad = []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision != "fp32")
    with torch.inference_mode(), autocast:
        for batch in batches:
            bad += [(sample.name, sample.reason) for sample in batch.bad]
            if len(batch.ids):
                part = task.measure(to_device(batch, device, config.data.mean, config.data.std))
                sums = add_up([sums, part])
            if not go_on():
                break
    return sums, bad


def replica(config: Config, engine: Engine, world: World) -> Task:
    """A copy of the task in evaluation mode with the averaged weights, or the weights where none are kept. A collective."""
    with torch.device("meta"):
        task = build_task(config)
    task = task.to_empty(device=world.device)
    own = dict(task.named_parameters())
    with torch.no_grad():
        for name, state in engine.named_state():
            own[name].copy_(state["ema"] if "ema" in state else state["weight"])
    return task.eval()


def add_up(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum tensors by name; a part may lack all of them."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            total[name] = total[name] + tensor if name in total else tensor
    return total
