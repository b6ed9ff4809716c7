"""The limit of the logit scale: reached, never passed after a step, and left again when the loss asks for less."""

import math

import pytest
import torch

from textlock.engine.objective import LossConfig, Objective


def objective_of(**settings):
    return Objective(LossConfig(**settings), texts=2, width=4, dtype=torch.float32, device=torch.device("cpu"))


def step(objective, direction):
    """Take a step of size one of the logarithm of the scale, up or down."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    optimizer.zero_grad()
    (-direction * objective.log_logit_scale).backward()
    optimizer.step()
    objective.limit_logit_scale()


def test_the_limit_holds_after_a_step_and_the_scale_can_fall_again():
    objective = objective_of(initial_logit_scale=15, max_logit_scale=20)
    step(objective, +1)
    assert objective.logit_scale().item() == pytest.approx(20, rel=1e-6)
    step(objective, -1)
    assert objective.logit_scale().item() == pytest.approx(20 / math.e, rel=1e-6)


def test_without_a_limit_it_rises():
    objective = objective_of(initial_logit_scale=15)
    step(objective, +1)
    assert objective.logit_scale().item() == pytest.approx(15 * math.e, rel=1e-6)
    with pytest.raises(ValueError, match=r"--loss\.max-logit-scale is 0\.0, must be above 0"):
        LossConfig(max_logit_scale=0.0)
