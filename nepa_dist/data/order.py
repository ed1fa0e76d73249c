"""The order of the samples: a pure function of (seed, epoch, position).

The whole run reads one endless stream of positions 0, 1, 2, ... With N samples, position k is sample ``permutation_e[k % N]``
of epoch ``e = k // N``. Step s takes positions ``[s G, (s + 1) G)`` for a global batch of G; ranks and micro-batches are slices
of that. So a batch may straddle two epochs, every epoch shows each sample exactly once, all ranks have equal steps, and
the number of finished steps is all that a resumed run needs to know.

:class:`Order` mixes all samples. :class:`BlockOrder` stays within a few shards at a time, for storage that is slow at random
reads.

The hash is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). numpy's generators are not used: their streams may change
between versions (NEP 19).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHARD_STREAM = 0x73686172  # keeps the order of the shards apart from that of the samples


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash each element with one step of SplitMix64; a bijection of 64-bit numbers.

    Args:
        x: uint64 array of any shape with at least one dimension (numpy scalars would warn on overflow).

    Returns:
        uint64 array of the same shape.
    """
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def _mix(x: int) -> int:
    """:func:`splitmix64` of one number, 0 <= x < 2^64; for single numbers much faster than an array."""
    z = (x + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def fold(*keys: int) -> int:
    """Hash of a sequence of integers (each taken modulo 2^64), 0 <= hash < 2^64; the order of the keys matters."""
    state = 0
    for key in keys:
        state = _mix(state ^ (key & _MASK))
    return state


def spread(total: int, limit: int | None) -> Sequence[int]:
    """At most ``limit`` of ``total`` indices, spread evenly (classes may be in order)."""
    if limit is None or limit >= total:
        return range(total)
    return [i * total // limit for i in range(limit)]


class KeyedDraws:
    """The numbers of :func:`keyed_uniforms`, each computed when it is asked for.

    Args:
        seed: of the run.
        keys: what the numbers are for.
    """

    def __init__(self, seed: int, *keys: int) -> None:
        self._state = fold(seed, *keys)

    def __getitem__(self, index: int) -> float:
        """Draw ``index`` (0, 1, ...), uniform in [0, 1)."""
        return (_mix((self._state + index * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def keyed_uniforms(seed: int, *keys: int, count: int) -> NDArray[np.float64]:
    """Random numbers that depend on the keys alone (counter-based: no state, any thread, any order).

    Args:
        seed: of the run.
        keys: what the numbers are for, for example a purpose, an epoch and a sample id.
        count: how many. A smaller count gives a prefix of a larger one.

    Returns:
        float64 [count], uniform in [0, 1).
    """
    counters = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = splitmix64(np.uint64(fold(seed, *keys)) + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """Sample ids in the order of one epoch: the stable argsort of the hashes of (seed, epoch, id).

    Args:
        seed: of the run.
        epoch: counted from 0.
        num_samples: N.

    Returns:
        int64 [N], each of 0 .. N-1 once.
    """
    ids = np.arange(num_samples, dtype=np.uint64)
    return np.argsort(splitmix64(np.uint64(fold(seed, epoch)) ^ ids), kind="stable").astype(np.int64, copy=False)


class Order:
    """The endless stream of samples of a run.

    Args:
        seed: of the run.
        num_samples: N, at least 1.

    Raises:
        ValueError: num_samples is less than 1.
    """

    def __init__(self, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least 1 sample, got {num_samples}")
        self.seed = seed
        self.num_samples = num_samples
        self._cache: dict[int, NDArray[np.int64]] = {}

    def lookup(self, position: int) -> tuple[int, int]:
        """Sample id and epoch at a position of the stream (0, 1, 2, ... over the whole run)."""
        epoch, index = divmod(position, self.num_samples)
        return int(self._permutation(epoch)[index]), epoch

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """Substitute for the bad sample at a position: (id, epoch) half an epoch further on, wrapped within the epoch.

        Args:
            position: of the bad sample.
            attempt: 0 for the first substitute, 1 for the next if that is bad too, ...
        """
        epoch, index = divmod(position, self.num_samples)
        index = (index + self.num_samples // 2 + attempt) % self.num_samples
        return int(self._permutation(epoch)[index]), epoch

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # Two, because batches straddle epochs and workers run ahead of each other.
        if epoch not in self._cache:
            if len(self._cache) == 2:
                del self._cache[min(self._cache)]
            self._cache[epoch] = self._shuffle(epoch)
        return self._cache[epoch]

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.seed, epoch, self.num_samples)


class BlockOrder(Order):
    """The stream for storage that is slow at random reads: shards in random order, samples mixed within ``window`` of them.

    A run reads from ``window`` shards at a time, one window after the other. Like :class:`Order` it depends on seed, epoch and
    position alone, and every epoch shows each sample once.

    Args:
        seed: of the run.
        shards: int [N], the shard of each sample.
        window: W, shards that are mixed; with W of all shards or more this is exactly :class:`Order`.

    Raises:
        ValueError: there are no samples, or window is less than 1.
    """

    def __init__(self, seed: int, shards: NDArray[np.integer[Any]], window: int) -> None:
        super().__init__(seed, len(shards))
        if window < 1:
            raise ValueError(f"a window needs at least 1 shard, got {window}")
        self._shards = shards
        self._num_shards = int(shards.max()) + 1
        self.window = window

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        order = permutation(fold(self.seed, _SHARD_STREAM), epoch, self._num_shards)
        window = np.empty(self._num_shards, np.int64)
        window[order] = np.arange(self._num_shards) // self.window
        mixed = permutation(self.seed, epoch, self.num_samples)
        return mixed[np.argsort(window[self._shards[mixed]], kind="stable")]


def micro_batch_positions(
    step: int, micro: int, rank: int, *, global_batch_size: int, world_size: int, micro_batch_size: int
) -> range:
    """Stream positions of one micro-batch: micro-batch ``micro`` of rank ``rank`` in step ``step``, all counted from 0.

    Args:
        step: optimizer update.
        micro: which micro-batch of the rank's share, less than global_batch_size / world_size / micro_batch_size.
        rank: less than world_size.
        global_batch_size: G, samples per step over all ranks.
        world_size: number of ranks.
        micro_batch_size: samples per forward pass of one rank.

    Returns:
        A range of micro_batch_size positions.

    Raises:
        ValueError: G is not a multiple of world_size x micro_batch_size, or rank or micro is out of range.
    """
    num_micros, rest = divmod(global_batch_size, world_size * micro_batch_size)
    if rest:
        unit = f"world size {world_size} x micro_batch_size {micro_batch_size}"
        raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of {unit}")
    if not (0 <= rank < world_size and 0 <= micro < num_micros):
        raise ValueError(f"rank {rank} of {world_size} or micro-batch {micro} of {num_micros} is out of range")
    start = step * global_batch_size + rank * (global_batch_size // world_size) + micro * micro_batch_size
    return range(start, start + micro_batch_size)
