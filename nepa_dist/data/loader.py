"""Batches of pixels for the trainer, made by worker processes.

What a batch holds depends on the seed, the step and the slice alone: not on the number of workers, the world size or where
the run was resumed. A sample that cannot be read is replaced in training and left out in evaluation; either way the batch
names it. Suffix letters: B samples of the batch, S side of the image in pixels.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nepa_dist.config import AugmentConfig, DataConfig
from nepa_dist.data.augment import AUGMENT_VERSION, CropTransform, Mask, Transform
from nepa_dist.data.batch import BadSample, Batch, BatchShape, Filled, Pixels, add_digests
from nepa_dist.data.containers import Container, DataError
from nepa_dist.data.decode import BadImage, decode_image
from nepa_dist.data.erasing import draw_erasing
from nepa_dist.data.order import BlockOrder, Order, fold, micro_batch_positions
from nepa_dist.data.workers import BatchSource, WorkerPool, batches_here

__all__ = ["BadSample", "Batch", "EvalLoader", "TrainLoader", "add_digests", "default_num_workers"]

MAX_REPLACEMENTS = 100
"""Substitutes that are tried for one bad sample before the run ends."""

_MAX_WORKERS = 8


def default_num_workers(local_world_size: int) -> int:
    """Worker processes of one rank: its share of the cores that this process may use, less one for the trainer; 0 to 8."""
    return max(0, min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // local_world_size - 1))


class _Loader:
    """An iterable of batches. It can be iterated again, which ends an iteration that is under way."""

    def __init__(self, source: BatchSource, *, num_workers: int, prefetch_batches: int, pin_memory: bool) -> None:
        self.num_workers = num_workers
        self._source = source
        self._prefetch_batches = prefetch_batches
        self._pin_memory = pin_memory
        self._pool: WorkerPool | None = None
        self._num_starts = 0
        self._close_at_exit = _closer(weakref.ref(self))

    def __iter__(self) -> Iterator[Batch]:
        """Start the workers at once and give an iterator over the batches."""
        self.close()
        self._num_starts += 1
        num_workers = min(self.num_workers, len(self._source))
        if num_workers == 0:
            return self._stream(batches_here(self._source, pin_memory=self._pin_memory), self._num_starts)
        # Ignored signals make a worker outlive the terminate() that ends forgotten ones at exit, so exit closes first.
        atexit.register(self._close_at_exit)
        self._pool = WorkerPool(self._source, num_workers, self._prefetch_batches, pin_memory=self._pin_memory)
        return self._stream(self._pool.batches(), self._num_starts)

    def _stream(self, batches: Iterator[Batch], start: int) -> Iterator[Batch]:
        while start == self._num_starts:
            try:
                batch = next(batches)
            except StopIteration:
                self.close()
                return
            except Exception:
                self.close()
                raise
            yield batch
            del batch  # its memory can be used again while the next one is awaited

    def close(self) -> None:
        """End the workers; what they had prepared is lost. Can be called at any time and more than once."""
        self._num_starts += 1  # ends the iteration
        atexit.unregister(self._close_at_exit)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


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
        masks: give the class masks too; a sample without one is a bad sample.
        labels: a sample without a label is a bad sample.
        transform: what makes an image, and its mask, of a sample; default: the crop and flip of ``config.augment``.
        block_shards: 0 mixes all samples; W > 0 mixes within W shards at a time, see :class:`nepa_dist.data.order.BlockOrder`.

    Raises:
        ValueError: the global batch is not a multiple of world_size x micro_batch_size, or rank is out of range.
        DataError: ``block_shards`` is given and the container has no shards; while iterating, if a bad sample and all its
            substitutes cannot be used.
        RuntimeError: while iterating, if a worker was killed or failed.
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
        masks: bool = False,
        labels: bool = False,
        transform: Transform | None = None,
        block_shards: int = 0,
    ) -> None:
        num_micros = max(1, global_batch_size // world_size // micro_batch_size)

        def positions(k: int) -> range:
            step, micro = divmod(k, num_micros)
            return micro_batch_positions(
                start_step + step, micro, rank,
                global_batch_size=global_batch_size, world_size=world_size, micro_batch_size=micro_batch_size,
            )  # fmt: skip

        positions(0)  # an impossible batch is refused here, not in the first step
        workers = config.num_workers
        super().__init__(
            _TrainBatches(
                _Samples(container, config.augment, transform, BatchShape(micro_batch_size, image_size, masks), seed, labels),
                _order(container, seed, block_shards),
                positions,
                max(0, num_steps - start_step) * num_micros,
            ),
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
        masks: give the class masks too; a sample without one is a bad sample.
        labels: a sample without a label is a bad sample.
        transform: what makes an image, and its mask, of a sample; default: the centre, bilinear.
        passes: how often an iteration gives all samples, one time after the other: workers that are forked before other
            threads start can then serve many evaluations.

    Raises:
        RuntimeError: while iterating, if a worker was killed or failed.
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
        masks: bool = False,
        labels: bool = False,
        transform: Transform | None = None,
        passes: int = 1,
    ) -> None:
        workers = config.num_workers if num_workers is None else num_workers
        ids = range(len(container)) if indices is None else indices
        self.batches_per_pass = -(-len(ids) // batch_size)
        super().__init__(
            _EvalBatches(
                _Samples(
                    container,
                    AugmentConfig(crop="center"),
                    transform,
                    BatchShape(batch_size, image_size, masks),
                    seed=0,
                    labels=labels,
                ),
                ids,
                passes,
            ),
            num_workers=default_num_workers(1) if workers is None else workers,
            prefetch_batches=config.prefetch_batches,
            pin_memory=pin_memory,
        )


class _Samples:
    """Reads, decodes and transforms single samples."""

    def __init__(
        self,
        container: Container,
        config: AugmentConfig,
        transform: Transform | None,
        shape: BatchShape,
        seed: int,
        labels: bool = False,
    ) -> None:
        self.container = container
        self._labels = labels
        self.shape = shape
        self._transform = CropTransform(config) if transform is None else transform
        self._seed = seed
        self._erase_probability = config.erase_probability
        settings = hashlib.blake2b(config.model_dump_json().encode(), digest_size=8).digest()
        self._key = fold(seed, AUGMENT_VERSION, shape.image_size, int.from_bytes(settings, "little"))

    def add(self, sample_id: int, epoch: int, rows: _Rows) -> None:
        """Make a sample into the next row. Raises BadImage or OSError, with the row still unused, if it cannot be used."""
        sample = self.container.read(sample_id)
        if self._labels and sample.label < 0:
            raise BadImage("it has no label")
        pixels = decode_image(sample.image) if isinstance(sample.image, bytes) else sample.image
        height, width = pixels.shape[:2]
        mask = self._mask(sample.mask, (height, width))
        image, mask = self._transform(
            pixels, mask, image_size=self.shape.image_size, seed=self._seed, epoch=epoch, sample_id=sample_id
        )
        # Key and size decide the crop and the flip, so their hash stands for them.
        rows.add(image, mask, sample.label, sample_id, fold(self._key, epoch, sample_id, height, width))
        if self._erase_probability:
            size, chance = self.shape.image_size, self._erase_probability
            rows.erasings.append(
                draw_erasing(size, size, seed=self._seed, epoch=epoch, sample_id=sample_id, probability=chance)
            )

    def _mask(self, mask: Mask | None, size: tuple[int, int]) -> Mask | None:
        if not self.shape.masks:
            return None
        if mask is None:
            raise BadImage("it has no mask")
        if mask.shape != size:
            raise BadImage(f"the mask has {mask.shape[1]}x{mask.shape[0]} pixels, the image {size[1]}x{size[0]}")
        return mask


class _Rows:
    """A batch while it is filled."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels
        self.bad: list[BadSample] = []
        self.erasings: list[tuple[int, int, int, int, int]] = []
        self._labels: list[int] = []
        self._ids: list[int] = []
        self._digests: list[int] = []

    def add(self, image: NDArray[np.uint8], mask: Mask | None, label: int, sample_id: int, digest: int) -> None:
        row = len(self._ids)
        self._pixels.images[row] = image
        if self._pixels.masks is not None and mask is not None:
            if mask.dtype != np.uint8 and not 0 <= mask.min() <= mask.max() <= 255:
                raise BadImage(f"the mask has classes from {mask.min()} to {mask.max()}; 0 to 255 can be used")
            self._pixels.masks[row] = mask
        self._labels.append(label)
        self._ids.append(sample_id)
        self._digests.append(digest)

    def filled(self) -> Filled:
        return Filled(self._labels, self._ids, self.bad, add_digests(*self._digests), self.erasings)


class _TrainBatches:
    """Batch k holds the samples at ``positions(k)`` of the order."""

    def __init__(self, samples: _Samples, order: Order, positions: Callable[[int], range], num_batches: int) -> None:
        self.shape = samples.shape
        self._samples = samples
        self._order = order
        self._positions = positions
        self._num_batches = num_batches
        if num_batches:
            order.lookup(positions(0)[0])  # shuffles the epoch before workers are forked, so that they share it

    def __len__(self) -> int:
        return self._num_batches

    def fill(self, k: int, pixels: Pixels) -> Filled:
        rows = _Rows(pixels)
        for position in self._positions(k):
            self._add(position, rows)
        return rows.filled()

    def _add(self, position: int, rows: _Rows) -> None:
        sample_id, epoch = self._order.lookup(position)
        for attempt in range(min(MAX_REPLACEMENTS, self._order.num_samples) + 1):
            try:
                self._samples.add(sample_id, epoch, rows)
                return
            except (BadImage, OSError) as error:
                rows.bad.append(_bad_sample(self._samples.container, sample_id, error))
                sample_id, epoch = self._order.replacement(position, attempt)
        first = rows.bad[-attempt - 1]
        raise DataError(
            f"sample {first.id} ({first.name}: {first.reason}) and {attempt} substitutes cannot be used; check the data"
        )


class _EvalBatches:
    """Batch k of a pass holds the k-th part of ``ids``."""

    def __init__(self, samples: _Samples, ids: Sequence[int], passes: int) -> None:
        self.shape = samples.shape
        self._samples = samples
        self._ids = ids
        self._per_pass = -(-len(ids) // self.shape.capacity)
        self._passes = passes

    def __len__(self) -> int:
        return self._per_pass * self._passes

    def fill(self, k: int, pixels: Pixels) -> Filled:
        rows = _Rows(pixels)
        start = k % self._per_pass * self.shape.capacity
        for sample_id in map(int, self._ids[start : start + self.shape.capacity]):
            try:
                self._samples.add(sample_id, 0, rows)
            except (BadImage, OSError) as error:
                rows.bad.append(_bad_sample(self._samples.container, sample_id, error))
        return rows.filled()


def _order(container: Container, seed: int, block_shards: int) -> Order:
    if not block_shards:
        return Order(seed, len(container))
    shards = getattr(container, "shards", None)
    if shards is None:
        raise DataError("mixing within a few shards needs data that has shards; prepare it with python -m data_prep")
    return BlockOrder(seed, shards, block_shards)


def _bad_sample(container: Container, sample_id: int, error: BadImage | OSError) -> BadSample:
    reason = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
    return BadSample(sample_id, container.name(sample_id), reason)


def _closer(reference: weakref.ref[_Loader]) -> Callable[[], None]:
    """What to call at exit; it does not keep the loader alive."""

    def close() -> None:
        if (loader := reference()) is not None:
            loader.close()

    return close
