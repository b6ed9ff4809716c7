"""The evaluations of a run, during training and after it: zero-shot classification and retrieval."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.evaluation import (
    iterate_class_folder,
    iterate_shards,
    list_class_images,
    list_classes,
    read_class_names,
)
from ..data.index import open_index
from ..models.text import TextTower
from ..settings import NOT_EMPTY, Bound, Settings, at_least
from .retrieval import RetrievalRows, evaluate_retrieval
from .zero_shot import class_embeddings, evaluate_zero_shot

_GALLERY_IMAGES = 24
_GALLERY_CAPTIONS = 3
_ANSWERS = 6  # images shown for a query

EncodeImages = Callable[[Tensor], Tensor]  # uint8 [b, S, S, 3] -> rows [b, d]


PROMPTS: Final = Bound(lambda template: "{}" in template, "hold {} where the class name goes")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings, section="evals"):
    """The evaluations during training and at its end."""

    every: Annotated[int, at_least(0)] = 1000
    """Steps between evaluations; the last step is always evaluated. 0: only the last."""
    zero_shot: str | None = None
    """Class folder (CLASS NAME/image.jpg) for zero-shot top-1 and top-5."""
    zero_shot_unseen: str | None = None
    """A second class folder, of classes that no training caption names. Its images choose among the classes of both
    folders, and are reported apart as zero_shot_unseen_top1 and _top5."""
    zero_shot_renamed: str | None = None
    """JSON file with other names of the classes of zero_shot, {folder name: class name}. The same images choose among
    these names too, and are reported apart as zero_shot_renamed_top1 and _top5."""
    retrieval: str | None = None
    """Shards for image-text retrieval, recall@1, 5 and 10 both ways."""
    templates: Annotated[tuple[str, ...], PROMPTS] = ("a photo of a {}.",)
    """Prompts of a class; {} is its name. The mean of their text embeddings stands for the class."""
    queries: Annotated[tuple[str, ...], NOT_EMPTY] = ()
    """Free texts for the page of the run, which shows the images of retrieval that are nearest to each."""
    batch_size: Annotated[int, at_least(1)] = 256
    """Images per forward pass on one rank."""

    def __post_init__(self) -> None:
        """Also refuse what needs another evaluation that is not asked for."""
        super().__post_init__()
        if self.zero_shot_renamed is not None and self.zero_shot is None:
            self.refuse("zero_shot_renamed", f"be left out without {self.flag('zero_shot')}, whose classes it renames")
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
        if config.retrieval is not None:
            open_index(config.retrieval)

        def rows_of_classes(folder: str, names: str | None = None) -> Tensor:
            list_class_images(folder)  # an empty class is said now, not after hours of training
            known = list_classes(folder) if names is None else read_class_names(names, folder)
            return class_embeddings(text_tower, known, config.templates, group=group)

        # For each zero-shot figure the class folder, and the embeddings [C, d] of the classes to choose among.
        self._choices: dict[str, tuple[str, Tensor]] = {}
        if config.zero_shot is not None:
            self._choices["zero_shot"] = config.zero_shot, rows_of_classes(config.zero_shot)
        if config.zero_shot_unseen is not None:
            # The unseen classes come first, so that the labels of their folder stay what they are.
            rows = [rows_of_classes(config.zero_shot_unseen), *(rows for _, rows in self._choices.values())]
            self._choices["zero_shot_unseen"] = config.zero_shot_unseen, torch.cat(rows)
        if config.zero_shot is not None and config.zero_shot_renamed is not None:
            rows_renamed = rows_of_classes(config.zero_shot, config.zero_shot_renamed)
            self._choices["zero_shot_renamed"] = config.zero_shot, rows_renamed

    def run(self, encode_images: EncodeImages) -> dict[str, float]:
        """Measure what the config asks for: shares from 0 to 1, the same on every rank. All ranks must call."""
        config, figures = self._config, dict[str, float]()
        for kind, (folder, class_rows) in self._choices.items():
            of_class = iterate_class_folder(folder, self._image_size, **self._share(config.batch_size))
            accuracy = evaluate_zero_shot(encode_images, of_class, class_rows, group=self._group)
            figures |= {name.replace("zero_shot", kind): share for name, share in accuracy.items()}
        if config.retrieval is not None:
            batches = iterate_shards(config.retrieval, self._image_size, **self._share(config.batch_size))
            recall, self._rows = evaluate_retrieval(encode_images, self._encode_once, batches, group=self._group)
            figures |= recall
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
        return Gallery(batch.images, batch.captions, nearest)

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
        shown: dict[int, tuple[Tensor, str]] = {}
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
                [shown[place][1] for place in some_places],
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
