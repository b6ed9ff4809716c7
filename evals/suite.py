"""The evaluations of a run, during training and after it: zero-shot classification and retrieval."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.class_names import TEMPLATE_SETS, names_of_folders, read_class_names, resolve_templates
from ..data.evaluation import ClassBatch, ClassFolders, iterate_class_folder, iterate_shards, read_class_folders
from ..data.index import open_index
from ..models.text import TextTower
from ..settings import NOT_EMPTY, Bound, Settings, at_least
from .counts import too_many_skipped
from .retrieval import RetrievalRows, evaluate_retrieval
from .zero_shot import class_embeddings, evaluate_zero_shot

_GALLERY_IMAGES = 24
_GALLERY_CAPTIONS = 3
_ANSWERS = 6  # images shown for a query

EncodeImages = Callable[[Tensor], Tensor]  # uint8 [b, S, S, 3] -> rows [b, d]


PROMPTS: Final = Bound(
    lambda template: "{}" in template or template in TEMPLATE_SETS or Path(template).is_file(),
    f"hold {{}} where the class name goes, be {' or '.join(TEMPLATE_SETS)}, or a file of prompts",
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings, section="evals"):
    """The evaluations during training and at its end."""

    every: Annotated[int, at_least(0)] = 1000
    """Steps between evaluations; the last step is always evaluated. 0: only the last."""
    zero_shot: str | None = None
    """Class folder (CLASS NAME/image.jpg) for zero-shot top-1 and top-5."""
    zero_shot_names: str | None = None
    """Names of the classes of zero_shot, where those of the folders are no words: a file (JSON, CSV, TSV or text), or
    imagenet."""
    zero_shot_unseen: str | None = None
    """A second class folder, of classes that no training caption names. Its images choose among the classes of both
    folders, and are reported apart as zero_shot_unseen_top1 and _top5."""
    zero_shot_renamed: str | None = None
    """File with other names of the classes of zero_shot, as zero_shot_names. The same images choose among these names
    too, and are reported apart as zero_shot_renamed_top1 and _top5."""
    retrieval: str | None = None
    """Shards for image-text retrieval, recall@1, 5 and 10 both ways."""
    templates: Annotated[tuple[str, ...], PROMPTS] = ("a photo of a {}.",)
    """Prompts of a class; {} is its name. The mean of their text embeddings stands for the class. Or openai-80 or
    openai-7, the sets in the open_clip package, or a file with a prompt a line."""
    queries: Annotated[tuple[str, ...], NOT_EMPTY] = ()
    """Free texts for the page of the run, which shows the images of retrieval that are nearest to each."""
    batch_size: Annotated[int, at_least(1)] = 256
    """Images per forward pass on one rank."""

    def __post_init__(self) -> None:
        """Also refuse what needs another evaluation that is not asked for."""
        super().__post_init__()
        if self.zero_shot_renamed is not None and self.zero_shot is None:
            self.refuse("zero_shot_renamed", f"be left out without {self.flag('zero_shot')}, whose classes it renames")
        if self.zero_shot_names is not None and self.zero_shot is None:
            self.refuse("zero_shot_names", f"be left out without {self.flag('zero_shot')}, whose classes it names")
        if self.queries and self.retrieval is None:
            self.refuse("queries", f"be left out without {self.flag('retrieval')}, whose images answer them")


@dataclass(frozen=True)
class Gallery:
    """Held-out images with the captions that the towers find nearest."""

    images: Tensor  # uint8 [n, S, S, 3]
    captions: list[str]  # the true ones
    nearest: list[list[tuple[str, float]]]  # best first, with their cosines


@dataclass(frozen=True)
class Answer:
    """The held-out images nearest to a free text."""

    query: str
    images: Tensor  # uint8 [k, S, S, 3], the nearest first
    captions: list[str]  # their own
    scores: list[float]  # cosines of image and query


@dataclass(frozen=True)
class Choice:
    """The images of a zero-shot figure, and the classes to choose among."""

    folder: ClassFolders
    names: list[tuple[str, ...]]
    """Names of the classes; those of ``folder`` come first, so that its labels are their places."""


def read_choices(config: EvalConfig) -> dict[str, Choice]:
    """Return what each zero-shot figure that a config asks for chooses among; only folders and files are read.

    Raises:
        FileNotFoundError: a folder is missing or empty, or a file is missing.
        ValueError: the index of the retrieval shards is stale, or a class has no name.
    """
    if config.retrieval is not None:
        open_index(config.retrieval)
    resolve_templates(config.templates)
    choices: dict[str, Choice] = {}

    def names_of(where: str, folder: ClassFolders, names: str | None) -> tuple[str, ...]:
        found = (
            names_of_folders(folder.classes, where) if names is None else read_class_names(names, folder.classes, where)
        )
        return tuple(found)

    seen: list[tuple[str, ...]] = []
    if config.zero_shot is not None:
        folder = read_class_folders(config.zero_shot)
        seen = [names_of(config.zero_shot, folder, config.zero_shot_names)]
        choices["zero_shot"] = Choice(folder, seen)
        if config.zero_shot_renamed is not None:
            renamed = Choice(folder, [names_of(config.zero_shot, folder, config.zero_shot_renamed)])
    if config.zero_shot_unseen is not None:
        folder = read_class_folders(config.zero_shot_unseen)
        choices["zero_shot_unseen"] = Choice(folder, [names_of(config.zero_shot_unseen, folder, None), *seen])
    if config.zero_shot is not None and config.zero_shot_renamed is not None:
        choices["zero_shot_renamed"] = renamed
    return choices


@dataclass
class _Count:
    """What was read for a figure."""

    classes: int
    images: int = 0
    captions: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    by_class: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_class = self.by_class or [0] * self.classes

    def of(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches that hold an image, and count all of them."""
        for batch in batches:
            self.images += len(batch.images)
            self.skipped.update(batch.skipped_by_kind)
            if isinstance(batch, ClassBatch):
                for label in batch.labels.tolist():
                    self.by_class[label] += 1
            else:
                self.captions += sum(map(len, batch.captions))
            if len(batch.images):
                yield batch

    def plus(self, other: "_Count") -> "_Count":
        """Return the sum of two."""
        by_class = [one + two for one, two in zip(self.by_class, other.by_class, strict=True)]
        return _Count(
            self.classes,
            self.images + other.images,
            self.captions + other.captions,
            self.skipped + other.skipped,
            by_class,
        )


class EvaluationSuite:
    """The evaluations of a run. Texts are encoded once, when it is made: their tower never changes.

    Args:
        text_tower: the frozen text tower.
        config: what is measured; an evaluation without a folder is left out.
        image_size: side S of the images the tower takes.
        group: ranks that share the images; None for one process.

    Raises:
        FileNotFoundError: a folder is missing or empty, or the file of other names is missing.
        ValueError: the index of the retrieval shards is stale, or a class has no other name.
    """

    def __init__(
        self,
        text_tower: TextTower,
        config: EvalConfig,
        *,
        image_size: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._text_tower = text_tower
        self._config = config
        self._image_size = image_size
        self._group = group
        self._rank, self._world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._rows: RetrievalRows | None = None
        self._encoded: tuple[list[str], Tensor] | None = None  # the captions of the retrieval shards and their rows
        self._counts: dict[str, dict[str, Any]] = {}
        self._unread: dict[str, list[str]] = {}
        choices = read_choices(config)
        templates = resolve_templates(config.templates)
        # For each zero-shot figure the class folder, and the embeddings [C, d] of the classes to choose among.
        self._choices: dict[str, tuple[ClassFolders, Tensor]] = {}
        encoded: dict[tuple[str, ...], Tensor] = {}
        for kind, choice in choices.items():
            parts = []
            for names in choice.names:
                if names not in encoded:
                    encoded[names] = class_embeddings(text_tower, names, templates, group=group)
                parts.append(encoded[names])
            self._choices[kind] = choice.folder, torch.cat(parts)

    def run(self, encode_images: EncodeImages) -> dict[str, float]:
        """Measure what the config asks for: shares from 0 to 1, the same on every rank. All ranks must call."""
        config, figures = self._config, dict[str, float]()
        for kind, (folder, class_rows) in self._choices.items():
            count = _Count(classes=len(folder.classes))
            of_class = iterate_class_folder(folder, self._image_size, **self._share(config.batch_size))
            accuracy = evaluate_zero_shot(encode_images, count.of(of_class), class_rows, group=self._group)
            figures |= {name.replace("zero_shot", kind): share for name, share in accuracy.items()}
            read = self._gathered(count)
            self._counts[kind] = {"images": read.images, "classes": len(class_rows), "skipped": dict(read.skipped)}
            self._counts[kind] |= {"left": dict(folder.left)} if folder.left else {}
            self._unread[kind] = [
                name for name, images in zip(folder.classes, read.by_class, strict=True) if not images
            ]
        if config.retrieval is not None:
            count = _Count(classes=0)
            batches = iterate_shards(config.retrieval, self._image_size, **self._share(config.batch_size))
            recall, self._rows = evaluate_retrieval(
                encode_images, self._encode_once, count.of(batches), group=self._group
            )
            figures |= recall
            read = self._gathered(count)
            counted = {"images": read.images, "captions": read.captions, "skipped": dict(read.skipped)}
            self._counts["retrieval"] = counted
        return figures

    def gallery(self) -> Gallery | None:
        """Return the first images of the last retrieval run with their nearest captions; None without one."""
        if self._config.retrieval is None or self._rows is None:
            return None
        rows = self._rows
        batch = next(iterate_shards(self._config.retrieval, self._image_size, **self._share(_GALLERY_IMAGES)))
        count = len(batch.captions)
        similarity = rows.image_rows[:count] @ rows.text_rows.T  # [n, m]
        scores, places = similarity.topk(min(_GALLERY_CAPTIONS, len(rows.captions)))
        nearest = [
            [(rows.captions[place], score) for place, score in zip(some_places, some_scores, strict=True)]
            for some_places, some_scores in zip(places.tolist(), scores.tolist(), strict=True)
        ]
        return Gallery(batch.images, ["\n".join(captions) for captions in batch.captions], nearest)

    def counts(self) -> dict[str, dict[str, Any]]:
        """Return what the figures of the last run are of: images, classes or captions, and what was left out."""
        return self._counts

    def complaints(self) -> list[str]:
        """Return a sentence for each thing that makes the figures of the last run those of another set than asked."""
        said = []
        for kind, count in self._counts.items():
            if unread := self._unread.get(kind):
                more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
                said.append(f"{kind}: no image of class {', '.join(unread[:3])}{more} can be read")
            said += [f"{kind}: {complaint}" for complaint in too_many_skipped(count)]
        return said

    def _gathered(self, count: "_Count") -> "_Count":
        """Return the sum of the counts of all ranks."""
        if self._group is None:
            return count
        parts: list[Any] = [None] * self._world_size
        dist.all_gather_object(parts, count, group=self._group)
        return reduce(_Count.plus, parts)

    def chance(self) -> dict[str, float]:
        """Return what choosing a class blindly gives, for each figure of zero-shot classification."""
        return {
            f"{kind}_top{k}": min(1.0, k / len(class_rows))
            for kind, (_, class_rows) in self._choices.items()
            for k in (1, 5)
        }

    def answers(self) -> list[Answer]:
        """Return the images of the last retrieval run nearest to each of ``config.queries``, among this rank's."""
        shards, rows, queries = self._config.retrieval, self._rows, self._config.queries
        if not queries or shards is None or rows is None:
            return []
        similarity = self._text_tower.encode(queries) @ rows.image_rows.T  # [q, n]
        scores, places = similarity.topk(min(_ANSWERS, len(rows.image_rows)))
        wanted = {place for some_places in places.tolist() for place in some_places}
        shown: dict[int, tuple[Tensor, list[str]]] = {}
        batches = iterate_shards(shards, self._image_size, **self._share(self._config.batch_size))
        pairs = (pair for batch in batches for pair in zip(batch.images, batch.captions, strict=True))
        for place, pair in enumerate(pairs):
            if place in wanted:
                shown[place] = pair
            if len(shown) == len(wanted):
                break
        return [
            Answer(
                query,
                torch.stack([shown[place][0] for place in some_places]),
                ["\n".join(shown[place][1]) for place in some_places],
                some_scores,
            )
            for query, some_places, some_scores in zip(queries, places.tolist(), scores.tolist(), strict=True)
        ]

    def _share(self, batch_size: int) -> dict[str, int]:
        """Return how this rank reads its share of the images."""
        return {"batch_size": batch_size, "rank": self._rank, "world_size": self._world_size}

    def _encode_once(self, captions: list[str]) -> Tensor:
        if self._encoded is None or self._encoded[0] != captions:
            self._encoded = (captions, self._text_tower.encode(captions))
        return self._encoded[1]
