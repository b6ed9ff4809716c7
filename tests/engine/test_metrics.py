"""Clocks, lines and counts of a run."""

import json
import time

import pytest
import torch

from textlock.engine.checkpoint import Progress
from textlock.engine.config import parse_config
from textlock.engine.distributed import World
from textlock.engine.metrics import Metrics, flops_per_image
from textlock.models.vision import build_vision_tower

WORLD = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def tower():
    return build_vision_tower("eva02_micro_patch8_32")


def open_metrics(folder, tower, progress, *flags):
    arguments = ["--run-dir", str(folder), "--data.shards", "x", "--data.batch-size", "8", "--data.image-size", "32"]
    config = parse_config([*arguments, "--data.workers", "1", "--optim.steps", "9", *flags])
    return Metrics(config, WORLD, tower, progress, 9)


def log(metrics):
    metrics.log(epoch=0, loss=1.0, logit_scale=2.0, learning_rate=3.0, grad_norm=4.0, duplicate_captions=5)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rates_leave_out_the_first_step_and_what_happens_in_pauses(tmp_path, tower, monkeypatch):
    clock = iter_clock(monkeypatch)
    progress = Progress()
    metrics = open_metrics(tmp_path, tower, progress)
    clock.advance(100)  # the first step warms up
    metrics.step_done(images=8, samples_seen=8, skipped={})
    log(metrics)
    for step in (2, 3):
        with metrics.waiting_for_data():
            clock.advance(1)
        clock.advance(3)
        metrics.step_done(images=8, samples_seen=8 * step, skipped={"empty": step, "damaged": 1})
        with metrics.paused():
            clock.advance(50)
    log(metrics)
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
    metrics.step_done(images=8, samples_seen=32, skipped={"empty": 1})
    log(metrics)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(tmp_path, "evaluations.jsonl")] == [1, 2, 3]
    assert lines(tmp_path)[-1]["skipped_samples"] == 3
    assert [line["position"] for line in lines(tmp_path, "skipped.jsonl")] == [3, 23]
    assert progress.train_seconds >= 7.0 and progress.wall_seconds >= 11.0


def test_other_ranks_write_nothing(tmp_path, tower, capsys):
    other = World(1, 2, torch.device("cpu"), None)
    arguments = ["--run-dir", str(tmp_path), "--data.shards", "x", "--data.batch-size", "8", "--data.image-size", "32"]
    config = parse_config([*arguments, "--data.workers", "1", "--optim.steps", "9"])
    metrics = Metrics(config, other, tower, Progress(), 9)
    metrics.step_done(images=8, samples_seen=8, skipped={})
    log(metrics)
    metrics.log_evaluation({"zero_shot_top1": 0.5})
    metrics.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_tensorboard_gets_the_same_figures(tmp_path, tower):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = open_metrics(tmp_path, tower, Progress(), "--log.trackers", "tensorboard")
    metrics.step_done(images=8, samples_seen=8, skipped={})
    log(metrics)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("grad_norm")] == [(1, 4.0)]


def test_flops_are_those_of_the_published_accounting():
    """106.6 GFLOP forward and backward, of which 1.4 are the MAP head's products that absorption removes."""
    tower = build_vision_tower("eva02_base_patch16_224")
    assert flops_per_image(tower) / 1e9 == pytest.approx(106.6 - 1.4, rel=0.01)


class iter_clock:
    """time.perf_counter that moves only when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def advance(self, seconds):
        self.now += seconds
