"""Images to evaluate on: every one once, in a fixed order, resized and centre-cropped, no crop at random.

Bad ones are left out, named in the log and counted; nothing replaces them.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from .benchmark_sets import BenchmarkSet
from .images import EVALUATION_EXTENSIONS, MAX_IMAGE_BYTES, BadSample, eval_image
from .index import open_index
from .reader import ShardReader, require_captions

S = TypeVar("S")
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassBatch:
    """A batch of labelled images."""

    images: torch.Tensor
    """uint8 [b, S, S, 3]."""
    labels: torch.Tensor
    """int64 [b], places in ``ClassFolders.classes``."""
    skipped_by_kind: dict[str, int]
    """Bad images left out."""


@dataclass(frozen=True)
class CaptionedBatch:
    """A batch of images with all of their captions."""

    images: torch.Tensor
    """uint8 [b, S, S, 3]."""
    captions: list[list[str]]
    keys: list[str]
    position: int
    """Samples of the shards up to the end of this batch."""
    skipped_by_kind: dict[str, int]
    """Bad samples left out."""


@dataclass(frozen=True)
class PlacedBatch:
    """A batch of images that are told by their places."""

    images: torch.Tensor
    """uint8 [b, S, S, 3]."""
    places: list[int]
    """Which of all images they are, counted from 0."""
    skipped_by_kind: dict[str, int]
    """Bad images left out."""


def iterate_set(
    found: BenchmarkSet, image_size: int, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 2
) -> Iterator[PlacedBatch]:
    """Yield this rank's contiguous part of the images of a set, each once, as evaluated (``eval_image``).

    Bad images are left out, named in the log and counted; where all of a part are bad, its batch is empty.
    """

    def load(place: int) -> tuple[torch.Tensor, int]:
        try:
            return eval_image(found.read_image(place), image_size), place
        except BadSample as fault:
            image = found.images[place]
            raise BadSample(fault.kind, f"{image.shard}: {image.key}: {fault}") from fault

    yield from _place_batches(load, len(found.images), image_size, batch_size, rank, world_size, workers)


def iterate_shards(
    shards: Path | str, image_size: int, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 2
) -> Iterator[CaptionedBatch]:
    """Yield this rank's contiguous part of the samples, each once, in index order, as evaluated (``eval_image``).

    Bad samples are left out, named in the log and counted in ``CaptionedBatch.skipped_by_kind``; batches may be
    smaller, or empty, for it.

    Raises:
        FileNotFoundError: there are no shards, or no index.
        ValueError: the index is stale.
    """
    index = open_index(shards)
    reader = ShardReader(index)

    def load(sample: int) -> tuple[torch.Tensor, list[str], str]:
        raw = reader.read(sample)
        try:
            require_captions(raw.captions)
            return eval_image(raw.image, image_size), raw.captions, raw.key
        except BadSample as fault:
            raise BadSample(fault.kind, f"{raw.key}: {fault}") from fault

    samples = range(rank * len(index) // world_size, (rank + 1) * len(index) // world_size)
    position = samples.start
    for good, skipped in load_batches(load, samples, batch_size, workers):
        images = [image for image, _, _ in good]
        position += len(good) + skipped.total()
        yield CaptionedBatch(
            images=_stacked(images, image_size),
            captions=[captions for _, captions, _ in good],
            keys=[key for _, _, key in good],
            position=position,
            skipped_by_kind=dict(skipped),
        )


def _stacked(images: list[torch.Tensor], size: int) -> torch.Tensor:
    return torch.stack(images) if images else torch.empty(0, size, size, 3, dtype=torch.uint8)


@dataclass(frozen=True)
class ClassFolders:
    """What lies in a folder of class folders."""

    classes: list[str]
    """Names of the class folders, sorted."""
    files: list[tuple[Path, int]]
    """(image, label) class by class; the label is the place of its class."""
    left: Counter[str]
    """How many other files there are of each suffix, next to the class folders too."""


def read_class_folders(folder: Path | str) -> ClassFolders:
    """List the images of every class: all in its folder and below, of the formats in ``EVALUATION_EXTENSIONS``.

    What is hidden, its name beginning with a dot, is left without a count. Links to folders below a class are not
    followed.

    Raises:
        FileNotFoundError: the folder does not exist, holds no folders, or one of them holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: name a folder with one folder of images for each class")
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    classes = [path for path in visible if path.is_dir()]
    if not classes:
        raise FileNotFoundError(f"no class folders in {root}: each class needs a folder of images")
    files: list[tuple[Path, int]] = []
    left = Counter(path.suffix.lower() or path.name for path in visible if not path.is_dir())
    for label, class_folder in enumerate(classes):
        images = []
        for below, folders, names in os.walk(class_folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(below, name) for name in names if not name.startswith(".")):
                if path.suffix[1:].lower() in EVALUATION_EXTENSIONS:
                    images.append(path)
                else:
                    left[path.suffix.lower() or path.name] += 1
        if not images:
            kinds = ", ".join(sorted(EVALUATION_EXTENSIONS))
            raise FileNotFoundError(f"no images ({kinds}) in {class_folder}: add some, or remove the class")
        files += [(path, label) for path in sorted(images)]
    return ClassFolders([path.name for path in classes], files, left)


def iterate_class_folder(
    folder: ClassFolders, image_size: int, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 2
) -> Iterator[ClassBatch]:
    """Yield this rank's contiguous part of the images, each once, as evaluated (``eval_image``).

    Bad images are left out, named in the log and counted in ``ClassBatch.skipped_by_kind``; where all of a part are
    bad, its batch is empty.
    """
    labels = [label for _, label in folder.files]
    files = [path for path, _ in folder.files]
    for batch in iterate_files(
        files, image_size, batch_size=batch_size, rank=rank, world_size=world_size, workers=workers
    ):
        of_batch = torch.tensor([labels[place] for place in batch.places], dtype=torch.int64)
        yield ClassBatch(batch.images, of_batch, batch.skipped_by_kind)


def iterate_files(
    files: Sequence[Path], image_size: int, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 2
) -> Iterator[PlacedBatch]:
    """Yield this rank's contiguous part of image files, each once, as evaluated (``eval_image``).

    Bad images are left out, named in the log and counted; where all of a part are bad, its batch is empty.
    """

    def load(place: int) -> tuple[torch.Tensor, int]:
        path = files[place]
        try:
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise BadSample("too-large", f"the image has more than {MAX_IMAGE_BYTES:,} bytes")
            return eval_image(path.read_bytes(), image_size), place
        except BadSample as fault:
            raise BadSample(fault.kind, f"{path}: {fault}") from fault
        except OSError as error:
            raise BadSample("unreadable", f"{path}: {error}") from error

    yield from _place_batches(load, len(files), image_size, batch_size, rank, world_size, workers)


def _place_batches(
    load: Callable[[int], tuple[torch.Tensor, int]],
    count: int,
    image_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
) -> Iterator[PlacedBatch]:
    part = range(rank * count // world_size, (rank + 1) * count // world_size)
    for good, skipped in load_batches(load, part, batch_size, workers):
        images = [image for image, _ in good]
        yield PlacedBatch(_stacked(images, image_size), [place for _, place in good], dict(skipped))


def load_batches(
    load: Callable[[S], T], items: Sequence[S], batch_size: int, workers: int
) -> Iterator[tuple[list[T], Counter[str]]]:
    """Yield (loaded items, how many of which kind were left out) for every ``batch_size`` items.

    ``workers`` threads load a batch ahead.
    """
    with ThreadPoolExecutor(workers) as pool:

        def start(first: int) -> list[Future[T]]:
            return [pool.submit(load, item) for item in items[first : first + batch_size]]

        following = start(0)
        for first in range(0, len(items), batch_size):
            current, following = following, start(first + batch_size)
            good = []
            skipped: Counter[str] = Counter()
            for task in current:
                try:
                    good.append(task.result())
                except BadSample as fault:
                    logger.warning("left out of the evaluation (%s): %s", fault.kind, fault)
                    skipped[fault.kind] += 1
            yield good, skipped
