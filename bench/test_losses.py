"""The benchmark of the losses through pytest-benchmark, which keeps and compares runs.

    pytest bench/test_losses.py --benchmark-only
    pytest bench/test_losses.py --benchmark-only -k "chunked or open_clip" --benchmark-json=out.json

Candidates, cases and checks are those of `textlock.bench.losses`; floor, errors and memory are in `extra_info`.
"""

from collections.abc import Iterator
from functools import cache, lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from textlock.bench import losses as bench
from textlock.bench.candidates import Comparison, figures_of, judged
from textlock.bench.ceilings import Ceilings, ceilings_for
from textlock.bench.entry import device_of
from textlock.bench.measure import Spread, Unavailable, to_its_end

DEVICE = device_of(None)
DEFAULTS = bench.LossOptions()


@lru_cache(1)
def comparisons_of(b: int, world: int, d: int) -> tuple[Comparison, ...]:
    return tuple(bench.comparisons(bench.make_case(b, world, d, DEFAULTS.scale, DEFAULTS.seed, DEVICE)))


@cache
def ceilings() -> Ceilings:
    return ceilings_for(None, DEVICE, DEFAULTS.seconds)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with bench.process_group():
        yield


@pytest.mark.parametrize("name", bench.CANDIDATES)
@pytest.mark.parametrize("d", bench.WIDTHS[DEVICE.type])
@pytest.mark.parametrize(("b", "world"), bench.SIZES[DEVICE.type])
def test_loss_and_gradient(b: int, world: int, d: int, name: str, benchmark: BenchmarkFixture) -> None:
    comparison = next(found for found in comparisons_of(b, world, d) if name in found.candidates)
    try:
        ready = judged(name, comparison.candidates[name]())
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark(to_its_end(ready.run, DEVICE))
    if benchmark.stats is not None:  # None where pytest runs tests, not benchmarks
        stats = benchmark.stats.stats
        spread = Spread(stats.q1, stats.median, stats.q3, stats.rounds)
        benchmark.extra_info.update(figures_of(comparison, ready, spread, ceilings(), DEVICE))
