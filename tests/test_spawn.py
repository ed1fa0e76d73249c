"""run_ranks gives each rank's result, and turns an error, a death or a hang of one rank into an error of the caller."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spawn import RankError, run_ranks


def _sum_of_ranks(scale: float) -> tuple[int, torch.Tensor]:
    value = torch.tensor([dist.get_rank() * scale])
    dist.all_reduce(value)
    return dist.get_rank(), value


def _fail_on_rank_1(folder: Path) -> None:
    (folder / f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
    if dist.get_rank() == 1:
        raise ValueError("the weights are on holiday")
    dist.barrier()  # waits for rank 1, for ever if nobody ends it


def _die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


def _group_of_its_own() -> list[int]:
    dist.init_process_group("gloo")
    dist.barrier()
    return [dist.get_world_size(), int(os.environ["RANK"]), int(os.environ["EXTRA"])]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_returns_its_result_in_order(world_size: int) -> None:
    results = run_ranks(_sum_of_ranks, world_size, 10.0)
    assert [rank for rank, _ in results] == list(range(world_size))
    assert all(value.item() == 10.0 * sum(range(world_size)) for _, value in results)


def test_an_error_of_one_rank_is_raised_with_its_traceback_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*in _fail_on_rank_1.*ValueError: the weights are on holiday"):
        run_ranks(_fail_on_rank_1, 2, tmp_path)
    for file in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_rank_that_is_killed_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="rank 1 ended without a result, exit code -9"):
        run_ranks(_die_on_rank_1, 2)


def test_a_rank_that_hangs_is_named_when_the_time_is_over() -> None:
    with pytest.raises(TimeoutError, match=r"no result from ranks \[0(, 1)?\] within 10 s"):
        run_ranks(_hang_on_rank_0, 2, timeout=10.0)


def test_a_function_can_make_the_group_itself() -> None:
    assert run_ranks(_group_of_its_own, 2, init=False, env={"EXTRA": "7"}) == [[2, 0, 7], [2, 1, 7]]
