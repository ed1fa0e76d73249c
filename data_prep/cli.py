"""The command line: ``python -m data_prep plan|write|prepare|verify|stage|adopt|info``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from data_prep import commands
from data_prep.files import PrepError, UsageError
from data_prep.formats.base import ShardError
from data_prep.formats.registry import CONTAINERS
from data_prep.open_source import KINDS
from data_prep.plan import PlanError
from data_prep.policy import PolicyError
from data_prep.sources import SourceError
from data_prep.verify import LEVELS
from nepa_dist.data.containers import DataError

GOOD, DAMAGED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

_MISTAKES = (UsageError, PlanError, PolicyError, SourceError, DataError)


def main(argv: list[str] | None = None) -> int:
    """Command line.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        0; 1 where something is damaged or incomplete; 2 for a mistake of the user; 130 if interrupted.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return GOOD if args.run(args) else DAMAGED
    except _MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except PrepError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return DAMAGED
    except (OSError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return DAMAGED
    except KeyboardInterrupt:
        print("interrupted; what is finished stays, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _megabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError(text)
    return value


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    plan = actions.add_parser("plan", help="settle which image goes into which shard; writes no image")
    _add_places(plan)
    _add_source(plan)
    _add_plan(plan)
    plan.set_defaults(run=commands.plan)

    write = actions.add_parser("write", help="write the shards that are missing, here or as one of several tasks")
    _add_places(write)
    _add_source(write)
    _add_work(write)
    write.add_argument("--check", action="store_true", help="hash the shards that are there instead of looking at their sizes")
    write.add_argument("--task-index", type=int, help="which of the tasks this is, from 0; default: that of the Slurm array")
    write.add_argument("--num-tasks", type=int, help="tasks that share the work; default: those of the Slurm array, or 1")
    write.set_defaults(run=commands.write)

    prepare = actions.add_parser("prepare", help="plan, write and verify; the same command again goes on after an interruption")
    add_prepare_options(prepare)
    prepare.set_defaults(run=commands.prepare, check=False)

    verify = actions.add_parser("verify", help="is it what was written?")
    verify.add_argument("out", type=Path, metavar="OUT", help="prepared data set, or one split of it")
    verify.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="for level cross: the one to compare with")
    verify.add_argument("--level", choices=[*LEVELS, "cross"], help="default: hash; with OTHER: cross")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write a report")
    _add_work(verify)
    verify.set_defaults(run=commands.verify)

    stage = actions.add_parser("stage", help="copy to a disk of this node, once per node; prints the folder to use")
    stage.add_argument("out", type=Path, metavar="OUT", help="prepared data set, or one split of it")
    stage.add_argument("dest", type=Path, metavar="DEST", help="folder on the node, such as below /tmp or /dev/shm")
    stage.add_argument("--check", action="store_true", help="hash a finished copy instead of looking at its sizes")
    stage.add_argument("--json", action="store_true", help="print a JSON object instead of the folder")
    stage.add_argument("--quiet", action="store_true", help="show no progress")
    stage.set_defaults(run=commands.stage)

    adopt = actions.add_parser("adopt", help="index shards written by webdataset, streaming or ffcv; they are not touched")
    adopt.add_argument("folder", type=Path, metavar="FOLDER", help="folder with the shards of one split")
    adopt.add_argument("--name", help="of the data set; default: the name of the folder")
    adopt.add_argument("--split", choices=["train", "val"], help="default: the name of the folder, or train")
    adopt.add_argument("--class-names", type=Path, metavar="FILE", help="one name per line, in the order of the labels")
    _add_work(adopt)
    adopt.set_defaults(run=commands.adopt_folder)

    info = actions.add_parser("info", help="counts, classes, policy, sizes, repairs, digest")
    info.add_argument("out", type=Path, metavar="OUT", help="prepared data set, or one split of it")
    info.set_defaults(run=commands.info)
    return parser


def add_prepare_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the action ``prepare``, for this command line or another that offers it."""
    _add_places(parser)
    _add_source(parser)
    _add_plan(parser)
    _add_work(parser)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the data set as it was downloaded")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the prepared data set; each split gets a folder in it")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=["train", "val", "all"], default="all", help="default: all")
    parser.add_argument("--kind", choices=["auto", *KINDS], default="auto", help="what SOURCE is; default: by its look")
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help="labels of ImageNet's validation images")
    parser.add_argument("--image-column", metavar="NAME", help="of Parquet files where several could be it")
    parser.add_argument("--label-column", metavar="NAME", help="of Parquet files where several could be it")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--container", choices=CONTAINERS, default="tar", help="default: tar")
    parser.add_argument(
        "--policy", help="keep, shortN, shortN-qQ, or raw, rawN (beton); default: short256, for images with class masks keep"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shards", type=int, metavar="N", help="number of shards per split")
    size.add_argument("--shard-mb", type=_megabytes, metavar="MB", default=64.0, help="size of a shard; default: 64")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle; default: 0")
    parser.add_argument("--name", help="of the data set; default: the name of SOURCE")
    parser.add_argument("--skip-bad-list", type=Path, metavar="FILE", help="leave out the images that this list names")
    parser.add_argument("--max-bad", type=int, default=0, metavar="N", help="how many the list may name; default: 0")


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one per core of this process")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
