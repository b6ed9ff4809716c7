"""Softmax cross-entropy of every image against all texts: the image->text half of the contrastive loss, alone.

Letters: b images here, B texts, d the width, s the logit scale, n images in the global batch; image i belongs to text
t_i = first_row + i. Embeddings are unit vectors, those of texts are constants.

    S_ij = s <I_i, T_j>       r_i = log Σ_j exp S_ij
    L = 1/n Σ_i [r_i - S_{i,t_i}]
    dL/dI_i = s/n [Σ_{j≠t_i} exp(S_ij - r_i) T_j - k_i T_{t_i}]       k_i = 1 - P_ii = σ(r'_i - S_{i,t_i})
    s dL/ds = Σ_i <I_i, dL/dI_i>                                      (S is linear in s and in the image embeddings)

Nothing couples two images, as the column normalisers of the symmetric loss do. So any part of the batch has its exact
share of the loss and its exact gradient after one visit, and no message is sent: a micro-batch may go backward at once.

As in the symmetric loss the matching pair never enters a sum of rounded numbers: r'_i leaves it out, k_i is computed
from it, and L is softplus(r'_i - S_{i,t_i}), so all stay accurate when the model is nearly sure (P_ii -> 1).

`chunked` holds one chunk of logits, which become exponentials in place; its gradient is their product with the texts,
each row of it scaled afterwards. `fused` is pass 1 of `contrastive_tiles` without columns, which keeps a chunk of
exponentials in 2 bytes, and its stored pass 2 with row factors. Weights are right to 2^-9 at any scale, and there is no
column normaliser that could leave its range; only row sums are bounded: beyond `LARGEST_SCALE` the loss is nan.

Cost in passes of 2·b·B·d operations: one to evaluate, two with the gradient, in all modes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .card import ODD_PAIRS, ONE_OF_16_RANKS, Card, Data, Inputs, PairSizes, Pass, draw_pairs, listed
from .contrastive_tiles import (
    finish_gradient,
    matching_cosines,
    multiply_stored,
    sum_exponentials,
    sums_kernel,
    sums_reference,
)
from .device import HOPPER
from .pairs import (
    Pairs,
    asked_for,
    check_settings,
    checked_pairs,
    dense_ids,
    pairs_of_operator,
    register_ready_gradients,
    rows_per_chunk,
    why_not_tiles,
)
from .tiles import WEIGHT_UNIT, operand

Mode = Literal["auto", "reference", "chunked", "fused"]

# Images [r, d], their texts [r, d] and the row of the first of these -> the sum of their losses, float64 []; if a
# gradient is wanted also n/s dL/dI [r, d] and its dot products with the images [r].
Visitor = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None, Tensor | None]]

ROWS_PER_TILE = 128  # of `fused`, in both passes
LARGEST_SCALE = 690.0  # of `fused`: e^S of unit rows, summed in float64, neither vanishes nor overflows


def reference(pairs: Pairs, batch: int) -> Tensor:
    """Dense, differentiable loss: the truth of the tests (in float64). Arguments as `image_to_text_loss`."""
    dtype, ids = pairs.dtype, pairs.ids
    logits = pairs.logit_scale.to(dtype) * (pairs.image.to(dtype) @ pairs.text.to(dtype).T)  # [b, B]
    if ids is not None:
        masked = ids[pairs.labels, None] == ids  # [b, B]
        masked.diagonal(pairs.first_row).fill_(False)
        logits = logits.masked_fill(masked, -torch.inf)
    labels = torch.arange(pairs.labels.start, pairs.labels.stop, device=logits.device)
    return F.cross_entropy(logits, labels, reduction="sum") / batch


def dense_visitor(texts: Tensor, scale: Tensor, ids: Tensor | None, rows_per_chunk: int, with_grad: bool) -> Visitor:
    """Return the visitor of `chunked`, in plain torch, for texts [B, d] in the dtype of its products."""
    lowest = torch.finfo(texts.dtype).min  # stands for -inf where every logit is masked: -inf - lowest is still -inf
    logits_buffer = texts.new_empty(rows_per_chunk, texts.shape[0])
    masked_buffer = None if ids is None else torch.empty_like(logits_buffer, dtype=torch.bool)

    def visit(image: Tensor, matches: Tensor, first_row: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        r = image.shape[0]
        rows, matches = image.to(texts.dtype), matches.to(texts.dtype)
        logits = torch.mm(rows * scale, texts.T, out=logits_buffer[:r])
        logits.diagonal(first_row).fill_(-torch.inf)
        if ids is not None and masked_buffer is not None:
            masked = torch.eq(ids[first_row : first_row + r, None], ids, out=masked_buffer[:r])
            logits.masked_fill_(masked, -torch.inf)
        peak = logits.amax(1).clamp_(min=lowest)
        exponentials = logits.sub_(peak[:, None]).exp_()
        rest = exponentials.sum(1).double().log() + peak
        positive = scale.double() * (rows * matches).sum(1, dtype=torch.float64)
        loss = F.softplus(rest - positive).sum()
        if not with_grad:
            return loss, None, None
        by_row = torch.exp(peak - torch.logaddexp(rest, positive)).to(texts.dtype)
        one_minus_p = torch.sigmoid(rest - positive).to(texts.dtype)
        gradient = torch.mm(exponentials, texts).mul_(by_row[:, None]).addcmul_(one_minus_p[:, None], matches, value=-1)
        return loss, gradient, (gradient * rows).sum(1, dtype=torch.float64)

    return visit


def tile_visitor(texts: Tensor, scale: Tensor, ids: Tensor | None, with_grad: bool) -> Visitor:
    """Return the visitor of `fused` for texts [B, d] in float16 and int32 ids."""
    in_range = scale <= LARGEST_SCALE
    one = torch.ones_like(scale)

    def visit(image: Tensor, matches: Tensor, first_row: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, matches = image.contiguous(), matches.contiguous()
        sums = sum_exponentials(operand(rows), texts, scale, ids, first_row, store=with_grad, with_columns=False)
        rest = sums.rows.where(in_range, torch.nan).log()
        positive = scale.double() * matching_cosines(rows, matches).double()
        loss = F.softplus(rest - positive).sum()
        if sums.stored is None:
            return loss, None, None
        log2_lse = (torch.logaddexp(rest, positive) / math.log(2)).float()
        parts = multiply_stored(sums.stored, texts, log2_lse, None)
        gradient, dots = finish_gradient(parts, rows, matches, torch.sigmoid(rest - positive).float(), one)
        return loss, gradient, dots

    return visit


def even_chunk(b: int, limit: int, step: int) -> int:
    """Return the rows of a chunk, a multiple of `step`, where as few as `limit` allows share b rows evenly.

    A short last chunk would leave most of a GPU idle. One step is the least, whatever the limit.
    """
    limit = max(limit // step, 1) * step
    chunks = -(-b // limit)
    return -(-b // (chunks * step)) * step


@torch.library.custom_op("textlock::image_to_text", mutates_args=())
def _image_to_text(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None,
    first_row: int,
    batch: int,
    mode: str,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its gradients for image and logit_scale, both or neither wanted, [0] if not.

    Holds one chunk of [r, B], next to copies of the inputs in the width of its products: in `fused` of 2 bytes an
    element and only for the gradient, else in the compute dtype.
    """
    pairs = pairs_of_operator(image, text, logit_scale, ids, first_row)
    wants_gradients, _ = wants
    b, dtype = image.shape[0], pairs.dtype
    scale = logit_scale.to(dtype)
    fused = mode == "fused" or (mode == "auto" and image.is_cuda and why_not_tiles(image, text) is None)
    chunk_rows = _chunk_rows(pairs, fused)
    if fused:
        visit = tile_visitor(operand(text), scale, None if ids is None else dense_ids(ids), wants_gradients)
    else:
        visit = dense_visitor(text.to(dtype), scale, ids, chunk_rows, wants_gradients)

    loss, scale_grad = (image.new_zeros((), dtype=torch.float64) for _ in range(2))
    image_grad = image.new_empty(image.shape if wants_gradients else (0,), dtype=dtype)
    with torch.cuda.device_of(image):  # Triton launches on the current device
        for start in range(0, b, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, b))
            own = slice(first_row + chunk.start, first_row + chunk.stop)  # the text rows that match
            share, gradient, dots = visit(image[chunk], text[own], own.start)
            loss += share
            if gradient is not None and dots is not None:
                image_grad[chunk] = gradient
                scale_grad += dots.sum(dtype=torch.float64)
    if not wants_gradients:
        return (loss / batch).to(dtype), image_grad, torch.empty_like(image_grad)
    return (loss / batch).to(dtype), image_grad.mul_(scale / batch), (scale_grad / batch).to(dtype)


register_ready_gradients(_image_to_text, places=(0, 2))  # image, logit_scale


def _chunk_rows(pairs: Pairs, fused: bool) -> int:
    """Return how many images are worked on at a time."""
    b, B = pairs.image.shape[0], pairs.text.shape[0]
    row_bytes = B * (2 if fused else pairs.dtype.itemsize + (pairs.ids is not None))
    limit = rows_per_chunk(None, row_bytes, pairs.image.device)
    return min(even_chunk(b, limit, ROWS_PER_TILE if fused else 1), b)


def image_to_text_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    batch: int | None = None,
    mode: Mode = "auto",
) -> Tensor:
    """Share of some images in the mean over the global batch of every image's cross-entropy against all texts.

    Args:
        image: [b, d] unit embeddings, float16, bfloat16, float32 or float64, of any part of the batch, such as a
            micro-batch; takes the gradient.
        text: [B, d] unit embeddings of the texts of all ranks, and behind them any that belong to no image; its dtype
            may differ from that of `image`. float16 saves `fused` a copy in every call, float32 `chunked`.
        logit_scale: 0-dim tensor, or a number, which is a constant; already exponentiated. For `fused` at most 690,
            beyond it the loss is nan. At or below 0 it is refused if it lies on the CPU; on a GPU, for which the host
            does not wait, `fused` then gives nan.
        first_row: the row of `text` that matches row 0 of `image`.
        ids: [B] int64; two texts with equal ids are one caption, and neither is a negative of the other's image.
        batch: images of the global batch; None: those given are all. Where the ranks average their gradients, as
            DistributedDataParallel does, count the images of this rank instead.
        mode: `reference` is dense and twice differentiable. `chunked` and `fused` never hold a [b, B] tensor, have
            their gradients ready when the forward ends and are differentiable once. `fused` rounds embeddings to
            float16 and runs on GPUs from compute capability 9.0, for d from 64 to 4,096 in steps of 8; `chunked`
            anywhere, in float32. `auto` is `fused` on such a GPU where neither input is float64, else `chunked`.

    Returns:
        A 0-dim loss, float64 if an input is, else float32: the sum over the images given, divided by `batch`. Summed
        over micro-batches and ranks it is the mean of the batch, and so are the gradients of `logit_scale`. That of
        `image` is complete.

    Autocast changes nothing; float32 products of `chunked` follow `torch.set_float32_matmul_precision`. Two runs give
    the same bits, and the host never waits for the device. `torch.compile(fullgraph=True)` works; `chunked` and
    `fused` are one opaque operator. At most 128 MiB of logits or exponentials are alive on a GPU, 32 MiB on a CPU (at
    least one row of B in `chunked`, 128 in `fused`).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, texts that require a gradient, or `fused` where it
            cannot run.
        TypeError: an argument that is no tensor or no number.
    """
    pairs = checked_pairs(image, text, logit_scale, first_row=first_row, ids=ids)
    if text.requires_grad:
        raise ValueError("text requires a gradient, but text rows are constants of this loss; pass text.detach()")
    b, B = image.shape[0], text.shape[0]
    if batch is None:
        batch = b
    if not b <= batch <= B:
        raise ValueError(f"batch is {batch}, but there are {b} image and {B} text rows; pass the images of all ranks")
    check_settings(pairs, mode, get_args(Mode), ("fused",))
    with torch.autocast(image.device.type, enabled=False):
        if mode == "reference":
            return reference(pairs, batch)
        wants = [any(asked_for(image, pairs.logit_scale))] * 2
        loss, *_ = _image_to_text(image, text, pairs.logit_scale, ids, first_row, batch, mode, wants)
        return loss


class Visit(NamedTuple):
    """One visit of some images, as the card compares it."""

    loss: Tensor  # [] float64: the sum of the images' losses
    gradient: Tensor | None  # [b, d] float32: n/s dL/dI
    dots: Tensor | None  # [b] float32: its dot products with the images


def _visit_reference(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, first_row: int, with_grad: bool
) -> Visit:
    """Compute a visit in plain torch, dense, from exponentials and weights that are rounded as the kernels round."""
    wide = torch.promote_types(image.dtype, torch.float32)
    rows, matches = image.to(wide), text[first_row : first_row + len(image)].to(wide)
    sums = sums_reference(image, text, scale, ids, first_row, with_grad)
    rest, positive = sums.rows.log(), scale * (rows * matches).sum(1)
    loss = F.softplus(rest - positive).sum()
    if sums.exponentials is None:
        return Visit(loss, None, None)
    weights = sums.exponentials * torch.logaddexp(rest, positive).neg().exp()[:, None]
    gradient = (weights * WEIGHT_UNIT).to(text.dtype).to(wide) @ text.to(wide) / WEIGHT_UNIT
    gradient -= torch.sigmoid(rest - positive).to(wide)[:, None] * matches
    return Visit(loss, gradient, (gradient * rows).sum(1))


def _launch_visit(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, first_row: int, with_grad: bool
) -> Visit:
    visit = tile_visitor(text, scale, ids, with_grad)
    return Visit(*visit(image, text[first_row : first_row + len(image)], first_row))


@dataclass(frozen=True, kw_only=True)
class _Sizes(PairSizes):
    gradient: bool = True


def _inputs(sizes: _Sizes, data: Data) -> Inputs:
    return draw_pairs(sizes, data) | {"with_grad": sizes.gradient}


_VISIT = Pass[_Sizes](
    "image_to_text",
    sums_kernel,
    _launch_visit,
    _visit_reference,
    _inputs,
    traffic=lambda s: s.embedding_bytes + 2 * s.gradient * s.images * s.texts,
    operations=lambda s: s.product,
    programs="grid",
)
_ODD = {name: _Sizes(**shape) for name, shape in ODD_PAIRS.items()}
CARDS = (
    Card(
        (_VISIT,),
        _Sizes,
        odd=_ODD | {f"{name}, loss alone": replace(sizes, gradient=False) for name, sizes in _ODD.items()},
        compiled={
            listed(ids=ids, store=gradient, rows_alone=True): _Sizes(**ONE_OF_16_RANKS, ids=ids, gradient=gradient)
            for ids in (False, True)
            for gradient in (False, True)
        },
        multiplies=True,
        least=HOPPER,
        empty=False,
    ),
)
