"""The side file of a finished shard, ``parts/<shard>.json``: what the shard must be, so that it need not be written again.

It lies in a folder of its own, so that other readers see nothing but shards. It holds its own digest: a damaged one counts as
missing, and its shard is written again.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.files import write_file
from nepa_dist.data.index import INDEX_DTYPE, ShardRecord

FOLDER = "parts"
_BAD = ".bad.jsonl"


class Repair(NamedTuple):
    """A source image that was not plain upright 8-bit RGB."""

    id: int
    name: str
    kinds: tuple[str, ...]


class BadSample(NamedTuple):
    """A source image that cannot be used."""

    id: int
    name: str
    reason: str


@dataclass(frozen=True)
class Part:
    """A finished shard."""

    plan_sha256: str
    shard: ShardRecord
    records: NDArray[Any]
    """INDEX_DTYPE, in the order of the plan, with shard 0."""
    repairs: list[Repair]
    versions: dict[str, str]
    """Programs that made it."""

    def to_bytes(self) -> bytes:
        """The content of the side file."""
        body = {
            "plan_sha256": self.plan_sha256,
            "shard": vars(self.shard),
            "records": base64.b64encode(self.records.tobytes()).decode(),
            "repairs": self.repairs,
            "versions": self.versions,
        }
        return (_canonical({**body, "sha256": _digest(body)}) + "\n").encode()


def part_path(folder: Path, shard_name: str) -> Path:
    """Where the side file of a shard is."""
    return folder / FOLDER / f"{shard_name}.json"


def read_part(path: Path) -> Part | None:
    """Read a side file; None if it is missing or damaged.

    Raises:
        OSError: it is there but cannot be read.
    """
    try:
        body = json.loads(path.read_bytes())
        if body.pop("sha256") != _digest(body):
            return None
        records = np.frombuffer(base64.b64decode(body["records"]), INDEX_DTYPE)
        repairs = [Repair(number, name, tuple(kinds)) for number, name, kinds in body["repairs"]]
        return Part(body["plan_sha256"], ShardRecord(**body["shard"]), records, repairs, body["versions"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def note_bad(folder: Path, shard_name: str, bad: list[BadSample]) -> None:
    """Keep, or forget if there are none, the unusable images of a shard."""
    path = folder / FOLDER / f"{shard_name}{_BAD}"
    if bad:
        write_file(path, bad_lines(bad))
    else:
        path.unlink(missing_ok=True)


def all_bad(folder: Path) -> list[BadSample]:
    """The unusable images of all shards that were tried, by any process, in the order of ids."""
    bad = []
    for path in (folder / FOLDER).glob(f"*{_BAD}"):
        bad += [BadSample(**json.loads(line)) for line in path.read_text().splitlines()]
    return sorted(bad)


def bad_lines(bad: list[BadSample]) -> bytes:
    """One JSON object per line."""
    return "".join(_canonical(sample._asdict()) + "\n" for sample in bad).encode()


def repair_lines(repairs: list[Repair]) -> bytes:
    """The content of ``repairs.jsonl``, in the order of ids."""
    return "".join(_canonical(repair._asdict()) + "\n" for repair in sorted(repairs)).encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode()).hexdigest()


def _canonical(body: object) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))
