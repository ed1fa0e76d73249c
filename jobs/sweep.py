"""Variants of a run side by side: ``sweep ablate`` runs all of them and ends with one table and one picture.

A sweep is a file ``configs/sweep/NAME.yaml``:

```
task: pretrain                  # the command
recipe: vit_tiny
options: "--data digits"        # for all variants, as on the command line
score: linear                   # what they are compared by; default: loss
probe: "--num-train 2000"       # measure the features of each, for linear, knn_20, ...; options of nepa_dist.evaluate
variants:
  baseline: {published: 76.8}   # what others report, in the unit of the score (percent, for a share)
  no_shift: {options: "--config ablate/no_shift"}
```

On SLURM the variants are one array, here they run one after the other. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jobs.chain import report_job
from jobs.checks import Checked, check_stage
from jobs.findings import table
from jobs.launch import LaunchError, describe_job, launch_local, make_private, note_job, prepare_run
from jobs.options import CONFIGS, TASKS, absolute, add_ways, collect_layers, recipe_names, stage_parser
from jobs.probe import MODULE, RECORD, is_probed, one_gpu, probe_here
from jobs.runs import is_finished
from jobs.slurm import Job, SubmitError, batch_script, job_of, submit
from jobs.snapshot import CODE, read_code, write_snapshot
from jobs.sweep_table import SPEC, write_table
from nepa_dist.config import Config, nearest
from nepa_dist.guard import EXIT_AGAIN
from nepa_dist.run_folder import write_text

FOLDER = "sweep"
"""Of configs/: what sweeps consist of."""
TABLE = "jobs.sweep_table"
_KEYS = ("task", "recipe", "options", "score", "probe", "variants")
_VARIANT_KEYS = ("options", "published")


class Variant(NamedTuple):
    """One run of a sweep, checked."""

    name: str
    checked: Checked

    @property
    def config(self) -> Config:
        """Its configuration; only asked for where there are no problems."""
        assert self.checked.config is not None
        return self.checked.config


def main(argv: Sequence[str]) -> tuple[int, list[str]]:
    """The command line; returns the exit code, or 2 and the problems."""
    args, more = _parser().parse_known_args(argv)
    spec, problems = read_spec(args.sweep)
    if problems:
        return 2, problems
    root = Path(absolute("runs")) / (args.name or f"sweep-{Path(args.sweep).stem}")
    wanted = args.only.split(",") if args.only else list(spec["variants"])
    problems = [
        f"--only: no variant {name!r}{nearest(name, spec['variants'])}" for name in wanted if name not in spec["variants"]
    ]
    if problems:
        return 2, problems
    variants, problems = _build(spec, wanted, args, more, root)
    if args.check:
        for variant in variants:
            print("\n".join([f"{variant.name}:", *(f"  {line}" for line in table(variant.checked.findings))]))
        print(f"{len(problems) or 'no'} problems, nothing was started")
        return 2 if problems else 0, []
    if problems:
        return 2, problems
    if args.dry_run:
        for variant in variants:
            steps = "an unknown number of" if variant.checked.steps is None else f"{variant.checked.steps:,}"
            print(f"{variant.name}: {steps} steps on {variant.config.cluster.world_size} ranks; {variant.config.run_dir}")
        return 0, []
    try:
        if variants[0].config.cluster.launcher == "slurm":
            return _as_array(root, variants, spec, args), []
        return _here(root, variants, spec, args), []
    except (LaunchError, SubmitError, OSError) as error:
        return 2, [str(error)]


def read_spec(name: str) -> tuple[dict[str, Any], list[str]]:
    """The content of a sweep's file, and sentences about what is wrong with it.

    Args:
        name: in ``configs/sweep``, or a path that ends in ``.yaml``.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / FOLDER / f"{name}.yaml"
    if not path.exists():
        known = recipe_names(FOLDER)
        return {}, [f"unknown sweep {name!r}{nearest(name, known)} (known: {', '.join(known)}, or a file)"]
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"{path}: {' '.join(str(error).split())}"]
    return (spec, []) if not (problems := [f"{path}: {text}" for text in _spec_problems(spec)]) else ({}, problems)


def _spec_problems(spec: Any) -> Iterator[str]:
    if not isinstance(spec, dict) or not isinstance(spec.get("variants"), dict) or not spec["variants"]:
        yield "expected task, recipe and variants: {NAME: {options, published}}"
        return
    yield from (f"unknown key {key!r}{nearest(str(key), _KEYS)}" for key in spec if key not in _KEYS)
    if spec.get("task") not in TASKS:
        yield f"task {spec.get('task')!r} is none of {', '.join(TASKS)}"
    if not isinstance(spec.get("recipe"), str):
        yield "recipe is missing"
    if not isinstance(spec.get("probe", ""), str):
        yield 'probe must be a text, such as "" or "--num-train 2000"'
    for name, fields in spec["variants"].items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", str(name)) or not isinstance(fields or {}, dict):
            yield f"variant {name!r} must be a name of letters, digits, . _ and -, with {{options, published}}"
            continue
        for key, value in (fields or {}).items():
            if key not in _VARIANT_KEYS:
                yield f"{name}: unknown key {key!r}{nearest(str(key), _VARIANT_KEYS)}"
            if key == "published" and (isinstance(value, bool) or not isinstance(value, int | float)):
                yield f"{name}: published must be a number, not {value!r}"


def _build(
    spec: Mapping[str, Any], wanted: Sequence[str], args: argparse.Namespace, more: Sequence[str], root: Path
) -> tuple[list[Variant], list[str]]:
    """Check all variants; returns them and their problems, each with the variants that have it."""
    found: dict[str, list[str]] = {}
    variants = []
    for name in wanted:
        own = (spec["variants"][name] or {}).get("options", "")
        words = [*shlex.split(str(spec.get("options", ""))), *shlex.split(str(own)), *more]
        stage_args = stage_parser(spec["task"]).parse_args([spec["recipe"], *words, f"--run-dir={root / name}"])
        for way in ("dry_run", "print", "check", "skip_check", "include"):
            setattr(stage_args, way, getattr(args, way))
        stage_args.job_folder = str(root)
        layers, problems = collect_layers(stage_args)
        checked = check_stage(stage_args, layers)
        for problem in [*problems, *checked.problems]:
            found.setdefault(problem, []).append(name)
        variants.append(Variant(name, checked))
    problems = [f"{', '.join(names) if len(names) < len(wanted) else 'all'}: {problem}" for problem, names in found.items()]
    if not problems and len({repr(variant.config.cluster) for variant in variants}) > 1:
        problems.append("the variants have different clusters or resources: an array has one for all")
    return variants, problems


def _here(root: Path, variants: Sequence[Variant], spec: Mapping[str, Any], args: argparse.Namespace) -> int:
    if args.print:
        for variant in variants:
            print("\n".join(describe_job(variant.config, read_code(args.include))))
        return 0
    make_private(root)
    write_text(root / SPEC, yaml.safe_dump(dict(spec), sort_keys=False))
    worst = 0
    for number, (name, checked) in enumerate(variants, 1):
        config, title = variants[number - 1].config, f"variant {number} of {len(variants)}, {name}"
        if is_finished(config.run_dir, checked.steps):
            print(f"{title}: finished before", flush=True)
            code = 0
        else:
            print(f"{title}:", flush=True)
            code = launch_local(config, checked.changes)
        if code == EXIT_AGAIN:
            return code  # somebody wants this to end
        if not code and "probe" in spec and not is_probed(config.run_dir):
            code = probe_here(config.run_dir, shlex.split(spec["probe"]))
        worst = max(worst, code)
        print("\n".join(f"wrote {path}" for path in write_table(root)), flush=True)
    return worst


def _as_array(root: Path, variants: Sequence[Variant], spec: Mapping[str, Any], args: argparse.Namespace) -> int:
    """Submit what is not finished as one array, the probes as another that follows it task by task, and the table."""
    code = read_code(args.include)
    left = [variant for variant in variants if not is_finished(variant.config.run_dir, variant.checked.steps)]
    if args.print:
        print(batch_script(_array(root, left or variants, root / CODE / code.digest[:12])))
        return 0
    make_private(root)
    place = write_snapshot(code, root)
    write_text(root / SPEC, yaml.safe_dump(dict(spec), sort_keys=False))
    after = ""
    if left:
        for variant in left:
            prepare_run(variant.config, code)
        job = _array(root, left, place)
        number = submit(job)
        for index, variant in enumerate(left):
            note_job(job, variant.config.run_dir, f"{number}_{index}")
        print(f"job {number}: {len(left)} runs, {', '.join(variant.name for variant in left)}")
        after = f"afterany:{number}"
    if "probe" in spec and (probes := left or [v for v in variants if not is_probed(v.config.run_dir)]):
        job = _array(root, probes, place, f"aftercorr:{number}" if left else "")
        job = job._replace(
            name=f"{root.name}-probe", module=(MODULE, *shlex.split(spec["probe"])), record=RECORD, cluster=one_gpu(job.cluster)
        )
        second = submit(job)
        after = ":".join(filter(None, [after or "afterany", second]))
        print(f"job {second}: probes each of them")
    last = submit(report_job(root, variants[0].config.cluster, place, after, TABLE))
    print(f"job {last}: writes {root}/table.md, table.csv and figures/; python jobs/submit.py status {root}")
    return 0


def _array(root: Path, variants: Sequence[Variant], place: Path, after: str = "") -> Job:
    job = job_of(variants[0].config, place, root, after)
    return job._replace(name=root.name, runs=tuple(variant.config.run_dir for variant in variants), is_array=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py sweep",
        description="Run all variants of a sweep; the same command goes on. Further options are those of its task.",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", help=f"{', '.join(recipe_names(FOLDER)) or 'a name in configs/sweep'}, or a YAML file")
    parser.add_argument("--only", metavar="A,B", help="only these variants")
    parser.add_argument("--name", help="folder of the sweep in runs/; default: sweep-<sweep>")
    add_ways(parser)
    return parser
