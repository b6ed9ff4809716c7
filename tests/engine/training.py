"""What tests of the engine share: the config, objective and checkpoints of a small run, and a list of operations."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from textlock.engine.checkpoint import Progress, save_checkpoint
from textlock.engine.config import Config, dump_config, parse_config
from textlock.engine.objective import LossConfig, Objective

from .. import text_tower

MICRO = "eva02_micro_patch8_32"
FLAGS = ["--run-dir", "x", "--data.shards", "x", "--data.batch-size", "8", "--data.image-size", "32"]
FLAGS += ["--data.workers", "1", "--optim.steps", "9"]


def config_of(*flags: str) -> Config:
    """Return the config of nine steps of the micro tower, with these flags besides."""
    return parse_config([*FLAGS, "--model.name", MICRO, *flags])


def objective_of(loss: LossConfig, device: str = "cpu", *, width: int = 64) -> Objective:
    """Return the objective of a batch of eight."""
    return Objective(loss, texts=8, width=width, dtype=torch.float32, device=torch.device(device))


def save(root: Path, trained: Any, config: Config, progress: Progress, *, writes: bool = True) -> Path:
    """Save a checkpoint of an object that has a tower, an objective and an optimizer."""
    return save_checkpoint(
        root,
        tower=trained.tower,
        objective=trained.objective,
        optimizer=trained.optimizer,
        progress=progress,
        text_tower=text_tower.describe(),
        run_config=dump_config(config),
        keep=config.checkpoint.keep,
        writes=writes,
    )


class Operations(TorchDispatchMode):
    """Notes the name of every operation, and the shape of what it returns where that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...] | None]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # so that what it does inside is seen
        output = function(*args, **(kwargs or {}))
        self.seen.append((function._schema.name, tuple(output.shape) if isinstance(output, torch.Tensor) else None))
        return output

    def count(self, part: str) -> int:
        """Return how many operations have this in their name."""
        return sum(part in name for name, _ in self.seen)
