"""The large-batch step: the same losses and weights whatever is kept, however the batch is cut, on however many ranks.

Run as a script this file is one rank of four: `python test_step.py RANK FOLDER`.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from textlock.data.loader import Batch
from textlock.engine.distributed import World
from textlock.engine.feed import Feed
from textlock.engine.metrics import QueuedStep
from textlock.engine.objective import LossConfig, Objective
from textlock.engine.optim import OptimConfig, build_gradients, build_optimizer, set_learning_rate
from textlock.engine.plan import Plan, TierCost
from textlock.engine.sharding import full_tensor, shard_tower
from textlock.engine.step import LargeBatchStep, autocast_for, text_dtype
from textlock.models.vision import build_vision_tower
from textlock.tests.engine.training import MICRO, Operations

BATCH, STEPS, WORLD_SIZE = 24, 3, 4
CPU = torch.device("cpu")
SINGLE = World(0, 1, CPU, None)
OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)
COSTS = dict.fromkeys(("all", "no-mlp", "lean", "block", "none"), TierCost(1, 1, 0.0))
TIERS = list(COSTS)
OPTIM = OptimConfig(steps=STEPS, eps=1e-4, learning_rate=1e-3, warmup_steps=1)

OBJECTIVES = {
    "infonce": LossConfig(),
    "masked": LossConfig(mask_duplicates=True),
    "bank": LossConfig(mask_duplicates=True, text_bank=31),
    "small bank": LossConfig(text_bank=7),
    "sigmoid": LossConfig(objective="sigmoid", initial_logit_scale=10.0, initial_logit_bias=-3.0),
    "image_to_text": LossConfig(objective="image_to_text", mask_duplicates=True, text_bank=31),
}
COUPLED = [name for name, config in OBJECTIVES.items() if config.objective == "infonce"]


def make_tower(dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    tower = build_vision_tower(MICRO, **arguments)
    with torch.no_grad():  # the latent starts at zero, where the query's own gradient vanishes
        tower.pool.latent.normal_()
    return tower.to(dtype)


def batch_of(step):
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
    # What float16 holds: a GPU gathers text rows in it.
    text = F.normalize(torch.randn(BATCH, 64, generator=generator), dim=-1).half().float()
    ids = torch.randint(0, 40, (BATCH,), generator=generator)
    return images, text, ids


class Training:
    """A tower, its objective and its optimiser, on one rank."""

    def __init__(self, name, *, tiers=("all",), world=SINGLE, tower=None, sharded=False, autocast=OFF):
        self.config = OBJECTIVES[name]
        self.world = world
        self.tower = (tower or make_tower()).to(world.device)
        if sharded:
            shard_tower(self.tower, world)
        dtype = text_dtype(world.device)
        self.objective = Objective(self.config, texts=BATCH, width=64, dtype=dtype, device=world.device)
        self.optimizer = build_optimizer(self.tower, self.objective, OPTIM)
        self.gradients = build_gradients(self.tower, self.objective, world.group if sharded else None)
        self.local = BATCH // world.world_size
        plan = Plan(tuple(tiers), self.local // len(tiers), "lean", COSTS, self.objective.couples_images)
        masks = self.config.mask_duplicates
        settings = {"masks_duplicates": masks, "world": world, "autocast": autocast, "seed": 1}
        self.step = LargeBatchStep(self.tower, self.objective, self.gradients, plan, **settings)

    def parameters(self):
        return {**dict(self.tower.named_parameters()), **dict(self.objective.named_parameters())}

    def gradients_at(self, step):
        """Return the result of a step and the gradient of the global loss by parameter."""
        own = slice(self.world.rank * self.local, (self.world.rank + 1) * self.local)
        self.gradients.zero()
        self.gradients.report(stop=self.world.rank == 1, skipped={"empty": self.world.rank})
        result = self.step(step, *(part[own].to(self.world.device) for part in batch_of(step)))
        return result, {name: parameter.grad.clone() for name, parameter in self.parameters().items()}

    def move(self, step):
        """Clip the gradients and take the optimiser's step; return the norm that they had."""
        set_learning_rate(self.optimizer, OPTIM, step, STEPS)
        norm = self.gradients.clip(1.0)
        self.optimizer.step()
        return norm

    def train(self):
        """Return losses, and weights after the last step."""
        losses, norms = [], []
        for step in range(STEPS):
            result, _ = self.gradients_at(step)
            losses.append(result.loss)
            norms.append(self.move(step))
        weights = {name: full_tensor(parameter.detach()) for name, parameter in self.parameters().items()}
        return {"losses": torch.stack(losses), "norms": torch.stack(norms), **weights}


@cache
def dense_float64(name, steps=1):
    """An independent step: one graph, one dense matrix of logits, torch's own losses, float64."""
    config = OBJECTIVES[name]
    twin = make_tower(torch.float64, block="plain")
    log_scale = torch.tensor(config.initial_logit_scale, dtype=torch.float64).log().requires_grad_()
    bias = torch.tensor(config.initial_logit_bias, dtype=torch.float64, requires_grad=True)
    images, text, ids = batch_of(steps - 1)
    earlier = [batch_of(step)[1:] for step in range(steps - 1)]
    of_bank = zip((text[:0], ids[:0]), *(earlier if config.text_bank else ()), strict=True)
    bank_text, bank_ids = (torch.cat(parts)[-config.text_bank :] for parts in of_bank)
    candidates, candidate_ids = torch.cat((text, bank_text)).double(), torch.cat((ids, bank_ids))
    logits = log_scale.exp() * F.normalize(twin(images), dim=-1) @ candidates.T
    if config.objective == "sigmoid":
        signs = 2 * torch.eye(BATCH, len(candidates), dtype=torch.float64) - 1
        loss = -F.logsigmoid(signs * (logits + bias)).sum() / BATCH
    else:
        if config.mask_duplicates:
            same = (ids[:, None] == candidate_ids) & ~torch.eye(BATCH, len(candidates), dtype=torch.bool)
            logits = logits.masked_fill(same, -torch.inf)
        target = torch.arange(BATCH)
        loss = F.cross_entropy(logits, target)
        if config.objective == "infonce":
            loss = (loss + F.cross_entropy(logits[:, :BATCH].T, target)) / 2
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    return loss, {**gradients, "log_logit_scale": log_scale.grad, "logit_bias": bias.grad}


def assert_same_path(found, expected):
    """Compare losses, norms and weights to a rounding. The norm is one long sum, on a CPU no better."""
    for name, value in expected.items():
        rtol = 2e-5 if name == "norms" else 1e-6
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


PLANS = {
    "one kept": ("all",),
    "one twice": ("none",),
    "every tier": ("all", "no-mlp", "lean", "block", "none", "none"),
    "eight": ("lean",) * 8,
}
# An objective that does not couple the images has no tiers to choose.
CASES = [(name, plan) for name in OBJECTIVES for plan in PLANS if name in COUPLED or plan != "one twice"]


def assert_gradients(found, expected, bound=1e-4):
    for name, gradient in found.items():
        truth = expected[name]
        error = (gradient.cpu() - truth).norm() / truth.norm().clamp(min=1e-7)
        assert error < bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_gradients_are_those_of_a_dense_float64_step(name, plan, device):
    """In float32, but for the loss on a GPU, which rounds image rows to float16 and the weights of pairs too."""
    tiers = PLANS[plan] if name in COUPLED else ("lean",) * len(PLANS[plan])
    expected_loss, expected = dense_float64(name)
    training = Training(name, tiers=tiers, world=World(0, 1, device, None), autocast=autocast_for(device, "fp32"))
    result, found = training.gradients_at(0)
    assert result.loss.item() == pytest.approx(expected_loss.item(), rel=1e-5 if device.type == "cpu" else 1e-4)
    assert_gradients(found, expected, 1e-4 if device.type == "cpu" else 5e-3)


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("name", ["bank", "small bank", "image_to_text"])
def test_a_bank_holds_the_last_texts_of_earlier_steps(name, steps):
    training = Training(name, tiers=("lean",) * 3)
    for step in range(steps):
        result, found = training.gradients_at(step)
    expected_loss, expected = dense_float64(name, steps)
    assert result.loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert_gradients(found, expected)


def test_a_resumed_bank_goes_on():
    whole, part, resumed = (Training("bank") for _ in range(3))
    for step in range(3):
        whole.gradients_at(step)
    for step in range(2):
        part.gradients_at(step)
    resumed.objective.load_state_dict(part.objective.state_dict())
    resumed.gradients_at(2)
    assert torch.equal(resumed.objective.bank_rows, whole.objective.bank_rows)
    assert resumed.gradients_at(3)[0].loss == whole.gradients_at(3)[0].loss


@pytest.mark.parametrize("tier", TIERS[1:])
def test_what_is_recomputed_changes_no_bit(tier, device):
    """In the arithmetic that each device trains in."""
    settings = {"world": World(0, 1, device, None), "autocast": autocast_for(device, "auto")}
    kept, recomputed = (
        Training("infonce", tiers=(chosen,) * 3, **settings).gradients_at(0)[1] for chosen in ("all", tier)
    )
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize(
    ("tiers", "forwards"),
    [(("all",) * 3, 24), (("lean", "no-mlp", "block"), 24), (("none",) * 3, 48), (("all", "none", "none"), 40)],
)
def test_images_go_forward_as_often_as_the_plan_says(tiers, forwards):
    training = Training("infonce", tiers=tiers)
    seen = []
    training.tower.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    result, _ = training.gradients_at(0)
    assert sum(seen) == result.images_forward == forwards


@pytest.mark.parametrize("name", ["sigmoid", "image_to_text"])
def test_objectives_that_do_not_couple_keep_one_micro_batch(name):
    """Each backward runs before the next forward, and no forward runs twice."""
    training = Training(name, tiers=("lean",) * 4)
    events = []
    training.tower.register_forward_hook(lambda module, inputs, output: events.append("forward"))
    training.tower.patch_embed.weight.register_hook(lambda _: events.append("backward"))
    result, _ = training.gradients_at(0)
    assert events == ["forward", "backward"] * 4
    assert result.images_forward == BATCH


def test_random_draws_of_a_second_forward_are_those_of_the_first():
    """With patch dropout the tiers still agree, and another step draws other patches."""

    def run(tier, step=0):
        return Training("infonce", tiers=(tier,) * 3, tower=make_tower(kept_patches=7)).gradients_at(step)

    kept, twice = run("all"), run("none")
    assert all(torch.equal(kept[1][name], twice[1][name]) for name in kept[1])
    with mock.patch(f"{__name__}.batch_of", return_value=batch_of(0)):
        assert run("all", step=1)[0].loss != kept[0].loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_embeddings_of_all_images_are_held_only_where_they_are_coupled(name):
    training = Training(name, tiers=("lean",) * 4)
    with Operations() as operations:
        training.gradients_at(0)
    assert (("aten::empty", (BATCH, training.tower.embed_dim)) in operations.seen) == (name in COUPLED)
    held = [value for value in vars(training.step).values() if isinstance(value, torch.Tensor)]
    assert held == [], "a step leaves nothing behind"


@contextmanager
def no_waiting(device):
    """Refuse what makes the host wait: on a GPU whatever torch sees wait, on a CPU the operations that would."""
    if device.type == "cpu":
        with Operations() as operations:
            yield
        for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique2"):
            assert not operations.count(f"aten::{name}"), name
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_host_waits_for_nothing(name, device):
    """But for the numbers of the step before, which a GPU has behind it by then."""
    tiers = ("lean",) * 2 if name not in COUPLED else ("all", "none")
    settings = {"world": World(0, 1, device, None), "autocast": autocast_for(device, "auto")}
    training = Training(name, tiers=tiers, **settings)
    batches = [[part.to(device) for part in batch_of(step)] for step in range(4)]

    def take(step):
        training.gradients.zero()
        training.gradients.report(stop=False, skipped={"empty": 1})
        result = training.step(step, *batches[step])
        norm = training.move(0)
        batch = mock.Mock(position=8, epoch=0)
        return QueuedStep(step, batch, 0.1, result, norm, training.gradients.reported()), norm

    for step in range(2):  # kernels are compiled and the optimiser's moments made
        queued, norm = take(step)
    with no_waiting(device):
        for step in range(2, 4):
            before = queued
            queued, norm = take(step)
            if device.type == "cuda":
                assert before.wait().step == step - 1
    with pytest.raises((AssertionError, RuntimeError), match=r"_local_scalar_dense|synchronizing"), no_waiting(device):
        norm.item()
    assert queued.wait().grad_norm == norm.item()


def test_a_feed_encodes_what_is_not_stored():
    images, rows, ids = batch_of(0)
    tower = mock.Mock(encode=mock.Mock(return_value=rows))
    online = Batch(images, ["a"], None, ids, ["key"], epoch=0, position=len(ids), skipped_by_kind={})
    stored = replace(online, captions=["b"], text_embeddings=rows + 1)
    feed = Feed(iter([online, stored]), tower, CPU)
    first, second = next(feed), next(feed)
    tower.encode.assert_called_once_with(["a"])
    assert torch.equal(first.text, rows) and torch.equal(second.text, F.normalize(rows + 1, dim=-1))
    assert replace(first, text_embeddings=None) == online and second.ids is ids


RANKED = {
    "infonce": ("infonce", ("all",)),
    "every tier": ("bank", ("no-mlp", "lean", "none")),
    "image_to_text": ("image_to_text", ("lean", "lean")),
    "sigmoid": ("sigmoid", ("lean",)),
    "fsdp, all": ("infonce", ("all",)),
    "fsdp, every tier": ("bank", ("all", "block", "none")),
    "fsdp, other tiers": ("masked", ("no-mlp", "lean", "none")),
    "fsdp, image_to_text": ("image_to_text", ("lean", "lean")),
    "fsdp, sigmoid": ("sigmoid", ("block",)),
}


def watched(gradients):
    """Record this rank's share of a block when its sum is asked for, and of all when the rest is; sum only then."""
    asked, at_end, waiting = [], [], []
    start, finish = gradients.start_reduction, gradients.finish_reduction

    def start_later(parameters, group):
        waiting.append(list(parameters))
        asked.append((waiting[-1], [parameter.grad.clone() for parameter in waiting[-1]], len(at_end)))

    def finish_all(group):
        at_end.append({parameter: parameter.grad.clone() for parameter in gradients._parameters})
        for parameters in waiting:
            start(parameters, group)
        waiting.clear()
        finish(group)

    gradients.start_reduction, gradients.finish_reduction = start_later, finish_all
    return asked, at_end


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    world = World(rank, WORLD_SIZE, CPU, dist.group.WORLD)
    torch.set_num_threads(1)
    for case, (name, tiers) in RANKED.items():
        sharded = case.startswith("fsdp")
        training = Training(name, tiers=tiers, world=world, sharded=sharded)
        asked, at_end = watched(training.gradients)
        result = training.train()
        assert training.gradients.reported().tolist()[:2] == [1.0, sum(range(WORLD_SIZE))]
        torch.save(result, f"{folder}/{case}-{rank}.pt")
        if sharded:
            assert not asked, "FSDP sums by itself"
            with Operations() as operations:
                training.gradients_at(0)
            sums = operations.count("reduce_scatter")
            assert sums == len(training.tower.blocks) + 1, "once a step, whatever the number of micro-batches"
            continue
        # When the sum of a block is asked for, its gradients are whole: they do not change any more.
        assert len(asked) == STEPS * len(training.tower.blocks)
        for parameters, shares, step in asked:
            assert all(torch.equal(at_end[step][p], share) for p, share in zip(parameters, shares, strict=True))
            assert all(share.any() for share in shares)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Return losses and weights after some steps by case: of one process, and of every rank of four."""
    results = {case: [Training(name, tiers=tiers).train()] for case, (name, tiers) in RANKED.items()}
    folder = tmp_path_factory.mktemp("ranks")
    command, environment = [sys.executable, __file__], os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(WORLD_SIZE)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0] * WORLD_SIZE
    for case in RANKED:
        results[case] += [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", RANKED)
def test_ranks_train_as_one_process(ranked, case):
    alone, first, *others = ranked[case]
    assert (alone["losses"].diff() != 0).all()
    assert all(torch.equal(other[name], first[name]) for other in others for name in first), "ranks differ"
    assert_same_path(first, alone)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
