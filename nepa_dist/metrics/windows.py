"""Numbers that follow from the last steps: spikes, a median, a moving average. Imports nothing heavy."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 128
"""Steps that a spike is told from."""
DEVIATIONS = 6.0
_FEWEST = 32


class SpikeRatio:
    """Share of the last WINDOW values that lay more than DEVIATIONS standard deviations above the WINDOW values before each.

    A value that is not finite is a spike and is kept out of mean and deviation. Source: OLMo-core's spike score.
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self._spikes: deque[bool] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        """Count the value of a step."""
        if not math.isfinite(value):
            self._spikes.append(True)
            return
        spike = False
        if len(self._values) >= _FEWEST:
            mean = sum(self._values) / len(self._values)
            variance = sum((x - mean) ** 2 for x in self._values) / len(self._values)
            spike = value > mean + DEVIATIONS * math.sqrt(variance) + 1e-12 * abs(mean)
        self._spikes.append(spike)
        self._values.append(value)

    @property
    def ratio(self) -> float:
        """The share, from 0 to 1; in the first WINDOW steps those to come count as calm."""
        return sum(self._spikes) / WINDOW


class Median:
    """Median of the last values."""

    def __init__(self, window: int = 100) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> None:
        """Count a value."""
        self._values.append(value)

    @property
    def value(self) -> float:
        """NaN before the first value."""
        return statistics.median(self._values) if self._values else math.nan


class MovingAverage:
    """Exponential moving average that begins at the first finite value; values that are not finite are left out."""

    def __init__(self, weight: float = 0.02) -> None:
        self._weight = weight
        self.value = math.nan

    def add(self, value: float) -> None:
        """Count a value."""
        if math.isfinite(value):
            self.value = value if math.isnan(self.value) else self.value + self._weight * (value - self.value)
