"""The order of samples: a keyed permutation that can be entered at any position.

Four words for four indices, here and wherever samples are read; all count from 0:

    position  samples consumed since the start of training, over all epochs: the one integer that a run resumes from
    place     within one epoch's order: (epoch, place) = divmod(position, samples_per_epoch); in a ``tar.Problem``,
              within one shard
    sample    in the index (``index.ShardIndex``): shards by name, the samples of each in the order of its tar; where
              there are several sources, those of each source follow those of the one before
    number    of anything else that is listed: a shard of the index, a group of an epoch

The order is a function of (seed, epoch, position) alone. It knows nothing of ranks, workers or decoders, so the same
global batches come out of any number of processes, and a run resumes from that one integer.

- A source of n samples and weight w gives epoch e the samples from floor(e*w*n) to floor((e+1)*w*n) of its endless
  repetition: whole shards, and a part of a shard at either end. So w = 2 is every sample twice in every epoch, and
  w = 1/2 every sample in every second one. In every epoch a sample comes w times, rounded up or down, and so it comes
  E*w times in the first E epochs together.
- Every epoch permutes these runs of samples, takes them in groups of ``open_shards``, and permutes the samples inside
  each group. Reading therefore stays within a few shards at a time while neighbours come from all of them.
- A permutation is a Feistel network over the next power of four, with cycle walking (Black and Rogaway, "Ciphers with
  Arbitrary Finite Domains", 2002): element i is computed without the others, in constant memory.
- All epochs have the same number of whole global batches, the largest for which every epoch has samples. The samples
  at the end of the order, different ones every epoch, are left out of that epoch: fewer than a batch, and one for each
  source at most that has one more this time. No other sample is lost or repeated.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from math import floor, gcd

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
class Share:
    """The samples of one source, and how often each of them comes in an epoch."""

    samples_per_shard: Sequence[int]  # in index order
    weight: Fraction = Fraction(1)


@dataclass(frozen=True)
class _Runs:
    """What an epoch takes of a source: R runs of samples, each a shard or a part of one."""

    shards: Int64Array  # [R] numbers of the shards
    skipped: Int64Array  # [R] samples of the shard that come before the run, in the shard's own permutation
    sizes: Int64Array  # [R]


class _Repetition:
    """The samples of a source, repeated without end. ``first_shard`` is the number of its first shard.

    A fractional weight takes a part of them each time: its shards are permuted, the same way in every repetition, so
    that a part is a mixture of a sorted set.
    """

    def __init__(self, share: Share, first_shard: int, key: np.uint64) -> None:
        sizes: Int64Array = np.asarray(share.samples_per_shard, dtype=np.int64)
        shards = np.arange(len(sizes))
        if share.weight.denominator > 1:
            shards = permute(shards, np.full_like(shards, len(shards)), np.full(len(shards), key))
        self._shards = first_shard + shards
        self._sizes = sizes[shards]
        self._ends = np.cumsum(self._sizes)
        self.samples_per_epoch = share.weight * int(self._ends[-1])

    def runs(self, epoch: int) -> _Runs:
        """Return the part of one epoch."""
        first, end = floor(self.samples_per_epoch * epoch), floor(self.samples_per_epoch * (epoch + 1))
        first_run, skipped = self._run_of(first)
        last_run, taken = self._run_of(end - 1)
        runs = np.arange(last_run - first_run + 1) + first_run % len(self._shards)
        runs %= len(self._shards)
        before, sizes = np.zeros_like(runs), self._sizes[runs]
        sizes[-1] = taken + 1
        before[0] = skipped
        sizes[0] -= skipped
        return _Runs(self._shards[runs], before, sizes)

    def _run_of(self, place: int) -> tuple[int, int]:
        """Return in which shard of the endless repetition a sample is, and how many of that shard come before it."""
        lap, place = divmod(place, int(self._ends[-1]))
        number = int(np.searchsorted(self._ends, place, side="right"))
        return lap * len(self._shards) + number, place - int(self._ends[number] - self._sizes[number])


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch over R runs of samples: ``samples`` maps places in it to samples of the index."""

    shards: Int64Array  # [R] numbers of the shards, in this epoch's order
    first_sample: Int64Array  # [R] the sample that each shard begins with, in this epoch's order of runs
    run_starts: Int64Array  # [R + 1] place where each run begins
    group_starts: Int64Array  # [G + 1] place where each group of open shards begins
    key: np.uint64
    # Of the P runs that are parts of shards, rising; the samples of such a shard are permuted before they are parted.
    parts: Int64Array  # [P] their numbers
    part_skipped: Int64Array  # [P] samples of the shard that come before the run
    part_shard_size: Int64Array  # [P] samples of the whole shard
    part_key: UInt64Array  # [P]

    @property
    def num_samples(self) -> int:
        """Samples of the epoch, those at its end included that fill no batch."""
        return int(self.run_starts[-1])

    def samples(self, places: Int64Array) -> Int64Array:
        """Return the sample at each place, 0 <= place < number of samples. Shape [n] -> [n]."""
        group = np.searchsorted(self.group_starts, places, side="right") - 1
        start = self.group_starts[group]
        size = self.group_starts[group + 1] - start
        key = mix64(group.astype(np.uint64) ^ self.key)
        shuffled = start + permute(places - start, size, key)
        run = np.searchsorted(self.run_starts, shuffled, side="right") - 1
        offset = shuffled - self.run_starts[run]
        if len(self.parts):
            in_part = np.flatnonzero(np.isin(run, self.parts))
            part = np.searchsorted(self.parts, run[in_part])
            offset[in_part] = permute(
                offset[in_part] + self.part_skipped[part], self.part_shard_size[part], self.part_key[part]
            )
        return self.first_sample[run] + offset


class SampleOrder:
    """The order of the samples of some sources, over all epochs; ``batch_size`` is the global batch.

    Raises:
        ValueError: an epoch has fewer samples than one global batch.
    """

    def __init__(self, shares: Sequence[Share], *, batch_size: int, open_shards: int, seed: int) -> None:
        self._sizes: Int64Array = np.concatenate([np.asarray(share.samples_per_shard, np.int64) for share in shares])
        self._first_sample: Int64Array = np.cumsum(self._sizes) - self._sizes
        self._sources: list[_Repetition] = []
        first_shard = 0
        for number, share in enumerate(shares):
            self._sources.append(_Repetition(share, first_shard, stream_key(seed, number, "repetition")))
            first_shard += len(share.samples_per_shard)
        # Where weights are fractions some epochs have a few samples more.
        least = sum(floor(source.samples_per_epoch) for source in self._sources)
        if least < batch_size:
            raise ValueError(
                f"the shards give {least} samples an epoch, fewer than one global batch of {batch_size}: "
                "lower batch_size or add samples"
            )
        self.batch_size = batch_size
        self.open_shards = open_shards
        self.seed = seed
        self.samples_per_epoch = least // batch_size * batch_size
        self._recent_epochs = lru_cache(maxsize=2)(self._make_epoch)

    def epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch. Cost and memory grow with the number of its runs, not of samples."""
        return self._recent_epochs(epoch)

    def _make_epoch(self, epoch: int) -> EpochOrder:
        taken = [source.runs(epoch) for source in self._sources]
        num_runs = sum(len(runs.shards) for runs in taken)
        run_key = np.full(num_runs, stream_key(self.seed, epoch, "shards"))
        order = permute(np.arange(num_runs), np.full(num_runs, num_runs), run_key)
        shards = np.concatenate([runs.shards for runs in taken])[order]
        skipped = np.concatenate([runs.skipped for runs in taken])[order]
        sizes = np.concatenate([runs.sizes for runs in taken])[order]
        run_starts = np.concatenate([[0], np.cumsum(sizes)])
        parts = np.flatnonzero(sizes < self._sizes[shards])
        return EpochOrder(
            shards=shards,
            first_sample=self._first_sample[shards],
            run_starts=run_starts,
            group_starts=np.unique(np.append(run_starts[:: self.open_shards], run_starts[-1])),
            key=stream_key(self.seed, epoch, "samples"),
            parts=parts,
            part_skipped=skipped[parts],
            part_shard_size=self._sizes[shards[parts]],
            # The same in every epoch: the parts of a shard have no sample in common.
            part_key=mix64(shards[parts].astype(np.uint64) ^ stream_key(self.seed, 0, "parts")),
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

    def replacements(self, epoch: int, place: int) -> Iterator[int]:
        """Yield the places tried, in turn, when the sample at ``place`` of an epoch is bad.

        They follow at a fixed stride, modulo the epoch's number of samples: the smallest stride of at least a global
        batch that is coprime to that number, so that every sample comes up. The rule needs no communication between
        ranks. The first replacements of two bad samples differ, and come from another batch except in the smallest
        sets. A replacement keeps its own place as well: it is seen once more in that epoch.
        """
        size = self.epoch(epoch).num_samples
        stride = next(stride for stride in count(self.batch_size) if gcd(stride, size) == 1)
        for step in count(1):
            yield (place + step * stride) % size
