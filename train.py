"""Train an image encoder into the latent space of a frozen text embedder.

    python train.py --config configs/demo.yaml --run-dir runs/demo
    python train.py --config configs/demo.yaml --run-dir runs/demo --optim.learning-rate 2e-3
    torchrun --nproc-per-node 8 train.py --config configs/nomic_embed_vision_v1_5.yaml --run-dir runs/v1_5

Run the same line again and the run goes on from its last checkpoint. SIGTERM saves and stops.
"""

import json
import shlex
import signal
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch

from textlock.data.atomic import write_text_atomically
from textlock.data.loader import open_loader, require_few_skipped
from textlock.engine.checkpoint import Checkpoint, Progress, RunLock, read_latest, restore, save_checkpoint
from textlock.engine.config import Config, dump_config, load_config, parse_config, require_same_run
from textlock.engine.distributed import World, join_world, why_lost
from textlock.engine.feed import Feed
from textlock.engine.metrics import Metrics, QueuedStep
from textlock.engine.objective import Objective
from textlock.engine.optim import build_gradients, build_optimizer, set_learning_rate
from textlock.engine.plan import plan_step
from textlock.engine.provenance import commit, device_name, versions
from textlock.engine.sharding import gathered, shard_tower
from textlock.engine.step import LargeBatchStep, autocast_for, image_rows, text_dtype
from textlock.evals.suite import EvaluationSuite
from textlock.models.text import make_text_tower
from textlock.models.vision import make_vision_tower
from textlock.settings import exit_with


def main() -> None:
    """Read the command line and train; bad input ends in one sentence and exit status 2, a lost rank in one and 1."""
    try:
        config = parse_config(sys.argv[1:])
        world = join_world(config.device)
        try:
            train(config, world)
        finally:
            world.close()
    except (ValueError, OSError) as error:
        exit_with(error)
    except RuntimeError as error:
        if sentence := why_lost(error):
            raise SystemExit(f"error: {sentence}") from None
        raise


def train(config: Config, world: World) -> None:
    """Start, or go on with, the run in ``config.run_dir``."""
    config.require_world(world)
    stop = StopRequest()
    run_dir = Path(config.run_dir)
    lock = RunLock(run_dir)
    if world.is_main:
        lock.take()
    checkpoint = find_checkpoint(config, world)
    progress = checkpoint.progress if checkpoint else Progress()

    # The text tower is a constant: in no optimiser, in no checkpoint.
    text_tower = make_text_tower(config.text, world.device)
    described_text = text_tower.describe()

    # The image tower and the objective's scalars: float32 masters, the same on every rank or a part on each.
    torch.manual_seed(config.seed)
    image_size, batch_size = config.data.image_size, config.data.batch_size
    tower = make_vision_tower(
        config.model, image_size=image_size, embed_dim=text_tower.embed_dim, pretrained=checkpoint is None
    )
    sharded = config.step.sharding == "fsdp"
    if sharded:
        shard_tower(tower, world)
    else:
        tower.to(world.device)
    dtype = text_dtype(world.device)
    objective = Objective(config.loss, texts=batch_size, width=text_tower.embed_dim, dtype=dtype, device=world.device)
    optimizer = build_optimizer(tower, objective, config.optim, world_size=world.world_size)
    gradients = build_gradients(tower, objective, world.group if sharded else None)
    if checkpoint:
        checkpoint.require_text_tower(described_text)
        restore(checkpoint, tower, objective, optimizer)

    # The data, the step, the evaluations.
    loader = open_loader(
        config.data,
        rank=world.rank,
        world_size=world.world_size,
        state=progress.loader,
        skipped_log=run_dir / "skipped.jsonl",
        device=world.device,
        text_tower=described_text,
    )
    feed = Feed(loader, text_tower, world.device)
    total_steps = config.optim.total_steps(loader.samples_per_epoch // batch_size)
    autocast = autocast_for(world.device, config.step.precision)
    plan = plan_step(config.step, tower, autocast, world, batch_size=batch_size, couples=objective.couples_images)
    compute_gradients = LargeBatchStep(
        tower,
        objective,
        gradients,
        plan,
        masks_duplicates=config.loss.mask_duplicates,
        world=world,
        autocast=autocast,
        seed=config.seed,
    )
    evaluations = EvaluationSuite(text_tower, config.evals, image_size=image_size, group=world.group)

    def evaluate() -> dict[str, float]:
        tower.eval()  # with all patches, where training drops some
        with torch.no_grad(), gathered(tower):
            figures = evaluations.run(lambda images: image_rows(tower, images.to(world.device), autocast))
        tower.train()
        return figures

    # All input is validated by now; nothing has been written yet.
    if world.is_main:
        open_run_dir(config, lock)
    metrics = Metrics(
        config.log, run_dir, asdict(config), world=world, tower=tower, progress=progress, total_steps=total_steps
    )
    world.barrier()  # no rank writes before the lines of steps that will be repeated are gone
    size = sum(parameter.numel() for parameter in tower.parameters()) / 1e6
    metrics.say(f"{config.model.name}, {size:.1f} M parameters, on {world.world_size} x {device_name(world.device)}")
    for line in loader.sources.describe():
        metrics.say(line)
    metrics.say(f"{loader.samples_per_epoch:,} samples an epoch, decoder {config.data.decoder}")
    metrics.say(f"text tower {config.text.name}: {text_tower.recipe}")
    for note in text_tower.notes:
        metrics.say(note)
    metrics.say(f"{total_steps} steps of {batch_size:,}; {plan}")
    if checkpoint:
        metrics.say(f"going on after step {progress.step}")

    figures: dict[str, float] | None = None
    # A GPU always has the next step queued before the host looks at the last one; a CPU has done it by then.
    queued: deque[QueuedStep] = deque()
    most_queued = 1 if world.device.type == "cuda" else 0
    stopping = False
    while progress.step < total_steps and not stopping:
        with metrics.waiting_for_data():
            batch = next(feed)
        rate = set_learning_rate(optimizer, config.optim, progress.step, total_steps)
        gradients.zero()
        gradients.report(stop=stop.asked, skipped=batch.skipped_by_kind)
        result = compute_gradients(progress.step, batch.images, batch.text, batch.ids)
        grad_norm = gradients.clip(config.optim.clip_norm(world.world_size))
        optimizer.step()
        objective.limit_logit_scale()
        progress.step += 1
        queued.append(QueuedStep(progress.step, batch, rate, result, grad_norm, gradients.reported()))

        last = progress.step == total_steps
        intervals = (config.log.every, config.checkpoint.every, config.evals.every)
        due = last or any(is_due(progress.step, every) for every in intervals)
        while len(queued) > (0 if due or stopping else most_queued):
            outcome = queued.popleft().wait()
            stopping = stopping or outcome.stop
            metrics.step_done(outcome, images=batch_size)
            require_few_skipped(progress.skipped_by_kind, progress.samples_seen, config.data)
        last = last or stopping
        if last or is_due(progress.step, config.log.every):
            metrics.log(outcome)
        if last or is_due(progress.step, config.checkpoint.every):
            progress.loader = loader.state()
            with metrics.paused():
                if world.is_main or sharded:
                    save_checkpoint(
                        run_dir / "checkpoints",
                        tower=tower,
                        objective=objective,
                        optimizer=optimizer,
                        progress=progress,
                        text_tower=described_text,
                        run_config=dump_config(config),
                        keep=config.checkpoint.keep,
                        writes=world.is_main,
                    )
                world.barrier()
        if not stopping and (last or is_due(progress.step, config.evals.every)):
            with metrics.paused():
                figures = evaluate()
                metrics.log_evaluation(figures, evaluations)

    loader.close()
    if progress.step == total_steps:
        figures = evaluate() if figures is None else figures
        if world.is_main:
            metrics.say(f"done: {write_results(config, world, progress, figures, evaluations)}")
    else:
        metrics.say(f"stopped after step {progress.step} of {total_steps}; the same command goes on from there")
    metrics.close()


def open_run_dir(config: Config, lock: RunLock) -> None:
    """Make the run folder, keep other processes out of it and write the config there."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    lock.take()
    write_text_atomically(run_dir / "config.yaml", dump_config(config))


def write_results(
    config: Config, world: World, progress: Progress, figures: dict[str, float], evaluations: EvaluationSuite
) -> Path:
    """Write results.json, the images for the report and the report of a finished run; return the report's path."""
    # Only here: no rank needs what writes the page in order to train.
    from textlock.engine.gallery import save_answers, save_gallery
    from textlock.engine.report import write_report

    run_dir = Path(config.run_dir)
    results = {
        **figures,
        "counts": evaluations.counts(),
        "chance": evaluations.chance(),
        "images_per_second": progress.samples_seen / progress.train_seconds,
        "wall_seconds": progress.wall_seconds,
        "samples_seen": progress.samples_seen,
        "config": asdict(config),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        "device": device_name(world.device),
        "world_size": world.world_size,
    }
    write_text_atomically(run_dir / "results.json", json.dumps(results, indent=1) + "\n")
    if gallery := evaluations.gallery():
        save_gallery(run_dir, gallery.images, gallery.captions, gallery.nearest)
    if answers := evaluations.answers():
        save_answers(run_dir, answers)
    return write_report(run_dir)


def find_checkpoint(config: Config, world: World) -> Checkpoint | None:
    """Return the newest whole checkpoint of the run folder, or None in a new one.

    Raises ValueError when the folder holds a run with another config.
    """
    run_dir = Path(config.run_dir)
    if (run_dir / "config.yaml").exists():
        require_same_run(load_config(run_dir / "config.yaml"), config, run_dir)
    checkpoint, damaged = read_latest(run_dir / "checkpoints")
    if world.is_main:
        for complaint in damaged:
            print(f"warning: {complaint}; an older checkpoint is taken", file=sys.stderr)
    return checkpoint


class StopRequest:
    """Remembers SIGTERM or Ctrl-C until the step under way is done; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps is due after ``step``; 0 is never."""
    return every > 0 and step % every == 0


if __name__ == "__main__":
    main()
