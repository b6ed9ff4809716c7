"""Evaluate a checkpoint or an exported folder.

    python evaluate.py --checkpoint runs/demo --data runs/demo/data/heldout
    python evaluate.py --checkpoint exported/ --data imagenet/val --class-names imagenet --templates openai-80
    python evaluate.py --checkpoint runs/mine --suite datacomp --data evalsets

Shards are evaluated by image-text retrieval, a folder of class folders by zero-shot classification, and the sets of a
suite as its authors do.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch.distributed as dist
import tyro

from textlock.data.atomic import write_text_atomically
from textlock.engine.distributed import World, join_world
from textlock.engine.provenance import commit, device_name, versions
from textlock.engine.step import precision_of
from textlock.evals.benchmark_report import Results, SuiteRun, read_results
from textlock.evals.benchmark_suites import SUITES
from textlock.evals.benchmarks import Evaluator, find_sets
from textlock.evals.counts import describe_count
from textlock.evals.suite import PROMPTS, EvalConfig, EvaluationSuite, read_choices
from textlock.exports.loaded import Loaded, image_fingerprint, load_towers
from textlock.models.text import make_text_tower
from textlock.settings import Settings, at_least, exit_with

if TYPE_CHECKING:
    from textlock.evals.mteb import MtebEncoder


@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Evaluate a checkpoint or an exported folder: retrieval on shards, zero-shot classification on class folders, or a
    suite of benchmarks.
    """

    checkpoint: Path
    """A run folder (its newest checkpoint), one of its checkpoints/step_* folders, or an exported folder."""
    data: Path
    """A folder of tar shards, or of class folders with images; with --suite the folder that holds its sets."""
    suite: Literal["datacomp", "clip-benchmark"] | None = None
    """The 38 tasks of DataComp's evaluation or the sets of CLIP Benchmark, as far as they are in folders of --data, in
    the layout of clip_benchmark's webdatasets. A run that was stopped goes on with the tasks left."""
    output: Path | None = None
    """File for the figures, as JSON. Default: evaluation.json in the checkpoint's folder, of a suite
    evaluation-SUITE.json."""
    text: str | None = None
    """Text tower, a folder or hub name. Default: the one the run was trained against."""
    class_names: str | None = None
    """Names of the classes, where those of the folders are no words: a JSON object {folder: name}, a table, a text file
    with a name a line in sorted order of the folders, or imagenet."""
    templates: Annotated[tuple[str, ...], PROMPTS] = ()
    """Prompts of a class, with {} for its name; openai-80 or openai-7; or a file of prompts. Default: those of the
    run's config."""
    allow_missing: bool = False
    """Give the figures although a class has no image that can be read, more than 1 % of the images cannot be, or a
    shard of a set is damaged."""
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
    if arguments.suite is not None:
        evaluate_suite(arguments, world)
        return
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
        **facts_of(arguments, loaded, world),
    }
    output = arguments.output or arguments.checkpoint / "evaluation.json"
    write_text_atomically(output, json.dumps(results, indent=1) + "\n")
    print(f"written to {output}", file=sys.stderr)


def evaluate_suite(arguments: Arguments, world: World) -> None:
    """Evaluate the tasks of a suite that are there and not done yet, write each as it is done, and print the table."""
    assert arguments.suite is not None
    for name in ("class_names", "templates"):
        if getattr(arguments, name):
            arguments.refuse(name, "be left out with --suite: each set has a file of its own")
    suite = SUITES[arguments.suite]
    layouts = find_sets(suite, arguments.data)
    require_same({key: layout.fingerprint() for key, layout in layouts.items()}, arguments.data, world)
    run = SuiteRun(suite, layouts, arguments.allow_missing)
    towers = load_towers(arguments.checkpoint, arguments.text, world.device)
    loaded = towers.loaded
    output = arguments.output or arguments.checkpoint / f"evaluation-{arguments.suite}.json"
    identity = {
        "suite": arguments.suite,
        "image tower": image_fingerprint(loaded.tower),
        "text tower": towers.text.fingerprint(),
        "image size": loaded.tower.image_size,
        "precision": precision_of(world.device),
    }
    results = _read_on_main(lambda: read_results(output, identity), world)
    done = run.still_good(results)
    results.tasks = {key: results.tasks[key] for key in done}
    evaluator = Evaluator(towers.encode_images, towers.text, loaded.tower.image_size, arguments.batch_size, world.group)
    for task, outcome in run.outcomes(done, evaluator.evaluate):
        run.store(task, outcome, results, facts_of(arguments, loaded, world))
        if world.is_main:
            results.write(output)
            print(f"{task.name}: {100 * outcome.figures[task.metrics[0]]:.2f} %", file=sys.stderr)
    if not world.is_main:
        return
    results.averages = run.averages(results)
    results.write(output)
    print("\n".join(run.table(results)))
    print(f"written to {output}", file=sys.stderr)
    if run.without:
        raise ValueError(f"no figure of {', '.join(run.without)}: the table says why")


def require_same(sets: dict[str, str], root: Path, world: World) -> None:
    """Raise ValueError on every rank where one of them has other sets, given by their fingerprints, under a root."""
    if world.group is None:
        return
    found: list[Any] = [None] * world.world_size
    dist.all_gather_object(found, sets, group=world.group)
    keys = sorted({key for some in found for key in some if len({each.get(key) for each in found}) > 1})
    if keys:
        raise ValueError(f"{root} is not the same on all ranks ({', '.join(keys)}): give all of them the same files")


def _read_on_main(read: Callable[[], Results], world: World) -> Results:
    """Return on every rank what the main one reads; what it refuses is refused on all."""
    if world.group is None:
        return read()
    box: list[Results | ValueError | None] = [None]
    if world.is_main:
        try:
            box = [read()]
        except ValueError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, group=world.group)
    if isinstance(box[0], ValueError):
        raise box[0]
    assert box[0] is not None
    return box[0]


def facts_of(arguments: Arguments, loaded: Loaded, world: World) -> dict[str, Any]:
    """Return what is told of every evaluation besides its figures."""
    return {
        "checkpoint": str(arguments.checkpoint),
        "step": loaded.step,
        "data": str(arguments.data),
        "versions": versions(),
        "commit": commit(),
        "device": device_name(world.device),
    }


def mteb_encoder(
    checkpoint: Path | str,
    *,
    text: str | None = None,
    prompts: Mapping[str, str] | None = None,
    max_length: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> "MtebEncoder":
    """Return both towers as an encoder for ``mteb.evaluate``.

    Args:
        checkpoint: as ``--checkpoint``.
        text: as ``--text``.
        prompts: prefixes of texts, by the names that mteb gives prompts: query, document, a type of task, or a task.
            All others have the prefix of captions in training. Nomic Embed Text's are search_query, search_document,
            clustering and classification, each with a colon and a space.
        max_length: tokens that are read of a text. None: those of captions in training.
        device: as ``--device``.

    Raises:
        FileNotFoundError: there is no such checkpoint or text tower.
        ValueError: mteb is not installed, or has no such prompts; or the text tower is another one than the image tower
            was trained against.
    """
    try:
        from textlock.evals.mteb import MtebEncoder
    except ImportError as error:
        raise ValueError('mteb is not installed: pip install "textlock[mteb]"') from error
    here = join_world(device).device
    towers = load_towers(Path(checkpoint), text, here)
    loaded, text_tower = towers.loaded, towers.text
    if max_length is not None:
        text_tower = make_text_tower(replace(text_tower.config, max_length=max_length), here)
    by_prefix = {text_tower.recipe.prefix: text_tower}
    for prefix in (prompts or {}).values():
        if prefix not in by_prefix:
            by_prefix[prefix] = make_text_tower(replace(text_tower.config, prefix=prefix), here)
    prompted = {name: by_prefix[prefix] for name, prefix in (prompts or {}).items()}
    parts = [image_fingerprint(loaded.tower), text_tower.fingerprint()]
    parts += [f"{name} {tower.fingerprint()}" for name, tower in sorted(prompted.items())]
    return MtebEncoder(
        towers.encode_images,
        text_tower,
        loaded.tower.image_size,
        name=f"textlock/{Path(checkpoint).resolve().name}",
        revision=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        prompted=prompted,
    )


if __name__ == "__main__":
    main()
