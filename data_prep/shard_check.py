"""What can be wrong inside a shard of a prepared split, down to the sample: one task of :mod:`data_prep.verify`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.files import sha256_of
from data_prep.finish import ADOPTED
from data_prep.formats.base import ShardError
from data_prep.formats.registry import get_format
from data_prep.policy import IGNORE
from data_prep.pool import Report
from nepa_dist.data.decode import BadImage, decode_image
from nepa_dist.data.index import ENCODED, INDEX, INDEX_DTYPE, MANIFEST, Manifest, read_index, read_manifest
from nepa_dist.data.prepared import crc32c_function, decode_mask

_DAMAGED = "the {} is damaged (CRC-32C differs)"


class Problem(NamedTuple):
    """One thing that is wrong."""

    file: str
    """Name in the folder of the split."""
    sample: int
    """Id; -1: it is about the file."""
    reason: str


class ShardResult(NamedTuple):
    """What a check of one shard found."""

    sha256: str
    """Of the file; empty if it was not taken."""
    problems: list[Problem]


@dataclass
class ShardCheck:
    """Checks one shard, which is a plain file; call it with the number of the shard.

    Args:
        folder: of the split, whose manifest and index can be read.
        digests: compare SHA-256 of the files.
        decode: decode every image and mask.
        indexed: the index can be used; otherwise only the digests are compared.
    """

    folder: Path
    digests: bool
    decode: bool
    indexed: bool = True

    @functools.cached_property
    def manifest(self) -> Manifest:
        """Of the split."""
        return read_manifest(self.folder / MANIFEST)

    @functools.cached_property
    def index(self) -> NDArray[Any]:
        """Of the split."""
        return read_index(self.folder / INDEX, self.manifest)

    def __call__(self, shard: int, report: Report, /) -> ShardResult:
        """All that is wrong with a shard."""
        try:
            return self._check(shard, report)
        except OSError as error:
            return ShardResult("", [Problem(self.manifest.shards[shard].name, -1, f"it cannot be read: {error.strerror}")])

    def _check(self, shard: int, report: Report) -> ShardResult:
        expected = self.manifest.shards[shard]
        path = self.folder / expected.name
        whole = path.stat().st_size == expected.bytes  # otherwise it is a problem that is known
        digest = sha256_of(path) if self.digests and whole else ""
        problems: list[Problem] = []
        if not self.indexed:
            if digest not in ("", expected.sha256):
                problems = [Problem(path.name, -1, "it is damaged (SHA-256 differs)")]
            report.done(expected.bytes, expected.num_samples)
            return ShardResult(digest, problems)
        ids = np.flatnonzero(self.index["shard"] == shard)
        ids = ids[np.argsort(self.index["offset"][ids], kind="stable")]
        if not whole or digest not in ("", expected.sha256):
            problems = self._locate(path, ids)
            if digest and not problems:
                problems = [Problem(path.name, -1, "it is damaged between the samples (SHA-256 differs, all checksums fit)")]
        else:
            problems = self._scan(path, ids)
        damaged = {problem.sample for problem in problems}
        with path.open("rb") as file:
            for sample in ids.tolist():
                report.begin(sample)
                if self.decode and sample not in damaged:
                    problems += self._decode(file, sample)
                report.done(int(self.index[sample]["length"]) + int(self.index[sample]["mask_length"]))
        return ShardResult(digest, problems)

    def _locate(self, path: Path, ids: NDArray[np.int64]) -> list[Problem]:
        """The samples of a damaged shard whose checksums are wrong."""
        crc32c = crc32c_function()
        problems = []
        with path.open("rb") as file:
            for sample in ids.tolist():
                for part, data, crc in _contents(file.fileno(), self.index[sample]):
                    if data is None:
                        problems.append(Problem(path.name, sample, f"the {part} is cut off: the shard is too short"))
                    elif crc32c(data) != crc:
                        problems.append(Problem(path.name, sample, _DAMAGED.format(part)))
        return problems

    def _scan(self, path: Path, ids: NDArray[np.int64]) -> list[Problem]:
        """Compare what the shard says about itself with the index."""
        try:
            scan = get_format(self.manifest.container).scan_shard(path)
        except ShardError as error:
            return [Problem(path.name, -1, f"{where}: {why}" if where else why) for where, why in error.problems]
        order = np.argsort(scan.records["offset"], kind="stable")
        found, expected = scan.records[order], self.index[ids]
        if len(found) != len(expected):
            return [Problem(path.name, -1, f"it holds {len(found)} samples, the index says {len(expected)}")]
        problems = []
        for field in INDEX_DTYPE.names or ():
            if field == "shard":
                continue
            for i in np.flatnonzero(found[field] != expected[field]).tolist():
                reason = f"its {field} is {found[field][i]} in the shard and {expected[field][i]} in the index"
                if field in ("crc", "mask_crc"):
                    reason = _DAMAGED.format("image" if field == "crc" else "mask")
                problems.append(Problem(path.name, int(ids[i]), reason))
        if self.manifest.container != "beton" and self.manifest.source.get("kind") != ADOPTED:
            keys = [scan.keys[i] for i in order]
            wrong = [(int(sample), key) for sample, key in zip(ids, keys, strict=True) if not _is_key(key, int(sample))]
            problems += [Problem(path.name, sample, f"the shard calls it {key}") for sample, key in wrong]
        return problems

    def _decode(self, file: BinaryIO, sample: int) -> Iterator[Problem]:
        record = self.index[sample]
        name = self.manifest.shards[int(record["shard"])].name
        size = (int(record["height"]), int(record["width"]))
        for part, data, _ in _contents(file.fileno(), record):
            if data is None:
                yield Problem(name, sample, f"the {part} is cut off")
                continue
            try:
                if part == "mask":
                    found = decode_mask(data)
                elif record["encoding"] == ENCODED:
                    found = decode_image(data)
                elif len(data) == 3 * size[0] * size[1]:
                    continue
                else:
                    raise BadImage(f"{len(data)} bytes are not {size[1]}x{size[0]} RGB pixels")
            except BadImage as error:
                yield Problem(name, sample, f"the {part}: {error}")
                continue
            if found.shape[:2] != size:
                shape = f"{found.shape[1]}x{found.shape[0]}"
                yield Problem(name, sample, f"the {part} has {shape} pixels, the index says {size[1]}x{size[0]}")
            elif part == "mask" and (reason := self._wrong_labels(found)):
                yield Problem(name, sample, reason)

    def _wrong_labels(self, mask: NDArray[Any]) -> str | None:
        classes = len(self.manifest.class_names)
        highest = int(mask[mask != IGNORE].max(initial=0))
        if classes and highest > classes:
            return f"the mask has the label {highest}; the class table ends at {classes}"
        return None


def read_content(descriptor: int, record: Any, *, mask: bool = False) -> bytes | None:
    """The image or the mask of a record; None where the file ends before it does. Raises OSError if it cannot be read."""
    part = "mask_" if mask else ""
    left, offset, pieces = int(record[f"{part}length"]), int(record[f"{part}offset"]), []
    while left:
        piece = os.pread(descriptor, left, offset)
        if not piece:
            return None
        pieces.append(piece)
        left, offset = left - len(piece), offset + len(piece)
    return b"".join(pieces)


def _contents(descriptor: int, record: Any) -> Iterator[tuple[str, bytes | None, int]]:
    """Name, bytes and checksum of the image and, if there is one, the mask."""
    yield "image", read_content(descriptor, record), int(record["crc"])
    if record["mask_length"]:
        yield "mask", read_content(descriptor, record, mask=True), int(record["mask_crc"])


def _is_key(key: str, sample: int) -> bool:
    return key.isascii() and key.isdigit() and int(key) == sample
