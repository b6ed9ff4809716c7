"""Classes under other names, chance, and free texts: on walls of one colour, with towers that see and name colours."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from textlock.data.captions_file import CaptionsFile
from textlock.data.index import index_shards
from textlock.data.pack import pack_shards
from textlock.evals.suite import EvalConfig, EvaluationSuite

from .toys import see_colours

SEEN = {"blue_wall": (0, 0, 255), "green_wall": (0, 255, 0), "red_wall": (255, 0, 0)}
UNSEEN = {"cyan_wall": (0, 255, 255)}
# Red has its own colour, green and blue have each other's.
OTHER_NAMES = {"red_wall": "crimson", "green_wall": "sky", "blue_wall": "emerald", "not_there": "x"}
COLOUR_OF = {"blue": 2, "green": 1, "red": 0, "crimson": 0, "emerald": 1, "sky": 2}


class ColourText:
    """The embedding of a text is the sum of the colours it names; of two, the first weighs more."""

    def encode(self, captions):
        rows = torch.full((len(captions), 3), 1e-3)
        for row, text in zip(rows, captions, strict=True):
            for place, word in enumerate(text.split()):
                if word in COLOUR_OF:
                    row[COLOUR_OF[word]] += 1 / (1 + place)
        return F.normalize(rows, dim=-1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("renamed")
    lines = ["file\tcaption\n"]
    for folder, classes in (("classes", SEEN), ("unseen", UNSEEN)):
        for name, rgb in classes.items():
            for path in (root / folder / name / "0.png", root / "images" / f"{name}.png"):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), rgb).save(path)
            lines.append(f"{name}.png\ta {name.replace('_', ' ')}\n")
    (root / "captions.tsv").write_text("".join(lines))
    pack_shards(root / "images", CaptionsFile(path=root / "captions.tsv"), root / "shards")
    index_shards(root / "shards")
    (root / "names.json").write_text(json.dumps(OTHER_NAMES))
    return root


@pytest.fixture
def config(folders):
    return EvalConfig(
        zero_shot=str(folders / "classes"),
        zero_shot_unseen=str(folders / "unseen"),
        zero_shot_renamed=str(folders / "names.json"),
        retrieval=str(folders / "shards"),
        templates=("{}",),
        queries=("a wall like emerald", "sky and crimson"),
    )


def suite_of(config):
    return EvaluationSuite(ColourText(), config, image_size=16, group=None)


def test_the_same_images_choose_among_the_other_names(config):
    figures = suite_of(config).run(see_colours)
    assert figures["zero_shot_top1"] == 1
    assert figures["zero_shot_renamed_top1"] == pytest.approx(1 / 3)
    assert figures["zero_shot_renamed_top5"] == 1
    assert not any("renamed" in name for name in suite_of(replace(config, zero_shot_renamed=None)).run(see_colours))


def test_chance_is_one_class_among_all_to_choose_from(config):
    chance = suite_of(config).chance()
    top1 = {"zero_shot_top1": 1 / 3, "zero_shot_unseen_top1": 1 / 4, "zero_shot_renamed_top1": 1 / 3}
    assert chance == {**top1, **{name.replace("top1", "top5"): 1.0 for name in top1}}
    assert suite_of(replace(config, zero_shot=None, zero_shot_renamed=None)).chance()["zero_shot_unseen_top1"] == 1


def test_free_texts_find_the_nearest_heldout_images(config):
    suite = suite_of(config)
    assert suite.answers() == []  # nothing is encoded yet
    suite.run(see_colours)
    emerald, sky = suite.answers()
    assert (emerald.query, emerald.captions[0]) == ("a wall like emerald", "a green wall")
    assert sky.captions[0] == "a blue wall"
    for answer in (emerald, sky):
        assert answer.scores == sorted(answer.scores, reverse=True) and len(answer.captions) == 4
        rows = see_colours(answer.images)
        assert (rows @ ColourText().encode([answer.query]).T).flatten().tolist() == pytest.approx(answer.scores)
    unasked = suite_of(replace(config, queries=()))
    unasked.run(see_colours)
    assert unasked.answers() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has 0 names and .*classes 3 class folders: one for each, in sorted order"),
        ("3", "holds a int: it must map class folders"),
        ('{"red_wall": "a", "blue_wall": "b"}', "has no name for class folder green_wall"),
        ('{"red_wall": "a", "blue_wall": "b", "green_wall": " "}', "has no name for class folder green_wall"),
        ('{"red_wall": "a", "blue_wall": "b", "green_wall": 3}', "has no name for class folder green_wall"),
    ],
)
def test_a_file_of_names_that_cannot_serve_is_named_before_anything_is_encoded(config, tmp_path, content, message):
    names = tmp_path / "names.json"
    names.write_text(content)
    with pytest.raises(ValueError, match=rf"names\.json {message}"):
        suite_of(replace(config, zero_shot_renamed=str(names)))
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.json"):
        suite_of(replace(config, zero_shot_renamed=str(tmp_path / "nowhere.json")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_shot": None}, "--evals.zero-shot-renamed is '.*', must be left out without --evals.zero-shot"),
        ({"retrieval": None}, r"--evals.queries is \(.*\), must be left out without --evals.retrieval"),
        ({"queries": ("",)}, r"--evals.queries is \('',\), must not be empty"),
    ],
)
def test_what_nothing_could_answer_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
