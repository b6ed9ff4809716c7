"""Candidates for the same work on the same data: checked against a reference, then timed in turns next to a floor.

A benchmark makes a `Comparison` for each of its cases and yields the lines of `compared`. Candidates are prepared one
after another; one that is wrong, or that cannot be had, has no figures. Those that are right take turns, so that what
slows the machine down slows all of them down. `speedup` of one of ours is how many times faster it is than each other
candidate: the median over turns.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from textlock.bench.ceilings import Ceilings
from textlock.bench.entry import Line, Outcome, Session, one_line
from textlock.bench.measure import Spread, Wrong, interleaved_times, peak_bytes, release
from textlock.bench.records import is_ours


@dataclass(frozen=True)
class Ready:
    """A candidate that has run once: how to run it again, and the errors of its results against the reference."""

    run: Callable[[], object]
    errors: dict[str, float]  # relative, by the name of the result
    tolerance: float  # largest error that still counts as right
    dtype: torch.dtype  # of its matrix products, whose rate is its floor


@dataclass(frozen=True)
class Comparison:
    """Candidates for the same work. Nothing is allocated before one of them is prepared."""

    part: str
    operation: str
    case: dict[str, Any]  # the data, as in the JSON lines
    shown: tuple[str, ...]  # the same as cells of the table
    candidates: Mapping[str, Callable[[], Ready]]  # prepared by a call; raises Unavailable
    traffic: float = 0  # bytes that have to be read or written
    operations: float = 0  # floating-point operations that have to be done
    memory: bool = False  # whether peak memory is reported
    more: Callable[[float], Outcome] = field(default=lambda seconds: {})  # further figures, from the median seconds


def judged(name: str, ready: Ready) -> Ready:
    """Return a candidate that is right; raises Wrong for any other, nan among its errors included."""
    if not all(error <= ready.tolerance for error in ready.errors.values()):
        raise Wrong(name, ready.errors)
    return ready


def figures_of(
    comparison: Comparison, ready: Ready, spread: Spread, ceilings: Ceilings, device: torch.device
) -> Outcome:
    """Return a candidate's figures: times, also in percent of the floor and as rates, memory and errors."""
    floor = ceilings.floor(ready.dtype, traffic=comparison.traffic, operations=comparison.operations)
    found = spread.published() | {"dtype": name_of(ready.dtype)} | at_floor(floor, spread.median)
    if comparison.traffic:
        found["gigabytes_per_second"] = comparison.traffic / spread.median / 1e9
    if comparison.operations:
        found["tflops"] = comparison.operations / spread.median / 1e12
    if comparison.memory:
        found["peak_bytes"] = peak_bytes(ready.run, device)
    return found | comparison.more(spread.median) | {"errors": ready.errors}


def at_floor(floor: float, seconds: float) -> Outcome:
    """Return the figures of a floor next to a time, both in seconds."""
    return {"floor_ms": floor * 1e3, "percent_of_floor": 100 * floor / seconds}


def compared(
    comparison: Comparison, chosen: Collection[str], ceilings: Ceilings, seconds: float, session: Session
) -> Iterator[Line]:
    """Check and then time the candidates of these names, all without any; yields a line for each.

    Those that are not ready at the end of the session are given up. ``seconds`` are spent on each figure.
    """
    device, ready = session.device, dict[str, Ready]()
    names = [name for name in comparison.candidates if not chosen or name in chosen]
    if any("compiled" in name for name in names):
        torch.compiler.reset()
    release(device)

    def line(name: str, outcome: Outcome) -> Line:
        return Line(comparison.part, comparison.operation, comparison.case, name, outcome, comparison.shown)

    def prepare(name: str) -> Outcome:
        ready[name] = judged(name, comparison.candidates[name]())
        return {}

    for name in names:
        if why_not := session.outcome_of(partial(prepare, name)):
            yield line(name, why_not)
    if not ready:
        return
    seconds = min(seconds, max(0.0, session.seconds_left()) / len(ready))
    times: dict[str, list[float]] = {}
    try:
        times = interleaved_times({name: each.run for name, each in ready.items()}, seconds, device)
    except torch.OutOfMemoryError:  # of all together; each alone may fit
        release(device)
    for name, each in ready.items():
        try:
            own = times[name] if times else interleaved_times({name: each.run}, seconds, device)[name]
            outcome = figures_of(comparison, each, Spread.of(own), ceilings, device)
        except torch.OutOfMemoryError as error:
            outcome = {"failed": one_line(error)}
            release(device)
        others = [other for other in times if not is_ours(other)]
        if "failed" not in outcome and is_ours(name) and others:
            outcome["speedup"] = {other: speedup(times[name], times[other]) for other in others}
        yield line(name, outcome)


def speedup(ours: list[float], theirs: list[float]) -> float:
    """Return how many times faster ours is: the median over turns."""
    return median(other / own for own, other in zip(ours, theirs, strict=True))


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as in the JSON lines: float32."""
    return str(dtype).removeprefix("torch.")
