"""The one loop: build, resume, train, save, stop. Read it top to bottom.

Every rank runs this file. What differs between tasks is in ``tasks``, between ways to spread a model in ``engines``, between
formats in ``data``; the loop names none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config, ConfigError
from nepa_dist.curves import plot_curves
from nepa_dist.data.classes import resolve_classes
from nepa_dist.data.loader import Batch, TrainLoader
from nepa_dist.data.open import open_split
from nepa_dist.data.transforms import train_transform
from nepa_dist.engines.build import build_engine
from nepa_dist.engines.mesh import World, join_world, leave_world
from nepa_dist.engines.prepare import keep_compiled
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
from nepa_dist.intake import Intake, weighted
from nepa_dist.keyed import keyed_seed
from nepa_dist.metrics.trackers import tracker_problems
from nepa_dist.online_knn import OnlineKnn, online_knn_problems
from nepa_dist.optim import learning_rate
from nepa_dist.plan import make_plan
from nepa_dist.reporting import Reporter
from nepa_dist.resume import begin, begins_with_transfer
from nepa_dist.run import Run
from nepa_dist.run_folder import append_start, describe_start
from nepa_dist.saving import Saver, Saves
from nepa_dist.state import TrainState
from nepa_dist.step_report import StepReport
from nepa_dist.tasks.base import Health
from nepa_dist.tasks.build import build_task
from nepa_dist.tasks.inspection import inspect
from nepa_dist.transfer import transfer
from nepa_dist.validation import Validator
from nepa_dist.watchdog import Watchdog

COMPILED = ".compiled"
"""Folder in the run root with what torch.compile made; its runs share it, and it can be deleted at any time."""
KNN_END_SECONDS = 60.0
"""How long the end of a run waits for a k-NN probe that is under way."""
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
    config = resolve_classes(config, container)
    plan = make_plan(config, len(container))
    problems = online_knn_problems(config, container) if config.metrics.knn_every else []
    if problems := [*problems, *tracker_problems(config.metrics.sinks)]:
        raise ConfigError(problems)
    options = config.checkpoint
    store = CheckpointStore(
        config.run_dir / "checkpoints",
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        shard_bytes=options.shard_bytes,
    )
    task = build_task(config)
    notes = []
    if begins_with_transfer(config) and not store.steps():  # before an engine cuts the model
        assert config.init.path is not None
        notes += str(transfer(task, config.init.path, ema=config.init.load == "ema")).splitlines()
    num_parameters = sum(parameter.numel() for parameter in task.parameters())
    keep_compiled(config.run_dir.parent / COMPILED)
    engine = build_engine(task, config, plan, world.device)
    run = Run(config, plan, world, task, engine, store, TrainState(), container, num_parameters)
    notes += begin(run)
    loader = _open_loader(run)
    batches = iter(loader)  # forks the workers, before any thread is started
    validator = None if config.task == "pretrain" else Validator(run, stop)
    knn = OnlineKnn(config, world.device) if config.metrics.knn_every and world.is_main else None
    reporter = Reporter(config, plan, world, run.state)
    watchdog = _watch(run)
    saver = Saver(run, reporter, watchdog.beat)
    try:
        if run.state.step >= plan.steps and not (validator and validator.pending):
            for note in notes:
                reporter.event(note)
            reporter.event(f"this run is finished: {config.run_dir} holds all {plan.steps} steps; nothing to do")
            code = EXIT_DONE
        else:
            _announce(run, reporter, notes)
            code = train(run, batches, reporter, saver, stop, watchdog, validator, knn)
            watchdog.close()
            _tell_knn(knn, run, reporter, timeout=KNN_END_SECONDS if code == EXIT_DONE else 0.0)
            _draw(run, reporter)
    except RunAborted as error:  # on all ranks at the same step
        reporter.event(str(error))
        code = EXIT_FAILED
        saver.close()
        world.gather(None)  # a rank that has ended would make the launcher end this one, in the middle of a write
    finally:
        watchdog.close()
        loader.close()
        if validator is not None:
            validator.close()
        if knn is not None:
            knn.close()
        saver.close()
        reporter.close()
    engine.close()
    return code


def train(
    run: Run,
    batches: Iterator[Batch],
    reporter: Reporter,
    saver: Saver,
    stop: StopFlag,
    watchdog: Watchdog,
    validator: Validator | None,
    knn: OnlineKnn | None,
) -> int:
    """Run updates until the last one or until a signal; returns the exit code."""
    config, plan, state = run.config, run.plan, run.state
    pending: StepReport | None = None
    bad: dict[str, str] = {}
    first, stopping = state.step, False
    while True:
        done = state.step >= plan.steps
        validating = validator is not None and validator.pending
        saving = done or stopping or (state.step % config.checkpoint.every == 0 and state.step > first)
        if saving or validating:
            stopping |= _settle(run, reporter, pending, bad, last=done)
            pending = None
        if config.metrics.knn_every and state.step % config.metrics.knn_every == 0 and state.step > first:
            _start_knn(knn, run, reporter)
        _tell_knn(knn, run, reporter)
        if validator is not None and validating and not stopping:
            try:
                stopping = not validator.validate(reporter, watchdog)
            except RunAborted:
                saver.start()  # what was trained is not lost with what could not be measured
                raise
        if saving or stopping:
            state.preemptions += stopping
            saver.start()
            if done or stopping:
                finished = done and not (validator is not None and validator.pending)
                return _finish(run, reporter, finished, saver.wait(), stop)
        report = update(run, batches, bad, stop, saver.take(), reporter)
        stopping = _settle(run, reporter, pending, bad)
        pending = report
        watchdog.beat(state.step)


def update(
    run: Run, batches: Iterator[Batch], bad: dict[str, str], stop: StopFlag, saves: Saves, reporter: Reporter
) -> StepReport:
    """One optimizer update over the global batch. Nothing in it waits for the device, but for the gauges of observed steps.

    Args:
        run: the run; its state advances by one step.
        batches: micro-batches of this rank, in order.
        bad: unreadable images are added, name to reason.
        stop: whether this rank was asked to stop rides in the report.
        saves: so does what became of its checkpoints.
        reporter: says which steps are observed.
    """
    run.watch.start()
    config, plan, state, world = run.config, run.plan, run.state, run.world
    for group in run.engine.param_groups:
        group["lr"] = learning_rate(state.step, plan, config.optim, group["layer"])
    observe = reporter.observes(state.step + 1)
    run.task.train()
    run.task.begin_step(state.step, observe=observe)
    # Whatever draws random numbers on the device repeats them after a resume: nothing to save.
    torch.manual_seed(keyed_seed(config.seed, "step", state.step, world.rank))
    means: dict[str, torch.Tensor] = {}
    intake = Intake(run, batches, bad)
    for micro, (inputs, share) in enumerate(weighted(run, intake)):
        loss, logs = run.engine.model(inputs)
        run.watch.mark("forward")
        last = micro == plan.grad_accum_steps - 1
        run.engine.backward(loss if share is None else loss * share, last=last)
        run.watch.mark_backward(reduces=last and world.world_size > 1)
        for name, value in {"loss": loss, **logs}.items():
            part = value.detach() * (1.0 if share is None else share) / plan.grad_accum_steps
            means[name] = means[name] + part if name in means else part
    lr = learning_rate(state.step, plan, config.optim)
    result = run.engine.step(observe=observe)
    run.watch.mark("optimizer")
    state.advance(config.global_batch_size)
    health, seen = Health({}, {}), {}
    if observe:
        audit = reporter.audits(state.step)
        seed = keyed_seed(config.seed, "audit", state.step) if audit else None
        health = run.task.health(world.all_reduce, audit_seed=seed)
        seen = inspect(run.task, run.engine.model, inputs, world.all_reduce_max, audit=audit)
    return StepReport(
        world,
        step=state.step,
        lr=lr,
        result=result,
        means=means,
        gauges=health.gauges | seen,
        spectra=health.spectra,
        counts={
            "stop": stop.is_set,
            "bad": intake.num_bad,
            "saves_written": saves.written,
            "saves_failed": saves.failed,
            "data_digest": intake.digest & DIGEST_MASK,
        },
        mine=reporter.mine(state.step),
        data_wait=intake.wait_seconds,
        observed=observe,
        marks=run.watch.stop(),
    )


def _start_knn(knn: OnlineKnn | None, run: Run, reporter: Reporter) -> None:
    """Hand the averaged weights to the k-NN probe of the main rank. A collective."""
    weights = ((name, state.get("ema", state["weight"])) for name, state in run.engine.named_state())
    if knn is not None:
        if not knn.start(run.state.step, weights) and knn.skipped == 1:  # told once; the metric counts them all
            every = run.config.metrics.knn_every
            reporter.event(f"no k-NN of step {run.state.step}: one takes longer than metrics.knn_every={every} steps")
    else:
        for _ in weights:  # takes part in the collectives
            pass


def _tell_knn(knn: OnlineKnn | None, run: Run, reporter: Reporter, timeout: float = 0.0) -> None:
    """Report a measurement that has ended."""
    if knn is None or (result := knn.poll(timeout)) is None:
        return
    if result.problem is not None:
        reporter.event(f"k-NN of step {result.step} could not be measured: {result.problem}; training goes on")
    reporter.scored(run.state.step, result.values)


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
    reporter.count(report, values)
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
        masks=run.config.task == "segment",
        labels=run.config.task == "finetune",
        transform=train_transform(run.config),
        block_shards=run.config.data.block_shards,
    )


def _announce(run: Run, reporter: Reporter, notes: list[str]) -> None:
    for note in notes:
        reporter.event(note)
    if not run.world.is_main:
        return
    plan = run.plan
    if run.container.num_ignored:
        reporter.event(f"{run.container.num_ignored} files in {run.config.data.source} are no images by their name: ignored")
    if reporter.endpoint is not None:
        reporter.event(f"metrics at {reporter.endpoint}")
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
        "metrics_endpoint": reporter.endpoint,
        "lost_steps": reporter.lost_steps,
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
