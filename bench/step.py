"""Whole training steps: images a second, memory and where the time goes, beside the loops of other projects.

    python -m textlock.bench.step                                                # the sizes that fit this device
    python -m textlock.bench.step --local-batches 4096 --only ours gradcache_fused
    python -m textlock.bench.step --shards data/train --local-batches 1024       # with the loader's decoding
    python -m textlock.bench.step --only ours --pictures 256 512                 # the same from JPEGs that it draws
    python -m textlock.bench.step --only ours --profile trace.json.gz            # and where a step's time goes

A step is what train.py does: a batch on its way to the device, the tower forward and backward, the loss over all texts,
the reduction, clipping and AdamW. Text rows are stored ones. The optimiser and the logit scale are part of it.

One process stands for the first of `texts / local batch` ranks. The text rows of all ranks lie on the device; the other
ranks' images are random unit rows, whose column sums are computed beforehand and added where `contrastive_loss` would
all-reduce them. So its work, memory and numbers are those of one rank of many. Collectives run in a group of this one
process: `gather` is the copy of the own rows among those of all, `reduction` what such a group takes. No wire is timed;
`python -m textlock.bench.scaling` puts it in.

Peers, all with the same weights, data, optimiser and clipping, on the fused blocks, torch's own (`eager`) or these
under torch.compile:

| gradcache   | every image forward twice, one loss, ours (https://arxiv.org/abs/2101.06983)                           |
| open_clip   | its training loop with accum_freq: forward twice, its loss once for every micro-batch                  |
| checkpoints | as the released code: the local batch at once, every block run again, dense logits in both directions  |

Ours is measured first. Before a candidate is timed, its weight gradients of a small batch are compared with a dense
step in float64; one that is wrong has no figures. On one rank all must agree. As one of two ranks, `open_clip` and
`checkpoints` leave to the other rank, which is not there, the part of the gradient that a reduce-scatter would bring,
and are compared with that share. `open_clip` adds the gradient of its logit scale once for every micro-batch, which is
not compared. Medians of steps; parts are the times between events on the device's stream. One JSON line a figure on
stdout, a table on stderr; exit status 1 if ours is wrong or fails.

The floor of a step is the operations of the tower, forward and backward with nothing made again, and the two matrix
products of the loss, over the rate of large products (`textlock.bench.ceilings`). The data, what is done to it between
the products and the optimiser come on top, so no step gets there.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor

from textlock.bench import comparison, profile
from textlock.bench import contrastive as losses
from textlock.bench.block_tower import flat, jitter
from textlock.bench.ceilings import Ceilings, ceilings_for
from textlock.bench.comparison import PEAK_RATES, name_of
from textlock.bench.figures import Outcome, Report, cell, has_figures, outcome_of, timing_cells
from textlock.bench.loader import write_shards
from textlock.bench.measure import (
    LEAST_RUNS,
    Spread,
    Wrong,
    check_compiler,
    device_of_this_machine,
    peak_bytes,
    relative_error,
)
from textlock.data.loader import Batch, DataConfig, Loader, open_loader
from textlock.engine.distributed import World
from textlock.engine.feed import Feed
from textlock.engine.objective import LossConfig, Objective
from textlock.engine.optim import FlatGradients, OptimConfig, build_optimizer
from textlock.engine.plan import Plan, StepConfig, available_bytes, choose_plan, fixed_bytes, tier_costs
from textlock.engine.provenance import device_name
from textlock.engine.step import LargeBatchStep, autocast_for, image_rows, text_dtype
from textlock.models.block import ComputeCopies, Implementation, compute_dtype
from textlock.models.text import TextTower
from textlock.models.vision import VISION_CONFIGS, VisionTower, build_vision_tower

Part = Literal["tower", "loss", "gather", "reduction", "optimizer", "data_wait"]
PARTS: tuple[Part, ...] = ("tower", "loss", "gather", "reduction", "optimizer", "data_wait")

# Relative error of the weight gradients against float64 that still counts as right, by the type of the products.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
COMPARED_IMAGES = 8  # of one rank, in two micro-batches
COMPARED_RANKS = (1, 2)
# Images that differ. A local batch is made of copies: 65,536 of its own would take minutes to draw and 10 GB of pinned
# memory, and neither the time nor the memory of a step depends on them. Their text rows all differ.
DISTINCT_IMAGES = 1024
SECONDS_OF_CEILINGS = 1.0  # on each, where they are not read from a file

LOCAL_BATCHES = {"cpu": (16, 32), "cuda": (1024, 2048, 4096, 65536)}
TEXTS = {"cpu": 128, "cuda": 65536}
MICRO_BATCH = {"cpu": 8, "cuda": 512}
TOWERS = {"cpu": "eva02_micro_patch8_32", "cuda": "eva02_base_patch16_224"}


@dataclass(frozen=True, kw_only=True)
class Options:
    tower: str | None = None
    """Name of the image tower; left out: one that fits the device, like all sizes below."""
    local_batches: tuple[int, ...] = ()
    """Images of one rank in a step."""
    texts: int | None = None
    """Text rows of the global batch, a multiple of every local batch."""
    micro_batch: int | None = None
    """Images of one forward pass."""
    only: tuple[str, ...] = ()
    """Names of candidates as in the table; left out: all."""
    memory_gib: float | None = None
    """Memory for the activations of ours in GiB; left out: what the device has."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the tower: bf16 on a GPU, fp32 on a CPU."""
    shards: str | None = None
    """Training shards to decode images from; left out: images that are decoded already."""
    pictures: tuple[int, ...] = ()
    """Short sides of JPEGs to draw and pack; ours is measured again with each, decoding, at the first local batch."""
    workers: int = 8
    """Decoding threads."""
    profile: Path | None = None
    """File for a Chrome trace (.json.gz) of a step of ours at the first local batch, whose kernels are listed; left
    out: none."""
    seconds: float = 10.0
    """Time spent on each figure, at least three steps."""
    limit: float = 300.0
    """Seconds after which nothing more is started, and what is running is given up."""
    ceilings: Path | None = None
    """What `textlock.bench.ceilings` printed on this device; left out: measured first."""
    seed: int = 0
    """Of weights and data."""


class Clock:
    """Tells how long each part of a step took, on a GPU by events, which nothing waits for while it runs."""

    def __init__(self, device: torch.device, before: "Clock | None" = None) -> None:
        """Start now, or where the clock of the step before ended."""
        self._on_gpu = device.type == "cuda"
        self._parts: list[Part] = []
        self._marks: list[Any] = [self._now() if before is None else before._marks[-1]]

    def mark(self, part: Part) -> None:
        """Say that what was queued since the mark before was ``part``."""
        self._parts.append(part)
        self._marks.append(self._now())

    def wait(self) -> None:
        """Wait for the last mark."""
        if self._on_gpu:
            self._marks[-1].synchronize()

    def seconds(self) -> dict[Part, float]:
        """Return the seconds of each part, after `wait`."""
        found = dict.fromkeys(PARTS, 0.0)
        for part, before, after in zip(self._parts, self._marks, self._marks[1:], strict=False):
            found[part] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Setting:
    """Everything but the local batch that decides what is measured."""

    tower: str
    device: torch.device
    texts: int
    micro_batch: int
    precision: Literal["auto", "bf16", "fp32"]
    memory_gib: float | None
    seed: int

    def autocast(self) -> torch.autocast:
        return autocast_for(self.device, self.precision)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the products."""
        with self.autocast():
            return compute_dtype(torch.empty(0, device=self.device))

    def build(self, block: Implementation) -> VisionTower:
        """Build the tower: the same weights whatever the blocks."""
        with torch.device("meta"):
            tower = build_vision_tower(self.tower, block=block)
        tower.to_empty(device=self.device)
        tower.load_state_dict(weights(self.tower, self.seed))
        return tower

    def case(self, local_batch: int, texts: int) -> losses.Case:
        """Draw the text rows of all ranks and the image rows of the others."""
        width = VISION_CONFIGS[self.tower].width
        return losses.make_case(local_batch, texts // local_batch, width, 1 / 0.07, self.seed, self.device)


@cache
def weights(name: str, seed: int) -> dict[str, Tensor]:
    """Draw the weights of a tower."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        tower = build_vision_tower(name)
    jitter(tower, torch.Generator().manual_seed(seed))
    return tower.state_dict()


@lru_cache(2)  # those that are measured, and those that are compared
def draw_images(setting: Setting, count: int) -> Tensor:
    """Draw uint8 images [count, S, S, 3] on the CPU: noise on colours that differ, so that their rows do too."""
    side = VISION_CONFIGS[setting.tower].image_size
    generator = torch.Generator().manual_seed(setting.seed)
    images = torch.empty(count, side, side, 3, dtype=torch.uint8, pin_memory=setting.device.type == "cuda")
    for some in images.split(256):
        colours = torch.randint(256, (len(some), 4, 4, 3), dtype=torch.uint8, generator=generator)
        some.copy_(colours.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2))
        some.bitwise_xor_(torch.randint(64, some.shape, dtype=torch.uint8, generator=generator))
    return images


class OneOfManyObjective(Objective):
    """The loss of the first rank of many, in a group of one, with what the others would send."""

    def __init__(self, case: losses.Case, clock: Callable[[], Clock]) -> None:
        config, dtype = LossConfig(), text_dtype(case.text.device)
        super().__init__(config, texts=case.B, width=case.d, dtype=dtype, device=case.text.device)
        self._clock = clock
        self._everyone = case.text.to(dtype)
        self._sent = losses.other_ranks(case, config.mode) if case.world > 1 else None

    def candidates(self, step: int, rows: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the text rows of all ranks."""
        self._clock().mark("tower")
        self._everyone[: len(rows)].copy_(rows)
        self._clock().mark("gather")
        return self._everyone, None

    def of_batch(
        self, images: Tensor, texts: Tensor, ids: Tensor | None, *, first_row: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        """Return the loss of the global batch, with the column sums of the other ranks."""
        sent = self._sent
        with nullcontext() if sent is None else losses.collectives(lambda message: message.add_(sent)):
            loss = super().of_batch(images, texts, ids, first_row=first_row, group=None if sent is None else group)
        self._clock().mark("loss")
        return loss


class TimedGradients(FlatGradients):
    """Gradients whose reduction is timed."""

    clock: Callable[[], Clock]

    def finish_reduction(self, group: dist.ProcessGroup | None) -> None:
        self.clock().mark("tower")
        super().finish_reduction(group)
        self.clock().mark("reduction")


class Rank:
    """One rank of many: a tower, its objective, gradients and optimiser."""

    def __init__(self, setting: Setting, block: Implementation, case: losses.Case) -> None:
        self.setting, self.case = setting, case
        self.autocast = setting.autocast()
        self.clock = Clock(setting.device)
        self.tower = setting.build(block)
        self.objective = OneOfManyObjective(case, lambda: self.clock)
        self.optimizer = build_optimizer(self.tower, self.objective, OptimConfig(steps=1))
        self.gradients = TimedGradients([*self.tower.parameters(), *self.objective.parameters()])
        self.gradients.clock = lambda: self.clock
        self.micro_batch = min(setting.micro_batch, case.b)
        self.copies: AbstractContextManager[None] = nullcontext()  # in which a loop other than ours runs
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-6

    def rows(self, images: Tensor) -> Tensor:
        return image_rows(self.tower, images, self.autocast)

    def micro_batches(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.images.split(self.micro_batch)


Loop = Callable[[Rank, Batch], object]  # adds to the gradients of a rank


def gradcache(rank: Rank, batch: Batch) -> None:
    """Add the gradients as GradCache does, with our loss."""
    with rank.copies:
        with torch.no_grad():
            rows = torch.cat([rank.rows(images) for images in rank.micro_batches(batch)])
        rows.requires_grad_()
        texts, ids = rank.objective.candidates(0, batch.text, None)
        rank.objective.of_batch(rows, texts, ids, first_row=0, group=dist.group.WORLD).backward()
        assert rows.grad is not None
        for images, gradient in zip(rank.micro_batches(batch), rows.grad.split(rank.micro_batch), strict=True):
            rank.rows(images).backward(gradient)


def open_clip_loop(clip_loss: losses.Loss, rank: Rank, batch: Batch) -> None:
    """Add the gradients as open_clip's training loop does."""
    micro_batches = rank.micro_batches(batch)
    features: list[Tensor] = []
    with rank.copies:
        if len(micro_batches) > 1:
            with torch.no_grad():
                features = [rank.rows(images) for images in micro_batches]
        for number, images in enumerate(micro_batches):
            rows = rank.rows(images)
            leaf = rows.detach().requires_grad_()
            rank.clock.mark("tower")
            everyone = torch.cat([*features[:number], leaf, *features[number + 1 :]])
            clip_loss(everyone, rank.objective.logit_scale(), rank.case.bias).backward()
            rank.clock.mark("loss")
            rows.backward(leaf.grad)


def checkpoints(rank: Rank, batch: Batch) -> None:
    """Add the gradients as the released code does."""
    with rank.copies:
        rows = image_rows(rank.tower, batch.images, rank.autocast, "block")
        leaf = rows.detach().requires_grad_()
        rank.clock.mark("tower")
        dense_loss(rank, leaf).backward()
        rank.clock.mark("loss")
        rows.backward(leaf.grad)


def dense_loss(rank: Rank, rows: Tensor) -> Tensor:
    """Return the own rows' half and own texts' half of the loss, from whole logits."""
    case, scale = rank.case, rank.objective.logit_scale()
    labels = torch.arange(case.b, device=rows.device)
    with rank.autocast:
        by_image = scale * rows @ case.text.T
        by_text = scale * case.text[: case.b] @ torch.cat([rows, case.images[case.b :]]).T
    return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2


@dataclass(frozen=True)
class Candidate:
    """A training loop on one kind of blocks."""

    block: Implementation
    loop: Literal["ours", "gradcache", "open_clip", "checkpoints"]

    def prepare(self, setting: Setting, case: losses.Case) -> "Prepared":
        """Allocate everything; raises Unavailable."""
        if self.block == "compile":
            check_compiler(setting.device)
            torch.compiler.reset()
        clip_loss = losses.open_clip(case, compiled=False).loss if self.loop == "open_clip" else None
        rank = Rank(setting, self.block, case)
        if self.loop == "ours":
            plan = plan_of(rank)
            return Prepared(rank, our_loop(rank, plan), plan)
        if self.block == "fused":
            rank.copies = ComputeCopies(rank.tower, setting.dtype)
        if clip_loss is not None:
            return Prepared(rank, partial(open_clip_loop, clip_loss), None)
        return Prepared(rank, gradcache if self.loop == "gradcache" else checkpoints, None)


CANDIDATES = {
    "ours": Candidate("fused", "ours"),
    "gradcache_fused": Candidate("fused", "gradcache"),
    "gradcache_eager": Candidate("plain", "gradcache"),
    "gradcache_compiled": Candidate("compile", "gradcache"),
    "open_clip_fused": Candidate("fused", "open_clip"),
    "open_clip_eager": Candidate("plain", "open_clip"),
    "open_clip_compiled": Candidate("compile", "open_clip"),
    "checkpoints_eager": Candidate("plain", "checkpoints"),
    "checkpoints_compiled": Candidate("compile", "checkpoints"),
}


def plan_of(rank: Rank) -> Plan:
    setting, tower = rank.setting, rank.tower
    beside = fixed_bytes(tower, rank.autocast, local_batch=rank.case.b, global_batch=rank.case.B)
    return choose_plan(
        StepConfig(micro_batch=rank.micro_batch),
        tier_costs(tower, rank.autocast),
        local_batch=rank.case.b,
        memory_bytes=available_bytes(setting.device, setting.memory_gib, fixed_bytes=beside),
    )


def our_loop(rank: Rank, plan: Plan) -> Loop:
    step = LargeBatchStep(
        rank.tower,
        rank.objective,
        rank.gradients,
        plan,
        masks_duplicates=False,
        world=World(0, 1, rank.setting.device, dist.group.WORLD),
        autocast=rank.autocast,
        seed=rank.setting.seed,
    )
    return lambda _, batch: step(0, batch.images, batch.text, batch.ids)


@dataclass(frozen=True)
class Prepared:
    """A candidate that is ready to run."""

    rank: Rank
    add_gradients: Loop
    plan: Plan | None

    def step(self, feed: Iterator[Batch], before: Clock | None = None) -> Clock:
        """Queue one whole step, timed from the end of the one before."""
        rank = self.rank
        clock = rank.clock = Clock(rank.setting.device, before)
        batch = next(feed)
        clock.mark("data_wait")
        rank.gradients.zero()
        self.add_gradients(rank, batch)
        if self.plan is None:  # ours does it itself, while it goes backward
            rank.gradients.finish_reduction(dist.group.WORLD)
        rank.gradients.clip(1.0)
        rank.optimizer.step()
        clock.mark("optimizer")
        return clock

    def weight_gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Return the gradients of the tower for one batch."""
        self.rank.gradients.zero()
        self.add_gradients(self.rank, batch)
        return {name: cast(Tensor, weight.grad).clone() for name, weight in self.rank.tower.named_parameters()}


def batch_of(images: Tensor, text: Tensor) -> Batch:
    """Make a batch of images and stored text rows, as a loader hands it out."""
    return Batch(
        images=images,
        captions=[],
        text_embeddings=text,
        ids=torch.arange(len(text), device=text.device),
        keys=[],
        epoch=0,
        position=len(text),
        skipped_by_kind={},
    )


@contextlib.contextmanager
def batches(setting: Setting, case: losses.Case, shards: str | None, workers: int) -> Iterator[Iterator[Batch]]:
    """Bring batches to the device as in training, from shards or from memory."""
    device, text = setting.device, case.text[: case.b].cpu()
    text = text.pin_memory() if device.type == "cuda" else text

    def repeated(images: Tensor) -> Tensor:
        batch = torch.empty(case.b, *images.shape[1:], dtype=torch.uint8, device=device)
        for part in batch.split(len(images)):
            part.copy_(images[: len(part)], non_blocking=True)
        return batch

    def decoded_before() -> Iterator[Batch]:
        images = draw_images(setting, min(case.b, DISTINCT_IMAGES))
        while True:
            yield batch_of(repeated(images), text.to(device, non_blocking=True))

    def decoded_now(loader: Loader) -> Iterator[Batch]:
        for batch in loader:
            yield replace(batch, text_embeddings=text.to(device, non_blocking=True))

    with contextlib.ExitStack() as open_ones:
        source = decoded_before()
        if shards is not None:
            side = VISION_CONFIGS[setting.tower].image_size
            config = DataConfig(shards=shards, batch_size=case.b, image_size=side, workers=workers)
            loader = open_loader(config, rank=0, world_size=1, device=device)
            open_ones.callback(loader.close)
            source = decoded_now(loader)
        yield Feed(cast(Loader, source), cast(TextTower, None), device)


def write_pictures(folder: str, short_side: int, count: int) -> dict[str, Any]:
    """Write shards of JPEGs as large as photos, one batch of ``count`` an epoch; return what is told of them."""
    shards = write_shards(Path(folder), count, short_side * 5 // 4, short_side, bad=0.0)
    return {"kilobytes_a_picture": round(mean(map(len, shards.pictures.values())) / 1e3, 1)}


def compared(setting: Setting, ranks: int) -> tuple[losses.Case, Batch]:
    """Return a small batch of one of so many ranks."""
    case = setting.case(COMPARED_IMAGES, COMPARED_IMAGES * ranks)
    batch = batch_of(draw_images(setting, case.b).to(setting.device), case.text[: case.b])
    return case, replace(batch, text_embeddings=case.text[: case.b])


@cache
def true_gradients(setting: Setting, ranks: int, *, whole: bool) -> Tensor:
    """Return the weight gradients of the compared batch: one dense step of torch's own blocks in float64.

    Of the loss of the global batch, or (not ``whole``) of what a rank differentiates that exchanges the rest. They are
    kept on the host, so that a candidate has the device to itself.
    """
    case, batch = compared(setting, ranks)
    tower, exact = setting.build("plain").double(), case.double()
    rows = F.normalize(tower(batch.images), dim=-1)
    everyone = torch.cat([rows, exact.images[case.b :]])
    texts, labels = exact.text, torch.arange(case.B, device=setting.device)
    own = slice(None) if whole else slice(case.b)
    by_image = F.cross_entropy(exact.scale * everyone[own] @ texts.T, labels[own])
    by_text = F.cross_entropy(exact.scale * texts[own] @ everyone.T, labels[own])
    ((by_image + by_text) / 2).backward()
    return flat({name: cast(Tensor, weight.grad) for name, weight in tower.named_parameters()}).cpu()


def check(name: str, setting: Setting) -> dict[str, float]:
    """Return the errors of a candidate's weight gradients; raises Unavailable, or Wrong."""
    errors = {}
    for ranks in COMPARED_RANKS:
        case, batch = compared(setting, ranks)
        small = replace(setting, micro_batch=COMPARED_IMAGES // 2)
        found = CANDIDATES[name].prepare(small, case).weight_gradients(batch)
        whole = ranks == 1 or CANDIDATES[name].loop in ("ours", "gradcache")
        truth = true_gradients(setting, ranks, whole=whole).to(setting.device)
        errors[f"weight_grads_of_{ranks}"] = relative_error(flat(found), truth)
    if not all(error <= TOLERANCE[setting.dtype] for error in errors.values()):  # nan is wrong too
        raise Wrong(name, errors)
    return errors


def measure(
    name: str, setting: Setting, local_batch: int, shards: str | None, options: Options, ceilings: Ceilings
) -> dict[str, Any]:
    """Time whole steps of one candidate; nothing else is alive beside it."""
    device, case = setting.device, setting.case(local_batch, setting.texts)
    prepared = CANDIDATES[name].prepare(setting, case)
    with batches(setting, case, shards, options.workers) as feed:
        prepared.step(feed).wait()
        peak = peak_bytes(lambda: prepared.step(feed).wait(), device)
        reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
        allocated = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        parts = timed(partial(prepared.step, feed), options.seconds)
    spread = Spread.of([sum(step.values()) for step in parts])
    middle = {part: median(step[part] for step in parts) for part in PARTS}
    rate = case.b / spread.median
    peak_rate = PEAK_RATES.get(device_name(device))
    operations = VISION_CONFIGS[setting.tower].training_flops()
    floor = floor_of(setting, case, ceilings)
    beside_floor = {} if floor is None else {"floor_ms": floor * 1e3, "percent_of_floor": 100 * floor / spread.median}
    found = spread.published() | beside_floor
    found |= {
        "images_per_second": rate,
        "mfu_percent": None if peak_rate is None else 100 * rate * operations / peak_rate,
        "shares": {part: seconds / sum(middle.values()) for part, seconds in middle.items()},
        "seconds": middle,
        "peak_bytes": peak,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
    }
    if prepared.plan is not None:
        found["plan"] = str(prepared.plan)
        found["predicted_extra_time"] = prepared.plan.extra_time
        found["predicted_activation_bytes"] = prepared.plan.activation_bytes
    return found


def floor_of(setting: Setting, case: losses.Case, ceilings: Ceilings) -> float | None:
    """Return the seconds below which no step gets, or None where products of this type have no ceiling."""
    if setting.dtype not in ceilings.matrix_rate:
        return None
    operations = case.b * VISION_CONFIGS[setting.tower].training_flops() + 4 * case.b * case.B * case.d
    return ceilings.floor(setting.dtype, operations=operations)


def profiled(
    setting: Setting, local_batch: int, path: Path, options: Options, ceilings: Ceilings
) -> dict[str, dict[str, Any]]:
    """Return the figures of the largest kernels of one step of ours, and write its trace."""
    case = setting.case(local_batch, setting.texts)
    prepared = CANDIDATES["ours"].prepare(setting, case)
    micro_batch = prepared.rank.micro_batch
    shapes = comparison.Setting(
        setting.tower, VISION_CONFIGS[setting.tower], micro_batch, setting.device, setting.dtype, setting.seed
    )
    with batches(setting, case, options.shards, options.workers) as feed:
        prepared.step(feed).wait()
        recorded = profile.record(lambda: prepared.step(feed), setting.device)
    profile.write_trace(recorded, path)
    return profile.largest(profile.activities(recorded, shapes, ceilings))


def timed(step: Callable[[Clock | None], Clock], seconds: float) -> list[dict[Part, float]]:
    """Return the parts of steps that run for about this time; the host has one step queued ahead, as in training."""
    clocks = [step(None)]
    end = time.perf_counter() + seconds
    while len(clocks) < LEAST_RUNS or time.perf_counter() < end:
        clocks.append(step(clocks[-1]))
        clocks[-2].wait()
    clocks[-1].wait()
    return [clock.seconds() for clock in clocks]


@contextlib.contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """Make the group of this process, which stands for that of all ranks."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def setting_of(options: Options, device: torch.device) -> Setting:
    """Fill in what was left out; raises ValueError for what cannot be."""
    kind = device.type
    setting = Setting(
        options.tower or TOWERS[kind],
        device,
        options.texts or TEXTS[kind],
        options.micro_batch or MICRO_BATCH[kind],
        options.precision,
        options.memory_gib,
        options.seed,
    )
    if setting.tower not in VISION_CONFIGS:
        raise ValueError(f"vision tower {setting.tower!r} is unknown: choose from {', '.join(VISION_CONFIGS)}")
    sizes = (setting.texts, setting.micro_batch, *options.local_batches, *options.pictures)
    if min(*sizes, options.seconds, options.limit) <= 0:
        raise ValueError("local batches, texts, micro-batch, pictures, seconds and limit must be positive")
    for local_batch in options.local_batches or LOCAL_BATCHES[kind]:
        if setting.texts % local_batch:
            raise ValueError(f"{setting.texts} texts are no multiple of the local batch {local_batch}")
        if local_batch % min(setting.micro_batch, local_batch):
            raise ValueError(f"the micro-batch {setting.micro_batch} does not divide the local batch {local_batch}")
    if unknown := set(options.only) - CANDIDATES.keys():
        raise ValueError(f"no candidate is named {', '.join(sorted(unknown))}; choose from {', '.join(CANDIDATES)}")
    if (options.pictures or options.profile) and options.only and "ours" not in options.only:
        raise ValueError("--pictures and --profile are of ours, which --only leaves out")
    return setting


def main(options: Options) -> None:
    device = device_of_this_machine()
    setting = setting_of(options, device)
    end = time.monotonic() + options.limit
    names = [name for name in CANDIDATES if not options.only or name in options.only]
    local_batches = options.local_batches or LOCAL_BATCHES[device.type]
    ceilings = ceilings_for(options.ceilings, device, min(options.seconds, SECONDS_OF_CEILINGS))
    title = f"{setting.tower}, {setting.texts:,} texts, {name_of(setting.dtype)}"
    report = Report(device, COLUMNS, cells, title=title)

    def in_time(work: Callable[[], Outcome]) -> Outcome:
        return outcome_of(work, device, end - time.monotonic())

    def add(name: str, errors: Outcome, local_batch: int, shards: str | None, pictures: dict[str, Any]) -> None:
        outcome = errors
        if has_figures(errors):
            work = partial(measure, name, setting, local_batch, shards, options, ceilings)
            outcome = in_time(work) | {"errors": errors}
        side = pictures["pictures"]
        case = f"{local_batch:,} images" if side is None else f"{local_batch:,} JPEGs of {side}"
        report.add("step", "step", shape_of(setting, local_batch) | pictures, name, outcome, "step", case)

    def add_pictures(errors: Outcome, side: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            drawn = in_time(partial(write_pictures, folder, side, local_batches[0]))
            if has_figures(drawn):
                add("ours", errors, local_batches[0], folder, {"pictures": side} | drawn)
            else:
                add("ours", drawn, local_batches[0], folder, {"pictures": side})

    with contextlib.ExitStack() as open_ones:
        open_ones.callback(report.close)
        open_ones.enter_context(group_of_one(device))
        for name in names:
            # Not all of them beforehand: that would take the time in which ours is measured.
            errors = in_time(partial(check, name, setting))
            for local_batch in local_batches:
                add(name, errors, local_batch, options.shards, {"pictures": None})
            if name == "ours" and has_figures(errors):
                for side in options.pictures:
                    add_pictures(errors, side)
                if options.profile is not None:
                    work = partial(profiled, setting, local_batches[0], options.profile, options, ceilings)
                    of_kernels = profile.report(device)
                    open_ones.callback(of_kernels.close)
                    profile.add_lines(
                        of_kernels, shape_of(setting, local_batches[0]) | {"pictures": None}, in_time(work)
                    )


def shape_of(setting: Setting, local_batch: int) -> dict[str, Any]:
    return {
        "tower": setting.tower,
        "local_batch": local_batch,
        "texts": setting.texts,
        "ranks": setting.texts // local_batch,
        "micro_batch": min(setting.micro_batch, local_batch),
        "dtype": name_of(setting.dtype),
    }


COLUMNS = (
    *("operation", "case", "candidate", "ms", "± %", "% floor", "images/s", "MFU %", "peak MiB"),
    *("% tower", "loss", "gather", "reduction", "optimizer", "data wait", "error"),
)


def cells(outcome: Outcome) -> list[str]:
    """Return the cells of the table from `ms` on."""
    return [
        *timing_cells(outcome),
        cell(outcome, "percent_of_floor", ".1f"),
        cell(outcome, "images_per_second", ".4g"),
        cell(outcome, "mfu_percent", ".1f"),
        cell(outcome, "peak_bytes", ".0f", 2**20),
        *(f"{100 * outcome['shares'][part]:.1f}" for part in PARTS),
        f"{max(outcome['errors'].values()):.0e}",
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
