"""A tower divided among two ranks: what each holds, gathers, plans and writes is what a whole tower would have it be.

Run as a script this file is one rank: `python test_sharding.py RANK FOLDER`.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from textlock.engine.checkpoint import Progress, read_checkpoint, restore
from textlock.engine.distributed import World
from textlock.engine.objective import LossConfig
from textlock.engine.optim import ShardedGradients, build_optimizer
from textlock.engine.plan import fixed_bytes, tier_costs
from textlock.engine.sharding import full_tensor, gathered, local_shard, shard_tower, sum_after_backward
from textlock.engine.step import autocast_for, image_rows
from textlock.models.vision import VISION_CONFIGS, ModelConfig, VisionTower, build_vision_tower
from textlock.tests.engine.training import MICRO, Operations, config_of, objective_of, save

RANKS = 2
CPU = torch.device("cpu")
OFF = autocast_for(CPU, "fp32")
CONFIG = config_of()


def make_tower(**arguments) -> VisionTower:
    torch.manual_seed(0)
    tower = build_vision_tower(MICRO, embed_dim=24, **arguments)
    torch.nn.init.normal_(tower.pool.latent)
    return tower


def images(count, seed=0):
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Trained:
    """A tower, its objective and its optimiser; sharded, it has taken a step."""

    def __init__(self, world=None, seed=0):
        self.tower = make_tower()
        if world is not None:
            shard_tower(self.tower, world)
        self.objective = objective_of(LossConfig(), width=24)
        self.optimizer = build_optimizer(self.tower, self.objective, CONFIG.optim)
        if world is None:
            return
        self.gradients = ShardedGradients(self.tower.parameters(), self.objective.parameters(), world.group)
        self.gradients.zero()
        self.tower(images(4, seed + world.rank)).square().sum().backward()
        self.objective.log_logit_scale.grad.fill_(1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2
        self.optimizer.step()

    def restored(self, checkpoint):
        restore(checkpoint, self.tower, self.objective, self.optimizer)
        return self


def every_parameter_has_a_gradient_that_is_the_sum(world, folder):
    tower, alone = make_tower(), make_tower()
    shard_tower(tower, world)
    tower(images(4, world.rank)).square().sum().backward()
    alone(torch.cat([images(4, rank) for rank in range(RANKS)])).square().sum().backward()
    for (name, parameter), twin in zip(tower.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(
            full_tensor(parameter.grad), twin.grad, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: n + t
        )


def a_rank_holds_half(world, folder):
    trained = Trained(world)
    parameters = list(trained.tower.parameters())
    moments = [trained.optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
    half = sum(parameter.numel() for parameter in parameters) * 4 / RANKS
    for tensors, times in ((parameters, 1), ([p.grad for p in parameters], 1), (moments, 2)):
        storages = [local_shard(tensor).untyped_storage() for tensor in tensors]  # gradients of a block share one
        held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        assert held == pytest.approx(times * half, rel=0.02)


def nothing_is_exchanged_while_gathered(world, folder):
    trained = Trained(world)
    alone = make_tower()
    alone.load_state_dict({name: full_tensor(tensor) for name, tensor in trained.tower.state_dict().items()})
    for _ in range(2):
        with gathered(trained.tower), torch.no_grad():
            with Operations() as operations:
                for _ in range(1 + 2 * world.rank):  # ranks make different numbers of forwards
                    found = trained.tower(images(3))
            assert operations.count("c10d::") == 0
        torch.testing.assert_close(found, alone(images(3)))
        # What was gathered is given up again, and a training step runs as before.
        local = sum(local_shard(parameter).numel() for parameter in trained.tower.parameters())
        assert local < 0.52 * sum(parameter.numel() for parameter in alone.parameters())
        with Operations() as operations:
            trained.tower(images(2)).sum().backward()
        assert operations.count("c10d::") > 0


def a_checkpoint_is_whole_and_restores_anywhere(world, folder):
    trained = Trained(world)
    path = save(folder / "checkpoints", trained, CONFIG, Progress(step=1), writes=world.is_main)
    dist.barrier()
    saved = read_checkpoint(path)
    for name, tensor in trained.tower.state_dict().items():
        assert torch.equal(saved.model[name], full_tensor(tensor)), name

    sharded, replicated = Trained(world, seed=5).restored(saved), Trained().restored(saved)
    towers = (trained.tower, sharded.tower, replicated.tower)
    for (name, source), mine, theirs in zip(
        towers[0].named_parameters(), *(tower.parameters() for tower in towers[1:]), strict=True
    ):
        assert torch.equal(local_shard(mine), local_shard(source)), name
        assert torch.equal(full_tensor(mine.detach()), theirs), name
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            value = sharded.optimizer.state[mine][moment]
            assert torch.equal(local_shard(value), local_shard(trained.optimizer.state[source][moment])), (name, moment)
            assert torch.equal(full_tensor(value), replicated.optimizer.state[theirs][moment]), (name, moment)
    # A folder written by another number of ranks has the same bytes.
    if world.is_main:
        again = save(folder / "again", replicated, CONFIG, Progress(step=1))
        for name in ("model.safetensors", "trainer.safetensors"):
            assert (again / name).read_bytes() == (path / name).read_bytes()


def costs_are_those_of_a_whole_tower(world, folder):
    for block in ("fused", "plain"):
        tower = make_tower(block=block)
        expected = tier_costs(tower, OFF)
        shard_tower(tower, world)
        with gathered(tower):
            assert tier_costs(tower, OFF) == expected


def low_precision_is_that_of_a_whole_tower(world, folder):
    """With two forwards between a forward and its backward, as micro-batches have them."""
    micro = VISION_CONFIGS[MICRO]
    autocast = autocast_for(CPU, "bf16")
    scaled = replace(micro, layer_scale=0.5)
    forms = [(keep, micro, block) for keep in ("all", "block") for block in ("fused", "plain")]
    for keep, config, block in (*forms, ("lean", scaled, "fused")):
        towers = []
        for sharded in (False, True):
            torch.manual_seed(0)
            tower = VisionTower(config, ModelConfig(block=block))
            torch.nn.init.normal_(tower.pool.latent)
            if sharded:
                shard_tower(tower, world)
            outputs = [image_rows(tower, images(4, seed), autocast, keep) for seed in range(2)]
            for number, output in enumerate(outputs):
                if sharded:
                    sum_after_backward(tower, number == 1)
                output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(number)))
            towers.append(tower)
        for (name, twin), parameter in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
            error = (full_tensor(parameter.grad) / RANKS - twin.grad).norm() / twin.grad.norm()
            assert error < 1e-5, (keep, block, name, error)


CHECKS = (
    every_parameter_has_a_gradient_that_is_the_sum,
    a_rank_holds_half,
    nothing_is_exchanged_while_gathered,
    a_checkpoint_is_whole_and_restores_anywhere,
    costs_are_those_of_a_whole_tower,
    low_precision_is_that_of_a_whole_tower,
)
CASES = {check.__name__: check for check in CHECKS}


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    world = World(rank, RANKS, CPU, dist.group.WORLD)
    for name, check in CASES.items():
        check(world, folder)
        (folder / f"{name}-{rank}").touch()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Run both ranks; a case that both have passed leaves a file of each, and the first that fails ends them."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in range(RANKS)]
    ranks = [subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) for words in commands]
    return folder, "".join(rank.communicate(timeout=300)[1] for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sharded(ranked, case):
    folder, said = ranked
    assert all((folder / f"{case}-{rank}").exists() for rank in range(RANKS)), said


def test_fixed_bytes_are_divided():
    tower = make_tower()
    parameters = sum(parameter.numel() for parameter in tower.parameters())
    sizes = {"local_batch": 64, "global_batch": 128}
    few, many = (fixed_bytes(tower, OFF, **sizes, shards=shards) for shards in (2, 16))
    assert few - many == parameters * 12 // 2 - parameters * 12 // 16 > 0


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
