"""Which container a source is, and its opening."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

from nepa_dist.config import DataConfig
from nepa_dist.data.containers import Container, DataError
from nepa_dist.data.folder import SUFFIXES, FolderContainer
from nepa_dist.data.index import MANIFEST

DIGITS = "digits"
"""The source that names the embedded data set. A folder of that name is reached as ``./digits``."""

_SHARDS = (b".tar", b".mds", b".beton")

_LAYOUT = "expected FOLDER/train/<class>/* and FOLDER/val/<class>/*"


def open_container(
    source: str | None,
    split: Literal["train", "val"],
    *,
    image_size: int,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
    checksums: bool = False,
) -> Container:
    """Open one split of a data set.

    Args:
        source: ``digits``, or a folder that holds ``train`` and ``val``, or (for the train split) the images themselves; the
            parts may be prepared splits, and then a URL that holds them will do as well.
        split: which part.
        image_size: pixels, the side at which embedded scenes are drawn; folders do not use it.
        cache_dir, cache_bytes: of what comes from a URL, see :class:`nepa_dist.data.remote.RemoteContainer`.
        checksums: compare what is read with its checksum; only prepared splits have them.

    Raises:
        DataError: source is None, is no folder, has another layout, cannot be read, holds no images, or has no checksums.
    """
    if source is None:
        raise DataError("data.source is not set: pass --data FOLDER or --data digits")
    without = DataError(f"data.checksums: {source} has no prepared {split} split, and only those have checksums")
    if source == DIGITS:
        if checksums:
            raise without
        from nepa_dist.data.digits import DigitScenes

        return DigitScenes(split, image_size)
    if "://" in source:
        from nepa_dist.data.remote import RemoteContainer

        return RemoteContainer(f"{source.rstrip('/')}/{split}", cache_dir=cache_dir, cache_bytes=cache_bytes, check=checksums)
    root = _existing_folder(source)
    if os.path.isfile(root / split / MANIFEST):
        from nepa_dist.data.prepared import PreparedContainer

        return PreparedContainer(root / split, check=checksums)
    for folder in (root / split, root):
        _refuse_shards(folder)
    if checksums:
        raise without
    parts = [name for name in ("train", "val") if os.path.isdir(root / name)]
    if len(parts) == 1 and _holds_images(root / parts[0]) and (beside := _other_classes(root, parts[0])):
        raise DataError(
            f"{root}: is {parts[0]}/ a split, or a class like {beside}/ beside it? Move the classes into {root / 'train'}/ "
            f"(a class of that name too), or {beside}/ out of {root}"
        )
    if split in parts:
        return FolderContainer(root / split, split, class_roots=[root / part for part in parts])
    if parts:
        raise DataError(f"{root} has {parts[0]}/ but no {split}/: {_LAYOUT}")
    if split == "val":
        raise DataError(f"{root} has no val/ folder, so there is no validation split: {_LAYOUT}")
    return FolderContainer(root, split)


def _other_classes(root: Path, part: str) -> str | None:
    """A folder with images beside ``part`` that is no split by its name."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    others = [name for name in names if name != part and not name.lower().startswith(("train", "val", "test"))]
    return next((name for name in others if _holds_images(root / name)), None)


def _holds_images(folder: Path) -> bool:
    """Whether there are images in a folder itself."""
    try:
        with os.scandir(os.fsencode(folder)) as found:
            return any(entry.name.lower().endswith(SUFFIXES) for entry in found)
    except OSError:  # whoever reads it will say why it cannot be read
        return False


def _refuse_shards(folder: Path) -> None:
    """Raise DataError for a folder of shards that is no prepared split. Archives beside folders or images are none."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except OSError:
        return  # it is missing, or whoever reads it next will say why it cannot be read
    names = [os.fsencode(entry.name).lower() for entry in entries]
    if MANIFEST.encode() in names:
        here = folder.absolute()
        if here.name in ("train", "val"):
            raise DataError(f"{folder} is one prepared split: name the folder that holds it, {here.parent}")
        raise DataError(
            f"{folder} is one prepared split under another name: a data set holds its splits as OUT/train and OUT/val; "
            f"mkdir OUT, mv {folder} OUT/train, then name OUT"
        )
    if b"plan.json" in names:
        raise DataError(f"{folder} is a prepared split that is not finished: run the same python -m data_prep command again")
    shards = [entry.name for entry, name in zip(entries, names, strict=True) if name.endswith(_SHARDS)]
    if shards and not any(os.path.isdir(e.path) or n.endswith(SUFFIXES) for e, n in zip(entries, names, strict=True)):
        raise DataError(f"{folder} holds shards ({min(shards)}, ...) without an index: python -m data_prep adopt {folder}")


def open_split(config: DataConfig, split: Literal["train", "val"], *, image_size: int) -> Container:
    """:func:`open_container` of the source, and with the cache, that a configuration names."""
    cache_bytes = None if config.cache_gigabytes is None else round(config.cache_gigabytes * 1e9)
    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    return open_container(
        config.source,
        split,
        image_size=image_size,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
        checksums=config.checksums,
    )


def _existing_folder(source: str) -> Path:
    root = Path(source).expanduser()
    if os.path.isdir(root):
        return root
    if os.path.exists(root):
        raise DataError(f"data.source {source} is a file; it must be a folder of images (unpack an archive first)")
    folder = root.absolute().parent
    try:
        siblings = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        raise DataError(f"data.source {source}: neither this folder nor {folder} can be found") from None
    near = difflib.get_close_matches(root.name, [*siblings, DIGITS], n=1)
    hint = "" if not near else f"; did you mean {DIGITS if near == [DIGITS] else root.parent / near[0]}?"
    raise DataError(f"data.source {source}: no such folder{hint}")
