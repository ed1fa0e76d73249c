"""Copies of a state in host memory, in blocks that are used again, and how much memory a process may still take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nepa_dist.checkpoint.portable import Entries, check_entry

_BLOCK_BYTES = 64 << 20
"""Of one block. A power of two: the allocator of pinned memory rounds up to one."""
_ALIGNMENT = 64
"""Of a tensor in a block, bytes; a multiple of every element's size."""


class HostMemoryError(MemoryError):
    """There is not enough host memory; ``needed_bytes`` is the size of the whole state."""

    def __init__(self, needed_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        super().__init__(f"a copy of the state needs {needed_bytes:,} bytes of host memory")


class HostMemory:
    """Holds one copy of a state. The memory is allocated by the first copy and used again by the later ones.

    Memory for tensors on a GPU is pinned, so that they are copied at full speed and without waiting for each one.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block = 0
        self._offset = 0

    def copy(self, entries: Entries) -> list[tuple[str, dict[str, Tensor]]]:
        """Copy a state; the previous copy is overwritten. Waits until the copy is complete.

        Args:
            entries: full tensors, parameter by parameter; a tensor must not change before the next one is asked for.

        Returns:
            The same names and fields; contiguous CPU tensors that are valid until the next copy.

        Raises:
            HostMemoryError: there is not enough memory. ``entries`` is consumed, the memory is given back.
            ValueError: an entry is malformed.
        """
        self._block = self._offset = needed = 0
        names: set[str] = set()
        devices: set[torch.device] = set()
        copies: list[tuple[str, dict[str, Tensor]]] | None = []
        for name, fields in entries:
            check_entry(name, fields, names)
            needed += sum(tensor.nbytes for tensor in fields.values())
            devices |= {tensor.device for tensor in fields.values() if tensor.is_cuda}
            if copies is not None:
                try:
                    copies.append((name, {field: self._copy(tensor) for field, tensor in fields.items()}))
                except MemoryError:
                    copies = None
        for device in devices:
            torch.cuda.synchronize(device)
        if copies is None:
            self.clear()
            raise HostMemoryError(needed)
        return copies

    def clear(self) -> None:
        """Give the memory back; the last copy is not valid any more."""
        self._blocks.clear()

    def _copy(self, tensor: Tensor) -> Tensor:
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        while self._block < len(self._blocks) and self._offset + size > self._blocks[self._block].nbytes:
            self._block, self._offset = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(_allocate(max(size, _BLOCK_BYTES), pinned=tensor.is_cuda))
        place = self._blocks[self._block][self._offset : self._offset + tensor.nbytes]
        self._offset += size
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that this process may still take, as Linux knows it.

    Args:
        root: of the file system.

    Returns:
        What the machine has left, or less where a control group (a job of a batch system, a container) has less; None where
        the system does not say.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        room = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if "memory" in kinds.split(","):
                room += _group_rooms(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
            elif kinds == "":
                room += _group_rooms(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
    except (OSError, ValueError):
        return None
    return min(room, default=None)


def _group_rooms(mount: Path, path: str, limit_name: str, usage_name: str) -> list[int]:
    """What each control group from a process's own up to the root has left, where it has a limit."""
    rooms = []
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(mount):
            break
        try:
            limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
            pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except FileNotFoundError:  # the root, or a group that is not visible from within a container
            continue
        if limit != "max":
            # File cache counts as used, but gives way. Version 1 has the sums over inner groups under "total_".
            stat = {key.removeprefix("total_"): int(value) for key, value in pairs}
            rooms.append(int(limit) - usage + stat.get("inactive_file", 0) + stat.get("active_file", 0))
    return rooms


def _allocate(size: int, *, pinned: bool) -> Tensor:
    """Bytes of host memory.

    Raises:
        MemoryError: there is not enough.
    """
    available = available_bytes()
    if available is not None and available < size:
        raise MemoryError
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:  # the allocators have no narrower one
        raise MemoryError from error
