import colorsys
import hashlib
import io
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from textlock.data.evaluation import iterate_class_folder, iterate_shards, list_classes
from textlock.demo import scenes
from textlock.demo.scenes import (
    ALL_PAIRS,
    BACKGROUNDS,
    COLOURS,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    caption_of,
    distinct_indices,
    draw,
    generator_of,
    random_scene,
    write_scenes,
)

from ..commands import run_here

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
        if path.is_file() and path.suffix in (".tar", ".jpg", ".txt")
    }


def captions_of(shards):
    return [caption for batch in iterate_shards(str(shards), 32, batch_size=7) for caption in batch.captions]


def some_scenes(count, split="train"):
    for index in range(count):
        rng = generator_of(0, split, index)
        yield random_scene(rng, SEEN_PAIRS), rng


def things_told(caption):
    """(number, size or None, colour, shape) of everything a caption names, by a grammar of the test's own."""
    sizes = {"small": "small", "little": "small", "large": "large", "big": "large"}
    found = re.findall(
        rf"(a|two|three|four) (?:({'|'.join(sizes)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(e?s)?\b", caption
    )
    numbers = {"a": 1, "two": 2, "three": 3, "four": 4}
    assert all((number == "a") == (plural == "") for number, _, _, _, plural in found), caption
    return [(numbers[number], sizes.get(size), colour, shape) for number, size, colour, shape, _ in found]


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_processes(written, tmp_path):
    write_scenes(tmp_path / "again", **TINY, seed=3, workers=1)
    write_scenes(tmp_path / "other", **TINY, seed=4, workers=1)
    first, again, other = digests(written), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert len(first) == 1 + 1 + 1 + 2 * len(ALL_PAIRS)
    assert again == first
    assert other.keys() == first.keys()
    assert not any(other[name] == first[name] for name in first)


def test_the_folder_holds_what_training_and_evaluation_read(written):
    names = {path.name for path in written.iterdir()}
    assert names == {"captions.txt", "classes", "classes_unseen", "heldout", "train"}
    for folder, pairs in (("classes", SEEN_PAIRS), ("classes_unseen", UNSEEN_PAIRS)):
        assert list_classes(written / folder) == sorted(f"{colour} {shape}" for colour, shape in pairs)
        images = list(iterate_class_folder(written / folder, 32, batch_size=7))
        assert sum(len(batch.labels) for batch in images) == 2 * len(pairs) and not any(b.skipped for b in images)
    training, heldout = captions_of(written / "train"), captions_of(written / "heldout")
    assert (len(training), len(heldout), len(set(heldout))) == (30, 12, 12)
    assert all(caption.endswith(" background") for caption in heldout), "held-out captions are complete"
    assert (written / "captions.txt").read_text().splitlines() == sorted(set(training))


def test_images_of_one_split_are_not_those_of_another():
    heldout = {draw(scene, rng) for scene, rng in some_scenes(20, "heldout")}
    assert not heldout & {draw(scene, rng) for scene, rng in some_scenes(20, "train")}


def test_every_colour_and_every_shape_is_both_seen_and_in_an_unseen_pair():
    assert len(SEEN_PAIRS) >= 32
    assert sorted(SEEN_PAIRS + UNSEEN_PAIRS) == sorted(ALL_PAIRS)
    for names, position in ((COLOURS, 0), (SHAPES, 1)):
        assert {pair[position] for pair in SEEN_PAIRS} == {pair[position] for pair in UNSEEN_PAIRS} == set(names)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_no_image_and_no_caption_holds_an_unseen_pair(split):
    shown, told = set(), set()
    for scene, rng in some_scenes(3000, split):
        shown |= {(thing.colour, thing.shape) for thing in scene.things}
        told |= {(colour, shape) for _, _, colour, shape in things_told(caption_of(scene, rng, complete=False))}
    assert shown == told == set(SEEN_PAIRS)


def places_of(thing):
    """Return the words for a place that are true of a thing."""
    x, y = thing.x, thing.y
    true = {"left": x < -0.06, "right": x > 0.06, "top": y < -0.06, "bottom": y > 0.06}
    return {word for word, holds in true.items() if holds} or {"middle"}


def relations_of(thing, other):
    """Return the words that are true of where a thing is, seen from another."""
    across, down = thing.x - other.x, thing.y - other.y
    true = {"left of": across < -0.4, "right of": across > 0.4}
    true |= dict.fromkeys(("above", "over"), down < -0.4) | dict.fromkeys(("below", "under"), down > 0.4)
    return {words for words, holds in true.items() if holds}


@pytest.mark.parametrize("complete", [True, False])
def test_captions_are_true_of_the_scene(complete):
    layouts, told_parts = Counter(), Counter()
    for scene, rng in some_scenes(1500):
        caption = caption_of(scene, rng, complete=complete)
        told = things_told(caption)
        layouts[scene.layout] += 1
        of_looks = {(thing.colour, thing.shape): thing for thing in scene.things}

        shown = Counter((thing.colour, thing.shape) for thing in scene.things)
        assert {(colour, shape): number for number, _, colour, shape in told} == shown, caption
        for _, size, *looks in told:
            if size is not None:
                assert SIZES[size][0] <= of_looks[tuple(looks)].radius <= SIZES[size][1], caption
        background = re.search(r"on a (\w+) background$", caption)
        assert not background or background[1] == scene.background, caption

        places = set(re.findall(r"\b(left|right|top|bottom|middle)\b", caption)) if scene.layout == "single" else set()
        assert not places or places == places_of(scene.things[0]), caption
        if scene.layout == "pair":
            thing, other = (of_looks[colour, shape] for _, _, colour, shape in told)
            (words,) = re.findall(r" (left of|right of|above|over|below|under) a ", caption)
            assert words in relations_of(thing, other), caption
        told_parts["background"] += bool(background)
        told_parts["place"] += bool(places)
        told_parts["size"] += any(size is not None for _, size, _, _ in told)

    assert min(layouts["single"], layouts["group"], layouts["pair"]) > 100
    if complete:
        assert told_parts == {"background": 1500, "size": layouts["single"], "place": layouts["single"]}
    else:  # left out now and then, so that "a red star" alone is a caption too
        assert 0 < told_parts["background"] < 1500
        assert 0 < told_parts["place"] < layouts["single"]


def test_images_show_the_scene():
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
            bare &= distance > 1.2 * short * thing.radius + 3
            disc = pixels[distance <= 1.2 * short * thing.radius]
            vivid = disc[np.argsort(np.ptp(disc, axis=1))[-len(disc) // 8 :]]  # the eighth of it with most colour
            hue, saturation, _ = colorsys.rgb_to_hsv(*(vivid.mean(axis=0) / 255))
            nearest = min(COLOURS, key=lambda name: abs((360 * hue - COLOURS[name][0] + 180) % 360 - 180))
            assert (nearest, saturation > 0.3) == (thing.colour, True)
        low, high = BACKGROUNDS[scene.background]
        assert low - 0.1 < pixels[bare].mean() / 255 < high + 0.1
        assert np.ptp(pixels[bare].mean(axis=0)) < 12  # grey: nothing coloured is outside the things


def test_a_centre_crop_cuts_no_shape():
    for scene, rng in some_scenes(500):
        for thing in scene.things:
            width, height = (int(side) for side in rng.integers(64, 112, size=2))
            short = min(width, height)
            corners = np.array(scenes.placed(SHAPES[thing.shape], thing, width, height)) - (width, height)
            # The canvas is twice the image, so half a side is `short`; a tip may lose two of a hundred pixels.
            assert np.abs(corners).max() <= 1.04 * short


def test_heldout_captions_tell_every_two_images_apart():
    indices = distinct_indices(0, 400)
    plain = {"little": "small", "big": "large", "over": "above", "under": "below", "to the left": "left"}
    plain["to the right"] = "right"
    told = set()
    for index in indices:
        rng = generator_of(0, "heldout", index)
        caption = caption_of(random_scene(rng, SEEN_PAIRS), rng, complete=True)
        for word, meaning in plain.items():
            caption = caption.replace(word, meaning)
        turned = re.fullmatch(r"(a .*?) (right of|below) (a \S+ \S+ \S+)( on .*)", caption)
        if turned:
            first, relation, second, background = turned.groups()
            caption = f"{second} {'left of' if relation == 'right of' else 'above'} {first}{background}"
        told.add(caption)
    assert len(set(indices)) == len(told) == 400


@pytest.mark.parametrize("wrong", [{"train": 0}, {"heldout": -1}, {"per_class": 0}], ids=str)
def test_numbers_that_leave_a_part_empty_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        write_scenes(tmp_path / "data", **{**TINY, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "pack_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path / "data", **TINY, workers=1)
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_an_existing_folder_in_one_line(written):
    said = f"error: {written} exists and is not an empty folder: remove it, or choose another\n"
    assert run_here("textlock.demo.scenes", "--output", written) == (2, "", said)
