"""The large-batch step: forward of all micro-batches, one loss over the global batch, then their backwards.

The symmetric loss couples every image of the batch with every text, so its gradient is known only after the last
forward. What a micro-batch keeps until then is the plan's choice, and the loss is evaluated once, whatever the number
of micro-batches. Objectives that do not couple the images run each micro-batch's backward right after its forward and
keep nothing.

Nothing here waits for the device: the host queues a step and is free for the next batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels.gather import TextGather
from ..models.block import ComputeCopies, Keep, product_dtype
from ..models.vision import VisionTower
from .distributed import World
from .objective import Objective
from .optim import FlatGradients
from .plan import Plan
from .sharding import is_sharded, sum_after_backward

GatheredTexts = Callable[[], tuple[Tensor, Tensor | None]]  # embeddings and ids; calling it waits for the gather


@dataclass(frozen=True)
class StepResult:
    """Outcome of one step; tensors are 0-dim, on the device, detached."""

    loss: Tensor  # mean over the global batch, the same on all ranks
    logit_scale: Tensor
    duplicates: Tensor  # captions of the global batch that repeat another one of it
    images_forward: int  # that went through the tower on this rank, second forwards included


def image_rows(
    tower: VisionTower,
    images: Tensor,
    autocast: torch.autocast,
    keep: Keep = "all",
    on_gradients: Callable[[int], None] | None = None,
) -> Tensor:
    """Return unit vectors [b, d] in float32 of images [b, S, S, 3] uint8; keep and on_gradients as in `VisionTower`."""
    with autocast:
        embeddings = tower(images, keep=keep, on_gradients=on_gradients)
    return F.normalize(embeddings.float(), dim=-1)


def precision_of(device: torch.device) -> Literal["bf16", "fp32"]:
    """Return what the precision auto is on a device: bf16 on a GPU and fp32 on a CPU."""
    return "bf16" if device.type == "cuda" else "fp32"


def autocast_for(device: torch.device, precision: Literal["auto", "bf16", "fp32"]) -> torch.autocast:
    """Return the context in which the image tower computes; auto as in ``precision_of``."""
    if precision == "auto":
        precision = precision_of(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def text_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which texts are gathered and kept: the loss kernels of a GPU round them to float16."""
    return torch.float16 if device.type == "cuda" else torch.float32


class LargeBatchStep:
    """Adds the gradients of one global batch to ``gradients`` and reduces them over the ranks."""

    def __init__(
        self,
        tower: VisionTower,
        objective: Objective,
        gradients: FlatGradients,
        plan: Plan,
        *,
        masks_duplicates: bool,
        world: World,
        autocast: torch.autocast,
        seed: int,
    ) -> None:
        self._tower = tower
        self._objective = objective
        self._gradients = gradients
        self._plan = plan
        self._world = world
        self._autocast = autocast
        self._seed = seed
        self._local_batch = len(plan.tiers) * plan.micro_batch
        self._gather_text = TextGather(world.group, (self._local_batch, tower.embed_dim), text_dtype(world.device))
        self._gather_ids = TextGather(world.group, (self._local_batch, 1), torch.int64)
        self._masks_duplicates = masks_duplicates
        self._sharded = is_sharded(tower)
        # Sharded weights are not there to be copied before their block runs.
        self._copies: AbstractContextManager[None] = nullcontext()
        if not self._sharded:
            with autocast:
                self._copies = ComputeCopies(tower, product_dtype(tower.patch_embed.weight))

    def __call__(self, step: int, images: Tensor, text: Tensor, ids: Tensor) -> StepResult:
        """Run one step.

        Args:
            step: number of the step, from 0; with the seed, rank and micro-batch it fixes every random draw of the
                tower.
            images: [b, S, S, 3] uint8, this rank's.
            text: [b, d] unit embeddings of this rank's captions.
            ids: [b] int64, equal for equal captions; those are counted and, if the objective masks them, no negatives.
        """
        gathering = self._gather_text.start(text.to(self._gather_text.dtype))
        gathering_ids = self._gather_ids.start(ids[:, None])

        def gathered_texts() -> tuple[Tensor, Tensor | None]:
            all_ids = gathering_ids.wait()[:, 0] if self._masks_duplicates else None
            return self._objective.texts(step, gathering.wait(), all_ids)

        micro_batches = images.split(self._plan.micro_batch)
        with self._copies:
            run = self._all_then_back if self._objective.couples_images else self._one_by_one
            loss = run(step, micro_batches, gathered_texts)
        self._gradients.finish_reduction(self._world.group)
        self._objective.remember(step)
        twice = self._plan.tiers.count("none") if self._objective.couples_images else 0
        forwards = len(images) + twice * self._plan.micro_batch
        duplicates = (gathering_ids.wait().flatten().sort().values.diff() == 0).sum()
        return StepResult(loss, self._objective.logit_scale().detach(), duplicates, forwards)

    def _all_then_back(self, step: int, micro_batches: Sequence[Tensor], gathered_texts: GatheredTexts) -> Tensor:
        tiers = self._plan.tiers
        embeddings = torch.empty(self._local_batch, self._tower.embed_dim, device=self._world.device)
        kept: dict[int, Tensor] = {}  # embeddings with their graph, by micro-batch
        for number, (tier, images) in enumerate(zip(tiers, micro_batches, strict=True)):
            if tier == "none":
                with torch.no_grad():
                    output = self._forward(step, number, images, self._plan.recompute_tier)
            else:
                output = kept[number] = self._forward(step, number, images, tier)
            self._part_of(embeddings, number).copy_(output.detach())

        texts, ids = gathered_texts()
        embeddings.requires_grad_()
        loss = self._objective.of_batch(
            embeddings, texts, ids, first_row=self._world.rank * self._local_batch, group=self._world.group
        )
        loss.backward()
        assert embeddings.grad is not None

        # The plan lists tiers from the one that keeps most to none: memory is freed soonest, and a second forward finds
        # the room of all that were kept.
        for number, tier in enumerate(tiers):
            if tier == "none":
                output = self._forward(step, number, micro_batches[number], self._plan.recompute_tier)
            else:
                output = kept.pop(number)
            self._back(number, output, self._part_of(embeddings.grad, number))
        return loss.detach()

    def _one_by_one(self, step: int, micro_batches: Sequence[Tensor], gathered_texts: GatheredTexts) -> Tensor:
        total = torch.zeros((), device=self._world.device)
        texts: Tensor | None = None
        ids: Tensor | None = None
        for number, images in enumerate(micro_batches):
            output = self._forward(step, number, images, self._plan.recompute_tier)
            if texts is None:
                texts, ids = gathered_texts()  # their gather ran during the first micro-batch's forward
            embeddings = output.detach().requires_grad_()
            first_row = self._world.rank * self._local_batch + number * self._plan.micro_batch
            share = self._objective.of_micro_batch(embeddings, texts, ids, first_row=first_row)
            share.backward()
            total += share.detach()
            assert embeddings.grad is not None
            self._back(number, output, embeddings.grad)
        if self._world.group is not None:
            dist.all_reduce(total, group=self._world.group)
        return total

    def _forward(self, step: int, number: int, images: Tensor, keep: Keep) -> Tensor:
        # The draws are a function of their place in the run: a second forward repeats those of the first exactly, and a
        # resumed run needs no stored generator state.
        torch.manual_seed(_seed_of(self._seed, step, self._world.rank, number))
        # In the last micro-batch's backward the gradients of a block are reduced while the backward of the blocks
        # before it runs; FSDP has its own way to do so.
        reduces = self._is_last(number) and self._world.group is not None and not self._sharded
        return image_rows(self._tower, images, self._autocast, keep, self._reduce_block if reduces else None)

    def _back(self, number: int, output: Tensor, gradient: Tensor) -> None:
        if self._sharded:
            sum_after_backward(self._tower, self._is_last(number))
        output.backward(gradient)

    def _is_last(self, number: int) -> bool:
        return number == len(self._plan.tiers) - 1

    def _reduce_block(self, number: int) -> None:
        assert self._world.group is not None
        self._gradients.start_reduction(self._tower.blocks[number].parameters(), self._world.group)

    def _part_of(self, embeddings: Tensor, number: int) -> Tensor:
        return embeddings[number * self._plan.micro_batch : (number + 1) * self._plan.micro_batch]


def _seed_of(*place: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=7).digest())
