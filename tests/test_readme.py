"""Every command and every Python line of the README, run on a small world."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from textlock.bench.readme import pages
from textlock.exports import onnx_format, open_clip_format, timm_format, transformers_format
from textlock.exports.reading import read_exported

from .conftest import ONE_THREAD, ROOT
from .data.sets import labelled, write_set
from .exports.towers import exported, random_tower

README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
# The paper's configs at a size for a CPU: everything else in the file is used as it stands.
SMALL = [
    "--model.name",
    "eva02_micro_patch8_32",
    "--model.weights",
    "None",
    "--data.image-size",
    "32",
    "--data.batch-size",
    "16",
]
SMALL += [
    "--data.workers",
    "1",
    "--optim.epochs",
    "None",
    "--optim.steps",
    "2",
    "--step.precision",
    "fp32",
    "--device",
    "cpu",
]


def run(command, folder):
    outcome = subprocess.run(command, cwd=folder, env=ONE_THREAD, capture_output=True, text=True, timeout=240)
    assert outcome.returncode == 0, f"{' '.join(command)}\n{outcome.stdout}\n{outcome.stderr}"


@pytest.mark.slow
def test_the_commands_run_in_the_order_of_the_page(small_world, tmp_path):
    """In a copy of the scripts, with pictures and captions where the page says they are."""
    for name in ("configs", "train.py", "evaluate.py", "explore.py", "export.py"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    shutil.copytree(small_world.root / "data" / "heldout", tmp_path / "heldout")
    photos = tmp_path / "photos"
    photos.mkdir()
    lines = ["file\tcaption"]
    for picture in sorted((small_world.root / "data" / "classes").glob("*/*.jpg"))[:40]:
        name = f"{picture.parent.name}-{picture.name}"
        shutil.copy(picture, photos / name)
        lines.append(f"{name}\ta {picture.parent.name.replace('_', ' ')}")
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n")

    names = sorted(path.name for path in photos.iterdir())
    entries = [{"filename": name, "split": "test", "sentences": [{"raw": f"photo {name}"}]} for name in names[:9]]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))
    shutil.copytree(photos, tmp_path / "flickr30k-images")
    write_set(tmp_path / "evalsets" / "wds_cifar10_test", labelled(9, 3), classes=("circle", "star", "square"))

    small = [*SMALL, "--text.name", str(small_world.root / "text")]
    ran = []
    for command in COMMANDS:
        match command:
            case ["make", *_] | ["pip", *_]:
                continue  # what the page's reader runs, and what runs this test
            case ["python", "train.py", *_]:
                run([sys.executable, *command[1:], *small], tmp_path)
            case [
                "torchrun",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "8",
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                _,
                *rest,
            ]:
                shutil.rmtree(tmp_path / "runs")
                launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
                run([*launch, *rest, *small], tmp_path)
            case ["python", "-m", "textlock.data.embeddings", shards, "--tower", _]:
                run([sys.executable, *command[1:3], shards, "--tower", str(small_world.root / "text")], tmp_path)
            case ["python", "explore.py", *rest]:
                # The page is served until Ctrl-C, which tests/test_explore.py presses.
                asked = [] if "--query" in rest else ["--query", "a picture"]
                run([sys.executable, *command[1:], *asked, "--cache", "cache"], tmp_path)
            case ["python", *rest]:
                run([sys.executable, *rest], tmp_path)
            case _:
                pytest.fail(f"README has a command this test does not know: {command}")
        ran.append(command[1])
    assert ran == [
        *["-m"] * 6,
        "train.py",
        "--nnodes",
        "evaluate.py",
        "-m",
        "evaluate.py",
        "explore.py",
        "explore.py",
        "export.py",
    ]
    assert json.loads((tmp_path / "runs/mine/evaluation-datacomp.json").read_text())["tasks"].keys() == {
        "cifar10",
        "flickr30k",
    }

    assert read_exported(tmp_path / "exported").tower.embed_dim == 64


def test_the_files_it_names_exist():
    # config.yaml and its like are what a run writes.
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml|json)|\w+\.py)`", README):
        assert (ROOT / name).exists(), name


def test_its_python_names_what_there_is():
    for module, names in re.findall(r"^from (textlock[\w.]*) import (.+)$", README, re.MULTILINE):
        imported = __import__(module, fromlist=["_"])
        for name in names.split(", "):
            assert hasattr(imported, name), f"{module}.{name}"


def test_its_lines_for_exports_are_those_that_the_formats_are_tested_with():
    vit = exported(random_tower("vit_base_patch16_224", "cls"))
    for module in (transformers_format, timm_format, open_clip_format):
        assert f"```python\n{module.snippets(vit, None)[0]}```" in README, module.__name__
    assert f"```python\n{onnx_format.SNIPPET}\n{onnx_format.TEXT_SNIPPET}```" in README


def test_its_figures_are_those_of_the_files():
    for path, text in pages(ROOT).items():
        assert path.read_text() == text, path


def test_what_it_links_to_exists():
    for page in (ROOT / "README.md", ROOT / "bench" / "RESULTS.md"):
        for name in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / name).exists(), name
