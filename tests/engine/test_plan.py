"""The plan: the least time for recomputing what does not fit, and exact counts of what does."""

from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement, pairwise
from typing import get_args
from unittest import mock

import pytest
import torch

from textlock.engine import plan as module
from textlock.engine.distributed import World
from textlock.engine.objective import LossConfig, Objective
from textlock.engine.optim import OptimConfig, build_gradients, build_optimizer
from textlock.engine.plan import (
    Plan,
    StepConfig,
    Tier,
    TierCost,
    available_bytes,
    choose_plan,
    fixed_bytes,
    measure_activation_bytes,
    tier_costs,
)
from textlock.engine.step import LargeBatchStep, autocast_for, text_dtype
from textlock.models.block import kept_bytes
from textlock.models.vision import VISION_CONFIGS, ModelConfig, VisionTower, build_vision_tower

MEBI = 2**20
OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)
# Round numbers in the proportions of EVA02-B/16.
COSTS = {
    "all": TierCost(40, 4, 0.0),
    "no-mlp": TierCost(22, 6, 0.09),
    "lean": TierCost(11, 6, 0.15),
    "block": TierCost(4, 7, 0.22),
    "none": TierCost(0, 0, 0.34),
}


def plan(**changes):
    settings = {"costs": COSTS, "local_batch": 64, "micro_batch": 8, "keep": "auto", "memory_bytes": 10**6, **changes}
    step = StepConfig(micro_batch=settings.pop("micro_batch"), keep=settings.pop("keep"))
    return choose_plan(step, settings.pop("costs"), **settings)


@pytest.mark.parametrize("memory", [100, 120, 352, 360, 400, 640, 777, 1000, 1234, 1500, 2000, 2590, 2592, 3000])
def test_auto_loses_least_time_of_all_plans_that_fit(memory):
    chosen = plan(memory_bytes=memory)
    assert chosen.activation_bytes <= memory
    every = (Plan(tiers, 8, chosen.recompute_tier, COSTS) for tiers in combinations_with_replacement(COSTS, 8))
    best = min(other.extra_time for other in every if other.activation_bytes <= memory)
    assert chosen.extra_time == pytest.approx(best, abs=1e-12)
    if memory >= 8 * (8 * 40 + 4):
        assert chosen.tiers == ("all",) * 8 and chosen.extra_time == 0


def test_what_keeps_most_goes_backward_first_and_more_memory_never_takes_more_time():
    plans = [plan(memory_bytes=memory) for memory in range(88, 3000, 8)]
    for chosen in plans:
        assert list(chosen.tiers) == sorted(chosen.tiers, key=get_args(Tier).index)
    times = [chosen.extra_time for chosen in plans]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(times))
    assert times[0] == pytest.approx((7 * (0.34 + 0.22) + 0.22) / 8) and times[-1] == 0


def test_a_thousand_micro_batches_are_planned_as_well():
    costs = {**COSTS, "block": TierCost(4, 7, 0.25)}
    chosen = plan(costs=costs, local_batch=1000, micro_batch=1, memory_bytes=30_000)
    assert len(chosen.tiers) == 1000 and chosen.activation_bytes <= 30_000
    # Between no-mlp and all, of which 444 and 556 would fit if nothing else did.
    assert chosen.extra_time == pytest.approx(0.09 * 0.556, abs=0.002)


def test_a_second_forward_keeps_what_one_micro_batch_can_and_a_lone_one_what_fits():
    kept = {memory: plan(memory_bytes=memory).recompute_tier for memory in (8 * 11, 8 * 44 - 1, 8 * 44)}
    assert list(kept.values()) == ["block", "no-mlp", "all"]
    assert plan(memory_bytes=8 * 11).activation_bytes == 8 * 11
    assert plan(local_batch=8, memory_bytes=8 * 17).tiers == ("lean",)


def test_an_objective_that_does_not_wait_keeps_one_micro_batch_at_a_time():
    chosen = plan(waits_for_loss=False, memory_bytes=8 * 44)
    assert chosen.tiers == ("all",) * 8 and chosen.extra_time == 0
    assert chosen.kept_bytes == 8 * 40 and chosen.activation_bytes == 8 * 44
    assert "GiB at a time" in str(chosen)


@pytest.mark.parametrize("keep", COSTS)
def test_settings_overrule_the_memory_and_a_micro_batch_is_no_larger_than_the_batch(keep):
    chosen = plan(keep=keep, memory_bytes=0)
    assert chosen.tiers == (keep,) * 8
    assert chosen.second_forwards == (keep == "none")
    assert plan(keep=keep, micro_batch=512).micro_batch == 64


def test_the_line_names_tiers_memory_and_time():
    costs = {tier: replace(cost, kept_bytes=cost.kept_bytes * MEBI) for tier, cost in COSTS.items()}
    chosen = Plan(("all", "lean", "lean", "none"), 512, "all", costs)
    assert str(chosen) == (
        "4 micro-batches of 512: 1 keep all, 2 keep lean, 1 keep none; 31.00 GiB, 16.0% more time than keeping all"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 7}, "--step.micro-batch is 7, must divide the 64 images"),
        ({"memory_bytes": 8 * 11 - 1}, "set --step.micro-batch 4"),
        ({"memory_bytes": 10}, "not even one image fits"),
    ],
    ids=["ragged", "too large", "nothing fits"],
)
def test_impossible_plans_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


@pytest.mark.parametrize("autocast", [OFF, torch.autocast("cpu", torch.bfloat16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kept_patches", [None, 5])
def test_costs_are_what_autograd_saves(autocast, kept_patches):
    tower = build_vision_tower("eva02_micro_patch8_32", kept_patches=kept_patches)
    costs = tier_costs(tower, autocast)
    assert list(costs) == list(get_args(Tier))
    for tier, cost in costs.items():
        expected = 0 if tier == "none" else measure_activation_bytes(tower, autocast, tier)
        assert cost.kept_bytes == expected, tier
    times = [cost.extra_time for cost in costs.values()]
    assert times == sorted(times) and times[0] == 0 and times[-1] == pytest.approx(1 / 3, abs=0.03)


def test_a_tower_without_fused_blocks_knows_two_tiers():
    tower = build_vision_tower("eva02_micro_patch8_32", block="plain")
    costs = tier_costs(tower, OFF)
    assert list(costs) == ["all", "block", "none"]
    assert costs["all"].kept_bytes == measure_activation_bytes(tower, OFF)
    # Besides what autograd's hooks see, x and branch of every block; the first has no branch.
    inputs = 3 * tower.config.tokens * tower.config.width * 4
    assert costs["block"].kept_bytes == measure_activation_bytes(tower, OFF, "block") + inputs
    assert costs["block"].kept_bytes < costs["all"].kept_bytes / 3


def test_the_recipe_on_an_80_gb_gpu_recomputes_little():
    """4,096 images a GPU: GradCache and checkpoints of every block cost a third.

    What autograd saves is counted on one block, of twelve alike.
    """
    base, autocast = VISION_CONFIGS["eva02_base_patch16_224"], torch.autocast("cpu", torch.bfloat16)
    with torch.device("meta"):  # weights that nobody has to draw
        tower = VisionTower(base, ModelConfig())
    tower.to_empty(device="cpu")
    of_block = kept_bytes(tower.blocks[0], base.tokens, "all", residual=torch.bfloat16, compute=torch.bfloat16)
    saved = measure_activation_bytes(VisionTower(replace(base, depth=1), ModelConfig()), autocast) + 11 * of_block
    with mock.patch.object(module, "measure_activation_bytes", return_value=saved):
        costs = tier_costs(tower, autocast)

    def plan(gib, local_batch):
        fixed = fixed_bytes(tower, autocast, local_batch=local_batch, global_batch=65_536)
        memory = int(0.94 * gib * 2**30) - fixed
        return choose_plan(StepConfig(micro_batch=512), costs, local_batch=local_batch, memory_bytes=memory)

    assert plan(77, 1024).extra_time == 0
    assert plan(77, 4096).extra_time <= 0.13
    assert set(plan(77, 65_536).tiers) == {"block", "none"}
    assert plan(137, 4096).extra_time < 0.07


def test_fixed_bytes_count_the_optimiser_and_the_batches_ahead():
    tower = build_vision_tower("eva02_micro_patch8_32", embed_dim=32)
    parameters = sum(parameter.numel() for parameter in tower.parameters())
    least = parameters * 8 + 3 * 64 * 32 * 32 * 3 + (4 * 64 + 2 * 128) * 32 * 4 + 2 * 2 * 64 * 128
    assert fixed_bytes(tower, OFF, local_batch=64, global_batch=128) == least
    low = torch.autocast("cpu", torch.bfloat16)
    assert fixed_bytes(tower, low, local_batch=64, global_batch=128) == least + 2 * parameters


class OneGpuStep:
    """What a training run of a tower holds on a device, and the plan's words on it."""

    def __init__(self, config, keep, *, images, micro_batch, device):
        torch.manual_seed(0)
        start = allocated(device)
        tower = VisionTower(config, ModelConfig()).to(device)
        objective = Objective(LossConfig(), texts=images, width=config.width, dtype=text_dtype(device), device=device)
        self.optimizer = build_optimizer(tower, objective, OptimConfig(steps=1))
        self.gradients = build_gradients(tower, objective, None)
        autocast = autocast_for(device, "bf16")
        weights_and_gradients = allocated(device) - start
        step = StepConfig(micro_batch=micro_batch, keep=keep)
        self.plan = choose_plan(step, tier_costs(tower, autocast), local_batch=images, memory_bytes=2**40)
        fixed = fixed_bytes(tower, autocast, local_batch=images, global_batch=images)
        self.predicted = start + weights_and_gradients + fixed + self.plan.activation_bytes
        settings = {"masks_duplicates": False, "world": World(0, 1, device, None), "autocast": autocast, "seed": 0}
        self.step = LargeBatchStep(tower, objective, self.gradients, self.plan, **settings)
        shape = (images, config.image_size, config.image_size, 3)
        # Of the step in work, of the one queued behind it, and on its way to the one after.
        self.images = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(3)]
        self.text = torch.nn.functional.normalize(torch.randn(images, config.width, device=device), dim=-1)
        self.ids = torch.arange(images, device=device)

    def take(self, number):
        self.gradients.zero()
        result = self.step(number, self.images[number], self.text, self.ids)
        self.gradients.clip(1.0)
        self.optimizer.step()
        return result.loss


def allocated(device):
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


SHALLOW = replace(VISION_CONFIGS["eva02_base_patch16_224"], depth=6)


def test_the_plan_foresees_the_peak_of_a_gpu(device):
    """On a CPU, in small, only that every tier takes its steps; its references hold other things than the kernels."""
    config, images = (SHALLOW, 128) if device.type == "cuda" else (VISION_CONFIGS["eva02_micro_patch8_32"], 8)
    told = {}
    for tier in get_args(Tier):
        run = OneGpuStep(config, tier, images=images, micro_batch=images // 2, device=device)
        assert run.plan.tiers == (tier,) * 2
        assert run.take(0).isfinite()  # after which the optimiser has its moments, and cuBLAS its workspace
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        assert run.take(1).isfinite()
        if device.type == "cuda":
            told[tier] = torch.cuda.max_memory_allocated(device) / run.predicted
        del run
    for tier, share in told.items():
        print(f"{tier:8} {share:.3f} of the predicted peak")
    assert all(0.9 <= share <= 1.1 for share in told.values()), told


def test_memory_is_the_setting_or_a_share_of_what_is_free():
    available = partial(available_bytes, torch.device("cpu"))
    assert available(1.5, fixed_bytes=MEBI) == int(1.5 * 2**30)
    assert 0 < available(None, fixed_bytes=0) < 2**50
    assert available(None, fixed_bytes=2**60) == 0
