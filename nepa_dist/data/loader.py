"""Batches of pixels for the trainer, read by worker processes.

What a batch holds depends on the seed, the step and the slice alone: not on the number of workers, the world size or where
the run was resumed. A sample that cannot be read is replaced in training and left out in evaluation; either way the batch
names it. Suffix letters: B samples of the batch, S side of the image in pixels.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nepa_dist.config import AugmentConfig, DataConfig
from nepa_dist.data.augment import augment
from nepa_dist.data.containers import Container, DataError
from nepa_dist.data.decode import BadImage, decode_image
from nepa_dist.data.order import Order, micro_batch_positions

MAX_REPLACEMENTS = 100
"""Substitutes that are tried for one bad sample before the run ends."""

_MAX_WORKERS = 8
# The trainer alone decides when to stop; a scheduler and a terminal signal the whole process group.
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class BadSample(NamedTuple):
    """A sample that could not be used."""

    id: int
    name: str
    reason: str


@dataclass
class Batch:
    """Samples of one forward pass, on the host."""

    images: Tensor
    """uint8 [B, S, S, 3]."""
    labels: Tensor
    """int64 [B]; -1 is unknown."""
    ids: Tensor
    """int64 [B], the samples that are shown, so of the substitutes where a sample was bad."""
    bad: tuple[BadSample, ...]
    """Samples that were replaced (training) or left out (evaluation)."""

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which the copy to a GPU runs beside the computation."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.ids.pin_memory(), self.bad)


def batch_digest(batch: Batch) -> str:
    """Short hash of ids and pixels (16 hexadecimal digits); equal for two runs that saw the same data."""
    digest = hashlib.blake2b(batch.ids.numpy().tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(batch.images.numpy()).data)
    return digest.hexdigest()


def default_num_workers(local_world_size: int) -> int:
    """Worker processes of one rank: its share of the cores that this process may use, less one for the trainer; 0 to 8."""
    return max(0, min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // local_world_size - 1))


class _Loader:
    """A DataLoader whose keys are whole batches, with workers that are deaf to signals and always end.

    A loader can be iterated again, which ends an iteration that is under way.
    """

    def __init__(
        self,
        dataset: Dataset[Batch | DataError],
        keys: Sampler[Any],
        *,
        num_workers: int,
        prefetch_batches: int,
        pin_memory: bool,
    ) -> None:
        self.num_workers = num_workers
        self._batches: Iterator[Batch | DataError] | None = None
        self._num_starts = 0
        self._loader: DataLoader[Batch | DataError] = DataLoader(
            dataset,
            batch_size=None,  # one key is one batch
            sampler=keys,
            num_workers=num_workers,
            prefetch_factor=prefetch_batches if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            # Forked workers share the container's memory and inherit the blocked signals.
            multiprocessing_context="fork" if num_workers else None,
            generator=torch.Generator(),  # otherwise each iteration draws from the global one
        )
        self._close_at_exit = _closer(weakref.ref(self))

    def __iter__(self) -> Iterator[Batch]:
        """Start the workers at once and give an iterator over the batches."""
        self.close()
        # Ignored signals make a worker outlive the terminate() that ends forgotten ones at exit, so exit closes first.
        atexit.register(self._close_at_exit)
        with _blocked_signals():
            self._batches = iter(self._loader)
        self._num_starts += 1
        return self._stream(self._num_starts)

    def _stream(self, start: int) -> Iterator[Batch]:
        while self._batches is not None and start == self._num_starts:
            try:
                batch = next(self._batches)
            except StopIteration:
                self.close()
                return
            except Exception as error:
                try:
                    death = _death_of_a_worker(getattr(self._batches, "_workers", ()))
                finally:  # torch reports a death from a signal handler too, so that can raise at any point
                    self.close()
                if death is None:
                    raise
                raise RuntimeError(death) from error
            if isinstance(batch, DataError):
                self.close()
                raise batch
            yield batch

    def close(self) -> None:
        """End the workers; what they had prepared is lost. Can be called at any time and more than once."""
        atexit.unregister(self._close_at_exit)
        batches, self._batches = self._batches, None
        if (shutdown := getattr(batches, "_shutdown_workers", None)) is None:
            return  # not started, or no workers
        # Explicit, because the traceback of an error can keep the iterator alive. It waits some seconds for each worker.
        shutdown()
        for worker in batches._workers:  # type: ignore[union-attr]
            if worker.is_alive():  # stuck in a read
                worker.kill()
                worker.join()


class TrainLoader(_Loader):
    """The training batches of one rank, from ``start_step`` to ``num_steps``; within a step, micro-batch by micro-batch.

    Args:
        container: the training split.
        config: workers, prefetching and augmentation.
        image_size: S, pixels.
        seed: of order and augmentation.
        global_batch_size: samples per step over all ranks.
        micro_batch_size: B, samples per batch.
        rank, world_size: which slice of the global batch is read.
        start_step: finished updates; 0 for a new run.
        num_steps: updates of the whole run.
        local_world_size: ranks that share the cores of this process.
        pin_memory: give batches in page-locked memory (needs a GPU).

    Raises:
        ValueError: the global batch is not a multiple of world_size x micro_batch_size, or rank is out of range.
        DataError: while iterating, if a bad sample and all its substitutes cannot be used.
        RuntimeError: while iterating, if a worker was killed.
    """

    def __init__(
        self,
        container: Container,
        config: DataConfig,
        *,
        image_size: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int,
        num_steps: int,
        local_world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        def positions(step: int, micro: int) -> range:
            return micro_batch_positions(
                step, micro, rank, global_batch_size=global_batch_size, world_size=world_size, micro_batch_size=micro_batch_size
            )

        positions(0, 0)  # an impossible batch is refused here, not in the first step
        num_micros = global_batch_size // world_size // micro_batch_size
        workers = config.num_workers
        super().__init__(
            _TrainBatches(container, config.augment, image_size, seed),
            _Keys(lambda: (positions(step, micro) for step in range(start_step, num_steps) for micro in range(num_micros))),
            num_workers=default_num_workers(local_world_size) if workers is None else workers,
            prefetch_batches=config.prefetch_batches,
            pin_memory=pin_memory,
        )


class EvalLoader(_Loader):
    """Every sample once, in order, centre crop; the last batch is short.

    Bad samples are left out and named in ``Batch.bad``; so a batch can be short too, or empty.

    Args:
        container: the split to evaluate.
        config: workers and prefetching.
        image_size: S, pixels.
        batch_size: B, samples per batch.
        indices: sample ids to read, for example one rank's share; default: all.
        num_workers: default: config.num_workers, or the cores of this process less one, at most 8.
        pin_memory: give batches in page-locked memory (needs a GPU).

    Raises:
        RuntimeError: while iterating, if a worker was killed.
    """

    def __init__(
        self,
        container: Container,
        config: DataConfig,
        *,
        image_size: int,
        batch_size: int,
        indices: Sequence[int] | None = None,
        num_workers: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        ids = range(len(container)) if indices is None else indices
        workers = config.num_workers if num_workers is None else num_workers
        super().__init__(
            _EvalBatches(container, image_size),
            _Keys(lambda: (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))),
            num_workers=default_num_workers(1) if workers is None else workers,
            prefetch_batches=config.prefetch_batches,
            pin_memory=pin_memory,
        )


class _Keys(Sampler[Any]):
    """The keys of the batches, made anew for each iteration. It stays in the trainer's process."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


class _TrainBatches(Dataset[Batch | DataError]):
    """Key: a range of stream positions."""

    def __init__(self, container: Container, config: AugmentConfig, image_size: int, seed: int) -> None:
        self._container = container
        self._config = config
        self._image_size = image_size
        self._seed = seed
        self._order = Order(seed, len(container))

    def __getitem__(self, positions: range) -> Batch | DataError:
        rows = _Rows(len(positions), self._image_size)
        try:
            for position in positions:
                self._add(position, rows)
        except DataError as error:
            # As a value: an exception from a worker would arrive with a traceback in place of its message.
            return error
        return rows.batch()

    def _add(self, position: int, rows: _Rows) -> None:
        sample_id, epoch = self._order.lookup(position)
        for attempt in range(min(MAX_REPLACEMENTS, self._order.num_samples) + 1):
            try:
                pixels, label = _read(self._container, sample_id)
                break
            except (BadImage, OSError) as error:
                rows.bad.append(_bad_sample(self._container, sample_id, error))
                sample_id, epoch = self._order.replacement(position, attempt)
        else:
            first = rows.bad[-attempt - 1]
            raise DataError(
                f"sample {first.id} ({first.name}: {first.reason}) and {attempt} substitutes cannot be used; check the data"
            )
        image = augment(pixels, self._config, image_size=self._image_size, seed=self._seed, epoch=epoch, sample_id=sample_id)
        rows.add(image, label, sample_id)


class _EvalBatches(Dataset[Batch | DataError]):
    """Key: a sequence of sample ids."""

    def __init__(self, container: Container, image_size: int) -> None:
        self._container = container
        self._config = AugmentConfig(crop="center")
        self._image_size = image_size

    def __getitem__(self, ids: Sequence[int]) -> Batch | DataError:
        rows = _Rows(len(ids), self._image_size)
        for sample_id in map(int, ids):
            try:
                pixels, label = _read(self._container, sample_id)
            except (BadImage, OSError) as error:
                rows.bad.append(_bad_sample(self._container, sample_id, error))
                continue
            image = augment(pixels, self._config, image_size=self._image_size, seed=0, epoch=0, sample_id=sample_id)
            rows.add(image, label, sample_id)
        return rows.batch()


class _Rows:
    """A batch while it is filled."""

    def __init__(self, capacity: int, image_size: int) -> None:
        self._images = np.empty((capacity, image_size, image_size, 3), np.uint8)
        self._labels: list[int] = []
        self._ids: list[int] = []
        self.bad: list[BadSample] = []

    def add(self, image: NDArray[np.uint8], label: int, sample_id: int) -> None:
        self._images[len(self._ids)] = image
        self._labels.append(label)
        self._ids.append(sample_id)

    def batch(self) -> Batch:
        images = torch.from_numpy(self._images[: len(self._ids)])
        labels, ids = torch.tensor(self._labels, dtype=torch.int64), torch.tensor(self._ids, dtype=torch.int64)
        return Batch(images, labels, ids, tuple(self.bad))


def _read(container: Container, sample_id: int) -> tuple[NDArray[np.uint8], int]:
    sample = container.read(sample_id)
    pixels = decode_image(sample.image) if isinstance(sample.image, bytes) else sample.image
    return pixels, sample.label


def _bad_sample(container: Container, sample_id: int, error: BadImage | OSError) -> BadSample:
    reason = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
    return BadSample(sample_id, container.name(sample_id), reason)


def _start_worker(_: int) -> None:
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    torch.set_num_threads(1)


def _death_of_a_worker(workers: Sequence[BaseProcess]) -> str | None:
    """What ended a worker, if one died: torch may report no more than a broken connection."""
    # A dying process closes its files before its parent can see that it is dead: wait for the one, then for the other.
    ended = wait([worker.sentinel for worker in workers], timeout=1.0) if workers else []
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(1.0)
        if code := worker.exitcode:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"DataLoader worker (pid {worker.pid}) {how}; a frequent cause is too little memory or shared memory"
    return None


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold signals back while workers start: they inherit the block until they have begun to ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _closer(reference: weakref.ref[_Loader]) -> Callable[[], None]:
    """What to call at exit; it does not keep the loader alive."""

    def close() -> None:
        if (loader := reference()) is not None:
            loader.close()

    return close
