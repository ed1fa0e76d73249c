"""The index of a prepared split: where each sample lies in the shards, whatever their format.

A prepared split is a folder (``python -m data_prep`` makes it)::

    manifest.json          what the split is and what its files must be, see :class:`Manifest`
    index.npy              one INDEX_DTYPE record per sample, in the order of sample ids
    names.txt              one line per sample: where it came from
    repairs.jsonl          what was repaired, by sample
    plan.json, plan.npy    which sample goes into which shard; parts/ holds what each writer noted
    SHA256SUMS             of the shards and of the first four, for ``sha256sum -c``
    shard-00000.tar ...    or shard.00000.mds, shard-00000.beton

A sample's id is its rank among the source's names sorted by their bytes, so it is the same in every container and in the
plain folder. What a reader needs is shard, offset and length: the formats differ only for other readers.
"""

from __future__ import annotations

import hashlib
import json
import tokenize
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
NAMES = "names.txt"

ENCODED, RAW = 0, 1
"""Values of ``encoding``: an image file as bytes; uint8 RGB pixels [height, width, 3]."""

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in Manifest.shards
        ("encoding", "u1"),
        ("height", "<u2"),  # pixels of the stored image, upright
        ("width", "<u2"),
        ("label", "<i4"),  # -1: none
        ("offset", "<u8"),  # first byte of the image in its shard
        ("length", "<u4"),  # bytes
        ("crc", "<u4"),  # CRC-32C of these bytes
        ("mask_offset", "<u8"),  # the same of the class mask, a PNG; length 0: there is none
        ("mask_length", "<u4"),
        ("mask_crc", "<u4"),
    ]
)


class ManifestError(ValueError):
    """A manifest or an index that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class ShardRecord:
    """What a shard must be."""

    name: str
    """Without a folder."""
    bytes: int
    sha256: str
    """Lower-case hex."""
    num_samples: int


@dataclass(frozen=True)
class Manifest:
    """A prepared split. Holds no time and no path of the machine that made it: the same input gives the same bytes."""

    name: str
    split: str
    container: Literal["tar", "mds", "beton"]
    policy: str
    """How images were stored: ``keep``, ``short256-q90``, ``raw256``, ..."""
    num_samples: int
    class_names: list[str]
    """As in the folder layout; empty without labels."""
    class_titles: list[str]
    """Names for people, one per class, or empty."""
    source: dict[str, Any]
    """Kind and fingerprint of what it was made from."""
    content_sha256: str
    """Of every sample's label, image CRC and mask CRC in the order of ids: equal in all containers of the same content."""
    plan_sha256: str
    index_sha256: str
    names_sha256: str
    shards: list[ShardRecord]
    repairs: dict[str, int]
    """Kind of repair -> number of images; each is listed in repairs.jsonl."""
    versions: dict[str, str]
    """Programs that shaped the bytes."""
    format: int = field(default=FORMAT)

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


def read_manifest(path: Path) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        ManifestError: it is missing, unreadable, of another version, or a value has a wrong type.
    """
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ManifestError(f"{path} is not JSON") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        version = body.get("format") if isinstance(body, dict) else None
        raise ManifestError(f"{path} has format {version!r}; this program reads format {FORMAT}")
    try:
        shards = [ShardRecord(**shard) for shard in body.pop("shards")]
        manifest = Manifest(shards=shards, **body)
    except (TypeError, KeyError) as error:
        raise ManifestError(f"{path} is not a manifest of a prepared split: {error}") from None
    if problem := _problem(manifest):
        raise ManifestError(f"{path} {problem}")
    return manifest


def read_index(path: Path, manifest: Manifest) -> NDArray[Any]:
    """Map ``index.npy`` into memory, read-only, and check that every record points into its shard.

    Raises:
        ManifestError: it is missing, damaged, or does not fit the manifest.
    """
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, tokenize.TokenError) as error:  # the last for a damaged header
        raise ManifestError(f"{path} cannot be read: {error}") from None
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.num_samples,):
        raise ManifestError(f"{path} has {index.shape} records of another kind; the manifest says {manifest.num_samples}")
    sizes = np.array([shard.bytes for shard in manifest.shards], np.uint64)
    if len(index) and int(index["shard"].max()) >= len(sizes):
        raise ManifestError(f"{path} names shard {int(index['shard'].max())} of {len(sizes)}")
    for part in ("", "mask_"):
        ends = index[f"{part}offset"].astype(np.uint64) + index[f"{part}length"]
        if (outside := np.flatnonzero(ends > sizes[index["shard"]])).size:
            raise ManifestError(f"{path}: sample {int(outside[0])} ends behind the end of its shard")
    return index  # type: ignore[no-any-return]


def content_sha256(index: NDArray[Any]) -> str:
    """Digest of what the samples are, wherever they lie."""
    digest = hashlib.sha256()
    for name in ("label", "encoding", "length", "crc", "mask_crc"):
        digest.update(np.ascontiguousarray(index[name]).tobytes())
    return digest.hexdigest()


def _problem(manifest: Manifest) -> str | None:
    """What is wrong with the values: the file may be made by someone else."""
    if manifest.container not in ("tar", "mds", "beton"):
        return f"has the container {manifest.container!r}; known are tar, mds, beton"
    if type(manifest.num_samples) is not int or manifest.num_samples < 1:
        return f"has num_samples {manifest.num_samples!r}"
    names = [shard.name for shard in manifest.shards]
    for name in names:
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            return f"names the shard {name!r}; a shard lies in the same folder"
    if len(set(names)) != len(names) or sum(shard.num_samples for shard in manifest.shards) != manifest.num_samples:
        return "lists shards that do not add up to its samples"
    return None
