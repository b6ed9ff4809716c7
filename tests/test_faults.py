"""Runs of several processes that lose one, or are asked to stop: they end with the cause, and go on where they were."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import torch.distributed as dist

from textlock.engine.checkpoint import read_latest, verify_checkpoint
from textlock.engine.distributed import why_lost

from .conftest import losses, torchrun

# Stands in for train.py: one rank is struck in a step of its first attempts, after the backward, before the sum.
STRUCK = """
import os, signal, sys, time
from textlock import train
from textlock.engine import optim

rank, step, attempts, blow = sys.argv.pop(1).split(":")
struck = os.environ["RANK"] == rank and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(attempts)

class Gradients(optim.FlatGradients):
    steps = 0

    def finish_reduction(self, group):
        Gradients.steps += 1
        if struck and Gradients.steps == int(step):
            print(f"struck at {time.time()}", flush=True)
            if blow == "exit":
                os._exit(7)
            if blow == "launcher":
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(2)  # the launcher passes it on
            else:
                os.kill(os.getpid(), signal.Signals[blow])
        super().finish_reduction(group)

optim.FlatGradients = Gradients
train.main()
print(f"a rank took {Gradients.steps} steps", flush=True)
"""

Launch = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def launch(small_world, tmp_path_factory) -> Launch:
    """Return a function that trains in ``run_dir`` on some ranks, of which one is struck."""
    script = tmp_path_factory.mktemp("struck") / "struck.py"
    script.write_text(STRUCK)

    def start(run_dir: Path, blow: str, *, ranks: int = 2, restarts: int = 0) -> CompletedProcess[str]:
        command = small_world.command(run_dir, "--step.micro-batch", "4")
        return torchrun(ranks, blow, *command, script=str(script), restarts=restarts)

    return start


@pytest.mark.slow
def test_the_launcher_restarts_a_run_from_its_last_checkpoint(launch, two_ranks, tmp_path):
    """Twice: each attempt has to find its own peers in the launcher's store."""
    outcome = launch(tmp_path / "run", "1:6:2:exit", restarts=2)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("struck at") == 2
    assert re.findall(r"going on after step (\d+)", outcome.stdout) == ["4", "8"]
    assert losses(tmp_path / "run") == losses(two_ranks)


@pytest.mark.slow
def test_a_killed_rank_ends_all_with_the_cause_and_leaves_the_last_checkpoint(launch, tmp_path):
    outcome = launch(tmp_path / "run", "2:6:1:SIGKILL", ranks=4)
    ended = time.time()
    assert outcome.returncode == 1
    (struck,) = re.findall(r"struck at ([\d.]+)", outcome.stdout)
    assert ended - float(struck) < 60
    assert re.search(r"Root Cause.*rank +: 2 .*Signal 9 \(SIGKILL\)", outcome.stderr, re.DOTALL)
    assert re.search(r"error: rank [013] lost another rank; .*goes on from the last checkpoint", outcome.stderr)
    assert "[rank" not in outcome.stderr, "torch begins the lines of a rank's traceback with this"
    checkpoint, complaints = read_latest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.progress.step == 4 and not complaints


@pytest.mark.slow
@pytest.mark.parametrize(("blow", "code"), [("launcher", 1), ("SIGTERM", 0)], ids=["launcher", "one rank"])
def test_sigterm_stops_all_ranks_after_the_same_step(launch, two_ranks, tmp_path, blow, code):
    outcome = launch(tmp_path / "run", f"1:6:1:{blow}")
    assert outcome.returncode == code, outcome.stderr  # the launcher itself ends with 1 after a signal
    assert re.findall(r"a rank took (\d+) steps", outcome.stdout) == ["7", "7"]
    assert "stopped after step 7 of 12" in outcome.stdout
    verify_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000007")
    assert losses(tmp_path / "run") == losses(two_ranks)[:7]


GLOO = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:1976: Connection reset by peer"
LOST = {
    "gloo": (RuntimeError(f"{GLOO}. This is typically caused by a remote worker hanging."), GLOO),
    "NCCL": (dist.DistBackendError("NCCL error: remote process exited\nLast error:\nmore"), "remote process exited"),
    "store": (dist.DistNetworkError("The client socket has timed out"), "The client socket has timed out"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_lost_rank_is_one_sentence(case):
    error, reason = LOST[case]
    sentence = why_lost(error)
    assert sentence is not None and f": {reason}. The same command" in sentence.replace("NCCL error: ", "")
    assert "\n" not in sentence


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), torch.OutOfMemoryError("CUDA out of memory")])
def test_no_other_error_is_taken_for_a_lost_rank(error):
    assert why_lost(error) is None
