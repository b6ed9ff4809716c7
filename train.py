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
from torch import Tensor

from textlock.data.atomic import write_text_atomically
from textlock.data.loader import open_loader, require_few_skipped
from textlock.engine.checkpoint import (
    Checkpoint,
    Progress,
    RunLock,
    build_tower,
    read_latest,
    restore,
    save_checkpoint,
)
from textlock.engine.config import Config, dump_config, exit_with, load_config, parse_config, require_same_run
from textlock.engine.distributed import World, join_world, why_lost
from textlock.engine.feed import Feed
from textlock.engine.metrics import Metrics, QueuedStep, require_trackers
from textlock.engine.objective import Objective
from textlock.engine.optim import FlatGradients, ShardedGradients, build_optimizer, learning_rate
from textlock.engine.plan import available_bytes, choose_plan, fixed_bytes, tier_costs
from textlock.engine.provenance import commit, device_name, versions
from textlock.engine.sharding import gathered, shard_tower
from textlock.engine.step import LargeBatchStep, autocast_for, image_rows, text_dtype
from textlock.evals.suite import EvaluationSuite
from textlock.models.text import build_text_tower


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
    stop = StopRequest()
    run_dir = Path(config.run_dir)
    lock = RunLock(run_dir)
    if world.is_main:
        lock.take()
    checkpoint = find_checkpoint(config, world)
    progress = checkpoint.progress if checkpoint else Progress()

    # The text tower is a constant: in no optimiser, in no checkpoint.
    text_tower = build_text_tower(
        config.text.name,
        layer_norm=config.text.layer_norm,
        prefix=config.text.prefix,
        max_length=config.text.max_length,
        device=world.device,
    )
    text_fingerprint = text_tower.fingerprint()

    # The image tower and the objective's scalars: float32 masters, the same on every rank or a part on each.
    torch.manual_seed(config.seed)
    tower = build_tower(config, text_tower.embed_dim, weights=None if checkpoint else config.model.weights)
    sharded = config.step.sharding == "fsdp"
    if sharded:
        shard_tower(tower, world)
    else:
        tower.to(world.device)
    objective = Objective(
        config.loss,
        texts=config.data.batch_size,
        width=text_tower.embed_dim,
        dtype=text_dtype(world.device),
        device=world.device,
    )
    optimizer = build_optimizer(tower, objective, config.optim)
    if sharded and world.group is not None:
        gradients: FlatGradients = ShardedGradients(tower.parameters(), objective.parameters(), world.group)
    else:
        gradients = FlatGradients([*tower.parameters(), *objective.parameters()])
    if checkpoint:
        checkpoint.require_text_tower(text_fingerprint, config.text.name)
        restore(checkpoint, tower, objective, optimizer)

    # The data, the step, the evaluations.
    loader = open_loader(
        config.data,
        rank=world.rank,
        world_size=world.world_size,
        state=progress.loader,
        skipped_log=run_dir / "skipped.jsonl",
        device=world.device,
        text_tower=text_tower.describe(),
    )
    total_steps = config.optim.total_steps(loader.samples_per_epoch // config.data.batch_size)
    autocast = autocast_for(world.device, config.step.precision)
    local_batch = config.data.batch_size // world.world_size
    beside = fixed_bytes(
        tower,
        autocast,
        local_batch=local_batch,
        global_batch=config.data.batch_size,
        shards=world.world_size if sharded else 1,
    )
    with gathered(tower):
        costs = tier_costs(tower, autocast)
    plan = choose_plan(
        costs=costs,
        local_batch=local_batch,
        micro_batch=config.step.micro_batch,
        keep=config.step.keep,
        memory_bytes=available_bytes(world.device, config.step.memory_gib, fixed_bytes=beside),
        waits_for_loss=objective.couples_images,
    )
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
    feed = Feed(loader, text_tower, world.device)
    evaluations = EvaluationSuite(
        text_tower,
        zero_shot=config.evals.zero_shot,
        zero_shot_unseen=config.evals.zero_shot_unseen,
        retrieval=config.evals.retrieval,
        templates=config.evals.templates,
        image_size=tower.image_size,
        batch_size=config.evals.batch_size,
        group=world.group,
    )

    def encode_images(images: Tensor) -> Tensor:  # [b, S, S, 3] -> [b, d]
        tower.eval()  # with all patches, where training drops some
        with torch.no_grad():
            rows = image_rows(tower, images.to(world.device, non_blocking=True), autocast)
        tower.train()
        return rows

    # All that can be wrong with the input was looked at; only now is anything written.
    require_trackers(config.log.trackers)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.take()
        write_text_atomically(run_dir / "config.yaml", dump_config(config))
    metrics = Metrics(config, world, tower, progress, total_steps)
    world.barrier()  # no rank writes before the lines of steps that will run again are gone
    millions = sum(parameter.numel() for parameter in tower.parameters()) / 1e6
    metrics.say(
        f"{config.model.name}, {millions:.1f} M parameters, on {world.world_size} x {device_name(world.device)}"
    )
    metrics.say(f"{loader.num_samples:,} samples in {config.data.shards}, decoder {config.data.decoder}")
    metrics.say(f"{total_steps} steps of {config.data.batch_size:,}; {plan}")
    if checkpoint:
        metrics.say(f"going on after step {progress.step}")

    figures: dict[str, float] = {}
    # A GPU always has the next step queued before the host looks at the last one; a CPU has done it by then.
    queued: deque[QueuedStep] = deque()
    most_queued = 1 if world.device.type == "cuda" else 0
    stopping = False
    while progress.step < total_steps and not stopping:
        with metrics.waiting_for_data():
            batch = next(feed)
        rate = learning_rate(config.optim, progress.step, total_steps)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate

        gradients.zero()
        gradients.report(stop=stop.asked, skipped=batch.source.skipped_by_kind)
        result = compute_gradients(progress.step, batch.images, batch.text, batch.ids)
        grad_norm = gradients.clip(config.optim.clip_norm(world.world_size))
        optimizer.step()
        progress.step += 1
        queued.append(QueuedStep(progress.step, batch.source, rate, result, grad_norm, gradients.reported()))

        last = progress.step == total_steps
        intervals = (config.log.every, config.checkpoint.every, config.evals.every)
        due = last or any(is_due(progress.step, every) for every in intervals)
        while len(queued) > (0 if due or stopping else most_queued):
            outcome = queued.popleft().wait()
            stopping = stopping or outcome.stop
            metrics.step_done(outcome, images=config.data.batch_size)
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
                        text_fingerprint=text_fingerprint,
                        config=config,
                        writes=world.is_main,
                    )
                world.barrier()
        if not stopping and (last or is_due(progress.step, config.evals.every)):
            with metrics.paused(), gathered(tower):
                figures = evaluations.run(encode_images)
                metrics.log_evaluation(figures)

    loader.close()
    if progress.step == total_steps:
        if not figures:
            with gathered(tower):
                figures = evaluations.run(encode_images)
        if world.is_main:
            results = {
                **figures,
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
            # Only here: no rank needs what writes the page in order to train.
            from textlock.engine.gallery import save_gallery
            from textlock.engine.report import write_report

            write_text_atomically(run_dir / "results.json", json.dumps(results, indent=1) + "\n")
            if gallery := evaluations.gallery():
                save_gallery(run_dir, gallery.images, gallery.captions, gallery.nearest)
            metrics.say(f"done: {write_report(run_dir)}")
    else:
        metrics.say(f"stopped after step {progress.step} of {total_steps}; the same command goes on from there")
    metrics.close()


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
