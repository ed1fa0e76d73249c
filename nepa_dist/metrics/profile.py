"""Where the time of a step goes, without waiting for the device. Imports torch only.

On a CPU each mark reads the clock. On a GPU each mark records an event in the stream, and the times between events are read
one step later, when the step's other numbers have been waited for anyhow. They are then what the device saw: a wait for data
that hides behind work still queued counts for nothing.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Mapping

import torch
from torch import nn


class Marks:
    """Moments of one step, each with the phase that ended there."""

    def __init__(self) -> None:
        self.moments: list[tuple[str, float | torch.cuda.Event]] = []

    def read(self) -> dict[str, float]:
        """Seconds by phase; on a GPU only after the device has passed the last mark."""
        seconds: dict[str, float] = {}
        for (_, start), (phase, end) in itertools.pairwise(self.moments):
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                passed = start.elapsed_time(end) / 1000
            else:
                assert isinstance(start, float)
                assert isinstance(end, float)
                passed = end - start
            seconds[phase] = seconds.get(phase, 0.0) + passed
        return seconds


class Stopwatch:
    """Marks where the time of a step goes, by phase (``registry.PHASES``).

    Args:
        device: where the steps compute.
        embedding: first layer of the model. When the gradient of its output is there, nothing is left of a backward pass but
            the layer's own gradient and those reductions between ranks that the computation did not hide. Where the layer is
            frozen they cannot be told apart, and count as backward.
    """

    def __init__(self, device: torch.device, embedding: nn.Module) -> None:
        self._cuda = device.type == "cuda"
        self._marks = Marks()
        self._computed = False
        embedding.register_full_backward_pre_hook(self._on_last_gradient)
        # That images need no gradient is why this hook tells the end of the backward pass; torch warns of it.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")

    def start(self) -> None:
        """A step begins."""
        self._marks = Marks()
        self.mark("")

    def mark(self, phase: str) -> None:
        """The time since the last mark belonged to ``phase``."""
        if not self._cuda:
            self._marks.moments.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.moments.append((phase, event))

    def mark_backward(self, *, reduces: bool) -> None:
        """A backward pass is over.

        Args:
            reduces: it averaged gradients over several ranks.
        """
        self.mark("communication" if reduces and self._computed else "backward")
        self._computed = False

    def stop(self) -> Marks:
        """The marks of the step."""
        return self._marks

    def _on_last_gradient(self, module: nn.Module, gradient: object) -> None:
        self.mark("backward")
        self._computed = True


PEAK_FLOPS: Mapping[str, tuple[float, float]] = {
    "B200": (2250e12, 75e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "GH200": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A30": (165e12, 10.3e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}
"""Dense operations per second with bf16 products and fp32 sums, and in fp32 without tensor cores, by a part of the device's
name: NVIDIA's data sheets."""


def peak_flops(device_name: str, *, fp32: bool) -> float | None:
    """Peak of a device by its name; None if it is not known, or is a part of a GPU (MIG).

    Of the entries whose words are all in the name, the longest decides.
    """
    words = f" {device_name.replace('-', ' ')} "
    fits = [name for name in PEAK_FLOPS if all(f" {word} " in words for word in name.split(" "))]
    if not fits or " MIG " in words:
        return None
    return PEAK_FLOPS[max(fits, key=len)][1 if fp32 else 0]
