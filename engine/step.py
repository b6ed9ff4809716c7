"""The large-batch step: forward of all micro-batches, one loss over the global batch, then their backwards.

The loss couples every image of the batch with every text, so its gradient is known only after the last forward. What a
micro-batch keeps until then is the plan's choice. The loss is evaluated once, whatever the number of micro-batches.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.contrastive import contrastive_loss
from ..kernels.gather import TextGather
from ..models.vision import VisionTower
from .config import LossConfig
from .distributed import World
from .optim import FlatGradients
from .plan import Plan


@dataclass(frozen=True)
class StepResult:
    """Outcome of one step; tensors are 0-dim, on the device, detached."""

    loss: Tensor  # mean over the global batch, the same on all ranks
    logit_scale: Tensor
    duplicates: Tensor  # captions of the global batch that repeat another one of it
    images_forward: int  # images that went through the tower on this rank, second forwards included


def image_rows(tower: VisionTower, images: Tensor, autocast: torch.autocast) -> Tensor:
    """Return unit rows [b, d] in float32 of images [b, S, S, 3] uint8."""
    with autocast:
        embeddings = tower(images)
    return F.normalize(embeddings.float(), dim=-1)


def autocast_for(device: torch.device, precision: Literal["auto", "bf16", "fp32"]) -> torch.autocast:
    """Return the context in which the image tower computes; auto is bf16 on a GPU and fp32 on a CPU."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class LargeBatchStep:
    """Adds the gradients of one global batch to ``gradients`` and reduces them over the ranks."""

    def __init__(
        self,
        tower: VisionTower,
        log_logit_scale: nn.Parameter,
        gradients: FlatGradients,
        plan: Plan,
        *,
        loss: LossConfig,
        world: World,
        autocast: torch.autocast,
        seed: int,
    ) -> None:
        self._tower = tower
        self._log_logit_scale = log_logit_scale
        self._gradients = gradients
        self._plan = plan
        self._loss = loss
        self._world = world
        self._autocast = autocast
        self._seed = seed
        local_batch = len(plan.tiers) * plan.micro_batch
        self._gather_text = TextGather(world.group, (local_batch, tower.embed_dim), torch.float32)
        self._gather_ids = TextGather(world.group, (local_batch, 1), torch.int64)

    def __call__(self, step: int, images: Tensor, text: Tensor, ids: Tensor) -> StepResult:
        """Run one step.

        Args:
            step: number of the step; with the seed, rank and micro-batch it fixes every random draw of the tower.
            images: [b, S, S, 3] uint8, this rank's.
            text: [b, d] float32 unit rows of this rank's captions.
            ids: [b] int64, equal for equal captions: those are counted and, where the config says so, no negatives.

        """
        all_text = self._gather_text.start(text)
        ids_of_ranks = self._gather_ids.start(ids[:, None])

        micro_batches = images.split(self._plan.micro_batch)
        kept: dict[int, Tensor] = {}  # rows with their graph, by micro-batch
        rows = torch.empty_like(text)  # [b, d]
        for number, (tier, micro_batch) in enumerate(zip(self._plan.tiers, micro_batches, strict=True)):
            with torch.set_grad_enabled(tier == "all"):
                output = self._forward(step, number, micro_batch)
            self._rows_of(rows, number).copy_(output.detach())
            if tier == "all":
                kept[number] = output

        all_ids = ids_of_ranks.wait()[:, 0]
        rows.requires_grad_()
        loss = contrastive_loss(
            rows,
            all_text.wait(),
            self._log_logit_scale.exp(),
            first_row=self._world.rank * len(text),
            ids=all_ids if self._loss.mask_duplicates else None,
            group=self._world.group,
            mode=self._loss.mode,
        )
        loss.backward()
        assert rows.grad is not None

        # Kept graphs first: each frees its activations before a second forward needs room.
        for number, tier in enumerate(self._plan.tiers):
            if tier == "all":
                kept.pop(number).backward(self._rows_of(rows.grad, number))
        for number, tier in enumerate(self._plan.tiers):
            if tier == "none":
                self._forward(step, number, micro_batches[number]).backward(self._rows_of(rows.grad, number))

        self._gradients.all_reduce(self._world.group)
        forwards = len(images) + self._plan.tiers.count("none") * self._plan.micro_batch
        duplicates = (all_ids.sort().values.diff() == 0).sum()
        return StepResult(loss.detach(), self._log_logit_scale.detach().exp(), duplicates, forwards)

    def _forward(self, step: int, number: int, images: Tensor) -> Tensor:
        # The draws are a function of their place in the run, so a second forward repeats the first one's exactly, and a
        # resumed run needs no stored generator state.
        torch.manual_seed(_seed_of(self._seed, step, self._world.rank, number))
        return image_rows(self._tower, images, self._autocast)

    def _rows_of(self, rows: Tensor, number: int) -> Tensor:
        return rows[number * self._plan.micro_batch : (number + 1) * self._plan.micro_batch]


def _seed_of(*place: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=7).digest())
