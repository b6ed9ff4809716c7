"""The evaluations of a run, during training and after it: zero-shot classification and retrieval."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.evaluation import iterate_class_folder, iterate_shards, list_class_images, list_classes
from ..data.index import open_index
from ..models.text import TextTower
from ..settings import Bound, Settings, at_least
from .retrieval import RetrievalRows, evaluate_retrieval
from .zero_shot import class_embeddings, evaluate_zero_shot

_GALLERY_IMAGES = 24
_GALLERY_CAPTIONS = 3

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
    retrieval: str | None = None
    """Shards for image-text retrieval, recall@1, 5 and 10 both ways."""
    templates: Annotated[tuple[str, ...], PROMPTS] = ("a photo of a {}.",)
    """Prompts of a class; {} is its name. The mean of their text embeddings stands for the class."""
    batch_size: Annotated[int, at_least(1)] = 256
    """Images per forward pass on one rank."""


@dataclass(frozen=True)
class Gallery:
    """Held-out images with the captions that the towers find nearest."""

    images: Tensor  # uint8 [n, S, S, 3]
    captions: list[str]  # the true ones
    nearest: list[list[tuple[str, float]]]  # best first, with their cosines


class EvaluationSuite:
    """The evaluations of a run. Texts are encoded once, when it is made: their tower never changes.

    Args:
        text_tower: the frozen text tower.
        config: what is measured; an evaluation without a folder is left out.
        image_size: side S of the images the tower takes.
        group: ranks that share the images; None for one process.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: the index of the retrieval shards is stale.
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

        def rows_of_classes(folder: str | None) -> Tensor | None:
            if folder is None:
                return None
            list_class_images(folder)  # an empty class is said now, not after hours of training
            return class_embeddings(text_tower, list_classes(folder), config.templates, group=group)

        self._class_rows = rows_of_classes(config.zero_shot)  # [C, d]
        self._unseen_rows = rows_of_classes(config.zero_shot_unseen)  # [U, d]

    def run(self, encode_images: EncodeImages) -> dict[str, float]:
        """Measure what the config asks for: shares from 0 to 1, the same on every rank. All ranks must call."""
        config, figures = self._config, dict[str, float]()
        if config.zero_shot is not None and self._class_rows is not None:
            figures |= self._classify(encode_images, config.zero_shot, self._class_rows)
        if config.zero_shot_unseen is not None and self._unseen_rows is not None:
            # The unseen classes come first, so that the labels of their folder stay what they are.
            rows = [self._unseen_rows] + ([] if self._class_rows is None else [self._class_rows])
            unseen = self._classify(encode_images, config.zero_shot_unseen, torch.cat(rows))
            figures |= {name.replace("zero_shot", "zero_shot_unseen"): share for name, share in unseen.items()}
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

    def _share(self, batch_size: int) -> dict[str, int]:
        """Return how this rank reads its share of the images."""
        return {"batch_size": batch_size, "rank": self._rank, "world_size": self._world_size}

    def _encode_once(self, captions: list[str]) -> Tensor:
        if self._encoded is None or self._encoded[0] != captions:
            self._encoded = (captions, self._text_tower.encode(captions))
        return self._encoded[1]

    def _classify(self, encode_images: EncodeImages, folder: str, class_rows: Tensor) -> dict[str, float]:
        batches = iterate_class_folder(folder, self._image_size, **self._share(self._config.batch_size))
        return evaluate_zero_shot(encode_images, batches, class_rows, group=self._group)
