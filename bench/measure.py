"""How the benchmarks measure: time with its spread, memory, errors; and why a candidate has no figures."""

import gc
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import util
from types import FrameType
from typing import Any

import torch
from torch import Tensor

# Runs of a figure on a GPU are started together, so that the GPU is never idle between them.
LEAST_RUNS, MOST_RUNS = 3, 200


class Unavailable(Exception):
    """A candidate that this machine or this case cannot measure, and why."""


class Wrong(Exception):
    """A candidate that does not agree with the reference."""

    def __init__(self, name: str, found: dict[str, float]) -> None:
        super().__init__(name, found)
        self.errors = found

    def __str__(self) -> str:
        """Return the sentence for people."""
        name, found = self.args
        return f"{name} is wrong, so it has no figures; its relative errors are {found}"


class TimeUp(BaseException):
    """The time limit has passed; no Exception, so that nothing that tries alternatives takes it for a failed one."""


@dataclass(frozen=True)
class Spread:
    """Seconds of many runs."""

    low: float  # first quartile
    median: float
    high: float  # third quartile
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        """Summarise at least two runs."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(low, median, high, len(seconds))

    def published(self) -> dict[str, Any]:
        """Return the figures of a result, in milliseconds."""
        return {"ms": self.median * 1e3, "quartiles_ms": [self.low * 1e3, self.high * 1e3], "runs": self.runs}


def importable(name: str) -> bool:
    """Return whether a package or module is there, without importing it."""
    try:
        return util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is part of
        return False


def check_compiler(device: torch.device) -> None:
    """Raise Unavailable where torch.compile cannot compile for this device."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise Unavailable(f"torch.compile needs a C++ compiler on a CPU, and there is no {compiler}")


def to_its_end(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Return a run that waits for the GPU, for clocks that do not."""

    def run_and_wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run_and_wait


def release(device: torch.device) -> None:
    """Give back the GPU memory that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def relative_error(found: Tensor, true: Tensor) -> float:
    """Return the error in the Euclidean norm."""
    return ((found.double() - true).norm() / true.norm()).item()


@cache
def _cache_filler(device: torch.device) -> Tensor:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


def interleaved_times(
    runs: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Return the times of runs that take turns, so that what slows the machine down slows all of them down.

    On a GPU the time is that between two events, and the level-2 cache is overwritten before each run; on a CPU it is
    the wall clock. Every run is made once more beforehand, uncounted.

    Args:
        runs: what to time; on a GPU they must not wait for it.
        seconds: about how long to time each, at least three runs.
        device: where they run.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    if device.type == "cpu":
        for run in runs.values():
            run()
        rounds, end = 0, time.perf_counter() + seconds * len(runs)
        while rounds < LEAST_RUNS or time.perf_counter() < end:
            for name, run in runs.items():
                before = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - before)
            rounds += 1
        return times

    filler = _cache_filler(device)
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    start_of_round = time.perf_counter()
    for run in runs.values():
        filler.fill_(1)
        run()
    torch.cuda.synchronize()
    duration = time.perf_counter() - start_of_round
    rounds = max(LEAST_RUNS, min(MOST_RUNS, int(seconds * len(runs) / duration)))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            filler.fill_(1)
            start.record()
            run()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(stop) / 1e3 for start, stop in pairs] for name, pairs in events.items()}


def time_of(run: Callable[[], object], seconds: float, device: torch.device) -> Spread:
    """Time one run alone, as `interleaved_times` does."""
    return Spread.of(interleaved_times({"": run}, seconds, device)[""])


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive during a run beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in what runs inside once this time is over; for the main thread only."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise TimeUp

    if seconds <= 0:
        raise TimeUp
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
