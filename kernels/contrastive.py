"""Symmetric InfoNCE of image rows against frozen text rows: exact at any batch size, no [b, B] tensor, one all-reduce.

Letters: b image rows here, B image and text rows in the global batch, d the width, s the logit scale; image row i
belongs to text row t_i = first_row + i. Rows are unit vectors, the text rows are constants.

    S_ij = s <I_i, T_j>       r_i = log Σ_j exp S_ij  (all texts)       c_j = log Σ_i exp S_ij  (all images)
    L = 1/B Σ_i [(r_i + c_{t_i}) / 2 - S_{i,t_i}]
    dL/dI_i = s / (2B) [Σ_{j≠t_i} (exp(S_ij - r_i) + exp(S_ij - c_j)) T_j - k_i T_{t_i}]
    k_i = σ(r'_i - S_{i,t_i}) + σ(c'_{t_i} - S_{i,t_i})         r', c' leave the matching pair out of the sum
    s dL/ds = Σ_i <I_i, dL/dI_i>                                (S is linear in s and in the image rows)

The matching pair never enters a sum of rounded numbers: 1 - P_ii comes from k_i and L from softplus(r'_i - S_{i,t_i}),
so both stay accurate when the model is nearly sure (P_ii -> 1) and a softmax minus one would cancel. (The column part
is a difference of float64 numbers: accurate down to a loss of about 1e-12.)

Row sums are local. Column sums are e^S in float64, without a running maximum, so that ranks combine them by one SUM
all-reduce of B float64 numbers; loss and statistics ride in the same message. No image row and no gradient is sent.
Text rows that belong to no image stand in the row sums alone: they have no c_j, and B in 1/B does not count them.
The price is a range: with unit rows every sum is finite and above zero while s < (1024 - log2 B) ln 2, which is 698 at
B = 65,536 (708 / max|<I_i, T_j>| for rows that are not unit). Beyond it the loss is inf or nan, never a wrong number.

Where the text tower is trained as well, the text rows take this rank's share of their gradient, from the same weights:

    dL/dT_j = s / (2B) [Σ_{i: t_i≠j} (exp(S_ij - r_i) + exp(S_ij - c_j)) I_i - k_j I_{i: t_i=j}]

Modes, by cost in passes of 2·b·B·d operations, and what they hold of the [b, B] logits:

| mode        | passes | holds                                 | arithmetic                                           |
| `store`     | 2      | all, as exponentials in 2 bytes       | products of float16 rows, float32 and float64 sums   |
| `recompute` | 3      | one chunk of weights in 2 bytes       | the same                                             |
| `chunked`   | 3      | one chunk of logits, twice, 4 bytes   | float32, or float64 (2 passes if one chunk is all)   |
| `reference` | 3      | all, several times                    | the same, by autograd                                |

The text tower's gradient is one pass more. Measure: `python -m textlock.bench.losses`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args, overload

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
from .gather import GatherProgress, group_of
from .pairs import (
    check_layout,
    check_rows,
    compute_dtype,
    dense_ids,
    register_ready_gradients,
    rows_per_chunk,
    why_not_tiles,
)
from .tiles import WEIGHT_UNIT, operand, product

Mode = Literal["auto", "reference", "chunked", "store", "recompute"]

STATS = ("image_to_text_top1", "text_to_image_top1", "mean_positive_logit", "masked_duplicates")


def reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    bank: int = 0,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """Dense, differentiable InfoNCE: the truth of the tests (in float64). Arguments as `contrastive_loss`.

    With a group every rank gathers the image rows of all ranks and holds all logits [B - bank, B]; only the rows of
    this rank carry gradient. Returns the loss (0-dim) and the values of `STATS` ([4], or [0] without `with_stats`).
    """
    b, B = image.shape[0], text.shape[0]
    dtype = compute_dtype(image, text)
    image, text, logit_scale = image.to(dtype), text.to(dtype), logit_scale.to(dtype)
    logits = logit_scale * (image @ text.T)  # [n, B], n = b without a group
    if group is not None:
        check_layout(group, first_row, b, B, image.device, bank=bank)
        everyone = image.new_zeros(B - bank, image.shape[1])
        everyone[first_row : first_row + b] = image.detach()
        dist.all_reduce(everyone, group=group)
        # The rows of other ranks are constants here, their shares of d text and d logit_scale included: each rank adds
        # its own.
        others = logit_scale.detach() * (everyone @ text.detach().T)
        logits = torch.cat([others[:first_row], logits, others[first_row + b :]])
        first_row = 0
    n = logits.shape[0]
    own = slice(first_row, first_row + n)  # the columns whose image takes part
    duplicates = torch.zeros((), dtype=torch.int64, device=image.device)
    if ids is not None:
        masked = ids[own, None] == ids  # [n, B]
        masked.diagonal(first_row).fill_(False)
        logits = logits.masked_fill(masked, -torch.inf)
        duplicates = masked.sum()
    labels = torch.arange(n, device=image.device)
    image_to_text = F.cross_entropy(logits, labels + first_row)
    text_to_image = F.cross_entropy(logits[:, own].T, labels)
    loss = (image_to_text + text_to_image) / 2
    if not with_stats:
        return loss, loss.new_empty(0, dtype=torch.float64)
    rest = logits.detach().clone()
    positive = rest.diagonal(first_row).clone()
    rest.diagonal(first_row).fill_(-torch.inf)
    row_hits, column_hits = positive > rest.amax(1), positive > rest[:, own].amax(0)
    means = torch.stack([row_hits.double().mean(), column_hits.double().mean(), positive.double().mean()])
    return loss, torch.cat([means, duplicates.double()[None]])


@dataclass(frozen=True)
class _Pairs:
    """The pairs of one call: image rows, text rows, and which of them belong together."""

    image: Tensor  # [b, d]
    text: Tensor  # [B, d]
    logit_scale: Tensor  # []
    ids: Tensor | None  # [B]
    first_row: int
    group: dist.ProcessGroup | None
    bank: int

    @property
    def labels(self) -> slice:
        """The text rows of the image rows."""
        return slice(self.first_row, self.first_row + self.image.shape[0])

    @property
    def window(self) -> slice:
        """The columns that have an image, and with it a text->image term: of all ranks, or of this call."""
        return self.labels if self.group is None else slice(0, self.text.shape[0] - self.bank)

    @property
    def own(self) -> slice:
        """The labels, counted inside the window."""
        return slice(self.labels.start - self.window.start, self.labels.stop - self.window.start)

    @property
    def terms(self) -> int:
        """How many pairs the mean is over."""
        return self.window.stop - self.window.start

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.image, self.text)


@dataclass(frozen=True)
class _Normalisers:
    """What pass 1 of the rows here leaves, the matching pair apart from the rest. Natural logarithms."""

    positive: Tensor  # [b] float64: S_{i,t_i}
    row_rest: Tensor  # [b] float64: r'_i
    column_sums: Tensor  # [terms] float64: Σ_i e^S of the images here
    row_peak: Tensor | None  # [b]: highest logit of a negative
    column_peak: Tensor | None  # [terms]


@dataclass(frozen=True)
class _Coupled:
    """What all ranks together know after the all-reduce."""

    loss: Tensor  # [] float64
    stats: Tensor  # [4] float64, or [0]
    row_lse: Tensor  # [b] float64: r_i
    column_lse: Tensor  # [terms] float64: c_j
    doubt: Tensor  # [b] float64: k_i


@dataclass(frozen=True)
class _Gradients:
    """Each empty where not asked for."""

    image: Tensor
    text: Tensor
    scale: Tensor


def _couple(pairs: _Pairs, here: _Normalisers) -> _Coupled:
    """Combine the ranks: one SUM all-reduce of the column sums, the loss and the statistics in the same message."""
    n, own, group = pairs.terms, pairs.own, pairs.group
    positive, row_rest = here.positive, here.row_rest
    message = positive.new_zeros(n + 4)
    column_sums, totals = message[:n], message[n:]
    column_sums.copy_(here.column_sums)
    column_sums[own] += positive.exp()
    totals[0] = (F.softplus(row_rest - positive) - positive).sum() / 2
    totals[1] = positive.sum()
    if here.row_peak is not None:
        totals[2] = (positive > here.row_peak).sum()
        totals[3] = _count_duplicates(pairs)
    _all_reduce(message, group)
    column_lse = column_sums.log()

    stats = positive.new_empty(0)
    if here.column_peak is not None:
        column_peak = here.column_peak.clone()
        _all_reduce(column_peak, group, dist.ReduceOp.MAX)
        column_hits = (positive > column_peak[own]).sum().double()
        _all_reduce(column_hits, group)
        stats = torch.stack([totals[2] / n, column_hits / n, totals[1] / n, totals[3]])

    column_rest = (column_sums[own] - positive.exp()).clamp_(min=0).log()  # c'_{t_i}
    return _Coupled(
        loss=(totals[0] + column_lse.sum() / 2) / n,
        stats=stats,
        row_lse=torch.logaddexp(row_rest, positive),
        column_lse=column_lse,
        doubt=torch.sigmoid(row_rest - positive) + torch.sigmoid(column_rest - positive),
    )


def _count_duplicates(pairs: _Pairs) -> Tensor | int:
    """Return how many texts share the caption of an image row here, over all image rows, the matching ones left out."""
    if pairs.ids is None:
        return 0
    ids, own = pairs.ids.sort().values, pairs.ids[pairs.labels]
    equal = torch.searchsorted(ids, own, right=True) - torch.searchsorted(ids, own)
    return equal.sum() - len(own)


def _chunked(
    pairs: _Pairs, chunk_mib: int | None, wants: tuple[bool, bool, bool], with_stats: bool
) -> tuple[_Coupled, _Gradients]:
    """Evaluate the loss over a chunk of image rows at a time: two buffers of [rows of a chunk, B] are all it holds."""
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
    row_rest, row_peak = torch.empty_like(positive), torch.empty_like(positive)
    column_sums = rows.new_zeros(pairs.terms, dtype=torch.float64)
    column_peak = rows.new_full((pairs.terms,), -torch.inf)
    for chunk in chunks():
        logits, positive[chunk] = logits_without_matches(chunk)
        weights = weights_buffer[: len(logits)]
        peak = logits.amax(1)
        row_peak[chunk] = peak
        peak.clamp_(min=lowest)
        torch.sub(logits, peak[:, None], out=weights).exp_()
        row_rest[chunk] = weights.sum(1).double().log() + peak
        peak = logits[:, window].amax(0)
        torch.maximum(column_peak, peak, out=column_peak)
        peak.clamp_(min=lowest)
        torch.sub(logits[:, window], peak, out=weights[:, window]).exp_()
        column_sums += weights[:, window].sum(0) * peak.double().exp()
    peaks = (row_peak, column_peak) if with_stats else (None, None)
    coupled = _couple(pairs, _Normalisers(positive, row_rest, column_sums, *peaks))

    wants_image, wants_text, wants_scale = wants
    image_grad = rows.new_empty(rows.shape if wants_image or wants_scale else 0)
    text_grad = rows.new_zeros(columns.shape if wants_text else 0)
    if not any(wants):
        return coupled, _Gradients(image_grad, text_grad, rows.new_empty(0))
    row_lse, column_lse, doubt = (x.to(dtype) for x in (coupled.row_lse, coupled.column_lse, coupled.doubt))
    scale_grad = rows.new_zeros((), dtype=torch.float64)
    logits_are_kept = chunk_rows == b
    for chunk in chunks():
        logits = logits_buffer if logits_are_kept else logits_without_matches(chunk)[0]
        weights = torch.sub(logits, row_lse[chunk, None], out=weights_buffer[: len(logits)]).exp_()
        weights[:, window] += logits[:, window].sub_(column_lse).exp_()
        if wants_text:
            text_grad.addmm_(weights.T, rows[chunk])
        if wants_image or wants_scale:
            grad = torch.mm(weights, columns, out=image_grad[chunk])
            grad.addcmul_(doubt[chunk, None], columns[labels][chunk], value=-1)
            scale_grad += (grad.double() * rows[chunk]).sum()
    if wants_text:
        text_grad[labels].addcmul_(doubt[:, None], rows, value=-1)
    factor = scale / (2 * pairs.terms)
    gradients = _Gradients(image_grad.mul_(factor), text_grad.mul_(factor), (scale_grad / (2 * pairs.terms)).to(dtype))
    return coupled, gradients


def _tiled(
    pairs: _Pairs,
    store: bool,
    chunk_mib: int | None,
    wants: tuple[bool, bool, bool],
    with_stats: bool,
    progress: GatherProgress | None,
) -> tuple[_Coupled, _Gradients]:
    """Evaluate the loss by the kernels of `contrastive_tiles`, in log2 units, on float16 copies of the rows."""
    wants_image, wants_text, wants_scale = wants
    b, B = pairs.image.shape[0], pairs.text.shape[0]
    image, text = operand(pairs.image), operand(pairs.text)
    own_image, own_text = pairs.image.contiguous(), pairs.text[pairs.labels].contiguous()
    scale = pairs.logit_scale.float()
    ids = None if pairs.ids is None else dense_ids(pairs.ids)
    sums = sum_exponentials(
        image,
        text,
        scale,
        ids,
        pairs.first_row,
        store=store and any(wants),
        peaks=with_stats,
        progress=progress,
    )
    here = _Normalisers(
        positive=matching_cosines(own_image, own_text).double() * scale.double(),
        row_rest=sums.rows.log(),
        column_sums=sums.columns[pairs.window],
        row_peak=None if sums.row_peaks is None else sums.row_peaks.double() * scale.double(),
        column_peak=None if sums.column_peaks is None else sums.column_peaks[pairs.window].double() * scale.double(),
    )
    coupled = _couple(pairs, here)
    image_grad, text_grad, scale_grad = (pairs.image.new_empty(0, dtype=torch.float32) for _ in range(3))
    if not any(wants):
        return coupled, _Gradients(image_grad, text_grad, scale_grad)

    row_lse = (coupled.row_lse / math.log(2)).float()
    column_lse = image.new_full((B,), torch.inf, dtype=torch.float32)  # no weight where no image has that column
    column_lse[pairs.window] = coupled.column_lse / math.log(2)
    doubt, factor = coupled.doubt.float(), scale / (2 * pairs.terms)
    if sums.stored is not None:
        # Beyond this range a weight that counts could have been rounded to zero: nan is loud, a wrong number is not.
        gap = sums.stored.tops.amax() - column_lse.amin()
        factor = torch.where(gap > STORED_RANGE, torch.nan, factor)
    if wants_text:
        text_grad = image.new_zeros(B, image.shape[1], dtype=torch.float32)

    if sums.stored is not None and not wants_text:
        parts = multiply_stored(sums.stored, text, row_lse, column_lse)
        image_grad, dots = finish_gradient(parts, own_image, own_text, doubt, factor)
        return coupled, _Gradients(image_grad, text_grad, dots.double().sum().float() / scale)

    if sums.stored is not None:
        weights = weigh_stored(sums.stored, B, row_lse, column_lse)
    else:
        weights = image.new_empty(min(b, rows_per_chunk(chunk_mib, 2 * B, image.device)), -(-B // 8) * 8)
    dots = row_lse.new_zeros(b)
    image_grad = row_lse.new_empty(image.shape if wants_image or wants_scale else 0)
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
        if wants_image or wants_scale:
            part = product(weights[:n, :B], text, out=image_grad[chunk])
            image_grad[chunk], dots[chunk] = finish_gradient(
                part[None], own_image[chunk], own_text[chunk], doubt[chunk], factor
            )
    if wants_text:
        text_grad /= WEIGHT_UNIT
        text_grad[pairs.labels].addcmul_(doubt[:, None], pairs.image, value=-1)
        text_grad *= factor
    return coupled, _Gradients(image_grad, text_grad, dots.double().sum().float() / scale)


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
    with_stats: bool,
    flags: Tensor | None,
    arriving: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, and its gradients for image, text and logit_scale; empty where not asked for."""
    group = None
    if group_name is not None:
        group = group_of(group_name)
        check_layout(group, first_row, image.shape[0], text.shape[0], image.device, bank=bank)
    pairs = _Pairs(image, text, logit_scale, ids, first_row, group, bank)
    wants_image, wants_text, wants_scale = wants
    asked = (wants_image, wants_text, wants_scale)
    if mode == "auto":
        mode = _choose_mode(pairs)
    if mode == "chunked":
        coupled, gradients = _chunked(pairs, chunk_mib, asked, with_stats)
    else:
        progress = None if flags is None else GatherProgress(flags, *arriving)
        with torch.cuda.device_of(image):  # Triton launches on the current device
            coupled, gradients = _tiled(pairs, mode == "store", chunk_mib, asked, with_stats, progress)
    loss = coupled.loss.to(pairs.dtype)
    return loss, coupled.stats, gradients.image, gradients.text, gradients.scale


@_contrastive.register_fake
def _(
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
    with_stats: bool,
    flags: Tensor | None,
    arriving: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(image, text)
    wants_image, wants_text, wants_scale = wants
    return (
        image.new_empty((), dtype=dtype),
        image.new_empty(len(STATS) if with_stats else 0, dtype=torch.float64),
        image.new_empty(image.shape if wants_image or wants_scale else (0,), dtype=dtype),
        image.new_empty(text.shape if wants_text else (0,), dtype=dtype),
        image.new_empty(() if any(wants) else (0,), dtype=dtype),
    )


register_ready_gradients(_contrastive, places=(0, 1, 2))  # image, text, logit_scale


def _choose_mode(pairs: _Pairs) -> str:
    """Return the mode that `auto` stands for; see `contrastive_loss`."""
    image = pairs.image
    if not image.is_cuda or why_not_tiles(image, pairs.text) is not None:
        return "chunked"
    free = torch.cuda.get_device_properties(image.device).total_memory - torch.cuda.memory_allocated(image.device)
    return "store" if 2 * image.shape[0] * pairs.text.shape[0] <= free / 2 else "recompute"


def _all_reduce(
    values: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> None:
    if group is not None:
        dist.all_reduce(values, op, group=group)


@overload
def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    bank: int = 0,
    mode: Mode = "auto",
    return_stats: Literal[False] = False,
    chunk_mib: int | None = None,
    progress: GatherProgress | None = None,
) -> Tensor: ...


@overload
def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    bank: int = 0,
    mode: Mode = "auto",
    return_stats: Literal[True],
    chunk_mib: int | None = None,
    progress: GatherProgress | None = None,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    bank: int = 0,
    mode: Mode = "auto",
    return_stats: bool = False,
    chunk_mib: int | None = None,
    progress: GatherProgress | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Mean symmetric InfoNCE (CLIP, arXiv 2103.00020 section 2.3) of image rows against text rows, frozen or not.

    Args:
        image: [b, d] unit rows of this rank, float16, bfloat16, float32 or float64; takes the gradient.
        text: [B, d] unit rows of all ranks; its dtype may differ from that of `image`. Takes a gradient if it requires
            one (see `textlock.kernels.gather.gather_rows`).
        logit_scale: 0-dim tensor, already exponentiated, any value from 1 to 690 and more (limit: top of this file).
        first_row: the text row that matches image row 0.
        ids: [B] int64; two text rows with equal ids are one caption, and neither is a negative of the other's image.
        group: the process group whose ranks hold the other image rows, in any order and in parts of any size.
        bank: how many text rows at the end belong to no image of any rank (rows of earlier batches: those of a frozen
            tower never go stale). They are negatives of the image->text half only.
        mode: the table at the top of this file. `store` and `recompute` run on GPUs of compute capability 9.0 and
            later, for d from 64 to 4,096 in steps of 8 and rows that are not float64, which they round to float16.
            `store` gives nan gradients where a column's normaliser lies 95 nats below a row's maximum, which takes a
            scale above 47 and, at a scale of 100, a cosine 0.95 above another image's best. `auto` is `store` where
            its exponentials take at most half of the memory that is free, else `recompute`, and `chunked` where the
            two cannot run. All but `reference` are differentiable once.
        return_stats: also return a dict of detached float64 0-dim tensors over the same rows as the loss, the same on
            all ranks: `image_to_text_top1` and `text_to_image_top1` (a tie is a miss), `mean_positive_logit`,
            `masked_duplicates` (pairs). With a group this costs two more small all-reduces.
        chunk_mib: MiB of logits or weights alive in `chunked` and `recompute` (at least one row of B); None: 128 on a
            GPU, 32 on a CPU.
        progress: of the gather that is still filling `text` (`GatherHandle.arriving`), for `store` and `recompute`:
            the first pass starts with this rank's own rows and waits for each block of the others as it needs it.
            Rows behind those of the gather are there from the start.

    Returns:
        A 0-dim loss, float64 if an input is, else float32.
        With a group: the mean over the B - bank pairs of the global batch, equal on all ranks. The gradient of
        `image` is of that mean; those of `logit_scale` and `text` are this rank's share: SUM (not mean) over ranks is
        exact.
        Without a group: the mean over the b pairs here. Each image has all B texts as candidates; each of the b
        matching texts has the b images here. The B - b other texts are negatives of the image->text half only.

    Autocast changes nothing; float32 products of `chunked` follow `torch.set_float32_matmul_precision`. Two runs give
    the same bits. `torch.compile(fullgraph=True)` works; all but `reference` are one opaque operator. Every rank must
    call with the same B, `bank`, `ids` and kind of call; the first call for each B and `bank` checks that the ranks'
    rows make up the batch.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a mode that cannot run here, or ranks whose rows do not
            make up the batch.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(get_args(Mode))}")
    check_rows(image, text, first_row, ids, {"logit_scale": logit_scale}, bank=bank)
    if mode in ("store", "recompute") and (refused := why_not_tiles(image, text)) is not None:
        raise ValueError(f"mode {mode!r} cannot take {refused}; use mode='chunked' or 'auto'")
    if progress is not None and mode not in ("store", "recompute"):
        raise ValueError(f"mode {mode!r} cannot wait for text rows block by block; pass the rows of GatherHandle.wait")
    with torch.autocast(image.device.type, enabled=False):
        if mode == "reference":
            loss, stats = reference(
                image, text, logit_scale, first_row=first_row, ids=ids, group=group, bank=bank, with_stats=return_stats
            )
        else:
            graph = torch.is_grad_enabled()
            loss, stats, *_ = _contrastive(
                image,
                text,
                logit_scale,
                ids,
                first_row,
                None if group is None else group.group_name,
                bank,
                mode,
                chunk_mib,
                [graph and x.requires_grad for x in (image, text, logit_scale)],
                return_stats,
                None if progress is None else progress.flags,
                [] if progress is None else [progress.step, progress.rows_per_rank, progress.rows_per_block],
            )
    if return_stats:
        return loss, dict(zip(STATS, stats.unbind(), strict=True))
    return loss
