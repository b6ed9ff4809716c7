"""What this device can do at most: the bandwidth of copies and the rate of large matrix products.

    python -m textlock.bench.ceilings > ceilings.jsonl
    python -m textlock.bench.operations --ceilings ceilings.jsonl     # the floors of other benchmarks come from these

A floor is the least memory traffic (every tensor read or written once) over the bandwidth, or the operations over the
rate, whichever takes longer. Data is random: zeros run faster. Every copy and product is compared with what it should
give. One JSON line a ceiling on stdout, a table on stderr.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from textlock.bench import entry
from textlock.bench.entry import TIMING, Benchmark, Column, Line, Session, require_positive
from textlock.bench.measure import Wrong, relative_error, time_of
from textlock.bench.records import read_figures
from textlock.engine.provenance import device_name

# Side of the square matrices, their types, and bytes of the copy.
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
MATRIX_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16, torch.float32)}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}

COMPARED_ROWS = 64  # of a product
# Largest relative error of a product against float64 that still counts as right.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PREFIX = "matrix_"


@dataclass(frozen=True, kw_only=True)
class Options(entry.Options):
    """Options of benchmarks whose floors come from ceilings."""

    ceilings: Path | None = None
    """What `textlock.bench.ceilings` printed on this device; left out: measured first."""


@dataclass(frozen=True, kw_only=True)
class CeilingOptions:
    """Options of this module's own command."""

    device: Literal["cpu", "cuda"] | None = None
    """What to measure on; left out: the GPU, if there is one."""
    seconds: float = 1.0
    """Time spent on each ceiling, at least three runs."""


@dataclass(frozen=True)
class Ceilings:
    """What this device can do at most, measured."""

    bandwidth: float  # bytes a second of a copy, read and written
    matrix_rate: Mapping[torch.dtype, float]  # operations a second
    host_to_device: float | None  # bytes a second from pinned memory; None without a GPU

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, Any]]) -> "Ceilings":
        """Make them of what `measure_ceilings` yields."""
        rates = {
            getattr(torch, name.removeprefix(PREFIX)): figures["tflops"] * 1e12
            for name, figures in found.items()
            if name.startswith(PREFIX)
        }
        to_device = found.get("host_to_device")
        return cls(
            found["copy"]["gigabytes_per_second"] * 1e9,
            rates,
            None if to_device is None else to_device["gigabytes_per_second"] * 1e9,
        )

    def floor(self, dtype: torch.dtype, *, traffic: float = 0, operations: float = 0) -> float:
        """Return the seconds below which nothing with this traffic and these operations in ``dtype`` can get."""
        return max(traffic / self.bandwidth, operations / self.matrix_rate[dtype])


def read_ceilings(path: Path, device: torch.device) -> Ceilings:
    """Read the lines that this module prints; raises ValueError where they are of another device."""
    lines = [line for line in read_figures(path) if line["part"] == "ceilings"]
    if not lines:
        raise ValueError(f"{path} holds no ceilings; write it with python -m textlock.bench.ceilings")
    if others := {line["device"] for line in lines} - {device_name(device)}:
        raise ValueError(f"{path} is of {others.pop()}, not of this {device_name(device)}; measure again")
    return Ceilings.of({line["operation"]: line for line in lines})


def ceilings_for(path: Path | None, device: torch.device, seconds: float) -> Ceilings:
    """Return the ceilings of a file, or measure them."""
    return Ceilings.of(dict(measure_ceilings(device, seconds))) if path is None else read_ceilings(path, device)


def measure_ceilings(device: torch.device, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and figures of each ceiling; raises Wrong for one whose result is wrong."""
    source = torch.randint(256, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copied(name: str, source: Tensor, target: Tensor, traffic: int) -> tuple[str, dict[str, Any]]:
        spread = time_of(lambda: target.copy_(source, non_blocking=True), seconds, device)
        if not torch.equal(target, source.to(device)):
            raise Wrong(name, {"copy": float("nan")})
        return name, spread.published() | {"gigabytes_per_second": traffic / spread.median / 1e9}

    yield copied("copy", source, target, 2 * source.nbytes)
    if device.type == "cuda":
        on_host = torch.empty_like(source, device="cpu", pin_memory=True).copy_(source)
        yield copied("host_to_device", on_host, target.zero_(), source.nbytes)
        del on_host
    del source, target
    side = MATRIX_SIDE[device.type]
    for dtype in MATRIX_DTYPES[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        spread = time_of(partial(torch.mm, a, b), seconds, device)
        error = relative_error((a @ b)[:COMPARED_ROWS], a[:COMPARED_ROWS].double() @ b.double())
        name = f"{PREFIX}{str(dtype).removeprefix('torch.')}"
        if not error <= TOLERANCE[dtype]:
            raise Wrong(name, {"product": error})
        rates = {"tflops": 2 * side**3 / spread.median / 1e12, "errors": {"product": error}}
        yield name, spread.published() | rates


def lines(options: CeilingOptions, session: Session) -> Iterator[Line]:
    """Measure every ceiling of the device."""
    for name, figures in measure_ceilings(session.device, options.seconds):
        yield Line("ceilings", name, {}, "torch", figures, (name,))


BENCHMARK = Benchmark(
    about=__doc__,
    options=CeilingOptions,
    check=lambda options: require_positive(options, "seconds"),
    lines=lines,
    before=("ceiling",),
    columns=(*TIMING, Column("GB/s", "gigabytes_per_second", ".4g"), Column("TFLOP/s", "tflops", ".4g")),
)

if __name__ == "__main__":
    BENCHMARK.command()
