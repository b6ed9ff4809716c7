"""Weights, gradients and moments divided among the ranks: FSDP2 (https://arxiv.org/abs/2304.11277).

Each block, and the remaining parameters as one unit, is all-gathered for its forward or backward and freed afterwards.
Gradients are summed into the rank that keeps the shard.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.block import Stream
from ..models.vision import VisionTower
from .distributed import World


def shard_tower(tower: VisionTower, world: World) -> None:
    """Divide a tower that is the same on all ranks; its parameters become DTensors on the rank's device.

    Every forward under autocast needs a separate context. Autocast caches cast weights within a context; a second
    forward would reuse them and its gradient would arrive after FSDP has reduced.

    A tower on the CPU goes to the device block by block, so that it need not fit there whole.
    """
    assert world.group is not None
    mesh = DeviceMesh.from_group(world.group, world.device.type)
    for block in tower.blocks:
        # Before FSDP's own hook, which frees the block's weights.
        block.register_forward_hook(_own_bias)
        fully_shard(block, mesh=mesh)
    fully_shard(tower, mesh=mesh)
    for module in _sharded_modules(tower):
        # The loss is a mean over the global batch already, so the gradients are summed. gloo knows sums only.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered(tower: VisionTower) -> Iterator[None]:
    """Hold all weights on every rank, so that forwards within need no other rank; all ranks must enter and leave.

    Nothing is done to a tower that is not sharded.
    """
    blocks = [block for block in tower.blocks if isinstance(block, FSDPModule)]
    for module in _sharded_modules(tower):
        module.unshard()
    for block in blocks:
        block.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True)
        for module in _sharded_modules(tower):
            module.reshard()


def is_sharded(tower: nn.Module) -> bool:
    """Whether `shard_tower` divided this tower."""
    return isinstance(tower, FSDPModule)


def sum_after_backward(tower: VisionTower, sums: bool) -> None:
    """Say whether the next backward of a sharded tower sums the gradients over the ranks, or adds to this rank's."""
    assert isinstance(tower, FSDPModule)
    tower.set_requires_gradient_sync(sums)
    tower.set_is_last_backward(sums)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all ranks; all ranks must call. What is not divided is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a divided tensor that this rank keeps, in the same memory; it may have no elements."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Divide a tensor that every rank has as ``example`` is; undivided where that is not or is of another shape."""
    if not isinstance(example, DTensor) or tensor.shape != example.shape:
        return tensor.to(example.device)
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def _sharded_modules(tower: nn.Module) -> list[FSDPModule]:
    return [module for module in tower.modules() if isinstance(module, FSDPModule)]


def _own_bias(block: nn.Module, inputs: Any, stream: Stream) -> Stream:
    """Hand on a copy of the bias that the next block adds: by then this block's parameters are freed."""
    assert stream.bias is not None
    return stream._replace(bias=stream.bias.clone())
