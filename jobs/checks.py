"""All that can be known to be wrong before a run is queued: all problems at once, each with its remedy. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.options import Layers, absolute_paths, default_cluster, flatten, places_from_options
from jobs.runs import newest_checkpoint
from nepa_dist.config import Config, ConfigError, changed_keys
from nepa_dist.config_load import load_config
from nepa_dist.plan import make_plan


class Checked(NamedTuple):
    """What was found out about a stage."""

    config: Config | None
    """None if the settings have problems of their own."""
    problems: list[str]
    """Sentences; nothing may start while there are any."""
    changes: list[str]
    """One line per setting that differs from that of the run in the same folder and may."""
    num_samples: int | None
    """Training images."""
    note: str
    """Where that number comes from."""

    @property
    def steps(self) -> int | None:
        """Of the whole run; None if they follow from a number of images that is not known."""
        if self.config is None or (self.config.steps is None and self.num_samples is None):
            return None
        return self.config.steps or make_plan(self.config, self.num_samples or 1).steps


def check_stage(args: argparse.Namespace, layers: Layers, parents: Sequence[Path] = ()) -> Checked:
    """Build the configuration and look at everything around it.

    Args:
        args: of :func:`jobs.options.stage_parser`.
        layers: what they stand for.
        parents: run folders that earlier stages make.
    """
    problems: list[str] = []
    config: Config | None = None
    try:
        config = absolute_paths(load_config(layers.files, layers.overrides, layers.base))
    except ConfigError as error:
        problems += error.problems
        run_dir, source = places_from_options(args, layers)
    else:
        problems += launch_problems(config, args.dry_run)
        run_dir, source = config.run_dir, config.data.source
    # A dry run for a cluster may happen where neither its data nor its disk is in reach; everything else happens here.
    elsewhere = args.dry_run and (config.cluster.launcher if config else default_cluster(args)) != "local"
    num_samples, note, found = check_data(config, source, must_be_here=not elsewhere, optional=args.dry_run)
    problems += found
    if not elsewhere:
        problems += folder_problems(run_dir)
    changes: list[str] = []
    if config:
        problems += init_problems(config, parents)
        found, changes = compare_with_existing(config)
        problems += found
    return Checked(config, problems, changes, num_samples, note)


def launch_problems(config: Config, dry_run: bool) -> list[str]:
    """Sentences about a cluster section that this version cannot start."""
    where = config.cluster
    if where.launcher == "slurm" and not dry_run:
        return ["this version does not submit to SLURM: use --dry-run to see the run, or --cluster local to run it here"]
    if where.launcher == "local" and where.nodes > 1:
        total = where.world_size
        return [f"the local cluster is one machine, not {where.nodes} nodes: use --gpus-per-node {total}, or --cluster slurm"]
    return []


def init_problems(config: Config, parents: Sequence[Path]) -> list[str]:
    """Sentences about what a run is to start from and is not there."""
    path = None if config.init.path is None else Path(config.init.path)
    if path is None or path in parents or newest_checkpoint(config.run_dir) is not None:
        return []
    if (path / "manifest.json").exists() or newest_checkpoint(path) is not None or (path / "model.safetensors").exists():
        return []
    if path.is_file():
        return []
    what = "holds no checkpoint" if path.exists() else "does not exist"
    return [f"--init {path} {what}: name the folder of a run that has saved, or one checkpoint in its checkpoints/"]


def check_data(
    config: Config | None, source: str | None, *, must_be_here: bool, optional: bool
) -> tuple[int | None, str, list[str]]:
    """Count the training images.

    Args:
        config: the run; None if the configuration has problems of its own.
        source: data.source.
        must_be_here: data that cannot be read is a problem, not only a remark.
        optional: a run without any data is no problem.

    Returns:
        (number of images or None, where it comes from, problems).
    """
    expected = config.data.expected_num_samples if config else None
    assumed = "not counted: data.expected_num_samples of the recipe" if expected else "no --data given"
    if source is None and (optional or config is None):
        return expected, assumed, []
    from nepa_dist.data.containers import DataError, open_container

    try:
        count = len(open_container(source, "train", image_size=config.model.image_size if config else 224))
    except DataError as error:
        if must_be_here:
            return None, "", [str(error)]
        return expected, f"WARNING: {error}\n{assumed if expected else 'so their number is unknown'}", []
    note = f"counted in {source}"
    if expected and expected != count:
        note += f" (the recipe expects {expected:,}; the counted number is used)"
    try:
        if config:
            make_plan(config, count)
    except ConfigError as error:
        return None, "", error.problems
    return count, note, []


def folder_problems(run_dir: Path) -> list[str]:
    """Sentences about a run folder in which nothing can be written."""
    parent = next(p for p in (run_dir, *run_dir.parents) if os.path.lexists(p))
    if not parent.is_dir():
        return [f"run folder {run_dir}: {parent} is not a folder; choose another place with --run-dir"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"run folder {run_dir}: no permission to write in {parent}; choose another place with --run-dir"]
    return []


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
    return [], [f"  changed {_difference(key, before[key], after[key])}" for key in after if before[key] != after[key]]


def _difference(key: str, old: Any, new: Any) -> str:
    return f"{key}: {json.dumps(old)} -> {json.dumps(new)}"
