"""The demo's data: generated images of coloured shapes, with captions that have to be read.

A scene is one coloured shape somewhere in the image, a group of two to four alike, or two different shapes next to or
above each other. Captions tell colour, shape, count, size, place and background; a held-out caption tells all of it, a
training caption may leave some out. The pairs of colour and shape in `UNSEEN_PAIRS` occur in no training image and in
no training caption: to recognise them, colour and shape must have been learned apart.

`python -m textlock.demo.scenes --output DIR` writes

    DIR/train/            shards of training pairs
    DIR/heldout/          shards of held-out pairs, every one with its own description
    DIR/classes/          <colour>_<shape>/*.jpg: single shapes, of the pairs that training shows
    DIR/classes_unseen/   the same for the pairs that training never shows
    DIR/captions.txt      every distinct training caption, one a line: what the text tower's vocabulary must cover

The same seed gives the same bytes, whatever the number of processes.
"""

import colorsys
import io
import itertools
import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import tyro
from PIL import Image, ImageDraw

from ..data.atomic import atomic_folder
from ..data.captions_file import CaptionsFile
from ..data.pack import pack_shards
from ..settings import exit_with

T = TypeVar("T")
Point = tuple[float, float]
Pair = tuple[str, str]
Layout = Literal["single", "group", "pair"]
Split = Literal["train", "heldout", "classes"]

# Hue in degrees, saturation and value from 0 to 1. No name starts with a vowel, so "a {}" fits every class.
COLOURS = {
    "red": (0, 0.88, 0.86),
    "brown": (26, 0.72, 0.46),
    "yellow": (53, 0.88, 0.96),
    "lime": (86, 0.80, 0.90),
    "green": (135, 0.78, 0.52),
    "cyan": (183, 0.75, 0.88),
    "blue": (224, 0.82, 0.84),
    "purple": (282, 0.68, 0.62),
    "pink": (332, 0.45, 0.97),
}
BACKGROUNDS = {"white": (0.90, 1.0), "gray": (0.48, 0.60), "black": (0.02, 0.12)}  # grey levels, from 0 to 1
SIZES = {"small": (0.19, 0.22), "large": (0.27, 0.31)}  # radii, as a share of the image's short side
GROUP_RADII = (0.15, 0.18)
PAIR_RADII = (0.16, 0.2)
COMPLETE = 0.3  # share of complete training captions; the others name colours, shapes, count and relation alone
LAYOUT_SHARES = {"single": 0.7, "group": 0.15, "pair": 0.15}


def regular_polygon(corners: int, radius: float, *, turn: float = 0.0) -> list[Point]:
    """Corners in the image's axes (y points down); the first one is at the top, `turn` degrees on clockwise."""
    angles = [math.radians(turn + 360 * corner / corners) for corner in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def ring() -> list[Point]:
    """Trace the outer edge, then the inner one backwards: one outline with a hole."""
    outer, inner = regular_polygon(40, 1.0), regular_polygon(40, 0.5)
    return [*outer, outer[0], inner[0], *reversed(inner)]


def star() -> list[Point]:
    tips, notches = regular_polygon(5, 1.1), regular_polygon(5, 0.46, turn=36)
    return [point for tip_and_notch in zip(tips, notches, strict=True) for point in tip_and_notch]


def cross(arm: float = 0.33) -> list[Point]:
    """Trace a plus sign: three corners of the top right quarter, then the same a quarter turn on, three times."""
    corners: list[Point] = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    while len(corners) < 12:
        x, y = corners[-3]
        corners.append((-y, x))
    return corners


# Outlines of about one unit in radius.
SHAPES = {
    "ring": ring(),
    "square": regular_polygon(4, 1.15, turn=45),
    "triangle": regular_polygon(3, 1.1),
    "star": star(),
    "cross": cross(),
}

ALL_PAIRS: list[Pair] = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# One shape of each colour, and every shape at least once. They are told among the names of all pairs, seen and unseen:
# among their own names alone the colour would give each of them away.
UNSEEN_PAIRS: list[Pair] = [(colour, list(SHAPES)[(number + 2) % len(SHAPES)]) for number, colour in enumerate(COLOURS)]
SEEN_PAIRS: list[Pair] = [pair for pair in ALL_PAIRS if pair not in UNSEEN_PAIRS]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape as it is drawn. Lengths are shares of the image's short side, (0, 0) is the image's centre."""

    colour: str
    shape: str
    size: str | None
    """Told of single things only: among others of its kind, small and large would be relative."""
    x: float
    y: float
    radius: float
    turn: float
    """Degrees, clockwise."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a image shows: one thing (`single`), two to four alike (`group`), or two different ones (`pair`)."""

    layout: Layout
    background: str
    things: tuple[Thing, ...]

    def description(self) -> tuple[object, ...]:
        """All that a complete caption tells, whatever its words: equal for scenes that captions cannot tell apart."""
        first, last = self.things[0], self.things[-1]
        looks = tuple((thing.size, thing.colour, thing.shape) for thing in self.things)
        if self.layout == "single":
            return (self.background, looks, place_of(first))
        if self.layout == "group":
            return (self.background, looks)
        return (self.background, looks, direction(first, last))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def make_thing(rng: np.random.Generator, pair: Pair, size: str | None, x: float, y: float, radii: Point) -> Thing:
    turn = float(rng.uniform(-10, 10))
    return Thing(colour=pair[0], shape=pair[1], size=size, x=x, y=y, radius=float(rng.uniform(*radii)), turn=turn)


def single_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """One thing at one of nine places."""
    size = pick(rng, list(SIZES))
    reach = 0.46 - 1.1 * SIZES[size][1]  # the whole thing stays in the middle square of the image
    x, y = (reach * int(rng.integers(-1, 2)) + float(rng.uniform(-0.02, 0.02)) for _ in range(2))
    thing = make_thing(rng, pick(rng, pairs), size, x, y, SIZES[size])
    return Scene(layout="single", background=pick(rng, list(BACKGROUNDS)), things=(thing,))


def group_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """Two to four things alike, in different quarters of the image."""
    pair = pick(rng, pairs)
    quarters = rng.choice(4, size=int(rng.integers(2, 5)), replace=False)
    things = []
    for quarter in quarters:
        x, y = (0.46 * int(step) - 0.23 + float(rng.uniform(-0.02, 0.02)) for step in divmod(quarter, 2))
        things.append(make_thing(rng, pair, None, x, y, GROUP_RADII))
    return Scene(layout="group", background=pick(rng, list(BACKGROUNDS)), things=tuple(things))


def pair_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """Two things that differ in colour and in shape, the first left of the second or above it."""
    first = pick(rng, pairs)
    second = pick(rng, [pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]])
    upright = bool(rng.integers(2))
    things = []
    for pair, side in ((first, -0.23), (second, 0.23)):
        along, across = side + float(rng.uniform(-0.02, 0.02)), float(rng.uniform(-0.1, 0.1))
        x, y = (across, along) if upright else (along, across)
        things.append(make_thing(rng, pair, None, x, y, PAIR_RADII))
    return Scene(layout="pair", background=pick(rng, list(BACKGROUNDS)), things=tuple(things))


def random_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    layout = rng.choice(list(LAYOUT_SHARES), p=list(LAYOUT_SHARES.values()))
    return {"single": single_scene, "group": group_scene, "pair": pair_scene}[str(layout)](rng, pairs)


PLACES = {
    (-1, -1): "in the top left corner",
    (0, -1): "at the top",
    (1, -1): "in the top right corner",
    (-1, 0): "on the left",
    (0, 0): "in the middle",
    (1, 0): "on the right",
    (-1, 1): "in the bottom left corner",
    (0, 1): "at the bottom",
    (1, 1): "in the bottom right corner",
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
DIRECTION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def place_of(thing: Thing) -> str:
    """Name the place among the nine."""

    def third(offset: float) -> int:
        return 0 if abs(offset) < 0.06 else int(math.copysign(1, offset))

    return PLACES[third(thing.x), third(thing.y)]


def direction(thing: Thing, other: Thing) -> str:
    """Where `thing` is, seen from `other`: left, right, above or below."""
    across, down = thing.x - other.x, thing.y - other.y
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def caption_of(scene: Scene, rng: np.random.Generator, *, complete: bool) -> str:
    """Word a caption that is true of the scene; unless `complete`, it may leave out size, place and background."""
    complete = complete or rng.random() < COMPLETE

    def name(thing: Thing) -> str:
        size = f"{pick(rng, SIZE_WORDS[thing.size])} " if complete and thing.size else ""
        return f"a {size}{thing.colour} {thing.shape}"

    first = scene.things[0]
    if scene.layout == "single":
        content = f"{name(first)} {place_of(first)}" if complete else name(first)
    elif scene.layout == "group":
        plural = {"cross": "crosses"}.get(first.shape, f"{first.shape}s")
        content = f"{NUMBERS[len(scene.things)]} {first.colour} {plural}"
    else:
        thing, other = scene.things if rng.integers(2) else scene.things[::-1]
        content = f"{name(thing)} {pick(rng, DIRECTION_WORDS[direction(thing, other)])} {name(other)}"
    background = f" on a {scene.background} background" if complete else ""
    return content + background


def draw(scene: Scene, rng: np.random.Generator) -> bytes:
    """Draw the scene as a JPEG of 64 to 112 pixels a side: tints vary, the light is uneven, and there is grain."""
    short = int(rng.integers(64, 97))
    sides = [short, round(short * rng.uniform(1, 1.16))]
    width, height = sides if rng.integers(2) else sides[::-1]
    pixels = np.asarray(draw_flat(scene, rng, width, height), dtype=np.float32)  # [height, width, 3]

    across, down = rng.uniform(-0.1, 0.1, size=2)
    light = 1 + across * np.linspace(-1, 1, width) + down * np.linspace(-1, 1, height)[:, None]
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8))
    blotches = 0.05 * (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) - 128)
    grain = rng.uniform(1, 4) * rng.standard_normal((height, width), dtype=np.float32)
    pixels = pixels * light[..., None] + (blotches + grain)[..., None]

    jpeg = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=int(rng.integers(75, 96)))
    return jpeg.getvalue()


def draw_flat(scene: Scene, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw the bare shapes on the bare background, twice as large, and halve it for smooth edges."""
    level = round(255 * rng.uniform(*BACKGROUNDS[scene.background]))
    canvas = Image.new("RGB", (2 * width, 2 * height), (level, level, level))
    for thing in scene.things:
        ImageDraw.Draw(canvas).polygon(placed(SHAPES[thing.shape], thing, width, height), fill=tint(thing.colour, rng))
    return canvas.reduce(2)


def placed(corners: Sequence[Point], thing: Thing, width: int, height: int) -> list[Point]:
    """Corners of a shape of unit radius, turned, scaled and moved to where the canvas of twice the image has them."""
    sine, cosine = math.sin(math.radians(thing.turn)), math.cos(math.radians(thing.turn))
    unit = 2 * min(width, height)
    return [
        (
            width + unit * (thing.x + thing.radius * (x * cosine - y * sine)),
            height + unit * (thing.y + thing.radius * (x * sine + y * cosine)),
        )
        for x, y in corners
    ]


def tint(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """Choose a shade that still goes by the colour's name, RGB."""
    hue, saturation, value = COLOURS[colour]
    red, green, blue = colorsys.hsv_to_rgb(
        ((hue + rng.uniform(-7, 7)) / 360) % 1,
        min(1, saturation + rng.uniform(-0.08, 0.08)),
        min(1, value + rng.uniform(-0.06, 0.06)),
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def generator_of(seed: int, split: Split, index: int) -> np.random.Generator:
    """Every image has its own random numbers, so that no order of drawing changes it."""
    return np.random.default_rng((seed, get_args(Split).index(split), index))


def distinct_indices(seed: int, count: int) -> list[int]:
    """Of the held-out scenes, the first ``count`` whose descriptions differ."""
    first_index: dict[tuple[object, ...], int] = {}
    for index in itertools.count():
        if len(first_index) == count:
            break
        scene = random_scene(generator_of(seed, "heldout", index), SEEN_PAIRS)
        first_index.setdefault(scene.description(), index)
    return list(first_index.values())


def write_pair(folder: Path, seed: int, split: Split, index: int) -> str:
    """Draw one pair of ``split`` as ``folder/<index>.jpg`` and return its caption."""
    rng = generator_of(seed, split, index)
    scene = random_scene(rng, SEEN_PAIRS)
    caption = caption_of(scene, rng, complete=split == "heldout")
    (folder / f"{index}.jpg").write_bytes(draw(scene, rng))
    return caption


def write_class(folder: Path, seed: int, per_class: int, number: int) -> None:
    """Draw the images of one pair of colour and shape, each with a single thing."""
    pair = ALL_PAIRS[number]
    images = folder / ("classes_unseen" if pair in UNSEEN_PAIRS else "classes") / "_".join(pair)
    images.mkdir(parents=True)
    for index in range(per_class):
        rng = generator_of(seed, "classes", number * per_class + index)
        (images / f"{index}.jpg").write_bytes(draw(single_scene(rng, [pair]), rng))


def write_split(output: Path, seed: int, split: Split, indices: Sequence[int], pool: ProcessPoolExecutor) -> list[str]:
    """Write the shards of a split and return its captions."""
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        images = Path(scratch)
        captions = list(pool.map(partial(write_pair, images, seed, split), indices, chunksize=100))
        table = images / "captions.tsv"
        rows = (f"{index}.jpg\t{caption}\n" for index, caption in zip(indices, captions, strict=True))
        table.write_text("file\tcaption\n" + "".join(rows))
        pack_shards(images, CaptionsFile(path=table), output / split)
    return captions


def write_scenes(
    output: Path,
    *,
    train: int = 40_000,
    heldout: int = 500,
    per_class: int = 20,
    seed: int = 0,
    workers: int | None = None,
) -> str:
    """Draw images of coloured shapes with captions, as the demo trains on them.

    Training and held-out pairs become shards; single shapes become two folders of classes. Returns one line that says
    what was written.

    Args:
        output: folder to write; it must not exist, or be empty.
        train: training pairs.
        heldout: held-out pairs, all with different descriptions.
        per_class: images of each class.
        seed: another one gives other images.
        workers: processes; None: one for each core.

    Raises:
        ValueError: ``output`` is not empty, or a number is not positive.
    """
    for name, value in (("train", train), ("heldout", heldout), ("per-class", per_class), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}, must be at least 1")
    with atomic_folder(output) as draft, ProcessPoolExecutor(workers) as pool:
        captions = write_split(draft, seed, "train", range(train), pool)
        write_split(draft, seed, "heldout", distinct_indices(seed, heldout), pool)
        list(pool.map(partial(write_class, draft, seed, per_class), range(len(ALL_PAIRS))))
        (draft / "captions.txt").write_text("".join(f"{caption}\n" for caption in sorted(set(captions))))
    return (
        f"{output}: {train:,} training pairs, {heldout:,} held-out pairs, {per_class:,} images each of"
        f" {len(SEEN_PAIRS)} classes and of {len(UNSEEN_PAIRS)} that no training caption holds"
    )


def main() -> None:
    """Run the command line."""
    try:
        print(tyro.cli(write_scenes))
    except (ValueError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
