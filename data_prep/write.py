"""Write the shards of a planned split. A shard is a task of its own: it is whole, with its side file, or it is not there.

Run it again after whatever stopped it: finished shards are passed over. Any number of processes and machines may write to one
folder at a time without knowing of each other; two that make the same shard make the same bytes. Whoever finds that no shard is
missing any more finishes the split, see :mod:`data_prep.finish`.

No image is left out in silence, for that would change the ids of others. An image that cannot be used stops its shard; all are
listed, and a new plan may leave them out, see :mod:`data_prep.skip`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import PIL
from PIL import features

import nepa_dist
from data_prep.files import PrepError, commit, sha256_of, sweep, temp_path, write_file
from data_prep.finish import finish_split
from data_prep.formats.base import StoredSample
from data_prep.formats.registry import get_format
from data_prep.parts import FOLDER as PARTS
from data_prep.parts import BadSample, Part, Repair, all_bad, bad_lines, note_bad, part_path, read_part
from data_prep.plan import Plan, load_plan
from data_prep.policy import ImagePolicy
from data_prep.pool import Report, run
from data_prep.progress import Meter
from data_prep.skip import SKIPPED
from data_prep.sources import Source, is_lost
from nepa_dist.data.decode import BadImage
from nepa_dist.data.index import Manifest, ShardRecord
from nepa_dist.data.prepared import crc32c_function

_SHOWN = 20


class BadSamplesError(PrepError):
    """Images of the source cannot be used.

    Args:
        bad: all that are known so far.
        path: the file that lists them, and those that the plan leaves out already.
    """

    def __init__(self, bad: list[BadSample], path: Path) -> None:
        lines = [f"sample {sample.id} ({sample.name}): {sample.reason}" for sample in bad[:_SHOWN]]
        more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        super().__init__(*lines, *more, f"{len(bad)} images cannot be used, so their shards are not written; see {path}")
        self.bad = bad
        self.path = path


class Written(NamedTuple):
    """What a call did."""

    written: int
    """Shards."""
    kept: int
    """Shards of this call that were there already."""
    missing: int
    """Shards of the split that are still to be written, by others."""
    manifest: Manifest | None
    """Of the finished split; None while shards are missing."""


def write_split(
    folder: Path,
    source: Source,
    *,
    workers: int = 1,
    shards: Sequence[int] | None = None,
    check: bool = False,
    quiet: bool = False,
) -> Written:
    """Write the shards of a split that are not there yet, and finish the split if none is missing.

    Args:
        folder: of the split; it holds a plan.
        source: what was planned.
        workers: processes.
        shards: those to write; default: all.
        check: hash the shards that are there, instead of looking at their sizes alone.
        quiet: show no progress.

    Raises:
        PlanError: there is no plan, or it is of another source.
        BadSamplesError: images cannot be used. The other shards are written.
        PrepError: a shard cannot be written. What is finished stays.
        OSError: the folder cannot be written.
    """
    plan = load_plan(folder)
    plan.check_source(source)
    crc32c_function()  # better to miss it now than in every worker
    (folder / PARTS).mkdir(exist_ok=True)
    sweep(folder)
    sweep(folder / PARTS)
    job = _ShardJob(folder, source, plan)
    mine = range(plan.num_shards) if shards is None else shards
    todo = [shard for shard in mine if not job.is_done(shard, check)]
    total = sum(len(plan.shard_ids(shard)) for shard in todo)
    refused = False
    try:
        with Meter(f"write {plan.split}", total, quiet=quiet) as meter:
            for _, bad in run(job, todo, workers=workers, describe=job.describe, on_progress=meter.add):
                refused |= bool(bad)
    finally:  # of workers that were ended
        sweep(folder)
        sweep(folder / PARTS)
    if refused:
        bad = all_bad(folder)
        path = folder.parent / f"bad-{folder.name}.jsonl"
        skipped = folder / SKIPPED
        write_file(path, (skipped.read_bytes() if skipped.exists() else b"") + bad_lines(bad))
        raise BadSamplesError(bad, path)
    finished = finish_split(folder, source, plan)
    return Written(len(todo), len(mine) - len(todo), finished.missing, finished.manifest)


def versions(container: str) -> dict[str, str]:
    """The programs that shape the bytes of a shard."""
    found = {
        "nepa-dist": nepa_dist.__version__,
        "pillow": PIL.__version__,
        "libjpeg": str(features.version("libjpeg_turbo") or features.version("jpg")),
        "zlib": str(features.version("zlib")),
    }
    if container == "tar":
        found["webdataset"] = importlib.metadata.version("webdataset")
    return found


class _Refused(Exception):
    """The shard has images that cannot be used."""


@dataclass(frozen=True)
class _ShardJob:
    """Writes one shard; returns the images because of which it did not."""

    folder: Path
    source: Source
    plan: Plan

    def __call__(self, shard: int, report: Report) -> list[BadSample]:
        container = get_format(self.plan.container)
        path = self.folder / container.shard_name(shard)
        temp, side = temp_path(path), part_path(self.folder, path.name)
        samples = _Samples(self.source, self.plan, shard, report)
        try:
            records = container.write_shard(temp, samples, with_mask=self.plan.has_masks)
            record = ShardRecord(path.name, temp.stat().st_size, sha256_of(temp), len(samples))
            repairs = sorted(samples.repairs.values())
            part = Part(self.plan.plan_sha256, record, records, repairs, versions(self.plan.container))
            old = read_part(side)
            if old is not None and old.shard != record:  # never a side file beside a shard of other bytes
                side.unlink(missing_ok=True)
            commit(temp, path)
            write_file(side, part.to_bytes())
        except _Refused:
            pass
        finally:
            temp.unlink(missing_ok=True)
        bad = sorted(samples.bad.values())
        note_bad(self.folder, path.name, bad)
        return bad

    def is_done(self, shard: int, check: bool) -> bool:
        """Whether a shard is there as its side file says."""
        path = self.folder / get_format(self.plan.container).shard_name(shard)
        part = read_part(part_path(self.folder, path.name))
        if part is None or part.plan_sha256 != self.plan.plan_sha256 or part.shard.name != path.name:
            return False
        try:
            return path.stat().st_size == part.shard.bytes and (not check or sha256_of(path) == part.shard.sha256)
        except FileNotFoundError:
            return False

    def describe(self, shard: int, sample: int) -> str:
        """Name a shard and a sample for a message."""
        name = get_format(self.plan.container).shard_name(shard)
        return name if sample < 0 else f"{name}, sample {sample} ({self.source.name(sample)})"


class _Samples(Sequence[StoredSample]):
    """The samples of a shard, each made when it is asked for, so that a shard takes no more memory than a sample.

    After the first that cannot be used the others are still tried, then _Refused is raised: one run finds them all.
    """

    def __init__(self, source: Source, plan: Plan, shard: int, report: Report) -> None:
        self.bad: dict[int, BadSample] = {}
        self.repairs: dict[int, Repair] = {}
        self._source, self._plan, self._report = source, plan, report
        self._ids = plan.shard_ids(shard).tolist()
        self._policy = ImagePolicy.parse(plan.policy)
        self._counted: set[int] = set()

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[StoredSample]:
        for number in self._ids:
            sample = self._make(number)
            if sample is not None and not self.bad:
                yield sample
        if self.bad:
            raise _Refused

    @overload
    def __getitem__(self, index: int) -> StoredSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredSample]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample = self._make(self._ids[index])
        if sample is None:
            list(self)  # finds the others, and raises
        return sample

    def _make(self, number: int) -> StoredSample | None:
        """One sample; None, and noted, if it cannot be used."""
        self._report.begin(number)
        name = self._source.name(number)
        try:
            data = self._source.read(number)
            mask = self._source.read_mask(number) if self._plan.has_masks else None
            image = self._policy.apply(data)
            if mask is not None:
                size = (image.source_height, image.source_width)
                classes = len(self._plan.class_names) or None
                mask = self._policy.apply_mask(mask, image.height, image.width, source_size=size, num_classes=classes)
        except BadImage as error:
            self.bad[number] = BadSample(number, name, str(error))
            return None
        except OSError as error:
            if not is_lost(error):
                raise
            self.bad[number] = BadSample(number, name, f"it cannot be read: {error.strerror}")
            return None
        if image.repairs:
            self.repairs[number] = Repair(number, name, image.repairs)
        if number not in self._counted:
            self._counted.add(number)
            self._report.done(len(data))
        label = self._source.label(number)
        return StoredSample(number, name, image.image, image.encoding, image.height, image.width, label, mask)
