"""The order of samples: a keyed permutation that can be entered at any position.

Four words for four indices, here and wherever samples are read; all count from 0:

    position  samples consumed since the start of training, over all epochs: the one integer that a run resumes from
    place     within one epoch's order: (epoch, place) = divmod(position, samples_per_epoch); in a ``tar.Problem``,
              within one shard
    sample    in the index (``index.ShardIndex``): shards by name, the samples of each in the order of its tar
    number    of anything else that is listed: a shard of the index, a group of an epoch

The order is a function of (seed, epoch, position) alone. It knows nothing of ranks, workers or decoders, so the same
global batches come out of any number of processes, and a run resumes from that one integer.

- Every epoch permutes the shards, takes them in groups of ``open_shards``, and permutes the samples inside each group.
  Reading therefore stays within a few shards at a time while neighbours come from all of them.
- A permutation is a Feistel network over the next power of four, with cycle walking (Black and Rogaway, "Ciphers with
  Arbitrary Finite Domains", 2002): element i is computed without the others, in constant memory.
- An epoch is the largest number of whole global batches. The ``num_samples % batch_size`` samples at the end of the
  order, different ones every epoch, are left out of that epoch; no other sample is lost or repeated.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import gcd

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8


def mix64(values: UInt64Array) -> UInt64Array:
    """Return the SplitMix64 hash of each value (Steele, Lea and Flood, 2014): a bijection that scatters all bits."""
    values = values + _GOLDEN_GAMMA
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def stream_key(seed: int, epoch: int, purpose: str) -> np.uint64:
    """Return the key of one stream of random numbers; streams of different purposes are unrelated."""
    digest = hashlib.blake2b(f"{purpose}:{seed}:{epoch}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def permute(index: Int64Array, size: Int64Array, key: UInt64Array) -> Int64Array:
    """Return where the permutation of ``range(size)`` that ``key`` selects puts each ``index``.

    All three have shape [n]: elements may belong to different permutations. Requires 0 <= index < size < 2^52.
    """
    # frexp gives the bit length of size - 1. A power of four has two equal halves, at most 4x the size: on average
    # fewer than four walks.
    half_bits = np.maximum((np.frexp((size - 1).astype(np.float64))[1] + 1) // 2, 1).astype(np.uint64)
    result = index.astype(np.uint64)
    limit = size.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        result[walking] = _feistel(result[walking], half_bits[walking], key[walking])
        walking = walking[result[walking] >= limit[walking]]
    return result.astype(np.int64)


def _feistel(values: UInt64Array, half_bits: UInt64Array, key: UInt64Array) -> UInt64Array:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    key = mix64(key)
    left, right = values >> half_bits, values & mask
    for round_number in range(_ROUNDS):
        round_key = mix64(key + np.uint64(round_number))
        left, right = right, left ^ (mix64(right ^ round_key) & mask)
    return (left << half_bits) | right


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch over S shards: ``samples`` maps places in it to samples of the index."""

    shards: Int64Array  # [S] numbers of the shards, in this epoch's order
    first_sample: Int64Array  # [S] the sample that each shard begins with, in this epoch's order of shards
    shard_starts: Int64Array  # [S + 1] place where each of them begins
    group_starts: Int64Array  # [G + 1] place where each group of open shards begins
    key: np.uint64

    def samples(self, places: Int64Array) -> Int64Array:
        """Return the sample at each place, 0 <= place < number of samples. Shape [n] -> [n]."""
        group = np.searchsorted(self.group_starts, places, side="right") - 1
        start = self.group_starts[group]
        size = self.group_starts[group + 1] - start
        key = mix64(group.astype(np.uint64) ^ self.key)
        shuffled = start + permute(places - start, size, key)
        shard = np.searchsorted(self.shard_starts, shuffled, side="right") - 1
        return self.first_sample[shard] + shuffled - self.shard_starts[shard]


class SampleOrder:
    """The order of the samples of a set of shards, over all epochs.

    ``samples_per_shard`` counts the samples of each shard, in index order; ``batch_size`` is the global batch.

    Raises:
        ValueError: there are fewer samples than one global batch.
    """

    def __init__(self, samples_per_shard: Sequence[int], *, batch_size: int, open_shards: int, seed: int) -> None:
        self._sizes: Int64Array = np.asarray(samples_per_shard, dtype=np.int64)
        self._first_sample: Int64Array = np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        if self.num_samples < batch_size:
            raise ValueError(
                f"the shards hold {self.num_samples} samples, fewer than one global batch of {batch_size}: "
                "lower batch_size or add samples"
            )
        self.batch_size = batch_size
        self.open_shards = open_shards
        self.seed = seed
        self.samples_per_epoch = self.num_samples // batch_size * batch_size
        self._stride = next(stride for stride in count(batch_size) if gcd(stride, self.num_samples) == 1)
        self._recent_epochs = lru_cache(maxsize=2)(self._make_epoch)

    def epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch. Cost and memory grow with the number of shards, not of samples."""
        return self._recent_epochs(epoch)

    def _make_epoch(self, epoch: int) -> EpochOrder:
        num_shards = len(self._sizes)
        shard_key = np.full(num_shards, stream_key(self.seed, epoch, "shards"))
        shards = permute(np.arange(num_shards), np.full(num_shards, num_shards), shard_key)
        shard_starts = np.concatenate([[0], np.cumsum(self._sizes[shards])])
        return EpochOrder(
            shards=shards,
            first_sample=self._first_sample[shards],
            shard_starts=shard_starts,
            group_starts=np.unique(np.append(shard_starts[:: self.open_shards], self.num_samples)),
            key=stream_key(self.seed, epoch, "samples"),
        )

    def locate(self, position: int) -> tuple[int, int]:
        """Return (epoch, place in its order) of a position."""
        return divmod(position, self.samples_per_epoch)

    def group_of(self, position: int) -> tuple[int, int]:
        """Return (epoch, number in it) of the group of open shards that the sample at a position comes from."""
        epoch, place = self.locate(position)
        return epoch, int(np.searchsorted(self.epoch(epoch).group_starts, place, side="right")) - 1

    def shards_from(self, first: tuple[int, int], last: tuple[int, int]) -> list[int]:
        """Return the shards of the groups from ``first`` to the one after ``last``, in the order they are read."""
        shards: dict[int, None] = {}
        group = first
        while group <= last:
            shards.update(dict.fromkeys(self._shards_of(group)))
            group = self._group_after(group)
        return list(shards | dict.fromkeys(self._shards_of(group)))

    def _shards_of(self, group: tuple[int, int]) -> list[int]:
        epoch, number = group
        return self.epoch(epoch).shards[number * self.open_shards : (number + 1) * self.open_shards].tolist()

    def _group_after(self, group: tuple[int, int]) -> tuple[int, int]:
        epoch, number = group
        # Groups whose samples are all left out of the epoch are skipped.
        if self.epoch(epoch).group_starts[number + 1] < self.samples_per_epoch:
            return epoch, number + 1
        return epoch + 1, 0

    def replacements(self, place: int) -> Iterator[int]:
        """Yield the places tried, in turn, when the sample at ``place`` is bad.

        They follow at a fixed stride, modulo the number of samples: the smallest stride of at least a global batch that
        is coprime to that number, so that every sample comes up. The rule needs no communication between ranks. The
        first replacements of two bad samples differ, and come from another batch except in the smallest sets. A
        replacement keeps its own place as well: it is seen twice in that epoch.
        """
        for step in count(1):
            yield (place + step * self._stride) % self.num_samples
