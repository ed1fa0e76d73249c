"""How well nearest neighbours tell the classes while a run trains, measured beside the loop on a small fixed set of images.

The loop gives its weights and asks now and then for the result; it waits for neither. On a CPU the work is done by a process of
its own at the lowest priority, which takes what the trainer leaves: on two cores a step took 1.3 times as long while it worked,
and twice as long beside a thread (docs/probes.md). On a GPU a thread works on a stream of its own, of the least priority.

Measured is one layer, by default the block in the middle: the last ones return to the patch embeddings (see
:mod:`nepa_dist.tasks.probe`, which has the protocol). Only the blocks up to it are copied and run. Images are read once and
kept as bytes. A failure is counted and told, and never ends the run. Imports no torch before there is something to do.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from nepa_dist.config import Config
from nepa_dist.data.classes import other_classes
from nepa_dist.data.containers import Container, DataError
from nepa_dist.data.open import open_split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nepa_dist.online_probe import Setup

_PREFIX = "backbone."
_CLOSE_SECONDS = 30.0
_LOWEST_PRIORITY = 19


class KnnResult(NamedTuple):
    """How one measurement ended."""

    step: int
    """Finished updates of the weights that were measured."""
    values: dict[str, float]
    """Metrics by registry key: accuracy, its step and time if there is one; in any case how many failed and were left out."""
    problem: str | None
    """Why there is no accuracy."""


def online_knn_problems(config: Config, train: Container | None = None) -> list[str]:
    """Why k-NN cannot be measured during a run with this configuration; empty if it can.

    Args:
        config: its data is opened.
        train: the training split, if it is open already.
    """
    splits: dict[str, Container] = {} if train is None else {"train": train}
    try:
        for split in ("train", "val"):
            if split not in splits:
                splits[split] = open_split(
                    config.data, "val" if split == "val" else "train", image_size=config.model.image_size
                )
    except DataError as error:
        return [f"metrics.knn_every needs labelled images and a validation split: {error}; null trains without"]
    for split, container in splits.items():
        if len(container.class_names) < 2:
            found = f"the {split} split of {config.data.source} has {len(container.class_names)}"
            return [f"metrics.knn_every needs images of two classes or more, {found}; null trains without"]
    if problem := other_classes(splits["train"].class_names, splits["val"].class_names):
        return [f"metrics.knn_every needs the same classes in both splits of {config.data.source}, but {problem}"]
    return []


class OnlineKnn:
    """Measures the k-NN accuracy of weights beside training; one measurement at a time. Use from one thread, on one rank.

    Args:
        config: of the run: data, model and attention.
        device: of the trainer.
        num_train: training images whose labels vote, spread evenly over the split.
        num_test: validation images that are classified, likewise.
        layer: block whose patch tokens are averaged, from 0; negative ones count from the end. Default: the middle.
        in_process: work in a thread of this process; default: on a GPU.

    Raises:
        ValueError: the layer is no block.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        num_train: int = 2000,
        num_test: int = 1000,
        layer: int | None = None,
        in_process: bool | None = None,
    ) -> None:
        from nepa_dist.online_probe import Setup

        depth = config.model.depth
        layer = depth // 2 if layer is None else layer
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} is not a block: the model has {depth}, numbered from 0 to {depth - 1}")
        setup = Setup(config, num_train, num_test, layer % depth)
        local = device.type != "cpu" if in_process is None else in_process
        self._worker: _Worker = _Here(setup, device) if local else _Apart(setup)
        self._wanted = tuple(_PREFIX + name for name in _parameter_prefixes(layer % depth))
        self._thread: threading.Thread | None = None
        self._result: KnnResult | None = None
        self.failures = 0
        """Measurements that failed."""
        self.skipped = 0
        """Measurements that fell due while an earlier one was running."""
        atexit.register(self.close)

    def start(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> bool:
        """Copy the weights and begin to measure them, unless an earlier measurement is still running.

        Args:
            step: finished optimizer updates.
            weights: parameter name (``backbone.*``; others are passed over) and full tensor, which may change as soon as this
                returns. Consumed to its end whatever happens: making it may be a collective that other ranks take part in.

        Returns:
            Whether it began.
        """
        idle = self._thread is None or not self._thread.is_alive()
        state: dict[str, Tensor] = {}
        for name, tensor in weights:
            if idle and name.startswith(self._wanted):
                state[name.removeprefix(_PREFIX)] = self._worker.copy(tensor)
        if not idle:
            self.skipped += 1
            return False
        self._thread = threading.Thread(target=self._measure, args=(step, state), name="online k-NN", daemon=True)
        self._worker.begin()
        self._thread.start()
        return True

    def poll(self, timeout: float = 0.0) -> KnnResult | None:
        """The result of a measurement that has ended, once.

        Args:
            timeout: how long to wait for one that is running, seconds.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return None
        result, self._result = self._result, None
        if result is not None and result.problem is not None:
            self.failures += 1
        counts = {"knn_failures_total": float(self.failures), "knn_skipped_total": float(self.skipped)}
        return result and result._replace(values=result.values | counts)

    def close(self) -> None:
        """Give up what is running and let go of images and processes. Can be called more than once."""
        atexit.unregister(self.close)
        self._worker.close()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
        self._result = None

    def _measure(self, step: int, state: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        try:
            accuracy = self._worker.accuracy(state)
        except Exception as error:  # whatever it is, training goes on
            self._result = KnnResult(step, {}, str(error) or type(error).__name__)
            return
        values = {"knn_top1": accuracy, "knn_step": float(step), "knn_seconds": time.perf_counter() - start}
        self._result = KnnResult(step, values, None)


def _parameter_prefixes(layer: int) -> list[str]:
    """What the names of the parameters of a backbone that ends after a block begin with."""
    return ["cls_token", "pos_embed", "patch_embed.", "norm.", *(f"blocks.{index}." for index in range(layer + 1))]


class _Worker(Protocol):
    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor in fp32 where the work is done."""

    def begin(self) -> None:
        """All copies have been made; called by the thread that made them."""

    def accuracy(self, state: dict[str, Tensor]) -> float:
        """Measure; called by another thread."""

    def close(self) -> None:
        """End what runs."""


class _Here:
    """Works in this process: on a GPU on a stream of its own."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        import torch

        from nepa_dist.online_probe import OnlineProbe

        self._device = device
        self._stop = threading.Event()
        self._probe = OnlineProbe(setup, device, self._stop)
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # of the least priority, which is the default

    def copy(self, tensor: Tensor) -> Tensor:
        import torch

        return tensor.detach().to(self._device, torch.float32, copy=True)

    def begin(self) -> None:
        import torch

        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def accuracy(self, state: dict[str, Tensor]) -> float:
        import torch

        if self._stream is None:
            return self._probe.accuracy(state)
        with torch.cuda.stream(self._stream), torch.autocast("cuda", torch.bfloat16):
            result = self._probe.accuracy(state)
            self._stream.synchronize()  # the copies belong to the loop's stream, which must not use their memory before
        return result

    def close(self) -> None:
        self._stop.set()


class _Apart:
    """Works in a process of the lowest priority, which is started when it is needed and lives as long as the trainer.

    A request is the length and the bytes of a safetensors file, an answer is a line of JSON.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def copy(self, tensor: Tensor) -> Tensor:
        import torch

        return tensor.detach().to("cpu", torch.float32, copy=True)

    def begin(self) -> None:
        pass

    def accuracy(self, state: dict[str, Tensor]) -> float:
        import safetensors.torch

        from nepa_dist.online_probe import LENGTH_BYTES

        request = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for part in (len(request).to_bytes(LENGTH_BYTES, "little"), request):
                process.stdin.write(part)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            self._process = None
            code = process.wait()
            raise RuntimeError(f"its process {'was killed' if code < 0 else 'ended'} (exit code {code})")
        answer = json.loads(line)
        if "problem" in answer:
            raise RuntimeError(answer["problem"])
        return float(answer["top1"])

    def close(self) -> None:
        self._closed = True
        if (process := self._process) is not None:
            process.kill()  # it has nothing to lose
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nepa_dist.online_probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread: at the lowest priority, several would spend their time waiting for each other.
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            # A scheduler and a terminal signal the trainer's whole group; only the trainer decides when this ends.
            start_new_session=True,
        )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, _LOWEST_PRIORITY)
        if self._closed:
            self.close()
        assert self._process.stdin is not None
        setup = self._setup._asdict() | {"config": self._setup.config.model_dump(mode="json")}
        self._process.stdin.write(json.dumps(setup).encode() + b"\n")
        return self._process
