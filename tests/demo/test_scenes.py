import colorsys
import hashlib
import inspect
import io
import itertools
import re
import subprocess
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
from PIL import Image

from textlock.data.class_names import read_class_names
from textlock.data.evaluation import iterate_shards, read_class_folders
from textlock.data.images import eval_image
from textlock.demo import scenes
from textlock.demo.scenes import (
    ALL_PAIRS,
    BACKGROUNDS,
    CLASS_PAIRS,
    COLOURS,
    SEEN_PAIRS,
    SIZES,
    THINGS,
    UNSEEN_PAIRS,
    caption_of,
    distinct_indices,
    draw,
    generator_of,
    random_scene,
    write_scenes,
)
from textlock.demo.words import COLOUR_WORDS, COUNT_WORDS, OTHER_WORDS, SIZE_WORDS, THING_WORDS

TINY = {"train": 30, "heldout": 12, "per_class": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(output, **TINY, seed=3, workers=2)
    return output


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        # The index records when its shards were last modified.
        if path.is_file() and path.suffix in (".tar", ".jpg", ".txt", ".json")
    }


def captions_of(shards):
    batches = iterate_shards(str(shards), 32, batch_size=7)
    return [caption for batch in batches for (caption,) in batch.captions]


def some_scenes(count, split="train"):
    for index in range(count):
        rng = generator_of(0, split, index)
        yield random_scene(rng, SEEN_PAIRS), rng


GROUND = re.compile(rf" (?:on|against) a ({'|'.join(BACKGROUNDS)}) (?:background|wall)$")
SIZE_OF = {"small": "small", "little": "small", "large": "large", "big": "large"}
WORDINGS = (
    rf"(?P<number>a|two|three|four) (?:(?P<size>{'|'.join(SIZE_OF)}) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<kind>{'|'.join(THINGS)})(?P<plural>e?s)?\b",
    rf"(?P<number>a) (?P<kind>{'|'.join(THINGS)})(?: painted| in)? ?(?P<colour>{'|'.join(COLOURS)})?$",
    rf"the (?P<kind>{'|'.join(THINGS)}) is (?P<colour>{'|'.join(COLOURS)})$",
    rf"something (?P<colour>{'|'.join(COLOURS)})$",
)


def things_told(caption):
    """(number, size or None, colour or None, kind or None) of everything a caption names, by the test's own grammar."""
    numbers = {"a": 1, "two": 2, "three": 3, "four": 4}
    told = []
    for wording in WORDINGS:
        for match in re.finditer(wording, GROUND.sub("", caption)):
            found = match.groupdict()
            assert (found.get("number") in ("two", "three", "four")) == bool(found.get("plural")), caption
            told.append(
                (
                    numbers[found.get("number") or "a"],
                    SIZE_OF.get(found.get("size")),
                    found.get("colour"),
                    found.get("kind"),
                )
            )
        if told:
            break
    assert told, caption
    return told


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_processes(written, tmp_path):
    write_scenes(tmp_path / "again", **TINY, seed=3, workers=1)
    write_scenes(tmp_path / "other", **TINY, seed=4, workers=1)
    first, again, other = digests(written), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert len(first) == 1 + 1 + 1 + 1 + 2 * len(CLASS_PAIRS + UNSEEN_PAIRS)
    assert again == first
    assert other.keys() == first.keys()
    assert [name for name in first if other[name] == first[name]] == ["other_names.json"]


def test_the_folder_holds_what_training_and_evaluation_read(written):
    assert sorted(path.name for path in written.iterdir()) == [
        "captions.txt",
        "classes",
        "classes_unseen",
        "heldout",
        "other_names.json",
        "train",
    ]
    for folder, pairs in (("classes", CLASS_PAIRS), ("classes_unseen", UNSEEN_PAIRS)):
        names = {path.name: len(list(path.glob("*.jpg"))) for path in (written / folder).iterdir()}
        assert names == {f"{colour}_{kind}": 2 for colour, kind in pairs}
    training, heldout = captions_of(written / "train"), captions_of(written / "heldout")
    assert (len(training), len(heldout), len(set(heldout))) == (30, 12, 12)
    assert all(GROUND.search(caption) for caption in heldout), "held-out captions are complete"
    other_names = read_class_names(
        written / "other_names.json", read_class_folders(written / "classes").classes, written / "classes"
    )
    assert len(set(other_names)) == len(CLASS_PAIRS) and {"azure automobile", "ebony mug"} <= set(other_names)
    assert (written / "captions.txt").read_text().splitlines() == sorted(set(training))


def test_images_of_one_split_are_not_those_of_another():
    heldout = {draw(scene, rng) for scene, rng in some_scenes(20, "heldout")}
    assert not heldout & {draw(scene, rng) for scene, rng in some_scenes(20, "train")}


def test_every_colour_and_every_thing_is_both_seen_and_in_an_unseen_pair():
    assert len(set(CLASS_PAIRS)) == len(CLASS_PAIRS) >= 32 and set(CLASS_PAIRS) <= set(SEEN_PAIRS)
    assert sorted(SEEN_PAIRS + UNSEEN_PAIRS) == sorted(ALL_PAIRS)
    for names, position in ((COLOURS, 0), (THINGS, 1)):
        for pairs in (CLASS_PAIRS, SEEN_PAIRS, UNSEEN_PAIRS):
            assert {pair[position] for pair in pairs} == set(names)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_no_image_and_no_caption_holds_an_unseen_pair(split):
    shown, told = set(), set()
    for scene, rng in some_scenes(3000, split):
        shown |= {(thing.colour, thing.kind) for thing in scene.things}
        told |= {(colour, kind) for _, _, colour, kind in things_told(caption_of(scene, rng, complete=False)) if colour}
    assert shown == set(SEEN_PAIRS)
    assert {(colour, kind) for colour, kind in told if kind} == set(SEEN_PAIRS)


@pytest.mark.parametrize("complete", [True, False])
def test_captions_are_true_of_the_scene(complete):
    layouts, told_parts = Counter(), Counter()
    for scene, rng in some_scenes(1500):
        caption = caption_of(scene, rng, complete=complete)
        told = things_told(caption)
        layouts[scene.layout] += 1

        shown = Counter((thing.colour, thing.kind) for thing in scene.things)
        assert sum(number for number, *_ in told) == len(scene.things), caption
        for number, size, colour, kind in told:
            (match,) = [pair for pair in shown if colour in (pair[0], None) and kind in (pair[1], None)]
            assert shown[match] == number, caption
            if size is not None:
                thing = next(thing for thing in scene.things if (thing.colour, thing.kind) == match)
                assert SIZES[size][0] <= thing.radius <= SIZES[size][1], caption
        ground = GROUND.search(caption)
        if ground:
            assert ground[1] == scene.background, caption

        x, y = scene.things[0].x, scene.things[0].y
        if scene.layout == "single":
            place_is_told = re.search(r"\b(left|right|top|bottom|middle)\b", caption)
            for words, holds in (
                (r"\bleft\b", x < -0.05),
                (r"\bright\b", x > 0.05),
                (r"\btop\b", y < -0.05),
                (r"\bbottom\b", y > 0.05),
                (r"\bmiddle\b", abs(x) < 0.05 and abs(y) < 0.05),
            ):
                assert not place_is_told or bool(re.search(words, caption)) == holds, caption
            assert ("filling the image" in caption) <= (scene.things[0].size == "large"), caption
            told_parts["place"] += bool(place_is_told) or "filling the image" in caption
        if scene.layout == "pair":
            first, second = (
                next(thing for thing in scene.things if (thing.colour, thing.kind) == (colour, kind))
                for _, _, colour, kind in told
            )
            relations = {
                "left of": first.x < second.x - 0.4,
                "right of": first.x > second.x + 0.4,
                "above": first.y < second.y - 0.4,
                "over": first.y < second.y - 0.4,
                "below": first.y > second.y + 0.4,
                "under": first.y > second.y + 0.4,
            }
            assert [holds for words, holds in relations.items() if f" {words} a " in caption] == [True], caption
        told_parts["background"] += bool(ground)
        told_parts["size"] += any(size is not None for _, size, _, _ in told)

    assert min(layouts["single"], layouts["group"], layouts["pair"]) > 100
    if complete:
        assert told_parts["background"] == 1500
        assert told_parts["size"] == layouts["single"]
        assert told_parts["place"] == layouts["single"]
    else:  # left out now and then, so that "a red cup" alone is a caption too
        assert 0 < told_parts["background"] < 1500
        assert 0 < told_parts["place"] < layouts["single"]


def test_no_training_caption_holds_one_of_the_other_words():
    """Over every caption that `make demo` trains on, as they are generated."""
    words = set()
    training = inspect.signature(write_scenes).parameters["train"].default
    for scene, rng in some_scenes(training):
        words |= set(re.findall(r"\w+", caption_of(scene, rng, complete=False)))
    assert words >= {*COLOURS, *THINGS, *SIZES, "two", "three", "four"}
    plurals = {f"{word}{ending}" for word in OTHER_WORDS for ending in ("s", "es")}
    assert not words & (OTHER_WORDS | plurals)
    assert len(OTHER_WORDS) == len(COLOUR_WORDS) + len(THING_WORDS) + len(SIZE_WORDS) + len(COUNT_WORDS)
    assert (COLOUR_WORDS.keys(), THING_WORDS.keys()) == (COLOURS.keys(), THINGS.keys())


def colour_distance(rgb, colour):
    """How far a hue is from that of a colour, in degrees."""
    return abs((360 * colorsys.rgb_to_hsv(*rgb)[0] - COLOURS[colour][0] + 180) % 360 - 180)


def test_images_show_the_scene():
    checked = 0
    for scene, rng in some_scenes(60):
        with Image.open(io.BytesIO(draw(scene, rng))) as image:
            assert image.mode == "RGB"
            width, height = image.size
            pixels = np.asarray(image, dtype=np.float32)
        assert 64 <= min(width, height) <= max(width, height) <= 112
        short = min(width, height)
        rows, columns = np.mgrid[:height, :width]
        bare = np.ones((height, width), dtype=bool)
        for thing in scene.things:
            distance = np.hypot(
                columns - (width / 2 + short * thing.x - 0.5), rows - (height / 2 + short * thing.y - 0.5)
            )
            bare &= distance > 1.5 * short * thing.radius + 3
            disc = pixels[distance <= short * thing.radius]
            vivid = disc[np.argsort(np.ptp(disc, axis=1))[-len(disc) // 8 :]]  # the eighth of it with most colour
            rgb = vivid.mean(axis=0) / 255
            if thing.colour == "black":
                assert np.quantile(disc.mean(axis=1), 0.05) / 255 < 0.25 and np.ptp(rgb) < 0.35
                continue
            nearest = min((name for name in COLOURS if name != "black"), key=partial(colour_distance, rgb))
            assert (nearest, np.ptp(rgb) > 0.2) == (thing.colour, True), thing
            checked += 1
        levels = [level for bounds in BACKGROUNDS[scene.background] for level in bounds]
        if bare.any():
            assert min(levels) - 0.1 < pixels[bare].mean() / 255 < max(levels) + 0.1
            assert np.ptp(pixels[bare].mean(axis=0)) < 12  # grey: nothing coloured is outside the things
    assert checked > 50


def test_every_thing_and_every_background_looks_different_from_the_others():
    """Drawn in one colour at one place: no two agree in more than nine tenths of their pixels' lightness."""
    for things, backgrounds in ((THINGS, ["white"]), (["moon"], BACKGROUNDS)):
        drawings = []
        for kind, background in ((kind, background) for kind in things for background in backgrounds):
            thing = scenes.Thing(colour="red", kind=kind, size="large", x=0, y=0, radius=0.45, turn=0)
            scene = scenes.Scene(layout="single", background=background, things=(thing,))
            flat = scenes.draw_flat(scene, np.random.default_rng(0), 48, 48)
            drawings.append(np.asarray(flat.convert("L"), dtype=np.float32))
        for first, second in itertools.combinations(drawings, 2):
            assert (np.abs(first - second) > 25).mean() > 0.1


def test_a_centre_crop_cuts_no_shape():
    for scene, rng in some_scenes(500):
        for thing in scene.things:
            width, height = (int(side) for side in rng.integers(64, 112, size=2))
            short = min(width, height)
            for part in THINGS[thing.kind]:
                corners = np.array(scenes.placed(part.outline, thing, width, height)) - (width, height)
                # The canvas is twice the image, so half a side is `short`; a corner may lose two of a hundred pixels.
                assert np.abs(corners).max() <= 1.04 * short, thing


def test_evaluation_reads_the_images(written):
    image = next((written / "classes_unseen").rglob("*.jpg"))
    assert eval_image(image.read_bytes(), 64).shape == (64, 64, 3)


def test_heldout_captions_tell_every_two_images_apart():
    """Whatever their wording: told are kinds, colours, count, size, place or relation, and background."""
    told, indices = set(), distinct_indices(0, 400)
    for index in indices:
        rng = generator_of(0, "heldout", index)
        caption = caption_of(random_scene(rng, SEEN_PAIRS), rng, complete=True)
        things = things_told(caption)
        words = {"over": "above", "under": "below"}
        place = re.search(
            r"\b(left of|right of|above|over|below|under)\b|\b(?:in|at|on|filling) the ([\w ]+?) ", caption
        )
        relation = words.get(place[0], place[0]) if place else None
        if len(things) == 2 and relation in ("right of", "below"):
            things, relation = things[::-1], {"right of": "left of", "below": "above"}[relation]
        told.add((tuple(things), relation, GROUND.search(caption)[1]))
    assert len(set(indices)) == len(told) == 400


@pytest.mark.parametrize("wrong", [{"train": 0}, {"heldout": -1}, {"per_class": 0}], ids=str)
def test_numbers_that_leave_a_part_empty_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        write_scenes(tmp_path / "data", **{**TINY, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "pack_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path / "data", **TINY, workers=1)
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_an_existing_folder_in_one_line(written):
    command = [sys.executable, "-m", "textlock.demo.scenes", "--output", str(written)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: {written} exists and is not an empty folder: remove it, or choose another"
    ]
