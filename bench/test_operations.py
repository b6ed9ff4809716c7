"""The benchmark of the operations of an image tower through pytest-benchmark, which keeps and compares runs.

    pytest bench/test_operations.py --benchmark-only
    pytest bench/test_operations.py --benchmark-only -k "attention and ours" --benchmark-json=out.json

Operations, candidates and checks are those of `textlock.bench.operations`; floor, errors and memory are in
`extra_info`.
"""

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from textlock.bench import operations as bench
from textlock.bench.candidates import Comparison, figures_of, judged
from textlock.bench.ceilings import Ceilings, ceilings_for
from textlock.bench.comparison import Part
from textlock.bench.entry import device_of
from textlock.bench.measure import Spread, Unavailable, release, to_its_end

DEVICE = device_of(None)
DEFAULTS = bench.OperationOptions()


def comparisons(part: Part, micro_batch: int) -> Iterator[Comparison]:
    return bench.comparisons(part, bench.setting_of(DEFAULTS.tower, micro_batch, DEVICE, DEFAULTS.seed))


def cases() -> Iterator[Any]:
    for part, micro_batches in bench.MICRO_BATCHES[DEVICE.type].items():
        for micro_batch in micro_batches:
            for comparison in comparisons(part, micro_batch):
                for name in comparison.candidates:
                    label = f"{comparison.operation}-{micro_batch}-{name}"
                    yield pytest.param(part, micro_batch, comparison.operation, name, id=label)


@lru_cache(1)
def comparison_of(part: Part, micro_batch: int, operation: str) -> Comparison:
    release(DEVICE)
    return next(c for c in comparisons(part, micro_batch) if c.operation == operation)


@cache
def ceilings() -> Ceilings:
    return ceilings_for(None, DEVICE, DEFAULTS.seconds)


@pytest.mark.parametrize(("part", "micro_batch", "operation", "name"), cases())
def test_operation(part: Part, micro_batch: int, operation: str, name: str, benchmark: BenchmarkFixture) -> None:
    comparison = comparison_of(part, micro_batch, operation)
    try:
        candidate = judged(name, comparison.candidates[name]())
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark(to_its_end(candidate.run, DEVICE))
    if benchmark.stats is not None:  # None where pytest runs tests, not benchmarks
        stats = benchmark.stats.stats
        spread = Spread(stats.q1, stats.median, stats.q3, stats.rounds)
        benchmark.extra_info.update(figures_of(comparison, candidate, spread, ceilings(), DEVICE))
