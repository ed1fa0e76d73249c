"""Run a function on several ranks of a real process group (gloo, this machine) and get what each returned.

Every rank is a fresh process. A rank that fails, dies or hangs ends the call with an error that names it; no process outlives
the call.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from jobs.cluster import free_port


class RankError(RuntimeError):
    """A rank failed; the message holds the traceback of the first one that did."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    init: bool = True,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``fn(*args)`` on every rank of a new gloo process group.

    The ranks have the environment that torchrun gives (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), one thread each, and live until all have returned.

    Args:
        fn: a function at the top level of a module, so that a fresh process can import it.
        world_size: number of processes.
        *args: picklable arguments, the same for every rank.
        timeout: seconds for all of it, start of the processes included.
        init: make the process group before the call; False leaves that to ``fn``.
        env: more environment variables for every rank.

    Returns:
        What ``fn`` returned, by rank; tensors come as copies.

    Raises:
        RankError: a rank raised, or ended without a result.
        TimeoutError: the time is over; names the ranks that gave no result.
    """
    context = get_context("spawn")
    port = free_port()
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            environment = {**_rank_environment(rank, world_size, port), **(env or {})}
            process = context.Process(target=_rank_main, args=(theirs, environment, init, timeout, fn, args), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        results = _collect(processes, pipes, timeout)
        for pipe in pipes:
            pipe.send_bytes(b"done")
        for process in processes:
            process.join(10)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _collect(processes: list[SpawnProcess], pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    results: list[Any] = [None] * len(pipes)
    while waiting:
        ready = connection.wait(waiting, max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(f"no result from ranks {sorted(waiting.values())} within {timeout:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())  # noqa: S301 - written by our own child
            except (EOFError, ConnectionResetError):
                processes[rank].join(10)
                raise RankError(f"rank {rank} ended without a result, exit code {processes[rank].exitcode}") from None
            if not succeeded:
                raise RankError(f"rank {rank} of {len(pipes)} failed:\n{value}")
            results[rank] = value
    return results


def _rank_main(
    pipe: Connection, environment: dict[str, str], init: bool, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    # A rank that hangs says where, just before the parent kills it; one that crashes in a library says where it was.
    faulthandler.enable()
    faulthandler.dump_traceback_later(0.9 * timeout)
    try:
        if init:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        message = pickle.dumps((True, fn(*args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    try:
        pipe.send_bytes(message)
        pipe.recv_bytes()  # the others may still need this rank's store
    except (EOFError, OSError):
        pass  # the parent has given up
    sys.stdout.flush()
    sys.stderr.flush()
    # Not a plain return: an interpreter that exits with a DDP model alive sometimes aborts after the work is done.
    os._exit(0)


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
