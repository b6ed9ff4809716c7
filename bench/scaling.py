"""Predicts the training step on 8 to 4,096 GPUs from measured parts, and checks the prediction on real processes.

    python -m textlock.bench.scaling --steps bench/results/STEPS.json --plot scaling.png   # figures of bench.step
    python -m textlock.bench.scaling --parts parts.json                  # an object of the fields of Parts below
    python -m textlock.bench.scaling --check --plot check.png            # 1, 2 and 4 gloo processes on this CPU

For P ranks of b images, B = P·b texts, d wide:

    step    = compute · (1 + deviation · E[max of P normal draws]) + gather + coupling + reduction + data wait
    compute = tower(b) + optimizer + fixed part of the loss + b·B · seconds of a pair
    tower   : between measured local batches along a line, which includes what is made again; beyond them by the image,
              which is too good below them, where a GPU is not full: such predictions are marked
    gather  : all-gather of B text rows, as far as the forward pass does not hide it
    coupling: all-reduce of B column sums in float64; every rank waits for it
    reduction: all-reduce of the gradients, as far as the backward pass of the last micro-batch does not hide it; what
               lies before the first block and behind the last is never hidden
    data wait: what the loader needs for b images beyond the rest of the step

    all-gather = (P-1)/P · bytes / bandwidth + ⌈log2 P⌉ · latency          all-reduce = twice that

A rank's link is that within a node up to `ranks_per_node`, the network beyond. All ranks wait for the slowest one: that
is where the draws come from. What was not measured is an assumption, and is printed as one.

`--check` starts real processes, measures the parts there and then times whole steps of 1, 2 and 4 ranks: compute alone
and how far it slows down where processes share cores, latency and bandwidth between two of them. Nothing of the true
steps enters the prediction. One JSON line a prediction on stdout, a table on stderr.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, mean, median, pstdev, quantiles
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from textlock.bench.records import read_figures
from textlock.data.publish import publish_text, published_file
from textlock.engine.distributed import World, join_world
from textlock.engine.objective import LossConfig, Objective
from textlock.engine.optim import FlatGradients, OptimConfig, build_optimizer
from textlock.engine.plan import StepConfig, choose_plan, tier_costs
from textlock.engine.provenance import commit, device_name, versions
from textlock.engine.step import LargeBatchStep, autocast_for, text_dtype
from textlock.kernels.contrastive import contrastive_loss
from textlock.models.vision import VISION_CONFIGS, VisionTower, build_vision_tower

CPU = torch.device("cpu")
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
    """What a step is made of. Seconds and bytes of one rank."""

    source: str  # where the figures come from
    tower: dict[int, float]  # seconds of the tower, forward and backward, by local batch
    loss_pair: float  # seconds of a pair of an image row and a text row
    optimizer: float
    loss_fixed: float = 0.0  # seconds of the loss that do not grow with the pairs
    deviation: float  # standard deviation of a rank's compute, as a share of it
    gradient_bytes: int
    exposed_bytes: int  # of these, outside of the blocks
    width: int
    row_bytes: int  # of a text row
    micro_batch: int
    node: Link
    network: Link
    ranks_per_node: int
    overlap: float  # share of a collective's time that computing hides where it can
    loader: float | None = None  # images a second that the loader of one rank brings; None: as many as are asked for
    slowdown: dict[int, float] | None = None  # of compute where that many ranks share a machine
    assumed: tuple[str, ...] = ()  # names of the fields that were not measured

    def link(self, ranks: int) -> Link:
        """Return what the slowest connection of so many ranks is."""
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
    """Seconds of a step, by what they go to."""

    ranks: int
    local_batch: int
    seconds: dict[str, float]

    @property
    def step(self) -> float:
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
    """Predict a step of ``ranks`` ranks with ``local_batch`` images each, as the top of this file has it."""
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
    """Read parts from a JSON object; raises ValueError for what is no such object."""
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
    """Take the parts from lines that `bench.step` printed for ``ours``; links are assumed, deviation is at least."""
    lines = [line for line in read_figures(path) if line.get("candidate") == "ours" and "seconds" in line]
    lines = [line for line in lines if line["case"].get("pictures") is None]  # decoding beside it slows a tower down
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


def sizes(tower: VisionTower, rows: torch.dtype) -> dict[str, Any]:
    """Return what travels, in bytes."""
    everything = sum(parameter.numel() for parameter in tower.parameters())
    in_blocks = sum(parameter.numel() for parameter in tower.blocks.parameters())
    return {
        "gradient_bytes": 4 * everything,
        "exposed_bytes": 4 * (everything - in_blocks),
        "width": tower.embed_dim,
        "row_bytes": tower.embed_dim * rows.itemsize,
    }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is run on the CPU to measure parts and to check predictions."""

    tower: str = "eva02_micro_patch8_32"
    ranks: tuple[int, ...] = (1, 2, 4)
    local_batch: int = 64
    micro_batch: int = 16
    rounds: int = 7
    seed: int = 0


Times = dict[str, list[list[float]]]  # seconds by what was run, round and rank


class Process:
    """One process of the measurement, which is rank r of the first P ones, for every P."""

    def __init__(self, measured: Measured, world: World) -> None:
        self.measured, self.world = measured, world
        torch.set_num_threads(1)
        torch.manual_seed(measured.seed)
        config, b = VISION_CONFIGS[measured.tower], measured.local_batch
        self.images = torch.randint(256, (b, config.image_size, config.image_size, 3), dtype=torch.uint8)
        self.text = F.normalize(torch.randn(b, config.width))
        # Every process takes part in making every group.
        self.groups: dict[int, dist.ProcessGroup] = {
            ranks: dist.new_group(list(range(ranks)))  # type: ignore[misc]
            for ranks in measured.ranks
            if ranks > 1
        }

    def step_of(self, ranks: int, images: int) -> Callable[[], object]:
        """Return a whole step of one of so many ranks, with this many images."""
        measured, autocast = self.measured, autocast_for(CPU, "fp32")
        torch.manual_seed(measured.seed)
        tower = build_vision_tower(measured.tower)
        objective = Objective(
            LossConfig(), texts=images * ranks, width=tower.embed_dim, dtype=text_dtype(CPU), device=CPU
        )
        optimizer = build_optimizer(tower, objective, OptimConfig(steps=1))
        gradients = FlatGradients([*tower.parameters(), *objective.parameters()])
        plan = choose_plan(
            StepConfig(micro_batch=measured.micro_batch, keep="all"),
            tier_costs(tower, autocast),
            local_batch=images,
            memory_bytes=0,  # read for no tier but auto
        )
        compute_gradients = LargeBatchStep(
            tower,
            objective,
            gradients,
            plan,
            masks_duplicates=False,
            world=World(self.world.rank if ranks > 1 else 0, ranks, CPU, self.groups.get(ranks)),
            autocast=autocast,
            seed=measured.seed,
        )
        batch = self.images[:images], self.text[:images], torch.arange(images)

        def step() -> None:
            gradients.zero()
            compute_gradients(0, *batch)
            gradients.clip(1.0)
            optimizer.step()

        return step

    def loss_of(self, images: int) -> Callable[[], object]:
        rows, text = self.text[:images].clone().requires_grad_(), self.text[:images]
        return lambda: contrastive_loss(rows, text, torch.tensor(1 / 0.07)).backward()

    def optimizer_step(self) -> Callable[[], object]:
        tower = build_vision_tower(self.measured.tower)
        gradients = FlatGradients(tower.parameters())
        optimizer = torch.optim.AdamW(tower.parameters(), lr=0.0, fused=True)

        def step() -> None:
            gradients.clip(1.0)
            optimizer.step()

        return step

    def together(self, ranks: int, run: Callable[[], object]) -> list[float]:
        """Run in the first ``ranks`` processes at the same time, the others idle; the seconds of each."""
        self.world.barrier()
        before = time.perf_counter()
        if self.world.rank < ranks:
            run()
        took = torch.tensor([time.perf_counter() - before], dtype=torch.float64)
        everyone = took.new_empty(self.world.world_size)
        dist.all_gather_into_tensor(everyone, took)
        return everyone[:ranks].tolist()

    def measure(self) -> Times:
        """Time the parts and true steps."""
        b, ranks = self.measured.local_batch, self.measured.ranks
        alone = self.step_of(1, b)
        runs: dict[str, tuple[int, Callable[[], object]]] = {
            "half": (1, self.step_of(1, b // 2)),
            "loss": (1, self.loss_of(b)),
            "quarter of loss": (1, self.loss_of(b // 4)),
            "optimizer": (1, self.optimizer_step()),
            **{f"compute {p}": (p, alone) for p in {1, *ranks}},
        }
        if 2 in self.groups:
            few = torch.zeros(64)
            many = torch.zeros(sizes(build_vision_tower(self.measured.tower), text_dtype(CPU))["gradient_bytes"] // 4)
            runs["few bytes"] = (2, partial(dist.all_reduce, few, group=self.groups[2]))
            runs["many bytes"] = (2, partial(dist.all_reduce, many, group=self.groups[2]))
        for p in ranks:
            runs[f"true {p}"] = (p, self.step_of(p, b) if self.world.rank < p else alone)
        times: Times = {name: [] for name in runs}
        # In turns, so that what slows the machine down slows all of them down; the first round is not counted.
        for number in range(1 + self.measured.rounds):
            for name, (p, run) in runs.items():
                took = self.together(p, run)
                if number > 0:
                    times[name].append(took)
        return times


def parts_of_times(times: Times, measured: Measured) -> Parts:
    """Make parts of what the processes measured on one machine."""
    middle = {name: median(mean(ranks) for ranks in rounds) for name, rounds in times.items()}
    b = measured.local_batch
    loss_pair = max(0.0, (middle["loss"] - middle["quarter of loss"]) / (b**2 - (b // 4) ** 2))
    loss_fixed = max(0.0, middle["loss"] - loss_pair * b**2)
    travelling = sizes(build_vision_tower(measured.tower), text_dtype(CPU))
    link = Link(1e-4, 1e9)
    if "many bytes" in middle:
        # Between two ranks an all-reduce is two hops and sends its bytes once.
        more = max(1e-9, middle["many bytes"] - middle["few bytes"])
        link = Link(middle["few bytes"] / 2, travelling["gradient_bytes"] / more)
    most = max(measured.ranks)
    differences = [pstdev(ranks) / mean(ranks) for ranks in times[f"compute {most}"]]

    def tower(name: str, images: int) -> float:
        return max(0.0, middle[name] - middle["optimizer"] - loss_fixed - loss_pair * images**2)

    return Parts(
        source=f"{measured.tower}, measured on {device_name(CPU)}",
        tower={b // 2: tower("half", b // 2), b: tower("compute 1", b)},
        loss_pair=loss_pair,
        loss_fixed=loss_fixed,
        optimizer=middle["optimizer"],
        # A spread of few draws is that of many times √((n-1)/n).
        deviation=0.0 if most == 1 else median(differences) * math.sqrt(most / (most - 1)),
        **travelling,
        micro_batch=measured.micro_batch,
        node=link,
        network=link,
        ranks_per_node=most,
        overlap=0.0,  # computing and copying share the cores
        slowdown={p: middle[f"compute {p}"] / middle["compute 1"] for p in measured.ranks},
        assumed=(*(() if "many bytes" in middle else ("node", "network")), "overlap", "loader"),
    )


def start_processes(measured: Measured, limit: float) -> Times:
    """Run `Process.measure` in as many processes as the most ranks; raises ChildProcessError when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = max(measured.ranks)
    command = [sys.executable, "-c", "from textlock.bench.scaling import run_process; run_process()"]
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TEXTLOCK_MEASURED": json.dumps(asdict(measured)),
    }
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        answer, _ = processes[0].communicate(timeout=limit)
        statuses = [process.wait(timeout=limit) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"{count} processes took longer than {limit:.0f} s") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(statuses):
        raise ChildProcessError(f"processes ended with status {statuses}: their messages are above")
    return json.loads(answer)


def run_process() -> None:
    """Be one of the processes that `start_processes` starts; the first one prints the times."""
    settings = json.loads(os.environ["TEXTLOCK_MEASURED"])
    measured = Measured(**(settings | {"ranks": tuple(settings["ranks"])}))
    world = join_world("cpu")
    try:
        times = Process(measured, world).measure()
        if world.is_main:
            print(json.dumps(times))
    finally:
        world.close()


@dataclass(frozen=True, kw_only=True)
class Options:
    parts: Path | None = None
    """JSON file of measured parts."""
    steps: Path | None = None
    """JSON lines of bench.step, from which parts are taken. With neither, parts are measured on this CPU."""
    loader: float | None = None
    """Images a second that the loader of one rank brings; left out: as many as are asked for."""
    global_batch: int = 65536
    """Images of a step where the global batch is fixed."""
    local_batch: int = 4096
    """Images of one rank where the local batch is fixed."""
    ranks: tuple[int, ...] = RANKS
    """GPUs to predict."""
    check: bool = False
    """Compare with real processes on this CPU."""
    processes: Measured = Measured()
    """What is run where this CPU measures."""
    limit: float = 600.0
    """Seconds that the processes may take."""
    plot: Path | None = None
    """Picture to write, in the format of its name's ending."""
    save_parts: Path | None = None
    """File to write the parts to."""


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
    """Return what a prediction rests on, in sentences: first what was not measured."""
    low, high = min(parts.tower), max(parts.tower)
    return [
        *(f"assumed: {ASSUMPTIONS[name](parts)}" for name in parts.assumed),
        *(f"measured: {say(parts)}" for name, say in ASSUMPTIONS.items() if name not in parts.assumed),
        f"tower measured at {low:,} to {high:,} images; where marked *, the same time an image as at the nearest",
        "gradients and text rows go round all ranks as one; no rank fails, and nothing else uses the network",
    ]


COLUMNS = ("batch", "GPUs", "images of each", "texts GiB", "step ms", "images/s of each", "efficiency %", *COSTS)


def is_measured(parts: Parts, local_batch: int) -> bool:
    return min(parts.tower) <= local_batch <= max(parts.tower)


def regimes(options: Options) -> dict[str, list[tuple[int, int]]]:
    """Return ranks and local batches by what is held fixed."""
    fixed = [(p, options.global_batch // p) for p in options.ranks if options.global_batch % p == 0]
    return {
        f"{options.global_batch:,} in all": fixed,
        f"{options.local_batch:,} each": [(p, options.local_batch) for p in options.ranks],
    }


def draw(regime: str, predictions: list[Prediction], above: Axes, below: Axes, line: str) -> None:
    """Draw a regime: images a second of each GPU, and what its step is made of."""
    ranks = [p.ranks for p in predictions]
    above.plot(ranks, [p.images_per_second for p in predictions], line, marker="o", color="black", label=regime)
    bottom = [0.0] * len(ranks)
    for number, cost in enumerate(COSTS):
        shares = [100 * p.seconds[cost] / p.step for p in predictions]
        places = range(len(ranks))
        below.bar(places, shares, bottom=bottom, color=f"C{number}", label=cost, width=0.8)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    below.set_xticks(range(len(ranks)), [f"{n:,}" for n in ranks], rotation=45)
    below.set_title(f"{regime}: share of the step", fontsize=10)
    below.set_xlabel("GPUs")
    below.set_ylim(0, 100)


def plot_predictions(path: Path, parts: Parts, found: dict[str, list[Prediction]]) -> None:
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    above, *below = figure.subplots(1, 1 + len(found))
    for number, (regime, predictions) in enumerate(found.items()):
        draw(regime, predictions, above, below[number], ("-", "--")[number])
    above.set_xscale("log", base=2)
    ticks = sorted({p.ranks for predictions in found.values() for p in predictions})
    above.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=45)
    above.set_ylim(bottom=0)
    above.set_xlabel("GPUs")
    above.set_title("images/s of each GPU, predicted", fontsize=10)
    above.grid(alpha=0.3)
    above.legend(frameon=False)
    below[0].set_ylabel("%")
    below[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(parts.source, fontsize=10)
    save(figure, path)


def plot_check(path: Path, parts: Parts, found: list[tuple[Prediction, list[float]]]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(found)
    for number, cost in enumerate(COSTS):
        heights = [1e3 * prediction.seconds[cost] for prediction, _ in found]
        if any(heights):
            axes.bar(range(len(found)), heights, bottom=bottom, label=cost, color=f"C{number}", width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, (_, times) in enumerate(found):
        low, middle, high = (1e3 * t for t in quantiles(times, n=4, method="inclusive"))
        error = [[middle - low], [high - middle]]
        label = "true, with quartiles" if place == 0 else None
        axes.errorbar([place], [middle], yerr=error, fmt="o", color="black", capsize=6, label=label)
    axes.set_xticks(range(len(found)), [f"{p.ranks:,}" for p, _ in found])
    axes.set_xlabel("processes")
    axes.set_ylabel("ms a step")
    axes.set_title(f"predicted by parts, and true\n{parts.source}", fontsize=10)
    axes.legend(frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    kind = path.suffix.removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"--plot {path}: choose a name that ends in .png, .svg or .pdf")
    with published_file(path) as file:
        figure.savefig(file, format=kind, dpi=120)


def check(options: Options) -> tuple[Parts, list[dict[str, Any]]]:
    """Predict the steps of real processes from their parts; prints predicted and true."""
    measured = options.processes
    times = start_processes(measured, options.limit)
    parts = parts_of_times(times, measured)
    table = Table(title=f"{parts.source}, {measured.local_batch} images each: whole steps of real processes")
    for column in ("processes", "predicted ms", "true ms", "± %", "predicted / true", *COSTS):
        table.add_column(column, justify="right")
    found, lines = [], []
    for ranks in measured.ranks:
        prediction = predict(parts, ranks, measured.local_batch)
        true = [max(each) for each in times[f"true {ranks}"]]
        low, middle, high = quantiles(true, n=4, method="inclusive")
        found.append((prediction, true))
        lines.append(
            {
                "part": "check",
                "case": {"ranks": ranks, "local_batch": measured.local_batch, "tower": measured.tower},
                "predicted_ms": 1e3 * prediction.step,
                "true_ms": 1e3 * middle,
                "true_quartiles_ms": [1e3 * low, 1e3 * high],
                "ratio": prediction.step / middle,
                "seconds": prediction.seconds,
            }
        )
        table.add_row(
            str(ranks),
            f"{1e3 * prediction.step:.1f}",
            f"{1e3 * middle:.1f}",
            f"{50 * (high - low) / middle:.0f}",
            f"{prediction.step / middle:.2f}",
            *(f"{1e3 * prediction.seconds[cost]:.2f}" for cost in COSTS),
        )
    Console(stderr=True, width=160).print(table)
    if options.plot is not None:
        plot_check(options.plot, parts, found)
    return parts, lines


def forecast(options: Options, parts: Parts) -> list[dict[str, Any]]:
    """Predict both regimes."""
    table = Table(title=f"predicted from {parts.source}; the last columns are % of the step")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    lines: list[dict[str, Any]] = []
    found: dict[str, list[Prediction]] = {}
    for regime, cases in regimes(options).items():
        found[regime] = [predict(parts, ranks, local_batch) for ranks, local_batch in cases]
        for prediction in found[regime]:
            # Against one rank with the same local batch and nobody to wait for.
            alone = predict(parts, 1, prediction.local_batch)
            efficiency = prediction.images_per_second / alone.images_per_second
            lines.append(
                {
                    "part": "forecast",
                    "case": {"ranks": prediction.ranks, "local_batch": prediction.local_batch, "fixed": regime},
                    "step_ms": 1e3 * prediction.step,
                    "images_per_second_of_each": prediction.images_per_second,
                    "efficiency": efficiency,
                    "tower_is_measured": is_measured(parts, prediction.local_batch),
                    "text_bytes": prediction.ranks * prediction.local_batch * parts.row_bytes,
                    "seconds": prediction.seconds,
                }
            )
            table.add_row(
                regime,
                f"{prediction.ranks:,}",
                f"{prediction.local_batch:,}{'' if is_measured(parts, prediction.local_batch) else '*'}",
                f"{prediction.ranks * prediction.local_batch * parts.row_bytes / 2**30:.2f}",
                f"{1e3 * prediction.step:.1f}",
                f"{prediction.images_per_second:,.4g}",
                f"{100 * efficiency:.1f}",
                *(f"{100 * prediction.seconds[cost] / prediction.step:.1f}" for cost in COSTS),
            )
    Console(stderr=True, width=190).print(table)
    if options.plot is not None:
        plot_predictions(options.plot, parts, found)
    return lines


def main(options: Options) -> None:
    measured = options.processes
    if options.parts is not None and options.steps is not None:
        raise ValueError("give --parts or --steps, not both")
    if options.check and (options.parts is not None or options.steps is not None):
        raise ValueError("--check measures its parts itself; leave out --parts and --steps")
    if min(options.global_batch, options.local_batch, *options.ranks, measured.rounds - 1, *measured.ranks) <= 0:
        raise ValueError("batches and ranks must be positive, and rounds at least two")
    if measured.tower not in VISION_CONFIGS:
        raise ValueError(f"vision tower {measured.tower!r} is unknown: choose from {', '.join(VISION_CONFIGS)}")
    if measured.local_batch % 4:
        raise ValueError(f"the processes' local batch {measured.local_batch} is no multiple of 4")
    if options.check:
        parts, lines = check(options)
    else:
        if options.parts is not None:
            parts = read_parts(options.parts)
        elif options.steps is not None:
            parts = parts_of_steps(options.steps, options.loader)
        else:
            parts = parts_of_times(start_processes(measured, options.limit), measured)
        if options.loader is not None:
            parts = replace(parts, loader=options.loader)
        lines = forecast(options, parts)
    for sentence in assumptions(parts):
        print(sentence, file=sys.stderr)
    made_with = {"parts": asdict(parts), "versions": versions(), "commit": commit()}
    for line in lines:
        print(json.dumps(line | made_with), flush=True)
    if options.save_parts is not None:
        publish_text(options.save_parts, json.dumps(asdict(parts), indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
