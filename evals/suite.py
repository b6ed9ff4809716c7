"""What a run is judged by, during training and after it: zero-shot classification and retrieval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.evaluation import iterate_class_folder, iterate_shards, list_class_images, list_classes
from ..data.index import open_index
from ..models.text import TextTower
from .retrieval import RetrievalRows, evaluate_retrieval
from .zero_shot import class_embeddings, evaluate_zero_shot

_GALLERY_PICTURES = 24
_GALLERY_CAPTIONS = 3

EncodeImages = Callable[[Tensor], Tensor]  # uint8 [b, S, S, 3] -> rows [b, d]


@dataclass(frozen=True)
class Gallery:
    """Held-out pictures with the captions that the towers find nearest."""

    images: Tensor  # uint8 [n, S, S, 3]
    captions: list[str]  # the true ones
    nearest: list[list[tuple[str, float]]]  # best first, with their cosines


class EvaluationSuite:
    """The evaluations of a run. Texts are encoded once, when it is made: their tower never changes.

    Args:
        text_tower: the frozen text tower.
        zero_shot: class folder, or None to leave zero-shot classification out.
        zero_shot_unseen: a second class folder, of classes that no training caption names. Its pictures choose among
            the classes of both folders, and are reported apart as ``zero_shot_unseen_top1`` and ``_top5``.
        retrieval: folder of shards, or None to leave retrieval out.
        templates: prompts of a class, with ``{}`` for its name.
        image_size: side S of the images the tower takes.
        batch_size: images a forward pass.
        group: ranks that share the pictures; None for one process.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: the index of the retrieval shards is stale, or a template lacks ``{}``.
    """

    def __init__(
        self,
        text_tower: TextTower,
        *,
        zero_shot: str | None,
        zero_shot_unseen: str | None,
        retrieval: str | None,
        templates: Sequence[str],
        image_size: int,
        batch_size: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._text_tower = text_tower
        self._zero_shot = zero_shot
        self._zero_shot_unseen = zero_shot_unseen
        self._retrieval = retrieval
        self._image_size = image_size
        self._batch_size = batch_size
        self._group = group
        self._rank, self._world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._rows: RetrievalRows | None = None
        self._encoded: tuple[list[str], Tensor] | None = None  # the captions of the retrieval shards and their rows
        if retrieval is not None:
            open_index(retrieval)

        def rows_of_classes(folder: str | None) -> Tensor | None:
            if folder is None:
                return None
            list_class_images(folder)  # an empty class is said now, not after hours of training
            return class_embeddings(text_tower, list_classes(folder), templates, group=group)

        self._class_rows = rows_of_classes(zero_shot)  # [C, d]
        self._unseen_rows = rows_of_classes(zero_shot_unseen)  # [U, d]

    def run(self, encode_images: EncodeImages) -> dict[str, float]:
        """Measure everything; the same figures, shares from 0 to 1, on every rank. All ranks must call."""
        figures: dict[str, float] = {}
        if self._zero_shot is not None and self._class_rows is not None:
            figures |= self._classify(encode_images, self._zero_shot, self._class_rows)
        if self._zero_shot_unseen is not None and self._unseen_rows is not None:
            # The unseen classes come first, so that the labels of their folder stay what they are.
            rows = [self._unseen_rows] + ([] if self._class_rows is None else [self._class_rows])
            unseen = self._classify(encode_images, self._zero_shot_unseen, torch.cat(rows))
            figures |= {name.replace("zero_shot", "zero_shot_unseen"): share for name, share in unseen.items()}
        if self._retrieval is not None:
            batches = iterate_shards(
                self._retrieval,
                self._image_size,
                batch_size=self._batch_size,
                rank=self._rank,
                world_size=self._world_size,
            )
            recall, self._rows = evaluate_retrieval(encode_images, self._encode_once, batches, group=self._group)
            figures |= recall
        return figures

    def gallery(self) -> Gallery | None:
        """Return the first pictures of the last retrieval run with their nearest captions; None without one."""
        if self._retrieval is None or self._rows is None:
            return None
        rows = self._rows
        batch = next(
            iterate_shards(
                self._retrieval,
                self._image_size,
                batch_size=_GALLERY_PICTURES,
                rank=self._rank,
                world_size=self._world_size,
            )
        )
        count = len(batch.captions)
        similarity = rows.image_rows[:count] @ rows.text_rows.T  # [n, m]
        scores, places = similarity.topk(min(_GALLERY_CAPTIONS, len(rows.captions)))
        nearest = [
            [(rows.captions[place], score) for place, score in zip(some_places, some_scores, strict=True)]
            for some_places, some_scores in zip(places.tolist(), scores.tolist(), strict=True)
        ]
        return Gallery(batch.images, batch.captions, nearest)

    def _encode_once(self, captions: list[str]) -> Tensor:
        if self._encoded is None or self._encoded[0] != captions:
            self._encoded = (captions, self._text_tower.encode(captions))
        return self._encoded[1]

    def _classify(self, encode_images: EncodeImages, folder: str, class_rows: Tensor) -> dict[str, float]:
        batches = iterate_class_folder(
            folder, self._image_size, batch_size=self._batch_size, rank=self._rank, world_size=self._world_size
        )
        return evaluate_zero_shot(encode_images, batches, class_rows, group=self._group)
