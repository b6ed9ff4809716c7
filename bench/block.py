"""Time and memory of the transformer block: its matrix products and kernels, the block, the tower, beside their peers.

    python -m textlock.bench.block                                       # everything, at sizes that fit this device
    python -m textlock.bench.block --only gemm kernels --micro-batch 512
    python -m textlock.bench.block --only tower --tower eva02_base_patch16_224 --micro-batch 8
    pytest bench/test_block.py --benchmark-only                          # the same figures through pytest-benchmark

Products are in bfloat16 on a GPU and in float32 on a CPU, data is random. The floor of everything is its least memory
traffic over the bandwidth of copies or its operations over the rate of large products (`textlock.bench.ceilings`),
whichever takes longer; for a block and a tower it is the operations alone. Every candidate is first compared with
float64; one that is wrong has no figures. The candidates of an operation then take turns, and times are medians.
`speedup` is how many times faster than another candidate one of ours is: the median over turns. One JSON line a
candidate on stdout as soon as it is known, a table on stderr; exit status 1 if one of ours is wrong or fails.

What peers do is in their favour: their LayerNorm weights are in the type of the products, their backward passes neither
make again what ours do not keep nor sum the gradients of biases, and attention libraries run without RoPE, whose
kernels are therefore compared twice. Weights are converted to bfloat16 in every run of a block or a tower, by all.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from textlock.bench.block_kernels import KERNELS, compare_kernel, compare_products, layers_of
from textlock.bench.block_tower import compare_block, compare_tower
from textlock.bench.ceilings import ceilings_for
from textlock.bench.comparison import Comparison, Part, Setting, measure, name_of
from textlock.bench.entry import ERROR, FLOOR, PEAK, TIMING, Column, Line, Outcome, Report, device_of
from textlock.models.vision import VISION_CONFIGS

# Images of one forward and backward pass, by part.
MICRO_BATCHES: dict[str, dict[Part, tuple[int, ...]]] = {
    "cpu": {"gemm": (8,), "kernels": (8,), "block": (8,), "tower": (8,)},
    "cuda": {"gemm": (512,), "kernels": (256, 512, 1024), "block": (256, 512, 1024), "tower": (256, 512)},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}  # of products


@dataclass(frozen=True, kw_only=True)
class Options:
    device: Literal["cpu", "cuda"] | None = None
    """What to measure on; left out: the GPU, if there is one."""
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
    ceilings: Path | None = None
    """What `textlock.bench.ceilings` printed on this device; left out: measured first."""
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


def setting_of(tower: str, micro_batch: int, device: torch.device, seed: int) -> Setting:
    return Setting(tower, VISION_CONFIGS[tower], micro_batch, device, DTYPES[device.type], seed)


def main(options: Options) -> None:
    if min(*options.micro_batch, options.seconds, options.limit) <= 0:
        raise ValueError("micro_batch, seconds and limit must be positive")
    if options.tower not in VISION_CONFIGS:
        raise ValueError(f"vision tower {options.tower!r} is unknown: choose from {', '.join(VISION_CONFIGS)}")
    device = device_of(options.device)
    parts = MICRO_BATCHES[device.type]
    any_setting = setting_of(options.tower, 1, device, options.seed)
    known = {name for part in parts for c in comparisons(part, any_setting) for name in c.candidates}
    if unknown := set(options.candidates) - known:
        raise ValueError(f"no candidate is named {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
    ceilings = ceilings_for(options.ceilings, device, options.seconds)
    report = Report(device, ("operation", "images"), COLUMNS, "")
    ratios: list[str] = []
    for part in options.only or parts:
        end = time.monotonic() + options.limit
        for micro_batch in options.micro_batch or parts[part]:
            setting = setting_of(options.tower, micro_batch, device, options.seed)
            for comparison in comparisons(part, setting):
                names = [name for name in comparison.candidates if name in (options.candidates or known)]
                before = (comparison.operation, f"{micro_batch} images")
                for name, outcome in measure(comparison, names, ceilings, options.seconds, end):
                    report.add(Line(part, comparison.operation, shape_of(setting), name, outcome, before))
                    if part == "tower":
                        where = f"{setting.tower}, {micro_batch} images: {name}"
                        faster = outcome.get("speedup", {}).items()
                        ratios += [f"{where} / {other} = {ratio:.3f} in images/s" for other, ratio in faster]
    report.close(ratios)


def shape_of(setting: Setting) -> dict[str, Any]:
    tokens, width = setting.config.tokens, setting.config.width
    return {
        "tower": setting.tower,
        "micro_batch": setting.micro_batch,
        "tokens": tokens,
        "width": width,
        "dtype": name_of(setting.dtype),
    }


def least_speedup(outcome: Outcome) -> float | None:
    return min(outcome["speedup"].values()) if outcome.get("speedup") else None


COLUMNS = (
    *(*TIMING, FLOOR, Column("GB/s", "gigabytes_per_second", ".0f"), Column("TFLOP/s", "tflops", ".3g")),
    *(Column("images/s", "images_per_second", ".4g"), Column("MFU %", "mfu_percent", ".1f"), PEAK, ERROR),
    Column("x best peer", least_speedup, ".2f"),
)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
