"""Batches on their way to the device: copied, and their captions encoded, while the step before still runs there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.loader import Batch, Loader
from ..models.text import TextTower


@dataclass(frozen=True)
class FedBatch:
    """A batch on the device, ready for the current stream."""

    images: Tensor  # uint8 [b, S, S, 3]
    text: Tensor  # [b, d] unit rows
    ids: Tensor  # [b] int64
    source: Batch


class Feed:
    """Takes batches from a loader and brings them to the device, on a CUDA device on a stream of its own.

    The host runs ahead of the device, so copies and the frozen text tower of the next batch share the device with the
    image tower of this one. Stored text rows are taken where the loader gives them.
    """

    def __init__(self, loader: Loader, text_tower: TextTower, device: torch.device) -> None:
        self._loader = loader
        self._text_tower = text_tower
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[FedBatch]:
        """Return itself: batches come without end."""
        return self

    def __next__(self) -> FedBatch:
        """Wait for the loader's next batch and queue its way to the device."""
        batch = next(self._loader)
        if self._stream is None:
            return self._on_device(batch)
        with torch.cuda.stream(self._stream):
            fed = self._on_device(batch)
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._stream)
        for tensor in (fed.images, fed.text, fed.ids):
            tensor.record_stream(here)  # or its memory could be given to the batch after while a step reads it
        return fed

    def _on_device(self, batch: Batch) -> FedBatch:
        if batch.text_embeddings is None:
            text = self._text_tower.encode(batch.captions)
        else:
            text = batch.text_embeddings.to(self._device, non_blocking=True)
        ids = batch.ids if self._stream is None else batch.ids.pin_memory()
        images, ids = (tensor.to(self._device, non_blocking=True) for tensor in (batch.images, ids))
        return FedBatch(images, text, ids, batch)
