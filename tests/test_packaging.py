"""What gets installed, and that the layout does not get in anybody's way."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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
    rooms = ("kernels", "models", "data", "engine", "evals", "bench")
    expected = {Path("textlock") / path.relative_to(ROOT) for room in rooms for path in (ROOT / room).glob("*.py")}
    expected |= {
        Path("textlock") / name for name in ("__init__.py", "train.py", "evaluate.py", "export.py", "settings.py")
    }
    assert names == expected


def test_the_root_on_the_path_shadows_no_distribution():
    """Run from the root, as users do, transformers must not find our kernels/ where it looks for its own."""
    code = (
        "import importlib.util, transformers; from transformers import BertModel; import textlock.kernels.contrastive;"
    )
    code += "spec = importlib.util.find_spec('kernels'); assert spec is None or spec.origin is None, spec"
    outcome = run("-c", code)
    assert outcome.returncode == 0, outcome.stderr


def test_rooms_are_namespace_folders():
    assert not [path for path in ROOT.glob("*/__init__.py") if not path.parent.name.startswith(".")]


def test_every_dependency_is_pinned_by_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["gpu"], *extras["test"], *extras["peers"], *extras["tensorboard"]]
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for requirement in asked:
        name = requirement.split(";")[0].split(">")[0].split("<")[0].split("=")[0].strip().lower().replace("_", "-")
        assert name in pinned, name


def test_versions_agree():
    import textlock

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == textlock.__version__
