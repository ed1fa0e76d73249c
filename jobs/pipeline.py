"""Several stages in a row: ``pipeline vit_b`` pretrains, fine-tunes from that, and segments from that.

All stages are checked before the first one starts. Their runs lie in one folder, ``runs/NAME/<stage>``, beside ``report.md``.
What is finished is not done again: the same command goes on with the first stage that is not.

A pipeline is a file ``configs/pipeline/NAME.yaml``, or, without one, the recipes of that name of all tasks:

```
stages:
  pretrain: {options: "--nodes 8"}        # recipe: the name of the pipeline; options: as on the command line
  finetune: {from: pretrain}              # from: starts with the weights of that stage
  scratch: {task: finetune}               # task: the name of the stage
```
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jobs.chain import describe_chain, submit_chain
from jobs.checks import Checked, Opened, check_stage
from jobs.findings import counted, table
from jobs.launch import LaunchError, describe_job, launch_local, make_private
from jobs.options import CONFIGS, TASKS, absolute, add_stage_options, add_ways, collect_layers, recipe_names, stage_parser
from jobs.pipeline_report import draw_samples, write_report
from jobs.probe import is_probed, probe_here
from jobs.runs import is_finished
from jobs.slurm import SubmitError
from jobs.snapshot import read_code
from nepa_dist.config import Config, name_problem, nearest, other_settings

FOLDER = "pipeline"
"""Of configs/: what pipelines consist of."""
_FIRST = "pretrain"


class Part(NamedTuple):
    """One stage as a pipeline file or the defaults say it."""

    name: str
    task: str
    recipe: str
    start: str | None
    """Stage whose weights it starts with."""
    words: list[str]
    """Options, as on the command line."""

    @property
    def stage(self) -> str:
        """What options call it: of ``VARIANT/STAGE``, the name of a stage of a sweep, the last part."""
        return self.name.rpartition("/")[2]


class Stage(NamedTuple):
    """One stage, checked."""

    part: Part
    args: argparse.Namespace
    checked: Checked

    @property
    def config(self) -> Config:
        """Its configuration; only asked for where there are no problems."""
        assert self.checked.config is not None
        return self.checked.config

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return is_finished(self.config.run_dir, self.checked.steps)


def pipeline_parser() -> argparse.ArgumentParser:
    """The options: those of a stage, each for all stages, or with ``STAGE:`` before the value for one."""
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py pipeline",
        description="Run the stages of a pipeline one after the other; the same command goes on where it stopped.",
        epilog="Options are those of a stage. A value holds for all stages, and with STAGE: before it for one: "
        "--nodes pretrain:8 --set seed=3 --set finetune:steps=500 --data segment:/data/ade20k",
        allow_abbrev=False,
    )
    known = ", ".join(dict.fromkeys([*recipe_names(FOLDER), *_common_recipes()]))
    parser.add_argument("pipeline", help=f"a file of configs/pipeline, or a recipe that each task has: {known}")
    parser.add_argument("--stages", metavar="A,B", help="only these, in this order")
    parser.add_argument("--probe", action="store_true", help="measure what the pretrained features are worth, too")
    parser.add_argument("--name", help="folder of the pipeline in runs/; default: pipeline-<pipeline>[-<data>]")
    add_ways(parser)
    add_values(parser)
    return parser


def add_values(parser: argparse.ArgumentParser) -> None:
    """The options of a stage that take a value, each for all stages, or with ``STAGE:`` before the value for one."""
    for action in _stage_options():
        metavar = f"[STAGE:]{action.metavar or action.dest.upper()}"
        parser.add_argument(*action.option_strings, dest=action.dest, action="append", default=[], metavar=metavar)


def main(argv: Sequence[str]) -> tuple[int, list[str]]:
    """The command line; returns the exit code, or 2 and the problems."""
    args = pipeline_parser().parse_args(argv)
    parts, problems = read_parts(args)
    if problems:
        return 2, problems
    root, problems = root_of(args.name or default_name([FOLDER, args.pipeline], args))
    if problems:
        return 2, problems
    stages, problems = build_stages(parts, args, root)
    if args.check:
        return show_checks(stages, problems)
    if problems:
        return 2, problems
    if args.dry_run:
        print("\n".join(describe(stages)))
        return 0, []
    configs = [stage.config for stage in stages]
    launchers = {config.cluster.launcher for config in configs}
    if len(launchers) > 1:
        return 2, ["some stages are to run here and some on SLURM: give one --cluster for all"]
    if launchers == {"slurm"}:
        code = read_code(args.include)
        lines = describe_chain(root, configs, code)
        if not args.print:
            lines = submit_chain(root, [(stage.config, stage.checked.steps) for stage in stages], code, probe=args.probe)
        return _print_lines(lines)
    if args.print:
        return _print_lines(line for config in configs for line in describe_job(config, read_code(args.include)))
    return run_here(root, stages, probe=args.probe)


def _print_lines(lines: Iterable[str]) -> tuple[int, list[str]]:
    try:
        for line in lines:
            print(line, flush=True)
    except (LaunchError, SubmitError, OSError) as error:
        return 2, [f"{error} (what is listed above was submitted)"]
    return 0, []


def show_checks(stages: Sequence[Stage], problems: Sequence[str]) -> tuple[int, list[str]]:
    """Print what every check says of every stage; returns the exit code, and no problems."""
    for stage in stages:
        print("\n".join([f"{stage.part.name}:", *(f"  {line}" for line in table(stage.checked.findings))]))
    print(f"{counted(len(problems))}, nothing was started")
    return 2 if problems else 0, []


def root_of(name: str) -> tuple[Path, list[str]]:
    """Folder of a pipeline or sweep, and what is wrong with its name."""
    return Path(absolute("runs")) / name, list(filter(None, [name_problem(name)]))


def read_parts(args: argparse.Namespace) -> tuple[list[Part], list[str]]:
    """The stages that a pipeline consists of, and sentences about what is wrong with them."""
    name = args.pipeline
    problems: list[str] = []
    if name in recipe_names(FOLDER):
        parts, problems = _read_file(CONFIGS / FOLDER / f"{name}.yaml", name)
    else:
        tasks = [task for task in TASKS if name in recipe_names(task)]
        before = [None, *tasks]
        parts = [Part(task, task, name, start, []) for task, start in zip(tasks, before, strict=False)]
        if not parts:
            known = [*recipe_names(FOLDER), *_common_recipes()]
            problems.append(f"unknown pipeline {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    if args.stages is not None and not problems:
        by_name = {part.name: part for part in parts}
        wanted, problems = chosen("stage", args.stages, by_name)
        parts = [by_name[stage] for stage in wanted]
    return parts, problems


def chosen(kind: str, text: str | None, known: Sequence[str] | Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names that an option such as ``--stages A,B`` lists, all where it is not given, and sentences about unknown ones."""
    wanted = list(known) if text is None else list(dict.fromkeys(text.split(",")))
    unknown = [name for name in wanted if name not in known]
    problems = [f"--{kind}s: no {kind} {name!r}{nearest(name, known)} (known: {', '.join(known)})" for name in unknown]
    return [name for name in wanted if name in known], problems


def build_stages(parts: Sequence[Part], args: argparse.Namespace, root: Path) -> tuple[list[Stage], list[str]]:
    """Check all stages; returns them and their problems, each with the stages that have it."""
    found: dict[str, list[str]] = {}
    stages: list[Stage] = []
    opened: Opened = {}
    for part in parts:
        words = [*part.words, *words_for(part, [other.stage for other in parts], args), "--run-dir", str(root / part.name)]
        if part.start is not None:
            words += ["--init", str(root / part.start)]
        stage_args = stage_parser(part.task).parse_args([part.recipe, *words])
        for way in ("dry_run", "print", "check", "skip_check", "include"):
            setattr(stage_args, way, getattr(args, way))
        stage_args.job_folder = str(root)
        layers, problems = collect_layers(stage_args)
        checked = check_stage(stage_args, layers, [root / stage.part.name for stage in stages], opened)
        start = next((stage.checked.config for stage in stages if stage.part.name == part.start), None)
        if start and checked.config and (differing := other_settings(start.model, checked.config.model)):
            problems.append(f"another model than {part.start}, which it starts with: {'; '.join(differing)}")
        for problem in [*problems, *checked.problems]:
            found.setdefault(problem, []).append(part.name)
        stages.append(Stage(part, stage_args, checked))
    return stages, [f"{_listing(names)}: {problem}" for problem, names in found.items()]


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def run_here(root: Path, stages: Sequence[Stage], *, probe: bool = False) -> tuple[int, list[str]]:
    """Run all stages that are not finished, one after the other; returns the exit code of the last, and problems."""
    problems: list[str] = []
    code = 0
    make_private(root)
    for number, stage in enumerate(stages, 1):
        title, run_dir = f"stage {number} of {len(stages)}, {stage.part.name}", stage.config.run_dir
        if stage.is_finished:
            print(f"{title}: finished before, {run_dir}", flush=True)
        else:
            print(f"{title}:", flush=True)
            try:
                code = launch_local(stage.config, stage.checked.changes)
            except LaunchError as error:
                code, problems = 2, [f"{stage.part.name}: {error}"]
        if not code and probe and stage.part.task == _FIRST and not is_probed(run_dir):
            code = probe_here(run_dir)
        if not code:
            draw_samples(run_dir)
        if code:
            print(f"{title}: ended with exit code {code}; the same command goes on here", file=sys.stderr, flush=True)
            break
    if any(stage.config.run_dir.exists() for stage in stages):
        print(f"wrote {write_report(root, [stage.config.run_dir for stage in stages])}")
    return code, problems


def describe(stages: Sequence[Stage]) -> Iterator[str]:
    """A line about each stage: steps, ranks, start, folder, and whether it is there already."""
    for stage in stages:
        config, checked = stage.config, stage.checked
        state = "finished" if stage.is_finished else "exists, would go on" if config.run_dir.exists() else "new"
        steps = "unknown number of" if checked.steps is None else f"{checked.steps:,}"
        start = f", starts with {stage.part.start}" if stage.part.start else ""
        ranks = "1 rank" if config.cluster.world_size == 1 else f"{config.cluster.world_size} ranks"
        yield f"{stage.part.name}: {steps} steps on {ranks}{start}; {config.run_dir} ({state})"


def words_for(part: Part, names: Collection[str], args: argparse.Namespace) -> Iterator[str]:
    """The options of one stage: those for all stages, then those of its task, then its own.

    Args:
        part: the stage.
        names: of all stages.
        args: values of :func:`add_values`.
    """
    stages = {*TASKS, *names}
    for wanted in dict.fromkeys((None, part.task, part.stage)):
        for action in _stage_options():
            for text in getattr(args, action.dest):
                stage, value = split(text, stages)
                if stage == wanted:
                    yield f"{action.option_strings[0]}={value}"


def split(text: str, stages: Collection[str] = TASKS) -> tuple[str | None, str]:
    """(stage or None for all, value) of ``[STAGE:]VALUE``."""
    stage, colon, value = text.partition(":")
    return (stage, value) if colon and stage in stages else (None, text)


def _stage_options() -> list[argparse.Action]:
    """Options of a stage that take a value, but for the places and starts, which the pipeline decides."""
    parser = argparse.ArgumentParser(add_help=False)
    add_stage_options(parser)
    ours = ("name", "run_dir", "init")
    return [action for action in parser._actions if action.option_strings and action.nargs != 0 and action.dest not in ours]


def _read_file(path: Path, name: str) -> tuple[list[Part], list[str]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = {str(stage): dict(fields or {}) for stage, fields in content["stages"].items()}
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        return [], [f"{path}: expected stages: {{NAME: {{task, recipe, from, options}}}}: {error}"]
    return read_stages(path, stages, name)


def read_stages(path: Path, stages: Mapping[str, Mapping[str, Any]], recipe: str) -> tuple[list[Part], list[str]]:
    """The stages that a file describes, and sentences about what is wrong with them.

    Args:
        path: of the file, for the sentences.
        stages: name -> task, recipe, from, options; all may be missing.
        recipe: of stages that name none.
    """
    problems = [problem for stage, fields in stages.items() for problem in _part_problems(path, stage, fields, stages)]
    if problems:
        return [], problems
    return [
        Part(
            stage,
            str(fields.get("task", stage)),
            str(fields.get("recipe", recipe)),
            fields.get("from"),
            shlex.split(str(fields.get("options", ""))),
        )
        for stage, fields in stages.items()
    ], []


def _part_problems(path: Path, stage: str, fields: Mapping[str, Any], stages: Mapping[str, Any]) -> Iterator[str]:
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", stage):
        yield f"{path}: {stage!r} cannot name a stage: it takes small letters, digits, '-' and '_'"
    if (task := str(fields.get("task", stage))) not in TASKS:
        yield f"{path}: {stage}: unknown task {task!r}{nearest(task, TASKS)} (known: {', '.join(TASKS)})"
    try:
        shlex.split(str(fields.get("options", "")))
    except ValueError as error:
        yield f"{path}: {stage}: options {fields['options']!r}: {error}"
    for key in fields:
        if key not in ("task", "recipe", "from", "options"):
            yield f"{path}: {stage}: unknown key {key!r} (known: task, recipe, from, options)"
    before = list(stages)[: list(stages).index(stage)]
    if (start := fields.get("from")) is not None and start not in before:
        yield f"{path}: {stage}: from {start!r} is no earlier stage"


def _common_recipes() -> list[str]:
    """Recipes that every task has."""
    return [name for name in recipe_names(_FIRST) if all(name in recipe_names(task) for task in TASKS)]


def default_name(words: Sequence[str], args: argparse.Namespace) -> str:
    """Name of a folder in runs/: the words, and the data of all stages."""
    data = [value for text in args.data if split(text)[0] is None for value in [split(text)[1]]]
    names = [*words, *(re.sub(r"[^A-Za-z0-9._-]+", "-", Path(absolute(source)).name) for source in data[-1:])]
    return "-".join(filter(None, names))[:100]
