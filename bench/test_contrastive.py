"""The benchmark of the contrastive losses through pytest-benchmark, which keeps and compares runs.

    pytest bench/test_contrastive.py --benchmark-only
    pytest bench/test_contrastive.py --benchmark-only -k "chunked or open_clip" --benchmark-json=out.json

Candidates, cases and checks are those of `textlock.bench.contrastive`; floor, errors and memory are in `extra_info`.
"""

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from textlock.bench import contrastive as bench
from textlock.bench.measure import Unavailable, device_of_this_machine, to_its_end

DEVICE = device_of_this_machine()
DEFAULTS = bench.Options()


@lru_cache(1)
def case_of(b: int, world: int, d: int) -> bench.Case:
    return bench.make_case(b, world, d, DEFAULTS.scale, DEFAULTS.seed, DEVICE)


@lru_cache(3)
def floor_of(case: bench.Case, dtype: torch.dtype) -> float:
    return bench.floor_of(case, dtype, DEFAULTS.seconds)


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
        floor = floor_of(case, trial.candidate.dtype)
        benchmark.extra_info.update(bench.figures(trial, benchmark.stats.stats.min, floor))
