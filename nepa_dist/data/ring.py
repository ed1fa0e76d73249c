"""Shared memory in which worker processes fill batches and from which the trainer uses them: no copy, no name, no file.

The memory is anonymous: it does not count against ``/dev/shm`` and is gone with the last process that has it. A slot holds one
batch. The trainer lends a slot out with its batch and has it back when nothing refers to the pixels any more; with a GPU, when
the copies that were under way by then are done too.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from nepa_dist.data.batch import BatchShape, Pixels, pixels_in

_log = logging.getLogger(__name__)

_Draining = deque[tuple[torch.cuda.Event, int]]


class Ring:
    """Slots for batches.

    Args:
        num_slots: how many.
        shape: of each batch.
    """

    def __init__(self, num_slots: int, shape: BatchShape) -> None:
        self._shape = shape
        self._stride = -(-shape.num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, num_slots * self._stride)  # shared with processes that are forked later
        self._free = deque(range(num_slots))
        self._draining: _Draining = deque()
        self.pinned = False

    def pin(self) -> None:
        """Page-lock the memory in this process. Call it after the workers were forked; ``pinned`` says whether it worked."""
        memory = np.frombuffer(self._memory, np.uint8)
        code = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        self.pinned = code == 0
        if self.pinned:
            weakref.finalize(self, _unpin, memory.ctypes.data, self._draining).atexit = False
        else:
            with contextlib.suppress(RuntimeError):
                torch.arange(1, device="cuda")  # takes the error, for which the next kernel would be blamed otherwise
            reason = f"cudaHostRegister of {memory.nbytes / 1e6:.0f} MB failed with error {code}"
            _log.warning("%s: every batch is copied once more, which costs the trainer some processor time", reason)

    def take(self) -> int | None:
        """A slot that nobody uses, or None."""
        while self._draining and self._draining[0][0].query():
            self._free.append(self._draining.popleft()[1])
        return self._free.popleft() if self._free else None

    def pixels(self, slot: int) -> Pixels:
        """The memory of a slot."""
        return pixels_in(self._bytes(slot), self._shape)

    def lend(self, slot: int) -> Pixels:
        """The memory of a slot, which is free again when the result and all views of it are gone."""
        memory = self._bytes(slot)
        weakref.finalize(memory, self._give_back, slot).atexit = False
        return pixels_in(memory, self._shape)

    def _bytes(self, slot: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory, np.uint8, self._shape.num_bytes, slot * self._stride)

    def _give_back(self, slot: int) -> None:
        if not self.pinned:
            self._free.append(slot)
            return
        # The copy to the GPU may still run, in a side stream that the current one was told to wait for before this.
        event = torch.cuda.Event()
        event.record()
        self._draining.append((event, slot))


def _unpin(address: int, draining: _Draining) -> None:
    for event, _ in draining:
        event.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
