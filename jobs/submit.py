"""The command line: check everything, then start a run on this machine, or print what it would be.

Imports no torch, so that mistakes are answered at once. All problems are found before anything starts and are printed as one
list, exit code 2. The same command again resumes the same run: what happens is decided by what its folder holds.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

if not __package__:  # started as a file: the folder above holds both packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs import cluster
from jobs.cluster import USER_ERROR
from nepa_dist.config import Config, ConfigError, Section, changed_keys
from nepa_dist.config_load import load_config
from nepa_dist.guard import EXIT_AGAIN
from nepa_dist.plan import make_plan
from nepa_dist.report import build_report
from nepa_dist.run_folder import write_text

CONFIGS = cluster.REPO_ROOT / "configs"
EXAMPLES = """\
examples:
  python jobs/submit.py pretrain vit_tiny --data digits                  train on this machine, with embedded data
  python jobs/submit.py pretrain vit_b --data /data/imagenet --gpus-per-node 8
  python jobs/submit.py pretrain vit_l --nodes 8 --dry-run               64 GPUs: cost, steps, memory; starts nothing
  python jobs/submit.py pretrain vit_s --data digits --config configs/ablate/no_shift.yaml --name no-shift
  python jobs/submit.py pretrain vit_s --data digits --set optim.base_lr=1e-3 --set steps=500

other commands, each with its own --help:
  python jobs/submit.py prepare SOURCE OUT [--array 16]                  pack a data set into shards, here or as SLURM jobs
  python jobs/submit.py doctor --data DATA                               can this node feed its GPUs with this data?

Settings, later ones win: defaults < recipe < data < cluster < engine < --config in order < the other options < --set in order.
The same command again resumes the run. Exit codes: 0 finished, 75 stopped after saving, 2 a mistake to correct, others failed.
"""
SectionT = TypeVar("SectionT", bound=Section)


class Layers(NamedTuple):
    """What :func:`nepa_dist.config.load_config` is called with."""

    files: list[Path]
    overrides: list[str]
    base: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then start or describe a run; or measure or prepare its data.

    Args:
        argv: arguments; default: the command line.

    Returns:
        Exit code: 2 if anything is wrong, 0 after a dry run, otherwise that of :func:`jobs.cluster.run_local`,
        :func:`jobs.doctor.main` or :func:`jobs.prepare.main`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["doctor"]:
        from jobs import doctor

        return doctor.main(argv[1:])
    if argv[:1] == ["prepare"]:
        from jobs import prepare

        return prepare.main(argv[1:])
    args = _parser().parse_args(argv)
    layers, problems = collect_layers(args)
    config: Config | None = None
    try:
        config = absolute_paths(load_config(layers.files, layers.overrides, layers.base))
    except ConfigError as error:
        problems += error.problems
        run_dir, source = _places_from_options(args, layers)
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
        found, changes = compare_with_existing(config)
        problems += found
    if config is None or problems:
        return _refuse(problems)
    if args.dry_run:
        state = "exists, would be resumed" if (run_dir / "config.yaml").exists() else "new"
        _print_report([f"Run folder: {run_dir} ({state})", *changes, "", build_report(config, num_samples, note)])
        return 0
    return launch(config, changes)


def launch(config: Config, changes: Sequence[str] = ()) -> int:
    """Write the configuration into the run folder and run all ranks here.

    Args:
        config: a configuration without problems.
        changes: lines about settings that differ from those of the run in that folder, to be printed.

    Returns:
        The exit code of the run; 2 if the folder cannot be written or a run is going on in it.
    """
    run_dir = config.run_dir
    path = run_dir / "config.yaml"
    try:
        if not run_dir.exists():
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            run_dir.mkdir(mode=0o700)
        with locked(run_dir):
            print("\n".join([f"{'resuming' if path.exists() else 'starting'} {run_dir}", *changes]), flush=True)
            write_text(path, config.to_yaml())
            code = cluster.run_local(run_dir, config.cluster.world_size)
    except BlockingIOError:
        return _refuse([f"a run is going on in {run_dir}; wait for it, stop it, or choose another --name"])
    except OSError as error:
        return _refuse([f"cannot start in {run_dir}: {error}"])
    if code == EXIT_AGAIN:
        print(f"stopped before the end; the same command continues {run_dir} from its newest checkpoint", file=sys.stderr)
    return code


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
    elif args.data is not None:
        override("data.source", _absolute_source(args.data))
    add("cluster", "cluster", default_cluster(args))
    if args.engine is not None:
        add("engine", "engine", args.engine)
    files += map(Path, args.config)
    override("cluster.nodes", args.nodes)
    override("cluster.gpus_per_node", args.gpus_per_node)
    override("init.path", None if args.init is None else _absolute(args.init))
    override("init.load", args.load)
    override("checkpoint.allow", args.allow or None)
    override("name", args.name)
    if args.run_dir is not None:
        run_dir = Path(_absolute(args.run_dir))
        override("run_root", str(run_dir.parent))
        override("name", run_dir.name)
    return Layers(files, [*overrides, *args.set], base), problems


def default_cluster(args: argparse.Namespace) -> str:
    """Name of the cluster file: as given, else slurm for several nodes and local for one."""
    return str(args.cluster or ("slurm" if (args.nodes or 1) > 1 else "local"))


def recipe_names(folder: str) -> list[str]:
    """Names of the YAML files in one folder of configs/, sorted."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def absolute_paths(config: Config) -> Config:
    """The same configuration, with paths that hold from every working folder."""
    config = with_value(config, "run_root", _absolute(config.run_root))
    source = config.data.source
    is_folder = source is not None and source not in recipe_names("data")
    if config.data.cache_dir is not None:
        config = with_value(config, "data.cache_dir", _absolute(config.data.cache_dir))
    return with_value(config, "data.source", _absolute_source(source)) if is_folder and source else config


def with_value(section: SectionT, key: str, value: Any) -> SectionT:
    """A copy of a section in which the field with this dotted key has another value; the value is not validated."""
    head, _, rest = key.partition(".")
    return section.model_copy(update={head: with_value(getattr(section, head), rest, value) if rest else value})


def launch_problems(config: Config, dry_run: bool) -> list[str]:
    """Sentences about a cluster section that this version cannot start."""
    where = config.cluster
    if where.launcher == "slurm" and not dry_run:
        return ["this version does not submit to SLURM: use --dry-run to see the run, or --cluster local to run it here"]
    if where.launcher == "local" and where.nodes > 1:
        total = where.world_size
        return [f"the local cluster is one machine, not {where.nodes} nodes: use --gpus-per-node {total}, or --cluster slurm"]
    return []


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


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second launcher out of a run folder; the kernel gives the lock back when this process ends.

    Raises:
        BlockingIOError: another launcher holds it.
    """
    with (run_dir / ".launcher.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_source(source: str) -> str:
    """The same for a data folder; a URL stays as it is."""
    return source if "://" in source else _absolute(source)


def _default_name(args: argparse.Namespace) -> str:
    """<task>-<recipe>[-<data>], with the last part of a data folder, in the characters that a run name may have."""
    data = [] if args.data is None else [re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(_absolute(args.data)))]
    return "-".join([args.task, args.recipe, *filter(None, data)])[:100]


def _places_from_options(args: argparse.Namespace, layers: Layers) -> tuple[Path, str | None]:
    """(run folder, data folder) as far as the options alone tell, for checks beside a configuration that has problems."""
    run_dir = args.run_dir or os.path.join("runs", args.name or str(layers.base["name"]))
    source = None if args.data is None or args.data in recipe_names("data") else _absolute_source(args.data)
    return Path(_absolute(run_dir)), source


def _refuse(problems: Sequence[str]) -> int:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print("\n".join([f"{count}, nothing was started:", *(f"  - {problem}" for problem in problems)]), file=sys.stderr)
    return USER_ERROR


def _print_report(lines: Sequence[str]) -> None:
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    def known(folder: str) -> str:
        return ", ".join(recipe_names(folder))

    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py",
        description="Start a run on this machine, or describe it (--dry-run).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("task", choices=["pretrain"], help="what to train")
    parser.add_argument("recipe", help=f"settings of a size: {known('pretrain')}")
    parser.add_argument("--data", metavar="NAME|FOLDER", help=f"images: {known('data')}, or a folder that holds them")
    parser.add_argument("--cluster", metavar="NAME", help=f"{known('cluster')}; default: local, or slurm with --nodes above 1")
    parser.add_argument("--nodes", type=int, metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="processes per machine, one per GPU")
    parser.add_argument("--engine", metavar="NAME", help=f"how the model is placed on devices: {known('engine')}")
    parser.add_argument("--init", metavar="DIR", help="run folder or checkpoint that a new run starts from")
    parser.add_argument("--load", metavar="WHAT", help="of --init: weights (default), ema, weights+ema, everything")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="setting that may differ on resume; repeatable"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--name", help="name of the run; default: <task>-<recipe>[-<data>]. Its folder is runs/NAME")
    place.add_argument("--run-dir", metavar="DIR", help="the run folder itself, in place of runs/NAME")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="more settings (YAML); repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="check, print cost, steps, memory and settings; start nothing")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted before anything was started")
