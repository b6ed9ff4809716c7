"""Evaluate a checkpoint or an exported folder.

    python evaluate.py --checkpoint runs/demo --data runs/demo/data/heldout
    python evaluate.py --checkpoint exported/ --data imagenet/val --class-names imagenet --templates openai-80

Shards are evaluated by image-text retrieval, a folder of class folders by zero-shot classification.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from textlock.data.atomic import write_text_atomically
from textlock.engine.distributed import World, join_world
from textlock.engine.provenance import commit, device_name, versions
from textlock.engine.step import autocast_for, image_rows
from textlock.engine.trained import load_tower
from textlock.evals.counts import describe_count
from textlock.evals.suite import PROMPTS, EvalConfig, EvaluationSuite, read_choices
from textlock.exports.reading import is_exported, read_exported, text_settings
from textlock.models.text import TextConfig, make_text_tower
from textlock.models.vision import VisionTower
from textlock.settings import Settings, at_least, exit_with


@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Evaluate a checkpoint or an exported folder: retrieval on shards, zero-shot classification on class folders."""

    checkpoint: Path
    """A run folder (its newest checkpoint), one of its checkpoints/step_* folders, or an exported folder."""
    data: Path
    """A folder of tar shards, or of class folders with images."""
    output: Path | None = None
    """File for the figures, as JSON. Default: evaluation.json in the checkpoint's folder."""
    text: str | None = None
    """Text tower, a folder or hub name. Default: the one the run was trained against."""
    class_names: str | None = None
    """Names of the classes, where those of the folders are no words: a JSON object {folder: name}, a table, a text file
    with a name a line in sorted order of the folders, or imagenet."""
    templates: Annotated[tuple[str, ...], PROMPTS] = ()
    """Prompts of a class, with {} for its name; openai-80 or openai-7; or a file of prompts. Default: those of the
    run's config."""
    allow_missing: bool = False
    """Give the figures although a class has no image that can be read, or more than 1 % of the images cannot be."""
    batch_size: Annotated[int, at_least(1)] = 256
    """Images per forward pass on one rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""


def main() -> None:
    """Read the command line and evaluate; bad input ends in one sentence and exit status 2."""
    arguments = tyro.cli(Arguments)
    try:
        world = join_world(arguments.device)
        try:
            evaluate(arguments, world)
        finally:
            world.close()
    except (ValueError, OSError) as error:
        exit_with(error)


def evaluate(arguments: Arguments, world: World) -> None:
    """Print the figures and write them as JSON."""
    if not arguments.data.is_dir():
        raise FileNotFoundError(f"{arguments.data} is not a folder: give a folder of shards or of class folders")
    is_shards = any(arguments.data.glob("*.tar"))
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise FileNotFoundError(f"{arguments.output.parent} is not a folder: make it, or give another --output")
    if is_shards and arguments.class_names is not None:
        arguments.refuse("class_names", "be left out where --data holds shards: they are evaluated by retrieval")
    evals = EvalConfig(
        zero_shot=None if is_shards else str(arguments.data),
        zero_shot_names=arguments.class_names,
        retrieval=str(arguments.data) if is_shards else None,
        templates=arguments.templates or EvalConfig().templates,
        batch_size=arguments.batch_size,
    )
    read_choices(evals)  # what is wrong with the data is said before anything is loaded
    loaded = load(arguments.checkpoint, arguments.text)
    tower = loaded.tower.to(world.device).eval()
    text = loaded.text if arguments.text is None else replace(loaded.text, name=arguments.text)
    text_tower = make_text_tower(text, world.device)
    difference = text_tower.describe().difference_from(loaded.text_tower) if loaded.text_tower else None
    if text_tower.embed_dim != tower.embed_dim:
        difference = f"its embeddings have {text_tower.embed_dim} dimensions and those of images {tower.embed_dim}"
    if difference:
        raise ValueError(
            f"{arguments.checkpoint} was trained against another text tower than {text.name}: {difference}. Give the "
            "one it was trained against with --text."
        )
    print(f"text tower {text.name}: {text_tower.recipe}", file=sys.stderr)
    evals = replace(evals, templates=arguments.templates or loaded.templates)
    suite = EvaluationSuite(text_tower, evals, image_size=tower.image_size, group=world.group)
    autocast = autocast_for(world.device, "auto")
    with torch.no_grad():
        figures = suite.run(lambda images: image_rows(tower, images.to(world.device), autocast))
    complaints = suite.complaints()
    if complaints and not arguments.allow_missing:
        raise ValueError(f"{'; '.join(complaints)}: mend them, or take the figures of the others with --allow-missing")
    if not world.is_main:
        return
    for complaint in complaints:
        print(f"warning: {complaint}", file=sys.stderr)
    for name, share in figures.items():
        print(f"{name:28s} {100 * share:6.2f} %")
    for kind, count in suite.counts().items():
        print(f"{kind} of {describe_count(count)}")
    results = {
        **figures,
        "counts": suite.counts(),
        "checkpoint": str(arguments.checkpoint),
        "step": loaded.step,
        "data": str(arguments.data),
        "versions": versions(),
        "commit": commit(),
        "device": device_name(world.device),
    }
    output = arguments.output or arguments.checkpoint / "evaluation.json"
    write_text_atomically(output, json.dumps(results, indent=1) + "\n")
    print(f"written to {output}", file=sys.stderr)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint or an exported folder says of itself."""

    tower: VisionTower
    text: TextConfig
    text_tower: dict[str, Any] | None
    """The `TextTowerDescription` it was trained against; None of the released Nomic Embed Vision."""
    templates: tuple[str, ...]
    step: int | None


def load(checkpoint: Path, text_name: str | None) -> Loaded:
    """Read a run folder, one of its checkpoints, or an exported folder, whose text tower may need a name."""
    if is_exported(checkpoint):
        exported = read_exported(checkpoint)
        text = text_settings(exported.text_tower, checkpoint, text_name)
        return Loaded(exported.tower, text, exported.text_tower, EvalConfig().templates, None)
    found = load_tower(checkpoint)
    return Loaded(found.tower, found.config.text, found.text_tower, found.config.evals.templates, found.step)


if __name__ == "__main__":
    main()
