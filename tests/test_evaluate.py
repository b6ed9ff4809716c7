"""evaluate.py on what train.py and export.py write."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from textlock.data.images import eval_image
from textlock.demo.text_tower import write_random_text_tower
from textlock.engine.trained import load_tower
from textlock.evaluate import mteb_encoder
from textlock.models.text import build_text_tower

from .commands import run_here
from .conftest import records, run, torchrun
from .data.sets import captioned, labelled, write_set


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


def evaluate_suite(checkpoint, root, *flags, suite="datacomp"):
    return evaluate(checkpoint, root, "--suite", suite, *flags)


@pytest.fixture
def sets(tmp_path):
    """A root with some of DataComp's sets, of which FMoW lacks the regions of its images."""
    root, names = tmp_path / "sets", ("red circle", "blue star", "green square")
    write_set(root / "wds_mnist_test", labelled(12, 3), classes=names)
    write_set(root / "wds_vtab-dtd_test", labelled(10, 3), classes=names, shards=2)
    write_set(root / "wds_flickr30k_test", captioned(9), kind="retrieval")
    write_set(root / "wds_wilds-fmow_test", labelled(8, 3), classes=names)
    write_set(root / "wds_geode_test", labelled(14, 3, groups=[0, 1]), classes=names)
    return root


def rows_of(out):
    return {row[0]: row[1:] for row in (re.split(r"\s{2,}", line) for line in out.splitlines())}


def test_a_suite_goes_on_where_it_was_stopped(trained, sets, tmp_path):
    output = tmp_path / "figures.json"
    status, out, err = evaluate_suite(trained, sets, "--output", output)
    assert status == 2 and err.splitlines()[-1] == "error: no figure of wilds/fmow: the table says why"
    rows, written = rows_of(out), json.loads(output.read_text())
    assert len([row for row in rows.values() if row[-1:] == ["not here"]]) == 38 - 5
    assert rows["FMoW"][:4] == ["acc_worst_region", "-", "-", "-"] and "does not say the region" in rows["FMoW"][4]
    assert rows["Average"] == ["average", "-", "56.80", "-", "no average: 4 of 38 tasks are there"]
    assert written["tasks"].keys() == {"mnist", "vtab/dtd", "flickr30k", "geode"} and written["averages"] == {}
    mnist = 100 * written["tasks"]["mnist"]["figures"]["acc1"]
    assert rows["MNIST"] == ["acc1", f"{mnist:.2f}", "-", "-", "12 images, 3 classes; the whole set has 10,000"]
    worst = min(group["share"] for group in written["tasks"]["geode"]["groups"].values())
    assert rows["GeoDE"][:2] == ["acc_wg", f"{100 * worst:.2f}"]
    assert written["tasks"]["mnist"]["measured"]["step"] == 2 and written["identity"]["precision"] == "fp32"

    # What is done is not measured again: these images are another colour now, in shards of the same size.
    shard = sets / "wds_mnist_test" / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"XXXX"))
    shutil.rmtree(sets / "wds_wilds-fmow_test")
    status, again, err = evaluate_suite(trained, sets, "--output", output)
    assert status == 0 and json.loads(output.read_text())["tasks"] == written["tasks"]
    assert rows_of(again)["MNIST"] == rows["MNIST"] and "MNIST:" not in err

    # A set that has changed is, and what cannot be read is refused until it is allowed.
    (sets / "wds_mnist_test" / "classnames.txt").write_text("circle\nstar\nsquare\n")
    status, out, err = evaluate_suite(trained, sets, "--output", output)
    assert status == 2 and "no figure of mnist" in err and "no image of" in rows_of(out)["MNIST"][4]
    assert json.loads(output.read_text())["tasks"].keys() == {"vtab/dtd", "flickr30k", "geode"}
    shard.write_bytes(shard.read_bytes().replace(b"XXXX", b"IDAT", 11))
    status, out, err = evaluate_suite(trained, sets, "--output", output, "--allow-missing")
    assert status == 0, err
    assert "MNIST:" in err and rows_of(out)["MNIST"][4].startswith(
        "11 images, 3 classes, without 1 that cannot be read"
    )
    status, _, err = evaluate_suite(trained, sets, "--output", output)
    assert status == 2 and "no figure of mnist" in err


@pytest.mark.slow
def test_a_suite_on_two_ranks_gives_the_figures_of_one(trained, sets, tmp_path):
    shutil.rmtree(sets / "wds_wilds-fmow_test")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    status, _, err = evaluate_suite(trained, sets, "--output", one)
    assert status == 0, err
    flags = ["--checkpoint", trained, "--data", sets, "--suite", "datacomp", "--device", "cpu", "--output", two]
    outcome = torchrun(2, *map(str, flags), script="evaluate.py")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(two.read_text())["tasks"] == json.loads(one.read_text())["tasks"]


def test_figures_of_a_suite_are_not_mixed(small_world, trained, sets, tmp_path):
    shutil.rmtree(sets / "wds_wilds-fmow_test")
    status, _, err = evaluate_suite(trained, sets)
    assert status == 0 and (trained / "evaluation-datacomp.json").is_file(), err
    before = (trained / "evaluation-datacomp.json").read_text()
    other = tmp_path / "other"
    assert run("train.py", *small_world.command(other, "--optim.steps", "1")).returncode == 0
    status, out, err = evaluate_suite(other, sets, "--output", trained / "evaluation-datacomp.json")
    assert (status, out) == (2, "") and "holds figures of another image tower, and they are not mixed" in err
    flags = ("--output", trained / "evaluation-datacomp.json")
    status, _, err = evaluate_suite(trained, sets, *flags, suite="clip-benchmark")
    assert status == 2 and "holds figures of another suite, and they are not mixed" in err
    assert (trained / "evaluation-datacomp.json").read_text() == before


def test_bad_input_of_a_suite_is_one_sentence_before_anything_is_loaded(trained, sets, tmp_path):
    (tmp_path / "empty").mkdir()
    (sets / "wds_mnist_test" / "test" / "nshards.txt").unlink()
    for root, flags, message in [
        (tmp_path / "nowhere", (), "nowhere is not a folder"),
        (tmp_path / "empty", (), "holds no set of the suite"),
        (sets, (), "nshards.txt is missing"),
        (sets, ("--templates", "a {}"), "--templates is ('a {}',), must be left out with --suite"),
        (sets, ("--class-names", "imagenet"), "--class-names is 'imagenet', must be left out with --suite"),
    ]:
        # There is no such checkpoint either, which would be said when it is loaded.
        status, out, err = evaluate_suite(tmp_path / "no checkpoint", root, *flags)
        assert (status, out) == (2, "") and err.startswith("error: ") and message in err
        assert len(err.splitlines()) == 1
    status, _, err = evaluate_suite(trained, sets, suite="imagenet")
    assert status == 2 and "datacomp" in err and "clip-benchmark" in err


def test_both_towers_as_an_encoder_of_mteb(small_world, trained):
    pytest.importorskip("mteb")
    encoder = mteb_encoder(trained, device="cpu")
    assert encoder.mteb_model_meta.name == "textlock/run"
    tower = build_text_tower(small_world.root / "text")
    task = SimpleNamespace(name="any", type="STS", modalities=["text"])
    texts = [{"text": ["a red circle", "two blue stars"]}]
    assert torch.allclose(encoder.encode(texts, task_metadata=task), tower.encode(texts[0]["text"]), atol=1e-6)
    picture = next((small_world.root / "data" / "classes").glob("*/*.jpg"))
    image = load_tower(trained).tower.eval()(eval_image(picture.read_bytes(), 32)[None])
    rows = encoder.encode([{"image": [Image.open(picture)]}], task_metadata=task)
    assert torch.allclose(rows, torch.nn.functional.normalize(image.detach(), dim=-1), atol=1e-5)

    # What decides the figures decides under which name mteb keeps them.
    others = [mteb_encoder(trained, device="cpu", **{key: value}) for key, value in (
        ("prompts", {"query": "red: "}), ("prompts", {"document": "red: "}), ("max_length", 9)
    )]  # fmt: skip
    assert len({it.mteb_model_meta.revision for it in (encoder, *others)}) == 4
    assert mteb_encoder(trained, device="cpu").mteb_model_meta.revision == encoder.mteb_model_meta.revision
    prefixed = build_text_tower(small_world.root / "text", prefix="red: ").encode(texts[0]["text"])
    rows = others[0].encode(texts, task_metadata=task, prompt_type=SimpleNamespace(value="query"))
    assert torch.allclose(rows, prefixed, atol=1e-6)
    assert others[2].mteb_model_meta.max_tokens == 9


def test_without_mteb_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "textlock.evals.mteb", None)
    with pytest.raises(ValueError, match=r'^mteb is not installed: pip install "textlock\[mteb\]"$'):
        mteb_encoder("nowhere")
