"""What the benchmarks measure with: turns, spread, memory, limits."""

import signal
import time
from types import SimpleNamespace

import pytest
import torch

from textlock.bench import measure
from textlock.bench.measure import Spread, TimeUp, Unavailable

CPU = torch.device("cpu")


def test_a_spread_is_that_of_its_runs():
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert spread == Spread(low=2.0, median=3.0, high=4.0, runs=5)


def test_runs_take_turns_after_one_uncounted():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.interleaved_times(runs, 0.0, CPU)
    assert order == list("ab" * (measure.LEAST_RUNS + 1))
    assert [len(times[name]) for name in "ab"] == [measure.LEAST_RUNS] * 2


def test_the_time_spent_is_that_asked_for():
    start = time.perf_counter()
    times = measure.interleaved_times({"sleep": lambda: time.sleep(0.01)}, 0.1, CPU)["sleep"]
    assert time.perf_counter() - start >= 0.1 and len(times) > measure.LEAST_RUNS
    assert min(times) >= 0.01


def test_on_a_gpu_every_run_lies_between_its_events_behind_a_flushed_cache(monkeypatch):
    """A stand-in for the GPU, which counts what it is given: the flush must be outside of the time, the run inside."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = len(done)
            done.append("event")

        def elapsed_time(self, stop):
            assert done[self.time : stop.time + 1] in (["event", "a", "event"], ["event", "b", "event"])
            assert done[self.time - 1] == "flush"
            return 2.0

    filler = SimpleNamespace(fill_=lambda value: done.append("flush"))
    monkeypatch.setattr(measure, "_cache_filler", lambda device: filler)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    runs = {name: lambda name=name: done.append(name) for name in "ab"}
    times = measure.interleaved_times(runs, 1e-9, torch.device("cuda"))
    assert times == {"a": [2e-3] * measure.LEAST_RUNS, "b": [2e-3] * measure.LEAST_RUNS}
    first_event = done.index("event")
    assert done[first_event:].count("wait") == 1 and done[-1] == "wait"


def test_peak_memory_is_that_of_the_run_alone():
    kept = torch.ones(2**16)
    peak = measure.peak_bytes(lambda: (kept + 1) * 2, CPU)
    assert 2 * kept.nbytes <= peak < 2.1 * kept.nbytes


def test_what_takes_too_long_is_stopped_and_the_alarm_taken_back():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeUp), measure.time_limit(0.05):
        try:
            time.sleep(10)
        except Exception:  # as code does that tries alternatives
            pytest.fail("the limit was taken for a failure")
    with measure.time_limit(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) == before
    with pytest.raises(TimeUp), measure.time_limit(-1):
        pytest.fail("there was no time left")


def test_an_error_is_relative_in_the_euclidean_norm_and_nan_stays():
    true = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert measure.relative_error(torch.tensor([3.0, 4.5]), true) == pytest.approx(0.1)
    assert not measure.relative_error(torch.tensor([3.0, torch.nan]), true) <= 1


def test_without_a_compiler_nothing_is_compiled_on_a_cpu(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match="no-such-compiler"):
        measure.check_compiler(CPU)
    measure.check_compiler(torch.device("cuda"))
