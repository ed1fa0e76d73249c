"""Names of parameters made short for people: what repeats in every block takes one line. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def collapse(names: Iterable[str]) -> list[str]:
    """Write the first number of a name as a range: ``blocks.0.norm1`` and ``blocks.1.norm1`` become ``blocks.0-1.norm1``.

    Args:
        names: with dots.

    Returns:
        The short forms, in the order in which each began.
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        match = _NUMBER.search(name)
        key = name if match is None else f"{name[: match.start(1)]}{{}}{name[match.end(1) :]}"
        groups.setdefault(key, []).extend([] if match is None else [int(match[1])])
    return [key.format(_ranges(numbers)) if numbers else key for key, numbers in groups.items()]


def by_module(names: Iterable[str]) -> list[str]:
    """One line for each module, with its parameters: ``backbone.blocks.0-11.attn.qkv: weight, bias``."""
    modules: dict[str, list[str]] = {}
    for name in collapse(names):
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "bias", "gamma"):
            modules.setdefault(module, []).append(kind)
        else:
            modules.setdefault(name, [])
    return [f"{module}: {', '.join(kinds)}" if kinds else module for module, kinds in modules.items()]


def misfits(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], *, by: str) -> list[str]:
    """What is missing, left over or of another shape, blocks in one line.

    Args:
        found: shapes by name.
        wanted: shapes by name.
        by: who wants them, for the message: ``the config says``.
    """
    problems = [f"missing: {name}" for name in collapse(name for name in wanted if name not in found)]
    problems += [f"left over: {name}" for name in collapse(name for name in found if name not in wanted)]
    shapes: dict[str, list[str]] = {}
    for name in wanted:
        if name in found and list(found[name]) != list(wanted[name]):
            shapes.setdefault(f"{list(found[name])}, {by} {list(wanted[name])}", []).append(name)
    return problems + [f"shape of {name}: {text}" for text, names in shapes.items() for name in collapse(names)]


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as ``0-2,5``."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
