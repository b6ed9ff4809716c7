"""One simulated rank of many, and the training loops that `textlock.bench.step` times: ours and those of peers."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from textlock.bench import losses
from textlock.bench.measure import check_compiler
from textlock.bench.tower import jitter
from textlock.data.loader import Batch, DataConfig, Loader, open_loader
from textlock.engine.distributed import World
from textlock.engine.feed import Feed
from textlock.engine.objective import LossConfig, Objective
from textlock.engine.optim import FlatGradients, OptimConfig, build_optimizer
from textlock.engine.plan import Plan, StepConfig, plan_step
from textlock.engine.step import LargeBatchStep, autocast_for, image_rows, text_dtype
from textlock.models.block import ComputeCopies, Implementation, product_dtype
from textlock.models.vision import VISION_CONFIGS, VisionTower, build_vision_tower

if TYPE_CHECKING:
    from textlock.models.text import TextTower

Phase = Literal["tower", "loss", "gather", "reduction", "optimizer", "data_wait"]
PHASES: tuple[Phase, ...] = ("tower", "loss", "gather", "reduction", "optimizer", "data_wait")
# Distinct images. A larger local batch repeats them: 65,536 would take minutes to draw and 10 GB of pinned memory, and
# neither the time nor the memory of a step depends on them. Their texts all differ.
DISTINCT_IMAGES = 1024


class Clock:
    """Tells how long each phase of a step took, on a GPU by events, which nothing waits for while it runs."""

    def __init__(self, device: torch.device, before: "Clock | None" = None) -> None:
        """Start now, or where the clock of the step before ended."""
        self._on_gpu = device.type == "cuda"
        self._phases: list[Phase] = []
        self._marks: list[Any] = [self._now() if before is None else before._marks[-1]]

    def mark(self, phase: Phase) -> None:
        """Say that what was queued since the mark before was this phase."""
        self._phases.append(phase)
        self._marks.append(self._now())

    def wait(self) -> None:
        """Wait for the last mark."""
        if self._on_gpu:
            self._marks[-1].synchronize()

    def seconds(self) -> dict[Phase, float]:
        """Return the seconds of each phase, after `wait`."""
        found = dict.fromkeys(PHASES, 0.0)
        for phase, before, after in zip(self._phases, self._marks, self._marks[1:], strict=False):
            found[phase] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class StepSetting:
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
            return product_dtype(torch.empty(0, device=self.device))

    def build(self, block: Implementation) -> VisionTower:
        """Build the tower: the same weights whatever the blocks."""
        with torch.device("meta"):
            tower = build_vision_tower(self.tower, block=block)
        tower.to_empty(device=self.device)
        tower.load_state_dict(weights(self.tower, self.seed))
        return tower

    def case(self, local_batch: int, texts: int) -> losses.Case:
        """Draw the text embeddings of all ranks and the image embeddings of the others."""
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
def draw_images(setting: StepSetting, count: int) -> Tensor:
    """Draw uint8 images [count, S, S, 3] on the CPU: noise on colours that differ, so that their embeddings do too."""
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

    def texts(self, step: int, rows: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the text embeddings of all ranks."""
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

    def __init__(self, setting: StepSetting, block: Implementation, case: losses.Case) -> None:
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
        texts, ids = rank.objective.texts(0, batch.text, None)
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
    """Return the own images' half and own texts' half of the loss, from whole logits."""
    case, scale = rank.case, rank.objective.logit_scale()
    labels = torch.arange(case.b, device=rows.device)
    with rank.autocast:
        by_image = scale * rows @ case.text.T
        by_text = scale * case.text[: case.b] @ torch.cat([rows, case.images[case.b :]]).T
    return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2


@dataclass(frozen=True)
class LoopCandidate:
    """A training loop on one kind of blocks."""

    block: Implementation
    loop: Literal["ours", "gradcache", "open_clip", "checkpoints"]

    def prepare(self, setting: StepSetting, case: losses.Case) -> "PreparedLoop":
        """Allocate everything; raises Unavailable."""
        if self.block == "compile":
            check_compiler(setting.device)
            torch.compiler.reset()
        clip_loss = losses.open_clip(case, compiled=False).loss if self.loop == "open_clip" else None
        rank = Rank(setting, self.block, case)
        if self.loop == "ours":
            plan = plan_of(rank)
            return PreparedLoop(rank, our_loop(rank, plan), plan)
        if self.block == "fused":
            rank.copies = ComputeCopies(rank.tower, setting.dtype)
        if clip_loss is not None:
            return PreparedLoop(rank, partial(open_clip_loop, clip_loss), None)
        return PreparedLoop(rank, gradcache if self.loop == "gradcache" else checkpoints, None)


CANDIDATES = {
    "ours": LoopCandidate("fused", "ours"),
    "gradcache_fused": LoopCandidate("fused", "gradcache"),
    "gradcache_eager": LoopCandidate("plain", "gradcache"),
    "gradcache_compiled": LoopCandidate("compile", "gradcache"),
    "open_clip_fused": LoopCandidate("fused", "open_clip"),
    "open_clip_eager": LoopCandidate("plain", "open_clip"),
    "open_clip_compiled": LoopCandidate("compile", "open_clip"),
    "checkpoints_eager": LoopCandidate("plain", "checkpoints"),
    "checkpoints_compiled": LoopCandidate("compile", "checkpoints"),
}


def plan_of(rank: Rank) -> Plan:
    """Return the plan of ours, as train.py makes it on each of so many ranks."""
    return plan_step(
        StepConfig(micro_batch=rank.micro_batch, memory_gib=rank.setting.memory_gib),
        rank.tower,
        rank.autocast,
        World(0, rank.case.world, rank.setting.device, None),
        batch_size=rank.case.B,
        couples=rank.objective.couples_images,
    )


def our_loop(rank: Rank, plan: Plan) -> Loop:
    """Return the step of train.py."""
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
class PreparedLoop:
    """A training loop with its rank, ready to run."""

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
        if self.plan is None:  # ours has done it during its backward
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
    """Make a batch of images and stored text embeddings, as a loader hands it out."""
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
def batches(setting: StepSetting, case: losses.Case, shards: str | None, workers: int) -> Iterator[Iterator[Batch]]:
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
            config = DataConfig(shards=(shards,), batch_size=case.b, image_size=side, workers=workers)
            loader = open_loader(config, rank=0, world_size=1, device=device)
            open_ones.callback(loader.close)
            source = decoded_now(loader)
        yield Feed(cast(Loader, source), cast("TextTower", None), device)


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
