"""Evaluate a checkpoint or an exported folder.

    python evaluate.py --checkpoint runs/demo --data runs/demo/data/heldout
    python evaluate.py --checkpoint exported/ --data imagenet/val --text nomic-ai/nomic-embed-text-v1.5

Shards are evaluated by image-text retrieval, a folder of class folders by zero-shot classification.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from textlock.data.publish import publish_text
from textlock.engine.checkpoint import load_tower
from textlock.engine.config import EvalConfig, TextConfig, exit_with
from textlock.engine.distributed import World, join_world
from textlock.engine.provenance import commit, device_name, versions
from textlock.engine.step import autocast_for, image_rows
from textlock.evals.suite import EvaluationSuite
from textlock.export import load_exported_tower
from textlock.models.text import build_text_tower
from textlock.models.vision import VisionTower


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a checkpoint or an exported folder: retrieval on shards, zero-shot classification on class folders."""

    checkpoint: Path
    """A run folder (its newest checkpoint), one of its checkpoints/step_* folders, or an exported folder."""
    data: Path
    """A folder of tar shards, or of class folders with pictures."""
    output: Path | None = None
    """File for the figures, as JSON. Default: evaluation.json in the checkpoint's folder."""
    text: str | None = None
    """Text tower, a folder or hub name. Default: the one the run was trained against."""
    templates: tuple[str, ...] = ()
    """Prompts of a class, with {} for its name. Default: those of the run's config."""
    batch_size: int = 256
    """Images per forward pass on one rank."""
    device: str = "auto"
    """auto, cpu or cuda."""


def main() -> None:
    """Read the command line and evaluate; bad input ends in one sentence and exit status 2."""
    arguments = tyro.cli(Arguments)
    try:
        world = join_world(arguments.device)
        try:
            evaluate(arguments, world)
        finally:
            world.close()
    except (ValueError, FileNotFoundError) as error:
        exit_with(error)


def evaluate(arguments: Arguments, world: World) -> None:
    """Print the figures and write them as JSON."""
    if not arguments.data.is_dir():
        raise FileNotFoundError(f"{arguments.data} is not a folder: give a folder of shards or of class folders")
    is_shards = any(arguments.data.glob("*.tar"))
    tower, text, templates, step = load(arguments)
    tower.to(world.device).eval()
    text_tower = build_text_tower(
        text.name,
        layer_norm=text.layer_norm,
        prefix=text.prefix,
        max_length=text.max_length,
        device=world.device,
    )
    if text_tower.embed_dim != tower.embed_dim:
        raise ValueError(
            f"{arguments.checkpoint} embeds into {tower.embed_dim} numbers and the text tower {text.name} into "
            f"{text_tower.embed_dim}; give the text tower it was trained against with --text"
        )
    suite = EvaluationSuite(
        text_tower,
        zero_shot=None if is_shards else str(arguments.data),
        zero_shot_unseen=None,
        retrieval=str(arguments.data) if is_shards else None,
        templates=templates,
        image_size=tower.image_size,
        batch_size=arguments.batch_size,
        group=world.group,
    )
    autocast = autocast_for(world.device, "auto")

    def encode_images(images: Tensor) -> Tensor:  # [b, S, S, 3] -> [b, d]
        with torch.no_grad():
            return image_rows(tower, images.to(world.device), autocast)

    figures = suite.run(encode_images)
    if not world.is_main:
        return
    for name, share in figures.items():
        print(f"{name:28s} {100 * share:6.2f} %")
    results = {
        **figures,
        "checkpoint": str(arguments.checkpoint),
        "step": step,
        "data": str(arguments.data),
        "versions": versions(),
        "commit": commit(),
        "device": device_name(world.device),
    }
    output = arguments.output or arguments.checkpoint / "evaluation.json"
    publish_text(output, json.dumps(results, indent=1) + "\n")
    print(f"written to {output}", file=sys.stderr)


def load(arguments: Arguments) -> tuple[VisionTower, TextConfig, tuple[str, ...], int | None]:
    """Return the image tower, the text tower's settings, the prompts and the step of a checkpoint or export."""
    if (arguments.checkpoint / "config.json").is_file():
        tower, text, templates, step = (
            load_exported_tower(arguments.checkpoint),
            TextConfig(),
            EvalConfig().templates,
            None,
        )
    else:
        loaded = load_tower(arguments.checkpoint)
        tower, text, templates, step = loaded.tower, loaded.config.text, loaded.config.evals.templates, loaded.step
    if arguments.text is not None:
        text = TextConfig(
            name=arguments.text, layer_norm=text.layer_norm, prefix=text.prefix, max_length=text.max_length
        )
    return tower, text, arguments.templates or templates, step


if __name__ == "__main__":
    main()
