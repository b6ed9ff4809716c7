"""What a step minimises: the loss of the global batch, its learnable scalars, and the bank of earlier texts.

| objective       | a gradient needs                   | so a micro-batch goes backward                              |
| `infonce`       | all images of the batch, all texts | after the last forward: column sums couple the images       |
| `sigmoid`       | one image, all texts               | at once: every pair is a question of its own                |
| `image_to_text` | one image, all texts               | at once: the images choose among texts, no text among images |
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.contrastive import Mode, contrastive_loss
from ..kernels.image_to_text import image_to_text_loss
from ..kernels.sigmoid import sigmoid_loss
from ..settings import FREE_ON_RESUME, Settings, above, at_least


@dataclass(frozen=True, kw_only=True)
class LossConfig(Settings, section="loss"):
    """The loss of the global batch."""

    objective: Literal["infonce", "sigmoid", "image_to_text"] = "infonce"
    """infonce: every image chooses its text and every text its image, as published. sigmoid: every pair is a yes-or-no
    question (SigLIP). image_to_text: only the images choose. The last two are exact in one pass over the images,
    whatever the memory, and are other losses: their results are not those of the recipe."""
    mode: Annotated[Mode, FREE_ON_RESUME] = "auto"
    """Implementation of infonce: the table at the top of kernels/contrastive.py. All compute the same loss."""
    initial_logit_scale: Annotated[float, above(0)] = 1 / 0.07
    """Start of the learnable, unclamped logit scale. SigLIP starts at 10."""
    initial_logit_bias: float = -10.0
    """Start of the learnable bias of the sigmoid objective."""
    mask_duplicates: bool = False
    """Do not use equal captions in a batch as negatives of each other. Off in the published recipe."""
    text_bank: Annotated[int, at_least(0)] = 0
    """Text embeddings of earlier steps that are further negatives of every image. They cost no encoding and never go
    stale, but the loss is another than that of the recipe, with more candidates. 0: none."""

    def __post_init__(self) -> None:
        """Refuse an implementation of another loss, too."""
        super().__post_init__()
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
