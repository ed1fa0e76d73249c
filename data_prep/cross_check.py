"""Do two prepared splits hold the same samples? The same ids must have the same labels, names, images and masks.

Bytes are compared where both splits store them alike; otherwise, or where the bytes differ, the decoded pixels.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.pool import Report, run
from data_prep.progress import Meter
from data_prep.shard_check import Problem, read_content
from data_prep.verify import Verification, check_basics
from nepa_dist.data.decode import BadImage, decode_image
from nepa_dist.data.index import INDEX, MANIFEST, NAMES, RAW, Manifest, read_index, read_manifest
from nepa_dist.data.prepared import decode_mask

_MAX_OPEN = 256

SAME_BYTES, SAME_PIXELS, DIFFERENT = "same_bytes", "same_pixels", "different"


def cross_check(folder: Path, other: Path, *, workers: int = 1, quiet: bool = False) -> Verification:
    """Compare two splits sample by sample, by bytes that are read from both.

    Args:
        folder: of one split; problems are told by its ids.
        other: of the other split, in any container.
        workers: processes.
        quiet: show no progress.

    Returns:
        The problems; ``compared`` counts the images with the same bytes, the same pixels and different ones.

    Raises:
        PrepError: a shard cannot be read.
    """
    found, beside = check_basics(folder), check_basics(other)
    found.level = "cross"
    if not (found.good and beside.good):
        found.problems += [Problem(name, sample, f"in {other}: {reason}") for name, sample, reason in beside.problems]
        return found
    assert found.manifest is not None
    assert beside.manifest is not None
    found.problems += _compare_tables(folder, found.manifest, other, beside.manifest)
    if found.problems:
        return found
    compare = _Compare(folder, other)
    shards = found.manifest.shards
    counts: Counter[str] = Counter()
    with Meter(f"compare {found.manifest.split}", found.manifest.num_samples, quiet=quiet) as meter:
        tasks = run(compare, range(len(shards)), workers=workers, describe=compare.describe, on_progress=meter.add)
        for _, (problems, kinds) in sorted(tasks):
            found.problems += problems
            counts.update(kinds)
    found.compared = {kind: counts[kind] for kind in (SAME_BYTES, SAME_PIXELS, DIFFERENT)}
    return found


def _compare_tables(folder: Path, one: Manifest, other_folder: Path, two: Manifest) -> list[Problem]:
    if one.num_samples != two.num_samples:
        return [Problem(MANIFEST, -1, f"{one.num_samples} samples here, {two.num_samples} in {other_folder}")]
    problems = []
    if one.class_names != two.class_names:
        problems.append(Problem(MANIFEST, -1, f"the class names differ from those in {other_folder}"))
    if one.names_sha256 != two.names_sha256:
        names, others = ((place / NAMES).read_text().split("\n") for place in (folder, other_folder))
        first = next((i for i, pair in enumerate(zip(names, others, strict=True)) if pair[0] != pair[1]), -1)
        called = others[first] if first >= 0 else "?"
        problems.append(Problem(NAMES, first, f"it is the first that has another name, {called}, in {other_folder}"))
    return problems


class _Split:
    """A split whose samples are read one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder / MANIFEST)
        self.index = read_index(folder / INDEX, self.manifest)
        self._files: dict[int, BinaryIO] = {}

    def read(self, sample: int, *, mask: bool = False) -> bytes:
        record = self.index[sample]
        file = self._open(int(record["shard"]))
        data = read_content(file.fileno(), record, mask=mask)
        if data is None:
            raise OSError(f"{file.name} ends before sample {sample}")
        return data

    def _open(self, shard: int) -> BinaryIO:
        """A shard, opened once: the order of the samples jumps between the shards of the second split."""
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = (self.folder / self.manifest.shards[shard].name).open("rb")
        return self._files[shard]

    def pixels(self, sample: int, data: bytes) -> NDArray[np.uint8]:
        record = self.index[sample]
        if record["encoding"] == RAW:
            return np.frombuffer(data, np.uint8).reshape(int(record["height"]), int(record["width"]), 3)
        return decode_image(data)


@dataclass
class _Compare:
    """Compares the samples that one shard of the first split holds."""

    folder: Path
    other: Path

    @functools.cached_property
    def _splits(self) -> tuple[_Split, _Split]:
        return _Split(self.folder), _Split(self.other)

    def __call__(self, shard: int, report: Report, /) -> tuple[list[Problem], Counter[str]]:
        one, two = self._splits
        problems, kinds = [], Counter[str]()
        name = one.manifest.shards[shard].name
        for sample in np.flatnonzero(one.index["shard"] == shard).tolist():
            report.begin(sample)
            kind, reasons = self._compare(sample)
            kinds[kind] += 1
            problems += [Problem(name, sample, f"{reason} in {self.other}") for reason in reasons]
            report.done(int(one.index[sample]["length"]) + int(two.index[sample]["length"]))
        return problems, kinds

    def describe(self, shard: int, sample: int) -> str:
        """Name a shard and a sample for a message."""
        return self._splits[0].manifest.shards[shard].name + (f", sample {sample}" if sample >= 0 else "")

    def _compare(self, sample: int) -> tuple[str, list[str]]:
        """How the images compare, and all that differs."""
        one, two = self._splits
        a, b = one.index[sample], two.index[sample]
        reasons = []
        if a["label"] != b["label"]:
            reasons.append(f"the label is {a['label']} here and {b['label']}")
        kind = self._compare_images(sample, a, b)
        if kind == DIFFERENT:
            reasons.append("the image is another one")
        if bool(a["mask_length"]) != bool(b["mask_length"]):
            reasons.append("there is a mask here and none" if a["mask_length"] else "there is no mask here but one")
        elif a["mask_length"] and not self._same_masks(sample):
            reasons.append("the mask is another one")
        return kind, reasons

    def _compare_images(self, sample: int, a: Any, b: Any) -> str:
        one, two = self._splits
        data, beside = one.read(sample), two.read(sample)
        if a["encoding"] == b["encoding"] and a["crc"] == b["crc"] and data == beside:
            return SAME_BYTES
        if (a["height"], a["width"]) != (b["height"], b["width"]):
            return DIFFERENT
        try:
            return SAME_PIXELS if np.array_equal(one.pixels(sample, data), two.pixels(sample, beside)) else DIFFERENT
        except BadImage:
            return DIFFERENT

    def _same_masks(self, sample: int) -> bool:
        one, two = self._splits
        data, beside = one.read(sample, mask=True), two.read(sample, mask=True)
        try:
            return data == beside or np.array_equal(decode_mask(data), decode_mask(beside))
        except BadImage:
            return False
