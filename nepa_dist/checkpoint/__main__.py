"""``python -m nepa_dist.checkpoint inspect|verify|convert RUN``: what a run saved, whether it is intact, and parts of it.

RUN may also be the folder of one checkpoint, as ``convert`` makes it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any, get_args

from nepa_dist.checkpoint.convert import DTYPES, What, convert
from nepa_dist.checkpoint.folder import list_damage, step_of
from nepa_dist.checkpoint.manifest import Manifest
from nepa_dist.checkpoint.portable import CheckpointError, StateReader
from nepa_dist.checkpoint.store import CheckpointStore

_COLUMNS = ("step", "samples", "created", "size", "engine", "ranks", "precision", "parameters", "fields")


def main(argv: list[str] | None = None) -> int:
    """Command line.

    Args:
        argv: arguments; default: the command line.

    Returns:
        0; 1 if ``inspect`` or ``verify`` found damage; 2 if there is nothing to look at, or ``convert`` could not.
    """
    args = _parser().parse_args(argv)
    try:
        paths = _checkpoints(args.run)
        if args.action == "convert":
            return _convert(args, paths)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    return (_inspect if args.action == "inspect" else _verify)(paths)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nepa_dist.checkpoint", description="Look at the checkpoints of a run.")
    actions = parser.add_subparsers(dest="action", required=True)
    inspect = actions.add_parser("inspect", help="a table of the checkpoints; reads headers only")
    verify = actions.add_parser("verify", help="read every byte and name each damaged file")
    make = actions.add_parser("convert", help="write a smaller checkpoint to a new folder; for weights alone: nepa_dist.export")
    for action in (inspect, verify, make):
        action.add_argument("run", type=Path, metavar="RUN", help="folder of the run, or of one checkpoint")
    make.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder")
    make.add_argument("--step", type=int, metavar="N", help="default: the newest checkpoint that verifies")
    make.add_argument("--what", choices=get_args(What), default="weights+ema", help="default: weights+ema")
    make.add_argument("--dtype", choices=list(DTYPES), help="default: as stored, fp32")
    return parser


def _checkpoints(run: Path) -> list[Path]:
    """Folders of the checkpoints of a run, ascending by step; of the one that is named itself."""
    if not run.is_dir():
        raise CheckpointError(f"{run} is neither a run nor a checkpoint: there is no such folder")
    if os.path.lexists(run / "manifest.json") or step_of(run.name) is not None:
        return [run]
    store = CheckpointStore(run / "checkpoints")
    if steps := store.steps():
        return [store.path(step) for step in steps]
    hint = f"; did you mean {run.absolute().parent}?" if CheckpointStore(run).steps() else ""
    raise CheckpointError(f"{run} holds no checkpoint{hint}")


def _inspect(paths: list[Path]) -> int:
    """Print a table; a checkpoint that is not complete comes after it, with the reason."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    damaged = []
    for path in paths:
        try:
            manifest = CheckpointStore.verify(path, check_digests=False)
            rows.append(_row(manifest, StateReader(path)))
        except CheckpointError as error:
            damaged.append(f"{path.absolute().name}  DAMAGED  {error}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows if len(rows) > 1 else []:
        # Numbers to the right, the list of fields, which is last, to the left.
        print("  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1], sep="  ")
    print("\n".join(damaged), end="\n" if damaged else "")
    return 1 if damaged else 0


def _row(manifest: Manifest, reader: StateReader) -> tuple[str, ...]:
    """The cells of a checkpoint; a fact that its manifest does not give is a question mark."""
    samples = _fact(manifest.meta, "state", "samples_seen")
    numel = sum(math.prod(reader.shape(name)) for name in reader.names() if "weight" in reader.fields(name))
    return (
        str(manifest.step),
        f"{samples:,}" if isinstance(samples, int) else samples,
        manifest.created,
        _size(manifest),
        str(_fact(manifest.meta, "config", "engine", "name")),
        str(_fact(manifest.meta, "world_size")),
        str(_fact(manifest.meta, "config", "engine", "precision")),
        f"{numel:,}",
        " ".join(reader.common_fields()) + (f"; {len(reader.frozen())} frozen: weight" if reader.frozen() else ""),
    )


def _verify(paths: list[Path]) -> int:
    found_damage = False
    for path in paths:
        if damage := list_damage(path):
            found_damage = True
            print(f"{path.absolute().name}  DAMAGED", *damage, sep="\n  ")
        else:
            manifest = CheckpointStore.verify(path, check_digests=False)
            count = len(manifest.files)
            print(f"{path.absolute().name}  verified  {_size(manifest)} in {count} file{'' if count == 1 else 's'}")
    return 1 if found_damage else 0


def _convert(args: argparse.Namespace, paths: list[Path]) -> int:
    by_step = {step_of(path.name): path for path in paths}
    if paths == [args.run]:
        if args.step is not None:
            raise CheckpointError(f"--step chooses among those of a run; {args.run} is one checkpoint")
        source = args.run
    elif args.step is None:
        found = CheckpointStore(args.run / "checkpoints").latest()
        for path, reason in found.passed_over:
            print(f"passed over {path.name}: {reason}", file=sys.stderr)
        if found.path is None:
            raise CheckpointError(f"{args.run} holds no checkpoint that verifies")
        source = found.path
    elif args.step in by_step:
        source = by_step[args.step]
    else:
        raise CheckpointError(f"{args.run} holds no checkpoint of step {args.step}, only of {', '.join(map(str, by_step))}")
    is_verified = args.step is None and source != args.run
    convert(source, args.to, what=args.what, dtype=DTYPES.get(args.dtype), check_digests=not is_verified)
    print(f"wrote {args.what} of {source} to {args.to}")
    return 0


def _fact(meta: dict[str, Any], *keys: str) -> Any:
    """A value of the manifest's meta by its path of keys; a question mark if it is not there."""
    value: Any = meta
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return "?"
        value = value[key]
    return value


def _size(manifest: Manifest) -> str:
    return f"{sum(file.bytes for file in manifest.files) / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
