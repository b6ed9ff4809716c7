"""Evaluate a checkpoint or an exported folder.

    python evaluate.py --checkpoint runs/demo --data runs/demo/data/heldout
    python evaluate.py --checkpoint exported/ --data imagenet/val --class-names imagenet --templates openai-80

Shards are evaluated by image-text retrieval, a folder of class folders by zero-shot classification.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from textlock.data.atomic import write_text_atomically
from textlock.engine.distributed import World, join_world
from textlock.engine.provenance import commit, device_name, versions
from textlock.evals.counts import describe_count
from textlock.evals.suite import PROMPTS, EvalConfig, EvaluationSuite, read_choices
from textlock.exports.loaded import load_towers
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
    towers = load_towers(arguments.checkpoint, arguments.text, world.device)
    loaded = towers.loaded
    evals = replace(evals, templates=arguments.templates or loaded.templates)
    suite = EvaluationSuite(towers.text, evals, image_size=loaded.tower.image_size, group=world.group)
    figures = suite.run(towers.encode_images)
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


if __name__ == "__main__":
    main()
