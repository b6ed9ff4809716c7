"""What tests of the engine train: a small tower, the config of a run of it, and its checkpoints."""

from pathlib import Path
from typing import Any

import torch

from textlock.engine.checkpoint import Progress, save_checkpoint
from textlock.engine.config import Config, dump_config, parse_config
from textlock.engine.objective import LossConfig, Objective

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
        text_fingerprint="abc",
        run_config=dump_config(config),
        keep=config.checkpoint.keep,
        writes=writes,
    )
