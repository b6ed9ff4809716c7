"""Sigmoid loss of image against text embeddings (SigLIP, arXiv 2303.15343 section 3.2): exact, each pair visited once.

Letters: b images here, B images and texts in the global batch, d the width, s the logit scale, β the logit bias; image
i belongs to text t_i = first_row + i. Every pair is an independent binary classification:

    z_ij = s <I_i, T_j> + β
    L = 1/n Σ_i [softplus(-z_{i,t_i}) + Σ_{j≠t_i} softplus(z_ij)]       n = B with a group of ranks, b without
    dL/dI_i = s/n [Σ_{j≠t_i} σ(z_ij) T_j - σ(-z_{i,t_i}) T_{t_i}]       dL/dT_j: the same sum over i, of I_i
    dL/dβ = 1/n Σ_i [Σ_{j≠t_i} σ(z_ij) - σ(-z_{i,t_i})]
    s dL/ds = Σ_i <I_i, dL/dI_i>                                        (z - β is linear in s and in the embeddings)

There is no normaliser, so one visit of a chunk of images gives its loss and its gradient, and ranks share one number,
the loss. The matching pair is left out of the weights σ(z_ij) and added from float64 numbers in the form -σ(-z), which
stays accurate when the model is sure (z -> ∞) and a sigmoid minus one would cancel.

`fused` visits tiles of I·Tᵀ on the tensor cores and writes the weights of a chunk in float16 times 2^15: σ keeps eleven
bits down to 2^-29 = 2e-9 and is zero below 2^-40. Their product with the texts is the library's. Rounding embeddings to
float16 puts an error near 3e-4 s/√d on every z outside the matching pairs. Against float64 of unrounded random unit
vectors (scales from 10 to 300, d of 64 and more) gradients of embeddings are within 8e-4 of their norm, and the loss
within 3e-5 of itself at 64 images and 7e-6 at 1,024 and 2,048 (root mean square). Embeddings that come in float16 are
not rounded: 1e-5.

Cost in passes of 2·b·B·d operations: one to evaluate, two with the gradient, three if the texts take one as well.
Memory: one chunk of weights (`chunked`: and one of losses), whatever b and B are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .card import ODD_PAIRS, ONE_OF_16_RANKS, Card, Data, Inputs, PairSizes, Pass, draw_pairs, listed
from .device import HOPPER, multiprocessors_of
from .pairs import (
    Pairs,
    Reduction,
    as_scalar,
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
from .tiles import (
    INTERPRETED,
    INTERPRETED_SHAPE,
    TileShape,
    cosine_tile,
    descriptor,
    operand,
    product,
    tile_of,
)

Mode = Literal["auto", "reference", "chunked", "fused"]

# Images [r, d] and the text row that matches the first -> weights σ(z) [r, B] of the other pairs, in the weigher's
# unit, and float64 [2]: the sums of softplus(z) and of σ(z) over them. The weights hold until the next call.
Weigher = Callable[[Tensor, int], tuple[Tensor, Tensor]]

WEIGHT_UNIT = 2.0**15  # the largest power of two times σ <= 1 that float16 holds
SHAPE = TileShape(128, 128, 64, num_warps=8, num_stages=3, max_registers=128, programs=2)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def reference(pairs: Pairs, logit_bias: Tensor) -> Tensor:
    """Dense, differentiable sigmoid loss: the truth of the tests (in float64). Arguments as `sigmoid_loss`."""
    dtype, ids = pairs.dtype, pairs.ids
    image, text, logit_scale, logit_bias = (
        x.to(dtype) for x in (pairs.image, pairs.text, pairs.logit_scale, logit_bias)
    )
    logits = logit_scale * (image @ text.T) + logit_bias  # [b, B]
    signs = torch.full_like(logits, -1.0)
    signs.diagonal(pairs.first_row).fill_(1.0)
    losses = -F.logsigmoid(signs * logits)
    if ids is not None:
        masked = ids[pairs.labels, None] == ids  # [b, B]
        masked.diagonal(pairs.first_row).fill_(False)
        losses = losses.masked_fill(masked, 0.0)
    check_layout(pairs)
    share = losses.sum() / pairs.terms
    if pairs.group is None:
        return share
    total = share.detach().clone()
    dist.all_reduce(total, group=pairs.group)
    return total + (share - share.detach())  # the value of all ranks, to the bit, with the gradient of this one


@triton.jit
def softplus_and_sigmoid(z):
    """Return softplus(z ln 2) and σ(z ln 2), each to 1e-6 of itself, however small; both are 0 at minus infinity."""
    e = tl.exp2(-tl.abs(z))
    # log(1 + e) / e on [0, 1], a minimax polynomial: 3e-7 relative in float32, where log2(1 + e) would lose a small e.
    p = tl.fma(e, -0.0085393004, 0.0440901443)
    p = tl.fma(p, e, -0.1076827422)
    p = tl.fma(p, e, 0.1774533987)
    p = tl.fma(p, e, -0.2449551225)
    p = tl.fma(p, e, 0.3327549100)
    p = tl.fma(p, e, -0.4999740720)
    p = tl.fma(p, e, 0.9999998212)
    softplus = tl.fma(p, e, tl.maximum(z, 0.0) * LN2)
    return softplus, tl.where(z >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def strips_of(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cut [BLOCK_M, BLOCK_N] into four strips of columns: worked on in turn they take a quarter of the registers."""
    left, right = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)).split()
    first, second = tl.permute(tl.reshape(left, (BLOCK_M, 2, BLOCK_N // 4)), (0, 2, 1)).split()
    third, fourth = tl.permute(tl.reshape(right, (BLOCK_M, 2, BLOCK_N // 4)), (0, 2, 1)).split()
    return first, second, third, fourth


@triton.jit(do_not_specialize=["rows", "columns", "first_row"])
def sigmoid_kernel(
    images,  # descriptor [rows, D] float16
    texts,  # descriptor [columns, D] float16
    weights,  # descriptor [rows, columns] float16, or None
    ids,  # [columns] int32, or None
    scale,  # [] float32
    bias,  # [] float32
    sums,  # [2, tiles] float32: of softplus(z) and of σ(z)
    rows,
    columns,
    first_row,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    log2_scale, log2_bias = tl.load(scale) * LOG2E, tl.load(bias) * LOG2E
    STRIP: tl.constexpr = BLOCK_N // 4
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile_of(t, rows, columns, 0, BLOCK_M, BLOCK_N, GROUP)
        cosines = strips_of(cosine_tile(images, texts, m, n, D, BLOCK_M, BLOCK_N, BLOCK_K), BLOCK_M, BLOCK_N)
        i = m * BLOCK_M + tl.arange(0, BLOCK_M)
        ragged = ((m + 1) * BLOCK_M > rows) | ((n + 1) * BLOCK_N > columns)
        first_label = m * BLOCK_M + first_row
        crosses = (first_label < (n + 1) * BLOCK_N) & (n * BLOCK_N < first_label + BLOCK_M)
        loss = 0.0
        weight = 0.0
        for strip in tl.static_range(4):
            first_column = n * BLOCK_N + strip * STRIP
            j = first_column + tl.arange(0, STRIP)
            z = cosines[strip] * log2_scale + log2_bias  # [BLOCK_M, STRIP], in units of ln 2
            # Pairs left out are put at minus infinity, where softplus and σ are 0. (A row of zeros has z = β.)
            if ragged:
                z = tl.where((i >= rows)[:, None] | (j >= columns)[None, :], float("-inf"), z)
            if ids is not None:  # the matching pair has equal ids too
                own = tl.load(ids + first_row + i, mask=i < rows, other=0)
                others = tl.load(ids + j, mask=j < columns, other=0)
                z = tl.where(own[:, None] == others[None, :], float("-inf"), z)
            elif crosses:
                z = tl.where((first_row + i)[:, None] == j[None, :], float("-inf"), z)
            softplus, sigmoid = softplus_and_sigmoid(z)
            loss += tl.sum(softplus)
            weight += tl.sum(sigmoid)
            if weights is not None:
                weights.store([m * BLOCK_M, first_column], (sigmoid * UNIT).to(tl.float16))
        tl.store(sums + t, loss)
        tl.store(sums + tiles + t, weight)


def tile_weigher(
    texts: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, rows_per_chunk: int, with_weights: bool
) -> Weigher:
    """Return the weigher of `fused` for texts [B, d] in float16; it takes images in float16."""
    B, d = texts.shape
    shape = INTERPRETED_SHAPE if INTERPRETED else SHAPE
    width = triton.cdiv(B, 8) * 8  # a descriptor wants rows that start at a multiple of 16 bytes
    buffer = texts.new_empty(rows_per_chunk if with_weights else 0, width)[:, :B]
    text_tiles = descriptor(texts, (shape.block_n, shape.block_k))

    def weigh(images: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
        r = images.shape[0]
        weights = buffer[:r]
        tiles = triton.cdiv(r, shape.block_m) * triton.cdiv(B, shape.block_n)
        sums = scale.new_empty(2, tiles)
        programs = min(tiles, shape.programs * multiprocessors_of(images.device))
        with torch.cuda.device_of(images):  # Triton launches on the current device
            sigmoid_kernel[(programs,)](
                descriptor(images, (shape.block_m, shape.block_k)),
                text_tiles,
                descriptor(weights, (shape.block_m, shape.block_n // 4)) if with_weights else None,
                ids,
                scale,
                bias,
                sums,
                r,
                B,
                first_row,
                D=d,
                UNIT=WEIGHT_UNIT,
                **shape.constants(),
                **shape.options(),
            )
        return weights, sums.sum(1, dtype=torch.float64)

    return weigh


def dense_weigher(texts: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, rows_per_chunk: int) -> Weigher:
    """Return the weigher of `chunked`, in plain torch, for texts [B, d] and images of the same dtype."""
    B = texts.shape[0]
    logits_buffer = texts.new_empty(rows_per_chunk, B)
    losses_buffer = torch.empty_like(logits_buffer)
    masked_buffer = None if ids is None else torch.empty_like(logits_buffer, dtype=torch.bool)

    def weigh(images: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
        r = images.shape[0]
        logits = torch.addmm(bias, images * scale, texts.T, out=logits_buffer[:r])
        logits.diagonal(first_row).fill_(-torch.inf)  # softplus and σ are 0 there
        if ids is not None and masked_buffer is not None:
            masked = torch.eq(ids[first_row : first_row + r, None], ids, out=masked_buffer[:r])
            logits.masked_fill_(masked, -torch.inf)
        losses = torch.logaddexp(logits, torch.zeros_like(bias), out=losses_buffer[:r])
        weights = logits.sigmoid_()
        return weights, torch.stack([values.sum(1).sum(dtype=torch.float64) for values in (losses, weights)])

    return weigh


@torch.library.custom_op("textlock::sigmoid", mutates_args=())
def _sigmoid(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids: Tensor | None,
    first_row: int,
    group_name: str | None,
    mode: str,
    chunk_mib: int | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and its gradients for image, text, logit_scale and logit_bias, [0] where not wanted.

    Those of the image and of the two scalars come together. Holds one chunk of [r, B] float16 in `fused`, else two in
    the compute dtype, next to copies of the inputs in the width of its products, and one more [B, d] for a text
    gradient.
    """
    pairs = pairs_of_operator(image, text, logit_scale, ids, first_row, group_name)
    check_layout(pairs)
    wants_image, wants_text, *_ = wants
    n, dtype = pairs.terms, pairs.dtype
    scale, bias = logit_scale.to(dtype), logit_bias.to(dtype)
    fused = mode == "fused" or (mode == "auto" and image.is_cuda and why_not_tiles(image, text) is None)
    chunk_rows = _chunk_rows(pairs, fused, chunk_mib)
    multiply: Callable[..., Tensor]
    if fused:
        texts = operand(text)
        weigh = tile_weigher(texts, scale, bias, None if ids is None else dense_ids(ids), chunk_rows, wants_image)
        multiply, unit = product, WEIGHT_UNIT
    else:
        texts = text.to(dtype)
        weigh = dense_weigher(texts, scale, bias, ids, chunk_rows)
        multiply, unit = torch.mm, 1.0

    totals = image.new_zeros(2, dtype=torch.float64)  # of the loss and of its derivative for the bias
    scale_grad = image.new_zeros((), dtype=torch.float64)
    image_grad = image.new_empty(image.shape if wants_image else (0,), dtype=dtype)
    text_grad = text.new_zeros(text.shape if wants_text else (0,), dtype=dtype)
    text_share = torch.empty_like(text_grad)  # of one chunk
    for start in range(0, image.shape[0], chunk_rows):
        chunk = slice(start, min(start + chunk_rows, image.shape[0]))
        own = slice(first_row + chunk.start, first_row + chunk.stop)  # the text rows that match
        rows, matches = image[chunk].to(dtype), text[own].to(dtype)  # [r, d]
        positive = scale.double() * (rows * matches).sum(1, dtype=torch.float64) + bias.double()  # z_{i,t_i} [r]
        one_minus_p = torch.sigmoid(-positive)
        weighed = operand(rows) if fused else rows
        weights, sums = weigh(weighed, own.start)
        totals += sums + torch.stack([-F.logsigmoid(positive).sum(), -one_minus_p.sum()])
        if not wants_image:
            continue
        one_minus_p = (unit * one_minus_p).to(dtype)[:, None]
        grad = multiply(weights, texts, out=image_grad[chunk]).addcmul_(one_minus_p, matches, value=-1)
        scale_grad += (grad * rows).sum(dtype=torch.float64)
        if wants_text:
            text_grad += multiply(weights.T, weighed, out=text_share)
            text_grad[own].addcmul_(one_minus_p, rows, value=-1)
    if pairs.group is not None:
        dist.all_reduce(totals[:1], group=pairs.group)
    loss = (totals[0] / n).to(dtype)
    if not wants_image:
        return loss, image_grad, text_grad, loss.new_empty(0), loss.new_empty(0)
    image_grad *= scale / (unit * n)
    text_grad *= scale / (unit * n)
    return loss, image_grad, text_grad, (scale_grad / (unit * n)).to(dtype), (totals[1] / n).to(dtype)


register_ready_gradients(_sigmoid, places=(0, 1, 2, 3))  # image, text, logit_scale, logit_bias


def _chunk_rows(pairs: Pairs, fused: bool, chunk_mib: int | None) -> int:
    """Return how many images are worked on at a time."""
    b, B = pairs.image.shape[0], pairs.text.shape[0]
    row_bytes = B * (2 if fused else 2 * pairs.dtype.itemsize + (pairs.ids is not None))
    rows = rows_per_chunk(chunk_mib, row_bytes, pairs.image.device)
    if fused and rows > SHAPE.block_m:
        rows -= rows % SHAPE.block_m  # whole tiles
    return min(rows, b)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    mode: Mode = "auto",
    chunk_mib: int | None = None,
    gradient_reduction: Reduction = "sum",
) -> Tensor:
    """Sigmoid loss of the global batch: every image against every text, each pair an independent binary classification.

    Args:
        image: [b, d] unit embeddings of this rank's images, float16, bfloat16, float32 or float64; may take a gradient.
        text: [B, d] unit embeddings of the texts of all ranks; its dtype may differ from that of `image`; may take a
            gradient.
        logit_scale: 0-dim tensor, or a number, which is a constant; already exponentiated. At or below 0 it is refused
            if it lies on the CPU; on a GPU, for which the host does not wait, it is taken as it is.
        logit_bias: 0-dim tensor, or a number, which is a constant; about -log(B) at the start, so that the many pairs
            that do not match begin answered.
        first_row: the row of `text` that matches row 0 of `image`.
        ids: [B] int64; two texts with equal ids are one caption: the image of one and the other text are no pair.
        group: the process group whose ranks hold the other images, in any order and in parts of any size.
        mode: `reference` is dense and twice differentiable. `chunked` and `fused` never hold a [b, B] tensor, have
            their gradients ready when the forward ends and are differentiable once. `fused` rounds embeddings to
            float16 and runs on GPUs from compute capability 9.0, for d from 64 to 4,096 in steps of 8; `chunked`
            anywhere, in float32. `auto` is `fused` on such a GPU where neither input is float64, else `chunked`.
        chunk_mib: MiB of weights (in `chunked` also losses and masks) alive at a time, 1 or more (at least one row of
            B); None: 128 on a GPU, 32 on a CPU.
        gradient_reduction: how the ranks of `group` combine their gradients of weights, scale and bias: "sum" if they
            are added up, "mean" if they are averaged, as DistributedDataParallel does; "mean" multiplies the gradients,
            not the loss, by the number of ranks, so that the average is the gradient of the loss.

    Returns:
        A 0-dim loss, float64 if an input is, else float32.
        With a group: the sum over all pairs divided by the B images of the global batch, the same number on all ranks.
        The gradient of `image` is of that number; those of `text`, `logit_scale` and `logit_bias` are this rank's
        share: their SUM over the ranks is exact ("mean": their mean).
        Without a group: the sum over the pairs of the b images here with all B texts, divided by b.

    Arithmetic outside the products of `fused` is float32 (float64 if an input is), also under autocast; float32
    products follow `torch.set_float32_matmul_precision`. Two runs give the same bits, and the host never waits for the
    device. `torch.compile(fullgraph=True)` works; `chunked` and `fused` are one opaque operator. With a group every
    rank must call with the same B; the first call for each B checks that the ranks' images make up the batch.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit, `fused` where it cannot run, or ranks whose
            images do not make up the batch.
        TypeError: an argument that is no tensor or no number.
    """
    pairs = checked_pairs(image, text, logit_scale, first_row=first_row, ids=ids, group=group)
    bias = as_scalar("logit_bias", logit_bias, image, text)
    check_settings(pairs, mode, get_args(Mode), ("fused",), chunk_mib=chunk_mib, gradient_reduction=gradient_reduction)
    with torch.autocast(image.device.type, enabled=False):
        if mode == "reference":
            loss = reference(pairs, bias)
        else:
            wants_image, wants_text, *wants_scalars = asked_for(image, text, pairs.logit_scale, bias)
            wants_any = wants_image or wants_text or any(wants_scalars)
            wants = [wants_any, wants_text, wants_any, wants_any]
            loss, *_ = _sigmoid(
                image, text, pairs.logit_scale, bias, ids, first_row, pairs.group_name, mode, chunk_mib, wants
            )
    return for_reduction(loss, pairs, gradient_reduction)


class Visit(NamedTuple):
    """One visit of some images, as the card compares it."""

    weights: Tensor | None  # [b, B]: σ(z) times WEIGHT_UNIT
    loss: Tensor  # [] float64: the sum of softplus(z)
    weight: Tensor  # [] float64: the sum of σ(z)


def _visit_reference(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    first_row: int,
    with_weights: bool,
) -> Visit:
    wide = torch.promote_types(image.dtype, torch.float32)
    weights, sums = dense_weigher(text.to(wide), scale, bias, ids, len(image))(image.to(wide), first_row)
    return Visit((weights * WEIGHT_UNIT).to(image.dtype) if with_weights else None, *sums.unbind())


def _launch_visit(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    first_row: int,
    with_weights: bool,
) -> Visit:
    weights, sums = tile_weigher(text, scale, bias, ids, len(image), with_weights)(image, first_row)
    return Visit(weights if with_weights else None, *sums.unbind())


@dataclass(frozen=True, kw_only=True)
class _Sizes(PairSizes):
    gradient: bool = True


def _inputs(sizes: _Sizes, data: Data) -> Inputs:
    bias = torch.full((), -3.0, device=data.device)
    return draw_pairs(sizes, data) | {"bias": bias, "with_weights": sizes.gradient}


_VISIT = Pass[_Sizes](
    "sigmoid",
    sigmoid_kernel,
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
            listed(ids=ids, gradient=gradient): _Sizes(**ONE_OF_16_RANKS, ids=ids, gradient=gradient)
            for ids in (False, True)
            for gradient in (False, True)
        },
        multiplies=True,
        least=HOPPER,
        empty=False,
    ),
)
