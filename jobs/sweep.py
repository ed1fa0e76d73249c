"""Variants of one pipeline and a table of their scores: ``sweep objective`` runs paper Table 1a.

A sweep is a file ``configs/sweep/NAME.yaml``, or any other:

```
title: The parts of the objective                   # over table and picture
stages:                                             # as in a file of configs/pipeline
  pretrain: {recipe: vit_b}
  finetune: {recipe: vit_b, from: pretrain}
options: "--set pretrain:steps=50000"               # for all variants, as on the command line of a pipeline
score: finetune.top1                                # what is compared
shared: [pretrain]                                  # stages that run once, for all variants
variants:
  default: {published: 76.8}                        # percent, or a word such as fails
  no_shift: {options: "--config pretrain:ablate/no_shift", published: fails}
```

The run of a stage lies in ``runs/SWEEP/VARIANT/STAGE``, a shared one in ``runs/SWEEP/shared/STAGE``. A sweep is therefore a
pipeline whose stages have names of two parts, and is built and checked as one.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from jobs.cluster import USER_ERROR
from jobs.launch import LaunchError, describe_job, launch_local, make_private
from jobs.options import CONFIGS, add_ways, recipe_names
from jobs.pipeline import (
    Part,
    Stage,
    add_values,
    build_stages,
    chosen,
    default_name,
    describe,
    read_stages,
    root_of,
    show_checks,
    split,
    words_for,
)
from jobs.runs import KINDS, read_outcome, write_outcome
from jobs.slurm import SubmitError
from jobs.snapshot import read_code
from jobs.sweep_jobs import Array, array_problems, describe_arrays, submit_arrays
from jobs.sweep_report import Entry, Summary, show, write_report, write_summary, write_table
from nepa_dist.config import ConfigError, Section, nearest
from nepa_dist.config_load import read_yaml
from nepa_dist.guard import EXIT_AGAIN, EXIT_FAILED

FOLDER = "sweep"
"""Of configs/: what sweeps consist of."""
SHARED = "shared"
"""Folder of the stages that run once, where a variant would have its own."""
SCORES_OF = {"finetune": ("top1", "top5"), "segment": ("miou", "macc", "aacc")}
"""Task -> what its validation measures."""

GAVE_UP = KINDS[EXIT_FAILED]


class VariantFields(Section):
    """One variant, as the file says it."""

    options: str = ""
    published: float | str | None = None


class SweepFile(Section):
    """The file of a sweep; its stages are read as those of a pipeline."""

    title: str = ""
    stages: dict[str, dict[str, str] | None]
    options: str = ""
    score: str
    shared: tuple[str, ...] = ()
    variants: dict[str, VariantFields | None]


class Sweep(NamedTuple):
    """What a file says, with ``runs`` in the order in which they are run."""

    title: str
    score: str
    """STAGE.METRIC."""
    stages: list[str]
    published: dict[str, float | str | None]
    """Variant -> what others report."""
    runs: list[Part]
    """Stages of all variants by the name VARIANT/STAGE, the shared ones first."""

    def of(self, variant: str) -> dict[str, str]:
        """Stage -> name of the run of it that a variant uses."""
        names = {run.name for run in self.runs}
        return {stage: name if (name := f"{variant}/{stage}") in names else f"{SHARED}/{stage}" for stage in self.stages}


def sweep_parser() -> argparse.ArgumentParser:
    """The options: those of a pipeline, and which variants."""
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py sweep",
        description="Run variants of a pipeline and compare them in a table: here one after the other, on SLURM as arrays. "
        "The same command goes on where it stopped. A variant that fails does not stop the others: that is its result.",
        epilog="Options are those of a stage. A value holds for all stages, and with STAGE: before it for one: "
        "--nodes pretrain:8 --set seed=3 --set finetune:steps=500",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", help=f"a YAML file, or one of configs/sweep: {', '.join(recipe_names(FOLDER))}")
    parser.add_argument("--recipe", metavar="NAME", help="the size in all stages, in place of what the file says")
    parser.add_argument("--variants", metavar="A,B", help="run only these")
    parser.add_argument("--stages", metavar="A,B", help="run only these")
    parser.add_argument("--retry", action="store_true", help="run again what gave up")
    parser.add_argument("--name", help="folder of the sweep in runs/; default: sweep-<sweep>[-<recipe>][-<data>]")
    add_ways(parser)
    add_values(parser)
    return parser


def main(argv: Sequence[str]) -> tuple[int, list[str]]:
    """The command line; returns the exit code, or 2 and the problems.

    The exit code is 0 if every variant has ended with a score or has given up, 75 if it was stopped, and 1 if a variant ended
    in another way, which the same command tries again.
    """
    args = sweep_parser().parse_args(argv)
    path, problems = _find(args.sweep)
    sweep, more = (None, []) if path is None else read_sweep(path, args.recipe)
    if sweep is None:
        return 2, [*problems, *more]
    variants, problems = chosen("variant", args.variants, sweep.published)
    stages, more = chosen("stage", args.stages, sweep.stages)
    if problems := [*problems, *more]:
        return 2, problems
    root, problems = root_of(args.name or default_name([FOLDER, Path(args.sweep).stem, args.recipe or ""], args))
    if problems:
        return 2, problems
    parts = [run for run in sweep.runs if run.stage in stages and run.name.split("/")[0] in (SHARED, *variants)]
    built, problems = build_stages(parts, args, root)
    if args.check:
        return show_checks(built, problems)
    launchers = {stage.checked.config.cluster.launcher for stage in built if stage.checked.config}
    if len(launchers) > 1:
        problems.append("some runs are to run here and some on SLURM: give one --cluster for all")
    on_slurm = launchers == {"slurm"}
    if on_slurm and not problems:
        problems += array_problems(arrays(built))
    if problems := problems or [*_twins(sweep, built)]:
        return 2, problems
    if args.dry_run:
        print(f"{len(variants)} variants, compared by {sweep.score}; table and pictures in {root}")
        print("\n".join([*map(_describe, arrays(built)), "", *describe(built)]))
        return 0, []
    if args.print:
        code = read_code(args.include)
        own = (line for stage in built for line in describe_job(stage.config, code))
        print("\n".join(describe_arrays(root, arrays(built), code) if on_slurm else own))
        return 0, []
    try:
        make_private(root)
        write_summary(root, _summary(sweep))
        if on_slurm:
            for line in submit_arrays(root, arrays(built), read_code(args.include)):
                print(line, flush=True)
            return 0, []
        return run_here(root, built, retry=args.retry), []
    except (LaunchError, SubmitError) as error:
        return 2, [f"{error} (what is listed above was submitted)"]
    except KeyboardInterrupt:
        print("interrupted between two runs; the same command goes on here", file=sys.stderr)
        return EXIT_AGAIN, []
    except (OSError, ValueError) as error:  # the disk is full, or somebody has damaged a file of a run
        print(f"{root}: {error}", file=sys.stderr)
        return EXIT_FAILED, []


def _describe(array: Array) -> str:
    count = "1 run" if len(array.runs) == 1 else f"{len(array.runs)} runs"
    after = (
        "" if array.after is None else f", each after its own {array.after}" if array.one_to_one else f", after {array.after}"
    )
    return f"{array.stage}: {count}{after}"


def read_sweep(path: Path, recipe: str | None = None) -> tuple[Sweep | None, list[str]]:
    """What a file says, None if there are problems, and sentences about them.

    Args:
        path: the file.
        recipe: in place of those of its stages.
    """
    try:
        file = SweepFile.model_validate(read_yaml(path))
    except ConfigError as error:
        return None, error.problems
    except ValueError as error:
        return None, [f"{path}: {text}" for text in _explain(error)]
    parts, problems = read_stages(path, {name: fields or {} for name, fields in file.stages.items()}, recipe or "")
    names = [part.name for part in parts]
    if not problems:
        problems = [f"{path}: {text}" for text in _file_problems(file, parts)]
    common, texts = _options(file.options)
    problems += [f"{path}: options: {text}" for text in texts]
    runs: list[Part] = []

    def add(owner: str, part: Part, own: Sequence[str]) -> None:
        start = None if part.start is None else f"{SHARED if part.start in file.shared else owner}/{part.start}"
        words = [*words_for(part, names, common), *part.words, *own]
        runs.append(Part(f"{owner}/{part.name}", part.task, recipe or part.recipe, start, words))

    for part in parts:
        if part.name in file.shared:
            add(SHARED, part, [])
    for variant, fields in file.variants.items():
        own, texts = _options(fields.options if fields else "")
        touched = {stage for value in _values(own) if (stage := split(value, file.shared)[0]) is not None}
        texts += [f"its options are for {stage}, which is shared by all variants" for stage in sorted(touched)]
        problems += [f"{path}: variant {variant}: {text}" for text in texts]
        for part in parts:
            if part.name not in file.shared:
                add(variant, part, list(words_for(part, names, own)))
    published = {variant: fields.published if fields else None for variant, fields in file.variants.items()}
    return (None, problems) if problems else (Sweep(file.title, file.score, names, published, runs), [])


def arrays(stages: Sequence[Stage]) -> list[Array]:
    """The runs of a sweep by stage, in the order of the pipeline: what can be submitted as one array each.

    Args:
        stages: of :func:`jobs.pipeline.build_stages`, for the runs of a sweep.
    """
    runs: dict[str, list[Stage]] = {}
    for stage in stages:
        runs.setdefault(stage.part.stage, []).append(stage)
    found = []
    for name, members in runs.items():
        owner, _, after = (members[0].part.start or "").partition("/")
        found.append(Array(name, members, after if after in runs else None, owner not in ("", SHARED)))
    return found


def run_here(root: Path, stages: Sequence[Stage], *, retry: bool = False) -> int:
    """Run all that is left to do, one after the other, then write table and pictures; returns the exit code.

    Args:
        root: folder of the sweep.
        stages: of :func:`jobs.pipeline.build_stages`.
        retry: run again what gave up.
    """
    by_name = {stage.part.name: stage for stage in stages}
    failed = False
    for number, stage in enumerate(stages, 1):
        title, run_dir = f"run {number} of {len(stages)}, {stage.part.name}", stage.config.run_dir
        outcome, start = read_outcome(run_dir), by_name.get(stage.part.start or "")
        if stage.is_finished:
            print(f"{title}: finished before, {run_dir}", flush=True)
        elif outcome is not None and outcome.kind == GAVE_UP and not retry:
            print(f"{title}: gave up before, {run_dir} says why; --retry runs it again", flush=True)
        elif start is not None and not start.is_finished:
            print(f"{title}: left out, {start.part.name} has no end to start with", flush=True)
        else:
            print(f"{title}:", flush=True)
            try:
                code = launch_local(stage.config, stage.checked.changes)
            except LaunchError as error:
                print(f"{title}: {error}", file=sys.stderr, flush=True)
                return USER_ERROR
            if code not in (0, EXIT_AGAIN):
                if read_outcome(run_dir) is None:  # ended from outside, as by the kernel when memory runs out
                    write_outcome(run_dir, "crashed", f"a rank ended with exit code {code}")
                outcome = read_outcome(run_dir)
                failed |= outcome is None or outcome.kind != GAVE_UP
                print(f"{title}: ended with exit code {code}; on with the others", file=sys.stderr, flush=True)
            write_table(root)
            if code == EXIT_AGAIN:
                print(f"{title}: stopped; the same command goes on here", file=sys.stderr, flush=True)
                return code
    print("\n".join(["", *(f"wrote {file}" for file in write_report(root)), "", *show(root)]))
    return int(failed)


def _find(name: str) -> tuple[Path | None, list[str]]:
    known = recipe_names(FOLDER)
    if name in known:
        return CONFIGS / FOLDER / f"{name}.yaml", []
    if name.endswith((".yaml", ".yml")):
        return Path(name), []
    return None, [f"unknown sweep {name!r}{nearest(name, known)} (known: {', '.join(known)}, or a YAML file)"]


def _file_problems(file: SweepFile, parts: Sequence[Part]) -> Iterator[str]:
    tasks = {part.name: part.task for part in parts}
    known = [f"{name}.{metric}" for name, task in tasks.items() for metric in SCORES_OF.get(task, ())]
    if file.score not in known:
        yield f"score {file.score!r} is none of {', '.join(known)}{nearest(file.score, known)}"
    elif file.score.split(".")[0] in file.shared:
        yield f"score {file.score!r}: its stage is shared, so it is the same for all variants"
    for name in file.shared:
        if name not in tasks:
            yield f"shared: no stage {name!r}{nearest(name, tasks)} (known: {', '.join(tasks)})"
    for part in parts:
        if part.name in file.shared and part.start is not None and part.start not in file.shared:
            yield f"{part.name} is shared and starts from {part.start}, which is not"
    if not file.variants:
        yield "no variants"
    for name in file.variants:
        if re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) is None or name == SHARED:
            yield f"variant {name!r}: a name takes small letters, digits, '-' and '_', and is not {SHARED!r}"


class _Options(argparse.ArgumentParser):
    """Options in a file: what is wrong with them is an error with the others, not the end of the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _options(text: str) -> tuple[argparse.Namespace, list[str]]:
    """The options that a file gives, each for all stages or for one, and sentences about what is wrong with them."""
    parser = _Options(add_help=False, allow_abbrev=False)
    add_values(parser)
    try:
        return parser.parse_args(shlex.split(text)), []
    except ValueError as error:
        return parser.parse_args([]), [f"{text!r}: {error}"]


def _values(args: argparse.Namespace) -> Iterator[str]:
    for values in vars(args).values():
        yield from values


def _twins(sweep: Sweep, stages: Sequence[Stage]) -> Iterator[str]:
    """Sentences about variants with the same settings in all their own stages; nothing is said about a part of the stages."""
    settings: dict[str, list[str]] = {}
    num_shared = sum(run.name.startswith(f"{SHARED}/") for run in sweep.runs)
    for stage in stages:
        values = stage.config.model_dump(mode="json", exclude={"name": True, "run_root": True, "init": {"path"}})
        settings.setdefault(stage.part.name.split("/")[0], []).append(json.dumps(values))
    settings.pop(SHARED, None)
    first: dict[str, str] = {}
    for variant, dumps in settings.items():
        other = first.setdefault("".join(dumps), variant)
        if other != variant and len(dumps) == len(sweep.stages) - num_shared:
            yield f"variants {other} and {variant} have the same settings: nothing differs, or the command line undoes it"


def _summary(sweep: Sweep) -> Summary:
    entries = {name: Entry(published=published, runs=sweep.of(name)) for name, published in sweep.published.items()}
    return Summary(title=sweep.title, score=sweep.score, variants=entries)


def _explain(error: ValueError) -> Iterator[str]:
    from pydantic import ValidationError

    assert isinstance(error, ValidationError)
    for item in error.errors():
        yield f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
