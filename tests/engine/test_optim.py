"""The schedule, the parameter groups, the optimisers, the flat gradients."""

import importlib
import math
import sys
import types

import pytest
import torch
from torch import nn

from textlock.data.loader import SKIP_KINDS
from textlock.engine import optim
from textlock.engine.checkpoint import Progress, read_checkpoint, restore
from textlock.engine.objective import LossConfig
from textlock.engine.optim import FlatGradients, OptimConfig, build_optimizer, learning_rate, parameter_groups
from textlock.models.vision import build_vision_tower, make_vision_tower

from .training import MICRO, config_of, objective_of, save

TOTAL, WARMUP = 100, 10
CONFIG = OptimConfig(steps=TOTAL, learning_rate=2.0, warmup_steps=WARMUP)


def test_warm_up_is_a_line_from_zero_to_the_peak():
    rates = [learning_rate(CONFIG, step, TOTAL) for step in range(WARMUP)]
    assert rates == pytest.approx([2.0 * (step + 1) / WARMUP for step in range(WARMUP)])


def test_cosine_falls_to_zero_and_never_rises_again():
    rates = [learning_rate(CONFIG, step, TOTAL) for step in range(WARMUP, TOTAL + 300)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[(TOTAL - WARMUP) // 2]) == (2.0, pytest.approx(1.0))
    assert rates[TOTAL - WARMUP :] == [0.0] * 300


def test_a_run_shorter_than_its_warm_up_still_ends_at_the_peak():
    assert learning_rate(CONFIG, 4, 5) == 2.0


def test_epochs_become_steps():
    assert OptimConfig(epochs=2.5).total_steps(10) == 25
    assert OptimConfig(steps=7).total_steps(10) == 7


def test_the_released_clipping_divides_the_threshold_by_the_world_size():
    assert OptimConfig(steps=1, released_clipping=True).clip_norm(16) == 0.0625
    assert OptimConfig(steps=1).clip_norm(16) == 1.0


def test_twenty_steps_are_those_of_the_released_optimiser():
    """Which gets gradients that are world-size times too large: AdamW sees them against its eps as well as the clip."""
    world_size, scale = 2, 1e-6
    config = OptimConfig(steps=20, warmup_steps=4, released_clipping=True, max_grad_norm=200 * scale)
    tower, objective = build_vision_tower(MICRO, embed_dim=24), objective_of(LossConfig())
    start = [parameter.detach().clone() for parameter in tower.parameters()]
    ours = build_optimizer(tower, objective, config, world_size=world_size)
    gradients = FlatGradients([*tower.parameters(), *objective.parameters()])
    theirs = [nn.Parameter(values.clone()) for values in start]
    adamw = torch.optim.AdamW(theirs, betas=config.betas, eps=config.eps, weight_decay=0.0)
    clipped = 0
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        gradients.zero()
        for mine, other in zip(tower.parameters(), theirs, strict=True):
            # Some channels have gradients that are small against eps, as those of attention's key biases are.
            drawn = torch.randn(mine.shape, generator=generator) * scale * (1e-3 if mine.ndim < 2 else 1.0)
            mine.grad.add_(drawn)
            other.grad = world_size * drawn
        norm = gradients.clip(config.clip_norm(world_size))
        norm_of_released = nn.utils.clip_grad_norm_(theirs, config.max_grad_norm)
        assert norm_of_released == pytest.approx(world_size * norm.item(), rel=1e-5)
        clipped += norm_of_released > config.max_grad_norm
        for optimizer in (ours, adamw):
            optim.set_learning_rate(optimizer, config, step, 20)
            optimizer.step()
    assert clipped == 20, "every step is clipped"
    ends = nn.utils.parameters_to_vector(tower.parameters()).detach().double()
    moved = ends - nn.utils.parameters_to_vector(start)
    apart = ends - nn.utils.parameters_to_vector(theirs).detach()
    assert apart.norm() < 4e-5 * moved.norm()


def test_the_norm_of_many_gradients_is_not_too_small():
    """Added one after the other in float32 they would give 6e-5 too little."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3_000_001, 7, 1_200_000)]
    gradients = FlatGradients(parameters)
    for number, parameter in enumerate(parameters):
        parameter.grad.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    exact = math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in parameters))
    assert gradients.clip(1e9).item() == pytest.approx(exact, rel=2e-7)


def test_weight_decay_reaches_matrices_only_and_knows_the_head():
    tower = build_vision_tower(MICRO, embed_dim=24)
    objective = objective_of(LossConfig(objective="sigmoid"))
    config = OptimConfig(steps=1, tower_weight_decay=0.1, head_weight_decay=0.2)
    named = [*tower.named_parameters(), *objective.named_parameters()]
    names = {id(parameter): name for name, parameter in named}
    decayed = {
        names[id(parameter)]: group["weight_decay"]
        for group in parameter_groups(tower, objective, config)
        for parameter in group["params"]
    }
    assert decayed.keys() == set(names.values())
    for name, decay in decayed.items():
        is_matrix = name.endswith("weight") and "norm" not in name
        in_head = name.startswith(("pool.", "projection."))
        assert decay == ((0.2 if in_head else 0.1) if is_matrix else 0.0), name


def test_main_grad_is_the_same_memory_as_grad():
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (), (7,))]
    gradients = FlatGradients(parameters)
    for number, parameter in enumerate(parameters, start=1):
        assert parameter.main_grad.shape == parameter.shape and parameter.main_grad.dtype == torch.float32
        parameter.main_grad.add_(number)  # as a fused block does
        (parameter * 10).sum().backward()
        assert torch.equal(parameter.grad, torch.full(parameter.shape, 10.0 + number))
    norm = math.sqrt(15 * 11**2 + 12**2 + 7 * 13**2)
    assert gradients.clip(1.0).item() == pytest.approx(norm, rel=1e-6)
    assert parameters[2].main_grad.tolist() == pytest.approx([13 / norm] * 7, rel=1e-5)
    gradients.zero()
    assert not any(parameter.main_grad.any() for parameter in parameters)


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
    stops, *counts = gradients.reported().tolist()
    assert stops == 1
    assert {kind: count for kind, count in zip(SKIP_KINDS, counts, strict=True) if count} == {"damaged": 12, "other": 3}
    gradients.zero()
    assert not gradients.reported().any()


class FusedAdam(torch.optim.Optimizer):
    """What Apex's and Transformer Engine's FusedAdam have in common, on a CPU: the step count belongs to the group.

    Of their arguments those that are given; the defaults of both make the others what torch's AdamW does.
    """

    def __init__(self, params, *, lr, betas, eps, adam_w_mode):
        assert adam_w_mode and isinstance(lr, float)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                mean = state["exp_avg"].lerp_(p.grad, 1 - beta1) / (1 - beta1 ** group["step"])
                square = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2) / (1 - beta2 ** group["step"])
                p -= group["lr"] * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p)


class OfApex(FusedAdam): ...


class OfTransformerEngine(FusedAdam): ...


PACKAGES = {
    "apex": ("apex.optimizers", OfApex),
    "transformer-engine": ("transformer_engine.pytorch.optimizers", OfTransformerEngine),
}


def install(monkeypatch, name, **contents):
    """Put a module of this name, and empty ones for its parents, where imports find them."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class Training:
    """A tower and its optimiser, moved by random gradients."""

    def __init__(self, optimizer, device="cpu"):
        decay = ("--optim.tower-weight-decay", "0.1", "--optim.head-weight-decay", "0.2")
        moments = ("--optim.betas", "0.8", "0.9", "--optim.eps", "1e-3")
        self.config = config_of("--optim.optimizer", optimizer, *decay, *moments)
        torch.manual_seed(0)
        self.tower = make_vision_tower(self.config.model, image_size=32).to(device)
        self.objective = objective_of(LossConfig(), device)
        if optimizer == "torch" or device == "cuda":
            self.optimizer = build_optimizer(self.tower, self.objective, self.config.optim)
        else:  # stand-ins run on a CPU, where nothing else than torch is let through
            groups = parameter_groups(self.tower, self.objective, self.config.optim)
            self.optimizer = optim._build_fused_adam(groups, self.config.optim)
        self.gradients = FlatGradients([*self.tower.parameters(), *self.objective.parameters()])

    def run(self, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            buffer = self.gradients._buffer
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            self.optimizer.step()
        return self

    def save(self, root, step):
        return save(root, self, self.config, Progress(step=step))

    def resumed(self, folder):
        restore(read_checkpoint(folder), self.tower, self.objective, self.optimizer)
        return self

    def parameters(self):
        return {**dict(self.tower.named_parameters()), **dict(self.objective.named_parameters())}


def assert_same_path(mine, theirs):
    """The weights agree to a rounding of a step, and the counts and moments that make the next one."""
    for name, parameter in theirs.parameters().items():
        own = mine.parameters()[name]
        torch.testing.assert_close(own, parameter, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        for key in ("exp_avg", "exp_avg_sq", "step"):
            value, expected = (t.optimizer.state[p][key] for t, p in ((mine, own), (theirs, parameter)))
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, check_device=False)


CHANGES = [
    ("torch", "apex"),
    ("apex", "torch"),
    ("apex", "transformer-engine"),
    ("transformer-engine", "transformer-engine"),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_checkpoint_goes_on_with_another_optimiser(before, after, monkeypatch, tmp_path):
    for module, fused_adam in PACKAGES.values():
        install(monkeypatch, module, FusedAdam=fused_adam)
    folder = Training(before).run(range(2)).save(tmp_path, 2)
    # What it has run itself is forgotten, count included.
    resumed = Training(after).run(range(7, 8)).resumed(folder).run(range(2, 5))
    assert isinstance(resumed.optimizer, torch.optim.AdamW if after == "torch" else PACKAGES[after][1])
    assert_same_path(resumed, Training("torch").run(range(5)))


class WithoutExtensions:
    def __init__(self, params, **settings):
        raise RuntimeError("apex.optimizers.FusedAdam requires\ncuda extensions")


@pytest.mark.parametrize(
    ("name", "contents", "advice"),
    [
        pytest.param("apex", None, "github.com/NVIDIA/apex", id="PyPI's apex"),
        pytest.param("apex", {}, "github.com/NVIDIA/apex", id="no FusedAdam in apex"),
        pytest.param("apex", {"FusedAdam": WithoutExtensions}, "requires cuda extensions", id="apex in Python only"),
        pytest.param("transformer-engine", None, r"transformer-engine\[pytorch\]", id="no transformer-engine"),
    ],
)
def test_a_package_that_does_not_load_is_named(name, contents, advice, monkeypatch):
    module = PACKAGES[name][0]
    install(monkeypatch, module, **(contents or {}))
    if contents is None:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ValueError, match=rf"--optim.optimizer {name} needs .*{advice}.*choose --optim.optimizer torch"):
        optim._build_fused_adam([{"params": [nn.Parameter(torch.zeros(3))]}], OptimConfig(steps=1, optimizer=name))


def loads(name):
    try:
        return hasattr(importlib.import_module(PACKAGES[name][0]), "FusedAdam")
    except (ImportError, OSError, RuntimeError, AssertionError):
        return False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: FusedAdam of Apex and Transformer Engine")
@pytest.mark.parametrize("name", PACKAGES)
def test_other_optimisers_walk_the_path_of_torchs(name, tmp_path):
    if not loads(name):
        pytest.skip(f"{PACKAGES[name][0]} is not installed, or not FusedAdam's")
    theirs = Training("torch", "cuda").run(range(5))
    assert_same_path(Training(name, "cuda").run(range(5)), theirs)
    for before, after in (("torch", name), (name, "torch"), (name, name)):
        folder = Training(before, "cuda").run(range(2)).save(tmp_path / f"{before} {after}", 2)
        assert_same_path(Training(after, "cuda").resumed(folder).run(range(2, 5)), theirs)
