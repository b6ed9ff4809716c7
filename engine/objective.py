"""What a step minimises: the loss of the global batch, its learnable scalars, and the bank of earlier texts.

| objective       | a gradient needs       | a micro-batch's backward runs                                     |
| `infonce`       | all images, all texts  | after the last forward: softmax over images couples the images    |
| `sigmoid`       | one image, all texts   | after its forward: an independent binary classification per pair  |
| `image_to_text` | one image, all texts   | after its forward: softmax over texts for each image only         |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.contrastive import Mode, contrastive_loss
from ..kernels.image_to_text import image_to_text_loss
from ..kernels.sigmoid import sigmoid_loss
from ..settings import FREE_ON_RESUME, Settings, above, at_least


@dataclass(frozen=True, kw_only=True)
class LossConfig(Settings, section="loss"):
    """The loss of the global batch."""

    objective: Literal["infonce", "sigmoid", "image_to_text"] = "infonce"
    """infonce: softmax over texts for each image and over images for each text, as published. sigmoid: an independent
    binary classification per pair (SigLIP). image_to_text: softmax over texts for each image only. The last two are
    exact in one pass over the images, whatever the memory, and are other losses: their results are not the recipe's."""
    mode: Annotated[Mode, FREE_ON_RESUME] = "auto"
    """Implementation of infonce: the table at the top of kernels/contrastive.py. All compute the same loss."""
    initial_logit_scale: Annotated[float, above(0)] = 1 / 0.07
    """Start of the learnable logit scale. SigLIP starts at 10."""
    max_logit_scale: Annotated[float | None, above(0)] = None
    """Most that the logit scale becomes. CLIP has 100; the published recipe has no limit. A low one draws images closer
    to the embeddings of their captions, where a high one only has them further from the other captions."""
    initial_logit_bias: float = -10.0
    """Start of the learnable bias of the sigmoid objective."""
    mask_duplicates: bool = False
    """Do not use equal captions in a batch as negatives of each other. Off in the published recipe."""
    text_bank: Annotated[int, at_least(0)] = 0
    """Text embeddings of earlier steps that are further negatives of every image. They cost no encoding and never go
    stale, but the loss is another than that of the recipe, with more negatives. 0: none."""
    matryoshka: Annotated[tuple[int, ...], at_least(1)] = ()
    """Leading lengths of the embeddings that each have a loss of their own beside that of the whole, so that image
    embeddings can be cut to them as those of the text tower can (Matryoshka Representation Learning,
    arXiv:2205.13147). Both sides are cut and made unit length again. Off in the published recipe."""
    matryoshka_weights: Annotated[tuple[float, ...], above(0)] = ()
    """Weight of the loss of each length; the whole has 1. Left out: 1 each."""

    def __post_init__(self) -> None:
        """Also refuse another loss's implementation, a start above the limit, and weights that belong to no length."""
        super().__post_init__()
        if self.max_logit_scale is not None and self.initial_logit_scale > self.max_logit_scale:
            self.refuse("initial_logit_scale", f"be at most {self.max_logit_scale}, {self.flag('max_logit_scale')}")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka):
            self.refuse("matryoshka_weights", f"be one weight for each of the {len(self.matryoshka)} lengths")
        if self.mode != "auto" and self.objective != "infonce":
            self.refuse("mode", f"be auto: the others are of the objective infonce, not {self.objective}")


class Objective(nn.Module):
    """The loss and its parameters: ``log_logit_scale``, and ``logit_bias`` for the sigmoid loss (None otherwise).

    Args:
        config: which loss.
        texts: text embeddings of the global batch.
        width: of an embedding.
        dtype: of the text embeddings.
        device: of everything here.

    With a bank the last ``config.text_bank`` texts of earlier steps are further negatives of every image. The text
    tower is frozen, so they never go stale. They are buffers: part of the state dict, so that a resumed run has them.
    """

    def __init__(self, config: LossConfig, *, texts: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        if config.matryoshka and max(config.matryoshka) >= width:
            config.refuse("matryoshka", f"be lengths below {width}, that of the whole embeddings")
        self._config = config
        self._batch_size = texts
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.initial_logit_scale), device=device))
        biased = config.objective == "sigmoid"
        self.logit_bias = nn.Parameter(torch.tensor(config.initial_logit_bias, device=device)) if biased else None
        # The texts of the batch lie in front of the bank's, so that a loss reads one tensor.
        size = texts + config.text_bank
        self._rows = torch.zeros(size, width, dtype=dtype, device=device) if config.text_bank else None
        self._ids = torch.zeros(size, dtype=torch.int64, device=device) if config.text_bank else None
        self.register_buffer("bank_rows", None if self._rows is None else self._rows[texts:])
        self.register_buffer("bank_ids", None if self._ids is None else self._ids[texts:])

    @property
    def couples_images(self) -> bool:
        """Whether no gradient is known before the last image of the batch has gone forward."""
        return self._config.objective == "infonce"

    def logit_scale(self) -> Tensor:
        """Return the factor of the cosines, 0-dim, differentiable."""
        return self.log_logit_scale.exp()

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """Bring the logit scale back to its limit, if it has one and has passed it; after the optimiser's step."""
        if self._config.max_logit_scale is not None:
            self.log_logit_scale.clamp_(max=math.log(self._config.max_logit_scale))

    def texts(self, step: int, rows: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return embeddings and ids of the texts that step ``step`` compares images with: the batch's, then the bank's.

        Args:
            step: counted from 0 since the start of training; it says how much of the bank is filled.
            rows: [B, d], the text embeddings of the batch.
            ids: [B] int64, or None where equal captions are not masked.

        Returns:
            [B + K, d] and [B + K], or None; K grows to ``text_bank`` over the first steps. Valid until the next call.
        """
        if self._rows is None or self._ids is None:
            return rows, ids
        filled = self._batch_size + min(self._config.text_bank, step * self._batch_size)
        self._rows[: self._batch_size].copy_(rows)
        if ids is not None:
            self._ids[: self._batch_size].copy_(ids)
        return self._rows[:filled], None if ids is None else self._ids[:filled]

    def remember(self, step: int) -> None:
        """Put the texts of step ``step`` into the bank, in place of the oldest; after its losses."""
        if self._rows is None or self._ids is None:
            return
        size = self._config.text_bank
        kept = min(self._batch_size, size)
        first = (step * self._batch_size + self._batch_size - kept) % size
        before_end = min(kept, size - first)
        for buffer in (self._rows, self._ids):
            batch, bank = buffer[self._batch_size - kept : self._batch_size], buffer[self._batch_size :]
            bank[first : first + before_end].copy_(batch[:before_end])
            bank[: kept - before_end].copy_(batch[before_end:])

    def of_batch(
        self, images: Tensor, texts: Tensor, ids: Tensor | None, *, first_row: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        """Return the loss of the global batch of a coupled objective, the same on all ranks.

        Args:
            images: [b, d] unit embeddings of this rank.
            texts: from the method `texts`, like ids.
            ids: see there.
            first_row: the row of `texts` that matches row 0 of `images`.
            group: of the ranks, or None.
        """

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            return contrastive_loss(
                images,
                texts,
                self.logit_scale(),
                first_row=first_row,
                ids=ids,
                group=group,
                bank=len(texts) - self._batch_size,
                mode=self._config.mode,
            )

        return self._over_lengths(loss, images, texts)

    def of_micro_batch(self, images: Tensor, texts: Tensor, ids: Tensor | None, *, first_row: int) -> Tensor:
        """Return the share of some images [m, d] in the loss of the global batch, for objectives without coupling.

        Arguments as in `of_batch`; the shares of all micro-batches of all ranks add up to the loss.
        """

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            if self.logit_bias is None:
                return image_to_text_loss(
                    images, texts, self.logit_scale(), first_row=first_row, ids=ids, batch=self._batch_size
                )
            share = len(images) / self._batch_size
            return share * sigmoid_loss(
                images, texts, self.logit_scale(), self.logit_bias, first_row=first_row, ids=ids
            )

        return self._over_lengths(loss, images, texts)

    def _over_lengths(self, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, texts: Tensor) -> Tensor:
        """Return the loss of the whole embeddings, plus the weighted losses of their leading parts."""
        total = loss(images, texts)
        weights = self._config.matryoshka_weights or (1.0,) * len(self._config.matryoshka)
        for length, weight in zip(self._config.matryoshka, weights, strict=True):
            total = total + weight * loss(_cut(images, length), _cut(texts, length))
        return total


def _cut(rows: Tensor, length: int) -> Tensor:
    """Return the leading ``length`` numbers of every embedding, made unit length again."""
    return F.normalize(rows[:, :length].float(), dim=-1).to(rows.dtype)
