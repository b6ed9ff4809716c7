"""Images and captions found by a sentence or by an image, with a trained image tower and its text tower."""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ..data.evaluation import load_batches
from ..data.images import BadSample, eval_image
from ..exports.loaded import Towers, image_fingerprint
from .cache import cached_embeddings
from .nearest import nearest
from .pictures import IDENTITY_BYTES, Pictures

_CAPTIONS_PER_BATCH = 256


@dataclass(frozen=True)
class FoundImage:
    """An image among the nearest."""

    place: int
    name: str
    captions: list[str]
    cosine: float


@dataclass(frozen=True)
class FoundCaption:
    """A caption among the nearest."""

    text: str
    cosine: float


@dataclass(frozen=True)
class Answer:
    """What is nearest to a query, the nearest first."""

    images: list[FoundImage]
    captions: list[FoundCaption]


class Explorer:
    """The embeddings of images and of their captions, and what searches them. Threads may share it.

    Embeddings that are not in ``cache`` are computed when it is made, and kept there.

    Args:
        towers: what embeds.
        pictures: the images.
        cache: folder for the embeddings of any images by any towers.
        batch_size: images per forward pass.
        workers: threads that decode.

    Raises:
        OSError: the cache cannot be written.
        ValueError: no image can be read, embeddings are not finite, or what is in the cache is damaged.
    """

    def __init__(
        self, towers: Towers, pictures: Pictures, cache: Path, *, batch_size: int = 64, workers: int = 2
    ) -> None:
        self.pictures = pictures
        self.unread: list[str] = []
        """A sentence for each image that could not be read."""
        self._towers = towers
        self._image_size = towers.loaded.tower.image_size
        self._lock = Lock()  # of the towers
        device = towers.text.device
        dim = towers.text.embed_dim
        where = f"{device.type} {pictures.folder.resolve()}"

        def embed_images(missing: list[int]) -> Iterator[tuple[list[int], Tensor]]:
            with _progress("images", len(missing)) as advance:
                for loaded, _ in load_batches(self._load, missing, batch_size, workers):
                    good = [(place, image) for place, image in loaded if not isinstance(image, BadSample)]
                    for place, fault in loaded:
                        if isinstance(fault, BadSample):
                            self.unread.append(f"{self.name(place)} ({fault.kind}: {fault})")
                    if good:
                        rows = towers.encode_images(torch.stack([image for _, image in good]))
                        yield [place for place, _ in good], _finite(rows, "image")
                    advance(len(loaded))

        folder = cache / f"images-{_key(image_fingerprint(towers.loaded.tower), where)}"
        self.places, self.image_rows = cached_embeddings(folder, pictures.identities, dim, embed_images, _say_waiting)
        if not len(self.places):
            raise ValueError(f"none of the {len(pictures)} images in {pictures.folder} can be read: {self.unread[0]}")

        self.captions = list(dict.fromkeys(text for place in self.places.tolist() for text in pictures.captions[place]))

        def embed_captions(missing: list[int]) -> Iterator[tuple[list[int], Tensor]]:
            with _progress("captions", len(missing)) as advance:
                for first in range(0, len(missing), _CAPTIONS_PER_BATCH):
                    places = missing[first : first + _CAPTIONS_PER_BATCH]
                    yield places, _finite(towers.text.encode([self.captions[place] for place in places]), "text")
                    advance(len(places))

        folder = cache / f"captions-{_key(towers.text.fingerprint(), where)}"
        identities = [_identity(text) for text in self.captions]
        _, self.caption_rows = cached_embeddings(folder, identities, dim, embed_captions, _say_waiting)

    def by_text(self, text: str, k: int) -> Answer:
        """Return what is nearest to a sentence. Raises ValueError where it says nothing."""
        if not text.strip():
            raise ValueError("the query is empty: type what an image should show")
        with self._lock:
            return self._answer(self._towers.text.encode([text])[0].cpu(), k)

    def by_image(self, payload: bytes, k: int) -> Answer:
        """Return what is nearest to an image file. Raises BadSample where it cannot be decoded."""
        image = eval_image(payload, self._image_size)
        with self._lock:
            return self._answer(self._towers.encode_images(image[None])[0].cpu(), k)

    def by_place(self, place: int, k: int) -> Answer:
        """Return what is nearest to one of the images, itself first. Raises KeyError where it has no embedding."""
        row = int(torch.searchsorted(self.places, place))
        if row == len(self.places) or int(self.places[row]) != place:
            raise KeyError(place)
        return self._answer(self.image_rows[row], k)

    def some(self, k: int) -> list[int]:
        """Return the places of ``k`` images, evenly apart."""
        rows = torch.linspace(0, len(self.places) - 1, min(k, len(self.places))).long()
        return self.places[rows].tolist()

    def _answer(self, query: Tensor, k: int) -> Answer:
        rows, cosines = nearest(self.image_rows, query, k)
        images = [
            FoundImage(place, self.name(place), self.pictures.captions[place], cosine)
            for place, cosine in zip(self.places[rows].tolist(), cosines.tolist(), strict=True)
        ]
        rows, cosines = nearest(self.caption_rows, query, k)
        captions = [
            FoundCaption(self.captions[row], cosine)
            for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True)
        ]
        return Answer(images, captions)

    def name(self, place: int) -> str:
        """Return what an image is called, which a shard that is gone no longer tells."""
        try:
            return self.pictures.name(place)
        except BadSample as fault:
            return f"image {place} ({fault})"

    def _load(self, place: int) -> tuple[int, Tensor | BadSample]:
        try:
            return place, eval_image(self.pictures.read(place), self._image_size)
        except BadSample as fault:
            return place, fault


def _finite(rows: Tensor, kind: str) -> Tensor:
    if not rows.isfinite().all():
        raise ValueError(f"the {kind} tower gives embeddings that are not finite: take another checkpoint")
    return rows


def _key(fingerprint: str, where: str) -> str:
    return hashlib.sha256(f"{fingerprint} {where}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _identity(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=IDENTITY_BYTES).digest()


def _say_waiting() -> None:
    print("another process embeds the same images: waiting for it", file=sys.stderr)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, where that is a terminal; yield what moves it on."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(f"embedding {what}"), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def summary(kind: str, sentences: Sequence[str]) -> str:
    """Return how many things were not read, with the first of them."""
    more = f"; and {len(sentences) - 5} more" if len(sentences) > 5 else ""
    return f"{len(sentences)} {kind}: {'; '.join(sentences[:5])}{more}"
