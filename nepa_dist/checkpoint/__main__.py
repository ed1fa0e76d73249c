"""``python -m nepa_dist.checkpoint inspect|verify RUN``: the checkpoints of a run, and whether they are as they were saved."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.checkpoint.store import CheckpointStore


def main(argv: list[str] | None = None) -> int:
    """Command line.

    Args:
        argv: arguments; default: the command line.

    Returns:
        0; 1 if a checkpoint is damaged; 2 if there is none.
    """
    parser = argparse.ArgumentParser(prog="python -m nepa_dist.checkpoint", description="Look at the checkpoints of a run.")
    parser.add_argument("action", choices=["inspect", "verify"], help="inspect: headers only; verify: read and hash every byte")
    parser.add_argument("run", type=Path, help="folder of the run")
    args = parser.parse_args(argv)
    store = CheckpointStore(args.run / "checkpoints")
    try:
        steps = store.steps()
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    if not steps:
        print(f"{args.run} holds no checkpoint", file=sys.stderr)
        return 2
    lines = [_describe(store.path(step), check_digests=args.action == "verify") for step in steps]
    print("\n".join(text for text, _ in lines))
    return 0 if all(intact for _, intact in lines) else 1


def _describe(path: Path, *, check_digests: bool) -> tuple[str, bool]:
    """One line about a checkpoint, and whether it is intact as far as it was looked at."""
    try:
        manifest = CheckpointStore.verify(path, check_digests=check_digests)
    except CheckpointError as error:
        return f"{path.name}  DAMAGED  {error}", False
    size = sum(file.bytes for file in manifest.files)
    config = manifest.meta.get("config", {})
    engine, world = config.get("engine", {}).get("name", "?"), manifest.meta.get("world_size", "?")
    checked = "verified" if check_digests else "complete"
    return f"{path.name}  {checked}  {manifest.created}  {size / 1e6:.1f} MB  {engine} on {world} ranks", True


if __name__ == "__main__":
    sys.exit(main())
