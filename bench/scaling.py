"""Predicts the training step on 8 to 4,096 GPUs from measured parts.

    python -m textlock.bench.scaling --steps steps.jsonl    # lines that textlock.bench.step printed
    python -m textlock.bench.scaling --parts parts.json     # an object of the fields of Parts below

For P ranks of b images, B = P·b texts, d wide:

    step    = compute · (1 + deviation · E[max of P normal draws]) + gather + coupling + reduction + data wait
    compute = tower(b) + optimizer + fixed part of the loss + b·B · seconds of a pair
    tower   : between measured local batches along a line, which includes what is recomputed; beyond them by the image,
              which is too good below them, where a GPU is not full: such predictions are marked
    gather  : all-gather of B text embeddings, as far as the forward pass does not hide it
    coupling: all-reduce of B column sums in float64; every rank waits for it
    reduction: all-reduce of the gradients, as far as the backward pass of the last micro-batch does not hide it; what
               lies before the first block and after the last is never hidden
    data wait: what the loader needs for b images beyond the rest of the step

    all-gather = (P-1)/P · bytes / bandwidth + ⌈log2 P⌉ · latency          all-reduce = twice that

A rank's link is that within a node up to `ranks_per_node`, the network beyond. All ranks wait for the slowest one: that
is where the draws come from. What was not measured is an assumption, and is printed as one. One JSON line a prediction
on stdout, a table on stderr. `textlock.bench.scaling_check` compares predictions with steps of real processes.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import torch

from textlock.bench.entry import Benchmark, Column, Line, Session, require_positive
from textlock.bench.records import read_figures
from textlock.models.vision import VisionTower, build_vision_tower

RANKS = tuple(2**n for n in range(3, 13))  # 8 to 4,096


@dataclass(frozen=True)
class Link:
    """What connects a rank to the others."""

    latency: float  # seconds of one hop
    bandwidth: float  # bytes a second that a rank sends

    def all_gather(self, size: int, ranks: int) -> float:
        """Return the seconds until every rank has ``size`` bytes, of which each brings its part."""
        if ranks == 1:
            return 0.0
        return (ranks - 1) / ranks * size / self.bandwidth + math.ceil(math.log2(ranks)) * self.latency

    def all_reduce(self, size: int, ranks: int) -> float:
        """Return the seconds until every rank has the sum of ``size`` bytes."""
        return 2 * self.all_gather(size, ranks)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The measured parts of a step: seconds and bytes of one rank."""

    source: str  # where the figures come from
    tower: dict[int, float]  # seconds of the tower, forward and backward, by local batch
    loss_pair: float  # seconds of a pair of an image and a text
    optimizer: float
    loss_fixed: float = 0.0  # seconds of the loss that do not grow with the pairs
    deviation: float  # standard deviation of a rank's compute, as a share of it
    gradient_bytes: int
    exposed_bytes: int  # of these, outside of the blocks
    row_bytes: int  # of a text embedding
    micro_batch: int
    node: Link
    network: Link
    ranks_per_node: int
    overlap: float  # share of a collective's time that computing hides where it can
    loader: float | None = None  # images a second that the loader of one rank brings; None: as many as are asked for
    slowdown: dict[int, float] | None = None  # of compute where that many ranks share a machine
    assumed: tuple[str, ...] = ()  # names of the fields that were not measured

    def link(self, ranks: int) -> Link:
        """Return the slowest link among so many ranks."""
        return self.node if ranks <= self.ranks_per_node else self.network

    def tower_seconds(self, images: int) -> float:
        """Return the tower's seconds for a local batch, on the line between the two nearest that were measured."""
        known = sorted(self.tower)
        if images >= known[-1]:
            return self.tower[known[-1]] * images / known[-1]
        if images <= known[0]:
            return self.tower[known[0]] * images / known[0]
        low, high = next((a, b) for a, b in pairwise(known) if a <= images <= b)
        return self.tower[low] + (self.tower[high] - self.tower[low]) * (images - low) / (high - low)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, by cost."""

    ranks: int
    local_batch: int
    seconds: dict[str, float]

    @property
    def step(self) -> float:
        """Of the whole step."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Of one rank."""
        return self.local_batch / self.step


COSTS = ("tower", "loss", "optimizer", "stragglers", "gather", "coupling", "reduction", "data wait")


@cache
def expected_maximum(draws: int) -> float:
    """Return the expected maximum of independent standard normal draws: ∫ x d(Φ(x)^n)."""
    normal, steps, end = NormalDist(), 4000, 9.0
    edges = [-end + 2 * end * i / steps for i in range(steps + 1)]
    below = [normal.cdf(edge) ** draws for edge in edges]
    return sum((a + b) / 2 * (q - p) for (a, b), (p, q) in zip(pairwise(edges), pairwise(below), strict=True))


def predict(parts: Parts, ranks: int, local_batch: int) -> Prediction:
    """Predict a step of ``ranks`` ranks with ``local_batch`` images each, by the formulas at the top of this file."""
    texts = ranks * local_batch
    slower = (parts.slowdown or {}).get(ranks, 1.0)
    tower = slower * parts.tower_seconds(local_batch)
    loss = slower * (parts.loss_fixed + parts.loss_pair * local_batch * texts)
    optimizer = slower * parts.optimizer
    link = parts.link(ranks)
    # A backward pass takes about two thirds of forward and backward.
    forward, last_backward = tower / 3, tower * 2 / 3 * min(1.0, parts.micro_batch / local_batch)
    gather = max(0.0, link.all_gather(texts * parts.row_bytes, ranks) - parts.overlap * forward)
    reduction = max(
        link.all_reduce(parts.exposed_bytes, ranks),
        link.all_reduce(parts.gradient_bytes, ranks) - parts.overlap * last_backward,
    )
    seconds = {
        "tower": tower,
        "loss": loss,
        "optimizer": optimizer,
        "stragglers": (tower + loss + optimizer) * parts.deviation * max(0.0, expected_maximum(ranks)),
        "gather": gather,
        "coupling": link.all_reduce(8 * texts, ranks),
        "reduction": reduction,
    }
    loading = 0.0 if parts.loader is None else local_batch / parts.loader
    seconds["data wait"] = max(0.0, loading - sum(seconds.values()))
    return Prediction(ranks, local_batch, seconds)


# What NCCL reaches between H100s with NVLink and, of eight adapters of 400 Gbit/s a node, between nodes; and how far
# steps of one GPU differ from one another.
ASSUMED_NODE = Link(10e-6, 300e9)
ASSUMED_NETWORK = Link(25e-6, 200e9)
ASSUMED_DEVIATION = 0.01


def read_parts(path: Path) -> Parts:
    """Read parts from a JSON object; raises ValueError for a file that holds none."""
    try:
        found = json.loads(path.read_text())
        links = {name: Link(**found[name]) for name in ("node", "network")}
        tables = {
            name: {int(n): float(value) for n, value in found[name].items()}
            for name in ("tower", "slowdown")
            if found.get(name) is not None
        }
        return Parts(**(found | links | tables | {"assumed": tuple(found.get("assumed", ()))}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        names = ", ".join(field.name for field in fields(Parts))
        raise ValueError(f"{path} holds no JSON object of measured parts ({names}): {error}") from error


def parts_of_steps(path: Path, loader: float | None) -> Parts:
    """Take the parts from lines of `bench.step` for ``ours``.

    Links are assumed, and the deviation is at least the assumed one.
    """
    lines = [line for line in read_figures(path) if line.get("candidate") == "ours" and "seconds" in line]
    # Decoding meanwhile slows a tower down.
    lines = [line for line in lines if line["case"].get("jpeg_short_side") is None]
    if not lines:
        raise ValueError(f"{path} has no figures of ours: give it lines that python -m textlock.bench.step printed")
    if len(settings := {(line["case"]["tower"], line["device"]) for line in lines}) > 1:
        raise ValueError(f"{path} mixes towers or devices: {sorted(settings)}; keep to one")
    case = lines[0]["case"]
    tower = build_vision_tower(case["tower"])
    pairs = [line["seconds"]["loss"] / (line["case"]["local_batch"] * line["case"]["texts"]) for line in lines]
    spreads = [(high - low) / 1.349 / line["ms"] for line in lines for low, high in [line["quartiles_ms"]]]
    return Parts(
        source=f"{path.name}, {case['tower']} on {lines[0]['device']}",
        tower={line["case"]["local_batch"]: line["seconds"]["tower"] for line in lines},
        loss_pair=min(pairs),
        optimizer=median(line["seconds"]["optimizer"] for line in lines),
        deviation=max(ASSUMED_DEVIATION, *spreads),
        **sizes(tower, torch.float16),
        micro_batch=max(line["case"]["micro_batch"] for line in lines),
        node=ASSUMED_NODE,
        network=ASSUMED_NETWORK,
        ranks_per_node=8,
        overlap=1.0,
        loader=loader,
        assumed=("node", "network", "ranks_per_node", "overlap", "deviation", "loader"),
    )


def sizes(tower: VisionTower, dtype: torch.dtype) -> dict[str, Any]:
    """Return what travels, in bytes; ``dtype`` is that of text embeddings."""
    everything = sum(parameter.numel() for parameter in tower.parameters())
    in_blocks = sum(parameter.numel() for parameter in tower.blocks.parameters())
    return {
        "gradient_bytes": 4 * everything,
        "exposed_bytes": 4 * (everything - in_blocks),
        "row_bytes": tower.embed_dim * dtype.itemsize,
    }


@dataclass(frozen=True, kw_only=True)
class ForecastOptions:
    """Options of the command."""

    parts: Path | None = None
    """JSON file of measured parts; this or --steps."""
    steps: Path | None = None
    """Lines that bench.step printed (not named .json), or a .json file of bench/results: parts are taken from them."""
    loader: float | None = None
    """Images a second that the loader of one rank brings; left out: as many as are asked for."""
    global_batch: int = 65536
    """Images of a step where the global batch is fixed."""
    local_batch: int = 4096
    """Images of one rank where the local batch is fixed."""
    ranks: tuple[int, ...] = RANKS
    """GPUs to predict."""


ASSUMPTIONS: dict[str, Callable[[Parts], str]] = {
    "node": lambda parts: f"within a node a hop takes {_link(parts.node)}",
    "network": lambda parts: f"between nodes a hop takes {_link(parts.network)}",
    "ranks_per_node": lambda parts: f"{parts.ranks_per_node} ranks a node",
    "overlap": lambda parts: f"computing hides {parts.overlap:.0%} of a collective's time where it can",
    "deviation": lambda parts: f"the compute of a rank's step deviates by {parts.deviation:.1%}",
    "loader": lambda parts: (
        "the loader brings " + ("all that is asked for" if parts.loader is None else f"{parts.loader:,.0f} images/s")
    ),
}


def _link(link: Link) -> str:
    return f"{link.latency * 1e6:.0f} µs and {link.bandwidth / 1e9:.3g} GB/s"


def assumptions(parts: Parts) -> list[str]:
    """Return the assumptions of a prediction, in sentences: first the parts that were not measured."""
    low, high = min(parts.tower), max(parts.tower)
    return [
        *(f"assumed: {ASSUMPTIONS[name](parts)}" for name in parts.assumed),
        *(f"measured: {say(parts)}" for name, say in ASSUMPTIONS.items() if name not in parts.assumed),
        f"tower measured at {low:,} to {high:,} images; where marked *, the same time an image as at the nearest",
        "one message carries all gradients, one all text embeddings; no rank fails, and nothing else uses the network",
    ]


def is_measured(parts: Parts, local_batch: int) -> bool:
    """Return whether the tower was measured at this local batch or around it."""
    return min(parts.tower) <= local_batch <= max(parts.tower)


def regimes(options: ForecastOptions) -> dict[str, list[tuple[int, int]]]:
    """Return ranks and local batches by the batch that is held fixed."""
    fixed = [(p, options.global_batch // p) for p in options.ranks if options.global_batch % p == 0]
    return {
        f"{options.global_batch:,} in all": fixed,
        f"{options.local_batch:,} each": [(p, options.local_batch) for p in options.ranks],
    }


def parts_for(options: ForecastOptions) -> Parts:
    """Return the parts that the options name."""
    if options.steps is not None:
        return parts_of_steps(options.steps, options.loader)
    assert options.parts is not None
    parts = read_parts(options.parts)
    return parts if options.loader is None else replace(parts, loader=options.loader)


def lines(options: ForecastOptions, session: Session) -> Iterator[Line]:
    """Predict both regimes."""
    parts = parts_for(options)
    session.notes += [f"predicted from {parts.source}; the last columns are % of the step", *assumptions(parts)]
    for regime, cases in regimes(options).items():
        for ranks, local_batch in cases:
            prediction, measured = predict(parts, ranks, local_batch), is_measured(parts, local_batch)
            alone = predict(parts, 1, local_batch)  # one rank with the same local batch and nobody to wait for
            outcome = {
                "step_ms": 1e3 * prediction.step,
                "images_per_second_of_each": prediction.images_per_second,
                "efficiency": prediction.images_per_second / alone.images_per_second,
                "tower_is_measured": measured,
                "text_bytes": ranks * local_batch * parts.row_bytes,
                "seconds": prediction.seconds,
                "parts": asdict(parts),
            }
            case = {"ranks": ranks, "local_batch": local_batch, "fixed": regime}
            shown = (regime, f"{ranks:,}", f"{local_batch:,}{'' if measured else '*'}")
            yield Line("forecast", "step", case, "ours", outcome, shown)


def share_of(cost: str) -> Column:
    """Return the column of a cost, in percent of the step."""
    return Column(cost, lambda outcome: 100 * outcome["seconds"][cost] / sum(outcome["seconds"].values()), ".1f")


def check(options: ForecastOptions) -> None:
    """Raise ValueError for what cannot be."""
    if (options.parts is None) == (options.steps is None):
        raise ValueError("give --parts or --steps, one of them")
    require_positive(options, "global_batch", "local_batch", "ranks", "loader")


BENCHMARK = Benchmark(
    about=__doc__,
    options=ForecastOptions,
    check=check,
    lines=lines,
    before=("batch", "GPUs", "images of each"),
    columns=(
        *(Column("texts GiB", "text_bytes", ".2f", 2**30), Column("step ms", "step_ms", ".1f")),
        Column("images/s of each", "images_per_second_of_each", ",.4g"),
        Column("efficiency %", "efficiency", ".1f", 0.01),
        *map(share_of, COSTS),
    ),
)

if __name__ == "__main__":
    BENCHMARK.command()
