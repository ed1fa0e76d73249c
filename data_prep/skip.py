"""Leave unusable images out of a plan. Ranks close up: the ids are those of a folder without these images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from data_prep.files import UsageError, write_file
from data_prep.plan import PLAN
from data_prep.sources import Source, Split

SKIPPED = "skipped.jsonl"
"""In the folder of a split: the images that its plan leaves out, one JSON object per line."""


class SkippingSource:
    """A source without some of its samples.

    Args:
        source: all samples.
        names: those to leave out.

    Raises:
        UsageError: the source has no sample of such a name, or would have none left.
    """

    def __init__(self, source: Source, names: set[str]) -> None:
        self._source = source
        self._kept = np.array([i for i in range(len(source)) if source.name(i) not in names], np.int64)
        if len(source) - len(self._kept) != len(names):
            unknown = sorted(names - {source.name(i) for i in range(len(source))})
            raise UsageError(f"the source has no image {unknown[0]!r}, which is to be left out; is the list of this split?")
        if not len(self._kept):
            raise UsageError("the list leaves out every image of the source")
        self.kind = source.kind
        self.split: Split = source.split
        self.class_names = source.class_names
        self.class_titles = source.class_titles
        self.has_masks = source.has_masks
        self.num_ignored = source.num_ignored
        left_out = "\0".join(sorted(names))
        self.fingerprint = hashlib.sha256(f"{source.fingerprint}\0{left_out}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, index: int) -> str:
        """Name of a sample."""
        return self._source.name(int(self._kept[index]))

    def label(self, index: int) -> int:
        """Class of a sample."""
        return self._source.label(int(self._kept[index]))

    def read(self, index: int) -> bytes:
        """The image file. Raises OSError if it cannot be read."""
        return self._source.read(int(self._kept[index]))

    def read_mask(self, index: int) -> bytes | None:
        """The class mask. Raises OSError if it cannot be read."""
        return self._source.read_mask(int(self._kept[index]))


def read_skip_list(path: Path) -> list[dict[str, str]]:
    """Read a list of unusable images, as writing makes it.

    Raises:
        UsageError: it cannot be read, or is no such list.
    """
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [{"name": str(entry["name"]), "reason": str(entry.get("reason", ""))} for entry in entries]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f'{path} is no list of images: one JSON object like {{"name": "a/b.jpg"}} per line') from None


def keep_skip_list(folder: Path, entries: list[dict[str, str]]) -> None:
    """Put the list into the folder of a split before it is planned.

    Raises:
        UsageError: the split is planned with another list.
    """
    body = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in sorted(entries, key=lambda entry: entry["name"]))
    path = folder / SKIPPED
    old = path.read_text() if path.exists() else ""
    if old == body:
        return
    if (folder / PLAN).exists():
        raise UsageError(f"{folder} is planned with another list of images to leave out; delete the folder to plan it anew")
    if body:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, body.encode())
    else:
        path.unlink()


def without_skipped(source: Source, folder: Path) -> Source:
    """The source as the split in ``folder`` is planned: without the images of its list, if it has one."""
    if not (folder / SKIPPED).exists():
        return source
    return SkippingSource(source, {entry["name"] for entry in read_skip_list(folder / SKIPPED)})


def num_skipped(folder: Path) -> int:
    """Images that the plan in ``folder`` leaves out."""
    path = folder / SKIPPED
    return len(read_skip_list(path)) if path.exists() else 0
