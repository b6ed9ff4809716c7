"""Which activations each micro-batch keeps between its forward and its backward.

Two tiers: ``all`` keeps everything autograd saves; ``none`` keeps nothing and runs the forward again when its backward
is due (GradCache, https://arxiv.org/abs/2101.06983). They give the same gradients, so memory alone decides: as many
micro-batches as fit keep ``all``, and only the others pay a second forward.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..models.vision import VisionTower

Tier = Literal["all", "none"]

# Weights, optimiser state, loss and the transients of one micro-batch come out of the rest.
_SHARE_OF_FREE_MEMORY = 0.6


@dataclass(frozen=True)
class Plan:
    """The tier of every micro-batch, and what that is expected to cost."""

    tiers: tuple[Tier, ...]
    micro_batch: int
    bytes_per_image: int

    @property
    def kept_bytes(self) -> int:
        """Activations alive when the loss is computed."""
        return self.tiers.count("all") * self.micro_batch * self.bytes_per_image

    @property
    def second_forwards(self) -> float:
        """Share of the images that run forward twice."""
        return self.tiers.count("none") / len(self.tiers)

    def __str__(self) -> str:
        """Return the line a person reads at the start of a run."""
        return (
            f"{len(self.tiers)} micro-batches of {self.micro_batch}: {self.tiers.count('all')} keep their activations "
            f"({self.kept_bytes / 2**30:.2f} GiB), {self.tiers.count('none')} run forward twice"
        )


def choose_plan(
    *, local_batch: int, micro_batch: int, bytes_per_image: int, keep: Literal["auto", "all", "none"], memory_bytes: int
) -> Plan:
    """Choose the tier of each of the ``local_batch / micro_batch`` micro-batches.

    Raises ValueError when the micro-batch does not divide the local batch or when not even one of them fits.
    """
    micro_batch = min(micro_batch, local_batch)
    if local_batch % micro_batch:
        raise ValueError(
            f"--step.micro-batch {micro_batch} does not divide the {local_batch} images of one rank; choose a divisor"
        )
    count = local_batch // micro_batch
    if keep == "auto":
        fitting = memory_bytes // (micro_batch * bytes_per_image)
        if fitting == 0:
            raise ValueError(
                f"the activations of one micro-batch of {micro_batch} images take "
                f"{micro_batch * bytes_per_image / 2**30:.2f} GiB and {memory_bytes / 2**30:.2f} GiB are to be had; "
                f"choose a smaller --step.micro-batch"
            )
        # A micro-batch that runs twice needs room for one more than those that are kept.
        kept = count if fitting >= count else fitting - 1
    else:
        kept = count if keep == "all" else 0
    tiers: tuple[Tier, ...] = tuple("all" if number < kept else "none" for number in range(count))
    return Plan(tiers, micro_batch, bytes_per_image)


def available_bytes(device: torch.device, memory_gib: float | None) -> int:
    """Return the bytes that kept activations may take: the setting, or a share of what is free on the device."""
    if memory_gib is not None:
        if memory_gib < 0:
            raise ValueError(f"--step.memory-gib is {memory_gib}, must not be negative")
        return int(memory_gib * 2**30)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _free_host_bytes()
    return int(free * _SHARE_OF_FREE_MEMORY)


def measure_activation_bytes(tower: VisionTower, autocast: torch.autocast) -> int:
    """Return the bytes autograd saves for one more image, counted on two small forwards: exact, whatever the tower.

    What does not grow with the batch (autocast's copies of the weights, RoPE tables) drops out of the difference.
    """
    few, more = (_saved_bytes(tower, autocast, images) for images in (1, 3))
    return (more - few) // 2


def _saved_bytes(tower: VisionTower, autocast: torch.autocast, images: int) -> int:
    device = next(tower.parameters()).device
    saved: dict[int, torch.UntypedStorage] = {}  # held until the end, so that no address is used twice

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = torch.zeros(images, tower.image_size, tower.image_size, 3, dtype=torch.uint8, device=device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast:
        tower(batch)
    return sum(storage.nbytes() for storage in saved.values())


def _free_host_bytes() -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ValueError("the free memory of this machine cannot be read; give --step.memory-gib")
