"""Reads benchmark sets in the layout of clip_benchmark's webdatasets (``build_wds_dataset``).

A set is a folder with

    classnames.txt                          a class a line, in the order of the labels
    zeroshot_classification_templates.txt   a prompt a line, {c} standing for the class
    dataset_type.txt                        classification (also where there is no such file), multilabel or retrieval
    test/nshards.txt                        how many shards there are
    test/0.tar, test/1.tar, ...             samples: an image as webp, png, jpg or jpeg, and its label

The label of classification is a number in ``cls``; of multilabel a row of zeros and ones in ``npy``; of retrieval the
captions in ``txt``, a line each, and there are no classes then. DataComp's copies of WILDS, Dollar Street and GeoDE
keep a row of numbers about a sample in its ``npy``, next to the ``cls``: the groups that their figures go by.
"""

import hashlib
import io
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .captions import MAX_MEMBER_BYTES, Fields, read_captions
from .images import MAX_IMAGE_BYTES, BadSample
from .reader import cached_files
from .tar import Problem, TarMember, TarSample, printable, read_samples

SetKind = Literal["classification", "multilabel", "retrieval"]

SPLIT = "test"
COUNT_FILE = f"{SPLIT}/nshards.txt"
_CLASSES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
TYPE_FILE = "dataset_type.txt"
# The first of these that a sample has is its image, as there.
_IMAGES = ("webp", "png", "jpg", "jpeg")
_FIELDS: dict[SetKind, Fields] = {
    "classification": Fields(_IMAGES, ("cls", "npy")),
    "multilabel": Fields(_IMAGES, ("npy",)),
    "retrieval": Fields(_IMAGES, ("txt",)),
}
# What is wrong with one sample, which is left out for it; all else is wrong with a shard.
_OF_A_SAMPLE = frozenset({"no-image", "link", "name", "dots"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetLayout:
    """What the text files of a set say, and which shards there are."""

    folder: Path
    kind: SetKind
    shards: list[Path]
    classes: tuple[str, ...]
    """Names in the order of the labels; two may be the same, as in ImageNet's list. None of retrieval."""
    templates: tuple[str, ...]
    """Prompts with ``{}`` where the class name goes. None of retrieval."""

    def fingerprint(self) -> str:
        """Sha256 (hex) of kind, class names, prompts, and the sizes of the shards."""
        sizes = [path.stat().st_size for path in self.shards]
        return hashlib.sha256(json.dumps([self.kind, self.classes, self.templates, sizes]).encode()).hexdigest()


@dataclass(frozen=True)
class SetImage:
    """Where the image of a sample is."""

    shard: Path
    key: str
    offset: int
    size: int


@dataclass
class BenchmarkSet:
    """The samples of a set, in the order of shards and members. Labels are in memory, images are not."""

    layout: SetLayout
    images: list[SetImage] = field(default_factory=list)
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [n], the class of each image; of multilabel [n, C] zeros and ones; of retrieval [0]."""
    metadata: Tensor | None = None
    """int64 [n, m], the numbers of each image's ``npy`` in classification; None where one has no such row."""
    captions: list[list[str]] = field(default_factory=list)
    """Of retrieval, those of each image."""
    skipped: Counter[str] = field(default_factory=Counter)
    """How many samples are left out, by kind of problem."""
    damages: list[str] = field(default_factory=list)
    """What is wrong with whole shards, a sentence each: how many samples are lost is not known then."""

    def __post_init__(self) -> None:
        self._open = cached_files()

    def read_image(self, place: int) -> bytes:
        """Return the bytes of an image. Raises BadSample of kind too-large or unreadable."""
        image = self.images[place]
        if image.size > MAX_IMAGE_BYTES:
            raise BadSample("too-large", f"the image has {image.size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        try:
            file = self._open(str(image.shard))  # held: another thread may have opened it too, and this one be closed
            payload = os.pread(file.descriptor, image.size, image.offset)
        except OSError as error:
            raise BadSample("unreadable", f"{image.shard} cannot be read at byte {image.offset}: {error}") from error
        if len(payload) < image.size:
            raise BadSample("unreadable", f"{image.shard} is shorter than when its members were listed")
        return payload


def read_layout(folder: Path) -> SetLayout:
    """Read the text files of a set and look for its shards; no shard is opened.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: a file says something else than it must.
    """
    text = _read_text(folder / COUNT_FILE)
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{folder / COUNT_FILE} holds {text.strip()[:20]!r}: it must hold the number of shards")
    shards = [folder / SPLIT / f"{number}.tar" for number in range(int(text))]
    for path in shards:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {COUNT_FILE} says that there are {len(shards)} shards")
    kind = "classification"
    if (folder / TYPE_FILE).exists():
        kind = _read_text(folder / TYPE_FILE).strip().lower()
        if kind not in get_args(SetKind):
            raise ValueError(
                f"{folder / TYPE_FILE} holds {kind[:20]!r}: it must hold one of {', '.join(get_args(SetKind))}"
            )
    if kind == "retrieval":
        return SetLayout(folder, "retrieval", shards, (), ())
    classes = tuple(line.strip() for line in _read_text(folder / _CLASSES).splitlines())
    blank = next((number for number, name in enumerate(classes, start=1) if not name), None)
    if blank is not None or not classes:
        raise ValueError(f"{folder / _CLASSES} has no name in line {blank or 1}: write a class in every line")
    templates = tuple(line.strip() for line in _read_text(folder / _TEMPLATES).splitlines())
    if not templates:
        raise ValueError(f"{folder / _TEMPLATES} is empty: write a prompt in every line, {{c}} standing for the class")
    for template in templates:
        # Other braces would mean something to Python's format, by which such files are meant to be read.
        if "{c}" not in template or set("{}") & set(template.replace("{c}", "")):
            raise ValueError(
                f"{folder / _TEMPLATES} has the line {printable(template)[:80]!r}: each must have {{c}} where the "
                "class goes, and no other braces"
            )
    prompts = tuple(template.replace("{c}", "{}") for template in templates)
    return SetLayout(folder, "multilabel" if kind == "multilabel" else "classification", shards, classes, prompts)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a set in clip_benchmark's layout has it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_set(layout: SetLayout) -> BenchmarkSet:
    """List the samples of a set, with their labels; of the images only the places are read.

    Samples without an image or with a label that cannot be read are left out, named in the log and counted.

    Raises:
        OSError: a shard cannot be read.
        ValueError: a label is outside the classes, or no sample is left.
    """
    found = BenchmarkSet(layout)
    labels: list[int] = []
    rows: list[list[int]] = []  # of multilabel
    metadata: list[list[int]] = []
    fields = _FIELDS[layout.kind]
    for path in layout.shards:
        content = read_samples(path, fields)
        with open(path, "rb", buffering=0) as file:
            for sample in content.samples:
                try:
                    if layout.kind == "classification":
                        labels.append(_read_class(file.fileno(), sample, len(layout.classes)))
                        metadata += _read_groups(file.fileno(), sample)
                    elif layout.kind == "multilabel":
                        rows.append(_read_classes(file.fileno(), sample, len(layout.classes)))
                    else:
                        found.captions.append(_read_lines(file.fileno(), sample))
                except BadSample as fault:
                    content.problems.append(Problem(path.name, sample.key, fault.kind, str(fault)))
                    continue
                except ValueError as error:
                    raise ValueError(f"{path}: {printable(sample.key)}: {error}") from error
                found.images.append(SetImage(path, sample.key, sample.image.offset, sample.image.size))
        _note(found, content.problems)
    if not found.images:
        raise ValueError(f"{layout.folder / SPLIT} holds no sample with an image and a label")
    found.labels = torch.tensor(rows if layout.kind == "multilabel" else labels, dtype=torch.int64)
    if len(metadata) == len(found.images) and len({len(row) for row in metadata}) == 1:
        found.metadata = torch.tensor(metadata, dtype=torch.int64)
    return found


def _note(found: BenchmarkSet, problems: list[Problem]) -> None:
    for problem in problems:
        message = f"{problem.shard}: {printable(problem.key)}: {problem.message}" if problem.key else problem.message
        if problem.kind in _OF_A_SAMPLE or problem.kind in ("no-label", "label", "no-caption"):
            logger.warning("left out of the evaluation (%s): %s", problem.kind, message)
            found.skipped[problem.kind] += 1
        elif problem.key and problem.kind == "duplicate":
            logger.warning("%s", message)
        else:
            found.damages.append(f"{problem.shard}: {problem.message}")


def _read(descriptor: int, member: TarMember) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise BadSample("label", f"{member.name} has {member.size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
    return os.pread(descriptor, member.size, member.offset)


def _label_of(sample: TarSample, place: int, name: str) -> TarMember:
    if place not in sample.captions:
        raise BadSample("no-label", f"the sample has no .{name}")
    return sample.captions[place]


def _read_class(descriptor: int, sample: TarSample, classes: int) -> int:
    member = _label_of(sample, 0, "cls")
    payload = _read(descriptor, member)
    try:
        label = int(payload)
    except ValueError as error:
        raise BadSample("label", f"{member.name} holds {payload[:20]!r}, which is no number") from error
    if not 0 <= label < classes:
        raise ValueError(f"its class is {label} and {_CLASSES} has {classes}: it is the list of another set")
    return label


def _read_numbers(descriptor: int, sample: TarSample, place: int) -> list[int]:
    member = _label_of(sample, place, "npy")
    try:
        # No code runs from it: pickled objects are refused.
        array = np.load(io.BytesIO(_read(descriptor, member)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadSample("label", f"{member.name} is no array of numpy: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim != 1:
        raise BadSample("label", f"{member.name} is no row of numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadSample("label", f"{member.name} holds what is no finite number")
    return [int(value) for value in array.tolist()]


def _read_groups(descriptor: int, sample: TarSample) -> list[list[int]]:
    """Return the row of numbers about a sample, or none where it has no such row: its label counts nevertheless."""
    try:
        return [_read_numbers(descriptor, sample, 1)]
    except BadSample:
        return []


def _read_classes(descriptor: int, sample: TarSample, classes: int) -> list[int]:
    row = _read_numbers(descriptor, sample, 0)
    if len(row) != classes or set(row) - {0, 1}:
        raise ValueError(f"its .npy is no row of {classes} zeros and ones, one for each line of {_CLASSES}")
    return row


def _read_lines(descriptor: int, sample: TarSample) -> list[str]:
    member = _label_of(sample, 0, "txt")
    try:
        captions = read_captions(_read(descriptor, member), "txt").texts
    except ValueError as error:
        raise BadSample("label", f"{member.name}: {error}") from error
    if not captions:
        raise BadSample("no-caption", "the captions are missing or empty")
    return captions
