"""Which sample goes into which shard, settled once, before anything is written.

A plan is two files in the folder of the split: ``plan.json`` and ``plan.npy`` with the ids of all shards, one after the other.
The ids are shuffled once, so that even a reader that takes the shards in their order sees well mixed data. A plan follows from
the source and the settings alone, so any number of processes may make it, and it is the task list of those that write.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tokenize
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_prep.files import create_file, write_file
from data_prep.policy import ImagePolicy
from data_prep.sources import Source, is_lost
from nepa_dist.data.decode import BadImage
from nepa_dist.data.index import MANIFEST
from nepa_dist.data.order import permutation

FORMAT = 1
PLAN, IDS = "plan.json", "plan.npy"
SHARD_BYTES = 64 << 20
"""Size of a shard, in bytes, that the number of shards aims at."""

Container = Literal["tar", "mds", "beton"]

_EPOCH = -1  # the orders of training have epochs from 0, and must not be that of the shards
_PROBES = 128
_MAX_SAMPLES = 2**32 - 1


class PlanError(ValueError):
    """A plan cannot be made or used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Plan:
    """A split as it is to be written."""

    name: str
    """Of the data set."""
    split: str
    container: Container
    policy: str
    """Canonical name of the image policy."""
    seed: int
    """Of the shuffle."""
    num_samples: int
    num_shards: int
    has_masks: bool
    source: dict[str, Any]
    """``kind`` and ``fingerprint``."""
    class_names: list[str]
    class_titles: list[str]
    ids_sha256: str
    """Of the ids of all shards, as little-endian uint32."""
    ids: NDArray[np.uint32] = field(repr=False, compare=False)
    """[N], the sample ids of shard 0, then of shard 1, ..."""

    @property
    def plan_sha256(self) -> str:
        """Digest of everything that the plan says."""
        return hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode()).hexdigest()

    def shard_ids(self, shard: int) -> NDArray[np.int64]:
        """Sample ids of one shard in their order, int64.

        Raises:
            IndexError: there is no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        start, end = (k * self.num_samples // self.num_shards for k in (shard, shard + 1))
        return self.ids[start:end].astype(np.int64)

    def check_source(self, source: Source) -> None:
        """Make sure that a source is the one that was planned.

        Raises:
            PlanError: it differs; the message lists in what.
        """
        now = _source_settings(source)
        planned = {name: value for name, value in self._settings().items() if name in now}
        if differences := _differences(planned, now):
            raise PlanError(
                f"the source is not the one that was planned:{differences}\n"
                "Bring the source back to what it was, or prepare it into another folder."
            )

    def to_bytes(self) -> bytes:
        """The content of ``plan.json``."""
        body = self._settings() | {"plan_sha256": self.plan_sha256}
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()

    def _settings(self) -> dict[str, Any]:
        return {"format": FORMAT} | {part.name: getattr(self, part.name) for part in fields(self) if part.name != "ids"}


def make_plan(
    source: Source,
    folder: Path,
    *,
    name: str,
    container: Container,
    policy: str,
    seed: int = 0,
    num_shards: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plan a split and write the plan into its folder; the same plan again changes nothing.

    Args:
        source: of the split.
        folder: of the prepared split; made if missing.
        name: of the data set: letters, digits, ``.``, ``_`` and ``-``.
        container: ``tar``, ``mds`` or ``beton``.
        policy: how images are stored, see :mod:`data_prep.policy`.
        seed: of the shuffle, 0 or more.
        num_shards: default: what an existing plan says, else so many that a shard has about ``shard_bytes``, as measured on
            128 images spread over the source.
        shard_bytes: see num_shards; at least 1.

    Raises:
        PlanError: an argument is out of range or does not fit another, or the folder holds another plan or another split.
        PolicyError: the policy is unknown.
        OSError: the source cannot be read, or the folder cannot be written.
    """
    image_policy = ImagePolicy.parse(policy)
    if problem := _problem(len(source), name, container, image_policy, seed, num_shards, shard_bytes):
        raise PlanError(problem)
    old = load_plan(folder) if (folder / PLAN).exists() else None
    if old is None and (folder / MANIFEST).exists():
        raise PlanError(f"{folder} holds a finished split without its plan; choose another folder")
    if num_shards is None:
        num_shards = old.num_shards if old else _guess_shards(source, image_policy, shard_bytes)
    ids = permutation(seed, _EPOCH, len(source)).astype("<u4")
    plan = Plan(
        name=name,
        container=container,
        policy=image_policy.name,
        seed=seed,
        num_shards=num_shards,
        ids_sha256=_ids_sha256(ids),
        ids=ids,
        **_source_settings(source),
    )
    if old is not None:
        return _same(old, plan, folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.save(file, ids, allow_pickle=False)
    write_file(folder / IDS, file.getvalue())
    if create_file(folder / PLAN, plan.to_bytes()):  # last: a folder with this file has a whole plan
        return plan
    return _same(load_plan(folder), plan, folder)  # another process was faster


def _same(old: Plan, new: Plan, folder: Path) -> Plan:
    """The plan that a folder holds, if it is what was asked for."""
    if differences := _differences(old._settings(), new._settings()):
        raise PlanError(
            f"{folder} holds another plan:{differences}\n"
            "Use the settings and the source of that plan, or choose another folder (or delete this one)."
        )
    return old


def load_plan(folder: Path) -> Plan:
    """Read the plan in the folder of a split.

    Raises:
        PlanError: there is none, it is damaged, or a later version of this program made it.
    """
    path = folder / PLAN
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PlanError(f"{folder} holds no plan ({PLAN} is missing); make one first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
        raise PlanError(f"{path} is no plan of format {FORMAT}, the one that this program knows")
    digest = body.pop("plan_sha256", None)
    try:
        ids = np.load(folder / IDS, allow_pickle=False)
        plan = Plan(ids=ids, **body)
        whole = plan.plan_sha256 == digest and plan.ids_sha256 == _ids_sha256(ids) and ids.shape == (plan.num_samples,)
    except (OSError, ValueError, EOFError, TypeError, AttributeError, tokenize.TokenError) as error:
        raise PlanError(f"the plan in {folder} is damaged: {error}") from None
    if not whole:
        raise PlanError(f"the plan in {folder} is damaged: {PLAN} and {IDS} do not have the digests that they should")
    return plan


def _problem(
    count: int, name: str, container: str, policy: ImagePolicy, seed: int, num_shards: int | None, shard_bytes: int
) -> str | None:
    """What is wrong with the arguments of make_plan."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return f"the name {name!r} must be made of letters, digits, '.', '_' and '-'"
    if container not in get_args(Container):
        return f"the container {container!r} is unknown; use {', '.join(get_args(Container))}"
    if policy.kind == "raw" and container != "beton":
        return f"the policy {policy.name} stores pixels without coding, which only beton holds; use shortN, keep, or beton"
    if seed < 0:
        return f"the seed must be 0 or more, not {seed}"
    if not 1 <= count <= _MAX_SAMPLES:
        return f"the source has {count} samples; 1 to {_MAX_SAMPLES} can be planned"
    if num_shards is not None and not 1 <= num_shards <= count:
        return f"the number of shards must be 1 to {count}, the number of samples, not {num_shards}"
    if shard_bytes < 1:
        return f"the size of a shard must be at least 1 byte, not {shard_bytes}"
    return None


def _guess_shards(source: Source, policy: ImagePolicy, shard_bytes: int) -> int:
    """Number of shards that gives them about ``shard_bytes`` each."""
    count = min(_PROBES, len(source))
    total = 0
    for index in (k * len(source) // count for k in range(count)):
        try:
            data = source.read(index)
            try:
                total += len(policy.apply(data).image)
            except BadImage:
                total += len(data)
            total += len(source.read_mask(index) or b"")
        except BadImage:
            continue  # writing will deal with it, and with what is lost
        except OSError as error:
            if not is_lost(error):
                raise
    return max(1, min(len(source), round(total / count * len(source) / shard_bytes)))


def _source_settings(source: Source) -> dict[str, Any]:
    return {
        "split": source.split,
        "num_samples": len(source),
        "has_masks": source.has_masks,
        "source": {"kind": source.kind, "fingerprint": source.fingerprint},
        "class_names": source.class_names,
        "class_titles": source.class_titles,
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """One line per setting that differs; "" if none does. Long lists are told by their lengths and first difference."""
    lines = []
    old, new = (
        {**settings, **{f"source {key}": value for key, value in settings["source"].items()}} for settings in (old, new)
    )
    for key in sorted((old.keys() | new.keys()) - {"source"}):
        was, now = old.get(key), new.get(key)
        if was == now or key == "ids_sha256":  # follows from the rest
            continue
        if isinstance(was, list) and isinstance(now, list):
            equal = [a == b for a, b in zip(was, now, strict=False)]
            first = equal.index(False) if False in equal else len(equal)
            was, now = (f"{len(side)} entries, number {first} is {side[first : first + 1]}" for side in (was, now))
        lines.append(f"\n  {key}: planned {was}, now {now}")
    return "".join(lines)


def _ids_sha256(ids: NDArray[Any]) -> str:
    return hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()
