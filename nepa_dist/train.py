"""The one loop: build, resume, train, save, stop. Read it top to bottom.

Every rank runs this file. What differs between tasks is in ``tasks``, between ways to spread a model in ``engines``, between
formats in ``data``; the loop names none of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config
from nepa_dist.data.containers import open_split
from nepa_dist.data.device import to_device
from nepa_dist.data.loader import Batch, TrainLoader, add_digests
from nepa_dist.engines.base import build_engine
from nepa_dist.engines.mesh import World, join_world, leave_world
from nepa_dist.guard import (
    EXIT_AGAIN,
    EXIT_DONE,
    EXIT_FAILED,
    RunAborted,
    RunLock,
    StopFlag,
    count_bad_samples,
    count_saves,
    count_skip,
)
from nepa_dist.keyed import keyed_seed
from nepa_dist.optim import learning_rate
from nepa_dist.plan import make_plan
from nepa_dist.reporting import Reporter, StepReport
from nepa_dist.resume import begin
from nepa_dist.run import Run
from nepa_dist.run_folder import append_start, describe_start
from nepa_dist.saving import Saver, Saves
from nepa_dist.state import TrainState
from nepa_dist.tasks.base import build_task
from nepa_dist.visualize import plot_curves
from nepa_dist.watchdog import Watchdog

DIGEST_MASK = 2**40 - 1
"""Bits of the data's digest that are logged: a sum of them over 8192 ranks is exact in fp64."""


def main(config: Config) -> int:
    """Train one run on this rank, from wherever its folder says it stands.

    Args:
        config: the run; ``config.run_dir`` exists or can be made.

    Returns:
        0 when the last step is done and saved, 75 when a signal stopped the run and it was saved, 1 when it had to give up.

    Raises:
        ConfigError: the configuration, the data and what is in the run folder do not fit together.
        DataError: the data cannot be opened.
    """
    with StopFlag() as stop:
        # Inside: a rank that ended by a signal while it waits for the others would leave them with an error.
        world = join_world(config.engine, config.cluster.world_size)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        with RunLock(config.run_dir) if world.is_main else nullcontext():
            code = _run(config, world, stop)
    # Not after an error on this rank alone: leaving is a collective for NCCL, and the others may be in another one.
    leave_world()
    return code


def _run(config: Config, world: World, stop: StopFlag) -> int:
    container = open_split(config.data, "train", image_size=config.model.image_size)
    plan = make_plan(config, len(container))
    task = build_task(config)
    num_parameters = sum(parameter.numel() for parameter in task.parameters())
    engine = build_engine(task, config, plan, world.device)
    options = config.checkpoint
    store = CheckpointStore(
        config.run_dir / "checkpoints",
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        shard_bytes=options.shard_bytes,
    )
    run = Run(config, plan, world, task, engine, store, TrainState(), container, num_parameters)
    notes = begin(run)
    loader = _open_loader(run)
    batches = iter(loader)  # forks the workers, before any thread is started
    reporter = Reporter(config, plan, world, run.state)
    watchdog = _watch(run)
    saver = Saver(run, reporter, watchdog.beat)
    try:
        if run.state.step >= plan.steps:
            for note in notes:
                reporter.event(note)
            reporter.event(f"this run is finished: {config.run_dir} holds all {plan.steps} steps; nothing to do")
            code = EXIT_DONE
        else:
            _announce(run, reporter, notes)
            code = train(run, batches, reporter, saver, stop, watchdog)
            watchdog.close()
            _draw(run, reporter)
    except RunAborted as error:  # on all ranks at the same step
        reporter.event(str(error))
        code = EXIT_FAILED
        saver.close()
        world.gather(None)  # a rank that has ended would make the launcher end this one, in the middle of a write
    finally:
        watchdog.close()
        loader.close()
        saver.close()
        reporter.close()
    engine.close()
    return code


def train(run: Run, batches: Iterator[Batch], reporter: Reporter, saver: Saver, stop: StopFlag, watchdog: Watchdog) -> int:
    """Run updates until the last one or until a signal; returns the exit code."""
    config, plan, state = run.config, run.plan, run.state
    pending: StepReport | None = None
    bad: dict[str, str] = {}
    while True:
        report = update(run, batches, bad, stop, saver.take())
        stopping = _settle(run, reporter, pending, bad)
        pending = report
        watchdog.beat(state.step)
        done = state.step >= plan.steps
        if done or stopping or state.step % config.checkpoint.every == 0:
            stopping |= _settle(run, reporter, pending, bad, last=done)
            pending = None
            saver.start()
            if done or stopping:
                return _finish(run, reporter, done, saver.wait(), stop)


def update(run: Run, batches: Iterator[Batch], bad: dict[str, str], stop: StopFlag, saves: Saves) -> StepReport:
    """One optimizer update over the global batch. Nothing in it waits for the device, but for the gauges of observed steps.

    Args:
        run: the run; its state advances by one step.
        batches: micro-batches of this rank, in order.
        bad: unreadable images are added, name to reason.
        stop: whether this rank was asked to stop rides in the report.
        saves: so does what became of its checkpoints.
    """
    config, plan, state, world = run.config, run.plan, run.state, run.world
    lr = learning_rate(state.step, plan, config.optim)
    for group in run.engine.param_groups:
        group["lr"] = lr
    observe = (state.step + 1) % config.metrics.collapse_every == 0
    run.task.train()
    run.task.begin_step(state.step, observe=observe)
    # Whatever draws random numbers on the device repeats them after a resume: nothing to save.
    torch.manual_seed(keyed_seed(config.seed, "step", state.step, world.rank))
    means: dict[str, torch.Tensor] = {}
    known, data_wait, digest = len(bad), 0.0, 0
    for micro in range(plan.grad_accum_steps):
        start = time.perf_counter()
        batch = next(batches)
        data_wait += time.perf_counter() - start
        digest = add_digests(digest, batch.digest)
        bad.update({sample.name: sample.reason for sample in batch.bad if sample.name not in run.state.bad_samples})
        inputs = to_device(batch, world.device, config.data.mean, config.data.std)
        loss, logs = run.engine.model(inputs)
        run.engine.backward(loss, last=micro == plan.grad_accum_steps - 1)
        for name, value in {"loss": loss, **logs}.items():
            share = value.detach() / plan.grad_accum_steps
            means[name] = means[name] + share if name in means else share
    result = run.engine.step()
    state.advance(config.global_batch_size)
    return StepReport(
        world,
        step=state.step,
        lr=lr,
        result=result,
        means=means,
        gauges=run.task.health(world.all_reduce) if observe else {},
        counts={
            "stop": stop.is_set,
            "bad": len(bad) - known,
            "saves_written": saves.written,
            "saves_failed": saves.failed,
            "data_digest": digest & DIGEST_MASK,
        },
        data_wait=data_wait,
        observed=observe,
    )


def _settle(run: Run, reporter: Reporter, report: StepReport | None, bad: dict[str, str], *, last: bool = False) -> bool:
    """Read a finished step's scalars, account for it, log it; returns whether any rank was asked to stop.

    After the ``last`` step, checkpoints that failed do not keep the run from trying once more.
    """
    if report is None:
        return False
    values = report.read()
    if values.pop("bad"):
        # All ranks see the same sum, so all of them take part. This is rare: each image counts once in a run.
        found = {name: reason for part in run.world.gather(dict(bad)) for name, reason in part.items()}
        for name, reason in count_bad_samples(run.state, found, run.config.data.max_bad_samples).items():
            reporter.event(f"unreadable image replaced: {name}: {reason}")
        bad.clear()
    stopping = values.pop("stop") > 0
    written, failed = values.pop("saves_written"), values.pop("saves_failed")
    values["data_digest"] = int(values["data_digest"]) & DIGEST_MASK
    applied = values["applied"] > 0
    if not applied:
        reporter.event(f"step {report.step} skipped: gradient norm {values['grad_norm']}, loss {values['loss']}")
    reporter.count(report)
    every, ends = run.config.metrics.every, report.step == run.plan.steps
    try:
        tolerated = math.inf if last else run.config.guard.max_consecutive_checkpoint_failures
        count_saves(run.state, int(written), int(failed), tolerated)
        count_skip(run.state, applied, run.config.guard.max_consecutive_skips)
    except RunAborted:
        ends = True
        raise
    finally:
        if report.step % every == 0 or ends or report.observed:
            reporter.log(report, values)
    return stopping


def _finish(run: Run, reporter: Reporter, done: bool, saved: bool, stop: StopFlag) -> int:
    if not saved:
        newest = max(run.store.steps(), default=0)
        reporter.event(f"ending without the checkpoint of step {run.state.step}; the newest one is of step {newest}")
        return EXIT_FAILED
    if done:
        reporter.event(f"finished {run.plan.steps} steps")
        return EXIT_DONE
    signal_name = stop.signal_name or "a signal to another rank"
    reporter.event(f"stopped by {signal_name}; step {run.state.step} is saved, the same command continues")
    return EXIT_AGAIN


def _watch(run: Run) -> Watchdog:
    guard = run.config.guard
    path = run.config.run_dir / "logs" / f"hang-rank-{run.world.rank}.txt"
    return Watchdog(path, min_seconds=guard.hang_seconds, factor=guard.hang_factor)


def _open_loader(run: Run) -> TrainLoader:
    return TrainLoader(
        run.container,
        run.config.data,
        image_size=run.config.model.image_size,
        seed=run.config.seed,
        global_batch_size=run.config.global_batch_size,
        micro_batch_size=run.plan.micro_batch_size,
        rank=run.world.rank,
        world_size=run.world.world_size,
        start_step=run.state.step,
        num_steps=run.plan.steps,
        local_world_size=run.world.local_world_size,
        pin_memory=run.world.device.type == "cuda",
        block_shards=run.config.data.block_shards,
    )


def _announce(run: Run, reporter: Reporter, notes: list[str]) -> None:
    for note in notes:
        reporter.event(note)
    if not run.world.is_main:
        return
    plan, endpoint = run.plan, None
    if run.container.num_ignored:
        reporter.event(f"{run.container.num_ignored} files in {run.config.data.source} are no images by their name: ignored")
    if reporter.prometheus_port is not None:
        endpoint = f"http://{run.config.metrics.prometheus_address}:{reporter.prometheus_port}/metrics"
        reporter.event(f"metrics at {endpoint}")
    reporter.event(
        f"{run.config.run_dir}: {plan.num_samples} images, {plan.steps} steps of {run.config.global_batch_size} = "
        f"{run.world.world_size} ranks x {plan.micro_batch_size} x {plan.grad_accum_steps}, {run.config.engine.precision}, "
        f"{run.world.device.type}"
    )
    facts = {
        "seed": run.config.seed,
        "world_size": run.world.world_size,
        "device": run.world.device.type,
        "precision": run.config.engine.precision,
        "from_step": run.state.step,
        "config_digest": run.config.digest(),
        "data_fingerprint": run.container.fingerprint,
        "metrics_endpoint": endpoint,
    }
    append_start(run.config.run_dir, describe_start(**facts))


def _draw(run: Run, reporter: Reporter) -> None:
    if not run.world.is_main:
        return
    try:
        for path in plot_curves(run.config.run_dir):
            reporter.event(f"drew {path}")
    except (OSError, ValueError) as error:
        reporter.event(f"no pictures: {error}")
