"""The order: every sample once per epoch, the same for every split into ranks and micro-batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nepa_dist.data.order import BlockOrder, KeyedDraws, Order, keyed_uniforms, micro_batch_positions, permutation, splitmix64


def test_splitmix64_matches_the_published_generator() -> None:
    # The first outputs of the reference code for seed 0: it adds the golden constant before each hash.
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden, 2 * golden % 2**64], np.uint64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_permutation_is_stable_across_versions() -> None:
    assert permutation(1337, 0, 12).tolist() == [4, 11, 3, 5, 0, 8, 6, 10, 9, 2, 1, 7]
    assert permutation(1337, 1, 12).tolist() == [3, 1, 11, 6, 4, 9, 10, 0, 2, 5, 7, 8]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5000), num_samples=st.integers(1, 300))
def test_permutation_holds_each_id_once(seed: int, epoch: int, num_samples: int) -> None:
    ids = permutation(seed, epoch, num_samples)
    assert ids.dtype == np.int64
    assert sorted(ids.tolist()) == list(range(num_samples))


def test_permutation_differs_by_epoch_and_seed_and_is_well_mixed() -> None:
    base, epoch, seed = permutation(1, 0, 10_000), permutation(1, 1, 10_000), permutation(2, 0, 10_000)
    # Two unrelated permutations agree in one place on average.
    for one, two in ((base, epoch), (base, seed), (epoch, seed), (base, np.arange(10_000))):
        assert (one == two).sum() < 10
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.05


def test_keyed_uniforms_are_uniform_and_depend_on_every_key() -> None:
    draws = keyed_uniforms(3, 1, 2, count=20_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.histogram(draws, 10, (0, 1))[0] == pytest.approx(2000, abs=200)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    others = [keyed_uniforms(*keys, count=1)[0] for keys in ((3, 1, 2), (4, 1, 2), (3, 2, 2), (3, 1, 3), (3, 2, 1), (3, 1))]
    assert len(set(others)) == len(others)
    # The first draw over neighbouring ids, as augmentation uses it.
    firsts = np.array([keyed_uniforms(3, 0, sample, count=1)[0] for sample in range(4000)])
    assert np.histogram(firsts, 10, (0, 1))[0] == pytest.approx(400, abs=90)


def test_keyed_uniforms_are_a_prefix_and_stable() -> None:
    draws = [0.5609678691320001, 0.7203325306254518, 0.21408354876835178]
    assert keyed_uniforms(7, 8, 9, count=3).tolist() == draws
    assert keyed_uniforms(7, 8, 9, count=50)[:3].tolist() == draws


@given(seed=st.integers(0, 2**63 - 1), keys=st.lists(st.integers(0, 2**40), max_size=4))
def test_single_draws_are_those_of_the_array(seed: int, keys: list[int]) -> None:
    draws = KeyedDraws(seed, *keys)
    assert [draws[i] for i in (5, 0, 22)] == keyed_uniforms(seed, *keys, count=23)[[5, 0, 22]].tolist()


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (1, 4), (2, 4), (2, 12), (3, 8), (4, 3), (8, 1), (24, 1)])
def test_ranks_and_micro_batches_make_up_the_global_batch(world_size: int, micro: int) -> None:
    total = 24
    for step in (0, 5):
        seen = [
            position
            for rank in range(world_size)
            for m in range(total // world_size // micro)
            for position in micro_batch_positions(
                step, m, rank, global_batch_size=total, world_size=world_size, micro_batch_size=micro
            )
        ]
        assert seen == list(range(step * total, (step + 1) * total))


def test_every_id_once_per_epoch_when_batches_straddle_epochs() -> None:
    num_samples, total, num_steps = 10, 4, 15
    order = Order(5, num_samples)
    seen: dict[int, list[int]] = {}
    straddles = 0
    for step in range(num_steps):
        epochs = set()
        for rank in range(2):
            for position in micro_batch_positions(step, 0, rank, global_batch_size=total, world_size=2, micro_batch_size=2):
                sample, epoch = order.lookup(position)
                seen.setdefault(epoch, []).append(sample)
                epochs.add(epoch)
        straddles += len(epochs) == 2
    assert straddles == 3
    assert len(seen) == 6
    assert all(sorted(ids) == list(range(num_samples)) for ids in seen.values())
    assert seen[0] == permutation(5, 0, num_samples).tolist()


def test_lookup_does_not_depend_on_what_was_asked_before() -> None:
    asked = [95, 3, 41, 3, 67, 95, 12]
    order = Order(1, 10)
    assert [order.lookup(k) for k in asked] == [Order(1, 10).lookup(k) for k in asked]


def test_replacement_is_another_sample_of_the_same_epoch() -> None:
    order = Order(9, 10)
    for position in range(20, 30):
        sample, epoch = order.lookup(position)
        tries = [order.replacement(position, attempt) for attempt in range(10)]
        assert {e for _, e in tries} == {epoch}
        assert tries[0][0] != sample
        assert sorted(s for s, _ in tries) == list(range(10))
        assert tries[0] == order.lookup(20 + (position - 20 + 5) % 10)


SHARDS = np.random.RandomState(0).permutation(np.repeat(np.arange(20), 50))
"""1000 samples in 20 shards."""


@pytest.mark.parametrize("window", [1, 3, 20])
def test_blocks_hold_each_id_once_and_few_shards_at_a_time(window: int) -> None:
    order = BlockOrder(7, SHARDS, window)
    for epoch in range(2):
        ids = np.array([order.lookup(epoch * 1000 + i)[0] for i in range(1000)])
        assert sorted(ids.tolist()) == list(range(1000))
        blocks = [ids[start : start + 50 * window] for start in range(0, 1000, 50 * window)]
        seen = [set(SHARDS[block].tolist()) for block in blocks]
        assert [len(shards) for shards in seen] == [min(window, 20 - i * window) for i in range(len(blocks))]
        assert set.union(*seen) == set(range(20))
        if window > 1:  # mixed: a sample's neighbour is most often of another shard
            shards = SHARDS[ids]
            assert (shards[1:] == shards[:-1]).mean() < 1.3 / window


def test_blocks_change_with_seed_and_epoch_and_are_stable_across_versions() -> None:
    shards = np.arange(12) // 3
    ids = [[BlockOrder(seed, shards, 2).lookup(position)[0] for position in range(24)] for seed in (1, 2)]
    assert ids[0][:12] != ids[0][12:]
    assert ids[0] != ids[1]
    assert ids[0][:12] == [2, 9, 10, 1, 0, 11, 5, 8, 4, 6, 3, 7]


def test_a_block_order_over_all_shards_is_the_plain_order() -> None:
    block, plain = BlockOrder(3, SHARDS.astype(np.uint32), 25), Order(3, 1000)
    assert [block.lookup(k) for k in range(0, 3000, 7)] == [plain.lookup(k) for k in range(0, 3000, 7)]
    assert [block.replacement(k, 2) for k in range(50)] == [plain.replacement(k, 2) for k in range(50)]
    with pytest.raises(ValueError, match="at least 1 shard"):
        BlockOrder(3, SHARDS, 0)


def test_impossible_batches_are_refused() -> None:
    sizes = {"global_batch_size": 12, "world_size": 2, "micro_batch_size": 3}
    with pytest.raises(ValueError, match="global_batch_size 12 is not a multiple of world size 5"):
        micro_batch_positions(0, 0, 0, **(sizes | {"world_size": 5}))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        micro_batch_positions(0, 0, 2, **sizes)
    with pytest.raises(ValueError, match="micro-batch 2 of 2"):
        micro_batch_positions(0, 2, 0, **sizes)
    with pytest.raises(ValueError, match="at least 1 sample"):
        Order(0, 0)
