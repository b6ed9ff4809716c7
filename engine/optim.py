"""The optimiser: parameter groups, the learning-rate schedule, one flat gradient buffer and its clipping."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.loader import SKIP_KINDS

# 16-byte steps of float32: the fused optimiser loads four values at a time from aligned addresses.
_ALIGNMENT = 4
_SLOTS = 1 + len(SKIP_KINDS)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, warm-up and cosine decay."""

    steps: int | None = None
    """Optimiser steps of the run. Give either this or epochs."""
    epochs: float | None = None
    """Passes over the data; an epoch is the samples of whole global batches."""
    learning_rate: float = 1e-3
    """Peak, reached at the end of the warm-up."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    tower_weight_decay: float = 0.0
    """Of the transformer's weight matrices. 0 for a pretrained tower."""
    head_weight_decay: float = 0.0
    """Of the weight matrices of the new pooling head."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    released_clipping: bool = False
    """Clip as the released Nomic code does: its loss is world-size times too large before the clip, so its threshold is
    max_grad_norm / world size (0.0625 on 16 GPUs)."""

    def __post_init__(self) -> None:
        """Refuse a schedule that is missing, doubled or impossible."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of --optim.steps and --optim.epochs")
        if (self.steps is not None and self.steps < 1) or (self.epochs is not None and self.epochs <= 0):
            raise ValueError("--optim.steps and --optim.epochs must be positive")
        if not 0 <= min(self.betas) <= max(self.betas) < 1 or self.eps <= 0:
            raise ValueError("--optim.betas must lie in [0, 1) and --optim.eps above 0")
        if min(self.tower_weight_decay, self.head_weight_decay) < 0:
            raise ValueError("--optim.tower-weight-decay and --optim.head-weight-decay must not be negative")
        if self.learning_rate < 0 or self.warmup_steps < 0 or self.max_grad_norm <= 0:
            raise ValueError(
                "--optim.learning-rate and --optim.warmup-steps must not be negative, nor the clip norm zero"
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimiser steps of the whole run."""
        return self.steps if self.steps is not None else max(1, math.floor(self.epochs * steps_per_epoch))  # type: ignore[operator]

    def clip_norm(self, world_size: int) -> float:
        """Return the threshold that applies to the gradient of the true mean loss."""
        return self.max_grad_norm / world_size if self.released_clipping else self.max_grad_norm


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


def parameter_groups(tower: nn.Module, log_logit_scale: nn.Parameter, config: OptimConfig) -> list[dict[str, object]]:
    """Split the parameters by weight decay.

    Vectors (biases, norms, tokens, the pooling latent), the position embedding and the logit scale are never decayed;
    matrices of the pooling head decay by ``head_weight_decay``, all others by ``tower_weight_decay``.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in tower.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = sum(size > 1 for size in parameter.shape) < 2 or name == "position"
        in_head = name.startswith(("pool.", "projection."))
        decay = 0.0 if vector else config.head_weight_decay if in_head else config.tower_weight_decay
        groups.setdefault(decay, []).append(parameter)
    groups.setdefault(0.0, []).append(log_logit_scale)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def build_optimizer(tower: nn.Module, log_logit_scale: nn.Parameter, config: OptimConfig) -> torch.optim.AdamW:
    """Return torch's fused AdamW over the groups of :func:`parameter_groups`."""
    groups = parameter_groups(tower, log_logit_scale, config)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


class FlatGradients:
    """Every gradient as a view of one float32 buffer: one all-reduce, one norm, one scaling.

    The buffer ends in slots that are no gradients: how many ranks were asked to stop, and how many bad samples of each
    kind were replaced in this step. The reduction the step needs anyway so tells every rank, in the same step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Allocate the buffer and point ``.grad`` of every parameter into it."""
        self._parameters = list(parameters)
        sizes = [math.ceil(parameter.numel() / _ALIGNMENT) * _ALIGNMENT for parameter in self._parameters]
        self._buffer = torch.zeros(sum(sizes) + _SLOTS, device=self._parameters[0].device, dtype=torch.float32)
        offset = 0
        for parameter, size in zip(self._parameters, sizes, strict=True):
            parameter.grad = self._buffer[offset : offset + parameter.numel()].view_as(parameter)
            offset += size

    def zero(self) -> None:
        """Clear gradients and slots; ``optimizer.zero_grad`` would drop the views."""
        self._buffer.zero_()

    def report(self, *, stop: bool, skipped: Mapping[str, int]) -> None:
        """Enter this rank's part of the slots."""
        counts = dict.fromkeys(SKIP_KINDS, 0)
        for kind, count in skipped.items():
            counts[kind if kind in counts else SKIP_KINDS[-1]] += count
        self._buffer[-_SLOTS:] = torch.tensor([float(stop), *counts.values()])

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        """Sum over the ranks: every rank holds its share of the gradient of the global mean loss."""
        if group is not None:
            dist.all_reduce(self._buffer, group=group)

    def reported(self) -> tuple[bool, dict[str, int]]:
        """Return whether any rank asked to stop, and by kind the samples all ranks skipped. Waits for the device."""
        stops, *counts = self._buffer[-_SLOTS:].tolist()
        return stops > 0, {kind: round(count) for kind, count in zip(SKIP_KINDS, counts, strict=True) if count}

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to global norm ``max_norm`` and return the norm they had (0-dim, on the device)."""
        gradients = self._buffer[:-_SLOTS]
        norm = torch.linalg.vector_norm(gradients)
        gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
