"""Clocks, lines and counts of a run."""

import json
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from textlock.data.loader import SKIP_KINDS
from textlock.engine.checkpoint import Progress
from textlock.engine.distributed import World
from textlock.engine.metrics import Metrics, QueuedStep
from textlock.engine.step import StepResult
from textlock.models.vision import build_vision_tower

from .training import MICRO, config_of

EVALUATIONS = SimpleNamespace(
    counts=lambda: {"zero_shot": {"images": 1200, "classes": 3, "skipped": {}}},
    complaints=lambda: ["no image of class a"],
)
WORLD = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def tower():
    return build_vision_tower(MICRO)


def open_metrics(folder, tower, progress, *flags, world=WORLD):
    return Metrics(config_of(*flags).log, folder, {}, world=world, tower=tower, progress=progress, total_steps=9)


def numbers(*, norm=4.0, stops=0.0, **skipped):
    """Return the last arguments of a `QueuedStep`."""
    result = StepResult(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(5), 8)
    return result, torch.tensor(norm), torch.tensor([stops, *(float(skipped.get(kind, 0)) for kind in SKIP_KINDS)])


def finish(metrics, progress, *, samples_seen, **skipped):
    """Let a step end as the training loop does."""
    progress.step += 1
    batch = SimpleNamespace(position=samples_seen, epoch=0)
    outcome = QueuedStep(progress.step, batch, 3.0, *numbers(**skipped)).wait()
    metrics.step_done(outcome, images=8)
    return outcome


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rates_leave_out_the_first_step_and_what_happens_in_pauses(tmp_path, tower, monkeypatch):
    clock = iter_clock(monkeypatch)
    progress = Progress()
    metrics = open_metrics(tmp_path, tower, progress)
    clock.advance(100)  # the first step warms up
    metrics.log(finish(metrics, progress, samples_seen=8))
    for step in (2, 3):
        with metrics.waiting_for_data():
            clock.advance(1)
        clock.advance(3)
        outcome = finish(metrics, progress, samples_seen=8 * step, empty=step, damaged=1)
        with metrics.paused():
            clock.advance(50)
    metrics.log(outcome)
    first, second = lines(tmp_path)
    assert first["images_per_second"] is None and first["data_wait_fraction"] is None
    assert second["images_per_second"] == second["images_per_second_per_device"] == pytest.approx(2.0)
    assert second["data_wait_fraction"] == pytest.approx(0.25)
    assert (second["step"], second["samples_seen"], second["duplicate_captions"]) == (3, 24, 5)
    assert (first["skipped_samples"], first["skipped_by_kind"]) == (0, {})
    assert (second["skipped_samples"], second["skipped_by_kind"]) == (7, {"empty": 5, "damaged": 2})
    assert progress.train_seconds == pytest.approx(108) and progress.wall_seconds == pytest.approx(208)


def test_a_resumed_run_drops_the_lines_of_steps_it_runs_again(tmp_path, tower):
    written = "".join(json.dumps({"step": step, "loss": 0.0}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo'
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (tmp_path / name).write_text(written)
    (tmp_path / "skipped.jsonl").write_text("".join(f'{{"position": {at}}}\n' for at in (3, 23, 24, 30)))
    progress = Progress(step=3, samples_seen=24, train_seconds=7.0, wall_seconds=11.0, skipped_by_kind={"empty": 2})
    metrics = open_metrics(tmp_path, tower, progress)
    metrics.log(finish(metrics, progress, samples_seen=32, empty=1))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(tmp_path, "evaluations.jsonl")] == [1, 2, 3]
    assert lines(tmp_path)[-1]["skipped_samples"] == 3
    assert [line["position"] for line in lines(tmp_path, "skipped.jsonl")] == [3, 23]
    assert progress.train_seconds >= 7.0 and progress.wall_seconds >= 11.0


def test_other_ranks_and_evaluations_of_nothing_say_and_write_nothing(tmp_path, tower, capsys):
    progress = Progress()
    metrics = open_metrics(tmp_path, tower, progress, world=World(1, 2, torch.device("cpu"), None))
    metrics.log(finish(metrics, progress, samples_seen=8))
    metrics.log_evaluation({"zero_shot_top1": 0.5}, EVALUATIONS)
    metrics.close()
    open_metrics(tmp_path, tower, Progress()).log_evaluation({}, EVALUATIONS)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_an_evaluation_says_what_it_is_of_and_what_is_wrong_with_it(tmp_path, tower, capsys):
    metrics = open_metrics(tmp_path, tower, Progress(step=3))
    metrics.log_evaluation({"zero_shot_top1": 0.5}, EVALUATIONS)
    (line,) = lines(tmp_path, "evaluations.jsonl")
    assert (line["zero_shot_top1"], line["counts"]) == (0.5, EVALUATIONS.counts())
    said = capsys.readouterr().out
    assert "zero_shot_top1 50.0%  (zero_shot of 1,200 images, 3 classes)\nwarning: no image of class a\n" in said


def test_tensorboard_gets_the_same_figures(tmp_path, tower):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress = Progress()
    metrics = open_metrics(tmp_path, tower, progress, "--log.trackers", "tensorboard")
    metrics.log(finish(metrics, progress, samples_seen=8))
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("grad_norm")] == [(1, 4.0)]


def test_steps_that_run_again_replace_those_that_tensorboard_has(tmp_path, tower):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, norms in ((0, (1.0, 2.0, 3.0)), (1, (5.0, 6.0))):
        progress = Progress(step=first)
        metrics = open_metrics(tmp_path, tower, progress, "--log.trackers", "tensorboard")
        for norm in norms:
            metrics.log(finish(metrics, progress, samples_seen=8, norm=norm))
        metrics.close()
        if first == 0:
            time.sleep(1.1)  # files are read in the order of their times, which are whole seconds
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("grad_norm")] == [(1, 1.0), (2, 5.0), (3, 6.0)]


def test_wandb_goes_on_in_the_run_of_the_folder_from_the_step_of_the_checkpoint(tmp_path, tower, monkeypatch, caplog):
    calls = []

    class Error(Exception):
        pass

    def init(*, project, dir, name, config, id=None, resume=None, resume_from=None):
        calls.append((id, resume, resume_from))
        if resume_from and refuses:
            raise Error("not available")
        return SimpleNamespace(log=lambda record, step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error))
    refuses = False
    folders = [tmp_path / one / "run" for one in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
        open_metrics(folder, tower, Progress(), "--log.trackers", "wandb").close()
    identities = [(folder / "run_id").read_text().strip() for folder in folders]
    assert calls == [(identity, "allow", None) for identity in identities] and len(set(identities)) == 2
    calls.clear()
    moved = folders[0].rename(tmp_path / "moved")
    open_metrics(moved, tower, Progress(step=7), "--log.trackers", "wandb").close()
    assert calls == [(None, None, f"{identities[0]}?_step=7")]
    calls.clear()
    refuses = True
    open_metrics(moved, tower, Progress(step=7), "--log.trackers", "wandb").close()
    assert calls == [(None, None, f"{identities[0]}?_step=7"), (identities[0], "allow", None)]
    assert f"W&B cannot rewind run {identities[0]} to step 7 (not available)" in caplog.text


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_one_sentence(norm):
    with pytest.raises(ValueError, match=r"step 7: loss 1.0 with gradient norm (nan|inf) is not finite"):
        QueuedStep(7, SimpleNamespace(position=8, epoch=0), 3.0, *numbers(norm=norm)).wait()


def test_a_queued_step_lets_go_of_its_images():
    images = torch.zeros(1, 2, 2, 3)
    freed = weakref.ref(images)
    queued = QueuedStep(7, SimpleNamespace(position=8, epoch=1, images=images), 3.0, *numbers())
    del images
    assert freed() is None
    outcome = queued.wait()
    assert (outcome.position, outcome.epoch) == (8, 1)


@pytest.mark.parametrize(("stops", "stop"), [(0.0, False), (1.0, True), (3.0, True)])
def test_one_rank_that_was_asked_stops_all(stops, stop):
    outcome = QueuedStep(7, SimpleNamespace(position=8, epoch=0), 3.0, *numbers(stops=stops, empty=5)).wait()
    assert (outcome.stop, outcome.skipped, outcome.duplicate_captions) == (stop, {"empty": 5}, 5)


class iter_clock:
    """time.perf_counter that moves only when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def advance(self, seconds):
        self.now += seconds
