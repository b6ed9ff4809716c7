"""The schedule, the parameter groups, the flat gradients."""

import itertools
import math

import pytest
import torch
from torch import nn

from textlock.engine.optim import FlatGradients, OptimConfig, build_optimizer, learning_rate, parameter_groups
from textlock.models.vision import build_vision_tower

TOTAL, WARMUP = 100, 10
CONFIG = OptimConfig(steps=TOTAL, learning_rate=2.0, warmup_steps=WARMUP)


def test_warm_up_is_a_line_from_zero_to_the_peak():
    rates = [learning_rate(CONFIG, step, TOTAL) for step in range(WARMUP)]
    assert rates == pytest.approx([2.0 * (step + 1) / WARMUP for step in range(WARMUP)])


def test_cosine_falls_to_zero_and_never_rises_again():
    rates = [learning_rate(CONFIG, step, TOTAL) for step in range(WARMUP, TOTAL + 300)]
    assert rates[0] == 2.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert rates[TOTAL - WARMUP :] == [0.0] * 300
    middle = (TOTAL - WARMUP) // 2
    assert rates[middle] == pytest.approx(1.0)


def test_a_run_shorter_than_its_warm_up_still_ends_at_the_peak():
    assert learning_rate(CONFIG, 4, 5) == 2.0


def test_epochs_become_steps():
    assert OptimConfig(epochs=2.5).total_steps(10) == 25
    assert OptimConfig(steps=7).total_steps(10) == 7


def test_the_released_clipping_divides_the_threshold_by_the_world_size():
    assert OptimConfig(steps=1, released_clipping=True).clip_norm(16) == 0.0625
    assert OptimConfig(steps=1).clip_norm(16) == 1.0


def test_weight_decay_reaches_matrices_only_and_knows_the_head():
    tower = build_vision_tower("eva02_micro_patch8_32", embed_dim=24)
    scale = nn.Parameter(torch.zeros(()))
    config = OptimConfig(steps=1, tower_weight_decay=0.1, head_weight_decay=0.2)
    names = {id(parameter): name for name, parameter in tower.named_parameters()} | {id(scale): "scale"}
    decayed = {
        names[id(parameter)]: group["weight_decay"]
        for group in parameter_groups(tower, scale, config)
        for parameter in group["params"]
    }
    assert decayed.keys() == set(names.values())
    for name, decay in decayed.items():
        is_matrix = name.endswith("weight") and "norm" not in name
        in_head = name.startswith(("pool.", "projection."))
        assert decay == ((0.2 if in_head else 0.1) if is_matrix else 0.0), name


def test_flat_gradients_are_what_autograd_fills_and_the_optimiser_reads():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
    expected = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
    expected.load_state_dict(module.state_dict())
    scale = nn.Parameter(torch.tensor(1.5))
    gradients = FlatGradients([*module.parameters(), scale])
    for _ in range(2):  # a second pass accumulates, a zero() starts over
        gradients.zero()
        inputs = torch.randn(4, 5)
        (module(inputs) * scale).square().sum().backward()
        expected.zero_grad()
        (expected(inputs) * 1.5).square().sum().backward()
    for mine, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    norm = gradients.clip(0.1)
    every = [*(p.grad for p in expected.parameters()), scale.grad * norm / 0.1]
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in every)), rel=1e-5)
    clipped = math.sqrt(sum(p.grad.square().sum().item() for p in [*module.parameters(), scale]))
    assert clipped == pytest.approx(0.1, rel=1e-4)

    before = module[0].weight.detach().clone()
    optimizer = build_optimizer(module, scale, OptimConfig(steps=1))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert (module[0].weight - before).abs().max() > 0.05


def test_small_gradients_are_not_scaled_up():
    parameter = nn.Parameter(torch.ones(3))
    gradients = FlatGradients([parameter])
    (parameter * 1e-3).sum().backward()
    gradients.clip(1.0)
    torch.testing.assert_close(parameter.grad, torch.full((3,), 1e-3))


def test_the_report_slots_are_no_gradient():
    parameter = nn.Parameter(torch.ones(3))
    gradients = FlatGradients([parameter])
    gradients.report(stop=True, skipped={"damaged": 12, "new": 1, "newer": 2})
    assert gradients.clip(1.0).item() == 0.0
    assert gradients.reported() == (True, {"damaged": 12, "other": 3})
    gradients.zero()
    assert gradients.reported() == (False, {})
