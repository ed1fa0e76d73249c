"""Labels of ILSVRC2012: the development kit, or a text file for the validation images.

The trap is that there are two orders. The kit numbers the classes 1 .. 1000 in an order of its own (the *ILSVRC ids*), and its
ground truth uses these numbers. Everybody trains with the rank of a class among the sorted WordNet ids, 0 .. 999. Here WordNet
ids stand between the two, and a list of numbers is taken for ranks only where it cannot be one of ILSVRC ids.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.sources import SourceError, listed

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
WNID = re.compile(r"n\d{8}", re.ASCII)

_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_BYTES = 256 << 20
"""Of the unpacked development kit, which has 3 MB: no file may fill the memory."""


@dataclass(frozen=True)
class Devkit:
    """What the development kit says."""

    titles: dict[str, str]
    """WordNet id -> words for people, of the classes."""
    truth: list[str]
    """WordNet id of validation image 1, 2, ..."""


def read_devkit(path: Path) -> Devkit:
    """Read ``ILSVRC2012_devkit_t12.tar.gz``; nothing is unpacked to disk.

    Raises:
        SourceError: it is damaged, lacks a file, or contradicts itself.
    """
    try:
        with gzip.open(path) as packed:
            data = packed.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise SourceError(f"{path} unpacks to more than {_MAX_BYTES >> 20} MiB, so it is not the development kit")
        files = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                for wanted in (_META, _TRUTH):
                    if member.isreg() and f"/{member.name}".endswith(f"/{wanted}"):
                        files[wanted] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if missing := [name for name in (_META, _TRUTH) if name not in files]:
        raise SourceError(f"{path} lacks {' and '.join(missing)}")
    wnids, titles = _read_meta(files[_META], f"{path}: {_META}")
    truth = []
    for number, line in enumerate(files[_TRUTH].decode("ascii", "replace").split(), 1):
        if not line.isdecimal() or int(line) not in wnids:
            raise SourceError(f"{path}: {_TRUTH} line {number}: {line[:40]!r} is no ILSVRC id (1 .. {len(wnids)})")
        truth.append(wnids[int(line)])
    return Devkit(titles, truth)


def _read_meta(data: bytes, where: str) -> tuple[dict[int, str], dict[str, str]]:
    """ILSVRC id -> WordNet id and WordNet id -> words, of the classes; inner nodes of the tree are left out."""
    from scipy.io import loadmat  # slow to import, needed here alone

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)["synsets"])
        rows = [
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"])) for row in synsets if int(row["num_children"]) == 0
        ]
    except Exception as error:  # a damaged file can raise almost anything in a decoder
        raise SourceError(f"{where} cannot be understood: {error or type(error).__name__}") from None
    wnids = {number: wnid for number, wnid, _ in rows}
    titles = {wnid: words for _, wnid, words in rows}
    complete = sorted(wnids) == list(range(1, len(rows) + 1)) and len(titles) == len(rows) > 0
    if not complete or not all(WNID.fullmatch(wnid) for wnid in titles):
        raise SourceError(f"{where}: the classes do not have the ILSVRC ids 1, 2, ... and WordNet ids n########, each once")
    return wnids, titles


def read_val_labels(path: Path, files: list[str], classes: list[str]) -> tuple[list[str], list[str]]:
    """Read a text file with the label of each validation image.

    A line is a label, in the order of the sorted file names, or a file name and a label. A label is a WordNet id, or the rank
    of the class among the sorted WordNet ids, counted from 0; all lines are alike. Empty lines do not count.

    Args:
        path: the text file.
        files: names of the images.
        classes: sorted WordNet ids, or [] if they are not known yet: then labels must be WordNet ids and make the classes.

    Returns:
        WordNet id of each of ``files``, and the classes.

    Raises:
        SourceError: the file cannot be read, does not label exactly the given images, or its numbers may be ILSVRC ids.
    """
    try:
        lines = [line.split() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    widths = {len(line) for line in lines}
    if len(widths) != 1 or not widths <= {1, 2}:
        raise SourceError(f"{path}: every line must be a label, or every line a file name and a label")
    if widths == {1}:
        if len(lines) != len(files):
            raise SourceError(f"{path} has {len(lines)} labels for {len(files)} images")
        of_file = dict(zip(sorted(files), (line[0] for line in lines), strict=True))
    else:
        of_file = {line[0]: line[1] for line in lines}
        missing = [f"{file} has no label" for file in files if file not in of_file]
        extra = [f"{file} is not in the archive" for file in sorted(set(of_file) - set(files))]
        if missing or extra or len(of_file) != len(lines):
            twice = [f"{len(lines) - len(of_file)} file names occur twice"] if len(of_file) != len(lines) else []
            raise SourceError(f"{path} does not fit the validation images:{listed([*twice, *missing, *extra])}")
    labels = [of_file[file] for file in files]
    if all(WNID.fullmatch(label) for label in labels):
        classes = classes or sorted(set(labels))
        if strange := sorted(set(labels) - set(classes)):
            raise SourceError(f"{path} names classes that the data set does not have:{listed(strange)}")
        return labels, classes
    return _from_ranks(path, labels, classes), classes


def _from_ranks(path: Path, labels: list[str], classes: list[str]) -> list[str]:
    for label in labels:
        if not (label.isascii() and label.isdecimal()):
            raise SourceError(f"{path}: {label[:40]!r} is neither a WordNet id (n########) nor a number, like the others")
    if not classes:
        raise SourceError(f"{path} holds numbers: put {DEVKIT} or the training archive beside the images, to know the classes")
    ranks = [int(label) for label in labels]
    if max(ranks) >= len(classes):
        hint = "; ILSVRC ids, which count from 1 in another order, need the development kit" if min(ranks) > 0 else ""
        raise SourceError(f"{path}: the number {max(ranks)} is no rank of a class (0 .. {len(classes) - 1}){hint}")
    return [classes[rank] for rank in ranks]
