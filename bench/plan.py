"""What a training step keeps between forward and backward on GPUs of 80 and 141 GB, and its predicted cost.

    python -m textlock.bench.plan                                 # local batches of a global batch of 65,536
    python -m textlock.bench.plan --gpus h200 --local-batches 8192

Nothing is run but two small forwards on the CPU, which count bytes: this is the plan that a run makes on such a GPU,
next to the two usual ways to save memory, under the same costs. `gradcache` keeps nothing and runs every image forward
twice (https://arxiv.org/abs/2101.06983). `checkpoints` sends the local batch forward at once, keeps the input of every
block and recomputes each block, as the released training code does. Extra time is the share of forward and backward
with nothing recomputed. Peaks are of allocated bytes: weights, gradients, optimiser, three batches of images,
embeddings, the loss, and activations at their most. One JSON line a tier and a plan on stdout, a table on stderr.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from textlock.bench.entry import Benchmark, Column, Line, Outcome, Session, require_known, require_positive
from textlock.engine import plan as planning
from textlock.engine.plan import Plan, StepConfig, Tier, TierCost, choose_plan, fixed_bytes, tier_costs
from textlock.models.block import Implementation
from textlock.models.vision import VISION_CONFIGS, VisionTower, build_vision_tower

# What these GPUs have for allocations, and what CUDA, its kernels and NCCL take of it.
USABLE_GIB = {"h100": 79.6, "h200": 140.0}
CONTEXT_GIB = 2.0


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of the command."""

    gpus: tuple[Literal["h100", "h200"], ...] = ("h100", "h200")
    """The H100 with 80 GB, the H200 with 141 GB."""
    tower: str = "eva02_base_patch16_224"
    """Name of the image tower."""
    local_batches: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Images of one GPU in a step."""
    texts: int = 65536
    """Texts of the global batch."""
    micro_batch: int = 512
    """Images of one forward pass."""


@dataclass(frozen=True)
class Costs:
    """What a tower costs in bfloat16, wherever it runs."""

    tower: VisionTower
    autocast: torch.autocast
    fused: Mapping[Tier, TierCost]
    checkpoints: TierCost  # the input of every block is kept, and blocks are torch's own operations

    @classmethod
    def of(cls, name: str) -> "Costs":
        """Count the costs of a tower."""
        autocast = torch.autocast("cpu", torch.bfloat16)

        def build(block: Implementation) -> VisionTower:
            return build_vision_tower(name, block=block)

        tower = build("fused")
        fused, plain = tier_costs(tower, autocast), tier_costs(build("plain"), autocast)
        checkpoints = replace(plain["block"], kept_bytes=fused["block"].kept_bytes)
        return cls(tower, autocast, fused, checkpoints)

    def weight_bytes(self) -> int:
        """Return the bytes of weights and gradients, which are there before anything is planned."""
        return 8 * sum(parameter.numel() for parameter in self.tower.parameters())

    def other_bytes(self, local_batch: int, texts: int) -> int:
        """Return the bytes of everything else but activations."""
        return fixed_bytes(self.tower, self.autocast, local_batch=local_batch, global_batch=texts)


def plan_on(costs: Costs, gpu: str, options: PlanOptions, local_batch: int) -> dict[str, Any]:
    """Return the plan of one GPU and local batch and its peers; ``absent`` with a reason where nothing fits."""
    weights, other = costs.weight_bytes(), costs.other_bytes(local_batch, options.texts)
    free = int((USABLE_GIB[gpu] - CONTEXT_GIB) * 2**30) - weights
    memory = max(0, int(free * planning.SHARE_OF_FREE_MEMORY) - other)

    def figures(plan: Plan) -> dict[str, Any]:
        return {
            "tiers": dict(Counter(plan.tiers)),
            "kept_bytes": plan.kept_bytes,
            "peak_bytes": weights + other + plan.activation_bytes,
            "extra_time": plan.extra_time,
            "second_forwards": plan.second_forwards,
            "fits": plan.activation_bytes <= memory,
        }

    try:
        step = StepConfig(micro_batch=options.micro_batch)
        plan = choose_plan(step, costs.fused, local_batch=local_batch, memory_bytes=memory)
    except ValueError as nothing_fits:
        return {"absent": f"{local_batch:,} images on {gpu}: {nothing_fits}"}
    twice = choose_plan(replace(step, keep="none"), costs.fused, local_batch=local_batch, memory_bytes=memory)
    at_once = Plan(("block",), local_batch, "block", {"block": costs.checkpoints})
    return {
        **figures(plan),
        "activation_memory_bytes": memory,
        "peers": {"gradcache": figures(twice), "checkpoints": figures(at_once)},
    }


def lines(options: PlanOptions, session: Session) -> Iterator[Line]:
    """Yield the cost of each tier, and the plan of every GPU and local batch."""
    costs = Costs.of(options.tower)
    for tier, cost in costs.fused.items():
        yield Line("plan", "tier", {"tower": options.tower, "tier": tier}, "ours", asdict(cost), None)
    for gpu in options.gpus:
        for local_batch in options.local_batches:
            case = {
                "gpu": gpu,
                "tower": options.tower,
                "local_batch": local_batch,
                "texts": options.texts,
                "micro_batch": min(options.micro_batch, local_batch),
            }
            outcome = plan_on(costs, gpu, options, local_batch)
            yield Line("plan", "plan", case, "ours", outcome, (gpu, f"{local_batch:,}"))


def check(options: PlanOptions) -> None:
    """Raise ValueError for what cannot be."""
    require_positive(options, "local_batches", "texts", "micro_batch")
    require_known("tower", [options.tower], VISION_CONFIGS)


def tiers_of(outcome: Outcome) -> str:
    """Return how many micro-batches keep what."""
    return ", ".join(f"{count} {tier}" for tier, count in outcome["tiers"].items())


def of_peer(name: str) -> tuple[Column, Column]:
    """Return the columns of a peer, which may not fit."""

    def peak(outcome: Outcome) -> str:
        peer = outcome["peers"][name]
        return f"{peer['peak_bytes'] / 2**30:.1f}" if peer["fits"] else f"{peer['peak_bytes'] / 2**30:.0f}: too much"

    def extra(outcome: Outcome) -> float | None:
        peer = outcome["peers"][name]
        return peer["extra_time"] if peer["fits"] else None

    return Column(f"{name}: peak", peak), Column("extra time", extra, ".1%")


BENCHMARK = Benchmark(
    about=__doc__,
    options=PlanOptions,
    check=check,
    lines=lines,
    before=("GPU", "local batch"),
    columns=(
        Column("micro-batches that keep", tiers_of),
        Column("kept GiB", "kept_bytes", ".1f", 2**30),
        *(Column("peak GiB", "peak_bytes", ".1f", 2**30), Column("extra time", "extra_time", ".1%")),
        *(*of_peer("gradcache"), *of_peer("checkpoints")),
    ),
    title=lambda o: f"{o.tower}, {o.texts:,} texts, micro-batches of {o.micro_batch}, bfloat16, planned on",
)

if __name__ == "__main__":
    BENCHMARK.command()
