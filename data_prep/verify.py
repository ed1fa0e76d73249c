"""Is a prepared split what was written? Each level does what the one before does, and more:

=========  =====================================================================================================
``quick``  the files are there with their sizes; the manifest has its digest
``index``  the small files have their digests, and the shards read without the index say what the index says
``hash``   every shard has its SHA-256; of one that has not, the damaged samples are named by their checksums
``decode`` every image and mask decodes to the size, and within the class table, that the index says
=========  =====================================================================================================

All problems are listed, not only the first. To compare two splits see :mod:`data_prep.cross_check`.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.files import SUMS, PrepError, read_sums, sha256_of
from data_prep.pool import run
from data_prep.progress import Meter
from data_prep.shard_check import Problem, ShardCheck
from nepa_dist.data.index import (
    INDEX,
    MANIFEST,
    NAMES,
    RAW,
    Manifest,
    ManifestError,
    content_sha256,
    read_index,
    read_manifest,
)

Level = Literal["quick", "index", "hash", "decode"]
LEVELS: tuple[Level, ...] = ("quick", "index", "hash", "decode")

_IMAGENET = {"train": (1_281_167, 732, 1300), "val": (50_000, 50, 50)}
"""Split -> images, fewest and most of a class."""


@dataclass
class Verification:
    """What was found in one split."""

    folder: Path
    level: str
    manifest: Manifest | None = None
    """None: it cannot be read."""
    index: NDArray[Any] | None = None
    """None: it cannot be used, or it was not looked at."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What is odd, but no damage."""
    compared: dict[str, int] = field(default_factory=dict)
    """What a comparison counted."""

    @property
    def good(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def lines(self) -> list[str]:
        """Each problem for people: file, sample, where it came from, reason."""
        names = self._names()
        lines = []
        for problem in self.problems:
            name = names[problem.sample] if 0 <= problem.sample < len(names) else "name unknown"
            where = f", sample {problem.sample} ({name})" if problem.sample >= 0 else ""
            lines.append(f"{self.folder / problem.file}{where}: {problem.reason}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        names = self._names()
        problems = [
            problem._asdict() | {"name": names[problem.sample] if 0 <= problem.sample < len(names) else None}
            for problem in self.problems
        ]
        manifest = self.manifest
        return {
            "folder": str(self.folder),
            "level": self.level,
            "good": self.good,
            "num_samples": manifest.num_samples if manifest else None,
            "num_shards": len(manifest.shards) if manifest else None,
            "content_sha256": manifest.content_sha256 if manifest else None,
            "problems": problems,
            "warnings": self.warnings,
            **({"compared": self.compared} if self.compared else {}),
        }

    def _names(self) -> list[str]:
        if not any(problem.sample >= 0 for problem in self.problems):
            return []
        try:
            return (self.folder / NAMES).read_text(errors="backslashreplace").split("\n")
        except OSError:
            return []


def verify_split(folder: Path, *, level: Level = "hash", workers: int = 1, quiet: bool = False) -> Verification:
    """Check one prepared split.

    Args:
        folder: of the split.
        level: how deep.
        workers: processes.
        quiet: show no progress.

    Raises:
        PrepError: a check itself failed, which says nothing about the split.
    """
    found = Verification(folder, level)
    sums = _check_manifest(found)
    if found.manifest is None or sums is None:
        return found
    readable = _check_files(found, found.manifest, sums)
    if level == "quick":
        return found
    _check_small_files(found, found.manifest, sums)
    if found.index is None and level == "index":
        return found
    check = ShardCheck(folder, level in ("hash", "decode"), level == "decode", indexed=found.index is not None)
    shards = found.manifest.shards
    with Meter(f"verify {found.manifest.split}", sum(shards[k].num_samples for k in readable), quiet=quiet) as meter:
        results = dict(run(check, readable, workers=workers, describe=_describe(found.manifest), on_progress=meter.add))
    by_digest = {shard.sha256: shard.name for shard in shards}
    for shard, result in sorted(results.items()):
        other = by_digest.get(result.sha256)
        if other is not None and other != shards[shard].name and result.problems:
            found.problems.append(Problem(shards[shard].name, -1, f"it has the content of {other}"))
        else:
            found.problems += result.problems
    return found


def check_basics(folder: Path) -> Verification:
    """All of level ``index`` but the shards themselves: their sizes only."""
    found = Verification(folder, "index")
    sums = _check_manifest(found)
    if found.manifest is not None and sums is not None:
        _check_files(found, found.manifest, sums)
        _check_small_files(found, found.manifest, sums)
    return found


def class_counts(index: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """Samples of each class, int64 [C]; those without a label are not counted."""
    labels = index["label"][index["label"] >= 0].astype(np.int64)
    return np.bincount(labels, minlength=num_classes)


def _check_manifest(found: Verification) -> dict[str, str] | None:
    """Read manifest and digests; returns the digests."""
    path = found.folder / MANIFEST
    if not path.is_file():
        found.problems.append(Problem(MANIFEST, -1, "it is missing: the split is not finished (write goes on with it)"))
        return None
    try:
        sums = read_sums(found.folder / SUMS)
    except PrepError as error:
        found.problems.append(Problem(SUMS, -1, str(error)))
        return None
    if sums.get(MANIFEST) != sha256_of(path):
        reason = f"its SHA-256 is not the one in {SUMS}: one of the two is damaged, and nothing else was checked"
        found.problems.append(Problem(MANIFEST, -1, reason))
        return None
    try:
        found.manifest = read_manifest(path)
    except ManifestError as error:
        found.problems.append(Problem(MANIFEST, -1, str(error)))
        return None
    return sums


def _check_files(found: Verification, manifest: Manifest, sums: dict[str, str]) -> list[int]:
    """Level ``quick``; returns the shards that are there, if of a wrong size."""
    digests = {shard.name: shard.sha256 for shard in manifest.shards}
    digests |= {INDEX: manifest.index_sha256, NAMES: manifest.names_sha256}
    for name, digest in digests.items():
        if sums.get(name) != digest:
            found.problems.append(Problem(SUMS, -1, f"its line of {name} is not what {MANIFEST} says: it is damaged"))
    sizes = {shard.name: shard.bytes for shard in manifest.shards}
    for name in [*sizes, *(name for name in sums if name not in sizes)]:
        if reason := _file_problem(found.folder / name, sizes.get(name)):
            found.problems.append(Problem(name, -1, reason))
    pattern = re.compile(r"shard[-.][0-9]+\.(tar|mds|beton)")
    strays = sorted(path.name for path in found.folder.iterdir() if pattern.fullmatch(path.name) and path.name not in sizes)
    found.warnings += [f"{found.folder / name} is no part of the split" for name in strays]
    return [k for k, shard in enumerate(manifest.shards) if (found.folder / shard.name).is_file()]


def _file_problem(path: Path, size: int | None) -> str | None:
    try:
        info = path.stat()
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not stat.S_ISREG(info.st_mode):
        return "it is no plain file"
    if size is not None and info.st_size != size:
        return f"it has {info.st_size:,} bytes; {size:,} were written"
    return None


def _check_small_files(found: Verification, manifest: Manifest, sums: dict[str, str]) -> None:
    """Level ``index`` without the shards; sets ``found.index`` if it can be used."""
    shards = {shard.name for shard in manifest.shards}
    damaged = set()
    for name, digest in sums.items():
        path = found.folder / name
        if name in shards or not path.is_file():
            continue
        if sha256_of(path) != digest:
            damaged.add(name)
            found.problems.append(Problem(name, -1, f"its SHA-256 is not the one in {SUMS}: it is damaged, if that is not"))
    if not (found.folder / INDEX).is_file() or INDEX in damaged:
        return
    try:
        index = read_index(found.folder / INDEX, manifest)
    except ManifestError as error:
        found.problems.append(Problem(INDEX, -1, str(error)))
        return
    found.problems += _check_index(index, manifest)
    if (found.folder / NAMES).is_file() and NAMES not in damaged:
        lines = (found.folder / NAMES).read_bytes().count(b"\n")
        if lines != manifest.num_samples:
            found.problems.append(Problem(NAMES, -1, f"it has {lines} lines for {manifest.num_samples} samples"))
    found.index = index
    found.warnings += _odd_counts(index, manifest)


def _check_index(index: NDArray[Any], manifest: Manifest) -> Iterator[Problem]:
    """What the records say, against the manifest."""
    if content_sha256(index) != manifest.content_sha256:
        yield Problem(INDEX, -1, f"its content is not the one {MANIFEST} names")
    counts = np.bincount(index["shard"], minlength=len(manifest.shards))
    for shard, count in zip(manifest.shards, counts.tolist(), strict=True):
        if count != shard.num_samples:
            yield Problem(INDEX, -1, f"it puts {count} samples into {shard.name}, {MANIFEST} says {shard.num_samples}")
    lowest, highest = int(index["label"].min()), int(index["label"].max())
    if lowest < -1 or highest >= len(manifest.class_names):
        yield Problem(INDEX, -1, f"its labels are {lowest} to {highest}, but there are {len(manifest.class_names)} classes")
    if (index["encoding"] > RAW).any():
        yield Problem(INDEX, -1, "it has an unknown encoding of images")


def _odd_counts(index: NDArray[Any], manifest: Manifest) -> Iterator[str]:
    """Where a split that looks like ImageNet-1K has other counts."""
    names = manifest.class_names
    if len(names) != 1000 or not all(re.fullmatch("n[0-9]{8}", name) for name in names) or manifest.split not in _IMAGENET:
        return
    images, fewest, most = _IMAGENET[manifest.split]
    if len(index) != images:
        yield f"ImageNet-1K {manifest.split} has {images:,} images, this has {len(index):,}"
    counts = class_counts(index, len(names))
    if int(counts.min()) < fewest or int(counts.max()) > most:
        span = f"{fewest} to {most}" if fewest != most else str(fewest)
        found = f"{int(counts.min())} ({names[int(counts.argmin())]}) to {int(counts.max())} ({names[int(counts.argmax())]})"
        yield f"the classes of ImageNet-1K {manifest.split} have {span} images, these have {found}"


def _describe(manifest: Manifest) -> Any:
    return lambda shard, sample: manifest.shards[shard].name + (f", sample {sample}" if sample >= 0 else "")
