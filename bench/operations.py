"""Time and memory of an image tower: its matrix products and kernels, a block, the tower, next to their peers.

    python -m textlock.bench.operations                                  # everything, at sizes that fit this device
    python -m textlock.bench.operations --only gemm kernels --micro-batch 512
    python -m textlock.bench.operations --only tower --tower eva02_base_patch16_224 --micro-batch 8
    pytest bench/test_operations.py --benchmark-only                     # the same figures through pytest-benchmark

Kernels are those of all cards (`textlock.kernels.card`).
Products are in bfloat16 on a GPU and in float32 on a CPU, data is random. The floor of everything is its least memory
traffic over the bandwidth of copies or its operations over the rate of large products (`textlock.bench.ceilings`),
whichever takes longer; for a block and a tower it is the operations alone. Every candidate is first compared with
float64; one that is wrong has no figures. The candidates of an operation then take turns, and times are medians.
`speedup` is how many times faster than another candidate one of ours is: the median over turns. One JSON line a
candidate on stdout as soon as it is known, a table on stderr; exit status 1 if one of ours is wrong or fails.

A kernel's peers, eager and compiled, are its reference in plain torch, which takes the same inputs and returns the same
outputs: in a backward pass both recompute what is not kept and sum the gradients of biases. In place of attention's
formula stands torch's own scaled_dot_product_attention; other libraries run without RoPE, so the kernel is measured
without it too. On a CPU the reference is what a block runs, and there is no kernel to measure. Weights are converted to
bfloat16 in every run of a block or a tower, by all.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from textlock.bench.ceilings import COMPARED_ROWS, ceilings_for
from textlock.bench.comparison import (
    Comparison,
    Part,
    Prepared,
    Result,
    Run,
    Setting,
    compiled,
    measure,
    name_of,
    ran,
)
from textlock.bench.figures import Outcome, Report, cell, timing_cells
from textlock.bench.measure import Unavailable, device_of_this_machine, relative_error
from textlock.bench.tower import compare_block, compare_tower, layers_of
from textlock.kernels.card import Absent, Card, Data, Inputs, Pass, TowerSizes, by_name, find_cards, in_float64
from textlock.kernels.device import capability_of
from textlock.models.block import weight_gradient
from textlock.models.vision import VISION_CONFIGS

COMPARED_IMAGES = 64  # of a kernel, compared with float64 at a time

# Images of one forward and backward pass, by part.
MICRO_BATCHES: dict[str, dict[Part, tuple[int, ...]]] = {
    "cpu": {"gemm": (8,), "kernels": (8,), "block": (8,), "tower": (8,)},
    "cuda": {"gemm": (512,), "kernels": (256, 512, 1024), "block": (256, 512, 1024), "tower": (256, 512)},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}  # of products


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
    ceilings: Path | None = None
    """What `textlock.bench.ceilings` printed on this device; left out: measured first."""
    seed: int = 0
    """Of the data."""


def compare_products(layer: str, setting: Setting) -> Iterator[Comparison]:
    """Compare the products of a linear layer: forward, and the gradients of its input and of its weight.

    That of the weight is added to a float32 main gradient, as for every micro-batch of a step.
    """
    N, K = layers_of(setting.config)[layer]
    M, size = setting.rows, setting.dtype.itemsize

    @cache
    def data() -> Result:
        draw, dtype = Data(setting.device, setting.seed), setting.dtype
        return {
            "x": draw.normal(M, K, dtype=dtype),
            "weight": draw.normal(N, K, dtype=dtype, std=0.02),
            "d_y": draw.normal(M, N, dtype=dtype),
            # As large as what is added to it, so that losing it cannot pass for an error of rounding.
            "main": draw.normal(N, K, dtype=torch.promote_types(dtype, torch.float32), std=M**0.5),
        }

    def forward() -> Prepared:
        x, weight = data()["x"], data()["weight"]
        return ran(lambda: {"product": F.linear(x, weight)})

    def d_input() -> Prepared:
        d_y, weight = data()["d_y"], data()["weight"]
        return ran(lambda: {"product": d_y @ weight})

    def d_weight(add: Callable[[Tensor, Tensor, Tensor], object]) -> Prepared:
        d_y, x, main = data()["d_y"], data()["x"], data()["main"].clone()

        def run() -> None:
            add(d_y, x, main)

        run()
        return Prepared(run, {"product": main.clone()})

    def add_rounded(d_y: Tensor, x: Tensor, main: Tensor) -> None:
        main.add_(d_y.mT @ x)

    def errors(truth: Callable[[slice], Tensor]) -> Callable[[Result], dict[str, float]]:
        rows = slice(COMPARED_ROWS)
        return lambda found: {"product": relative_error(found["product"][rows], truth(rows))}

    def true_forward(rows: slice) -> Tensor:
        return data()["x"][rows].double() @ data()["weight"].double().mT

    def true_d_input(rows: slice) -> Tensor:
        return data()["d_y"][rows].double() @ data()["weight"].double()

    def true_d_weight(rows: slice) -> Tensor:
        return data()["main"][rows].double() + data()["d_y"][:, rows].double().mT @ data()["x"].double()

    kinds: dict[str, tuple[dict[str, Callable[[], Prepared]], Callable[[slice], Tensor], int]] = {
        "forward": ({"ours": forward}, true_forward, size * (M * K + N * K + M * N)),
        "d_input": ({"ours": d_input}, true_d_input, size * (M * N + N * K + M * K)),
        "d_weight": (
            {"ours": partial(d_weight, weight_gradient), "round_and_add": partial(d_weight, add_rounded)},
            true_d_weight,
            size * (M * N + M * K) + 2 * 4 * N * K,
        ),
    }
    for kind, (candidates, truth, traffic) in kinds.items():
        name = f"{layer}_{kind}"
        yield Comparison("gemm", name, setting, candidates, errors(truth), traffic=traffic, operations=2 * M * N * K)


def sizes_of(card: Card[Any], setting: Setting) -> Any:
    """Return the sizes that an operation has in a tower."""
    config = setting.config
    return card.sizes(
        images=setting.micro_batch,
        tokens=config.tokens,
        width=config.width,
        hidden=config.hidden,
        heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        rotary=config.rotary_grid is not None,
        dtype=setting.dtype,
        residual=setting.dtype,
    )


def tower_cards() -> Iterator[Card[Any]]:
    """Return the cards of the operations that an image tower is made of."""
    yield from (card for card in find_cards() if issubclass(card.sizes, TowerSizes))


def with_a_row_an_image(tensors_of: Callable[[int], Inputs]) -> set[str]:
    """Return the names of the tensors that change their shape with the number of images."""
    few, more = tensors_of(2), tensors_of(3)
    return {name for name, x in few.items() if torch.is_tensor(x) and x.shape != more[name].shape}


def compare_pass(card: Card[Any], one: Pass[Any], setting: Setting) -> Comparison:
    """Compare a pass of an operation with its baseline in plain torch, that compiled, and libraries.

    The baseline is the reference, forward and backward, unless the card names another: it takes what the kernel takes
    and returns what the kernel returns, so that neither does work that the other is spared.
    """
    sizes = sizes_of(card, setting)
    baseline = one.baseline or one.reference

    @cache
    def inputs() -> Inputs:
        return one.inputs(sizes, Data(setting.device, setting.seed))

    def without_data(images: int) -> Inputs:
        return one.inputs(replace(sizes, images=images), Data("meta"))

    def run_of(function: Callable[..., Any]) -> Prepared:
        given = inputs()
        return ran(lambda: by_name(function(**given)))

    def ours() -> Prepared:
        if capability_of(setting.device) < card.least:
            raise Unavailable(f"its kernels need a GPU of compute capability {'.'.join(map(str, card.least))} or later")
        return run_of(one.launch)

    def library(prepare: Callable[..., Run]) -> Prepared:
        try:
            return ran(prepare(**inputs()))
        except Absent as reason:
            raise Unavailable(str(reason)) from None

    def errors(found: Result) -> dict[str, float]:
        by_image = with_a_row_an_image(without_data)
        rows = with_a_row_an_image(lambda images: by_name(one.reference(**without_data(images))))
        squares: dict[str, Tensor] = {}  # of the error and of the truth
        sums: Result = {}  # over images
        for first in range(0, setting.micro_batch, COMPARED_IMAGES):
            images = slice(first, first + COMPARED_IMAGES)
            some = {name: x[images] if name in by_image else x for name, x in inputs().items()}
            for name, true in by_name(one.reference(**in_float64(some))).items():
                if name not in found:
                    continue
                if name not in rows:
                    sums[name] = sums[name] + true if name in sums else true
                    continue
                square = torch.stack([(found[name][images].double() - true).norm(), true.norm()]).square()
                squares[name] = squares[name] + square if name in squares else square
        of_rows = {name: (error / true).sqrt().item() for name, (error, true) in squares.items()}
        return of_rows | {name: relative_error(found[name], true) for name, true in sums.items()}

    return Comparison(
        "kernels",
        one.name,
        setting,
        {
            "ours": ours,
            "eager": partial(run_of, baseline),
            "compiled": lambda: run_of(compiled(baseline, setting.device)),
            **{name: partial(library, prepare) for name, prepare in one.libraries.items()},
        },
        errors,
        traffic=one.traffic(sizes),
        operations=one.operations(sizes),
    )


def comparisons(part: Part, setting: Setting) -> Iterator[Comparison]:
    """Return all comparisons of a part, whose data lives as long as they do."""
    if part == "gemm":
        for layer in layers_of(setting.config):
            yield from compare_products(layer, setting)
    elif part == "kernels":
        for card in tower_cards():
            yield from (compare_pass(card, one, setting) for one in card.passes)
    else:
        yield compare_block(setting) if part == "block" else compare_tower(setting)


def setting_of(tower: str, micro_batch: int, device: torch.device, seed: int) -> Setting:
    return Setting(tower, VISION_CONFIGS[tower], micro_batch, device, DTYPES[device.type], seed)


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
    ceilings = ceilings_for(options.ceilings, device, options.seconds)
    report = Report(device, COLUMNS, cells)
    ratios: list[str] = []
    for part in options.only or parts:
        end = time.monotonic() + options.limit
        for micro_batch in options.micro_batch or parts[part]:
            setting = setting_of(options.tower, micro_batch, device, options.seed)
            for comparison in comparisons(part, setting):
                names = [name for name in comparison.candidates if name in (options.candidates or known)]
                before = (comparison.operation, f"{micro_batch} images")
                for name, outcome in measure(comparison, names, ceilings, options.seconds, end):
                    report.add(part, comparison.operation, shape_of(setting), name, outcome, *before)
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


COLUMNS = (
    *("operation", "images", "candidate", "ms", "± %", "% floor", "GB/s", "TFLOP/s", "images/s", "MFU %"),
    *("peak MiB", "error", "x best peer"),
)


def cells(outcome: Outcome) -> list[str]:
    """Return the cells of the table from `ms` on."""
    return [
        *timing_cells(outcome),
        cell(outcome, "percent_of_floor", ".0f"),
        cell(outcome, "gigabytes_per_second", ".0f"),
        cell(outcome, "tflops", ".3g"),
        cell(outcome, "images_per_second", ".4g"),
        cell(outcome, "mfu_percent", ".1f"),
        cell(outcome, "peak_bytes", ".0f", 2**20),
        f"{max(outcome['errors'].values()):.0e}",
        f"{min(outcome['speedup'].values()):.2f}" if outcome.get("speedup") else "",
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
