"""Progress for people and metrics for programs: metrics.jsonl, the terminal, optional trackers.

Throughput excludes evaluations, checkpoints and the first step (compilation).
"""

import importlib
import json
import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any, Literal

import torch
from rich import progress as rich_progress
from rich.console import Console
from torch import Tensor

from ..data.atomic import write_text_atomically
from ..data.loader import SKIP_KINDS, Batch
from ..evals.counts import describe_count
from ..evals.suite import EvaluationSuite
from ..kernels.device import peak_rate
from ..models.vision import VisionTower
from ..settings import Settings, at_least
from .checkpoint import Progress
from .distributed import World
from .step import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings, section="log"):
    """Progress and metrics."""

    every: Annotated[int, at_least(1)] = 10
    """Steps between lines in metrics.jsonl and on the terminal."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also send the metrics there (optional packages)."""


@dataclass(frozen=True)
class StepOutcome:
    """What a finished step has to say."""

    step: int  # from 1
    position: int  # global samples consumed, those of this step included
    epoch: int
    learning_rate: float
    loss: float
    logit_scale: float
    grad_norm: float
    stop: bool  # a rank was asked to stop
    duplicate_captions: int  # captions of the global batch that repeat another one of it
    skipped: dict[str, int]  # bad samples replaced on all ranks, by kind


class QueuedStep:
    """A step that the device may still be working on, and its numbers on their way to the host."""

    def __init__(
        self, step: int, batch: Batch, learning_rate: float, result: StepResult, grad_norm: Tensor, reported: Tensor
    ) -> None:
        """Queue the copy to the host; nothing is waited for.

        Args:
            step: its number, from 1.
            batch: the batch of the step.
            learning_rate: of the step.
            result: of `LargeBatchStep`.
            grad_norm: 0-dim.
            reported: [1 + kinds], of `FlatGradients.reported`.
        """
        # Not the batch itself: gigabytes of images would stay on the device until the step after this one is done.
        self._step, self._position, self._epoch, self._learning_rate = step, batch.position, batch.epoch, learning_rate
        own = (result.loss, result.logit_scale, grad_norm, result.duplicates)
        numbers = torch.cat((torch.stack([number.float() for number in own]), reported))
        self._arrived = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()
        else:
            self._numbers = numbers

    def wait(self) -> StepOutcome:
        """Wait for the device to finish this step, not for what is queued after it.

        Raises ValueError where loss or gradient are not finite: on every rank, since all have the same numbers.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, logit_scale, grad_norm, duplicates, stops, *skipped = self._numbers.tolist()
        if not math.isfinite(grad_norm):
            raise ValueError(
                f"step {self._step}: loss {loss} with gradient norm {grad_norm} is not finite; checkpoints are older. "
                f"Start a new --run-dir with a lower --optim.learning-rate."
            )
        return StepOutcome(
            self._step,
            self._position,
            self._epoch,
            self._learning_rate,
            loss,
            logit_scale,
            grad_norm,
            stop=stops > 0,
            duplicate_captions=round(duplicates),
            skipped={kind: round(count) for kind, count in zip(SKIP_KINDS, skipped, strict=True) if count},
        )


class Metrics:
    """Keeps the clocks of a run and writes its progress and metrics. Only the main process writes."""

    def __init__(
        self,
        config: LogConfig,
        run_dir: Path,
        run_config: Mapping[str, Any],
        *,
        world: World,
        tower: VisionTower,
        progress: Progress,
        total_steps: int,
    ) -> None:
        """Open the run's files and trackers, dropping lines of later steps than ``progress``: these will be repeated.

        From here on all of ``progress`` but its step is kept up to date by :meth:`step_done`.
        """
        self._run_dir = run_dir
        self._world = world
        self._progress = progress
        self._flops_per_image = tower.training_flops
        self._trackers: list[_Tracker] = []
        self._display: _ProgressBar | _PlainLines | None = None
        if world.is_main:
            for name in ("metrics.jsonl", "evaluations.jsonl"):
                _keep_lines(self._run_dir / name, "step", progress.step)
            _keep_lines(self._run_dir / "skipped.jsonl", "position", progress.samples_seen - 1)
            self._trackers = [_TRACKERS[name](self._run_dir, run_config, progress.step) for name in config.trackers]
            console = Console(highlight=False, soft_wrap=True)
            make_display = _ProgressBar if console.is_terminal else _PlainLines
            self._display = make_display(console, progress.step, total_steps)
        self._first_step_is_done = False
        self._wall_start = time.perf_counter() - progress.wall_seconds
        self._step_start = time.perf_counter()
        self._start_window()

    def say(self, text: str) -> None:
        """Print one line, above the progress bar where there is one."""
        if self._display is not None:
            self._display.say(text)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for the loader."""
        before = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock of training between two steps: what happens inside is none."""
        yield
        self._step_start = time.perf_counter()
        self._progress.wall_seconds = self._step_start - self._wall_start

    def step_done(self, outcome: StepOutcome, *, images: int) -> None:
        """Count one finished step of ``images`` in the global batch."""
        now = time.perf_counter()
        self._progress.samples_seen = outcome.position
        for kind, count in outcome.skipped.items():
            self._progress.skipped_by_kind[kind] = self._progress.skipped_by_kind.get(kind, 0) + count
        self._progress.train_seconds += now - self._step_start
        self._progress.wall_seconds = now - self._wall_start
        if self._first_step_is_done:
            self._window_images += images
            self._window_seconds += now - self._step_start
        else:
            self._first_step_is_done = True
            self._start_window()
        self._step_start = now

    def log(self, outcome: StepOutcome) -> None:
        """Write one object to metrics.jsonl and show it. Rates are those since the last call."""
        rate = self._window_images / self._window_seconds if self._window_images else None
        per_device = None if rate is None else rate / self._world.world_size
        record = {
            "step": outcome.step,
            "samples_seen": outcome.position,
            "epoch": outcome.epoch,
            "loss": outcome.loss,
            "logit_scale": outcome.logit_scale,
            "learning_rate": outcome.learning_rate,
            "grad_norm": outcome.grad_norm,
            "images_per_second": rate,
            "images_per_second_per_device": per_device,
            "mfu": self._mfu(per_device),
            "data_wait_fraction": self._data_seconds / self._window_seconds if self._window_images else None,
            "peak_memory_bytes": _peak_memory_bytes(self._world.device),
            "duplicate_captions": outcome.duplicate_captions,
            "skipped_samples": sum(self._progress.skipped_by_kind.values()),
            "skipped_by_kind": dict(self._progress.skipped_by_kind),
        }
        self._start_window()
        self._write("metrics.jsonl", record)
        if self._display is not None:
            self._display.step(self._progress.step, record)

    def log_evaluation(self, figures: Mapping[str, float], evaluations: EvaluationSuite) -> None:
        """Write the figures of a run of ``evaluations`` to evaluations.jsonl and show them; without figures nothing."""
        if not figures:
            return
        progress = self._progress
        place = {"step": progress.step, "samples_seen": progress.samples_seen, "wall_seconds": progress.wall_seconds}
        self._write("evaluations.jsonl", {**place, **figures, "counts": evaluations.counts()})
        shown = "  ".join(f"{name} {100 * value:.1f}%" for name, value in figures.items())
        of_what = "; ".join(f"{kind} of {describe_count(count)}" for kind, count in evaluations.counts().items())
        self.say(f"step {progress.step}: {shown}  ({of_what})")
        # A run of days does not end for it: the figures and their counts say it, again and again.
        for complaint in evaluations.complaints():
            self.say(f"warning: {complaint}")

    def close(self) -> None:
        """Flush the trackers and leave the terminal tidy."""
        for tracker in self._trackers:
            tracker.close()
        if self._display is not None:
            self._display.close()

    def _start_window(self) -> None:
        self._window_images = 0
        self._window_seconds = 0.0
        self._data_seconds = 0.0

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        if not self._world.is_main:
            return
        with (self._run_dir / name).open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        for tracker in self._trackers:
            tracker.log(self._progress.step, record)

    def _mfu(self, images_per_second_per_device: float | None) -> float | None:
        peak = peak_rate(self._world.device)
        if peak is None or images_per_second_per_device is None:
            return None
        return images_per_second_per_device * self._flops_per_image / peak


class _ProgressBar:
    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        self._progress = rich_progress.Progress(
            rich_progress.TextColumn("training"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[figures]}"),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=first_step, figures="")
        self._progress.start()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def step(self, step: int, record: Mapping[str, Any]) -> None:
        self._progress.update(self._task, completed=step, figures=_figures(record))

    def close(self) -> None:
        self._progress.stop()


class _PlainLines:
    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        self._total_steps = total_steps

    def say(self, text: str) -> None:
        print(text, flush=True)

    def step(self, step: int, record: Mapping[str, Any]) -> None:
        print(f"step {step}/{self._total_steps}  {_figures(record)}", flush=True)

    def close(self) -> None:
        pass


def _figures(record: Mapping[str, Any]) -> str:
    rate = record["images_per_second"]
    shown = "" if rate is None else f"{rate:,.0f} images/s  data wait {100 * record['data_wait_fraction']:.0f}%  "
    mfu = "" if record["mfu"] is None else f"MFU {100 * record['mfu']:.1f}%  "
    skipped = f"  skipped {record['skipped_samples']}" if record["skipped_samples"] else ""
    return (
        f"loss {record['loss']:.4f}  {shown}{mfu}lr {record['learning_rate']:.2e}  scale {record['logit_scale']:.1f}  "
        f"grad norm {record['grad_norm']:.2f}{skipped}"
    )


class _Tracker:
    """One external tracker; the optional package is imported only when it was asked for."""

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _Wandb(_Tracker):
    """The run has the identity that lies in its folder: two folders of one name are two runs, a moved one stays one."""

    def __init__(self, run_dir: Path, run_config: Mapping[str, Any], last_step: int) -> None:
        wandb = _import_tracker("wandb")
        identity = _identity(run_dir)
        settings = {"project": "textlock", "dir": run_dir, "name": run_dir.resolve().name, "config": run_config}
        if last_step:
            # Rewinds the run there, so that steps that are repeated replace what was logged of them.
            try:
                self._run = wandb.init(**settings, resume_from=f"{identity}?_step={last_step}")
                return
            except wandb.Error as error:
                logger.warning(
                    "W&B cannot rewind run %s to step %d (%s): it goes on after the last step it knows, and of the "
                    "steps before that the first values stay",
                    identity,
                    last_step,
                    error,
                )
        self._run = wandb.init(**settings, id=identity, resume="allow")

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self._run.log(dict(record), step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard(_Tracker):
    def __init__(self, run_dir: Path, run_config: Mapping[str, Any], last_step: int) -> None:
        _import_tracker("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop what an earlier process wrote of the steps that are repeated.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1 if last_step else None)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _identity(run_dir: Path) -> str:
    """Return the random word in a run folder that names the run elsewhere; written when it is first asked for."""
    path = run_dir / "run_id"
    if not path.is_file():
        write_text_atomically(path, token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


_TRACKERS = {"wandb": _Wandb, "tensorboard": _Tensorboard}


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError when the package of a tracker is not installed."""
    for name in names:
        _import_tracker(name)


def _import_tracker(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--log.trackers {name} needs the package {name}: pip install 'textlock[{name}]'") from error


def _keep_lines(path: Path, key: str, last: int) -> None:
    """Keep the lines whose ``key`` is at most ``last``; a half-written last line of a killed run goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)[key] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text_atomically(path, "".join(kept))


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
