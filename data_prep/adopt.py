"""Make a prepared split of shards that another program wrote (webdataset, streaming, ffcv), without touching them.

Index, names, digests and manifest are put beside the shards. Everything in them is read by our own scanner, which trusts
nothing. The name of a sample is its shard and what the shard calls it, so ids follow the names of the shards.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.files import PrepError, UsageError, is_plain, sha256_of, sweep
from data_prep.finish import ADOPTED, array_bytes, seal
from data_prep.formats.base import Scan, ShardError
from data_prep.formats.mds import INDEX as MDS_INDEX
from data_prep.formats.registry import CONTAINERS, get_format
from data_prep.plan import PLAN, Container
from data_prep.pool import Report, run
from data_prep.progress import Meter
from nepa_dist.data.index import INDEX, NAMES, RAW, Manifest, ShardRecord, content_sha256

_MAX_CLASSES = 100_000
"""Without class names; a label beyond is damage rather than a class."""


def adopt(
    folder: Path,
    *,
    name: str | None = None,
    split: str | None = None,
    class_names: list[str] | None = None,
    workers: int = 1,
    quiet: bool = False,
) -> Manifest:
    """Index the shards of a folder, all of one container and not compressed. The same again changes nothing.

    Args:
        folder: with the shards.
        name: of the data set; default: the name of the folder.
        split: which part it is; default: the name of the folder if that is ``train`` or ``val``, else ``train``.
        class_names: of the labels 0, 1, ...; default: their numbers.
        workers: processes.
        quiet: show no progress.

    Raises:
        UsageError: there are no such shards, or they are of several kinds, or a label has no class name.
        PrepError: shards are damaged, missing or hostile; all are listed.
        OSError: a file cannot be read or written.
    """
    container, paths = _find_shards(folder)
    sweep(folder)
    job = _Scan(container, paths)
    with Meter(f"adopt {folder.name}", len(paths), quiet=quiet, unit="shards") as meter:
        results = dict(run(job, range(len(paths)), workers=workers, describe=job.describe, on_progress=meter.add))
    found = [results[k] for k in range(len(paths))]
    if problems := [line for result in found for line in result.problems]:
        raise PrepError(*problems)
    names = [f"{path.name}/{key}" for path, result in zip(paths, found, strict=True) for key in result.keys]
    order = np.array(sorted(range(len(names)), key=lambda i: names[i].encode()), np.int64)
    index = np.concatenate([result.scan.records for result in found])
    index["shard"] = np.repeat(np.arange(len(found)), [len(result.keys) for result in found])
    index = index[order]
    index_bytes, name_bytes = array_bytes(index), "".join(f"{names[i]}\n" for i in order).encode()
    shards = [result.shard for result in found]
    digests = "".join(shard.sha256 for shard in shards)
    manifest = Manifest(
        name=name or re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name),
        split=split or (folder.resolve().name if folder.resolve().name in ("train", "val") else "train"),
        container=container,
        policy="raw" if (index["encoding"] == RAW).all() else "keep",
        num_samples=len(index),
        class_names=_classes(int(index["label"].max()), class_names),
        class_titles=[],
        source={"kind": ADOPTED, "fingerprint": hashlib.sha256(digests.encode()).hexdigest()},
        content_sha256=content_sha256(index),
        plan_sha256="",
        index_sha256=hashlib.sha256(index_bytes).hexdigest(),
        names_sha256=hashlib.sha256(name_bytes).hexdigest(),
        shards=shards,
        repairs={},
        versions={},
    )
    seal(folder, manifest, {INDEX: index_bytes, NAMES: name_bytes})
    return manifest


class _Scanned(NamedTuple):
    shard: ShardRecord
    scan: Scan
    problems: list[str]

    @property
    def keys(self) -> list[str]:
        return self.scan.keys


@dataclass(frozen=True)
class _Scan:
    """Reads one shard."""

    container: str
    paths: list[Path]

    def __call__(self, shard: int, report: Report, /) -> _Scanned:
        path = self.paths[shard]
        try:
            scan, problems = get_format(self.container).scan_shard(path), []
        except ShardError as error:
            scan = Scan(np.zeros(0), [])
            problems = [f"{path}: {where}: {reason}" if where else f"{path}: {reason}" for where, reason in error.problems]
        size = path.stat().st_size
        record = ShardRecord(path.name, size, "" if problems else sha256_of(path), len(scan.keys))
        report.done(size)
        return _Scanned(record, scan, problems)

    def describe(self, shard: int, _: int) -> str:
        """Name a shard for a message."""
        return str(self.paths[shard])


def _find_shards(folder: Path) -> tuple[Container, list[Path]]:
    """The container and the shards of a folder, sorted by the bytes of their names."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder")
    if (folder / PLAN).exists():
        raise UsageError(f"{folder} is a split of our own already; write finishes it")
    by_container: dict[Container, list[Path]] = {name: [] for name in CONTAINERS}
    for path in folder.iterdir():
        container = next((name for name in CONTAINERS if path.name.endswith(f".{name}")), None)
        if container and not path.name.startswith("."):
            if not path.is_file() or not is_plain(path.name) or not path.name.isprintable():
                raise UsageError(f"{path} is no plain file with a printable name")
            by_container[container].append(path)
        elif re.search(r"\.(tar|mds)\.[a-z0-9]+$", path.name) or path.name.endswith(".tgz"):
            raise UsageError(f"{path} is compressed; unpack the shards first (images do not get smaller)")
    kinds = [name for name, paths in by_container.items() if paths]
    if len(kinds) != 1:
        what = f"holds shards of {' and '.join(kinds)}" if kinds else "holds no *.tar, *.mds or *.beton"
        raise UsageError(f"{folder} {what}; a split has shards of one kind")
    paths = sorted(by_container[kinds[0]], key=lambda path: path.name.encode())
    if kinds[0] == "mds":
        _check_mds_index(folder, {path.name for path in paths})
    return kinds[0], paths


def _check_mds_index(folder: Path, names: set[str]) -> None:
    """Where streaming's own index lists shards, they must be those that are there."""
    path = folder / MDS_INDEX
    if not path.is_file():
        return
    try:
        listed = {str(shard["raw_data"]["basename"]) for shard in json.loads(path.read_bytes())["shards"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PrepError(f"{path} cannot be understood; delete it to adopt the shards that are there") from None
    if lost := sorted(listed - names):
        raise PrepError(*(f"{folder / name} is missing, {MDS_INDEX} lists it" for name in lost))
    if extra := sorted(names - listed):
        raise PrepError(*(f"{folder / name} is not in {MDS_INDEX}; it may be of another writing" for name in extra))


def _classes(highest: int, given: list[str] | None) -> list[str]:
    """Class names up to the highest label."""
    if given is not None:
        if highest >= len(given):
            raise UsageError(f"there are {len(given)} class names, but labels up to {highest}")
        if odd := sorted({name for name in given if not name.strip() or given.count(name) > 1}):
            raise UsageError(f"each class needs a name of its own; empty, or given more than once: {odd}")
        return given
    if highest >= _MAX_CLASSES:
        raise UsageError(f"there are labels up to {highest:,}; give the names of the classes if that is right")
    return [str(label) for label in range(highest + 1)]
