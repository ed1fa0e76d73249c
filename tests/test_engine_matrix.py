"""A run may stop on any engine and number of ranks and go on with any other: the numbers stay those of one plain process."""

import pytest
import torch
import torch.distributed as dist

from spawn import run_ranks
from test_engines import assert_equal, make, plain, snapshot, update  # noqa: F401 - a fixture among them

NAMES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
PLACES = [(name, ranks) for name in NAMES for ranks in (1, 2, 4)]
# Each engine takes over once from another kind, and once with another number of ranks.
CHAIN = [("zero3", 2), ("fsdp2", 4), ("zero1", 2), ("hsdp", 4), ("zero2", 1), ("ddp", 2), ("zero3", 1), ("fsdp2", 1)]


def advance(name, starts, step):
    """From each of the states, one update; its loss, its norm and the state after it."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    options = {"shard_size": max(1, ranks // 2)} if name == "hsdp" else {}
    results = []
    for start in starts:
        task, engine, plan = make(name, ranks, **options)
        if start is not None:
            engine.load_named_state(start)
        loss, norm, _ = update(task, engine, plan, step, rank, ranks)
        mean = torch.tensor(loss)
        dist.all_reduce(mean)
        results.append((mean.item() / ranks, norm, snapshot(engine)))
        engine.close()
    return results if rank == 0 else None


def go_on(place, starts, step, plain):  # noqa: F811
    """Continue at a place and compare; returns the states."""
    rows, states, _, _ = plain
    results = run_ranks(advance, place[1], place[0], starts, step, timeout=280)[0]
    for loss, norm, state in results:
        assert loss == pytest.approx(rows[step][0], abs=1e-6)
        assert norm == pytest.approx(rows[step][1], rel=1e-5)
        # Adam divides by the size of the gradient: where that is near eps, the order of a sum decides on 1 % of an update.
        assert_equal(state, states[step], atol=1e-5, rtol=1e-3)
    return [state for _, _, state in results]


def test_a_chain_over_all_engines(plain):  # noqa: F811
    state = None
    for step, place in enumerate(CHAIN):
        (state,) = go_on(place, [state], step, plain)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_place_continues_every_other(plain):  # noqa: F811
    first = [go_on(place, [None], 0, plain)[0] for place in PLACES]
    for place in PLACES:
        go_on(place, first, 1, plain)
