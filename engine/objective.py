"""What a step minimises: the loss of the global batch, its learnable scalars, and the bank of earlier texts.

| objective       | a gradient needs                   | so a micro-batch goes backward                              |
| `infonce`       | all images of the batch, all texts | after the last forward: column sums couple the images       |
| `sigmoid`       | one image, all texts               | at once: every pair is a question of its own                |
| `image_to_text` | one image, all texts               | at once: the images choose among texts, no text among images |
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.contrastive import contrastive_loss
from ..kernels.image_to_text import image_to_text_loss
from ..kernels.sigmoid import sigmoid_loss
from .config import LossConfig


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
        self._config = config
        self._texts = texts
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

    def candidates(self, step: int, rows: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return text embeddings and ids that the images of step ``step`` choose from: the batch's, then the bank's.

        Args:
            step: counted from 0 since the start of training; it says how much of the bank is filled.
            rows: [B, d], the text embeddings of the batch.
            ids: [B] int64, or None where equal captions are not masked.

        Returns:
            [B + K, d] and [B + K], or None; K grows to ``text_bank`` over the first steps. Valid until the next call.
        """
        if self._rows is None or self._ids is None:
            return rows, ids
        filled = self._texts + min(self._config.text_bank, step * self._texts)
        self._rows[: self._texts].copy_(rows)
        if ids is not None:
            self._ids[: self._texts].copy_(ids)
        return self._rows[:filled], None if ids is None else self._ids[:filled]

    def remember(self, step: int) -> None:
        """Put the texts of step ``step`` into the bank, in place of the oldest; after its losses."""
        if self._rows is None or self._ids is None:
            return
        size = self._config.text_bank
        kept = min(self._texts, size)
        first = (step * self._texts + self._texts - kept) % size
        before_end = min(kept, size - first)
        for buffer in (self._rows, self._ids):
            batch, bank = buffer[self._texts - kept : self._texts], buffer[self._texts :]
            bank[first : first + before_end].copy_(batch[:before_end])
            bank[: kept - before_end].copy_(batch[before_end:])

    def of_batch(
        self, images: Tensor, texts: Tensor, ids: Tensor | None, *, first_row: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        """Return the loss of the global batch of a coupled objective, the same on all ranks.

        Args:
            images: [b, d] unit embeddings of this rank.
            texts: from `candidates`, like ids.
            ids: see there.
            first_row: the row of `texts` that matches row 0 of `images`.
            group: of the ranks, or None.
        """
        return contrastive_loss(
            images,
            texts,
            self.logit_scale(),
            first_row=first_row,
            ids=ids,
            group=group,
            bank=len(texts) - self._texts,
            mode=self._config.mode,
        )

    def of_micro_batch(self, images: Tensor, texts: Tensor, ids: Tensor | None, *, first_row: int) -> Tensor:
        """Return the share of some images [m, d] in the loss of the global batch, for objectives without coupling.

        Arguments as in `of_batch`; the shares of all micro-batches of all ranks add up to the loss.
        """
        if self.logit_bias is None:
            return image_to_text_loss(
                images, texts, self.logit_scale(), first_row=first_row, ids=ids, batch=self._texts
            )
        share = len(images) / self._texts
        return share * sigmoid_loss(images, texts, self.logit_scale(), self.logit_bias, first_row=first_row, ids=ids)
