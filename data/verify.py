"""Checks shards before a run does: reads and decodes every sample as the loader would, and compares the index."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from secrets import token_hex

import numpy as np

from .cache import FetchError, is_remote
from .captions import Fields
from .images import BadSample, decode_image
from .index import (
    INDEX_NAME,
    ShardIndex,
    index_of_one_shard,
    open_index,
    recorded_source,
    scan_shard,
    shard_names,
    start_of_fingerprint,
)
from .processes import map_in_processes
from .reader import ShardReader, require_captions
from .tar import Problem, read_samples


@dataclass
class VerifyReport:
    """What ``verify_shards`` found: the count of good samples, and every problem."""

    good: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify_shards(
    shards: Path | str,
    *,
    workers: int | None = None,
    on_problem: Callable[[Problem], None] | None = None,
    cache_dir: Path | str | None = None,
    cache_gb: float = 100.0,
) -> VerifyReport:
    """Read every sample of the shards in a folder or below a URL as the loader does, and compare them with their index.

    ``on_problem`` is called with each problem, shard by shard. ``workers`` is the number of processes, by default one
    for each CPU; each reads a shard. ``cache_dir`` and ``cache_gb`` are for remote shards, as in ``open_index``.

    Raises:
        FileNotFoundError: there are no shards, or remote ones without an index.
        ValueError: the index of remote shards is damaged.
    """
    report = VerifyReport()

    def add(problem: Problem) -> None:
        report.problems.append(problem)
        if on_problem:
            on_problem(problem)

    index: ShardIndex | None = None
    address, fields = str(shards), Fields()
    try:
        index = open_index(shards, cache_dir=cache_dir, cache_gb=cache_gb)
        names, address, fields = index.shard_names, index.address, index.fields
        for name in index.left_out if index.remote is None else ():
            for problem in _why_left_out(Path(address) / name, fields):
                add(problem)
    except (ValueError, FileNotFoundError) as error:
        if is_remote(shards):
            raise
        folder, fields = recorded_source(Path(shards))
        if not folder.is_dir():
            raise
        names, address = shard_names(folder), str(folder)
        add(Problem(INDEX_NAME, "", "index", str(error)))
    check = _ShardCheck(str(shards), address, fields, cache_dir, cache_gb, token_hex() if index is not None else None)
    fingerprint = start_of_fingerprint(fields)
    for found in map_in_processes(check, enumerate(names), min(workers or os.cpu_count() or 1, len(names))):
        report.good += found.good
        fingerprint.update(found.hashed)
        for problem in found.problems:
            add(problem)
    if index is not None and index.remote is None and fingerprint.hexdigest() != index.fingerprint:
        add(
            Problem(INDEX_NAME, "", "index", "the fingerprint in the index is not that of the shards: index them again")
        )
    return report


def _why_left_out(path: Path, fields: Fields) -> list[Problem]:
    """Return what is wrong with a shard that the index leaves out."""
    try:
        problems = read_samples(path, fields).problems
    except OSError as error:
        return [Problem(path.name, "", "unreadable", str(error))]
    return problems or [Problem(path.name, "", "tar-empty", "the shard holds no sample with an image")]


@dataclass(frozen=True)
class _CheckedShard:
    """What a ``_ShardCheck`` found, and what the shard adds to the fingerprint."""

    good: int
    hashed: bytes
    problems: list[Problem]


@dataclass(frozen=True)
class _ShardCheck:
    """Checks shards one after the other, in a worker process."""

    shards: str
    address: str
    fields: Fields
    cache_dir: Path | str | None
    cache_gb: float
    verification: str | None  # a process opens the index once for each value; None without an index

    def __call__(self, numbered_name: tuple[int, str]) -> _CheckedShard:
        number, name = numbered_name
        index = _opened_index(self) if self.verification else None
        if index is not None and index.remote is not None:
            try:
                # The lease keeps the local copy while it is read, through the path of its open file.
                lease = index.remote.open(number)
            except FetchError as error:
                return _CheckedShard(0, b"", [Problem(name, "", "unreadable", str(error))])
            path = Path(f"/proc/self/fd/{lease.descriptor}")
        else:
            path = Path(self.address) / name
        try:
            entry, (samples, problems, _) = scan_shard(path, self.fields)
        except OSError as error:
            return _CheckedShard(0, b"", [Problem(name, "", "unreadable", str(error))])
        entry = replace(entry, name=name)
        problems = [replace(problem, shard=name) for problem in problems]
        alone = index_of_one_shard(path, samples, self.fields)
        if index is not None and index.remote is None:
            first, last = index.first_sample[number : number + 2]
            if not np.array_equal(index.samples[first:last], alone.samples):
                message = "the index does not say what is in this shard: index it again"
                problems.append(Problem(name, "", "index", message))
        if not entry.samples and not problems:
            problems.append(Problem(name, "", "tar-empty", "the shard holds no sample with an image"))
        reader = ShardReader(alone)
        good = 0
        for place, sample in enumerate(samples):
            try:
                raw = reader.read(place)
                require_captions(raw.captions)
                decode_image(raw.image)
                good += 1
            except BadSample as fault:
                problems.append(Problem(name, sample.key, fault.kind, str(fault), place))
        return _CheckedShard(good, entry.hashed() + alone.samples.tobytes(), problems)


@lru_cache(maxsize=1)
def _opened_index(check: _ShardCheck) -> ShardIndex:
    return open_index(check.shards, cache_dir=check.cache_dir, cache_gb=check.cache_gb)
