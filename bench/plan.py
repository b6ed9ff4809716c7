"""What a training step keeps between forward and backward on GPUs of 80 and 141 GB, and what that is predicted to cost.

    python -m textlock.bench.plan                                 # local batches of a global batch of 65,536
    python -m textlock.bench.plan --gpus h200 --local-batches 8192

Nothing is run but two small forwards on the CPU, which count bytes: this is the plan that a run makes on such a GPU,
beside the two usual ways to save memory, under the same costs. `gradcache` keeps nothing and runs every image forward
twice (https://arxiv.org/abs/2101.06983). `checkpoints` sends the local batch forward at once, keeps the input of every
block and runs each block again, as the released training code does. Extra time is the share of forward and backward
with nothing made again. Peaks are of allocated bytes: weights, gradients, optimiser, two batches of images, rows, the
loss, and activations at their most. One JSON line a tier and a plan on stdout, a table on stderr.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from textlock.engine import plan as planning
from textlock.engine.plan import Plan, StepConfig, Tier, TierCost, choose_plan, fixed_bytes, tier_costs
from textlock.engine.provenance import commit, versions
from textlock.models.block import Implementation
from textlock.models.vision import VISION_CONFIGS, VisionTower, build_vision_tower

# What these GPUs have for allocations, and what CUDA, its kernels and NCCL take of it.
USABLE_GIB = {"h100": 79.6, "h200": 140.0}
CONTEXT_GIB = 2.0


@dataclass(frozen=True, kw_only=True)
class Options:
    gpus: tuple[Literal["h100", "h200"], ...] = ("h100", "h200")
    """The H100 with 80 GB, the H200 with 141 GB."""
    tower: str = "eva02_base_patch16_224"
    """Name of the image tower."""
    local_batches: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Images of one GPU in a step."""
    texts: int = 65536
    """Text rows of the global batch."""
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

    def beside_bytes(self, local_batch: int, texts: int) -> int:
        """Return the other bytes that are no activations."""
        return fixed_bytes(self.tower, self.autocast, local_batch=local_batch, global_batch=texts)


def plan_on(costs: Costs, gpu: str, options: Options, local_batch: int) -> dict[str, Any]:
    """Return the plan of one GPU and local batch and its peers; ``absent`` with a reason where nothing fits."""
    weights, beside = costs.weight_bytes(), costs.beside_bytes(local_batch, options.texts)
    free = int((USABLE_GIB[gpu] - CONTEXT_GIB) * 2**30) - weights
    memory = max(0, int(free * planning.SHARE_OF_FREE_MEMORY) - beside)

    def figures(plan: Plan) -> dict[str, Any]:
        return {
            "tiers": dict(Counter(plan.tiers)),
            "kept_bytes": plan.kept_bytes,
            "peak_bytes": weights + beside + plan.activation_bytes,
            "extra_time": plan.extra_time,
            "second_forwards": plan.second_forwards,
            "fits": plan.activation_bytes <= memory,
        }

    try:
        step = StepConfig(micro_batch=options.micro_batch)
        plan = choose_plan(step, costs.fused, local_batch=local_batch, memory_bytes=memory)
    except ValueError as nothing_fits:
        return {"absent": str(nothing_fits)}
    twice = choose_plan(replace(step, keep="none"), costs.fused, local_batch=local_batch, memory_bytes=memory)
    at_once = Plan(("block",), local_batch, "block", {"block": costs.checkpoints})
    return {
        **figures(plan),
        "activation_memory_bytes": memory,
        "peers": {"gradcache": figures(twice), "checkpoints": figures(at_once)},
    }


COLUMNS = (
    *("GPU", "local batch", "micro-batches that keep", "kept GiB", "peak GiB", "extra time"),
    *("gradcache: peak", "extra time", "checkpoints: peak", "extra time"),
)


def cells(outcome: dict[str, Any]) -> list[str]:
    """Return the cells of the table from the tiers on."""
    if "absent" in outcome:
        return [outcome["absent"]]
    shares = ", ".join(f"{count} {tier}" for tier, count in outcome["tiers"].items())
    found = [shares, f"{outcome['kept_bytes'] / 2**30:.1f}", *_peak_and_time(outcome)]
    for peer in outcome["peers"].values():
        found += _peak_and_time(peer) if peer["fits"] else [f"{peer['peak_bytes'] / 2**30:.0f}: too much", ""]
    return found


def _peak_and_time(figures: dict[str, Any]) -> list[str]:
    return [f"{figures['peak_bytes'] / 2**30:.1f}", f"{figures['extra_time']:.1%}"]


def main(options: Options) -> None:
    if min(*options.local_batches, options.texts, options.micro_batch) <= 0:
        raise ValueError("local batches, texts and micro-batch must be positive")
    if options.tower not in VISION_CONFIGS:
        raise ValueError(f"vision tower {options.tower!r} is unknown: choose from {', '.join(VISION_CONFIGS)}")
    made_with = {"versions": versions(), "commit": commit()}
    costs = Costs.of(options.tower)
    table = Table(title=f"{options.tower}, {options.texts:,} texts, micro-batches of {options.micro_batch}, bfloat16")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for tier, cost in costs.fused.items():
        line = {
            "part": "plan",
            "operation": "tier",
            "case": {"tower": options.tower, "tier": tier},
            "candidate": "ours",
        }
        print(json.dumps(line | asdict(cost) | made_with), flush=True)
    for gpu in options.gpus:
        for local_batch in options.local_batches:
            outcome = plan_on(costs, gpu, options, local_batch)
            case = {
                "gpu": gpu,
                "tower": options.tower,
                "local_batch": local_batch,
                "texts": options.texts,
                "micro_batch": min(options.micro_batch, local_batch),
            }
            line = {"part": "plan", "operation": "plan", "case": case, "candidate": "ours"}
            print(json.dumps(line | outcome | made_with), flush=True)
            table.add_row(gpu, f"{local_batch:,}", *cells(outcome))
    Console(stderr=True, width=160).print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
