"""Runs of the loader on small shards."""

from collections import Counter
from itertools import islice

import torch

from textlock.data.loader import DataConfig, open_loader


def settings(*shards, **changes):
    base = {"batch_size": 8, "image_size": 16, "decoder": "cpu", "workers": 2, "open_shards": 2}
    return DataConfig(shards=tuple(map(str, shards)), **{**base, **changes})


def open_one(config, *, rank=0, world_size=1, **options):
    return open_loader(config, rank=rank, world_size=world_size, **options)


def take(config, count, **options):
    with open_one(config, **options) as loader:
        return list(islice(loader, count))


def content(batches):
    """Return all that batches hold, in a form that can be compared."""
    return global_content([batches])


def keys(batches):
    return [key for batch in batches for key in batch.keys]


def global_content(ranks):
    """Return all that global batches hold, from the batches of each of their ranks."""
    contents = []
    for parts in zip(*ranks, strict=True):
        (place,) = {(part.epoch, part.position) for part in parts}
        captions = [caption for part in parts for caption in part.captions]
        ids = torch.cat([part.ids for part in parts]).tolist()
        pixels = torch.cat([part.images for part in parts]).numpy().tobytes()
        skipped = sum((Counter(part.skipped_by_kind) for part in parts), Counter())
        contents.append((place, keys(parts), captions, ids, pixels, skipped))
    return contents
