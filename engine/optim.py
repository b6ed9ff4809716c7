"""The optimiser: parameter groups, the learning-rate schedule, one flat gradient buffer and its clipping."""

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data.loader import SKIP_KINDS
from ..settings import FREE_ON_RESUME, Settings, above, at_least, below
from .sharding import local_shard

# 16-byte steps of float32: the fused optimiser loads four values at a time from aligned addresses.
_ALIGNMENT = 4
_PART = 2**15  # values whose squares are added in float32
_SLOTS = 1 + len(SKIP_KINDS)

# Where a package has its FusedAdam, and what to install for it.
_FUSED_ADAM = {
    "apex": (
        "apex.optimizers",
        "NVIDIA Apex with its CUDA extensions, from https://github.com/NVIDIA/apex (PyPI's apex is another project)",
    ),
    "transformer-engine": ("transformer_engine.pytorch.optimizers", "the package transformer-engine[pytorch]"),
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings, section="optim"):
    """AdamW, warm-up and cosine decay."""

    optimizer: Annotated[Literal["torch", "apex", "transformer-engine"], FREE_ON_RESUME] = "torch"
    """Implementation of AdamW: torch's fused one, or FusedAdam of NVIDIA Apex or Transformer Engine, which need a GPU.
    A checkpoint of one goes on with another."""
    steps: Annotated[int | None, at_least(1)] = None
    """Optimiser steps of the run. Give either this or epochs."""
    epochs: Annotated[float | None, above(0)] = None
    """Passes over the data; an epoch is the samples of whole global batches."""
    learning_rate: Annotated[float, at_least(0)] = 1e-3
    """Peak, reached at the end of the warm-up."""
    warmup_steps: Annotated[int, at_least(0)] = 2000
    """Steps of linear warm-up from zero."""
    betas: Annotated[tuple[float, float], at_least(0), below(1)] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: Annotated[float, above(0)] = 1e-8
    """Added to the root of AdamW's second moment."""
    tower_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Of the transformer's weight matrices. 0 for a pretrained tower."""
    head_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Of the weight matrices of the new pooling head."""
    max_grad_norm: Annotated[float, above(0)] = 1.0
    """Gradients are scaled down to this global norm."""
    released_clipping: bool = False
    """Step as the released Nomic code does: its loss is world-size times too large, so that of the true gradient its
    threshold is max_grad_norm / world size (0.0625 on 16 GPUs), and its eps is eps / world size."""

    def __post_init__(self) -> None:
        """Also refuse a schedule that is missing or given twice."""
        super().__post_init__()
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give exactly one of {self.flag('steps')} and {self.flag('epochs')}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimiser steps of the whole run."""
        return self.steps if self.steps is not None else max(1, math.floor(self.epochs * steps_per_epoch))  # type: ignore[operator]

    def clip_norm(self, world_size: int) -> float:
        """Return the threshold that applies to the gradient of the true mean loss."""
        return self.max_grad_norm / world_size if self.released_clipping else self.max_grad_norm

    def eps_of(self, world_size: int) -> float:
        """Return AdamW's eps for the gradient of the true mean loss."""
        return self.eps / world_size if self.released_clipping else self.eps


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the rate of step ``step`` (from 0): linear from zero to the peak, cosine to zero, and zero ever after.

    The line starts at zero *before* the first step, so step 0 already moves; the released code runs step 0 at the full
    peak and climbs again after the last one.
    """
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total_steps: int) -> float:
    """Give an optimiser the `learning_rate` of a step, and return it."""
    rate = learning_rate(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def parameter_groups(tower: nn.Module, objective: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Split the parameters by weight decay.

    Vectors (biases, norms, tokens, the pooling latent), the position embedding and the objective's scalars are never
    decayed; matrices of the pooling head decay by ``head_weight_decay``, all others by ``tower_weight_decay``. Sharded
    parameters and whole ones are in separate groups: one call of the fused kernel takes either.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in tower.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = sum(size > 1 for size in parameter.shape) < 2 or name == "position"
        in_head = name.startswith(("pool.", "projection."))
        decay = 0.0 if vector else config.head_weight_decay if in_head else config.tower_weight_decay
        groups.setdefault((decay, isinstance(parameter, DTensor)), []).append(parameter)
    groups.setdefault((0.0, False), []).extend(objective.parameters())
    return [{"params": parameters, "weight_decay": decay} for (decay, _), parameters in groups.items()]


def build_optimizer(
    tower: nn.Module, objective: nn.Module, config: OptimConfig, *, world_size: int = 1
) -> torch.optim.Optimizer:
    """Return the fused AdamW that the config asks for, over the groups of :func:`parameter_groups`.

    Raises ValueError where its package is not installed.
    """
    groups = parameter_groups(tower, objective, config)
    config = replace(config, eps=config.eps_of(world_size))
    if config.optimizer == "torch":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    return _build_fused_adam(groups, config)


def build_gradients(tower: nn.Module, objective: nn.Module, group: dist.ProcessGroup | None) -> "FlatGradients":
    """Return the gradients of all parameters; ``group`` is that of a sharded tower, None for whole parameters."""
    if group is None:
        return FlatGradients([*tower.parameters(), *objective.parameters()])
    return ShardedGradients(tower.parameters(), objective.parameters(), group)


def require_optimizer(config: OptimConfig, device: torch.device, *, sharded: bool) -> None:
    """Raise ValueError where the optimiser that the config asks for cannot run: on no GPU, or over parts of weights."""
    if config.optimizer != "torch" and device.type != "cuda":
        config.refuse("optimizer", "be torch where there is no GPU")
    if config.optimizer != "torch" and sharded:
        config.refuse("optimizer", "be torch with --step.sharding fsdp: the others know whole parameters only")


def _build_fused_adam(groups: list[dict[str, object]], config: OptimConfig) -> torch.optim.Optimizer:
    module, package = _FUSED_ADAM[config.optimizer]
    try:
        fused_adam = importlib.import_module(module).FusedAdam
        optimizer = fused_adam(groups, lr=0.0, betas=config.betas, eps=config.eps, adam_w_mode=True)
    # Parts of these packages that are missing show in all these ways, some of them not before the first object.
    except (ImportError, AttributeError, AssertionError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--optim.optimizer {config.optimizer} needs {package}, which does not load here ({reason}): "
            f"install it, or choose --optim.optimizer torch"
        ) from error
    optimizer.register_step_pre_hook(_count_on)
    optimizer.register_step_post_hook(_store_counts)
    return optimizer


def _count_on(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Give every group the step count of its parameters: these packages count by group, checkpoints by parameter."""
    for group in optimizer.param_groups:
        state = optimizer.state[group["params"][0]]
        if "step" in state:
            group["step"] = int(state["step"])


def _store_counts(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Store the step count next to the moments, as torch does. On the CPU, where reading it waits for no GPU."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))


def _norm(values: Tensor) -> Tensor:
    """Return the norm of values [n] (0-dim, on their device), of parts of at most _PART of them first.

    On a CPU torch adds squares in float32 one after the other: 93 M of them give a norm that is 1 % too small. A copy
    in float64 would take twice the memory of the values.
    """
    whole = len(values) // _PART * _PART
    parts = torch.linalg.vector_norm(values[:whole].view(-1, _PART), dim=1)
    rest = torch.linalg.vector_norm(values[whole:])
    return torch.linalg.vector_norm(torch.cat((parts, rest[None])).double()).float()


class FlatGradients:
    """Every gradient as a view of one float32 buffer: one all-reduce, one norm, one scaling.

    The view is the parameter's ``.grad``, for autograd and the optimiser, and its ``.main_grad``, to which the fused
    blocks add their weight gradients themselves (Megatron's and Transformer Engine's name for it).

    The buffer ends in slots that are no gradients: how many ranks were asked to stop, and how many bad samples of each
    kind were replaced in this step. The step's all-reduce carries them to every rank, at no extra message.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Allocate the buffer and point ``.grad`` and ``.main_grad`` of every parameter into it."""
        self._parameters = list(parameters)
        sizes = [math.ceil(parameter.numel() / _ALIGNMENT) * _ALIGNMENT for parameter in self._parameters]
        self._buffer = torch.zeros(sum(sizes) + _SLOTS, device=self._parameters[0].device, dtype=torch.float32)
        self._places: dict[nn.Parameter, slice] = {}
        self._reducing: list[tuple[slice, dist.Work]] = []
        offset = 0
        for parameter, size in zip(self._parameters, sizes, strict=True):
            parameter.grad = self._buffer[offset : offset + parameter.numel()].view_as(parameter)
            parameter.main_grad = parameter.grad  # type: ignore[attr-defined]
            self._places[parameter] = slice(offset, offset + size)
            offset += size

    def zero(self) -> None:
        """Clear gradients and slots; ``optimizer.zero_grad`` would drop the views."""
        self._buffer.zero_()

    def report(self, *, stop: bool, skipped: Mapping[str, int]) -> None:
        """Enter this rank's part of the slots."""
        counts = dict.fromkeys(SKIP_KINDS, 0)
        for kind, count in skipped.items():
            counts[kind if kind in counts else SKIP_KINDS[-1]] += count
        for slot, count in zip(self._buffer[-_SLOTS:], (stop, *counts.values()), strict=True):
            if count:  # the slots are clear, and most stay so
                slot.fill_(float(count))

    def start_reduction(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
        """Start the sum over the ranks for parameters that follow one another, whose gradients are whole.

        Every rank must call in the same order.
        """
        places = [self._places[parameter] for parameter in parameters]
        assert all(before.stop == after.start for before, after in pairwise(places))
        place = slice(places[0].start, places[-1].stop)
        work = dist.all_reduce(self._buffer[place], group=group, async_op=True)
        self._reducing.append((place, work))

    def finish_reduction(self, group: dist.ProcessGroup | None) -> None:
        """Sum over the ranks all gradients whose reduction has not started, slots included, and wait for all of them.

        Before, every rank holds its share of the gradient of the global mean loss; afterwards, the whole gradient.
        """
        if group is None:
            return
        first = 0
        rest: list[slice] = []
        for place, _ in sorted(self._reducing, key=lambda started: started[0].start):
            rest.append(slice(first, place.start))
            first = place.stop
        rest.append(slice(first, len(self._buffer)))
        for place in rest:
            if place.start < place.stop:
                work = dist.all_reduce(self._buffer[place], group=group, async_op=True)
                self._reducing.append((place, work))
        for _, work in self._reducing:
            work.wait()
        self._reducing.clear()

    def reported(self) -> Tensor:
        """Return how many ranks asked to stop, and how many samples all ranks skipped of each kind of SKIP_KINDS.

        [1 + kinds], on the device.
        """
        return self._buffer[-_SLOTS:]

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to global norm ``max_norm`` and return the norm they had (0-dim, on the device)."""
        gradients = self._buffer[:-_SLOTS]
        norm = _norm(gradients)
        gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


class ShardedGradients(FlatGradients):
    """The same for a sharded tower, whose gradients FSDP sums and divides among the ranks.

    The flat buffer holds what every rank has whole: the objective's scalars and the slots. Its sum over the ranks
    is one small message, and so is that of the norm.
    """

    def __init__(
        self, sharded: Iterable[nn.Parameter], replicated: Iterable[nn.Parameter], group: dist.ProcessGroup
    ) -> None:
        """Allocate the buffer of the replicated parameters; the others get their ``.grad`` in every backward."""
        super().__init__(replicated)
        self._sharded = list(sharded)
        self._group = group

    def zero(self) -> None:
        """Clear buffer and gradients: what FSDP finds in ``.grad`` it adds to."""
        super().zero()
        for parameter in self._sharded:
            parameter.grad = None

    def clip(self, max_norm: float) -> Tensor:
        """As in `FlatGradients`; all ranks must call and get the same norm."""
        shards = [local_shard(parameter.grad) for parameter in self._sharded if parameter.grad is not None]
        squares = torch.stack(torch._foreach_norm(shards)).double().square().sum()
        dist.all_reduce(squares, group=self._group)
        replicated = self._buffer[:-_SLOTS]
        norm = (squares + replicated.double().square().sum()).sqrt().float()
        torch._foreach_mul_([*shards, replicated], (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
