"""Symmetric InfoNCE of image against text embeddings: exact at any batch size, no [b, B] tensor, one all-reduce.

Letters: b images here, B images and texts in the global batch, d the width, s the logit scale; image i belongs to text
t_i = first_row + i. Embeddings are unit vectors; where the text tower is frozen, those of texts are constants.

    S_ij = s <I_i, T_j>       r_i = log Σ_j exp S_ij  (all texts)       c_j = log Σ_i exp S_ij  (all images)
    L = 1/B Σ_i [(r_i + c_{t_i}) / 2 - S_{i,t_i}]
    dL/dI_i = s / (2B) [Σ_{j≠t_i} (exp(S_ij - r_i) + exp(S_ij - c_j)) T_j - k_i T_{t_i}]
    k_i = σ(r'_i - S_{i,t_i}) + σ(c'_{t_i} - S_{i,t_i})         r', c' leave the matching pair out of the sum
    s dL/ds = Σ_i <I_i, dL/dI_i>                                (S is linear in s and in the image embeddings)

The matching pair never enters a sum of rounded numbers: 1 - P_ii, of the rows and of the columns, comes from k_i and L
from softplus(r'_i - S_{i,t_i}), so both stay accurate when the model is nearly sure (P_ii -> 1) and a softmax minus one
would cancel. (The column part is a difference of float64 numbers: accurate down to a loss of about 1e-12.)

Row sums are local. Column sums are e^S in float64, without a running maximum, so that ranks combine them by one SUM
all-reduce of B float64 numbers; the loss is in the same message. No image embedding and no gradient is sent.
Text embeddings without an image enter only the row sums: they have no c_j, and B in 1/B does not count them.
The price is a range: with unit vectors every sum is finite and above zero while s < (1024 - log2 B) ln 2, which is 698
at B = 65,536 (708 / max|<I_i, T_j>| for others). Beyond it loss and gradients are inf or nan, never a wrong number.

Where the text tower is trained as well, the texts take this rank's share of their gradient, from the same weights:

    dL/dT_j = s / (2B) [Σ_{i: t_i≠j} (exp(S_ij - r_i) + exp(S_ij - c_j)) I_i - k_j I_{i: t_i=j}]

Modes, by cost in passes of 2·b·B·d operations, and what they hold of the [b, B] logits:

| mode        | passes | holds                                 | arithmetic                                           |
| `store`     | 2      | all, as exponentials in 2 bytes       | products in float16, sums in float32 and float64     |
| `recompute` | 3      | one chunk of weights in 2 bytes       | the same                                             |
| `chunked`   | 3      | one chunk of logits, twice, 4 bytes   | float32, or float64 (2 passes if one chunk is all)   |
| `reference` | 3      | all, several times                    | the same, by autograd                                |

The text tower's gradient is one pass more. Measure: `python -m textlock.bench.losses`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .contrastive_tiles import (
    STORED_RANGE,
    finish_gradient,
    matching_cosines,
    multiply_stored,
    sum_exponentials,
    weigh_stored,
    write_weights,
)
from .pairs import (
    Pairs,
    Reduction,
    asked_for,
    check_layout,
    check_settings,
    checked_pairs,
    dense_ids,
    for_reduction,
    pairs_of_operator,
    register_ready_gradients,
    rows_per_chunk,
    why_not_tiles,
)
from .tiles import WEIGHT_UNIT, operand, product

Mode = Literal["auto", "reference", "chunked", "store", "recompute"]


def reference(pairs: Pairs) -> Tensor:
    """Dense, differentiable InfoNCE: the truth of the tests (in float64).

    With a group every rank gathers the image embeddings of all ranks and holds all logits [B - bank, B]; only the
    images of this rank carry gradient.
    """
    b, B, dtype, ids = pairs.image.shape[0], pairs.text.shape[0], pairs.dtype, pairs.ids
    image, text, logit_scale = (x.to(dtype) for x in (pairs.image, pairs.text, pairs.logit_scale))
    first_row = pairs.first_row
    logits = logit_scale * (image @ text.T)  # [n, B], n = b without a group
    if pairs.group is not None:
        check_layout(pairs)
        everyone = image.new_zeros(B - pairs.bank, image.shape[1])
        everyone[pairs.labels] = image.detach()
        dist.all_reduce(everyone, group=pairs.group)
        # The images of other ranks are constants here, their shares of d text and d logit_scale included: each rank
        # adds its own.
        others = logit_scale.detach() * (everyone @ text.detach().T)
        logits = torch.cat([others[:first_row], logits, others[first_row + b :]])
        first_row = 0
    own = slice(first_row, first_row + logits.shape[0])  # the columns whose image takes part
    if ids is not None:
        masked = ids[own, None] == ids  # [n, B]
        masked.diagonal(first_row).fill_(False)
        logits = logits.masked_fill(masked, -torch.inf)
    labels = torch.arange(logits.shape[0], device=image.device)
    image_to_text = F.cross_entropy(logits, labels + first_row)
    text_to_image = F.cross_entropy(logits[:, own].T, labels)
    return (image_to_text + text_to_image) / 2


@dataclass(frozen=True)
class _Normalisers:
    """What pass 1 of the images here leaves, the matching pair apart from the rest. Natural logarithms."""

    positive: Tensor  # [b] float64: S_{i,t_i}
    row_rest: Tensor  # [b] float64: r'_i
    column_sums: Tensor  # [terms] float64: Σ_i e^S of the images here


@dataclass(frozen=True)
class _Coupled:
    """What all ranks together know after the all-reduce."""

    loss: Tensor  # [] float64
    factor: Tensor  # [] float64: 1 / 2B, nan where the loss is inf or nan
    row_lse: Tensor  # [b] float64: r_i
    column_lse: Tensor  # [terms] float64: c_j
    one_minus_p: Tensor  # [b] float64: k_i, 1 - P_ii of the row and of the column


@dataclass(frozen=True)
class _Gradients:
    """Each empty where not asked for."""

    image: Tensor
    text: Tensor
    scale: Tensor


def _couple(pairs: Pairs, here: _Normalisers) -> _Coupled:
    """Combine the ranks: one SUM all-reduce of the column sums, the loss in the same message."""
    n, own = pairs.terms, pairs.own
    positive, row_rest = here.positive, here.row_rest
    message = positive.new_empty(n + 1)
    column_sums, total = message[:n], message[n]
    column_sums.copy_(here.column_sums)
    column_sums[own] += positive.exp()
    total.copy_((F.softplus(row_rest - positive) - positive).sum() / 2)
    _all_reduce(message, pairs.group)
    column_lse = column_sums.log()
    column_rest = (column_sums[own] - positive.exp()).clamp_(min=0).log()  # c'_{t_i}
    loss = (total + column_lse.sum() / 2) / n
    return _Coupled(
        loss=loss,
        factor=1 / (2 * n) + 0 * loss,
        row_lse=torch.logaddexp(row_rest, positive),
        column_lse=column_lse,
        one_minus_p=torch.sigmoid(row_rest - positive) + torch.sigmoid(column_rest - positive),
    )


def _chunked(pairs: Pairs, chunk_mib: int | None, wants_image: bool, wants_text: bool) -> tuple[_Coupled, _Gradients]:
    """Evaluate the loss over a chunk of images at a time: two buffers of [rows of a chunk, B] are all it holds."""
    b, B, dtype = pairs.image.shape[0], pairs.text.shape[0], pairs.dtype
    lowest = torch.finfo(dtype).min  # stands for -inf where every logit is masked: -inf - lowest is still -inf
    rows, columns = pairs.image.to(dtype), pairs.text.to(dtype)
    scale = pairs.logit_scale.to(dtype)
    labels, window = pairs.labels, pairs.window

    chunk_rows = min(b, rows_per_chunk(chunk_mib, B * (2 * dtype.itemsize + (pairs.ids is not None)), rows.device))
    logits_buffer = rows.new_empty(chunk_rows, B)
    weights_buffer = torch.empty_like(logits_buffer)
    masked_buffer = None if pairs.ids is None else torch.empty_like(logits_buffer, dtype=torch.bool)

    def chunks() -> Iterator[slice]:
        for start in range(0, b, chunk_rows):
            yield slice(start, min(start + chunk_rows, b))

    def logits_without_matches(chunk: slice) -> tuple[Tensor, Tensor]:
        """Logits of a chunk [r, B] with matching pairs and duplicates at -inf, and the matching logits [r]."""
        r = chunk.stop - chunk.start
        logits = torch.mm(rows[chunk] * scale, columns.T, out=logits_buffer[:r])
        diagonal = logits.diagonal(pairs.first_row + chunk.start)
        matches = diagonal.clone()
        diagonal.fill_(-torch.inf)
        if pairs.ids is not None and masked_buffer is not None:
            masked = torch.eq(pairs.ids[labels][chunk, None], pairs.ids, out=masked_buffer[:r])
            logits.masked_fill_(masked, -torch.inf)
        return logits, matches

    positive = rows.new_empty(b, dtype=torch.float64)
    row_rest = torch.empty_like(positive)
    column_sums = rows.new_zeros(pairs.terms, dtype=torch.float64)
    for chunk in chunks():
        logits, positive[chunk] = logits_without_matches(chunk)
        weights = weights_buffer[: len(logits)]
        peak = logits.amax(1).clamp_(min=lowest)
        torch.sub(logits, peak[:, None], out=weights).exp_()
        row_rest[chunk] = weights.sum(1).double().log() + peak
        peak = logits[:, window].amax(0).clamp_(min=lowest)
        torch.sub(logits[:, window], peak, out=weights[:, window]).exp_()
        column_sums += weights[:, window].sum(0) * peak.double().exp()
    coupled = _couple(pairs, _Normalisers(positive, row_rest, column_sums))

    image_grad = rows.new_empty(rows.shape if wants_image else 0)
    text_grad = rows.new_zeros(columns.shape if wants_text else 0)
    if not (wants_image or wants_text):
        return coupled, _Gradients(image_grad, text_grad, rows.new_empty(0))
    row_lse, column_lse, one_minus_p = (x.to(dtype) for x in (coupled.row_lse, coupled.column_lse, coupled.one_minus_p))
    scale_grad = rows.new_zeros((), dtype=torch.float64)
    logits_are_kept = chunk_rows == b
    for chunk in chunks():
        logits = logits_buffer if logits_are_kept else logits_without_matches(chunk)[0]
        weights = torch.sub(logits, row_lse[chunk, None], out=weights_buffer[: len(logits)]).exp_()
        weights[:, window] += logits[:, window].sub_(column_lse).exp_()
        if wants_text:
            text_grad.addmm_(weights.T, rows[chunk])
        if wants_image:
            grad = torch.mm(weights, columns, out=image_grad[chunk])
            grad.addcmul_(one_minus_p[chunk, None], columns[labels][chunk], value=-1)
            scale_grad += (grad.double() * rows[chunk]).sum()
    if wants_text:
        text_grad[labels].addcmul_(one_minus_p[:, None], rows, value=-1)
    factor = scale * coupled.factor
    scale_grad = (scale_grad * coupled.factor).to(dtype) if wants_image else rows.new_empty(0)
    return coupled, _Gradients(image_grad.mul_(factor), text_grad.mul_(factor), scale_grad)


def _tiled(
    pairs: Pairs, store: bool, chunk_mib: int | None, wants_image: bool, wants_text: bool
) -> tuple[_Coupled, _Gradients]:
    """Evaluate the loss by the kernels of `contrastive_tiles`, in log2 units, on float16 copies of the embeddings."""
    wants_any = wants_image or wants_text
    b, B, labels = pairs.image.shape[0], pairs.text.shape[0], pairs.labels
    image, text = operand(pairs.image), operand(pairs.text)
    own_image, own_text = pairs.image.contiguous(), pairs.text[labels].contiguous()
    scale = pairs.logit_scale.float()
    ids = None if pairs.ids is None else dense_ids(pairs.ids)
    sums = sum_exponentials(image, text, scale, ids, pairs.first_row, store=store and wants_any)
    positive = matching_cosines(own_image, own_text).double() * scale.double()
    coupled = _couple(pairs, _Normalisers(positive, sums.rows.log(), sums.columns[pairs.window]))
    image_grad, text_grad, scale_grad = (pairs.image.new_empty(0, dtype=torch.float32) for _ in range(3))
    if not wants_any:
        return coupled, _Gradients(image_grad, text_grad, scale_grad)

    row_lse = (coupled.row_lse / math.log(2)).float()
    column_lse = image.new_full((B,), torch.inf, dtype=torch.float32)  # no weight where no image has that column
    column_lse[pairs.window] = coupled.column_lse / math.log(2)
    one_minus_p, factor = coupled.one_minus_p.float(), (scale * coupled.factor).float()
    if sums.stored is not None:
        # Beyond this range a weight that counts could have been rounded to zero: nan is loud, a wrong number is not.
        gap = sums.stored.tops.amax() - column_lse.amin()
        factor = torch.where(gap > STORED_RANGE, torch.nan, factor)
    if wants_text:
        text_grad = image.new_zeros(B, image.shape[1], dtype=torch.float32)

    if sums.stored is not None and not wants_text:
        parts = multiply_stored(sums.stored, text, row_lse, column_lse)
        image_grad, dots = finish_gradient(parts, own_image, own_text, one_minus_p, factor)
        return coupled, _Gradients(image_grad, text_grad, dots.double().sum().float() / scale)

    if sums.stored is not None:
        weights = weigh_stored(sums.stored, B, row_lse, column_lse)
    else:
        weights = image.new_empty(min(b, rows_per_chunk(chunk_mib, 2 * B, image.device)), -(-B // 8) * 8)
    dots = row_lse.new_zeros(b)
    image_grad = row_lse.new_empty(image.shape if wants_image else 0)
    text_part = torch.empty_like(text_grad)
    for start in range(0, b, len(weights)):
        chunk = slice(start, min(start + len(weights), b))
        n = chunk.stop - start
        if sums.stored is None:
            write_weights(
                image[chunk], text, scale, ids, pairs.first_row + start, row_lse[chunk], column_lse, weights[:n]
            )
        if wants_text:
            text_grad += product(weights[:n, :B].T, image[chunk], out=text_part)
        if wants_image:
            part = product(weights[:n, :B], text, out=image_grad[chunk])
            image_grad[chunk], dots[chunk] = finish_gradient(
                part[None], own_image[chunk], own_text[chunk], one_minus_p[chunk], factor
            )
    if wants_text:
        text_grad /= WEIGHT_UNIT
        text_grad[labels].addcmul_(one_minus_p[:, None], pairs.image, value=-1)
        text_grad *= factor
    if wants_image:
        scale_grad = dots.double().sum().float() / scale
    return coupled, _Gradients(image_grad, text_grad, scale_grad)


@torch.library.custom_op("textlock::contrastive", mutates_args=())
def _contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None,
    first_row: int,
    group_name: str | None,
    bank: int,
    mode: str,
    chunk_mib: int | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and its gradients for image, text and logit_scale, [0] where not wanted; the last comes with the first."""
    pairs = pairs_of_operator(image, text, logit_scale, ids, first_row, group_name, bank)
    check_layout(pairs)
    wants_image, wants_text, _ = wants
    if mode == "auto":
        mode = _choose_mode(pairs)
    if mode == "chunked":
        coupled, gradients = _chunked(pairs, chunk_mib, wants_image, wants_text)
    else:
        with torch.cuda.device_of(image):  # Triton launches on the current device
            coupled, gradients = _tiled(pairs, mode == "store", chunk_mib, wants_image, wants_text)
    return coupled.loss.to(pairs.dtype), gradients.image, gradients.text, gradients.scale


register_ready_gradients(_contrastive, places=(0, 1, 2))  # image, text, logit_scale


def _choose_mode(pairs: Pairs) -> str:
    """Return the mode that `auto` stands for; see `contrastive_loss`."""
    image = pairs.image
    if not image.is_cuda or why_not_tiles(image, pairs.text) is not None:
        return "chunked"
    free = torch.cuda.get_device_properties(image.device).total_memory - torch.cuda.memory_allocated(image.device)
    return "store" if 2 * image.shape[0] * pairs.text.shape[0] <= free / 2 else "recompute"


def _all_reduce(values: Tensor, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(values, group=group)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    bank: int = 0,
    mode: Mode = "auto",
    chunk_mib: int | None = None,
    gradient_reduction: Reduction = "sum",
) -> Tensor:
    """Mean symmetric InfoNCE (CLIP, arXiv 2103.00020 section 2.3) of image against text embeddings, frozen or not.

    Args:
        image: [b, d] unit embeddings of this rank's images, float16, bfloat16, float32 or float64; takes the gradient.
        text: [B, d] unit embeddings of the texts of all ranks; its dtype may differ from that of `image`. Takes a
            gradient if it requires one (see `textlock.kernels.gather.gather_rows`).
        logit_scale: 0-dim tensor, or a number, which is a constant; already exponentiated, from 1 to 690 and more
            (limit: top of this file). At or below 0 it is refused if it lies on the CPU; on a GPU, for which the host
            does not wait, `store` and `recompute` then give nan.
        first_row: the row of `text` that matches row 0 of `image`.
        ids: [B] int64; two texts with equal ids are one caption, and neither is a negative of the other's image.
        group: the process group whose ranks hold the other images, in any order and in parts of any size.
        bank: how many texts at the end belong to no image of any rank (texts of earlier batches: the embeddings of a
            frozen tower never go stale). They are negatives of the image->text half only.
        mode: the table at the top of this file. `store` and `recompute` run on GPUs of compute capability 9.0 and
            later, for d from 64 to 4,096 in steps of 8 and embeddings that are not float64, which they round to
            float16. `store` gives nan gradients where a column's normaliser lies 95 nats below a row's maximum, which
            takes a scale above 47 and, at a scale of 100, a cosine 0.95 above another image's best. `auto` is `store`
            where its exponentials take at most half of the memory that is free, else `recompute`, and `chunked` where
            the two cannot run. All but `reference` are differentiable once.
        chunk_mib: MiB of logits or weights alive in `chunked` and `recompute`, 1 or more (at least one row of B);
            None: 128 on a GPU, 32 on a CPU.
        gradient_reduction: how the ranks of `group` combine their gradients of weights and scale: "sum" if they are
            added up, "mean" if they are averaged, as DistributedDataParallel does; "mean" multiplies the gradients,
            not the loss, by the number of ranks, so that the average is the gradient of the loss.

    Returns:
        A 0-dim loss, float64 if an input is, else float32.
        With a group: the mean over the B - bank pairs of the global batch, equal on all ranks. The gradient of
        `image` is of that mean; those of `logit_scale` and `text` are this rank's share: their SUM over the ranks is
        exact ("mean": their mean).
        Without a group: the mean over the b pairs here. Each image has all B texts as candidates; each of the b
        matching texts has the b images here. The B - b other texts are negatives of the image->text half only.

    Autocast changes nothing; float32 products of `chunked` follow `torch.set_float32_matmul_precision`. Two runs give
    the same bits. `torch.compile(fullgraph=True)` works; all but `reference` are one opaque operator. Every rank must
    call with the same B, `bank`, `ids` and kind of call; the first call for each B and `bank` checks that the ranks'
    images make up the batch.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit, a mode that cannot run here, or ranks whose
            images do not make up the batch.
        TypeError: an argument that is no tensor or no number.
    """
    pairs = checked_pairs(image, text, logit_scale, first_row=first_row, ids=ids, group=group, bank=bank)
    tiled = ("store", "recompute")
    check_settings(pairs, mode, get_args(Mode), tiled, chunk_mib=chunk_mib, gradient_reduction=gradient_reduction)
    with torch.autocast(image.device.type, enabled=False):
        if mode == "reference":
            loss = reference(pairs)
        else:
            wants_image, wants_text, wants_scale = asked_for(image, text, pairs.logit_scale)
            wants = [wants_image or wants_scale, wants_text, wants_image or wants_scale]
            loss, *_ = _contrastive(
                image, text, pairs.logit_scale, ids, first_row, pairs.group_name, bank, mode, chunk_mib, wants
            )
    return for_reduction(loss, pairs, gradient_reduction)
