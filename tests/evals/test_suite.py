"""The evaluations of a run on small folders, with encoders whose answers are known."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from textlock.evals.counts import describe_count
from textlock.evals.suite import EvalConfig, EvaluationSuite

from ..data.tars import sample, write_shard
from ..data.zoo import encode
from .toys import see_colours

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
UNSEEN = {"cyan": (0, 255, 255)}
ALL = {**COLOURS, **UNSEEN}


class ColourText:
    """A text tower that hears colours: the row of a text is the sum of the colours it names."""

    def encode(self, captions):
        rows = [
            sum((torch.tensor(rgb).float() for name, rgb in ALL.items() if name in text), torch.full((3,), 1e-3))
            for text in captions
        ]
        return F.normalize(torch.stack(rows), dim=-1) if rows else torch.empty(0, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    members = []
    for folder, colours in (("classes", COLOURS), ("unseen", UNSEEN)):
        for name, rgb in colours.items():
            image = encode(Image.new("RGB", (40, 40), rgb), "PNG")
            (root / folder / name).mkdir(parents=True)
            (root / folder / name / "wall.png").write_bytes(image)
            members += sample(name, jpg=None, png=image, txt=f"a {name} wall".encode())
    write_shard(root / "shards", members)
    return root


def suite(folders, **changes):
    settings = {
        "zero_shot": str(folders / "classes"),
        "zero_shot_unseen": str(folders / "unseen"),
        "retrieval": str(folders / "shards"),
        "templates": ("a {} wall",),
    }
    config = EvalConfig(**{**settings, **changes}, batch_size=2)
    return EvaluationSuite(ColourText(), config, image_size=16, group=None)


def test_a_perfect_encoder_is_perfect_and_a_blind_one_guesses(folders):
    figures = suite(folders).run(see_colours)
    assert figures["zero_shot_top1"] == figures["zero_shot_unseen_top1"] == figures["mean_recall@1"] == 1.0
    blind = suite(folders).run(lambda images: torch.ones(len(images), 3))
    assert blind["zero_shot_top1"] <= 1 / 3 and blind["mean_recall@1"] < 0.5


def test_unseen_classes_compete_with_the_seen_ones(folders):
    """An encoder that takes cyan for blue is wrong on the unseen folder although cyan is its only class."""

    def takes_cyan_for_blue(images):
        rows = see_colours(images)
        return torch.where((rows[:, 1:2] > 0.5) & (rows[:, 2:] > 0.5), torch.tensor([[0.0, 0.0, 1.0]]), rows)

    figures = suite(folders).run(takes_cyan_for_blue)
    assert figures["zero_shot_top1"] == 1.0 and figures["zero_shot_unseen_top1"] == 0.0


def test_what_is_not_asked_for_is_left_out(folders):
    figures = suite(folders, zero_shot_unseen=None, retrieval=None).run(see_colours)
    assert set(figures) == {"zero_shot_top1", "zero_shot_top5"}
    assert suite(folders, zero_shot=None, zero_shot_unseen=None, retrieval=None).run(see_colours) == {}


def test_texts_are_encoded_once(folders, monkeypatch):
    made = suite(folders)
    first = made.run(see_colours)
    monkeypatch.setattr(ColourText, "encode", None)
    assert made.run(see_colours) == first


def test_the_gallery_shows_images_with_their_nearest_captions(folders):
    made = suite(folders)
    assert made.gallery() is None, "there is nothing to show before a run"
    made.run(see_colours)
    gallery = made.gallery()
    assert gallery.images.shape == (4, 16, 16, 3)
    for caption, nearest in zip(gallery.captions, gallery.nearest, strict=True):
        assert nearest[0][0] == caption and nearest[0][1] == pytest.approx(1.0, abs=1e-3)
        assert len(nearest) == 3 and nearest[0][1] > nearest[1][1] >= nearest[2][1]


def test_figures_say_what_they_are_of_and_what_was_left_out(folders, tmp_path):
    made = suite(folders)
    assert made.counts() == {} and made.complaints() == []
    made.run(see_colours)
    assert made.counts() == {
        "zero_shot": {"images": 3, "classes": 3, "skipped": {}},
        "zero_shot_unseen": {"images": 1, "classes": 4, "skipped": {}},
        "retrieval": {"images": 4, "captions": 4, "skipped": {}},
    }
    assert made.complaints() == []

    damaged = shutil.copytree(folders / "classes", tmp_path / "classes")
    (damaged / "red" / "wall.png").write_bytes(b"<html>")
    (damaged / "green" / "more.png").write_bytes(b"")
    (damaged / "green" / "more.mat").write_bytes(b"")
    made = suite(folders, zero_shot=str(damaged), zero_shot_unseen=None, retrieval=None)
    assert made.run(see_colours)["zero_shot_top1"] == 1.0
    count = {"images": 2, "classes": 3, "skipped": {"empty": 1, "format": 1}, "left": {".mat": 1}}
    assert made.counts() == {"zero_shot": count}
    assert made.complaints() == [
        "zero_shot: no image of class red can be read",
        "zero_shot: 2 of 4 images cannot be read (1 empty, 1 format)",
    ]
    assert describe_count(count) == (
        "2 images, 3 classes, without 2 that cannot be read (1 empty, 1 format), "
        "without 1 of other kinds in the folders (1 .mat)"
    )


def test_names_and_prompts_from_files_are_those_of_the_classes(folders, tmp_path):
    for name in COLOURS:
        folder = tmp_path / "classes" / f"n0000000{list(COLOURS).index(name)}"
        shutil.copytree(folders / "classes" / name, folder)
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "prompts.txt").write_text("a {} wall\n{}\n")
    changes = {"zero_shot": str(tmp_path / "classes"), "zero_shot_unseen": None, "retrieval": None}
    with pytest.raises(ValueError, match="called n00000000 and the like, which no text says"):
        suite(folders, **changes)
    changes |= {"zero_shot_names": str(tmp_path / "names.txt"), "templates": (str(tmp_path / "prompts.txt"),)}
    assert suite(folders, **changes).run(see_colours)["zero_shot_top1"] == 1.0
    with pytest.raises(ValueError, match=r"zero-shot-names is 'x', must be left out without --evals.zero-shot"):
        EvalConfig(zero_shot_names="x")


@pytest.mark.parametrize("what", ["zero_shot", "zero_shot_unseen", "retrieval"])
def test_a_missing_folder_and_an_empty_class_are_said_before_training(folders, tmp_path, what):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    for folder, of_classes, of_shards in [
        ("nowhere", "no folder", "no folder"),
        ("empty/cat", "no class folders in", r"no \.tar shards in"),
        ("empty", r"no images \(bmp, .*\) in .*cat: add some, or", r"no \.tar shards in"),
    ]:
        with pytest.raises(FileNotFoundError, match=of_shards if what == "retrieval" else of_classes):
            suite(folders, **{what: str(tmp_path / folder)})
