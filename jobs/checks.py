"""All that can be known to be wrong before a run is queued: all problems at once, each with its remedy. Imports no torch.

Settings that do not fit each other are found when the configuration is built; what is here looks at the world around it. What
concerns a job is in :mod:`jobs.checks_job` and :mod:`jobs.checks_cluster`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jobs.checks_cluster import CLUSTER_CHECKS
from jobs.checks_job import JOB_CHECKS
from jobs.findings import Check, Context, Finding, good, note, problem, run_checks, skipped
from jobs.options import Layers, absolute_paths, default_cluster, flatten, places_from_options
from jobs.runs import newest_checkpoint, read_json
from nepa_dist.config import Config, ConfigError, changed_keys, nearest
from nepa_dist.config_load import load_config
from nepa_dist.memory import activation_bytes, num_parameters, state_bytes
from nepa_dist.metrics.trackers import tracker_problems
from nepa_dist.plan import make_plan

if TYPE_CHECKING:
    from nepa_dist.data.containers import Container


class Checked(NamedTuple):
    """What was found out about a stage."""

    config: Config | None
    """None if the settings have problems of their own."""
    findings: list[Finding]
    changes: list[str]
    """One line per setting that differs from that of the run in the same folder and may."""
    num_samples: int | None
    """Training images."""
    note: str
    """Where that number comes from."""

    @property
    def problems(self) -> list[str]:
        """Sentences; nothing may start while there are any."""
        return [finding.text for finding in self.findings if finding.kind == "problem"]

    @property
    def steps(self) -> int | None:
        """Of the whole run; None if they follow from a number of images that is not known."""
        if self.config is None or (self.config.steps is None and self.num_samples is None):
            return None
        return self.config.steps or make_plan(self.config, self.num_samples or 1).steps


Opened = dict[tuple[str | None, str, int], "Container"]
"""Containers by source, split and image size. To open a folder is to walk through it: stages that share one open it once."""


def check_stage(
    args: argparse.Namespace, layers: Layers, parents: Sequence[Path] = (), opened: Opened | None = None
) -> Checked:
    """Build the configuration and look at everything around it.

    With ``--dry-run`` and ``--print`` for a cluster, this machine need not see its disks, and SLURM is not asked.

    Args:
        args: of :func:`jobs.options.stage_parser`.
        layers: what they stand for.
        parents: run folders that earlier stages make.
        opened: what stages checked before have opened; is added to.
    """
    findings: list[Finding] = []
    config: Config | None = None
    try:
        config = absolute_paths(load_config(layers.files, layers.overrides, layers.base))
    except ConfigError as error:
        findings += [Finding("problem", text, "settings") for text in error.problems]
        run_dir, source = places_from_options(args, layers)
    else:
        findings.append(Finding("good", "each is known, and they fit each other", "settings"))
        run_dir, source = config.run_dir, config.data.source
    describing = args.dry_run or args.print
    elsewhere = describing and (config.cluster.launcher if config else default_cluster(args)) != "local"
    unknown = [name for name in args.skip_check if name not in KNOWN]
    findings += [Finding("problem", f"--skip-check {name}: no such check{nearest(name, KNOWN)}", "options") for name in unknown]
    num_samples, where, found = check_data(config, source, optional=describing, opened={} if opened is None else opened)
    if found and not elsewhere and config and config.cluster.launcher == "slurm":
        found[0] += " (if the nodes see it and this machine does not: --skip-check data)"
    if found and (elsewhere or "data" in args.skip_check):
        expected = config.data.expected_num_samples if config else None
        where = f"WARNING: {found[0]}\n{where if expected else 'so their number is unknown'}"
        num_samples, found = expected, []
    findings += [Finding("problem", text, "data") for text in found]
    changes: list[str] = []
    if config is None:
        findings += [Finding("problem", text, "folder") for text in ([] if elsewhere else folder_problems(run_dir))]
        return Checked(config, findings, changes, num_samples, where)
    if not found:
        findings.append(Finding("good", where if num_samples is None else f"{num_samples:,} images, {where}", "data"))
    context = Context(args, config, num_samples, parents)
    differing, changes = compare_with_existing(config)
    findings += [Finding("problem", text, "same settings") for text in differing]
    left_out = (NEED_THE_PLACE if elsewhere else set()) | (set() if _has_a_plan(context) else NEED_A_PLAN)
    checks = {name: check for name, check in CHECKS.items() if name not in left_out}
    findings += run_checks(checks, context)
    return Checked(config, findings, changes, num_samples, where)


def _has_a_plan(context: Context) -> bool:
    """Whether steps and batches follow from the settings; if not, that has been said, or needs the number of images."""
    try:
        context.plan  # noqa: B018
    except ConfigError:
        return False
    return True


def check_data(
    config: Config | None, source: str | None, *, optional: bool, opened: Opened
) -> tuple[int | None, str, list[str]]:
    """Count the training images, and look whether they are what the task needs.

    Args:
        config: the run; None if the configuration has problems of its own.
        source: data.source.
        optional: a run without any data is no problem.
        opened: containers that are open already; is added to.

    Returns:
        (number of images or None, where it comes from, problems).
    """
    expected = config.data.expected_num_samples if config else None
    assumed = "not counted: data.expected_num_samples of the recipe" if expected else "no --data given"
    if source is None and (optional or config is None):
        return expected, assumed, []
    from nepa_dist.data.classes import check_validation, resolve_classes
    from nepa_dist.data.containers import DataError
    from nepa_dist.data.open import open_container
    from nepa_dist.online_knn import online_knn_problems

    size = config.model.image_size if config else 224

    def opening(split: Literal["train", "val"]) -> Container:
        key = (source, split, size)
        if key not in opened:
            opened[key] = open_container(source, split, image_size=size, checksums=bool(config and config.data.checksums))
        return opened[key]

    try:
        container = opening("train")
        if config and config.task != "pretrain":
            resolve_classes(config, container)
            check_validation(config, container, opening("val"))
        problems = online_knn_problems(config, container) if config and config.metrics.knn_every else []
        if config:
            try:
                make_plan(config, len(container))
            except ConfigError as error:
                problems += error.problems
        if problems:
            return None, assumed, problems
    except DataError as error:
        return None, assumed, [str(error)]
    except ConfigError as error:
        return None, assumed, error.problems
    except OSError as error:
        return None, assumed, [f"data.source {source}: its first sample cannot be read: {error}"]
    return len(container), f"counted in {source}", []


def check_count(context: Context) -> Iterator[Finding]:
    """The images are as many as the recipe was made for."""
    expected, found = context.config.data.expected_num_samples, context.num_samples
    if expected is None or found is None:
        yield skipped("the recipe expects no number" if expected is None else "the images are not counted")
    elif expected != found:
        yield note(f"{found:,} images, the recipe expects {expected:,}; the counted number is used")
    else:
        yield good(f"{found:,} images, as the recipe expects")


def check_batch(context: Context) -> Iterator[Finding]:
    """Ranks x micro-batch x accumulation is the global batch (this is an error of the settings otherwise)."""
    config, plan = context.config, context.plan
    where = config.cluster
    ranks = f"{where.nodes} nodes x {where.gpus_per_node} GPUs"
    yield good(
        f"{config.global_batch_size} = {ranks} x micro-batch {plan.micro_batch_size} x accumulation {plan.grad_accum_steps}"
    )
    if context.num_samples is not None and context.num_samples < config.global_batch_size:
        yield note(
            f"one step takes {config.global_batch_size} images and there are {context.num_samples}: each comes repeatedly"
        )


def check_image(context: Context) -> Iterator[Finding]:
    """The crop is a whole number of patches (this is an error of the settings otherwise)."""
    model = context.config.model
    side = model.image_size // model.patch_size
    yield good(f"{model.image_size} pixels = {side} patches of {model.patch_size}")


def check_memory(context: Context) -> Iterator[Finding]:
    """State and activations fit into a GPU."""
    config, plan = context.config, context.plan
    limit = config.cluster.gpu_memory_gigabytes
    needed = sum(state_bytes(config, plan.grad_accum_steps).values())
    needed += plan.micro_batch_size * activation_bytes(config, plan.num_tokens)
    text = f"about {needed / 1e9:.3g} GB per rank"
    if limit is None:
        yield skipped(f"{text}; cluster.gpu_memory_gigabytes is not set")
    elif needed > 0.95 * limit * 1e9:
        smaller = max(1, plan.micro_batch_size // 2)
        again = "full" if config.engine.name == "zero3" else "selective"
        yield problem(
            f"{text} are more than the {limit:g} GB of a GPU: --set micro_batch_size={smaller}, "
            f"--set engine.activation_checkpointing={again}, or --engine fsdp2"
        )
    else:
        yield good(f"{text} of {limit:g}")


def check_init(context: Context) -> Iterator[Finding]:
    """What a run starts from is there, or an earlier stage makes it; and it is the same model."""
    config = context.config
    path = None if config.init.path is None else Path(config.init.path)
    frozen = config.task == "finetune" and config.finetune.freeze_patch_embed
    if (
        path is None
        and frozen
        and not (context.args.dry_run or context.args.print)
        and newest_checkpoint(config.run_dir) is None
    ):
        yield problem(
            "the patch embedding is frozen and would stay as it is drawn: pass --init RUN, or to start from random weights "
            "--set finetune.freeze_patch_embed=false"
        )
    elif path is None:
        yield good("random weights")
    elif path in context.parents:
        yield good(f"{path}, which an earlier stage makes")
    elif newest_checkpoint(config.run_dir) is not None:
        yield good("the run's own checkpoint")
    elif not path.is_file() and (found := newest_checkpoint(path)) is None and not _holds_weights(path):
        what = "holds no checkpoint" if path.exists() else "does not exist"
        yield problem(f"--init {path} {what}: name the folder of a run that has saved, or one checkpoint in its checkpoints/")
    else:
        folder = path if path.is_file() or found is None else path / "checkpoints" / f"step-{found:08}"
        old = read_json(folder / "manifest.json").get("meta", {}).get("config", {}).get("model", {})
        new = config.model.model_dump(mode="json")
        differing = [f"{key}: {old[key]} there, {new[key]} here" for key in _SHAPES if key in old and old[key] != new[key]]
        if differing:
            yield problem(f"--init {path} holds another model ({'; '.join(differing)}): use the recipe it was made with")
        else:
            yield good(str(folder))


_SHAPES = ("embed_dim", "depth", "num_heads", "patch_size", "gated_mlp", "qk_norm")
"""Settings of the model that weights depend on."""


def _holds_weights(path: Path) -> bool:
    return any((path / name).exists() for name in ("manifest.json", "model.safetensors"))


def check_folder(context: Context) -> Iterator[Finding]:
    """The run folder can be made and written."""
    problems = folder_problems(context.run_dir)
    yield from map(problem, problems)
    if not problems:
        state = "there is a run, it would go on" if (context.run_dir / "config.yaml").exists() else "new"
        yield good(f"{context.run_dir} ({state})")


def folder_problems(run_dir: Path) -> list[str]:
    """Sentences about a run folder in which nothing can be written."""
    parent = next(p for p in (run_dir, *run_dir.parents) if os.path.lexists(p))
    if not parent.is_dir():
        return [f"run folder {run_dir}: {parent} is not a folder; choose another place with --run-dir"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"run folder {run_dir}: no permission to write in {parent}; choose another place with --run-dir"]
    return []


def check_space(context: Context) -> Iterator[Finding]:
    """The disk has room for all checkpoints that are kept, and the one that is written."""
    config = context.config
    parameters = num_parameters(config)
    size = parameters * 4 * (3 if config.optim.ema_decay is None else 4)
    keep = config.checkpoint.keep_last + 1
    if config.checkpoint.keep_every is not None:
        keep += context.plan.steps // config.checkpoint.keep_every
    there = len(list((context.run_dir / "checkpoints").glob("step-*")))
    keep = max(1, keep - there)
    parent = next(p for p in (context.run_dir, *context.run_dir.parents) if os.path.exists(p))
    try:
        free, files = shutil.disk_usage(parent).free, os.statvfs(parent).f_favail
    except OSError as error:
        yield problem(f"{parent}: {error}")
        return
    text = f"{keep} {'more ' if there else ''}checkpoints of {size / 1e9:.3g} GB, {free / 1e9:.3g} GB free in {parent}"
    if keep * size > free:
        yield problem(f"{text}: make room, choose another place with --run-dir, or --set checkpoint.keep_last=1")
    elif 0 < files < 1000:
        yield problem(f"{parent} takes only {files} more files: make room, or choose another place with --run-dir")
    else:
        yield good(text)


def check_trackers(context: Context) -> Iterator[Finding]:
    """What metrics.sinks names is installed."""
    names = context.config.metrics.sinks
    if not names:
        yield good("none")
    elif context.config.cluster.container or context.config.cluster.python:
        yield skipped("the ranks run in another environment, and look there")
    else:
        problems = tracker_problems(names)
        yield from map(problem, problems)
        if not problems:
            yield good(", ".join(names))


def check_trainer(context: Context) -> Iterator[Finding]:
    """Nothing trains in that folder on this machine."""
    import fcntl

    path = context.run_dir / ".lock"
    try:
        with path.open("r+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = file.read().strip()
                yield problem(f"a run is going on in {context.run_dir} ({holder}): wait, stop it, or give another --name")
                return
    except FileNotFoundError:
        pass
    except OSError as error:
        yield problem(f"{path} cannot be opened: {error.strerror}; choose another place with --run-dir, or another --name")
        return
    yield good("nothing trains there")


def compare_with_existing(config: Config) -> tuple[list[str], list[str]]:
    """Compare a configuration with that of the run in the same folder. Before its first checkpoint a run has no numbers yet.

    Returns:
        (problems, changes): the first if a setting that shapes the numbers differs, the second one line per other difference,
        of which the new value holds. Both are empty if the folder holds no run.
    """
    path = config.run_dir / "config.yaml"
    if not os.path.lexists(path):
        return [], []
    try:
        old = load_config([path])
    except ConfigError as error:
        found = "; ".join(error.problems)
        return [f"{config.run_dir} holds a run whose settings cannot be read ({found}); choose another --name"], []
    saved = old.model_dump(mode="json")
    begun = any((config.run_dir / "checkpoints").glob("step-*"))
    if begun and (shaping := changed_keys(saved, config)):
        listing = "".join(f"\n      {_difference(*item)}" for item in shaping)
        advice = "choose another --name for the new settings, repeat the old ones to resume, or --allow KEY what may differ"
        return [f"{config.run_dir} holds a run with other settings (old -> new):{listing}\n    {advice}"], []
    before, after = dict(flatten(saved)), dict(flatten(config.model_dump(mode="json")))
    keys = [key for key in after if before.get(key) != after[key] and key != "cluster.snapshot"]
    return [], [f"  changed {_difference(key, before.get(key), after[key])}" for key in keys]


def _difference(key: str, old: Any, new: Any) -> str:
    return f"{key}: {json.dumps(old)} -> {json.dumps(new)}"


CHECKS: dict[str, Check] = {
    "count": check_count,
    "batch": check_batch,
    "image": check_image,
    "memory": check_memory,
    "init": check_init,
    "folder": check_folder,
    "space": check_space,
    "trackers": check_trackers,
    "trainer": check_trainer,
    **JOB_CHECKS,
    **CLUSTER_CHECKS,
}
"""Name -> check. ``settings``, ``data`` and ``same settings`` come before them."""
KNOWN = ("data", *CHECKS)
"""Names that ``--skip-check`` takes."""
NEED_A_PLAN = {"batch", "memory", "space"}
"""Checks that need the number of steps or the micro-batch."""
_ANYWHERE = {"launcher", "submitit", "paths"}
NEED_THE_PLACE = {"init", "folder", "space", "trackers", "trainer", *JOB_CHECKS, *CLUSTER_CHECKS} - _ANYWHERE
"""Checks that make sense only where the run will be, or where it is submitted."""
