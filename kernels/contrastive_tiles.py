"""The tiles of the contrastive loss: sums of exponentials in one pass over I·Tᵀ, weights times text in another.

Letters as in `contrastive.py`; logits here are in units of log2 (S log2 e), so that every exponential is an exp2.

Pass 1, `sum_exponentials`, for every tile: the matching pairs and duplicates are taken out, then the exponentials are
summed per row and per column. They are 2^(S - k), k the rounded row maximum of the tile; a column's sum is made of the
same numbers times 2^(k - max k). Each tile writes its own sums and their k, and a fold adds them in float64, which
reaches 2^±1000: no atomics, the same bits in every run. Where a column's sum leaves the range of float32, the fold
sets a flag on the device, and kernels that otherwise return at once sum all columns again, from their own maxima. With
`store` the exponentials are kept in 2 bytes a pair, as bfloat16 with the sign's bit given to the mantissa: 2^k is
exact, so a weight is right to 2^-9 of itself, at any scale.

Pass 2 multiplies the weights g_ij = 2^(S_ij - r_i) + 2^(S_ij - c_j) with the text rows:
- `multiply_stored`: g = E·(2^(k - r_i) + 2^(k - c_j)) in registers, one visit, no exponential an element;
- `write_weights`: the tile of logits again, g in float16 to a chunk that a library matrix product then reads;
- `weigh_stored`: E is overwritten with g, for two products that read it (the text tower is trained as well).
A last kernel, `finish_gradient`, adds the parts, the matching pair, and the factor s / 2n.
Without columns (`image_to_text.py`) pass 1 sums rows alone, and `multiply_stored` takes g = E·2^(k - r_i).

Floor at 790 TFLOP/s: 0.52 ms a pass at 4,096 × 65,536 × 768, two passes stored, three recomputed. Not yet measured.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .card import ODD_PAIRS, ONE_OF_16_RANKS, Card, Data, Inputs, PairSizes, Pass, draw_pairs, listed
from .device import HOPPER, multiprocessors_of
from .tiles import (
    INTERPRETED,
    INTERPRETED_SHAPE,
    WEIGHT_UNIT,
    TileShape,
    cosine_tile,
    descriptor,
    tile_of,
)

LOG2E = tl.constexpr(1.4426950408889634)
# What a row of a tile without any pair has for its maximum: below every logit in range, and finite.
LOWEST = tl.constexpr(-2000.0)
# A column's sum below this share of the tile's highest exponential may have lost terms to the range of float32.
SMALLEST_SUM = tl.constexpr(2.0**-60)
# Stored exponentials are 2^(S - k + HEADROOM) so that the range of eight exponent bits lies around what the gradient
# needs: a weight below 2^-34 is lost in float16 anyway, and all others survive while max k - min c_j <= STORED_RANGE.
HEADROOM = 46
STORED_RANGE = 138.0


@triton.jit
def power_of_two(exponent):
    """Return 2^exponent in float64 for integral float32 exponents: zero below 2^-1022, infinite from 2^1024."""
    biased = tl.minimum(tl.maximum(exponent, -1023.0), 1024.0).to(tl.int64) + 1023
    return (biased << 52).to(tl.float64, bitcast=True)


@triton.jit
def encode(x):
    """Return a float32 >= 0 as 16 bits without a sign, rounded: its eight exponent bits and eight of its mantissa."""
    return ((x.to(tl.uint32, bitcast=True) + 0x4000) >> 15).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def decode(bits):
    """Return the float32 that `encode` was given, to 2^-9."""
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 15).to(tl.float32, bitcast=True)


@triton.jit
def rounded(peak):
    """Return the integer next to a maximum of logits; one that is -inf becomes finite."""
    return tl.floor(tl.maximum(peak, LOWEST) + 0.5)


@triton.jit
def without_matches(
    cosines, m, n, b, B, first_row, ids, HAS_IDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Set matching pairs, duplicates and what lies beyond the edges to -inf; return the tile's rows and columns too."""
    # Without a branch for the tiles that need none of it: a branch keeps two copies of the tile in registers.
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = n * BLOCK_N + tl.arange(0, BLOCK_N)
    left_out = ((i + first_row)[:, None] == j[None, :]) | (i >= b)[:, None] | (j >= B)[None, :]
    if HAS_IDS:
        own = tl.load(ids + first_row + i, mask=i < b, other=-1)
        others = tl.load(ids + j, mask=j < B, other=-1)
        left_out = left_out | (own[:, None] == others[None, :])
    return tl.where(left_out, float("-inf"), cosines), i, j


@triton.jit
def sums_kernel(
    images,  # descriptor [b, D] float16
    texts,  # descriptor [B, D] float16
    exponentials,  # descriptor [b, B] int16
    scale,  # [] float32
    ids,  # [B] int32
    row_sums,  # [blocks of texts, row_stride] float32: sums of 2^(S - k)
    row_offsets,  # [blocks of texts, row_stride] float32: k
    column_sums,  # [blocks of images, column_stride] float32
    column_offsets,  # [blocks of images, column_stride] float32
    b,
    B,
    first_row,
    row_stride,  # b and B up to whole blocks, so that partial results need no masks
    column_stride,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    STORE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HEADROOM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    log2_scale = tl.load(scale) * LOG2E
    tiles = tl.cdiv(b, BLOCK_M) * tl.cdiv(B, BLOCK_N)
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile_of(t, b, B, first_row, BLOCK_M, BLOCK_N, GROUP)
        cosines = cosine_tile(images, texts, m, n, D, BLOCK_M, BLOCK_N, BLOCK_K)
        cosines, i, j = without_matches(cosines, m, n, b, B, first_row, ids, HAS_IDS, BLOCK_M, BLOCK_N)
        logits = cosines * log2_scale

        offset = rounded(tl.max(cosines, 1) * log2_scale)  # [BLOCK_M]
        # The headroom is in the exponent: a GPU's exp2 gives zero below 2^-126, where no factor brings it back.
        exponential = tl.exp2(logits - (offset - HEADROOM)[:, None])
        at_row = n * row_stride + i
        tl.store(row_sums + at_row, tl.sum(exponential, 1) * 2.0**-HEADROOM)
        tl.store(row_offsets + at_row, offset)

        if COLUMNS:
            at_column = m * column_stride + j
            top = tl.max(offset, 0)
            column_sum = tl.sum(exponential * tl.exp2(offset - top)[:, None], 0) * 2.0**-HEADROOM  # [BLOCK_N]
            tl.store(column_sums + at_column, column_sum)
            tl.store(column_offsets + at_column, tl.zeros_like(column_sum) + top)
        if STORE:
            exponentials.store([m * BLOCK_M, n * BLOCK_N], encode(exponential))


@triton.jit
def lost_columns_kernel(
    images,  # descriptor [b, D] float16
    texts,  # descriptor [B, D] float16
    scale,  # [] float32
    ids,  # [B] int32
    column_sums,  # [blocks of images, column_stride] float32
    column_offsets,  # [blocks of images, column_stride] float32
    lost,  # [] int32
    b,
    B,
    first_row,
    column_stride,
    D: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum the columns again, each from its own maximum. Returns at once where pass 1 lost none."""
    if tl.load(lost) != 0:
        log2_scale = tl.load(scale) * LOG2E
        tiles = tl.cdiv(b, BLOCK_M) * tl.cdiv(B, BLOCK_N)
        for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            m, n = tile_of(t, b, B, first_row, BLOCK_M, BLOCK_N, GROUP)
            cosines = cosine_tile(images, texts, m, n, D, BLOCK_M, BLOCK_N, BLOCK_K)
            cosines, _, j = without_matches(cosines, m, n, b, B, first_row, ids, HAS_IDS, BLOCK_M, BLOCK_N)
            logits = cosines * log2_scale
            offset = rounded(tl.max(logits, 0))
            column_sum = tl.sum(tl.exp2(logits - offset[None, :]), 0)
            tl.store(column_sums + m * column_stride + j, column_sum)
            tl.store(column_offsets + m * column_stride + j, offset)


@triton.jit
def fold_kernel(
    sums,  # [blocks, stride] float32
    offsets,  # [blocks, stride] float32
    before,  # [n] float64: what is known of the totals, or None
    totals,  # [n] float64
    tops,  # [n] float32, or None
    lost,  # [] int32, or None
    blocks,
    n,
    stride,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the tiles' parts in float64: totals = before + Σ sums 2^offsets, tops = max offsets.

    Sets `lost` where a sum is so small that terms may have been rounded away; with AGAIN, works only if it is set.
    """
    if AGAIN:  # noqa: SIM102  the outer condition is the compiler's
        if tl.load(lost) == 0:
            return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    if before is not None:
        total += tl.load(before + i, mask=i < n, other=0.0)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    smallest = tl.full((BLOCK,), 1.0, tl.float32)
    for block in range(blocks):
        offset = tl.load(offsets + block * stride + i, mask=i < n, other=LOWEST)
        part = tl.load(sums + block * stride + i, mask=i < n, other=1.0)
        total += part.to(tl.float64) * power_of_two(offset)
        top = tl.maximum(top, offset)
        smallest = tl.minimum(smallest, part)
    tl.store(totals + i, total, mask=i < n)
    if tops is not None:
        tl.store(tops + i, top, mask=i < n)
    if lost is not None:  # noqa: SIM102
        if tl.min(smallest, 0) < SMALLEST_SUM:
            tl.store(lost, 1)


@triton.jit
def matching_kernel(
    image,  # [n, D]
    matching,  # [n, D]: the text row of each image row
    cosine,  # [n] float32
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the cosines of the matching pairs, from the rows as they are: no sum of the tiles has them in it."""
    i = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK_D)
    left = tl.load(image + i * D + x, mask=x < D, other=0.0).to(tl.float32)
    right = tl.load(matching + i * D + x, mask=x < D, other=0.0).to(tl.float32)
    tl.store(cosine + i, tl.sum(left * right, 0))


@triton.jit
def weights_kernel(
    images,  # descriptor [rows, D] float16
    texts,  # descriptor [B, D] float16
    weights,  # descriptor [rows, B] float16
    scale,  # [] float32
    ids,  # [B] int32
    row_lse,  # [rows] float32
    column_lse,  # [B] float32
    rows,
    B,
    first_row,
    D: tl.constexpr,
    HAS_IDS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    log2_scale = tl.load(scale) * LOG2E
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(B, BLOCK_N)
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile_of(t, rows, B, 0, BLOCK_M, BLOCK_N, GROUP)
        logits = cosine_tile(images, texts, m, n, D, BLOCK_M, BLOCK_N, BLOCK_K) * log2_scale
        i = m * BLOCK_M + tl.arange(0, BLOCK_M)
        j = n * BLOCK_N + tl.arange(0, BLOCK_N)
        label = i + first_row
        row = tl.load(row_lse + i, mask=i < rows, other=float("inf"))
        column = tl.load(column_lse + j, mask=j < B, other=float("inf"))
        weight = tl.exp2(logits - row[:, None]) + tl.exp2(logits - column[None, :])
        if HAS_IDS:
            own = tl.load(ids + label, mask=i < rows, other=0)
            others = tl.load(ids + j, mask=j < B, other=0)
            weight = tl.where(own[:, None] == others[None, :], 0.0, weight)
        else:
            weight = tl.where(label[:, None] == j[None, :], 0.0, weight)
        weights.store([m * BLOCK_M, n * BLOCK_N], (weight * UNIT).to(tl.float16))


@triton.jit
def stored_weight(exponential, offset, row, column, HEADROOM: tl.constexpr, UNIT: tl.constexpr):
    """Return g·UNIT [M, N] of a stored tile from vectors only: row factors 2^(k - r), and 2^(k - c) as a product."""
    factor = (tl.exp2(offset - row - HEADROOM) * UNIT)[:, None]
    if column is not None:
        top = tl.max(offset, 0)
        left = tl.exp2(offset - top + HEADROOM) * UNIT
        right = tl.exp2(top - column - 2 * HEADROOM)  # [N]
        factor += left[:, None] * right[None, :]
    return decode(exponential) * factor


@triton.jit
def stored_product_kernel(
    exponentials,  # descriptor [b, B] int16
    texts,  # descriptor [B, D] float16
    row_offsets,  # [blocks of texts, offset_stride] float32
    row_lse,  # [b] float32
    column_lse,  # [B] float32, or None
    parts,  # [splits, b, D] float32
    b,
    B,
    offset_stride,
    per_split,  # text rows of one split, a multiple of BLOCK_K
    D: tl.constexpr,
    OFFSET_N: tl.constexpr,  # text rows that share one offset: BLOCK_N of pass 1
    HEADROOM: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Blocks of the width come first: the programs that read one block of exponentials run side by side.
    width, m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(row_lse + i, mask=i < b, other=float("inf"))
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(split * per_split, tl.minimum((split + 1) * per_split, B), BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        offset = tl.load(row_offsets + (start // OFFSET_N) * offset_stride + i, mask=i < b, other=LOWEST)
        column = None if column_lse is None else tl.load(column_lse + j, mask=j < B, other=float("inf"))
        weight = stored_weight(exponentials.load([m * BLOCK_M, start]), offset, row, column, HEADROOM, UNIT)
        total = tl.dot(weight.to(tl.float16), texts.load([start, width * BLOCK_N]), total)
    x = width * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (split.to(tl.int64) * b + i)[:, None] * D + x[None, :]
    tl.store(parts + at, total, mask=(i < b)[:, None] & (x < D)[None, :])


@triton.jit
def weigh_kernel(
    exponentials,  # [b, stride] int16, overwritten with float16
    row_offsets,  # [blocks of texts, offset_stride] float32
    row_lse,  # [b] float32
    column_lse,  # [B] float32
    b,
    B,
    stride,
    offset_stride,
    HEADROOM: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # that of pass 1
):
    n, m = tl.program_id(0), tl.program_id(1)
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(row_lse + i, mask=i < b, other=float("inf"))
    offset = tl.load(row_offsets + n * offset_stride + i, mask=i < b, other=LOWEST)
    column = tl.load(column_lse + j, mask=j < B, other=float("inf"))
    at = i.to(tl.int64)[:, None] * stride + j[None, :]
    inside = (i < b)[:, None] & (j < stride)[None, :]  # the padding between B and the stride becomes zero
    exponential = tl.load(exponentials + at, mask=inside & (j < B)[None, :], other=0)
    weight = stored_weight(exponential, offset, row, column, HEADROOM, UNIT)
    tl.store(exponentials + at, weight.to(tl.float16).to(tl.int16, bitcast=True), mask=inside)


@triton.jit
def finish_kernel(
    parts,  # [splits, rows, D] float32
    own,  # [rows, D]: the rows that take the gradient
    matching,  # [rows, D]: the rows they match
    one_minus_p,  # [rows] float32: k_i
    factor,  # [] float32: s / 2n
    gradient,  # [rows, D] float32
    dots,  # [rows] float32: <own, gradient>
    rows,
    splits,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + (split * rows + i) * D + x, mask=x < D, other=0.0)
    match = tl.load(matching + i * D + x, mask=x < D, other=0.0).to(tl.float32)
    total = (total * (1.0 / UNIT) - tl.load(one_minus_p + i) * match) * tl.load(factor)
    tl.store(gradient + i * D + x, total, mask=x < D)
    mine = tl.load(own + i * D + x, mask=x < D, other=0.0).to(tl.float32)
    tl.store(dots + i, tl.sum(total * mine, 0))


def sums_shape(*, store: bool, has_ids: bool) -> TileShape:
    """Return the tile of pass 1: two programs a multiprocessor hide each other's epilogue, where they fit unspilled."""
    if INTERPRETED:
        return INTERPRETED_SHAPE
    stages = 2 if store else 3
    if has_ids:
        return TileShape(128, 128, 64, num_warps=8, num_stages=stages)
    return TileShape(128, 128, 64, num_warps=8, num_stages=stages, max_registers=128, programs=2)


def weights_shape() -> TileShape:
    """Return the tile of pass 2, recomputed; it does not fit twice, so it is a wide one."""
    return INTERPRETED_SHAPE if INTERPRETED else TileShape(128, 256, 64, num_warps=8, num_stages=3)


def product_shape() -> TileShape:
    """Return the tile of pass 2, stored: [image rows, width], in steps of block_k text rows."""
    return INTERPRETED_SHAPE if INTERPRETED else TileShape(128, 256, 64, num_warps=8, num_stages=3)


@dataclass(frozen=True)
class Stored:
    """What pass 1 keeps for a stored pass 2."""

    exponentials: Tensor  # [b, B up to a multiple of 8] int16: 2^(S - k + HEADROOM), encoded
    offsets: Tensor  # [blocks of texts, b up to whole blocks] float32: k
    block_n: int  # text rows that share one offset
    tops: Tensor  # [b] float32: highest k of each row


@dataclass(frozen=True)
class Sums:
    """Result of pass 1, without matching pairs and duplicates."""

    rows: Tensor  # [b] float64: Σ_j e^S
    columns: Tensor  # [B] float64: Σ_i e^S, or [0]
    stored: Stored | None


def sum_exponentials(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    first_row: int,
    *,
    store: bool,
    with_columns: bool = True,
) -> Sums:
    """Run pass 1.

    Args:
        image: [b, D] float16, contiguous.
        text: [B, D] float16, contiguous.
        scale: [] float32.
        ids: [B] int32 or None.
        first_row: the text row that matches image row 0.
        store: keep the exponentials.
        with_columns: sum the columns too, not the rows alone.
    """
    b, D = image.shape
    B = text.shape[0]
    shape = sums_shape(store=store, has_ids=ids is not None)
    blocks_n = triton.cdiv(B, shape.block_n)
    # A launch takes this many rows: it bounds the partial sums to 16 bytes x 64 x B, whatever b is.
    launch_rows = min(b, (2 if INTERPRETED else 64) * shape.block_m)
    blocks_m = triton.cdiv(launch_rows, shape.block_m)
    columns_summed = B if with_columns else 0
    row_stride = (triton.cdiv(b, shape.block_m) if store else blocks_m) * shape.block_m
    column_stride = blocks_n * shape.block_n if with_columns else 0

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return image.new_empty(size, dtype=dtype)

    row_sums, row_offsets = empty(blocks_n, row_stride), empty(blocks_n, row_stride)
    column_sums, column_offsets = empty(blocks_m, column_stride), empty(blocks_m, column_stride)
    exponentials = empty(b, -(-B // 8) * 8, dtype=torch.int16) if store else None
    rows, row_tops = empty(b, dtype=torch.float64), empty(b)
    columns, columns_after = (image.new_zeros(columns_summed, dtype=torch.float64) for _ in range(2))

    text_tiles = descriptor(text, (shape.block_n, shape.block_k))
    programs = shape.programs * multiprocessors_of(image.device)
    for start in range(0, b, launch_rows):
        here = slice(start, min(start + launch_rows, b))
        n = here.stop - start
        kept = slice(start if store else 0, None)
        image_tiles = descriptor(image[here], (shape.block_m, shape.block_k))
        lost = torch.zeros((), dtype=torch.int32, device=image.device)
        masks = {"b": n, "B": B, "first_row": first_row + start, "D": D, "HAS_IDS": ids is not None}
        grid = (min(triton.cdiv(n, shape.block_m) * blocks_n, programs),)
        sums_kernel[grid](
            image_tiles,
            text_tiles,
            descriptor(exponentials[here], (shape.block_m, shape.block_n)) if exponentials is not None else None,
            scale,
            ids,
            row_sums[:, kept],
            row_offsets[:, kept],
            column_sums,
            column_offsets,
            row_stride=row_stride,
            column_stride=column_stride,
            COLUMNS=with_columns,
            STORE=store,
            HEADROOM=HEADROOM if store else 0,
            **masks,
            **shape.constants(),
            **shape.options(),
        )
        blocks = triton.cdiv(n, shape.block_m)
        _fold(row_sums[:, kept], row_offsets[:, kept], blocks_n, None, rows[here], tops=row_tops[here])
        if not with_columns:
            continue
        _fold(column_sums, column_offsets, blocks, columns, columns_after, lost=lost)
        lost_columns_kernel[grid](
            image_tiles,
            text_tiles,
            scale,
            ids,
            column_sums,
            column_offsets,
            lost,
            column_stride=column_stride,
            **masks,
            **shape.constants(),
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
        _fold(column_sums, column_offsets, blocks, columns, columns_after, lost=lost, again=True)
        columns, columns_after = columns_after, columns

    stored = Stored(exponentials, row_offsets, shape.block_n, row_tops) if exponentials is not None else None
    return Sums(rows, columns, stored)


def _fold(
    sums: Tensor,
    offsets: Tensor,
    blocks: int,
    before: Tensor | None,
    totals: Tensor,
    *,
    tops: Tensor | None = None,
    lost: Tensor | None = None,
    again: bool = False,
) -> None:
    n, BLOCK = totals.shape[0], 128
    fold_kernel[(triton.cdiv(n, BLOCK),)](
        sums, offsets, before, totals, tops, lost, blocks, n, sums.stride(0), AGAIN=again, BLOCK=BLOCK
    )


def matching_cosines(image: Tensor, matching: Tensor) -> Tensor:
    """Return <image_i, matching_i> [n] float32 of contiguous rows [n, D]."""
    n, D = image.shape
    cosine = image.new_empty(n, dtype=torch.float32)
    matching_kernel[(n,)](image, matching, cosine, D=D, BLOCK_D=triton.next_power_of_2(D))
    return cosine


def write_weights(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    first_row: int,
    row_lse: Tensor,
    column_lse: Tensor,
    weights: Tensor,
) -> None:
    """Write g·WEIGHT_UNIT of some image rows to `weights`.

    Args:
        image: [n, D] float16, contiguous.
        text: [B, D] float16, contiguous.
        scale: [] float32.
        ids: [B] int32 or None.
        first_row: the text row that matches row 0 of `image`.
        row_lse: [n] float32, log2 Σ_j e^S.
        column_lse: [B] float32, log2 Σ_i e^S; inf where a column has no image.
        weights: [n, B up to a multiple of 8] float16; what its columns beyond B hold afterwards means nothing.
    """
    n, D = image.shape
    B = text.shape[0]
    shape = weights_shape()
    tiles = triton.cdiv(n, shape.block_m) * triton.cdiv(B, shape.block_n)
    weights_kernel[(min(tiles, shape.programs * multiprocessors_of(image.device)),)](
        descriptor(image, (shape.block_m, shape.block_k)),
        descriptor(text, (shape.block_n, shape.block_k)),
        descriptor(weights, (shape.block_m, shape.block_n)),
        scale,
        ids,
        row_lse,
        column_lse,
        n,
        B,
        first_row,
        D=D,
        HAS_IDS=ids is not None,
        UNIT=WEIGHT_UNIT,
        **shape.constants(),
        **shape.options(),
    )


def multiply_stored(stored: Stored, text: Tensor, row_lse: Tensor, column_lse: Tensor | None) -> Tensor:
    """Return parts [splits, b, D] float32 whose sum is g·text·WEIGHT_UNIT.

    Arguments as `write_weights`; without `column_lse`, g is 2^(S - r) alone.
    """
    b = stored.exponentials.shape[0]
    B, D = text.shape
    shape = product_shape()
    widths, blocks = triton.cdiv(D, shape.block_n), triton.cdiv(b, shape.block_m)
    splits = _splits(widths * blocks, multiprocessors_of(text.device), triton.cdiv(B, shape.block_k))
    per_split = triton.cdiv(triton.cdiv(B, splits), shape.block_k) * shape.block_k
    parts = text.new_empty(splits, b, D, dtype=torch.float32)
    stored_product_kernel[(widths, blocks, splits)](
        descriptor(stored.exponentials[:, :B], (shape.block_m, shape.block_k)),
        descriptor(text, (shape.block_k, shape.block_n)),
        stored.offsets,
        row_lse,
        column_lse,
        parts,
        b,
        B,
        stored.offsets.stride(0),
        per_split,
        D=D,
        OFFSET_N=stored.block_n,
        HEADROOM=HEADROOM,
        UNIT=WEIGHT_UNIT,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        **shape.options(),
    )
    return parts


def _splits(tiles: int, multiprocessors: int, steps: int) -> int:
    """Return in how many parts, at most 16, the text rows fill the last wave of tiles best."""

    def filled(splits: int) -> float:
        waves = tiles * splits / multiprocessors
        return waves / -(-waves // 1)

    # A part more is worth it for 2 %: every part is written and read again.
    return max(range(1, min(16, steps) + 1), key=lambda splits: filled(splits) - 0.02 * splits)


def weigh_stored(stored: Stored, B: int, row_lse: Tensor, column_lse: Tensor) -> Tensor:
    """Overwrite the exponentials with g·WEIGHT_UNIT and return them as float16 [b, B up to a multiple of 8]."""
    b, stride = stored.exponentials.shape
    BLOCK_M = 32
    weigh_kernel[(triton.cdiv(B, stored.block_n), triton.cdiv(b, BLOCK_M))](
        stored.exponentials,
        stored.offsets,
        row_lse,
        column_lse,
        b,
        B,
        stride,
        stored.offsets.stride(0),
        HEADROOM=HEADROOM,
        UNIT=WEIGHT_UNIT,
        BLOCK_M=BLOCK_M,
        BLOCK_N=stored.block_n,
    )
    return stored.exponentials.view(torch.float16)


class Finished(NamedTuple):
    """What `finish_gradient` returns."""

    gradient: Tensor  # [n, D] float32
    dots: Tensor  # [n] float32


def finish_gradient(parts: Tensor, own: Tensor, matching: Tensor, one_minus_p: Tensor, factor: Tensor) -> Finished:
    """Return factor·(Σ parts / WEIGHT_UNIT - one_minus_p·matching) and its dot product with `own`, row by row.

    Args:
        parts: [splits, n, D] float32.
        own: [n, D], contiguous, the rows that take the gradient.
        matching: [n, D], contiguous, the rows they match.
        one_minus_p: [n] float32.
        factor: [] float32.
    """
    splits, n, D = parts.shape
    gradient, dots = torch.empty_like(parts[0]), parts.new_empty(n)
    finish_kernel[(n,)](
        parts,
        own,
        matching,
        one_minus_p,
        factor,
        gradient,
        dots,
        n,
        splits,
        D=D,
        UNIT=WEIGHT_UNIT,
        BLOCK_D=triton.next_power_of_2(D),
    )
    return Finished(gradient, dots)


class SumsOfPairs(NamedTuple):
    """Pass 1 as the card compares it."""

    rows: Tensor  # [b] float64: Σ_j e^S
    columns: Tensor | None  # [B] float64: Σ_i e^S
    exponentials: Tensor | None  # [b, B]: e^S, decoded
    tops: Tensor | None  # [b]: highest k of each row


class _Cosines(NamedTuple):
    cosine: Tensor  # [n]


class _Weights(NamedTuple):
    weights: Tensor  # [b, B], or B up to a multiple of 8: g times WEIGHT_UNIT


class _Product(NamedTuple):
    product: Tensor  # [b, D]: g·text times WEIGHT_UNIT


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _decoded(codes: Tensor) -> Tensor:
    return ((codes.int() & 0xFFFF) << 15).view(torch.float32)


def _logits(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, first_row: int) -> Tensor:
    """Return the logits [b, B] in units of log2, with matching pairs and duplicates at -inf."""
    logits = _wide(image) @ _wide(text).T * (scale / math.log(2))
    if ids is not None:
        logits.masked_fill_(ids[first_row:][: len(image), None] == ids, -torch.inf)
    logits.diagonal(first_row).fill_(-torch.inf)
    return logits


def sums_reference(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, first_row: int, store: bool
) -> SumsOfPairs:
    """Compute pass 1 in plain torch, dense; arguments as `sum_exponentials`, in float64 nothing is rounded."""
    logits = _logits(image, text, scale, ids, first_row)
    values = logits.exp2()
    rows, columns = (values.sum(axis, dtype=torch.float64) for axis in (1, 0))
    if not store:
        return SumsOfPairs(rows, columns, None, None)
    kept = values if values.dtype == torch.float64 else _decoded((values.view(torch.int32) + 0x4000) >> 15)
    return SumsOfPairs(rows, columns, kept, (logits.amax(1).clamp(min=LOWEST.value) + 0.5).floor())


def _launch_sums(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, first_row: int, store: bool
) -> SumsOfPairs:
    sums = sum_exponentials(image, text, scale, ids, first_row, store=store)
    if sums.stored is None:
        return SumsOfPairs(sums.rows, sums.columns, None, None)
    stored, (b, B) = sums.stored, (len(image), len(text))
    values = _stored_values(stored.exponentials, stored.offsets[:, :b], stored.block_n)
    return SumsOfPairs(sums.rows, sums.columns, values[:, :B], stored.tops)


def _stored_values(exponentials: Tensor, offsets: Tensor, block_n: int) -> Tensor:
    """Return e^S [b, columns] of stored exponentials."""
    offset = offsets.repeat_interleave(block_n, 0)[: exponentials.shape[1]].T
    return _decoded(exponentials) * (offset - HEADROOM).exp2()


def _matching_reference(image: Tensor, matching: Tensor) -> _Cosines:
    return _Cosines((_wide(image) * _wide(matching)).sum(1))


def _launch_matching(image: Tensor, matching: Tensor) -> _Cosines:
    return _Cosines(matching_cosines(image, matching))


def _weights_reference(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    first_row: int,
    row_lse: Tensor,
    column_lse: Tensor,
) -> _Weights:
    logits = _logits(image, text, scale, ids, first_row)
    weights = (logits - row_lse[:, None]).exp2() + (logits - column_lse).exp2()
    return _Weights((weights * WEIGHT_UNIT).to(image.dtype))


def _launch_weights(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    first_row: int,
    row_lse: Tensor,
    column_lse: Tensor,
) -> _Weights:
    b, B = len(image), len(text)
    weights = image.new_empty(b, -(-B // 8) * 8)
    write_weights(image, text, scale, ids, first_row, row_lse, column_lse, weights)
    return _Weights(weights[:, :B])


def _stored_weights(
    exponentials: Tensor, offsets: Tensor, block_n: int, B: int, row_lse: Tensor, column_lse: Tensor
) -> Tensor:
    """Return g·WEIGHT_UNIT [b, B] of stored exponentials."""
    values = _stored_values(exponentials, offsets, block_n)[:, :B]
    return values * ((-row_lse).exp2()[:, None] + (-column_lse).exp2()) * WEIGHT_UNIT


def _product_reference(
    exponentials: Tensor, offsets: Tensor, block_n: int, text: Tensor, row_lse: Tensor, column_lse: Tensor
) -> _Product:
    weights = _stored_weights(exponentials, offsets, block_n, len(text), row_lse, column_lse)
    return _Product(_wide(weights.to(text.dtype)) @ _wide(text))


def _launch_product(
    exponentials: Tensor, offsets: Tensor, block_n: int, text: Tensor, row_lse: Tensor, column_lse: Tensor
) -> _Product:
    stored = Stored(exponentials, offsets, block_n, row_lse)
    return _Product(multiply_stored(stored, text, row_lse, column_lse).sum(0))


def _weigh_reference(
    exponentials: Tensor, offsets: Tensor, block_n: int, B: int, row_lse: Tensor, column_lse: Tensor
) -> _Weights:
    weights = _stored_weights(exponentials, offsets, block_n, B, row_lse, column_lse)
    padded = F.pad(weights, (0, exponentials.shape[1] - B))
    return _Weights(padded if weights.dtype == torch.float64 else padded.half())


def _launch_weigh(
    exponentials: Tensor, offsets: Tensor, block_n: int, B: int, row_lse: Tensor, column_lse: Tensor
) -> _Weights:
    stored = Stored(exponentials.clone(), offsets, block_n, row_lse)
    return _Weights(weigh_stored(stored, B, row_lse, column_lse))


def _finish_reference(parts: Tensor, own: Tensor, matching: Tensor, one_minus_p: Tensor, factor: Tensor) -> Finished:
    gradient = (parts.sum(0) / WEIGHT_UNIT - one_minus_p[:, None] * matching) * factor
    return Finished(gradient, (gradient * own).sum(1))


@dataclass(frozen=True, kw_only=True)
class _Sizes(PairSizes):
    store: bool = True
    splits: int = 1  # of the texts, in the product
    matching: torch.dtype = torch.float16  # of the texts' own embeddings

    @property
    def pairs(self) -> int:
        """Pairs of an image and a text."""
        return self.images * self.texts


def _matching_inputs(sizes: _Sizes, data: Data) -> Inputs:
    shape = (sizes.images, sizes.width)
    return {name: data.normal(*shape, dtype=sizes.matching, std=0.1) for name in ("image", "matching")}


def _weights_inputs(sizes: _Sizes, data: Data) -> Inputs:
    given = draw_pairs(sizes, data)
    own = slice(sizes.first_row, sizes.first_row + sizes.images)
    matching = _matching_reference(given["image"], given["text"][own]).cosine * given["scale"] / math.log(2)
    sums = sums_reference(**given, store=False)
    assert sums.columns is not None
    column_lse = torch.full((sizes.texts,), torch.inf, device=data.device)  # no image has the others
    column_lse[own] = torch.logaddexp2(sums.columns[own].log2(), matching).float()
    return given | {"row_lse": torch.logaddexp2(sums.rows.log2(), matching).float(), "column_lse": column_lse}


def _stored_inputs(sizes: _Sizes, data: Data) -> Inputs:
    """Draw codes of 2^(S - k + HEADROOM) with S - k in [-12, 0), some of them zero; behind the texts lies nan."""
    b, B = sizes.images, sizes.texts
    width, block_n = -(-B // 8) * 8, sums_shape(store=True, has_ids=sizes.ids).block_n
    codes = ((127 + HEADROOM - 12) << 8) + data.integers(12 << 8, b, width, dtype=torch.int32)
    codes *= data.integers(8, b, width, dtype=torch.int32) > 0
    codes[:, B:] = -1  # nan, decoded and as float16
    column_lse = data.normal(B, dtype=torch.float32, mean=8)
    column_lse[: sizes.first_row] = torch.inf
    return {
        "exponentials": codes.to(torch.int16),
        "offsets": data.integers(3, -(-B // block_n), b, dtype=torch.int32).float(),
        "block_n": block_n,
        "row_lse": data.normal(b, dtype=torch.float32, mean=8),
        "column_lse": column_lse,
    }


def _finish_inputs(sizes: _Sizes, data: Data) -> Inputs:
    shape = (sizes.images, sizes.width)
    return {
        "parts": data.normal(sizes.splits, *shape, dtype=torch.float32, std=0.1 * WEIGHT_UNIT),
        "own": data.normal(*shape, dtype=torch.float32, std=0.1),
        "matching": data.normal(*shape, dtype=sizes.matching, std=0.1),
        "one_minus_p": data.vector(sizes.images),
        "factor": torch.full((), 0.3, device=data.device),
    }


_MATCHING = Pass[_Sizes](
    "contrastive_matching",
    matching_kernel,
    _launch_matching,
    _matching_reference,
    _matching_inputs,
    traffic=lambda s: 2 * s.images * s.width * s.matching.itemsize,
)
_SUMS = Pass[_Sizes](
    "contrastive_sums",
    sums_kernel,
    _launch_sums,
    sums_reference,
    lambda sizes, data: draw_pairs(sizes, data) | {"store": sizes.store},
    traffic=lambda s: s.embedding_bytes + 2 * s.store * s.pairs,
    operations=lambda s: s.product,
    programs="grid",
)
_WEIGHTS = Pass[_Sizes](
    "contrastive_weights",
    weights_kernel,
    _launch_weights,
    _weights_reference,
    _weights_inputs,
    traffic=lambda s: s.embedding_bytes + 2 * s.pairs,
    operations=lambda s: s.product,
    programs="grid",
)
_PRODUCT = Pass[_Sizes](
    "contrastive_product",
    stored_product_kernel,
    _launch_product,
    _product_reference,
    lambda sizes, data: _stored_inputs(sizes, data) | {"text": draw_pairs(sizes, data)["text"]},
    traffic=lambda s: 2 * s.pairs + (2 * s.texts + 4 * s.images) * s.width,
    operations=lambda s: s.product,
)
_WEIGH = Pass[_Sizes](
    "contrastive_weigh",
    weigh_kernel,
    _launch_weigh,
    _weigh_reference,
    lambda sizes, data: _stored_inputs(sizes, data) | {"B": sizes.texts},
    traffic=lambda s: 4 * s.pairs,
)
_FINISH = Pass[_Sizes](
    "contrastive_finish",
    finish_kernel,
    finish_gradient,
    _finish_reference,
    _finish_inputs,
    traffic=lambda s: s.images * s.width * (4 * (s.splits + 2) + s.matching.itemsize),
)
_ODD = {name: _Sizes(**shape) for name, shape in ODD_PAIRS.items()}
_COMPILED = {listed(ids=ids): _Sizes(**ONE_OF_16_RANKS, ids=ids) for ids in (False, True)}
_PLAIN = {"": _COMPILED[""]}
CARDS = (
    Card(
        (_SUMS,),
        _Sizes,
        odd=_ODD | {f"{name}, sums alone": replace(sizes, store=False) for name, sizes in _ODD.items()},
        compiled={
            listed(ids=ids, store=store): _Sizes(**ONE_OF_16_RANKS, ids=ids, store=store)
            for ids in (False, True)
            for store in (False, True)
        },
        multiplies=True,
        least=HOPPER,
        empty=False,
    ),
    Card((_WEIGHTS,), _Sizes, odd=_ODD, compiled=_COMPILED, multiplies=True, least=HOPPER, empty=False),
    Card((_PRODUCT,), _Sizes, odd=_ODD, compiled=_PLAIN, multiplies=True, least=HOPPER, empty=False),
    Card((_MATCHING, _WEIGH), _Sizes, odd=_ODD, compiled=_PLAIN, least=HOPPER, empty=False),
    Card(
        (_FINISH,),
        _Sizes,
        odd={
            "1x8": _Sizes(width=8),
            "5x200 three parts": _Sizes(images=5, width=200, splits=3, matching=torch.float32),
        },
        compiled={
            listed(split=splits > 1, half_width_text=matching == torch.float16): _Sizes(
                **ONE_OF_16_RANKS, splits=splits, matching=matching
            )
            for splits in (1, 4)
            for matching in (torch.float16, torch.float32)
        },
        least=HOPPER,
        empty=False,
    ),
)
