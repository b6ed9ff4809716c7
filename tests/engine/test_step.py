"""The large-batch step: the same gradients whatever is kept and however the batch is cut."""

import pytest
import torch
import torch.nn.functional as F

from textlock.engine.config import LossConfig
from textlock.engine.distributed import World
from textlock.engine.optim import FlatGradients
from textlock.engine.plan import Plan
from textlock.engine.step import LargeBatchStep
from textlock.models.vision import build_vision_tower

BATCH = 24
SINGLE = World(0, 1, torch.device("cpu"), None)
OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    tower = build_vision_tower("eva02_micro_patch8_32")
    with torch.no_grad():  # the latent starts at zero, where the query's own gradient vanishes
        tower.pool.latent.normal_()
    images = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8)
    text = F.normalize(torch.randn(BATCH, tower.embed_dim), dim=-1)
    ids = torch.randint(0, 16, (BATCH,))
    return tower, images, text, ids


def gradients_of(problem, tiers, micro_batch, mask_duplicates=False):
    tower, images, text, ids = problem
    scale = torch.nn.Parameter(torch.tensor(2.0))
    flat = FlatGradients([*tower.parameters(), scale])
    loss = LossConfig(mask_duplicates=mask_duplicates)
    plan = Plan(tiers, micro_batch, 1)
    step = LargeBatchStep(tower, scale, flat, plan, loss=loss, world=SINGLE, autocast=OFF, seed=1)
    result = step(0, images, text, ids)
    named = {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}
    return result, {**named, "scale": scale.grad.clone()}


def dense_float64(problem, mask_duplicates):
    """An independent step: one graph, one dense matrix of logits, torch's cross entropy, float64."""
    tower, images, text, ids = problem
    twin = build_vision_tower("eva02_micro_patch8_32", dtype=torch.float64)
    twin.load_state_dict(tower.state_dict())
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    logits = scale.exp() * F.normalize(twin(images), dim=-1) @ text.double().T
    if mask_duplicates:
        same = (ids[:, None] == ids[None]) & ~torch.eye(BATCH, dtype=torch.bool)
        logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(BATCH)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    return loss, {**{name: parameter.grad for name, parameter in twin.named_parameters()}, "scale": scale.grad}


@pytest.mark.parametrize("mask_duplicates", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    ("tiers", "micro_batch"),
    [(("all",), 24), (("none",), 24), (("all",) * 3, 8), (("none",) * 3, 8), (("all", "none", "none", "none"), 6)],
    ids=["one kept", "one twice", "three kept", "three twice", "mixed"],
)
def test_gradients_are_those_of_a_dense_float64_step(problem, tiers, micro_batch, mask_duplicates):
    expected_loss, expected = dense_float64(problem, mask_duplicates)
    result, found = gradients_of(problem, tiers, micro_batch, mask_duplicates)
    assert result.loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-7)
        assert error < 1e-4, f"{name}: {error:.2e}"


def test_a_second_forward_changes_no_bit(problem):
    kept = gradients_of(problem, ("all",) * 3, 8)[1]
    twice = gradients_of(problem, ("none",) * 3, 8)[1]
    assert all(torch.equal(kept[name], twice[name]) for name in kept)


@pytest.mark.parametrize(("tiers", "forwards"), [(("all",) * 3, 24), (("none",) * 3, 48), (("all", "none", "all"), 32)])
def test_images_are_run_as_often_as_the_plan_says(problem, tiers, forwards):
    tower = problem[0]
    seen = []
    hook = tower.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        result, _ = gradients_of(problem, tiers, 8)
    finally:
        hook.remove()
    assert sum(seen) == result.images_forward == forwards


def test_random_draws_of_a_second_forward_are_those_of_the_first(problem):
    """With dropout in the tower the tiers still agree, and another step draws anew."""
    tower = problem[0]
    hook = tower.patch_embed.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.3))
    try:
        kept = gradients_of(problem, ("all",) * 3, 8)[1]
        twice = gradients_of(problem, ("none",) * 3, 8)[1]
    finally:
        hook.remove()
    plain = gradients_of(problem, ("all",) * 3, 8)[1]
    assert all(torch.equal(kept[name], twice[name]) for name in kept)
    assert not torch.equal(kept["patch_embed.weight"], plain["patch_embed.weight"])
