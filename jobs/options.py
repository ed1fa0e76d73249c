"""Options of a stage, and the configuration layers they stand for. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from jobs.cluster import REPO_ROOT
from nepa_dist.config import Config, Section

CONFIGS = REPO_ROOT / "configs"
TASKS: tuple[str, ...] = get_args(Config.model_fields["task"].annotation)
"""What can be trained; each has its recipes in ``configs/<task>/``."""
SectionT = TypeVar("SectionT", bound=Section)


_RESOURCES = {
    "cpus_per_gpu": ("N", "cores per GPU, so per process"),
    "mem": ("M", "memory per node, such as 500G"),
    "time": ("T", "limit of a job, such as 1-00:00:00; the run goes on in the next one"),
    "partition": ("P", "partition"),
    "account": ("A", "account"),
    "qos": ("Q", "quality of service"),
    "constraint": ("C", "features that nodes must have"),
    "exclude": ("NODES", "nodes that must not be used"),
    "array_parallelism": ("N", "runs of a sweep at a time"),
}
"""Option, and field of the cluster -> (its value, what it is)."""


class Layers(NamedTuple):
    """What :func:`nepa_dist.config_load.load_config` is called with."""

    files: list[Path]
    overrides: list[str]
    base: dict[str, Any]


def stage_parser(task: str) -> argparse.ArgumentParser:
    """The options of one task.

    Args:
        task: one of :data:`TASKS`; it becomes ``args.task``.
    """

    parser = argparse.ArgumentParser(
        prog=f"python jobs/submit.py {task}",
        description="Start a run, or describe it (--dry-run). The same command again resumes it.",
        epilog="Settings, later ones win: defaults < recipe < data < cluster < engine < --config in order < the other options "
        "< --set in order.",
        allow_abbrev=False,
    )
    parser.set_defaults(task=task)
    parser.add_argument("recipe", help=f"settings of a size: {_known(task)}")
    add_stage_options(parser)
    add_ways(parser)
    return parser


def add_ways(parser: argparse.ArgumentParser) -> None:
    """The options that describe instead of starting, and what goes with a job."""
    parser.add_argument("--dry-run", action="store_true", help="check, print cost, steps, memory and settings; start nothing")
    parser.add_argument("--print", action="store_true", help="show the batch script and the environment of the ranks")
    parser.add_argument("--check", action="store_true", help="show what every check says; start nothing")
    parser.add_argument(
        "--skip-check", action="append", default=[], metavar="NAME", help="do without a check, as --check names it; repeatable"
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="FILES",
        help="that git does not track, for the code of a job; repeatable",
    )


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """The options that any stage has and that take a value."""
    parser.add_argument("--data", metavar="NAME|FOLDER", help=f"images: {_known('data')}, or a folder that holds them")
    parser.add_argument("--cluster", metavar="NAME", help=f"{_known('cluster')}; default: local, or slurm with --nodes above 1")
    parser.add_argument("--nodes", type=int, metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="processes per machine, one per GPU")
    for name, (metavar, what) in _RESOURCES.items():
        kind = int if metavar == "N" else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"of SLURM: {what}")
    parser.add_argument("--engine", metavar="NAME", help=f"how the model is placed on devices: {_known('engine')}")
    parser.add_argument("--init", metavar="DIR", help="run folder or checkpoint that a new run starts from")
    parser.add_argument(
        "--load", metavar="WHAT", help="of --init: weights, ema, weights+ema, everything; default: the recipe's"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="setting that may differ on resume; repeatable"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--name", help="name of the run; default: <task>-<recipe>[-<data>]. Its folder is runs/NAME")
    place.add_argument("--run-dir", metavar="DIR", help="the run folder itself, in place of runs/NAME")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="more settings (YAML file, or a name such as ablate/no_shift); repeatable",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; repeatable")


def collect_layers(args: argparse.Namespace) -> tuple[Layers, list[str]]:
    """Turn the options into configuration layers; returns them and sentences about recipes or clusters that do not exist."""
    problems: list[str] = []
    files: list[Path] = []
    overrides: list[str] = []
    base = {"task": args.task, "name": _default_name(args)}

    def add(kind: str, folder: str, name: str) -> None:
        if name in (known := recipe_names(folder)):
            files.append(CONFIGS / folder / f"{name}.yaml")
            return
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        problems.append(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")

    def override(key: str, value: Any) -> None:
        if value is not None:
            overrides.append(f"{key}={json.dumps(value, ensure_ascii=False)}")  # JSON is YAML, whatever the text holds

    for option in ("data", "run_dir", "name", "init"):
        if getattr(args, option) == "":
            problems.append(f"--{option.replace('_', '-')} is empty")
            setattr(args, option, None)
    add("recipe", args.task, args.recipe)
    if args.data in recipe_names("data"):
        add("data", "data", args.data)
        if (own := CONFIGS / "data" / f"{args.data}.{args.task}.yaml").exists():
            files.append(own)
    elif args.data is not None:
        override("data.source", absolute_source(args.data))
    add("cluster", "cluster", default_cluster(args))
    if args.engine is not None:
        add("engine", "engine", args.engine)
    files += map(_config_file, args.config)
    override("cluster.nodes", args.nodes)
    override("cluster.gpus_per_node", args.gpus_per_node)
    for name in _RESOURCES:
        override(f"cluster.{name}", getattr(args, name))
    override("init.path", None if args.init is None else absolute(args.init))
    override("init.load", args.load)
    override("checkpoint.allow", args.allow or None)
    override("name", args.name)
    if args.run_dir is not None:
        run_dir = Path(absolute(args.run_dir))
        override("run_root", str(run_dir.parent))
        override("name", run_dir.name)
    return Layers(files, [*overrides, *args.set], base), problems


def _config_file(text: str) -> Path:
    """The file that ``--config`` names: a path, or ``ablate/no_shift`` for one in configs/."""
    own = CONFIGS / f"{text}.yaml"
    return own if not os.path.exists(text) and os.path.exists(own) else Path(text)


def _known(folder: str) -> str:
    return ", ".join(recipe_names(folder)) or "none yet"


def default_cluster(args: argparse.Namespace) -> str:
    """Name of the cluster file: as given, else slurm for several nodes and local for one."""
    return str(args.cluster or ("slurm" if (args.nodes or 1) > 1 else "local"))


def recipe_names(folder: str) -> list[str]:
    """Names of the YAML files in one folder of configs/, sorted. ``data/NAME.TASK.yaml`` belongs to ``NAME``."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml") if "." not in path.stem)


def places_from_options(args: argparse.Namespace, layers: Layers) -> tuple[Path, str | None]:
    """(run folder, data folder) as far as the options alone tell, for checks beside a configuration that has problems."""
    run_dir = args.run_dir or os.path.join("runs", args.name or str(layers.base["name"]))
    source = None if args.data is None or args.data in recipe_names("data") else absolute_source(args.data)
    return Path(absolute(run_dir)), source


def absolute_paths(config: Config) -> Config:
    """The same configuration, with paths that hold from every working folder."""
    config = with_value(config, "run_root", absolute(config.run_root))
    source = config.data.source
    is_folder = source is not None and source not in recipe_names("data")
    if config.data.cache_dir is not None:
        config = with_value(config, "data.cache_dir", absolute(config.data.cache_dir))
    return with_value(config, "data.source", absolute_source(source)) if is_folder and source else config


def with_value(section: SectionT, key: str, value: Any) -> SectionT:
    """A copy of a section in which the field with this dotted key has another value; the value is not validated."""
    head, _, rest = key.partition(".")
    return section.model_copy(update={head: with_value(getattr(section, head), rest, value) if rest else value})


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def absolute(path: str) -> str:
    """The same path from the root, with ~ replaced."""
    return os.path.abspath(os.path.expanduser(path))


def absolute_source(source: str) -> str:
    """The same for a data folder; a URL stays as it is."""
    return source if "://" in source else absolute(source)


def _default_name(args: argparse.Namespace) -> str:
    """<task>-<recipe>[-<data>], with the last part of a data folder, in the characters that a run name may have."""
    data = [] if args.data is None else [re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(absolute(args.data)))]
    return "-".join([args.task, args.recipe, *filter(None, data)])[:100]
