"""The demo's data: drawn images of coloured things, with captions that have to be read.

A scene is one thing somewhere in the image, a group of two to four alike, or two different things next to or above each
other. Captions tell colour, thing, count, size, place and background, in many wordings; a held-out caption tells all of
it, a training caption may leave some out. The pairs of colour and thing in `UNSEEN_PAIRS` occur in no training image
and in no training caption: to recognise them, colour and thing must have been learned apart.

`python -m textlock.demo.scenes --output DIR` writes

    DIR/train/                shards of training pairs
    DIR/heldout/              shards of held-out pairs, every one with its own description
    DIR/classes/              <colour>_<thing>/*.jpg: single things, of some of the pairs that training shows
    DIR/classes_unseen/       the same for the pairs that training never shows
    DIR/other_names.json      the names of DIR/classes in words that no training caption holds (demo/words.py)
    DIR/captions.txt          every distinct training caption, one a line: what a vocabulary must cover

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
from .things import THINGS, Outline, Point, Tone
from .words import COLOUR_WORDS, write_other_names

T = TypeVar("T")
Pair = tuple[str, str]
Layout = Literal["single", "group", "pair"]
Split = Literal["train", "heldout", "classes"]
Colour = tuple[float, float, float]

# Hue in degrees, saturation and value from 0 to 1. No name starts with a vowel, so "a {}" fits every class.
COLOURS: dict[str, Colour] = {
    "red": (0, 0.88, 0.86),
    "yellow": (53, 0.88, 0.96),
    "green": (135, 0.78, 0.52),
    "blue": (224, 0.82, 0.84),
    "purple": (282, 0.68, 0.62),
    "pink": (332, 0.45, 0.97),
    "brown": (26, 0.72, 0.46),
    "black": (0, 0.0, 0.13),
}
assert COLOURS.keys() == COLOUR_WORDS.keys()
# The two grey levels of a background, from 0 to 1, each drawn from a range; a plain one has the first alone.
PALE = ((0.94, 1.0), (0.82, 0.87))
BACKGROUNDS = {
    "white": ((0.92, 1.0),),
    "gray": ((0.5, 0.6),),
    "black": ((0.02, 0.1),),
    "striped": PALE,
    "dotted": PALE,
    "checked": PALE,
}
SIZES = {"small": (0.26, 0.29), "large": (0.37, 0.42)}  # radii, as a share of the image's short side
GROUP_RADII = (0.2, 0.23)
PAIR_RADII = (0.22, 0.25)
COMPLETE = 0.15  # share of complete training captions; the others leave something out
LAYOUT_SHARES = {"single": 0.75, "group": 0.1, "pair": 0.15}

ALL_PAIRS: list[Pair] = [(colour, thing) for colour in COLOURS for thing in THINGS]
# One colour of each thing, and every colour equally often. They are told among the names of all pairs, seen and unseen:
# among their own names alone the thing would give each of them away.
UNSEEN_PAIRS: list[Pair] = [(list(COLOURS)[number % len(COLOURS)], thing) for number, thing in enumerate(THINGS)]
SEEN_PAIRS: list[Pair] = [pair for pair in ALL_PAIRS if pair not in UNSEEN_PAIRS]
# Of the seen pairs, those that images are classified by: each thing in the next CLASS_COLOURS colours after its unseen.
CLASS_COLOURS = 4
CLASS_PAIRS: list[Pair] = [
    (list(COLOURS)[(number + step) % len(COLOURS)], thing)
    for number, thing in enumerate(THINGS)
    for step in range(1, CLASS_COLOURS + 1)
]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing as it is drawn. Lengths are shares of the image's short side, (0, 0) is the image's centre."""

    colour: str
    kind: str
    size: str | None
    """Told of single things only: among others of its kind, small and large would be relative."""
    x: float
    y: float
    radius: float
    turn: float
    """Degrees, clockwise."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an image shows: one thing (`single`), two to four alike (`group`), or two different ones (`pair`)."""

    layout: Layout
    background: str
    things: tuple[Thing, ...]

    def description(self) -> tuple[object, ...]:
        """All that a complete caption tells, whatever its words: equal for scenes that captions cannot tell apart."""
        first, last = self.things[0], self.things[-1]
        looks = tuple((thing.size, thing.colour, thing.kind) for thing in self.things)
        if self.layout == "single":
            return (self.background, looks, place_of(first))
        if self.layout == "group":
            return (self.background, looks)
        return (self.background, looks, direction(first, last))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draw one of the options."""
    return options[int(rng.integers(len(options)))]


def make_thing(rng: np.random.Generator, pair: Pair, size: str | None, x: float, y: float, radii: Point) -> Thing:
    """Place a thing of a colour and kind, turned and scaled a little at random."""
    turn = float(rng.uniform(-10, 10))
    return Thing(colour=pair[0], kind=pair[1], size=size, x=x, y=y, radius=float(rng.uniform(*radii)), turn=turn)


def make_scene(rng: np.random.Generator, layout: Layout, things: Sequence[Thing]) -> Scene:
    """Put things on a background that they stand out from."""
    is_dark = any(thing.colour == "black" for thing in things)
    background = pick(rng, [name for name in BACKGROUNDS if not (is_dark and name == "black")])
    return Scene(layout=layout, background=background, things=tuple(things))


def single_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """One small thing at one of nine places, or a large one that fills the image."""
    size = pick(rng, list(SIZES))
    reach = 0.15 if size == "small" else 0.0  # the whole thing stays in the middle square of the image
    x, y = (reach * int(rng.integers(-1, 2)) + float(rng.uniform(-0.02, 0.02)) for _ in range(2))
    return make_scene(rng, "single", [make_thing(rng, pick(rng, pairs), size, x, y, SIZES[size])])


def group_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """Two to four things alike, in different quarters of the image."""
    pair = pick(rng, pairs)
    quarters = rng.choice(4, size=int(rng.integers(2, 5)), replace=False)
    things = []
    for quarter in quarters:
        x, y = (0.48 * int(step) - 0.24 + float(rng.uniform(-0.01, 0.01)) for step in divmod(quarter, 2))
        things.append(make_thing(rng, pair, None, x, y, GROUP_RADII))
    return make_scene(rng, "group", things)


def pair_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """Two things that differ in colour and in kind, the first left of the second or above it."""
    first = pick(rng, pairs)
    second = pick(rng, [pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]])
    upright = bool(rng.integers(2))
    things = []
    for pair, side in ((first, -0.24), (second, 0.24)):
        along, across = side + float(rng.uniform(-0.02, 0.02)), float(rng.uniform(-0.1, 0.1))
        x, y = (across, along) if upright else (along, across)
        things.append(make_thing(rng, pair, None, x, y, PAIR_RADII))
    return make_scene(rng, "pair", things)


def random_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """Draw a scene of any layout."""
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
SIZE_TELLING = {"small": ("small", "little"), "large": ("large", "big")}
DIRECTION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLURALS = {"dress": "dresses"}
# {} is what the image shows.
OPENINGS = ("a picture of {}", "a drawing of {}", "there is {}", "this is {}", "an image of {}", "we see {}")
OPENED = 0.25  # share of captions with an opening
# Captions of a single thing that leave something out. Some do without the colour, some without the thing.
PARTIAL = (
    *(["a {colour} {kind}"] * 6),
    "a {colour} {kind} {place}",
    "a {colour} {kind} {ground}",
    "a {size} {colour} {kind}",
    "the {kind} is {colour}",
    "a {kind} painted {colour}",
    "a {kind} in {colour}",
    "a {kind}",
    "something {colour}",
)
GROUNDS = ("on a {} background", "against a {} wall")


def place_of(thing: Thing) -> str:
    """Name the place among the nine of a small thing; a large one fills the image."""

    def third(offset: float) -> int:
        return 0 if abs(offset) < 0.05 else int(math.copysign(1, offset))

    return "filling the image" if thing.size == "large" else PLACES[third(thing.x), third(thing.y)]


def direction(thing: Thing, other: Thing) -> str:
    """Where `thing` is, seen from `other`: left, right, above or below."""
    across, down = thing.x - other.x, thing.y - other.y
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def caption_of(scene: Scene, rng: np.random.Generator, *, complete: bool) -> str:
    """Word a caption that is true of the scene; unless `complete`, it may leave something out."""
    complete = complete or rng.random() < COMPLETE
    first = scene.things[0]
    ground = pick(rng, GROUNDS).format(scene.background)
    if scene.layout == "single":
        parts = {
            "colour": first.colour,
            "kind": first.kind,
            "size": pick(rng, SIZE_TELLING[first.size or "small"]),
            "place": place_of(first),
            "ground": ground,
        }
        content = ("a {size} {colour} {kind} {place} {ground}" if complete else pick(rng, PARTIAL)).format(**parts)
    else:
        if scene.layout == "group":
            content = f"{NUMBERS[len(scene.things)]} {first.colour} {PLURALS.get(first.kind, f'{first.kind}s')}"
        else:
            thing, other = scene.things if rng.integers(2) else scene.things[::-1]
            content = f"a {thing.colour} {thing.kind} {pick(rng, DIRECTION_WORDS[direction(thing, other)])}"
            content += f" a {other.colour} {other.kind}"
        content += f" {ground}" if complete else ""
    if content.startswith("the ") or rng.random() > OPENED:
        return content
    return pick(rng, OPENINGS).format(content)


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
    """Draw the bare things on the bare background, twice as large, and halve it for smooth edges."""
    canvas = draw_background(scene.background, rng, 2 * width, 2 * height)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        shades = shades_of(thing.colour, rng)
        for part in THINGS[thing.kind]:
            pen.polygon(placed(part.outline, thing, width, height), fill=shades[part.tone])
    return canvas.reduce(2)


def draw_background(name: str, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw a plain background of some grey, or a pattern in two of them."""
    levels = [round(255 * rng.uniform(*bounds)) for bounds in BACKGROUNDS[name]]
    pattern = np.zeros((height, width), dtype=np.intp)
    if name in ("striped", "dotted", "checked"):
        period = float(rng.uniform(0.13, 0.17)) * min(width, height)
        start = rng.uniform(0, period, size=2)
        across, down = (np.arange(width) + start[0]) / period, ((np.arange(height) + start[1]) / period)[:, None]
        if name == "striped":
            pattern += across % 1 < 0.4
        elif name == "checked":
            pattern += (np.floor(across) + np.floor(down)) % 2 == 0
        else:
            pattern += np.hypot(across % 1 - 0.5, down % 1 - 0.5) < 0.27
    return Image.fromarray(np.array(levels, dtype=np.uint8)[pattern]).convert("RGB")


def placed(outline: Outline, thing: Thing, width: int, height: int) -> list[Point]:
    """Points of an outline of unit radius, turned, scaled and moved to where the canvas of twice the image has them."""
    sine, cosine = math.sin(math.radians(thing.turn)), math.cos(math.radians(thing.turn))
    unit = 2 * min(width, height)
    return [
        (
            width + unit * (thing.x + thing.radius * (x * cosine - y * sine)),
            height + unit * (thing.y + thing.radius * (x * sine + y * cosine)),
        )
        for x, y in outline
    ]


def shades_of(colour: str, rng: np.random.Generator) -> dict[Tone, tuple[int, int, int]]:
    """Choose a shade that still goes by the colour's name, and what goes with it, RGB."""
    hue, saturation, value = COLOURS[colour]
    hue = ((hue + rng.uniform(-7, 7)) / 360) % 1
    saturation = float(np.clip(saturation + rng.uniform(-0.08, 0.08), 0, 1)) if saturation else 0.0
    value = min(1.0, value + rng.uniform(-0.06, 0.06))
    # What is nearly black has no darker shade: its parts are told apart by lighter ones.
    darker, paler = (0.72 * value, 0.55) if value > 0.3 else (value + 0.2, 0.35)
    plain, dark = (np.array(colorsys.hsv_to_rgb(hue, saturation, level)) for level in (value, darker))
    shades: dict[Tone, Colour | np.ndarray] = {
        "colour": plain,
        "dark": dark,
        "light": plain + paler * (1 - plain),
        "white": (0.97, 0.97, 0.97),
        "black": (0.16, 0.16, 0.18),
        "gray": (0.42, 0.43, 0.46),
        "tan": (0.86, 0.74, 0.56),
    }
    return {tone: tuple(round(255 * float(part)) for part in shade) for tone, shade in shades.items()}  # type: ignore[misc]


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
    """Draw the images of one pair of colour and kind, each with a single thing."""
    pair = (CLASS_PAIRS + UNSEEN_PAIRS)[number]
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
        # Few shards: captions are encoded shard by shard, equal ones once.
        pack_shards(images, CaptionsFile(path=table), output / split, samples_per_shard=4000)
    return captions


def write_scenes(
    output: Path,
    *,
    train: int = 16_000,
    heldout: int = 500,
    per_class: int = 10,
    seed: int = 0,
    workers: int | None = None,
) -> str:
    """Draw images of coloured things with captions, as the demo trains on them.

    Training and held-out pairs become shards; single things become two folders of classes. Returns one line that says
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
        list(pool.map(partial(write_class, draft, seed, per_class), range(len(CLASS_PAIRS) + len(UNSEEN_PAIRS))))
        write_other_names(draft / "other_names.json", CLASS_PAIRS)
        (draft / "captions.txt").write_text("".join(f"{caption}\n" for caption in sorted(set(captions))))
    return (
        f"{output}: {train:,} training pairs, {heldout:,} held-out pairs, {per_class:,} images each of"
        f" {len(CLASS_PAIRS)} classes and of {len(UNSEEN_PAIRS)} that no training caption holds"
    )


def main() -> None:
    """Run the command line."""
    try:
        print(tyro.cli(write_scenes))
    except (ValueError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
