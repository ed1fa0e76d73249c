"""Prepared splits for tests, written from small image folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.open_source import open_source
from data_prep.plan import Container, make_plan
from data_prep.sources import Source
from data_prep.write import Written, write_split


def source(images: Path) -> Source:
    """The images of a folder."""
    return open_source(images, kind="folder", split="train")


def planned(images: Path, folder: Path, container: Container = "mds", *, policy: str = "short32", shards: int = 5) -> Path:
    """Plan a split and return its folder."""
    make_plan(source(images), folder, name="tiny", container=container, policy=policy, num_shards=shards)
    return folder


def write(folder: Path, images: Path, **options: Any) -> Written:
    """Write a planned split."""
    return write_split(folder, source(images), quiet=True, **options)


def prepare(images: Path, folder: Path, container: Container = "mds", *, policy: str = "short32", shards: int = 4) -> Path:
    """Plan and write a split and return its folder."""
    write(planned(images, folder, container, policy=policy, shards=shards), images)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Trapped:
    """A source that does something else first when one image, or any, is read."""

    def __init__(self, inner: Source, trap: Callable[[], object], index: int | None = 17) -> None:
        self._inner, self._trap, self._index = inner, trap, index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def read(self, index: int) -> bytes:
        if self._index in (index, None):
            self._trap()
        return self._inner.read(index)
