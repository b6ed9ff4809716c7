"""Time and memory of the transformer block: its matrix products and kernels, the block, the tower, beside their peers.

    python -m textlock.bench.block                                       # everything, at sizes that fit this device
    python -m textlock.bench.block --only gemm kernels --micro-batch 512
    python -m textlock.bench.block --only tower --tower eva02_base_patch16_224 --micro-batch 8
    pytest bench/test_block.py --benchmark-only                          # the same figures through pytest-benchmark

Products are in bfloat16 on a GPU and in float32 on a CPU, data is random. The ceilings are measured first, in the same
run: copy bandwidth and the rate of a large square matrix product. The floor of everything else is its least memory
traffic (every tensor read or written once) over that bandwidth, or its operations over that rate, whichever is longer;
for a block and a tower it is the operations alone. Every candidate is first compared with float64; one that is wrong
has no figures. The candidates of an operation then take turns, and times are medians. `speedup` is how many times
faster than another candidate one of ours is: the median over turns. One JSON line a figure on stdout as soon as it is
known, a table on stderr; exit status 1 if a candidate of ours is wrong or fails.

What peers do is in their favour: their LayerNorm weights are in the type of the products, their backward passes neither
make again what ours do not keep nor sum the gradients of biases, and attention libraries run without RoPE, whose
kernels are therefore compared twice. Weights are converted to bfloat16 in every run of a block or a tower, by all.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from textlock.bench.block_kernels import COMPARED_ROWS, KERNELS, compare_kernel, compare_products, layers_of
from textlock.bench.block_tower import compare_block, compare_tower
from textlock.bench.comparison import (
    TIME_LIMIT,
    TOLERANCE,
    Ceilings,
    Comparison,
    Part,
    Setting,
    is_ours,
    measure,
    name_of,
    of_time,
)
from textlock.bench.measure import Wrong, device_of_this_machine, relative_error, time_of
from textlock.engine.provenance import commit, device_name, versions
from textlock.models.vision import VISION_CONFIGS

# Images of one forward and backward pass, by part.
MICRO_BATCHES: dict[str, dict[Part, tuple[int, ...]]] = {
    "cpu": {"gemm": (8,), "kernels": (8,), "block": (8,), "tower": (8,)},
    "cuda": {"gemm": (512,), "kernels": (256, 512, 1024), "block": (256, 512, 1024), "tower": (256, 512)},
}
# Side of the square matrices and bytes of the copy that give the ceilings, and the types of the products.
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
MATRIX_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16)}


@dataclass(frozen=True, kw_only=True)
class Options:
    only: tuple[Literal["gemm", "kernels", "block", "tower"], ...] = ()
    """Parts to measure, after the ceilings; left out: all."""
    tower: str = "eva02_base_patch16_224"
    """Name of the tower whose shapes are measured."""
    micro_batch: tuple[int, ...] = ()
    """Images of one forward and backward pass; left out: sizes that fit the device."""
    candidates: tuple[str, ...] = ()
    """Names as in the table, ours and peers; left out: all."""
    seconds: float = 1.0
    """Time spent on each figure, at least three runs."""
    limit: float = 300.0
    """Seconds after which a part starts nothing more."""
    seed: int = 0
    """Of the data."""


def comparisons(part: Part, setting: Setting) -> Iterator[Comparison]:
    """Return all comparisons of a part, whose data lives as long as they do."""
    if part == "gemm":
        for layer in layers_of(setting.config):
            yield from compare_products(layer, setting)
    elif part == "kernels":
        for name, kernel in KERNELS.items():
            yield compare_kernel(name, setting, backward=False)
            if kernel.backward is not None:
                yield compare_kernel(name, setting, backward=True)
    else:
        yield compare_block(setting) if part == "block" else compare_tower(setting)


def measure_ceilings(device: torch.device, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure copies and square products of this device, each compared with what it should give."""
    source = torch.randint(256, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copied(name: str, source: Tensor, target: Tensor, traffic: int) -> tuple[str, dict[str, Any]]:
        spread = time_of(lambda: target.copy_(source, non_blocking=True), seconds, device)
        if not torch.equal(target.to(device), source.to(device)):
            raise Wrong(name, {"copy": float("nan")})
        return name, of_time(spread) | {"gigabytes_per_second": traffic / spread.median / 1e9}

    yield copied("copy", source, target, 2 * source.nbytes)
    if device.type == "cuda":
        yield copied(
            "host_to_device",
            torch.empty_like(source, device="cpu", pin_memory=True).copy_(source),
            target,
            source.nbytes,
        )
    del source, target
    side = MATRIX_SIDE[device.type]
    for dtype in MATRIX_DTYPES[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        spread = time_of(partial(torch.mm, a, b), seconds, device)
        error = relative_error((a @ b)[:COMPARED_ROWS], a[:COMPARED_ROWS].double() @ b.double())
        if not error <= TOLERANCE[dtype]:
            raise Wrong(f"matrix_{name_of(dtype)}", {"product": error})
        rates = {"tflops": 2 * side**3 / spread.median / 1e12, "errors": {"product": error}}
        yield f"matrix_{name_of(dtype)}", of_time(spread) | rates


def ceilings_of(found: dict[str, dict[str, Any]]) -> Ceilings:
    prefix = "matrix_"
    rates = {
        getattr(torch, name.removeprefix(prefix)): figures["tflops"] * 1e12
        for name, figures in found.items()
        if name.startswith(prefix)
    }
    return Ceilings(found["copy"]["gigabytes_per_second"] * 1e9, rates)


def setting_of(tower: str, micro_batch: int, device: torch.device, seed: int) -> Setting:
    dtype = MATRIX_DTYPES[device.type][0]
    return Setting(tower, VISION_CONFIGS[tower], micro_batch, device, dtype, seed)


def main(options: Options) -> None:
    if min(*options.micro_batch, options.seconds, options.limit) <= 0:
        raise ValueError("micro_batch, seconds and limit must be positive")
    if options.tower not in VISION_CONFIGS:
        raise ValueError(f"vision tower {options.tower!r} is unknown: choose from {', '.join(VISION_CONFIGS)}")
    device = device_of_this_machine()
    parts = MICRO_BATCHES[device.type]
    any_setting = setting_of(options.tower, 1, device, options.seed)
    known = {name for part in parts for c in comparisons(part, any_setting) for name in c.candidates}
    if unknown := set(options.candidates) - known:
        raise ValueError(f"no candidate is named {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
    report = Report(device)
    found: dict[str, dict[str, Any]] = {}
    for name, outcome in measure_ceilings(device, options.seconds):
        found[name] = outcome
        report.add("ceilings", name, {}, "torch", outcome)
    ceilings = ceilings_of(found)
    for part in options.only or parts:
        end = time.monotonic() + options.limit
        for micro_batch in options.micro_batch or parts[part]:
            setting = setting_of(options.tower, micro_batch, device, options.seed)
            for comparison in comparisons(part, setting):
                names = [name for name in comparison.candidates if name in (options.candidates or known)]
                for name, outcome in measure(comparison, names, ceilings, options.seconds, end):
                    report.add(part, comparison.operation, shape_of(setting), name, outcome)
    report.close()
    if report.faults:
        raise SystemExit(1)


def shape_of(setting: Setting) -> dict[str, Any]:
    tokens, width = setting.config.tokens, setting.config.width
    return {
        "tower": setting.tower,
        "micro_batch": setting.micro_batch,
        "tokens": tokens,
        "width": width,
        "dtype": name_of(setting.dtype),
    }


COLUMNS = (
    *("operation", "images", "candidate", "ms", "± %", "% floor", "GB/s", "TFLOP/s", "images/s", "MFU %"),
    *("peak MiB", "error", "x best peer"),
)


class Report:
    """Prints every figure as a JSON line at once, and a table at the end."""

    def __init__(self, device: torch.device) -> None:
        self.machine = {"device": device_name(device), "versions": versions(), "commit": commit()}
        self.table = Table(title=device_name(device))
        for column in COLUMNS:
            self.table.add_column(column, justify="right")
        self.absent: dict[str, set[str]] = {}  # reason -> names
        self.comparisons: list[str] = []
        self.faults: list[str] = []

    def add(self, part: Part, operation: str, shape: dict[str, Any], name: str, outcome: dict[str, Any]) -> None:
        if "absent" in outcome:
            self.absent.setdefault(outcome["absent"], set()).add(name)
            return
        line = {"part": part, "operation": operation, "case": shape, "candidate": name}
        print(json.dumps(line | outcome | self.machine), flush=True)
        if is_ours(name) and ("wrong" in outcome or outcome.get("failed", TIME_LIMIT) != TIME_LIMIT):
            why = outcome.get("failed", f"wrong, its relative errors are {outcome.get('wrong')}")
            self.faults.append(f"{operation}, {shape['micro_batch']} images, {name}: {why}")
        self.table.add_row(operation, str(shape.get("micro_batch", "")), name, *cells(outcome))
        if part == "tower":
            ratios = outcome.get("speedup", {}).items()
            where = f"{shape['tower']}, {shape['micro_batch']} images"
            self.comparisons += [f"{where}: {name} / {other} = {ratio:.3f} in images/s" for other, ratio in ratios]

    def close(self) -> None:
        Console(stderr=True, width=160).print(self.table)
        for line in self.comparisons:
            print(line, file=sys.stderr)
        for why, names in self.absent.items():
            print(f"left out {', '.join(sorted(names))}: {why}", file=sys.stderr)
        for line in self.faults:
            print(f"fault: {line}", file=sys.stderr)


def cells(outcome: dict[str, Any]) -> list[str]:
    """Return the cells of the table from `ms` on."""
    if "failed" in outcome:
        return [outcome["failed"]]
    if "wrong" in outcome:
        return ["wrong", *[""] * 7, f"{max(outcome['wrong'].values()):.0e}"]

    def cell(name: str, form: str, unit: float = 1) -> str:
        value = outcome.get(name)
        return "" if not value else format(value / unit, form)

    low, high = outcome["quartiles_ms"]
    return [
        f"{outcome['ms']:.3f}",
        f"{50 * (high - low) / outcome['ms']:.1f}",
        cell("percent_of_floor", ".0f"),
        cell("gigabytes_per_second", ".0f"),
        cell("tflops", ".3g"),
        cell("images_per_second", ".4g"),
        cell("mfu_percent", ".1f"),
        cell("peak_bytes", ".0f", 2**20),
        f"{max(outcome['errors'].values()):.0e}" if "errors" in outcome else "",
        f"{min(outcome['speedup'].values()):.2f}" if outcome.get("speedup") else "",
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
