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
The price is a range: with unit rows every sum is finite and above zero while s < (1024 - log2 B) ln 2, which is 698 at
B = 65,536 (708 / max|<I_i, T_j>| for rows that are not unit). Beyond it the loss is inf or nan, never a wrong number.

Cost in passes of 2·b·B·d operations: `chunked` takes one to evaluate and two more for the gradient (one more where the
logits fit one chunk, which is then kept), bound by the matrix rate. Measure: `python -m textlock.bench.contrastive`.
"""

from collections.abc import Iterator
from typing import Literal, overload
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["auto", "reference", "chunked"]

STATS = ("image_to_text_top1", "text_to_image_top1", "mean_positive_logit", "masked_duplicates")


def reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """Dense, differentiable InfoNCE: the truth of the tests (in float64). Arguments as `contrastive_loss`.

    With a group every rank gathers the image rows of all ranks and holds the [B, B] logits; only the rows of this rank
    carry gradient. Returns the loss (0-dim) and the values of `STATS` ([4], or [0] without `with_stats`).
    """
    b, B = image.shape[0], text.shape[0]
    dtype = _compute_dtype(image, text)
    image, text, logit_scale = image.to(dtype), text.to(dtype), logit_scale.to(dtype)
    logits = logit_scale * (image @ text.T)  # [n, B], n = b without a group
    if group is not None:
        _check_layout(group, first_row, b, B, image.device)
        everyone = image.new_zeros(B, image.shape[1])
        everyone[first_row : first_row + b] = image.detach()
        dist.all_reduce(everyone, group=group)
        # The rows of other ranks are constants here, their share of d logit_scale included: each rank adds its own.
        others = logit_scale.detach() * (everyone @ text.T)
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


def chunked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    rows_per_chunk: int,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """Evaluate the loss over `rows_per_chunk` image rows at a time, the gradient in the same call if one is wanted.

    Two buffers of [rows_per_chunk, B] are all it holds next to float32 copies of narrower inputs. Returns as
    `reference`.
    """
    with_grad = torch.is_grad_enabled() and (image.requires_grad or logit_scale.requires_grad)
    group_name = None if group is None else group.group_name
    loss, stats, _, _ = _chunked(
        image, text, logit_scale, ids, first_row, group_name, rows_per_chunk, with_grad, with_stats
    )
    return loss, stats


@torch.library.custom_op("textlock::contrastive_chunked", mutates_args=())
def _chunked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None,
    first_row: int,
    group_name: str | None,
    rows_per_chunk: int,
    with_grad: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, d loss/d image, d loss/d logit_scale; the last three are empty where not asked for."""
    b, B = image.shape[0], text.shape[0]
    group = None
    if group_name is not None:
        group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]
        _check_layout(group, first_row, b, B, image.device)
    dtype = _compute_dtype(image, text)
    lowest = torch.finfo(dtype).min  # stands for -inf where every logit is masked: -inf - lowest is still -inf
    rows, columns = image.to(dtype), text.to(dtype)
    scaled_rows = rows * logit_scale.to(dtype)
    labels = slice(first_row, first_row + b)
    # The columns that have an image somewhere, and with it a text->image term: all of them, or those of this call.
    window = slice(0, B) if group is not None else labels
    own = slice(labels.start - window.start, labels.stop - window.start)  # the labels, counted inside the window
    n = window.stop - window.start

    rows_per_chunk = min(rows_per_chunk, b)
    logits_buffer = rows.new_empty(rows_per_chunk, B)
    weights_buffer = torch.empty_like(logits_buffer)
    masked_buffer = None if ids is None else torch.empty_like(logits_buffer, dtype=torch.bool)
    positive = rows.new_empty(b, dtype=torch.float64)  # S_{i,t_i}, with the very bits that the tile has
    row_rest = torch.empty_like(positive)  # r'_i
    row_hits = rows.new_empty(b, dtype=torch.bool)
    column_peak = rows.new_full((n,), -torch.inf)
    # One message: column sums [n], then this rank's part of the loss and of three statistics.
    message = rows.new_zeros(n + 4, dtype=torch.float64)
    column_sums, totals = message[:n], message[n:]

    def chunks() -> Iterator[slice]:
        for start in range(0, b, rows_per_chunk):
            yield slice(start, min(start + rows_per_chunk, b))

    def logits_without_matches(chunk: slice) -> tuple[Tensor, Tensor]:
        """Logits of a chunk [r, B] with matching pairs and duplicates at -inf, and the matching logits [r]."""
        r = chunk.stop - chunk.start
        logits = torch.mm(scaled_rows[chunk], columns.T, out=logits_buffer[:r])
        diagonal = logits.diagonal(first_row + chunk.start)
        matches = diagonal.clone()
        diagonal.fill_(-torch.inf)
        if ids is not None and masked_buffer is not None:
            masked = torch.eq(ids[labels][chunk, None], ids, out=masked_buffer[:r])
            logits.masked_fill_(masked, -torch.inf)
            if with_stats:
                totals[3] += masked.sum() - r
        return logits, matches

    for chunk in chunks():
        logits, matches = logits_without_matches(chunk)
        weights = weights_buffer[: len(logits)]
        positive[chunk] = matches
        peak = logits.amax(1)
        row_hits[chunk] = matches > peak
        peak.clamp_(min=lowest)
        torch.sub(logits, peak[:, None], out=weights).exp_()
        row_rest[chunk] = weights.sum(1).double().log() + peak
        peak = logits[:, window].amax(0)
        torch.maximum(column_peak, peak, out=column_peak)
        peak.clamp_(min=lowest)
        torch.sub(logits[:, window], peak, out=weights[:, window]).exp_()
        column_sums += weights[:, window].sum(0) * peak.double().exp()

    column_sums[own] += positive.exp()
    totals[0] = (F.softplus(row_rest - positive) - positive).sum() / 2
    totals[1] = row_hits.sum()
    totals[2] = positive.sum()
    _all_reduce(message, group)
    column_lse = column_sums.log()  # c_j [n]
    loss = ((totals[0] + column_lse.sum() / 2) / n).to(dtype)

    stats = rows.new_empty(0, dtype=torch.float64)
    if with_stats:
        _all_reduce(column_peak, group, dist.ReduceOp.MAX)
        column_hits = (positive > column_peak[own]).sum().double()
        _all_reduce(column_hits, group)
        stats = torch.stack([totals[1] / n, column_hits / n, totals[2] / n, totals[3]])
    if not with_grad:
        return loss, stats, rows.new_empty(0), rows.new_empty(0)

    column_rest = (column_sums[own] - positive.exp()).clamp_(min=0).log()  # c'_{t_i}
    doubt = torch.sigmoid(row_rest - positive) + torch.sigmoid(column_rest - positive)  # k_i
    row_lse = torch.logaddexp(row_rest, positive).to(dtype)
    column_lse, doubt = column_lse.to(dtype), doubt.to(dtype)
    image_grad = torch.empty_like(rows)
    scale_grad = rows.new_zeros((), dtype=torch.float64)
    logits_are_kept = rows_per_chunk == b
    for chunk in chunks():
        logits = logits_buffer if logits_are_kept else logits_without_matches(chunk)[0]
        weights = torch.sub(logits, row_lse[chunk, None], out=weights_buffer[: len(logits)]).exp_()
        weights[:, window] += logits[:, window].sub_(column_lse).exp_()
        grad = torch.mm(weights, columns, out=image_grad[chunk])
        grad.addcmul_(doubt[chunk, None], columns[labels][chunk], value=-1)
        scale_grad += (grad.double() * rows[chunk]).sum()
    image_grad *= logit_scale.to(dtype) / (2 * n)
    return loss, stats, image_grad, (scale_grad / (2 * n)).to(dtype)


@_chunked.register_fake
def _(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None,
    first_row: int,
    group_name: str | None,
    rows_per_chunk: int,
    with_grad: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(image, text)
    return (
        image.new_empty((), dtype=dtype),
        image.new_empty(len(STATS) if with_stats else 0, dtype=torch.float64),
        image.new_empty(image.shape if with_grad else (0,), dtype=dtype),
        image.new_empty(() if with_grad else (0,), dtype=dtype),
    )


def _save_gradients(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    image, _, logit_scale, *_ = inputs
    _, stats, image_grad, scale_grad = output
    ctx.mark_non_differentiable(stats, image_grad, scale_grad)
    ctx.save_for_backward(image_grad, scale_grad)
    ctx.dtypes = image.dtype, logit_scale.dtype


def _scale_gradients(ctx, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():  # create_graph=True: these gradients are constants to autograd, not functions
        raise RuntimeError("this loss is differentiable once in its chunked mode; use mode='reference' for more")
    image_grad, scale_grad = ctx.saved_tensors
    image_dtype, scale_dtype = ctx.dtypes
    wants_image, _, wants_scale, *rest = ctx.needs_input_grad
    return (
        (loss_grad * image_grad).to(image_dtype) if wants_image else None,
        None,
        (loss_grad * scale_grad).to(scale_dtype) if wants_scale else None,
        *(None for _ in rest),
    )


_chunked.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _compute_dtype(image: Tensor, text: Tensor) -> torch.dtype:
    """float64 if either input is, else float32: half-width rows are data, not an arithmetic."""
    return torch.float64 if torch.float64 in (image.dtype, text.dtype) else torch.float32


def _all_reduce(
    values: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> None:
    if group is not None:
        dist.all_reduce(values, op, group=group)


# The batch sizes whose layout a group has agreed on. Asking costs a collective and a wait of the host for the device,
# so it is asked once per batch size, which all ranks have in common.
_AGREED: WeakKeyDictionary[dist.ProcessGroup, set[int]] = WeakKeyDictionary()


def _check_layout(group: dist.ProcessGroup, first_row: int, b: int, B: int, device: torch.device) -> None:
    agreed = _AGREED.setdefault(group, set())
    if B in agreed:
        return
    mine = torch.tensor([first_row, first_row + b, B], device=device)
    everyone = mine.new_empty(group.size() * 3)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    layout = sorted(everyone.view(-1, 3).tolist())
    end = 0
    for start, stop, total in layout:
        if start != end or total != B:
            break
        end = stop
    if end != B:
        rows = ", ".join(f"{start}:{stop} of {total}" for start, stop, total in layout)
        raise ValueError(
            f"the ranks of the group must hold every image row once and the same text rows, but they hold {rows}; "
            "pass the text rows of all ranks as text and this rank's offset into them as first_row"
        )
    agreed.add(B)


def _check_inputs(
    image: Tensor, text: Tensor, logit_scale: Tensor, first_row: int, ids: Tensor | None, mode: str
) -> None:
    if mode not in ("auto", "reference", "chunked"):
        raise ValueError(f"mode is {mode!r}; choose auto, reference or chunked")
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1] or 0 in image.shape:
        raise ValueError(
            f"image must be [b, d] and text [B, d] with one d and b > 0, not {list(image.shape)} and {list(text.shape)}"
        )
    if logit_scale.ndim != 0:
        raise ValueError(f"logit_scale must be a 0-dim tensor, not of shape {list(logit_scale.shape)}")
    for name, tensor in (("image", image), ("text", text), ("logit_scale", logit_scale)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
        if tensor.device != image.device:
            raise ValueError(f"{name} is on {tensor.device} but image on {image.device}; move them to one device")
    if text.requires_grad:
        raise ValueError("text requires a gradient, but the text rows are constants of this loss; pass text.detach()")
    b, B = image.shape[0], text.shape[0]
    if first_row < 0 or first_row + b > B:
        raise ValueError(f"image rows {first_row}:{first_row + b} must lie inside the {B} text rows; correct first_row")
    if ids is not None and (ids.shape != (B,) or ids.dtype != torch.int64 or ids.device != image.device):
        raise ValueError(
            f"ids must be int64 [{B}] on {image.device}, one for every text row, "
            f"not {ids.dtype} {list(ids.shape)} on {ids.device}"
        )


@overload
def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    mode: Mode = "auto",
    return_stats: Literal[False] = False,
    chunk_mib: int = 128,
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
    mode: Mode = "auto",
    return_stats: Literal[True],
    chunk_mib: int = 128,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    mode: Mode = "auto",
    return_stats: bool = False,
    chunk_mib: int = 128,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Mean symmetric InfoNCE (CLIP, arXiv 2103.00020 section 2.3) of image rows against frozen text rows.

    Args:
        image: [b, d] unit rows of this rank, float16, bfloat16, float32 or float64; takes the gradient.
        text: [B, d] unit rows of all ranks, constant; its dtype may differ from that of `image`.
        logit_scale: 0-dim tensor, already exponentiated, any value from 1 to 690 and more (limit: top of this file).
        first_row: the text row that matches image row 0.
        ids: [B] int64; two text rows with equal ids are one caption, and neither is a negative of the other's image.
        group: the process group whose ranks hold the other image rows, in any order and in parts of any size.
        mode: `reference` is dense and twice differentiable. `chunked` never holds a [b, B] tensor, has its gradient
            ready when the forward ends and is differentiable once. `auto` is `chunked`, whatever the bytes of the
            logits: where they fit one chunk it keeps them, and so takes fewer passes than the dense form; below about
            500 pairs the dense form is 0.2 ms faster, which is not worth its error at small losses.
        return_stats: also return a dict of detached float64 0-dim tensors over the same rows as the loss, the same on
            all ranks: `image_to_text_top1` and `text_to_image_top1` (a tie is a miss), `mean_positive_logit`,
            `masked_duplicates` (pairs). With a group this costs two more small all-reduces.
        chunk_mib: MiB of logits, their exponentials and masks alive in `chunked` (at least one row of B).

    Returns:
        A 0-dim loss, float64 if an input is, else float32.
        With a group: the mean over the B pairs of the global batch, the same number on all ranks. The gradient of
        `image` is of that mean, and that of `logit_scale` is this rank's share: SUM (not mean) over ranks is exact.
        Without a group: the mean over the b pairs here. Each image has all B texts as candidates; each of the b
        matching texts has the b images here. The B - b other texts are negatives of the image->text half only.

    Arithmetic is float32 (float64 if an input is), also under autocast; float32 products follow
    `torch.set_float32_matmul_precision`. Two runs give the same bits. `torch.compile(fullgraph=True)` works; `chunked`
    is one opaque operator. Every rank must call with the same B, `ids` and kind of call; the first call
    for each B checks that the ranks' rows make up the batch.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, `text` that requires a gradient, or ranks whose rows do
            not make up the batch.
    """
    _check_inputs(image, text, logit_scale, first_row, ids, mode)
    with torch.autocast(image.device.type, enabled=False):
        if mode == "reference":
            loss, stats = reference(
                image, text, logit_scale, first_row=first_row, ids=ids, group=group, with_stats=return_stats
            )
        else:
            dtype = _compute_dtype(image, text)
            row_bytes = text.shape[0] * (2 * dtype.itemsize + (ids is not None))
            loss, stats = chunked(
                image,
                text,
                logit_scale,
                first_row=first_row,
                ids=ids,
                group=group,
                rows_per_chunk=max(1, chunk_mib * 2**20 // row_bytes),
                with_stats=return_stats,
            )
    if return_stats:
        return loss, dict(zip(STATS, stats.unbind(), strict=True))
    return loss
