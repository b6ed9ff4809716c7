"""No sample lost and none twice, on any number of ranks, however often a run is interrupted."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from textlock.data.loader import DataConfig, open_loader

from .tars import write_shards

SIZES = [11, 1, 29, 5, 17, 3, 31]
SAMPLES = sum(SIZES)  # 97
BATCH = 30
EPOCH = SAMPLES // BATCH * BATCH
WORLD_SIZES = [1, 2, 3, 5]


def settings(folder, bad=()):
    write_shards(folder, SIZES, {number: (b"<html>", f"caption {number}".encode()) for number in bad})
    return DataConfig(
        shards=str(folder), batch_size=BATCH, image_size=16, decoder="cpu", workers=1, open_shards=3, prefetch_batches=1
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return settings(tmp_path_factory.mktemp("data") / "shards")


def global_batches(config, count, world_size, state=None):
    """Return (keys, pixels) of global batches put together from their ranks, and the state after them of each rank."""
    ranks, states = [], []
    for rank in range(world_size):
        with open_loader(config, rank=rank, world_size=world_size, state=state) as loader:
            ranks.append(list(islice(loader, count)))
            states.append(json.dumps(loader.state()))
    batches = [
        ([key for part in parts for key in part.keys], torch.cat([part.images for part in parts]).numpy().tobytes())
        for parts in zip(*ranks, strict=True)
    ]
    return batches, states


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_sample_once_an_epoch_on_any_number_of_ranks(config, world_size):
    batches, _ = global_batches(config, 4 * EPOCH // BATCH, world_size)
    everything = {f"{number:09d}" for number in range(SAMPLES)}
    left_out = Counter()
    for epoch in range(4):
        counted = Counter(key for keys, _ in batches[epoch * EPOCH // BATCH :][: EPOCH // BATCH] for key in keys)
        assert set(counted.values()) == {1} and len(counted) == EPOCH
        # The rule of the tail: SAMPLES % BATCH samples, others every epoch, are left out.
        assert len(everything - counted.keys()) == SAMPLES % BATCH
        left_out.update(everything - counted.keys())
    assert max(left_out.values()) < 4


@pytest.mark.parametrize("bad", [(), (4, 40, 41, 96)], ids=["good samples", "bad samples"])
def test_fifty_resumes_on_changing_numbers_of_ranks(tmp_path, bad):
    config = replace(settings(tmp_path / "shards", bad), max_skipped_fraction=1.0)
    draw = random.Random(len(bad))
    segments = [(draw.randint(1, 3), draw.choice(WORLD_SIZES)) for _ in range(51)]
    whole, _ = global_batches(config, sum(count for count, _ in segments), 1)
    found, state = [], None
    for count, world_size in segments:
        batches, states = global_batches(config, count, world_size, state)
        assert len(set(states)) == 1, "every rank saves the same state"
        state = json.loads(states[0])
        found += batches
    assert [keys for keys, _ in found] == [keys for keys, _ in whole]
    assert [pixels for _, pixels in found] == [pixels for _, pixels in whole]
