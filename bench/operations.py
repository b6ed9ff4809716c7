"""Time and memory of an image tower: its matrix products and kernels, a block, the tower, next to their peers.

    python -m textlock.bench.operations                                  # everything, at sizes that fit this device
    python -m textlock.bench.operations --only gemm kernels --micro-batch 512
    python -m textlock.bench.operations --only tower --tower eva02_base_patch16_224 --micro-batch 8
    pytest bench/test_operations.py --benchmark-only                     # the same figures through pytest-benchmark

Kernels are those of all cards of a tower (`textlock.kernels.card`).
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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from textlock.bench import ceilings
from textlock.bench.candidates import Comparison, compared
from textlock.bench.ceilings import COMPARED_ROWS, ceilings_for
from textlock.bench.comparison import Part, Prepared, Result, Run, Setting, comparison_of, compiled, ran
from textlock.bench.entry import (
    ERROR,
    FLOOR,
    PEAK,
    TIMING,
    Benchmark,
    Column,
    Line,
    Outcome,
    Session,
    device_of,
    require_known,
    require_positive,
)
from textlock.bench.measure import Unavailable, relative_error
from textlock.bench.tower import compare_block, compare_tower
from textlock.kernels.card import Absent, Card, Data, Inputs, Pass, TowerSizes, by_name, find_cards, in_float64
from textlock.kernels.device import capability_of
from textlock.models.block import weight_gradient
from textlock.models.vision import VISION_CONFIGS, VisionConfig

COMPARED_IMAGES = 64  # of a kernel, compared with float64 at a time

# Images of one forward and backward pass, by part.
MICRO_BATCHES: dict[str, dict[Part, tuple[int, ...]]] = {
    "cpu": {"gemm": (8,), "kernels": (8,), "block": (8,), "tower": (8,)},
    "cuda": {"gemm": (512,), "kernels": (256, 512, 1024), "block": (256, 512, 1024), "tower": (256, 512)},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}  # of products


@dataclass(frozen=True, kw_only=True)
class OperationOptions(ceilings.Options):
    """Options of the command line."""

    only: tuple[Literal["gemm", "kernels", "block", "tower"], ...] = ()
    """Parts to measure, after the ceilings; left out: all."""
    tower: str = "eva02_base_patch16_224"
    """Name of the tower whose shapes are measured."""
    micro_batch: tuple[int, ...] = ()
    """Images of one forward and backward pass; left out: sizes that fit the device."""
    seconds: float = 1.0
    """Time spent on each figure, at least three runs."""
    limit: float = 300.0
    """Seconds after which a part starts nothing more."""
    seed: int = 0
    """Of the data."""


def layers_of(config: VisionConfig) -> dict[str, tuple[int, int]]:
    """Return output and input channels of the linear layers of a block."""
    first = ("gate_up" if config.gated else "fc1", config.first_width)
    D = config.width
    return {"qkv": (3 * D, D), "out_proj": (D, D), first[0]: (first[1], D), "fc2": (D, config.hidden)}


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
        yield comparison_of("gemm", name, setting, candidates, errors(truth), traffic=traffic, operations=2 * M * N * K)


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

    return comparison_of(
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
    """Return what decides the data of a tower's operations."""
    return Setting(tower, VISION_CONFIGS[tower], micro_batch, device, DTYPES[device.type], seed)


def lines(options: OperationOptions, session: Session) -> Iterator[Line]:
    """Measure every part at every size; each part has the session's time to itself."""
    device, parts = session.device, MICRO_BATCHES[session.device.type]
    found = ceilings_for(options.ceilings, device, options.seconds)
    for part in options.only or parts:
        of_part = Session.lasting(device, options.limit)
        for micro_batch in options.micro_batch or parts[part]:
            setting = setting_of(options.tower, micro_batch, device, options.seed)
            for comparison in comparisons(part, setting):
                for line in compared(comparison, options.candidates, found, options.seconds, of_part):
                    yield line
                    if part == "tower":
                        where = f"{setting.tower}, {micro_batch} images: {line.candidate}"
                        faster = line.outcome.get("speedup", {}).items()
                        session.notes += [f"{where} / {other} = {x:.3f} in images/s" for other, x in faster]


def check(options: OperationOptions) -> None:
    """Raise ValueError for what cannot be."""
    require_positive(options, "micro_batch", "seconds", "limit")
    require_known("tower", [options.tower], VISION_CONFIGS)
    setting = setting_of(options.tower, 1, device_of(options.device), options.seed)
    known = {name for part in get_args(Part) for c in comparisons(part, setting) for name in c.candidates}
    require_known("candidates", options.candidates, sorted(known))


def least_speedup(outcome: Outcome) -> float | None:
    """Return how many times faster than the best peer one of ours is."""
    return min(outcome["speedup"].values()) if outcome.get("speedup") else None


BENCHMARK = Benchmark(
    about=__doc__,
    options=OperationOptions,
    check=check,
    lines=lines,
    before=("operation", "images"),
    columns=(
        *(*TIMING, FLOOR, Column("GB/s", "gigabytes_per_second", ".0f"), Column("TFLOP/s", "tflops", ".3g")),
        *(Column("images/s", "images_per_second", ".4g"), Column("MFU %", "mfu_percent", ".1f"), PEAK, ERROR),
        Column("x best peer", least_speedup, ".2f"),
    ),
)

if __name__ == "__main__":
    BENCHMARK.command()
