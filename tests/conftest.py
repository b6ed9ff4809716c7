"""A small run's inputs, made once a session by the project's own commands."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml

# Where there is no GPU the kernels run in Triton's interpreter, which has to be known before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What torch compiled for one processor, or for one setting of ATEN_CPU_CAPABILITY, is wrong on another.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="textlock-tests-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

# Where transformers keeps the code of the folders that it loads.
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="textlock-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

ROOT = Path(__file__).parents[1]
# Towers this small are slower on two threads than on one.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first, so that none of them is what a single core does at the end."""
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


@dataclass(frozen=True)
class SmallWorld:
    """Demo data in small, a text tower for it and a config that trains on it in seconds."""

    root: Path
    config: Path

    def command(self, run_dir: Path, *flags: str) -> list[str]:
        """Return the arguments of train.py for a run in ``run_dir``."""
        return ["--config", str(self.config), "--run-dir", str(run_dir), *flags]


def run(*command: str, timeout: float = 240) -> CompletedProcess[str]:
    """Run a command in the repository and return what it said."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=timeout
    )


def torchrun(processes: int, *arguments: str, restarts: int = 0, script: str = "train.py") -> CompletedProcess[str]:
    """Run train.py, or what stands in for it, on some ranks of this machine and return what they said."""
    flags = ["--standalone", "--max-restarts", str(restarts), "--nproc-per-node", str(processes)]
    return run("-m", "torch.distributed.run", *flags, script, *arguments)


def records(path: Path) -> list[dict]:
    """Return the objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every step of a run."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in records(run_dir / "metrics.jsonl")]


ON_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
)


@pytest.fixture(params=["cpu", ON_GPU])
def device(request) -> torch.device:
    """Each device that this machine may have: what asks for it runs once on the CPU and once on the GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> SmallWorld:
    """Pack 200 demo images into shards, write a random text tower and a config for twelve steps."""
    root = tmp_path_factory.mktemp("world")
    data = root / "data"
    scenes = f"textlock.demo.scenes --output {data} --train 200 --heldout 40 --per-class 1 --workers 1"
    text = f"textlock.demo.text_tower --captions {data}/captions.txt --output {root}/text --width 64 --heads 1"
    for command in (scenes, text):
        outcome = run("-m", *command.split())
        assert outcome.returncode == 0, outcome.stderr
    config = {
        "model": {"name": "eva02_micro_patch8_32"},
        "text": {"name": str(root / "text")},
        "data": {"shards": str(data / "train"), "batch_size": 16, "image_size": 32, "workers": 1, "open_shards": 2},
        "loss": {"mask_duplicates": True},
        "step": {"micro_batch": 8},
        "optim": {"steps": 12, "learning_rate": 1e-3, "warmup_steps": 2},
        "evals": {
            "zero_shot": str(data / "classes"),
            "retrieval": str(data / "heldout"),
            "templates": ["{}"],
            "every": 0,
        },
        "checkpoint": {"every": 4},
        "log": {"every": 1},
        "device": "cpu",
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return SmallWorld(root, path)


@pytest.fixture(scope="session")
def two_ranks(small_world, tmp_path_factory) -> Path:
    """A run of twelve steps on two ranks that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("two ranks") / "run"
    outcome = torchrun(2, *small_world.command(run_dir, "--step.micro-batch", "4"))
    assert outcome.returncode == 0, outcome.stderr
    return run_dir
