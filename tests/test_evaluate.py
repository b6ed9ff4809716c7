"""evaluate.py on what train.py and export.py write."""

import json
import shutil

import pytest
import torch

from textlock.demo.text_tower import write_random_text_tower

from .commands import run_here
from .conftest import records, run


@pytest.fixture(scope="module")
def trained(small_world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    # Patches are dropped in training only: what is measured during the run sees all of them, as evaluate.py does.
    outcome = run("train.py", *small_world.command(run_dir, "--optim.steps", "2", "--model.kept-patches", "9"))
    assert outcome.returncode == 0, outcome.stderr
    return run_dir


@pytest.fixture(autouse=True)
def one_thread():
    """Sum in the order in which the run did."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def evaluate(checkpoint, data, *flags):
    return run_here("evaluate.py", "--checkpoint", checkpoint, "--data", data, "--device", "cpu", *flags)


def test_figures_are_those_of_the_run(small_world, trained):
    (during,) = records(trained / "evaluations.jsonl")
    for data, names in (("heldout", ("mean_recall@1", "text_to_image_recall@10")), ("classes", ("zero_shot_top1",))):
        status, out, err = evaluate(trained, small_world.root / "data" / data)
        assert status == 0, err
        written = json.loads((trained / "evaluation.json").read_text())
        assert written["step"] == 2
        for name in names:
            assert written[name] == pytest.approx(during[name], abs=1e-9)
            assert f"{100 * written[name]:6.2f} %" in out


@pytest.mark.parametrize("layout", ["transformers", "sentence-transformers"])
def test_an_exported_folder_gives_the_same_figures(small_world, trained, tmp_path, layout):
    """Without --text where the folder holds a copy of the text tower."""
    exported, figures = tmp_path / "exported", tmp_path / "figures.json"
    copied = layout == "sentence-transformers"
    if copied:
        pytest.importorskip("sentence_transformers")
    flags = ("--checkpoint", trained, "--format", layout, "--output", exported, *["--copy-text"] * copied)
    status, _, err = run_here("export.py", *flags)
    assert status == 0, err
    flags = ("--output", figures, *(() if copied else ("--text", small_world.root / "text")))
    status, _, err = evaluate(exported, small_world.root / "data" / "heldout", *flags)
    assert status == 0, err
    (during,) = records(trained / "evaluations.jsonl")
    assert json.loads(figures.read_text())["mean_recall@1"] == pytest.approx(during["mean_recall@1"], abs=1e-9)


def test_class_folders_as_they_come(small_world, trained, tmp_path):
    """Ids for names, other formats, and a class of damaged files."""
    source, classes, output = small_world.root / "data" / "classes", tmp_path / "classes", tmp_path / "figures.json"
    names = sorted(path.name for path in source.iterdir())
    for number, name in enumerate(names):
        shutil.copytree(source / name, classes / f"n{number:08d}")
    status, _, err = evaluate(trained, classes)
    assert status == 2 and "called n00000000 and the like, which no text says: give their names" in err
    (tmp_path / "names.txt").write_text("".join(name.replace("_", " ") + "\n" for name in names))
    flags = ("--class-names", tmp_path / "names.txt", "--output", output)
    status, out, err = evaluate(trained, classes, *flags)
    assert status == 0, err
    (during,) = records(trained / "evaluations.jsonl")
    figures = json.loads(output.read_text())
    assert figures["zero_shot_top1"] == pytest.approx(during["zero_shot_top1"], abs=1e-9)
    assert figures["counts"] == {"zero_shot": during["counts"]["zero_shot"]}
    assert during["counts"]["retrieval"] == {"images": 40, "captions": 40, "skipped": {}}
    assert f"zero_shot of {len(names)} images, {len(names)} classes\n" in out

    output.unlink()
    (image,) = (classes / "n00000003").iterdir()
    image.write_bytes(b"<html>")
    status, out, err = evaluate(trained, classes, *flags)
    assert (status, out, output.exists()) == (2, "", False)
    assert (
        "error: zero_shot: no image of class n00000003 can be read; zero_shot: 1 of" in err and "--allow-missing" in err
    )
    status, out, err = evaluate(trained, classes, *flags, "--allow-missing")
    assert status == 0 and "warning: zero_shot: no image of class n00000003" in err
    assert json.loads(output.read_text())["counts"]["zero_shot"]["skipped"] == {"format": 1}


def test_bad_input_is_one_sentence(small_world, trained, tmp_path):
    heldout, other = small_world.root / "data" / "heldout", tmp_path / "text"
    captions = (small_world.root / "data" / "captions.txt").read_text().splitlines()
    write_random_text_tower(other, captions, width=64, heads=1, seed=9)
    for arguments, message in [
        ((tmp_path / "nowhere", heldout), "holds no checkpoint"),
        ((trained, tmp_path / "nowhere"), "nowhere is not a folder"),
        ((trained, heldout, "--text", other), "another text tower"),
        ((trained, heldout, "--class-names", other), "must be left out where --data holds shards"),
    ]:
        status, _, err = evaluate(*arguments)
        assert status == 2 and err.startswith("error: ") and message in err
        assert len(err.splitlines()) == 1
