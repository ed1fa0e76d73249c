"""What each action of the command line does. Each returns whether all is good."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from data_prep.adopt import adopt
from data_prep.cross_check import cross_check
from data_prep.files import PrepError, UsageError, human_bytes, write_file
from data_prep.open_source import open_source
from data_prep.plan import PLAN, Plan, load_plan, make_plan
from data_prep.pool import num_workers
from data_prep.skip import keep_skip_list, read_skip_list, without_skipped
from data_prep.sources import Source, SourceError, Split
from data_prep.stage import stage_split
from data_prep.verify import LEVELS, Verification, class_counts, verify_split
from data_prep.write import BadSamplesError, write_split
from nepa_dist.data.index import INDEX, MANIFEST, Manifest, ManifestError, read_index, read_manifest

_SPLITS: tuple[Split, ...] = ("train", "val")
_SHOWN = 100


def plan(args: Namespace) -> bool:
    """Plan the splits of a source."""
    entries = read_skip_list(args.skip_bad_list) if args.skip_bad_list else []
    if entries and args.split == "all":
        raise UsageError("--skip-bad-list is about one split; say which with --split")
    if len(entries) > args.max_bad:
        count = len(entries)
        raise UsageError(f"{args.skip_bad_list} leaves out {count} images; if that is right, pass --max-bad {count}")
    for split in _SPLITS if args.split == "all" else (args.split,):
        source = _open(args, split)
        # The others know their files by name.
        if source.kind in ("folder", "parquet") and args.out.resolve().is_relative_to(args.source.resolve()):
            raise UsageError(f"OUT {args.out} lies in SOURCE {args.source} and would become part of it; choose another OUT")
        folder = args.out / split
        keep_skip_list(folder, entries)
        made = make_plan(
            without_skipped(source, folder),
            folder,
            name=args.name or re.sub("[^A-Za-z0-9._-]", "-", args.source.resolve().name).lstrip("._-") or "data",
            container=args.container,
            # Segmentation crops more than 256 pixels.
            policy=args.policy or ("keep" if source.has_masks else "short256"),
            seed=args.seed,
            num_shards=args.shards,
            shard_bytes=int(args.shard_mb * 1_000_000),
        )
        others = f", {len(entries)} left out" if entries else ""
        others += f", {source.num_ignored:,} other files ignored" if source.num_ignored else ""
        print(
            f"{folder}: {made.num_samples:,} images{others}, {len(made.class_names)} classes, {made.num_shards} shards "
            f"({made.container}, {made.policy})"
        )
    return True


def write(args: Namespace) -> bool:
    """Write the planned shards."""
    index, count = _task(args)
    problems: list[str] = []
    for folder in _planned(args):
        planned = load_plan(folder)
        source = without_skipped(_open(args, planned.split, planned.source["kind"]), folder)
        try:
            done = write_split(
                folder,
                source,
                workers=num_workers(args.workers),
                shards=range(index, planned.num_shards, count),
                check=args.check,
                quiet=args.quiet,
            )
        except BadSamplesError as error:
            once, again = f"rm -r {shlex.quote(str(folder))}", _without_bad(args, planned, error)
            problems += [*error.problems, f"To leave them out, delete this split once and prepare anew:\n  {once}\n  {again}"]
            continue
        state = f"{done.missing} shards are missing, of other tasks" if done.missing else "finished"
        print(f"{folder}: {done.written} shards written, {done.kept} were there; {state}")
    if problems:
        raise PrepError(*problems)
    return True


def prepare(args: Namespace) -> bool:
    """Plan, write and verify."""
    args.task_index, args.num_tasks = 0, 1
    plan(args)
    write(args)
    found = [verify_split(folder, workers=num_workers(args.workers), quiet=args.quiet) for folder in _planned(args)]
    good = _show(found)
    if not good:
        again = shlex.join(["python", "-m", "data_prep", "write", str(args.source), str(args.out), "--check"])
        print(f"To write damaged shards again: {again}", file=sys.stderr)
    return good


def verify(args: Namespace) -> bool:
    """Verify, or compare with another."""
    level = args.level or ("cross" if args.other else "hash")
    if (level == "cross") != (args.other is not None):
        raise UsageError(
            "level cross compares OUT with OTHER" if args.other is None else f"OTHER is for level cross, not {level}"
        )
    workers = num_workers(args.workers)
    if level == "cross":
        found = [cross_check(one, two, workers=workers, quiet=args.quiet) for one, two in _pairs(args.out, args.other)]
    else:
        assert level in LEVELS
        found = [verify_split(folder, level=level, workers=workers, quiet=args.quiet) for folder in _splits(args.out)]
    if args.json:
        report = {"good": all(each.good for each in found), "splits": [each.to_json() for each in found]}
        write_file(args.json, (json.dumps(report, indent=1) + "\n").encode())
    return _show(found)


def stage(args: Namespace) -> bool:
    """Copy to this node."""
    folders = _splits(args.out)
    single = folders == [args.out]
    done = []
    for folder in folders:
        copy = stage_split(folder, args.dest if single else args.dest / folder.name, check=args.check, quiet=args.quiet)
        done.append(copy)
        print(
            f"{copy.folder}: {copy.copied_files} files copied ({human_bytes(copy.copied_bytes)}), {copy.kept_files} were there",
            file=sys.stderr,
        )
    if args.json:
        splits = [copy._asdict() | {"folder": str(copy.folder)} for copy in done]
        print(json.dumps({"folder": str(args.dest), "splits": splits}))
    else:
        print(args.dest)
    return True


def adopt_folder(args: Namespace) -> bool:
    """Index the shards of another program."""
    try:
        names = args.class_names.read_text().rstrip("\n").split("\n") if args.class_names else None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--class-names {args.class_names} cannot be read: {error}") from None
    workers = num_workers(args.workers)
    manifest = adopt(args.folder, name=args.name, split=args.split, class_names=names, workers=workers, quiet=args.quiet)
    print(f"{args.folder}: {_summary(manifest)}")
    return True


def info(args: Namespace) -> bool:
    """Tell what a prepared data set is."""
    for folder in _splits(args.out):
        if not (folder / MANIFEST).exists():
            planned = load_plan(folder)
            print(f"{folder}: not finished: {planned.num_samples:,} images planned in {planned.num_shards} shards")
            continue
        try:
            manifest = read_manifest(folder / MANIFEST)
            index = read_index(folder / INDEX, manifest)
        except ManifestError as error:
            raise PrepError(str(error)) from None
        lines = {"content": _summary(manifest), "name": f"{manifest.name}, {manifest.split}", "policy": manifest.policy}
        if manifest.class_names:
            counts = class_counts(index, len(manifest.class_names))
            lines["classes"] = f"{len(counts)} with {counts.min():,} to {counts.max():,} images, {manifest.class_names[0]} ..."
        lines["unlabelled"] = f"{int((index['label'] < 0).sum()):,}"
        lines["masks"] = f"{int((index['mask_length'] > 0).sum()):,}"
        for what in ("height", "width", "length"):
            values = index[what]
            unit = "bytes per image" if what == "length" else "pixels"
            lines[what] = f"{values.min():,} to {values.max():,}, mean {values.mean():,.0f} {unit}"
        lines["repairs"] = ", ".join(f"{kind} {count:,}" for kind, count in manifest.repairs.items()) or "none"
        lines["source"] = ", ".join(f"{key} {value}" for key, value in sorted(manifest.source.items()))
        lines["digest"] = manifest.content_sha256
        lines["made by"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "others"
        print(f"{folder}\n" + "\n".join(f"  {key:<11}{value}" for key, value in lines.items()))
    return True


def _summary(manifest: Manifest) -> str:
    size = human_bytes(sum(shard.bytes for shard in manifest.shards))
    return f"{manifest.num_samples:,} images in {len(manifest.shards)} shards ({manifest.container}), {size}"


def _show(found: list[Verification]) -> bool:
    """Print what verifying found."""
    for each in found:
        lines = each.lines()
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        for line in [*lines[:_SHOWN], *more]:
            print(f"error: {line}", file=sys.stderr)
        for warning in each.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        state = "good" if each.good else f"{len(lines)} problems"
        about = f"{_summary(each.manifest)}: " if each.manifest else ""
        compared = "".join(f", {count:,} {kind.replace('_', ' ')}" for kind, count in each.compared.items())
        print(f"{each.folder}: {about}{state} (level {each.level}{compared})")
    return all(each.good for each in found)


def _open(args: Namespace, split: str, kind: str | None = None) -> Source:
    """The source of one split. ``val-labels`` concern that of ImageNet alone."""
    assert split in _SPLITS
    options: dict[str, Any] = {"image_column": args.image_column, "label_column": args.label_column}
    if split == "val":
        options["val_labels"] = args.val_labels
    try:
        return open_source(args.source, kind=kind or args.kind, split=split, **options)
    except SourceError as error:
        if args.split == "all":
            raise SourceError(f"{error}\n(this is about the split {split}; --split prepares one alone)") from None
        raise


def _splits(out: Path) -> list[Path]:
    """Folders of the splits in a prepared data set: itself, or those in it."""
    if any((out / name).exists() for name in (MANIFEST, PLAN)):
        return [out]
    try:
        inside = sorted(path for path in out.iterdir() if any((path / name).exists() for name in (MANIFEST, PLAN)))
    except OSError as error:
        raise UsageError(f"{out} cannot be read: {error.strerror}") from None
    if not inside:
        raise UsageError(f"{out} holds no prepared split (a folder with {MANIFEST}), and is none")
    return inside


def _planned(args: Namespace) -> list[Path]:
    """Folders of the splits that are to be written."""
    wanted = _SPLITS if args.split == "all" else (args.split,)
    folders = [args.out / split for split in wanted if (args.out / split / PLAN).exists()]
    if not folders:
        raise UsageError(
            f"{args.out} holds no plan of the split {args.split}; make one first: python -m data_prep plan SOURCE OUT"
        )
    return folders


def _pairs(out: Path, other: Path) -> list[tuple[Path, Path]]:
    """Splits that are to be compared, by their names, or the only ones."""
    ones, others = _splits(out), _splits(other)
    if len(ones) == len(others) == 1:
        return [(ones[0], others[0])]
    by_name = {path.name: path for path in others}
    if [path.name for path in ones] != [path.name for path in others]:
        names = [", ".join(path.name for path in paths) for paths in (ones, others)]
        raise UsageError(f"{out} holds the splits {names[0]}, {other} holds {names[1]}; compare splits of the same names")
    return [(path, by_name[path.name]) for path in ones]


def _task(args: Namespace) -> tuple[int, int]:
    """Which task this is, and of how many."""
    index, count = args.task_index, args.num_tasks
    if (index is None) != (count is None):
        raise UsageError("--task-index and --num-tasks go together")
    if index is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        number, first, step = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{part}", default)) for part, default in (("ID", 0), ("MIN", 0), ("STEP", 1))
        )
        count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", 1))
        index = (number - first) // max(step, 1)
    index, count = index or 0, 1 if count is None else count
    if count < 1 or not 0 <= index < count:
        raise UsageError(f"there is no task {index} of {count}: they count from 0; give --task-index and --num-tasks")
    return index, count


def _without_bad(args: Namespace, planned: Plan, error: BadSamplesError) -> str:
    """The command that prepares a split without its unusable images."""
    num_bad = len(read_skip_list(error.path))
    options = {
        "--split": planned.split,
        "--kind": planned.source["kind"],
        "--container": planned.container,
        "--policy": planned.policy,
        "--shards": max(1, min(planned.num_shards, planned.num_samples - num_bad)),
        "--seed": planned.seed,
        "--name": planned.name,
        "--val-labels": args.val_labels if planned.split == "val" else None,
        "--image-column": args.image_column,
        "--label-column": args.label_column,
        "--skip-bad-list": error.path,
        "--max-bad": num_bad,
    }
    words = ["python", "-m", "data_prep", "prepare", str(args.source), str(args.out)]
    words += [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    return shlex.join(words)
