"""What one rank finds out about its node for ``doctor --nodes``: ``python -m jobs.node_check FOLDER`` under srun or a launcher.

Each finding is written to ``FOLDER/rank-R.json`` as soon as it is there, so that a rank which hangs shows where it did.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from jobs.cluster import environment_from_srun
from nepa_dist.run_folder import write_text

STORAGE_BYTES = 64 << 20
PAIR_BYTES = 16 << 20
REDUCE_BYTES = 64 << 20
COMPUTE_SECONDS = 0.5
TIMEOUT_SECONDS = 60.0
"""For each meeting of the ranks."""


class Finder:
    """Collects findings of one rank in a file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.found: dict[str, Any] = {"rank": rank}

    def add(self, **values: Any) -> None:
        """Note findings."""
        self.found |= values
        write_text(self.folder / f"rank-{self.rank}.json", json.dumps(self.found) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Look at the node, then meet the others; returns the exit code, 0 also for a bad node."""
    folder = Path((sys.argv[1:] if argv is None else argv)[0])
    os.environ.update(environment_from_srun(os.environ))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    finder = Finder(folder, rank)
    finder.add(node=os.environ.get("SLURMD_NODENAME") or platform.node(), phase="start", cores=len(os.sched_getaffinity(0)))
    try:
        import torch

        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        name = torch.cuda.get_device_name(device) if cuda else platform.machine()
        finder.add(phase="compute", device=name, driver=_driver() if cuda else "", torch=torch.__version__)
        finder.add(phase="storage", gflops=_compute(device))
        if local_rank == 0:
            finder.add(**_storage(folder, rank))
        finder.add(phase="join")
        if world_size > 1:
            _meet(finder, rank, world_size, device)
        finder.add(phase="done")
    except Exception as error:
        finder.add(error=f"{type(error).__name__}: {error}"[:500])
    return 0


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.split("\n")[0].strip()


def _compute(device: Any) -> float:
    """Speed of matrix products on one device, GFLOP/s: the best of a while, so that a busy moment does not count."""
    import torch

    side = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(side, side, device=device, dtype=dtype)
    best, deadline = float("inf"), time.perf_counter() + COMPUTE_SECONDS
    while (start := time.perf_counter()) < deadline:
        product = a @ a
        value = float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
        if value != side:
            raise ArithmeticError(f"a product of ones gave {value} and not {side}: this device computes wrongly")
    return float(2 * side**3 / best / 1e9)


def _storage(folder: Path, rank: int) -> dict[str, float]:
    """Speed of writing to and reading from the folder of the runs, bytes per second."""
    path = folder / f"storage-{rank}"
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(STORAGE_BYTES >> 20):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, not from memory
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    read = time.perf_counter() - start
    path.unlink()
    return {"write_bytes_per_second": STORAGE_BYTES / written, "read_bytes_per_second": STORAGE_BYTES / read}


def _meet(finder: Finder, rank: int, world_size: int, device: Any) -> None:
    """Join the others, exchange data with rank 0, compare clocks, and reduce over all."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SECONDS), rank=rank, world_size=world_size)
    finder.add(phase="clock")
    clock = torch.zeros(world_size, dtype=torch.float64, device=device)
    dist.barrier()
    clock[rank] = time.time()
    dist.all_reduce(clock)
    finder.add(phase="pair", clock_offset_seconds=float(clock[rank] - clock[0]))
    data = torch.full((PAIR_BYTES // 4,), float(rank), device=device)
    for other in range(1, world_size):
        if rank == 0:
            dist.send(data, other)
            dist.recv(data, other)
        elif rank == other:
            dist.recv(data, 0)
            start = time.perf_counter()
            dist.send(data, 0)
            _wait(device)
            finder.add(pair_bytes_per_second=PAIR_BYTES / (time.perf_counter() - start))
    finder.add(phase="all-reduce")
    data = torch.ones(REDUCE_BYTES // 4, device=device)
    dist.all_reduce(data)
    start = time.perf_counter()
    data.fill_(1.0)
    dist.all_reduce(data)
    if (value := float(data[-1])) != world_size:
        raise ArithmeticError(f"the sum of ones over {world_size} ranks is {value}")
    finder.add(all_reduce_seconds=time.perf_counter() - start)
    dist.destroy_process_group()


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
