"""What the benchmarks of a training step share: arms in interleaved rounds, the machine's matmul rate, memory, kernels by kind.

Arms take their turns round by round, so that a machine that slows down meets all of them; ratios are taken within a round.
"""

from __future__ import annotations

import ctypes
import functools
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nepa_dist.linear import onednn_linear, prefers_onednn

KINDS = ("matmul", "attention", "elementwise", "optimizer", "communication", "idle")
_KIND_OF_NAME = (
    ("elementwise", r"^triton_(?!tem)"),  # named after all that it fuses with: _addmm, _flash_attention_backward
    ("communication", r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter"),
    ("optimizer", r"adam|sgd|multi_tensor|lerp|linalg_vector_norm|lpnorm|foreach"),
    ("attention", r"flash|fmha|attention|sdpa|bmm"),
    (
        "matmul",
        r"nepa_dist::linear|_linear_pointwise|gemm|gemv|cutlass|xmma|nvjet|cublas|\bmm\b|scaled_mm|addmm|convolution|wgrad|dgrad|implicit",
    ),
)
_MATRICES = ((2048, 768, 3072), (2048, 3072, 768), (768, 2048, 3072))
"""Rows, inner and columns of the products whose rate is the peak of a CPU: those of an MLP of ViT-B, both ways."""
_NUM_KERNELS = 40
"""How many kernels of a step are named."""
_NAME_LENGTH = 120
"""Characters of their names: templates make them longer than anybody reads."""
_GPU_MATRICES = ((16384, 4096, 4096), (8192, 8192, 8192))


class Arm(NamedTuple):
    """Something whose steps are timed."""

    name: str
    step: Callable[[], Tensor]
    """One update; returns the loss, 0-d, on the device."""
    images: int
    """Images per step, of all ranks."""


class Measured(NamedTuple):
    """What the rounds gave."""

    seconds: dict[str, list[float]]
    """Arm -> seconds of one step in each round."""
    peak_bytes: dict[str, int]
    """Arm -> the most that a step had allocated above what was there before it."""
    matmul_rates: list[float]
    """Operations per second of a plain matrix product, in each round."""


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(arms: Sequence[Arm], device: torch.device, dtype: torch.dtype, *, rounds: int, steps: int, warmup: int) -> Measured:
    """Time the arms in turn.

    Args:
        arms: each is warmed up by itself first, so that compilation is over.
        device: where they run.
        dtype: of the matrix products that tell the machine's rate in each round.
        rounds: turns of each arm.
        steps: per turn; the turn counts as their mean.
        warmup: steps before the first round.
    """
    peaks = {}
    # As in a run of its own: an arm of another batch than the one before would be compiled for batches of any size, and those
    # beyond the eighth not at all.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=1000):
        for arm in arms:
            for _ in range(warmup):
                arm.step()
            peaks[arm.name] = _peak_bytes(arm.step, device)
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    rates = []
    for turn in range(rounds):
        rates.append(matmul_rate(device, dtype))
        for arm in arms if turn % 2 == 0 else arms[::-1]:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                arm.step()
            synchronize(device)
            seconds[arm.name].append((time.perf_counter() - start) / steps)
    return Measured(seconds, peaks, rates)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large matrix products of random numbers: the best of four for each shape, then the mean.

    In fp32 on a CPU the faster of torch's library and oneDNN counts.
    """
    rates = []
    for rows, inner, columns in _GPU_MATRICES if device.type == "cuda" else _MATRICES:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        products = [functools.partial(torch.matmul, a, b)]
        if device.type == "cpu" and dtype == torch.float32 and prefers_onednn():
            products.append(functools.partial(onednn_linear, a, b.t().contiguous(), torch.zeros(columns)))
        best = 0.0
        for product in products * 4:
            synchronize(device)
            start = time.perf_counter()
            product()
            synchronize(device)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
        rates.append(best)
    return statistics.mean(rates)


def _peak_bytes(step: Callable[[], Tensor], device: torch.device) -> int:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # what the steps before have freed counts again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def kind_of(name: str) -> str:
    """What a kernel or operation is counted as, by its name."""
    low = name.lower()
    return next((kind for kind, pattern in _KIND_OF_NAME if re.search(pattern, low)), "elementwise")


class Breakdown(NamedTuple):
    """Where the time of one step went."""

    seconds: dict[str, float]
    """By kind of kernel."""
    kernels: list[dict[str, Any]]
    """Those that took the most time, longest first: name, kind, calls, milliseconds of all calls."""


def breakdown(step: Callable[[], Tensor], device: torch.device, trace: Path | None = None) -> Breakdown:
    """Profile one step.

    On a GPU its kernels are counted, and idle is what no kernel covers. On a CPU the time that each operation takes itself; the
    kernels of a compiled block count as elementwise, for its matrix products are operations of their own.

    Args:
        step: one update.
        device: where it runs.
        trace: file for the Chrome trace of the step; one that ends in .gz is compressed.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step()
        synchronize(device)
        wall = time.perf_counter() - start
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    seconds = dict.fromkeys(KINDS, 0.0)
    kernels = []
    for event in profiler.key_averages():
        # A range that was named, such as an optimizer's step, spans kernels that count by themselves.
        if (event.device_type == DeviceType.CUDA) == cuda and not (cuda and event.is_user_annotation):
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            kind = kind_of(event.key)
            seconds[kind] += spent / 1e6
            kernels.append({"name": event.key[:_NAME_LENGTH], "kind": kind, "calls": event.count, "milliseconds": spent / 1e3})
    seconds["idle"] = max(0.0, wall - sum(seconds.values()))
    kernels.sort(key=lambda kernel: kernel["milliseconds"], reverse=True)
    return Breakdown(seconds, kernels[:_NUM_KERNELS])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(seconds: Mapping[str, Sequence[float]], ours: str, theirs: str) -> dict[str, float]:
    """How many times as fast ``ours`` is as ``theirs`` with steps of equally many images: spread of the rounds' ratios."""
    return spread([b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)])


def place(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    from benchmarks.loader import machine

    about = machine()
    about["versions"] = {"torch": torch.__version__}
    about["threads"] = torch.get_num_threads()
    about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else about["processor"]
    return about


def file_stem(model: str, about: Mapping[str, Any], date: str, *, cuda: bool) -> str:
    """Name of a record: model, hardware, date."""
    device = "".join(c if c.isalnum() else "-" for c in about["device"].lower()).strip("-")[:40]
    return f"{model}_{device}{'' if cuda else '-' + str(about['threads']) + 'core'}_{date}"
