"""Which activations each micro-batch keeps between its forward and its backward.

Every tier gives the same gradients, so memory and time decide. The four tiers of models/block.py keep part of every
block; ``none`` keeps nothing and recomputes the forward when its backward is due (GradCache,
https://arxiv.org/abs/2101.06983). Micro-batches may have different tiers: the plan fills the memory it is given so that
the least time goes into recomputing what was not kept.

Bytes are exact. Times are those of an H100 as the kernels are meant to use it, by counting: matrix products, attention
and memory traffic at the rates below. Only their ratios matter for the choice.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from torch import Tensor

from ..models.block import Block, Keep, kept_bytes, product_dtype
from ..models.vision import VisionTower
from ..settings import Settings, at_least
from .distributed import World
from .sharding import gathered

Tier = Literal["all", "no-mlp", "lean", "block", "none"]

# Assumed, in operations or bytes a second; to be replaced by what `make gpu-check` measures.
_MATRIX_RATE = 650e12
_ATTENTION_RATE = 200e12
_ATTENTION_BACKWARD_RATE = 160e12
_BANDWIDTH = 2.7e12

# Safety margin for allocator rounding and uncounted buffers.
SHARE_OF_FREE_MEMORY = 0.94


@dataclass(frozen=True, kw_only=True)
class StepConfig(Settings, section="step"):
    """How one global batch is computed. Changes memory and speed, never the result beyond rounding."""

    micro_batch: Annotated[int, at_least(1)] = 512
    """Images per forward pass on one rank."""
    keep: Literal["auto", "all", "no-mlp", "lean", "block", "none"] = "auto"
    """What every micro-batch keeps for its backward: the table at the top of models/block.py, or none, which recomputes
    the forward. auto: the mix of tiers that recomputes least within the memory budget."""
    memory_gib: Annotated[float | None, at_least(0)] = None
    """Memory for activations in GiB. None: what is free on the device."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the image tower; weights and optimiser stay float32. auto: bf16 on a GPU, fp32 on a CPU."""
    sharding: Literal["replicated", "fsdp"] = "replicated"
    """Where weights, gradients and moments lie. replicated: all on every GPU, the fastest where they fit. fsdp: divided
    among the GPUs, every block gathered where it is needed (FSDP2), for towers that do not fit; under torchrun only."""

    def micro_batch_of(self, local_batch: int) -> int:
        """Return the images of a forward pass where a rank has ``local_batch``; raises ValueError unless it divides."""
        micro_batch = min(self.micro_batch, local_batch)
        if local_batch % micro_batch:
            self.refuse("micro_batch", f"divide the {local_batch} images of one process")
        return micro_batch


@dataclass(frozen=True)
class TierCost:
    """What one image costs in one tier."""

    kept_bytes: int  # between forward and backward
    working_bytes: int  # in addition, during the backward of its micro-batch
    extra_time: float  # of recomputing what was not kept, as a share of forward and backward


@dataclass(frozen=True)
class Plan:
    """The tier of every micro-batch, and what that is expected to cost."""

    tiers: tuple[Tier, ...]
    micro_batch: int
    recompute_tier: Keep  # of a second forward
    costs: Mapping[Tier, TierCost]
    waits_for_loss: bool = True  # else each micro-batch's backward runs before the next one's forward

    @property
    def kept_bytes(self) -> int:
        """Activations alive at a time between a forward and its backward."""
        alive = self.tiers if self.waits_for_loss else self.tiers[:1]
        return sum(self.micro_batch * self.costs[tier].kept_bytes for tier in alive)

    @property
    def activation_bytes(self) -> int:
        """Activations at their peak: kept ones and those of the micro-batch whose backward runs."""
        of_kept = max((self.costs[tier].working_bytes for tier in self.tiers if tier != "none"), default=0)
        peak = self.kept_bytes + self.micro_batch * of_kept
        if "none" in self.tiers:
            second = self.costs[self.recompute_tier]
            peak = max(peak, self.micro_batch * (second.kept_bytes + second.working_bytes))
        return peak

    @property
    def extra_time(self) -> float:
        """Predicted time of recomputing what was not kept, as a share of keeping all."""
        lost = sum(self.costs[tier].extra_time for tier in self.tiers)
        lost += self.tiers.count("none") * self.costs[self.recompute_tier].extra_time
        return lost / len(self.tiers)

    @property
    def second_forwards(self) -> float:
        """Share of the images that run forward twice."""
        return self.tiers.count("none") / len(self.tiers)

    def __str__(self) -> str:
        """Return the line a person reads at the start of a run."""
        counts = Counter(self.tiers)
        shares = ", ".join(f"{counts[tier]} keep {tier}" for tier in get_args(Tier) if counts[tier])
        kept = f"{self.kept_bytes / 2**30:.2f} GiB{'' if self.waits_for_loss else ' at a time'}"
        return (
            f"{len(self.tiers)} micro-batches of {self.micro_batch}: {shares}; {kept}, "
            f"{self.extra_time:.1%} more time than keeping all"
        )


def plan_step(
    config: StepConfig,
    tower: VisionTower,
    autocast: torch.autocast,
    world: World,
    *,
    batch_size: int,
    couples: bool,
) -> Plan:
    """Choose the plan of a training run, for the memory that this rank's device has left; all ranks must call.

    Args:
        config: see there.
        tower: on its device, sharded if the config asks for it.
        autocast: the context that the tower computes in.
        world: see there.
        batch_size: of the global batch.
        couples: whether the loss couples the images of the batch, so that all forwards run before the first backward.

    Raises ValueError as `choose_plan` does.
    """
    shards = world.world_size if config.sharding == "fsdp" else 1
    local_batch = batch_size // world.world_size
    fixed = fixed_bytes(tower, autocast, local_batch=local_batch, global_batch=batch_size, shards=shards)
    with gathered(tower):
        costs = tier_costs(tower, autocast)
    memory = available_bytes(world.device, config.memory_gib, fixed_bytes=fixed)
    return choose_plan(config, costs, local_batch=local_batch, memory_bytes=memory, waits_for_loss=couples)


def choose_plan(
    config: StepConfig,
    costs: Mapping[Tier, TierCost],
    *,
    local_batch: int,
    memory_bytes: int,
    waits_for_loss: bool = True,
) -> Plan:
    """Choose the tier of each of the ``local_batch / micro_batch`` micro-batches.

    Args:
        config: the size of a micro-batch, and the tier of all or ``auto``: the plan with the least extra time.
        costs: of the tiers that the tower knows, as `tier_costs` counts them.
        local_batch: images of one rank in a step.
        memory_bytes: for the activations, kept ones and those of the running backward.
        waits_for_loss: whether no backward can start before the last forward has ended, as under the symmetric loss.

    Raises ValueError when the micro-batch does not divide the local batch, and when not even one micro-batch fits.
    """
    micro_batch = config.micro_batch_of(local_batch)
    count = local_batch // micro_batch
    fitting: list[Keep] = [
        tier
        for tier, cost in costs.items()
        if tier != "none" and micro_batch * (cost.kept_bytes + cost.working_bytes) <= memory_bytes
    ]
    # For a micro-batch alone.
    recompute = min(fitting, key=lambda tier: costs[tier].extra_time, default=None)
    if config.keep != "auto":
        if config.keep != "none":
            recompute = config.keep
        return Plan((config.keep,) * count, micro_batch, recompute or "block", costs, waits_for_loss)
    if recompute is None:
        least = min(cost.kept_bytes + cost.working_bytes for tier, cost in costs.items() if tier != "none")
        divisors = [n for n in range(1, micro_batch) if local_batch % n == 0 and n * least <= memory_bytes]
        advice = f"set {config.flag('micro_batch')} {divisors[-1]}" if divisors else "not even one image fits"
        raise ValueError(
            f"the activations of a micro-batch of {micro_batch} images need {micro_batch * least / 2**30:.2f} GiB, but "
            f"only {memory_bytes / 2**30:.2f} GiB is available: {advice}"
        )
    if count == 1 or not waits_for_loss:
        return Plan((recompute,) * count, micro_batch, recompute, costs, waits_for_loss)

    tiers = _least_extra_time(costs, recompute, count, memory_bytes // micro_batch)
    return Plan(tiers, micro_batch, recompute, costs)


def _least_extra_time(costs: Mapping[Tier, TierCost], recompute: Keep, count: int, memory: int) -> tuple[Tier, ...]:
    """Return the tiers of ``count`` micro-batches, in the order of the table, by enumerating all counts per tier.

    Where memory is short this beats filling up greedily by up to half a percent of the step. Beyond 128 micro-batches
    only counts that are multiples of a 128th are enumerated.
    """
    *upper, lowest = [tier for tier in costs if tier != "none"]
    kept, working = (torch.tensor([getattr(costs[t], name) for t in upper]) for name in ("kept_bytes", "working_bytes"))
    counts = torch.cartesian_prod(*[torch.arange(0, count + 1, -(-count // 128)) for _ in upper]).view(-1, len(upper))
    counts = counts[counts.sum(1) <= count]
    rest = count - counts.sum(1)
    used = (counts * kept).sum(1)
    at_work = torch.where(counts > 0, working, 0).amax(1)
    # Of the rest, as many as fit keep the least; the others recompute all.
    with_lowest = at_work.clamp(min=costs[lowest].working_bytes)
    room = (memory - used - with_lowest).clamp(min=0)
    of_lowest = torch.minimum(rest, room // costs[lowest].kept_bytes)
    used += of_lowest * costs[lowest].kept_bytes
    fits = used + torch.where(of_lowest > 0, with_lowest, at_work) <= memory
    extra = torch.tensor([costs[tier].extra_time for tier in upper], dtype=torch.float64)
    twice = costs["none"].extra_time + costs[recompute].extra_time
    time = (counts * extra).sum(1) + of_lowest * costs[lowest].extra_time + (rest - of_lowest) * twice
    best = torch.where(fits, time, torch.inf).argmin()
    chosen = [*counts[best].tolist(), int(of_lowest[best]), int(rest[best] - of_lowest[best])]
    return tuple(tier for tier, n in zip([*upper, lowest, "none"], chosen, strict=True) for _ in range(n))  # type: ignore[misc]


def tier_costs(tower: VisionTower, autocast: torch.autocast) -> dict[Tier, TierCost]:
    """Return what one image costs in every tier that the tower's blocks know.

    Kept bytes are exact: counted on two small forwards with tier ``all``, whatever the tower, and for the other tiers
    of fused blocks by the formula of `kept_bytes`.
    """
    with autocast:
        compute = product_dtype(tower.patch_embed.weight)
    tokens = tower.tokens_in_training
    blocks = [block for block in tower.blocks if isinstance(block, Block)]
    seconds = _Seconds.of(tower, tokens, compute)

    def kept(tier: Keep) -> int:
        residual = tower.residual or compute
        return sum(kept_bytes(block, tokens, tier, residual=residual, compute=compute) for block in blocks)

    every = measure_activation_bytes(tower, autocast)
    if blocks[0].implementation != "fused":
        # A checkpoint holds x and branch of its block where autograd's hooks do not see them.
        inputs = (2 * len(blocks) - 1) * tokens * tower.config.width * (tower.residual or compute).itemsize
        least = measure_activation_bytes(tower, autocast, "block") + inputs
        costs = {
            "all": TierCost(every, _working_bytes(blocks[0], tokens, compute, "all"), 0.0),
            # One block's activations are recomputed while its backward runs.
            "block": TierCost(
                least, (every - least) // len(blocks), (seconds.forward - seconds.outside) / seconds.step
            ),
        }
    else:
        outside = every - kept("all")
        costs = {
            tier: TierCost(outside + kept(tier), _working_bytes(blocks[0], tokens, compute, tier), time / seconds.step)
            for tier, time in seconds.recompute.items()
        }
    return {**costs, "none": TierCost(0, 0, seconds.forward / seconds.step)}  # type: ignore[dict-item]


@dataclass(frozen=True)
class _Seconds:
    """Of one image, at the rates above."""

    forward: float
    step: float  # forward and backward
    outside: float  # part of the forward outside of the blocks
    recompute: Mapping[Keep, float]  # in the backward

    @classmethod
    def of(cls, tower: VisionTower, tokens: int, compute: torch.dtype) -> "_Seconds":
        """Count the tower's matrix products, attention and memory traffic for ``tokens`` tokens."""
        config = tower.config
        stream = tokens * config.width * compute.itemsize  # bytes of a tensor [T, D]
        first = tokens * config.first_width * compute.itemsize
        hidden = tokens * config.hidden * compute.itemsize

        flops = config.block_flops(tokens)
        attention = flops.pop("attention")
        product = {name: count / _MATRIX_RATE for name, count in flops.items()}
        products = sum(product.values())
        # Reads and writes of what is no product: two residual additions with LayerNorm and the activation; backward,
        # recomputed LayerNorms, the activation's backward, and two backwards of LayerNorm.
        forward = 8 * stream + first + hidden
        backward = 12 * stream + 2 * first + 2 * hidden
        of_block = products + attention / _ATTENTION_RATE + forward / _BANDWIDTH
        of_block_backward = 2 * products + 2 * attention / _ATTENTION_BACKWARD_RATE + backward / _BANDWIDTH
        embedding = config.embedding_flops(tokens - config.prefix_tokens) / _MATRIX_RATE
        # Attention pooling reads the tokens; backward, it reads them again and writes their gradient.
        head, reads = (config.pooling_flops(tokens) / _MATRIX_RATE, 1) if tower.pooling == "map" else (0.0, 0)
        outside = embedding + head + (4 + reads) * stream / _BANDWIDTH
        outside_backward = embedding + 2 * head + (8 + 2 * reads) * stream / _BANDWIDTH
        in_lean = product["first"] + product["qkv"]
        in_block = in_lean + product["out_proj"] + attention / _ATTENTION_RATE + 4 * stream / _BANDWIDTH
        recompute: dict[Keep, float] = {"all": 0.0, "no-mlp": product["first"], "lean": in_lean, "block": in_block}
        return cls(
            forward=config.depth * of_block + outside,
            step=config.depth * (of_block + of_block_backward) + outside + outside_backward,
            outside=outside,
            recompute={tier: config.depth * time for tier, time in recompute.items()},
        )


def _working_bytes(block: Block, tokens: int, compute: torch.dtype, tier: Keep) -> int:
    """Return the most that a block's backward holds for one image besides what the tier keeps."""
    width, first, hidden = block.qkv.in_features, block.mlp.first.out_features, block.mlp.fc2.in_features
    # In the MLP: LayerNorm's output, the gradients of y and x2; of h, h itself and the gradient of what made it.
    held = 3 * width + 2 * hidden + first
    if tier != "all":
        held += first
    if tier == "block":
        held += 5 * width  # qkv, attention's output and x2
    return tokens * held * compute.itemsize


def available_bytes(device: torch.device, memory_gib: float | None, *, fixed_bytes: int) -> int:
    """Return the bytes that activations may take: the setting, or what is free on the device less ``fixed_bytes``."""
    if memory_gib is not None:
        return int(memory_gib * 2**30)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = _free_host_bytes()
    return max(0, int(free * SHARE_OF_FREE_MEMORY) - fixed_bytes)


def fixed_bytes(
    tower: VisionTower, autocast: torch.autocast, *, local_batch: int, global_batch: int, shards: int = 1
) -> int:
    """Return the bytes that a step needs besides activations and what was there before: all but weights and gradients.

    The optimiser's two moments; the weights' copies in the type of the products; three batches of images: of the
    running step, of the one queued after it, and on their way to the one after that; embeddings of images and texts;
    the loss's exponentials, 2 bytes a logit up to a gibibyte, or its chunks beyond that.

    Of a tower divided into ``shards``: this rank's part of the moments and of the summed gradients, the gradients of
    all weights until the last micro-batch sums them, and the gathered weights: those outside the blocks, and two blocks
    with the buffers that they travel in.
    """
    with autocast:
        compute = product_dtype(tower.patch_embed.weight)
    parameters = sum(parameter.numel() for parameter in tower.parameters())
    copy = compute.itemsize if compute != torch.float32 else 0
    if shards == 1:
        weights = parameters * (8 + copy)
    else:
        of_block = sum(parameter.numel() for parameter in tower.blocks[0].parameters())
        outside = parameters - len(tower.blocks) * of_block
        weights = parameters * 12 // shards + parameters * 4 + (outside + 4 * of_block) * 4 + of_block * copy
    images = 3 * local_batch * tower.image_size**2 * 3
    rows = (4 * local_batch + 2 * global_batch) * tower.embed_dim * 4
    loss = 2 * min(2 * local_batch * global_batch, 2**30)  # the loss stores exponentials in half of what is free
    return weights + images + rows + loss


def measure_activation_bytes(tower: VisionTower, autocast: torch.autocast, keep: Keep = "all") -> int:
    """Return the bytes autograd saves for one more image, counted on two small forwards: exact, whatever the tower.

    What does not grow with the batch (weights, copies of them, RoPE tables) drops out of the difference.
    """
    one, two = (_saved_bytes(tower, autocast, images, keep) for images in (1, 2))
    return two - one


def _saved_bytes(tower: VisionTower, autocast: torch.autocast, images: int, keep: Keep) -> int:
    device = next(tower.parameters()).device
    saved: dict[int, torch.UntypedStorage] = {}  # held until the end, so that no address is used twice

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = torch.zeros(images, tower.image_size, tower.image_size, 3, dtype=torch.uint8, device=device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast:
        tower(batch, keep=keep)
    return sum(storage.nbytes() for storage in saved.values())


def _free_host_bytes() -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ValueError("the free memory of this machine cannot be read; give --step.memory-gib")
