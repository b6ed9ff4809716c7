"""Candidates for one operation of an image tower: checked against float64, then timed in turns next to a floor."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from textlock.bench.ceilings import TOLERANCE, Ceilings
from textlock.bench.figures import Outcome, one_line, outcome_of
from textlock.bench.measure import (
    Spread,
    Wrong,
    check_compiler,
    interleaved_times,
    peak_bytes,
    release,
)
from textlock.bench.records import is_ours
from textlock.kernels.device import peak_rate
from textlock.models.vision import VisionConfig

Part = Literal["gemm", "kernels", "block", "tower"]

# As TOLERANCE, for ours in a single operation: it rounds less often than a tower, and less than some peers, which add
# up in 16 bits.
TOLERANCE_OF_ONE_OPERATION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Setting:
    """A tower's shapes, how many images, and where: everything that decides the data of an operation."""

    tower: str
    config: VisionConfig
    micro_batch: int
    device: torch.device
    dtype: torch.dtype  # of products
    seed: int

    @property
    def rows(self) -> int:
        """Tokens of all images."""
        return self.micro_batch * self.config.tokens

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a training step's products."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


Result = dict[str, Tensor]
Run = Callable[[], Result]


@dataclass(frozen=True)
class Prepared:
    """A candidate that is ready to be timed, and what it computes."""

    run: Callable[[], object]
    result: Result


@dataclass(frozen=True)
class Comparison:
    """Candidates for the same operation. Nothing is allocated before one of them is prepared."""

    part: Part
    operation: str
    setting: Setting
    candidates: dict[str, Callable[[], Prepared]]
    errors: Callable[[Result], dict[str, float]]
    traffic: float = 0  # bytes that have to be read or written
    operations: float = 0  # floating-point operations that have to be done
    many: bool = False  # operations: a block or tower, whose memory and images a second are told too

    def floor(self, ceilings: Ceilings) -> float:
        """Return the seconds below which this device cannot get."""
        return ceilings.floor(self.setting.dtype, traffic=self.traffic, operations=self.operations)


def ran(run: Run) -> Prepared:
    return Prepared(run, run())


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    check_compiler(device)
    return torch.compile(function, dynamic=False)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def figures(
    comparison: Comparison,
    run: Callable[[], object],
    errors: dict[str, float],
    spread: Spread,
    ceilings: Ceilings,
) -> dict[str, Any]:
    """Return what is published of a candidate: in percent of the floor, as rates, with errors and memory."""
    setting, floor = comparison.setting, comparison.floor(ceilings)
    found = spread.published() | {
        "floor_ms": floor * 1e3,
        "percent_of_floor": 100 * floor / spread.median,
        "gigabytes_per_second": comparison.traffic / spread.median / 1e9,
        "tflops": comparison.operations / spread.median / 1e12,
        "errors": errors,
    }
    if comparison.many:
        found["images_per_second"] = setting.micro_batch / spread.median
        peak = peak_rate(setting.device)
        found["mfu_percent"] = None if peak is None else 100 * comparison.operations / spread.median / peak
        found["peak_bytes"] = peak_bytes(run, setting.device)
    return found


def check(comparison: Comparison, name: str) -> tuple[Prepared, dict[str, float]]:
    """Prepare a candidate and compare it with float64; raises Unavailable, or Wrong with its errors."""
    candidate = comparison.candidates[name]()
    errors = comparison.errors(candidate.result)
    tolerance = TOLERANCE if comparison.many or not is_ours(name) else TOLERANCE_OF_ONE_OPERATION
    if not all(error <= tolerance[comparison.setting.dtype] for error in errors.values()):  # nan is wrong too
        raise Wrong(name, errors)
    return candidate, errors


def measure(
    comparison: Comparison, names: list[str], ceilings: Ceilings, seconds: float, end: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check and then time candidates in turns; yields name and figures, or why there are none.

    What is not ready at ``end`` on the monotonic clock is given up.
    """
    if not names:
        return
    device = comparison.setting.device
    if any("compiled" in name for name in names):
        torch.compiler.reset()
    release(device)
    ready: dict[str, Callable[[], object]] = {}
    errors: dict[str, dict[str, float]] = {}

    def prepare(name: str) -> Outcome:
        candidate, errors[name] = check(comparison, name)
        ready[name] = candidate.run
        return {}

    for name in names:
        if why_not := outcome_of(partial(prepare, name), device, end - time.monotonic()):
            yield name, why_not

    try:
        times = interleaved_times(ready, seconds, device)
        found = {
            name: figures(comparison, run, errors[name], Spread.of(times[name]), ceilings)
            for name, run in ready.items()
        }
    except torch.OutOfMemoryError as error:
        yield from ((name, {"failed": one_line(error)}) for name in ready)
        return
    for name in ready:
        if is_ours(name):
            others = [other for other in ready if not is_ours(other)]
            found[name]["speedup"] = {other: speedup(times[name], times[other]) for other in others}
        yield name, found[name]


def speedup(ours: list[float], theirs: list[float]) -> float:
    return median(other / own for own, other in zip(ours, theirs, strict=True))
