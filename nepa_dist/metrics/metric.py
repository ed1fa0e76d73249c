"""What the registry knows of one metric. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "info"]
Ranks = Literal["run", "mean", "max", "sum", "main", "rank", "node"]
NUMBERED = ("rank", "node")
"""Labels whose values are numbers."""


@dataclass(frozen=True)
class Metric:
    """One number, or one family of numbers that differ in a label.

    Args:
        name: key in log lines, without the label value.
        kind: counter (only grows, apart from restarts), gauge, histogram (the endpoint alone has it), or info (labels of a 1).
        unit: seconds, bytes, steps, images ...; ratio for a share or a cosine; empty if it has none.
        help: what the number is, with its formula or source.
        label: name of the label, or None.
        label_values: all values that the label can take; none for those whose values are numbers.
        ranks: how it comes from the ranks: a fact of the whole run, their mean, maximum or sum, the main rank's own, each
            rank's, or each node's.
        buckets: upper ends of a histogram's buckets.
        when: in which runs it exists, if not in all.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    label: str | None = None
    label_values: tuple[str, ...] = ()
    ranks: Ranks = "run"
    buckets: tuple[float, ...] = ()
    when: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that this metric has in log lines; those of a family by rank or node are not listed."""
        if self.label in NUMBERED or self.kind == "info":
            return ()
        return tuple(f"{self.name}.{value}" for value in self.label_values) if self.label else (self.name,)
