"""The last step of writing: index, names, repairs, digests, and the manifest that says the split is whole.

Each process that finds all shards there does it, and all make the same bytes. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.files import SUMS, sha256_of, to_sums, write_file
from data_prep.formats.mds import INDEX as MDS_INDEX
from data_prep.formats.registry import get_format
from data_prep.parts import FOLDER as PARTS
from data_prep.parts import Part, part_path, read_part, repair_lines
from data_prep.plan import Plan
from data_prep.skip import num_skipped
from data_prep.sources import Source
from nepa_dist.data.index import INDEX, INDEX_DTYPE, MANIFEST, NAMES, Manifest, content_sha256

REPAIRS = "repairs.jsonl"


class Finished(NamedTuple):
    """Whether a split is whole."""

    missing: int
    """Shards that are not there yet."""
    manifest: Manifest | None


def finish_split(folder: Path, source: Source, plan: Plan) -> Finished:
    """Write what belongs beside the shards, if all of them are there.

    Args:
        folder: of the split.
        source: what was planned, for the names.
        plan: of the split.

    Raises:
        OSError: a file cannot be read or written.
    """
    parts, missing = _read_parts(folder, plan)
    if missing:
        return Finished(missing, None)
    index = np.zeros(plan.num_samples, INDEX_DTYPE)
    for shard, part in enumerate(parts):
        records = part.records.copy()
        records["shard"] = shard
        index[plan.shard_ids(shard)] = records
    names = "".join(f"{source.name(i)}\n" for i in range(plan.num_samples)).encode()
    repairs = [repair for part in parts for repair in part.repairs]
    skipped = num_skipped(folder)
    manifest = Manifest(
        name=plan.name,
        split=plan.split,
        container=plan.container,
        policy=plan.policy,
        num_samples=plan.num_samples,
        class_names=plan.class_names,
        class_titles=plan.class_titles,
        source=plan.source | ({"skipped": skipped} if skipped else {}),
        content_sha256=content_sha256(index),
        plan_sha256=plan.plan_sha256,
        index_sha256=hashlib.sha256(array_bytes(index)).hexdigest(),
        names_sha256=hashlib.sha256(names).hexdigest(),
        shards=[part.shard for part in parts],
        repairs=dict(sorted(Counter(kind for repair in repairs for kind in repair.kinds).items())),
        versions=_joined([part.versions for part in parts]),
    )
    seal(folder, manifest, {INDEX: array_bytes(index), NAMES: names, REPAIRS: repair_lines(repairs)})
    return Finished(0, manifest)


def seal(folder: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    """Write the files of a split, then their digests, then the manifest.

    Args:
        folder: of the split, with its shards.
        manifest: what it is.
        files: name -> content of what lies beside the shards.

    Raises:
        OSError: a file cannot be written.
    """
    path = folder / MANIFEST
    body = manifest.to_bytes()
    if path.exists() and path.read_bytes() != body:
        path.unlink()  # nobody may read the new files by the old manifest
    for name, data in files.items():
        write_file(folder / name, data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if manifest.source.get("kind") != ADOPTED:
        get_format(manifest.container).finish(folder, manifest.shards)
    if manifest.container == "mds" and (folder / MDS_INDEX).is_file():
        digests[MDS_INDEX] = sha256_of(folder / MDS_INDEX)
    digests |= {shard.name: shard.sha256 for shard in manifest.shards}
    digests[MANIFEST] = hashlib.sha256(body).hexdigest()
    write_file(folder / SUMS, to_sums(digests))
    write_file(path, body)


ADOPTED = "adopted"
"""Kind of the source of shards that another program wrote: its own files are left as they are."""


def array_bytes(array: NDArray[Any]) -> bytes:
    """The content of an ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _read_parts(folder: Path, plan: Plan) -> tuple[list[Part], int]:
    """Side files of the shards that are there, and how many are not."""
    # One listing, for a network file system may remember for a while that a single name was not there.
    listed = set(os.listdir(folder / PARTS))
    parts = []
    for shard in range(plan.num_shards):
        path = part_path(folder, get_format(plan.container).shard_name(shard))
        part = read_part(path) if path.name in listed else None
        if part is None or part.plan_sha256 != plan.plan_sha256:
            continue
        try:
            size = (folder / part.shard.name).stat().st_size
        except FileNotFoundError:
            continue
        if size == part.shard.bytes:
            parts.append(part)
    return parts, plan.num_shards - len(parts)


def _joined(all_versions: list[dict[str, str]]) -> dict[str, str]:
    """Versions of all shards; where they differ, each is named."""
    programs = sorted({program for each in all_versions for program in each})
    return {name: ", ".join(sorted({each.get(name, "none") for each in all_versions})) for name in programs}
