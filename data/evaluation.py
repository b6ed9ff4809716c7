"""Images to evaluate on: every one once, in a fixed order, resized and centre-cropped, no crop at random.

Bad ones are left out, named in the log and counted; nothing replaces them.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from .captions import caption_id
from .images import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, BadSample, eval_image
from .index import open_index
from .loader import Batch
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
    """int64 [b], indices into ``list_classes``."""
    skipped: int
    """Bad images left out."""


def iterate_shards(
    shards: Path | str, image_size: int, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 2
) -> Iterator[Batch]:
    """Yield this rank's contiguous part of the samples, each once, in index order, as evaluated (``eval_image``).

    Bad samples are left out, named in the log and counted in ``Batch.skipped``; batches may be smaller for it.

    Raises:
        FileNotFoundError: there are no shards, or no index.
        ValueError: the index is stale.
    """
    index = open_index(shards)
    reader = ShardReader(index)

    def load(sample: int) -> tuple[torch.Tensor, str, int, str]:
        raw = reader.read(sample)
        try:
            require_captions(raw.captions)
            caption = "\n".join(raw.captions)
            return eval_image(raw.image, image_size), caption, caption_id(caption), raw.key
        except BadSample as fault:
            raise BadSample(fault.kind, f"{raw.key}: {fault}") from fault

    samples = range(rank * len(index) // world_size, (rank + 1) * len(index) // world_size)
    position = samples.start
    for good, skipped in _load_batches(load, samples, batch_size, workers):
        images, captions, ids, keys = zip(*good, strict=True)
        position += len(good) + skipped.total()
        yield Batch(
            images=torch.stack(images),
            captions=list(captions),
            text_embeddings=None,
            ids=torch.tensor(ids, dtype=torch.int64),
            keys=list(keys),
            epoch=0,
            position=position,
            skipped_by_kind=dict(skipped),
        )


def list_classes(folder: Path | str) -> list[str]:
    """Return the class names of a folder of class folders, sorted by folder name; an underscore reads as a space.

    Raises:
        FileNotFoundError: the folder does not exist or holds no folders.
    """
    return [path.name.replace("_", " ") for path in _class_folders(Path(folder))]


def read_class_names(names: Path | str, folder: Path | str) -> list[str]:
    """Return the names that a file gives the classes of a folder, in the order of ``list_classes``.

    Args:
        names: JSON file with one object, {name of the class folder: name of the class}. It may name other folders too.
        folder: class folders.

    Raises:
        FileNotFoundError: the file does not exist, or the folder does not or holds no folders.
        ValueError: the file is no such object, or leaves a class folder without a name.
    """
    path, folders = Path(names), [path.name for path in _class_folders(Path(folder))]
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give a JSON file that maps the folders in {folder} to class names")
    try:
        name_of = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it must map class folders to class names") from error
    if not isinstance(name_of, dict):
        raise ValueError(f"{path} holds a {type(name_of).__name__}: it must map class folders to class names")
    for name in folders:
        if not isinstance(name_of.get(name), str) or not name_of[name].strip():
            raise ValueError(f"{path} has no name for class folder {name} of {folder}: add one")
    return [name_of[name] for name in folders]


def iterate_class_folder(
    folder: Path | str, image_size: int, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 2
) -> Iterator[ClassBatch]:
    """Yield this rank's contiguous part of the images in folder/<class>/*, each once, as evaluated (``eval_image``).

    Bad images are left out, named in the log and counted in ``ClassBatch.skipped``.

    Raises:
        FileNotFoundError: the folder does not exist, holds no folders, or one of them holds no image.
    """
    files = list_class_images(folder)

    def load(file: tuple[Path, int]) -> tuple[torch.Tensor, int]:
        path, label = file
        try:
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise BadSample("too-large", f"the image has more than {MAX_IMAGE_BYTES:,} bytes")
            return eval_image(path.read_bytes(), image_size), label
        except (BadSample, OSError) as error:
            raise BadSample("unreadable", f"{path}: {error}") from error

    part = files[rank * len(files) // world_size : (rank + 1) * len(files) // world_size]
    for good, skipped in _load_batches(load, part, batch_size, workers):
        tensors, labels = zip(*good, strict=True)
        yield ClassBatch(torch.stack(tensors), torch.tensor(labels, dtype=torch.int64), skipped.total())


def list_class_images(folder: Path | str) -> list[tuple[Path, int]]:
    """Return (image file, label) of every image in a folder of class folders, class by class.

    Raises:
        FileNotFoundError: the folder does not exist, holds no folders, or one of them holds no image.
    """
    files: list[tuple[Path, int]] = []
    for label, class_folder in enumerate(_class_folders(Path(folder))):
        images = sorted(path for path in class_folder.iterdir() if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
        if not images:
            raise FileNotFoundError(f"no .jpg, .png or .webp images in {class_folder}: add some, or remove the class")
        files += [(path, label) for path in images]
    return files


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name a folder with one folder of images for each class")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise FileNotFoundError(f"no class folders in {folder}: each class needs a folder of images")
    return folders


def _load_batches(
    load: Callable[[S], T], items: Sequence[S], batch_size: int, workers: int
) -> Iterator[tuple[list[T], Counter[str]]]:
    """Yield (loaded items, how many of which kind were left out) for every ``batch_size`` items.

    ``workers`` threads load a batch ahead.
    """
    skipped: Counter[str] = Counter()
    with ThreadPoolExecutor(workers) as pool:

        def start(first: int) -> list[Future[T]]:
            return [pool.submit(load, item) for item in items[first : first + batch_size]]

        following = start(0)
        for first in range(0, len(items), batch_size):
            current, following = following, start(first + batch_size)
            good = []
            for task in current:
                try:
                    good.append(task.result())
                except BadSample as fault:
                    logger.warning("left out of the evaluation (%s): %s", fault.kind, fault)
                    skipped[fault.kind] += 1
            if good:
                yield good, skipped
                skipped = Counter()
