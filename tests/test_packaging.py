"""What gets installed, and that the layout does not get in anybody's way."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import textlock

from .conftest import ROOT, run


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    source = tmp_path / "source"
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    rooms = ("kernels", "models", "data", "engine", "exports", "search", "evals", "demo", "bench")
    expected = {Path("textlock") / path.relative_to(ROOT) for room in rooms for path in (ROOT / room).glob("*.py")}
    expected |= {
        Path("textlock") / f"{name}.py" for name in ("__init__", "train", "evaluate", "export", "explore", "settings")
    }
    page = ("page.html", "style.css", "script.js")
    expected |= {Path("textlock") / room / "page" / name for room in ("engine", "search") for name in page}
    assert names == expected

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    report = subprocess.run(
        [sys.executable, "-P", "-m", "textlock.engine.report", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert report.returncode == 0, report.stderr
    assert "--paper" in (tmp_path / "report.html").read_text()


def test_training_imports_only_what_it_needs_and_the_root_on_the_path_shadows_no_distribution():
    """Run from the root, as users do, transformers must not find our kernels/ where it looks for its own."""
    unwanted = (
        "matplotlib textlock.bench textlock.engine.report textlock.engine.gallery nvidia.dali tensorboard wandb timm "
        "open_clip webdataset sentence_transformers sklearn"
    )
    code = f"""
import importlib.util, sys
import textlock.train
print(*(set(sys.modules) & set({unwanted.split()})))
from transformers import BertModel
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None, spec
"""
    outcome = run("-c", code)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.split() == []


def test_rooms_are_namespace_folders():
    assert not [path for path in ROOT.glob("*/__init__.py") if not path.parent.name.startswith(".")]


def test_every_dependency_is_pinned_by_the_constraints_and_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == textlock.__version__
    extras = [
        project["optional-dependencies"][name]
        for name in ("gpu", "test", "bench", "mteb", "onnx", "peers", "tensorboard")
    ]

    def names(requirements):
        return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements}

    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert names(sum(extras, project["dependencies"])) <= names(constraints)
