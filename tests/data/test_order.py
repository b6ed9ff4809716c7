from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from textlock.data import order as module
from textlock.data.order import SampleOrder, Share, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 63, 64, 65, 1000, 4097, 100_003])
def test_permutation_is_a_bijection(size):
    key = np.full(size, 12345, dtype=np.uint64)
    result = permute(np.arange(size), np.full(size, size), key)
    assert np.array_equal(np.sort(result), np.arange(size))
    if size > 60:
        assert not np.array_equal(result, permute(np.arange(size), np.full(size, size), key + np.uint64(1)))


def test_permutation_is_uniform_over_keys():
    keys = np.arange(60_000, dtype=np.uint64)
    for element in range(5):
        result = permute(np.full(60_000, element), np.full(60_000, 5), keys)
        counts = np.bincount(result, minlength=5)
        assert ((counts - 12_000) ** 2 / 12_000).sum() < 18.5  # chi-square with 4 degrees of freedom, p = 0.001


def test_elements_of_different_permutations_may_share_a_call():
    sizes = np.repeat([7, 100, 3], [7, 100, 3])
    keys = np.repeat(np.array([1, 2, 3], dtype=np.uint64), [7, 100, 3])
    index = np.concatenate([np.arange(7), np.arange(100), np.arange(3)])
    together = permute(index, sizes, keys)
    apart = [permute(index[sizes == n], sizes[sizes == n], keys[sizes == n]) for n in (7, 100, 3)]
    assert np.array_equal(together, np.concatenate(apart))


SIZES = [7, 11, 5, 13, 1, 9]


def order_of(*sources, batch_size=4, open_shards=2, seed=3):
    """Return the order of sources, each the sizes of its shards and, behind them, perhaps a weight."""
    shares = [Share(sizes, *map(Fraction, weight)) for sizes, *weight in sources]
    return SampleOrder(shares, batch_size=batch_size, open_shards=open_shards, seed=seed)


def whole(order, epoch):
    """Return the samples of an epoch, those that fill no batch included."""
    return order.epoch(epoch).samples(np.arange(order.epoch(epoch).num_samples))


def test_the_order_of_one_source_is_the_one_that_saved_positions_mean():
    order = order_of([SIZES])
    assert whole(order, 0)[:12].tolist() == [28, 19, 18, 35, 33, 23, 21, 22, 32, 20, 27, 26]
    assert whole(order, 5)[-12:].tolist() == [17, 12, 10, 11, 16, 9, 36, 15, 13, 14, 8, 7]
    assert order.epoch(1).shards.tolist() == [5, 2, 3, 0, 4, 1]
    places = order.replacements(0, 5)
    assert [next(places) for _ in range(10)] == [10, 15, 20, 25, 30, 35, 40, 45, 4, 9]


# Sizes of the shards of each source with its weight, and open shards.
SOURCES = [
    pytest.param([[[10]]], 1, id="one shard"),
    pytest.param([[SIZES]], 2, id="groups of two"),
    pytest.param([[SIZES]], 64, id="one group"),
    pytest.param([[[3] * 13]], 4, id="a smaller last group"),
    pytest.param([[SIZES, 2]], 2, id="twice"),
    pytest.param([[SIZES, "0.5"]], 2, id="every second epoch"),
    pytest.param([[[21], "0.5"]], 1, id="half a shard"),
    pytest.param([[[5, 1, 40], "0.1"]], 3, id="parts of one shard"),
    pytest.param([[SIZES, "1.5"], [[4] * 3]], 3, id="once and twice"),
    pytest.param([[SIZES, 3], [[8, 1], "0.34"], [[17], "2.75"], [[3] * 4, 1]], 4, id="four sources"),
]


@pytest.mark.parametrize(("sources", "open_shards"), SOURCES)
def test_samples_come_as_often_as_the_weight_of_their_source_says(sources, open_shards):
    order = order_of(*sources, open_shards=open_shards)
    epochs = [whole(order, epoch) for epoch in range(21)]
    assert all(
        order.samples_per_epoch <= len(samples) < order.samples_per_epoch + 4 + len(sources) for samples in epochs
    )
    counted = np.zeros(sum(sum(sizes) for sizes, *_ in sources), dtype=int)
    for epoch, samples in enumerate(epochs):
        counts = np.bincount(samples, minlength=len(counted))
        counted += counts
        first = 0
        for sizes, *weight in sources:
            weight, size = Fraction(*weight or [1]), sum(sizes)
            own, total = counts[first : first + size], counted[first : first + size]
            assert set(own) <= {int(weight), -int(-weight // 1)}
            assert set(total) <= {int(weight * (epoch + 1)), -int(-weight * (epoch + 1) // 1)}
            assert total.sum() == int(weight * size * (epoch + 1)), "shares of an epoch that are no whole number add up"
            first += size
    assert not np.array_equal(epochs[0], epochs[2])


def test_the_samples_at_the_end_are_others_every_epoch():
    order = order_of([SIZES])
    tails = [frozenset(whole(order, epoch)[order.samples_per_epoch :]) for epoch in range(3)]
    assert all(len(tail) == 2 for tail in tails) and len(set(tails)) > 1


def test_a_part_of_a_sorted_set_is_a_mixture_of_it():
    for sizes in ([10] * 20, [200]):
        samples = whole(order_of([sizes, "0.5"]), 0)
        assert len(samples) == 100 and 25 < sum(samples < 100) < 75, sizes


def test_samples_stay_in_their_group_of_open_shards():
    order = order_of([[10] * 9], [[10] * 3], open_shards=3)
    shards = whole(order, 0) // 10
    groups = [set(shards[start : start + 30]) for start in range(0, 120, 30)]
    assert all(len(group) == 3 for group in groups)
    assert len(set(shards[:10])) == 3, "the shards of a group are mixed"
    assert groups != [set(range(start, start + 3)) for start in range(0, 12, 3)], "the shards are shuffled"
    assert {9, 10, 11} not in groups, "sources are mixed"


@pytest.mark.parametrize("sources", [[[[50] * 4]], [[[50] * 4, "0.7"], [[9] * 9, 2]]])
def test_order_depends_on_seed_and_epoch_alone(sources):
    def samples(seed, epoch, places):
        return order_of(*sources, seed=seed).epoch(epoch).samples(np.array(places)).tolist()

    places = range(200)
    of_epoch = samples(1, 2, places)
    assert samples(1, 2, [150, 3, 77]) == [of_epoch[150], of_epoch[3], of_epoch[77]]
    assert samples(2, 2, places) != of_epoch
    assert samples(1, 3, places) != of_epoch


@pytest.mark.parametrize(("weight", "runs"), [("1", 155_000), ("2", 310_000), ("0.5", 77_501)])
def test_seeking_far_computes_the_samples_asked_for_alone(weight, runs, monkeypatch):
    computed = Counter()

    def counted(index, size, key):
        computed[len(index)] += 1
        return permute(index, size, key)

    order = order_of(
        [[10_001] * 155_001 if weight == "0.5" else [10_001] * 155_000, weight], batch_size=65_536, open_shards=64
    )
    monkeypatch.setattr(module, "permute", counted)
    epoch, place = order.locate(10**6 * order.samples_per_epoch + 7 * 10**8)
    samples = order.epoch(epoch).samples(np.arange(place, place + 4096))
    assert (epoch, place) == (10**6, 7 * 10**8)
    assert {size for size in computed if size > 4096} == {runs} and computed[runs] == 1, "the runs of one epoch"
    assert len(np.unique(samples)) == 4096 or weight == "2"
    assert samples.min() >= 0 and samples.max() < 10_001 * 155_001


@pytest.mark.parametrize("total", [8, 9, 16, 17, 24, 31])
def test_replacements_reach_every_sample_and_differ_within_a_batch(total):
    order = order_of([[total]], batch_size=8, open_shards=1)

    def first(place, count):
        places = order.replacements(0, place)
        return [next(places) for _ in range(count)]

    assert set(first(3, total - 1)) == set(range(total)) - {3}
    firsts = {first(place, 1)[0] for place in range(8)}
    assert len(firsts) == 8
    if total >= 24:
        assert not firsts & set(range(8))


def test_replacements_reach_every_sample_of_an_epoch_that_has_one_more():
    order = order_of([[17], "0.5"], batch_size=4)
    for epoch, size in ((0, 8), (1, 9)):
        places = order.replacements(epoch, 3)
        assert {next(places) for _ in range(size - 1)} == set(range(size)) - {3}


@pytest.mark.parametrize(("sources", "open_shards"), SOURCES)
@pytest.mark.parametrize("batch_size", [4, 10])
def test_shards_from_names_what_is_read_in_time(sources, open_shards, batch_size):
    if sum(sum(sizes) * Fraction(*weight or [1]) for sizes, *weight in sources) < batch_size:
        with pytest.raises(ValueError, match=f"4 samples an epoch, fewer than one global batch of {batch_size}"):
            order_of(*sources, batch_size=batch_size)
        return
    order = order_of(*sources, batch_size=batch_size, open_shards=open_shards)
    places = np.arange(order.samples_per_epoch)
    samples = np.concatenate([order.epoch(epoch).samples(places) for epoch in range(6)])
    sizes = [size for sizes, *_ in sources for size in sizes]
    shards = np.searchsorted(np.cumsum(sizes), samples, side="right").tolist()  # of each position
    for position in range(0, 3 * order.samples_per_epoch, batch_size):
        planned = position + 2 * batch_size
        named = order.shards_from(order.group_of(position), order.group_of(planned))
        assert len(set(named)) == len(named)
        assert set(shards[position : planned + 1]) <= set(named)
        assert shards[position] in named[:open_shards], "what is read first is fetched first"
