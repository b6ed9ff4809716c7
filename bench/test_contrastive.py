"""The benchmark of the contrastive losses through pytest-benchmark, which keeps and compares runs.

    pytest bench/test_contrastive.py --benchmark-only
    pytest bench/test_contrastive.py --benchmark-only -k "chunked or open_clip" --benchmark-json=out.json

Candidates, cases and checks are those of `textlock.bench.contrastive`; floor, errors and memory are in `extra_info`.
"""

from collections.abc import Iterator
from functools import cache, lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from textlock.bench import contrastive as bench
from textlock.bench.ceilings import Ceilings, ceilings_for
from textlock.bench.measure import Spread, Unavailable, device_of_this_machine, to_its_end

DEVICE = device_of_this_machine()
DEFAULTS = bench.Options()


@lru_cache(1)
def case_of(b: int, world: int, d: int) -> bench.Case:
    return bench.make_case(b, world, d, DEFAULTS.scale, DEFAULTS.seed, DEVICE)


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
    case = case_of(b, world, d)
    try:
        trial = bench.check(case, name)
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark(to_its_end(trial.runner(), DEVICE))
    if benchmark.stats is not None:  # None where pytest runs tests, not benchmarks
        stats = benchmark.stats.stats
        spread = Spread(stats.min, stats.q1, stats.median, stats.q3, stats.rounds)
        benchmark.extra_info.update(bench.figures(trial, spread, ceilings()))
