import numpy as np
import pytest

from textlock.data import order as module
from textlock.data.order import SampleOrder, permute


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


SHARDS = [
    pytest.param([10], 1, id="one shard"),
    pytest.param([7, 11, 5, 13, 1, 9], 2, id="groups of two"),
    pytest.param([7, 11, 5, 13, 1, 9], 64, id="one group"),
    pytest.param([7, 11, 5, 13, 1, 9], 1, id="groups of one"),
    pytest.param([3] * 13, 4, id="a smaller last group"),
]


@pytest.mark.parametrize(("sizes", "open_shards"), SHARDS)
def test_every_sample_once_an_epoch(sizes, open_shards):
    order = SampleOrder(sizes, batch_size=4, open_shards=open_shards, seed=3)
    total = sum(sizes)
    epochs = [order.epoch(epoch).samples(np.arange(total)) for epoch in range(3)]
    for samples in epochs:
        assert np.array_equal(np.sort(samples), np.arange(total))
    assert not np.array_equal(epochs[0], epochs[1])
    tails = [frozenset(samples[order.samples_per_epoch :]) for samples in epochs]
    assert all(len(tail) == total % 4 for tail in tails)
    assert total % 4 == 0 or len(set(tails)) > 1


def test_samples_stay_in_their_group_of_open_shards():
    order = SampleOrder([10] * 12, batch_size=4, open_shards=3, seed=0)
    shards = order.epoch(0).samples(np.arange(120)) // 10
    groups = [set(shards[start : start + 30]) for start in range(0, 120, 30)]
    assert all(len(group) == 3 for group in groups)
    assert len(set(shards[:10])) == 3, "the shards of a group are mixed"
    assert groups != [set(range(start, start + 3)) for start in range(0, 12, 3)], "the shards are shuffled"


def test_order_depends_on_seed_and_epoch_alone():
    def samples(seed, epoch, places):
        order = SampleOrder([50] * 4, batch_size=8, open_shards=2, seed=seed)
        return order.epoch(epoch).samples(places).tolist()

    whole = samples(1, 2, np.arange(200))
    assert samples(1, 2, np.array([150, 3, 77])) == [whole[150], whole[3], whole[77]]
    assert samples(2, 2, np.arange(200)) != whole
    assert samples(1, 3, np.arange(200)) != whole


def test_seeking_far_computes_the_samples_asked_for_alone(monkeypatch):
    computed = []

    def counted(index, size, key):
        computed.append(len(index))
        return permute(index, size, key)

    monkeypatch.setattr(module, "permute", counted)
    order = SampleOrder([10_000] * 155_000, batch_size=65_536, open_shards=64, seed=0)
    position = 10**9 // 65_536 * 65_536
    epoch, place = order.locate(position + 5 * order.samples_per_epoch)
    samples = order.epoch(epoch).samples(np.arange(place, place + 4096))
    assert (epoch, place) == (5, position)
    assert computed == [155_000, 4096], "the order of the shards of one epoch, and the samples"
    assert len(np.unique(samples)) == 4096
    assert samples.min() >= 0 and samples.max() < 1_550_000_000


@pytest.mark.parametrize("total", [8, 9, 16, 17, 24, 31])
def test_replacements_reach_every_sample_and_differ_within_a_batch(total):
    order = SampleOrder([total], batch_size=8, open_shards=1, seed=0)

    def first(place, count):
        places = order.replacements(place)
        return [next(places) for _ in range(count)]

    assert set(first(3, total - 1)) == set(range(total)) - {3}
    firsts = {first(place, 1)[0] for place in range(8)}
    assert len(firsts) == 8
    if total >= 24:
        assert not firsts & set(range(8))


@pytest.mark.parametrize(("sizes", "open_shards"), SHARDS)
@pytest.mark.parametrize("batch_size", [4, 10])
def test_shards_from_names_what_is_read_in_time(sizes, open_shards, batch_size):
    order = SampleOrder(sizes, batch_size=batch_size, open_shards=open_shards, seed=1)
    places = np.arange(order.samples_per_epoch)
    samples = np.concatenate([order.epoch(epoch).samples(places) for epoch in range(6)])
    shards = np.searchsorted(np.cumsum(sizes), samples, side="right").tolist()  # of each position
    for position in range(0, 3 * order.samples_per_epoch, batch_size):
        planned = position + 2 * batch_size
        named = order.shards_from(order.group_of(position), order.group_of(planned))
        assert len(set(named)) == len(named)
        assert set(shards[position : planned + 1]) <= set(named)
        assert shards[position] in named[:open_shards], "what is read first is fetched first"
