"""No sample lost and none twice, on any number of ranks, however often a run is interrupted."""

import json
import random
from collections import Counter
from itertools import islice

import pytest

from .loading import global_content, keys, open_one, settings, take
from .tars import caption_of, key_of, write_shards

SIZES = [11, 1, 29, 5, 17, 3, 31]
SAMPLES = sum(SIZES)  # 97
BATCH = 24
EPOCH = SAMPLES // BATCH * BATCH


def config_of(folder, bad=(), weights=()):
    """Return the config of a set of shards, and of one more of twenty samples for each of ``weights``."""
    words = [write_shards(folder, SIZES, {number: {"jpg": b"<html>"} for number in bad})]
    for number, weight in enumerate(weights, 1):
        first = 1000 * number
        changes = {first + 3: {"jpg": b""}} if bad else {}
        other = write_shards(folder.with_name(f"other{number}"), [9, 11], changes, first=first)
        words.append(f"{other}:{weight}")
    changes = {"batch_size": BATCH, "workers": 1, "open_shards": 3, "prefetch_batches": 1, "max_skipped_fraction": 1.0}
    return settings(*words, **changes)


def global_batches(config, count, world_size, state=None):
    """Return the content of global batches put together from their ranks, and the state of all ranks after them."""
    ranks, states = [], set()
    for rank in range(world_size):
        with open_one(config, rank=rank, world_size=world_size, state=state) as loader:
            ranks.append(list(islice(loader, count)))
            states.add(json.dumps(loader.state()))
    (state,) = states
    return global_content(ranks), json.loads(state)


def test_every_sample_once_an_epoch(tmp_path):
    batches = take(config_of(tmp_path / "shards"), 4 * EPOCH // BATCH)
    everything = {key_of(number) for number in range(SAMPLES)}
    left_out = Counter()
    for epoch in range(4):
        counted = Counter(keys(batches[epoch * EPOCH // BATCH :][: EPOCH // BATCH]))
        assert set(counted.values()) == {1} and len(counted) == EPOCH
        # The rule of the tail: SAMPLES % BATCH samples, others every epoch, are left out.
        left_out.update(everything - counted.keys())
    assert left_out.total() == 4 * (SAMPLES % BATCH) and max(left_out.values()) < 4


def test_samples_of_several_sets_come_as_often_as_their_weights_say(tmp_path):
    config = config_of(tmp_path / "shards", weights=("2", "0.5"))  # 97 + 40 + 10 samples an epoch, 3 of them left out
    batches = take(config, 4 * 6)
    captions = [caption for batch in batches for caption in batch.captions]
    assert captions == [caption_of(int(key)) for key in keys(batches)]
    most = {0: 1, 1: 2, 2: 1}
    epochs = [Counter(map(int, keys(batches[6 * epoch :][:6]))) for epoch in range(4)]
    for counted in epochs:
        assert counted.total() == 144
        assert all(count <= most[number // 1000] for number, count in counted.items())
    halves = [{number for number in counted if number >= 2000} for counted in epochs]
    assert not halves[0] & halves[1] and not halves[2] & halves[3]
    assert len(halves[0] & halves[2]) >= 4 <= len(halves[1] & halves[3]), "the same ten, but for what is left out"


@pytest.mark.parametrize(
    ("bad", "weights"),
    [((), ()), ((4, 40, 41, 96), ()), ((4,), ("2", "0.7"))],
    ids=["good samples", "bad samples", "three sets"],
)
def test_fifty_resumes_on_changing_numbers_of_ranks(tmp_path, bad, weights):
    config = config_of(tmp_path / "shards", bad, weights)
    draw = random.Random(len(bad))
    segments = [(draw.randint(1, 3), draw.choice([1, 2, 3, 8])) for _ in range(51)]
    whole, _ = global_batches(config, sum(count for count, _ in segments), 1)
    found, state = [], None
    for count, world_size in segments:
        batches, state = global_batches(config, count, world_size, state)
        found += batches
    assert found == whole
    assert state["position"] == len(whole) * BATCH, "batches that were only prefetched do not count"
