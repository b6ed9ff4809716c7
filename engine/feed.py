"""Batches with their text embeddings, made ready on the device while the step before still runs there."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..data.loader import Batch
from ..models.text import TextTower


class Feed:
    """Takes batches from a loader and has their captions encoded, on a CUDA device on a separate stream.

    The host runs ahead of the device, so the frozen text tower reads the next batch while the image tower works on this
    one. Images come from the loader on the device; stored text embeddings are taken where it gives them.
    """

    def __init__(self, loader: Iterator[Batch], text_tower: TextTower, device: torch.device) -> None:
        self._loader = loader
        self._text_tower = text_tower
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        """Return itself: batches come without end."""
        return self

    def __next__(self) -> Batch:
        """Wait for the loader's next batch and queue the encoding of its captions."""
        if self._stream is None:
            return self._read()
        with torch.cuda.stream(self._stream):
            fed = self._read()
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._stream)
        for tensor in (fed.images, fed.text, fed.ids):
            tensor.record_stream(here)  # otherwise the next batch may get this memory while the step reads it
        return fed

    def _read(self) -> Batch:
        batch = next(self._loader)
        if batch.text_embeddings is None:
            text = self._text_tower.encode(batch.captions)
        else:
            text = F.normalize(batch.text_embeddings.float(), dim=-1)
        return replace(batch, text_embeddings=text)
