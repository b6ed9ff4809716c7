"""Compares the predictions of `textlock.bench.scaling` with whole steps of real processes on this CPU.

    python -m textlock.bench.scaling_check                               # 1, 2 and 4 gloo processes
    python -m textlock.bench.scaling_check --save-parts parts.json       # what scaling --parts predicts from

Processes measure the parts of a step and then whole steps of 1, 2 and 4 ranks: compute alone and how far it slows down
where processes share cores, latency and bandwidth between two of them. Nothing of the true steps enters the prediction.
One JSON line a number of processes on stdout, a table on stderr.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, pstdev, quantiles

import torch
import torch.distributed as dist
import torch.nn.functional as F

from textlock.bench.entry import CPU, Benchmark, Column, Line, Session, require_known, require_positive
from textlock.bench.scaling import COSTS, Link, Parts, assumptions, predict, sizes
from textlock.data.atomic import write_text_atomically
from textlock.engine.distributed import World, join_world
from textlock.engine.objective import LossConfig, Objective
from textlock.engine.optim import FlatGradients, OptimConfig, build_optimizer
from textlock.engine.plan import StepConfig, choose_plan, tier_costs
from textlock.engine.provenance import device_name
from textlock.engine.step import LargeBatchStep, autocast_for, text_dtype
from textlock.kernels.contrastive import contrastive_loss
from textlock.models.vision import VISION_CONFIGS, build_vision_tower

# The options that the processes are given.
MEASURED = ("tower", "ranks", "local_batch", "micro_batch", "rounds", "seed")


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of the command."""

    tower: str = "eva02_micro_patch8_32"
    """Name of the image tower."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes whose steps are timed."""
    local_batch: int = 64
    """Images of one process, a multiple of 4."""
    micro_batch: int = 16
    """Images of one forward pass."""
    rounds: int = 7
    """Times that everything is run."""
    seed: int = 0
    """Of weights and data."""
    limit: float = 600.0
    """Seconds that the processes may take."""
    save_parts: Path | None = None
    """File to write the parts to, for `textlock.bench.scaling --parts`."""


Times = dict[str, list[list[float]]]  # seconds by what was run, round and rank


class Process:
    """One process of the measurement, which is rank r of the first P ones, for every P."""

    def __init__(self, measured: CheckOptions, world: World) -> None:
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
        """Return the loss and its gradient alone, on one rank."""
        embeddings, text = self.text[:images].clone().requires_grad_(), self.text[:images]
        return lambda: contrastive_loss(embeddings, text, torch.tensor(1 / 0.07)).backward()

    def optimizer_step(self) -> Callable[[], object]:
        """Return clipping and AdamW alone."""
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


def parts_of_times(times: Times, measured: CheckOptions) -> Parts:
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


def start_processes(measured: CheckOptions) -> Times:
    """Run `Process.measure` in as many processes as the most ranks; raises ChildProcessError when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = max(measured.ranks)
    command = [sys.executable, "-c", "from textlock.bench.scaling_check import run_process; run_process()"]
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TEXTLOCK_MEASURED": json.dumps({name: getattr(measured, name) for name in MEASURED}),
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
        answer, _ = processes[0].communicate(timeout=measured.limit)
        statuses = [process.wait(timeout=measured.limit) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"{count} processes took longer than {measured.limit:.0f} s") from error
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
    measured = CheckOptions(**(settings | {"ranks": tuple(settings["ranks"])}))
    world = join_world("cpu")
    try:
        times = Process(measured, world).measure()
        if world.is_main:
            print(json.dumps(times))
    finally:
        world.close()


def lines(options: CheckOptions, session: Session) -> Iterator[Line]:
    """Predict the steps of real processes from their parts, and report the measured ones next to them."""
    times = start_processes(options)
    parts = parts_of_times(times, options)
    session.notes += [f"whole steps of real processes: {parts.source}, {options.local_batch} images each"]
    session.notes += assumptions(parts)
    for ranks in options.ranks:
        prediction = predict(parts, ranks, options.local_batch)
        true = [max(each) for each in times[f"true {ranks}"]]
        low, middle, high = quantiles(true, n=4, method="inclusive")
        outcome = {
            "predicted_ms": 1e3 * prediction.step,
            "true_ms": 1e3 * middle,
            "true_quartiles_ms": [1e3 * low, 1e3 * high],
            "ratio": prediction.step / middle,
            "seconds": prediction.seconds,
            "parts": asdict(parts),
        }
        case = {"ranks": ranks, "local_batch": options.local_batch, "tower": options.tower}
        yield Line("check", "step", case, "ours", outcome, (str(ranks),))
    if options.save_parts is not None:
        write_text_atomically(options.save_parts, json.dumps(asdict(parts), indent=1) + "\n")


def check(options: CheckOptions) -> None:
    """Raise ValueError for what cannot be."""
    require_positive(options, "ranks", "local_batch", "micro_batch", "limit")
    require_known("tower", [options.tower], VISION_CONFIGS)
    if options.rounds < 2:
        raise ValueError(f"--rounds is {options.rounds}, must be at least 2")
    if options.local_batch % 4:
        raise ValueError(f"--local-batch {options.local_batch} is no multiple of 4")


def milliseconds_of(cost: str) -> Column:
    """Return the column of a cost."""
    return Column(cost, lambda outcome: 1e3 * outcome["seconds"][cost], ".2f")


BENCHMARK = Benchmark(
    about=__doc__,
    options=CheckOptions,
    check=check,
    lines=lines,
    before=("processes",),
    columns=(
        *(Column("predicted ms", "predicted_ms", ".1f"), Column("true ms", "true_ms", ".1f")),
        Column("± %", lambda o: 50 * (o["true_quartiles_ms"][1] - o["true_quartiles_ms"][0]) / o["true_ms"], ".0f"),
        Column("predicted / true", "ratio", ".2f"),
        *map(milliseconds_of, COSTS),
    ),
)

if __name__ == "__main__":
    BENCHMARK.command()
