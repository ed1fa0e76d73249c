"""The container formats by name."""

from __future__ import annotations

from typing import Literal

from data_prep.formats import beton, mds, tar
from data_prep.formats.base import Format

CONTAINERS: tuple[Literal["tar", "mds", "beton"], ...] = ("tar", "mds", "beton")


def get_format(name: str) -> Format:
    """The module of a container format: ``tar``, ``mds`` or ``beton``.

    Raises:
        ValueError: there is no such format.
    """
    known: dict[str, Format] = {"tar": tar, "mds": mds, "beton": beton}
    if name not in known:
        raise ValueError(f"unknown container {name!r}; known are {', '.join(known)}")
    return known[name]
