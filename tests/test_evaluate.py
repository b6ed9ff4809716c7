"""evaluate.py on what train.py and export.py write."""

import json

import pytest

from .conftest import records, run


@pytest.fixture(scope="module")
def trained(small_world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    # Patches are dropped in training only: what is measured during the run sees all of them, as evaluate.py does.
    outcome = run("train.py", *small_world.command(run_dir, "--optim.steps", "2", "--model.kept-patches", "9"))
    assert outcome.returncode == 0, outcome.stderr
    return run_dir


def test_figures_are_those_of_the_run(small_world, trained):
    (during,) = records(trained / "evaluations.jsonl")
    for data, names in (("heldout", ("mean_recall@1", "text_to_image_recall@10")), ("classes", ("zero_shot_top1",))):
        folder = small_world.root / "data" / data
        outcome = run("evaluate.py", "--checkpoint", str(trained), "--data", str(folder), "--device", "cpu")
        assert outcome.returncode == 0, outcome.stderr
        written = json.loads((trained / "evaluation.json").read_text())
        assert written["step"] == 2
        for name in names:
            assert written[name] == pytest.approx(during[name], abs=1e-9)
            assert f"{100 * written[name]:6.2f} %" in outcome.stdout


def test_an_exported_folder_gives_the_same_figures(small_world, trained, tmp_path):
    exported, figures = tmp_path / "exported", tmp_path / "figures.json"
    command = ("export.py", "--checkpoint", str(trained), "--format", "transformers", "--output", str(exported))
    outcome = run(*command)
    assert outcome.returncode == 0, outcome.stderr
    data, text = str(small_world.root / "data" / "heldout"), str(small_world.root / "text")
    flags = ("--data", data, "--text", text, "--output", str(figures), "--device", "cpu")
    outcome = run("evaluate.py", "--checkpoint", str(exported), *flags)
    assert outcome.returncode == 0, outcome.stderr
    (during,) = records(trained / "evaluations.jsonl")
    assert json.loads(figures.read_text())["mean_recall@1"] == pytest.approx(during["mean_recall@1"], abs=1e-9)


@pytest.mark.parametrize(
    ("checkpoint", "data", "message"),
    [("nowhere", "heldout", "holds no checkpoint"), (None, "nowhere", "nowhere is not a folder")],
    ids=["no checkpoint", "no data"],
)
def test_bad_input_is_one_sentence(small_world, trained, checkpoint, data, message):
    where = trained if checkpoint is None else small_world.root / checkpoint
    outcome = run("evaluate.py", "--checkpoint", str(where), "--data", str(small_world.root / "data" / data))
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ") and message in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1


def test_another_text_tower_is_refused(small_world, trained, tmp_path):
    text = tmp_path / "text"
    captions = small_world.root / "data" / "captions.txt"
    made = run(
        "-m", *f"textlock.demo.text_tower --captions {captions} --output {text} --width 64 --heads 1 --seed 9".split()
    )
    assert made.returncode == 0, made.stderr
    data = str(small_world.root / "data" / "heldout")
    outcome = run("evaluate.py", "--checkpoint", str(trained), "--data", data, "--text", str(text))
    assert outcome.returncode == 2 and "another text tower" in outcome.stderr
