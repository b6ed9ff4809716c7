"""Self-attention on the packed output of one linear layer, [B, T, 3, H, d], with RoPE on the way in.

B images, T tokens, H heads of d channels. With q', k' the rotated queries and keys of a head, s = 1 / sqrt(d):

    P = softmax(s q' k'ᵀ),  out = P v,  lse_i = log Σ_j exp(s q'_i·k'_j)
    dv = Pᵀ dout,  dS = P ∘ (dout vᵀ - δ),  δ_i = dout_i·out_i,  dq' = s dS k',  dk' = s dSᵀ q'

and dq, dk are dq', dk' turned back. q', k' and P are rounded to the inputs' type before a product, sums are float32.

The Triton kernels are for short sequences, T <= 256: one program for an image and a head. The forward program keeps
keys and values in shared memory and a block of 64 queries' whole rows of logits in registers: one softmax, no running
maximum. The backward program goes over the head twice, over blocks of queries for dq and over blocks of keys for dk
and dv. That is seven products where five would do, but no partial sum leaves the registers: nothing is added in memory,
and every run gives the same bits. (Five leave no room for a second program on the multiprocessor: dk and dv of all keys
fill the registers of eight warps, which then take 32 queries at a time. Products so narrow are bound by shared memory:
by count 13,400 cycles a head at T = 197 where these seven take 11,600.)
Columns come in parts of 128 or 64, 32 and 16, rows in blocks of 64 of which the last overlaps the one before: 208 × 256
for 197 × 197, so 73 % of the products count. Pairs of channels lie side by side in a thread's registers, so that
rotating moves nothing between threads. Nothing is transposed or copied: q, k, v are read, and their gradients written,
in place.

Floor at T = 197, d = 64 in 16 bits: 4 T d numbers read and written forward and 8 T d backward, 0.4 and 0.8 µs an image
of 12 heads at 3 TB/s, against 0.21 and 0.72 µs of products (padding and repeats counted) at 790 TFLOP/s. Not measured.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, cast, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_libraries import PEERS, Heads, Library, library_backward, library_forward, prepare_peer
from .card import Card, Data, Inputs, Pass, TowerSizes, inputs_behind
from .device import AMPERE, HOPPER, capability_of

Backend = Literal["reference", "triton", "sdpa", "flash-attn", "flash-attn-4"]

# The fastest backend, forward and backward together, by GPU name and T, for 64 channels a head in 16 bits. Empty: no
# GPU has been measured yet.
MEASURED: dict[tuple[str, int], Backend] = {}

LONGEST = 256  # tokens; a row of logits of more does not fit in registers
HEAD_DIM = 64  # channels of a head in the Triton kernels
BLOCK = 64  # rows of one wgmma
FORWARD_PART = 128  # columns of one wgmma, at most
BACKWARD_PART = 64  # there two tiles lie in registers at once; with 128 columns they spill
# Triton 3.10 no longer fuses multiplications and additions where it is not asked to.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
LOG2E = tl.constexpr(1.4426950408889634)


class Attention(NamedTuple):
    """What `attention` returns."""

    out: Tensor  # [B, T, H * d]
    lse: Tensor | None  # [B, H, T] float32


class AttentionGradients(NamedTuple):
    """What `attention_backward` returns."""

    d_qkv: Tensor  # [B, T, 3, H, d]
    d_qkv_sum: Tensor  # [3 * H * d] float32


def rotate(x: Tensor, rope: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate neighbouring pairs of channels by the angle of their token (RoPE, https://arxiv.org/abs/2104.09864).

    Args:
        x: [B, T, *, d], channels contiguous.
        rope: [T, d / 2, 2] float32, cosine and sine; a token without a position has cosine 1 and sine 0. Or
            [B, T, d / 2, 2], where images keep tokens of different positions.
        inverse: turn back, which is also what takes the gradient of rotated channels to that of the channels.

    Returns:
        Like x, in x's dtype; the rotation itself is done in float32 (float64 for float64 x).
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    rope = rope.view(*rope.shape[:-2], *[1] * (x.ndim - 3), *rope.shape[-2:])
    if torch.compiler.is_compiling():  # a compiler makes one pass of this, and does not fuse complex products
        (even, odd), (cosine, sine) = pairs.unbind(-1), rope.unbind(-1)
        sine = -sine if inverse else sine
        turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    else:  # a complex product is one fused pass on every device; the form above makes four
        turns = torch.view_as_complex(rope)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * (turns.conj() if inverse else turns))
    return turned.flatten(-2).to(x.dtype)


def _rotated_heads(qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return q', k' and v, [B, T, H, d] each."""
    query_key, value = qkv.split((2, 1), dim=2)
    if rope is not None:
        query_key = rotate(query_key, rope)
    query, key = query_key.unbind(2)
    return query, key, value.squeeze(2)


def reference(qkv: Tensor, rope: Tensor | None = None) -> Attention:
    """Attention by its formula in float32, differentiable by autograd: in float64 the truth the kernels are held to.

    Args:
        qkv: [B, T, 3, H, d], any floating-point type.
        rope: [T, d / 2, 2] or [B, T, d / 2, 2] float32, as in `rotate`, or None.

    Returns:
        out [B, T, H * d] in qkv's type and lse [B, H, T] in float32; in float64 for float64.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    query, key, value = (x.to(wide) for x in _rotated_heads(qkv, rope))
    logits = torch.einsum("bihd,bjhd->bhij", query, key) * qkv.shape[-1] ** -0.5
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value)
    return Attention(out.flatten(2).to(qkv.dtype), logits.logsumexp(-1))


def _reference_backward(
    d_out: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor, lse: Tensor | None
) -> AttentionGradients:
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        (d_qkv,) = torch.autograd.grad(reference(leaf, rope).out, leaf, d_out)
    return _summed(d_qkv)


def _summed(d_qkv: Tensor) -> AttentionGradients:
    return AttentionGradients(d_qkv, d_qkv.sum((0, 1), dtype=torch.promote_types(d_qkv.dtype, torch.float32)).flatten())


def _by_library(backend: Library, qkv: Tensor, rope: Tensor | None) -> Attention:
    heads = Heads(*(x.transpose(1, 2) for x in _rotated_heads(qkv, rope)))
    out, lse = library_forward(backend, heads)
    return Attention(out.transpose(1, 2).flatten(2), lse)


def _by_library_backward(
    backend: Library, d_out: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor, lse: Tensor | None
) -> AttentionGradients:
    heads = Heads(*(x.transpose(1, 2) for x in _rotated_heads(qkv, rope)))
    d_rows, rows = (x.unflatten(-1, qkv.shape[-2:]).transpose(1, 2) for x in (d_out, out))
    d_qkv = torch.empty_like(qkv)
    for n, gradient in enumerate(library_backward(backend, d_rows, heads, rows, lse)):
        gradient = gradient.transpose(1, 2)  # [B, T, H, d]
        d_qkv[:, :, n] = rotate(gradient, rope, inverse=True) if rope is not None and n < 2 else gradient
    return _summed(d_qkv)


@triton.jit
def load_rows(
    base,
    stride,
    first,
    SIZE: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD: tl.constexpr,
    KEEP: tl.constexpr = False,
):
    """Load SIZE tokens of a head from token `first` on; without WHOLE some may lie beyond T, and are zero.

    They come past L1, unless KEEP: what shared memory leaves of it is for the table of RoPE, which is read
    over and over and takes twice the bytes of a head's queries.
    """
    CACHE: tl.constexpr = "" if KEEP else ".cg"
    t = first + tl.arange(0, SIZE)
    at = base + t[:, None] * stride + tl.arange(0, HEAD)[None, :]
    if WHOLE:
        return tl.load(at, cache_modifier=CACHE)
    else:
        return tl.load(at, mask=(t < T)[:, None], other=0.0, cache_modifier=CACHE)


@triton.jit
def store_rows(base, stride, first, x, T: tl.constexpr, WHOLE: tl.constexpr):
    """Store tokens as `load_rows` loads them."""
    t = first + tl.arange(0, x.shape[0])
    at = base + t[:, None] * stride + tl.arange(0, x.shape[1])[None, :]
    if WHOLE:
        tl.store(at, x.to(base.dtype.element_ty))
    else:
        tl.store(at, x.to(base.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit
def load_numbers(base, first, SIZE: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr):
    """Load one number for each of SIZE tokens, as `load_rows` loads their rows."""
    t = first + tl.arange(0, SIZE)
    if WHOLE:
        return tl.load(base + t)
    else:
        return tl.load(base + t, mask=t < T, other=0.0)


@triton.jit
def store_numbers(base, first, x, T: tl.constexpr, WHOLE: tl.constexpr):
    """Store them."""
    t = first + tl.arange(0, x.shape[0])
    if WHOLE:
        tl.store(base + t, x)
    else:
        tl.store(base + t, x, mask=t < T)


@triton.jit
def turn(x, rope, first, INVERSE: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr):
    """Rotate tokens [SIZE, HEAD] from token `first` on, in float32."""
    SIZE: tl.constexpr = x.shape[0]
    HEAD: tl.constexpr = x.shape[1]
    table = load_rows(rope, HEAD, first, SIZE, T, WHOLE, HEAD, KEEP=True)
    cosine, sine = tl.split(tl.reshape(table, (SIZE, HEAD // 2, 2)))
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (SIZE, HEAD // 2, 2)))
    if INVERSE:
        sine = -sine
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (SIZE, HEAD))


@triton.jit
def load_turned(
    base, stride, rope, first, SIZE: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr, HEAD: tl.constexpr
):
    """Load tokens of a head and rotate them, in their own type."""
    x = load_rows(base, stride, first, SIZE, T, WHOLE, HEAD)
    if rope is not None:
        x = turn(x, rope, first, False, T, WHOLE).to(x.dtype)
    return x


@triton.jit
def attention_kernel(
    qkv,  # [B, T, 3, H, HEAD]
    rope,  # [T, HEAD / 2, 2] or [B, T, HEAD / 2, 2] float32, or None
    out,  # [B, T, H, HEAD]
    lse,  # [B, H, T] float32
    scale,
    T: tl.constexpr,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,  # from one image's table to the next one's: 0 where all share one
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # (first, size, whole) of each part of the columns
):
    image = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    WIDTH: tl.constexpr = H * HEAD
    STRIDE: tl.constexpr = 3 * WIDTH
    WHOLE: tl.constexpr = T >= BLOCK
    query = qkv + image * T * STRIDE + head * HEAD
    own_out = out + image * T * WIDTH + head * HEAD
    own_lse = lse + tl.program_id(0).to(tl.int64) * T
    unit = scale * LOG2E
    if rope is not None:
        rope += image * ROPE_STRIDE

    keys = tl.tuple([])
    values = tl.tuple([])
    for p in tl.static_range(len(PARTS)):
        k = load_turned(query + WIDTH, STRIDE, rope, PARTS[p][0], PARTS[p][1], T, PARTS[p][2], HEAD)
        v = load_rows(query + 2 * WIDTH, STRIDE, PARTS[p][0], PARTS[p][1], T, PARTS[p][2], HEAD)
        keys += (k,)
        values += (v,)

    # The queries are a value of the loop, or the compiler keeps this operand in registers and not in shared memory.
    first = 0
    q = load_turned(query, STRIDE, rope, first, BLOCK, T, WHOLE, HEAD)
    # Without LICM: what it moves out of the loop takes the registers of a third program on the multiprocessor.
    for block in tl.range(0, T, BLOCK, disable_licm=True):
        logits = tl.tuple([])
        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        for p in tl.static_range(len(PARTS)):
            part = tl.dot(q, keys[p].T)  # [BLOCK, size]
            if not PARTS[p][2]:
                part = tl.where((PARTS[p][0] + tl.arange(0, PARTS[p][1]) < T)[None, :], part, float("-inf"))
            peak = tl.maximum(peak, tl.max(part, 1))
            logits += (part,)
        total = tl.zeros((BLOCK,), tl.float32)
        o = tl.zeros((BLOCK, HEAD), tl.float32)
        for p in tl.static_range(len(PARTS)):
            weight = tl.exp2(logits[p] * unit - (peak * unit)[:, None])
            total += tl.sum(weight, 1)
            o = tl.dot(weight.to(q.dtype), values[p], o)

        store_rows(own_out, WIDTH, first, o * (1.0 / total)[:, None], T, WHOLE)
        store_numbers(own_lse, first, peak * scale + tl.log(total), T, WHOLE)
        if T > BLOCK:
            # The last block ends with the last token; rows that it shares with the one before come out the same.
            first = tl.minimum(block + BLOCK, T - BLOCK)
            q = load_turned(query, STRIDE, rope, first, BLOCK, T, WHOLE, HEAD)


@triton.jit
def attention_backward_kernel(
    qkv,  # [B, T, 3, H, HEAD]
    rope,  # [T, HEAD / 2, 2] or [B, T, HEAD / 2, 2] float32, or None
    out,  # [B, T, H, HEAD]
    lse,  # [B, H, T] float32
    d_out,  # [B, T, H, HEAD]
    d_qkv,  # [B, T, 3, H, HEAD]
    d_bias,  # [B, 3, H, HEAD] float32: the image's share of the bias gradient
    of_rows,  # [B, H, 2, PADDED] float32, between the two halves: lse in base 2, and δ
    scale,
    T: tl.constexpr,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,  # from one image's table to the next one's: 0 where all share one
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # (first, size, whole) of each part of the columns
):
    image = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    WIDTH: tl.constexpr = H * HEAD
    STRIDE: tl.constexpr = 3 * WIDTH
    WHOLE: tl.constexpr = T >= BLOCK
    query = qkv + image * T * STRIDE + head * HEAD
    d_query = d_qkv + image * T * STRIDE + head * HEAD
    own_out = out + image * T * WIDTH + head * HEAD
    own_d_out = d_out + image * T * WIDTH + head * HEAD
    own_lse = lse + tl.program_id(0).to(tl.int64) * T
    PADDED: tl.constexpr = (T + 15) // 16 * 16  # the aligned rows are read by two numbers at once
    own_lse2 = of_rows + tl.program_id(0).to(tl.int64) * 2 * PADDED
    own_delta = own_lse2 + PADDED
    own_bias = d_bias + image * STRIDE + head * HEAD + tl.arange(0, HEAD)
    unit = scale * LOG2E
    if rope is not None:
        rope += image * ROPE_STRIDE

    # First half: dq, and the numbers of rows for the second, by blocks of queries [BLOCK, .] against all keys.
    keys = tl.tuple([])
    values = tl.tuple([])
    for p in tl.static_range(len(PARTS)):
        k = load_turned(query + WIDTH, STRIDE, rope, PARTS[p][0], PARTS[p][1], T, PARTS[p][2], HEAD)
        v = load_rows(query + 2 * WIDTH, STRIDE, PARTS[p][0], PARTS[p][1], T, PARTS[p][2], HEAD)
        keys += (k,)
        values += (v,)
    first = 0
    q = load_turned(query, STRIDE, rope, first, BLOCK, T, WHOLE, HEAD)
    d_o = load_rows(own_d_out, WIDTH, first, BLOCK, T, WHOLE, HEAD)
    for block in range(0, T, BLOCK):
        o = load_rows(own_out, WIDTH, first, BLOCK, T, WHOLE, HEAD)
        row_delta = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), 1)
        row_lse2 = load_numbers(own_lse, first, BLOCK, T, WHOLE) * LOG2E
        store_numbers(own_lse2, first, row_lse2, T, WHOLE)
        store_numbers(own_delta, first, row_delta, T, WHOLE)
        d_q = tl.zeros((BLOCK, HEAD), tl.float32)
        for p in tl.static_range(len(PARTS)):
            logits = tl.dot(q, keys[p].T)  # [BLOCK, size]
            if not PARTS[p][2]:
                logits = tl.where((PARTS[p][0] + tl.arange(0, PARTS[p][1]) < T)[None, :], logits, float("-inf"))
            weight = tl.exp2(logits * unit - row_lse2[:, None])
            d_logits = weight * (tl.dot(d_o, values[p].T) - row_delta[:, None])
            d_q = tl.dot(d_logits.to(q.dtype), keys[p], d_q)
        d_q = d_q * scale
        if rope is not None:
            d_q = turn(d_q, rope, first, True, T, WHOLE)
        store_rows(d_query, STRIDE, first, d_q, T, WHOLE)
        if T > BLOCK:
            first = tl.minimum(block + BLOCK, T - BLOCK)
            q = load_turned(query, STRIDE, rope, first, BLOCK, T, WHOLE, HEAD)
            d_o = load_rows(own_d_out, WIDTH, first, BLOCK, T, WHOLE, HEAD)

    # Second half: dk and dv, by blocks of keys [BLOCK, .] against all queries. It reads what other threads wrote.
    tl.debug_barrier()
    queries = tl.tuple([])
    d_outs = tl.tuple([])
    for p in tl.static_range(len(PARTS)):
        q = load_turned(query, STRIDE, rope, PARTS[p][0], PARTS[p][1], T, PARTS[p][2], HEAD)
        d_o = load_rows(own_d_out, WIDTH, PARTS[p][0], PARTS[p][1], T, PARTS[p][2], HEAD)
        queries += (q,)
        d_outs += (d_o,)
    first = 0
    k = load_turned(query + WIDTH, STRIDE, rope, first, BLOCK, T, WHOLE, HEAD)
    v = load_rows(query + 2 * WIDTH, STRIDE, first, BLOCK, T, WHOLE, HEAD)
    for block in range(0, T, BLOCK):
        d_k = tl.zeros((BLOCK, HEAD), tl.float32)
        d_v = tl.zeros((BLOCK, HEAD), tl.float32)
        for p in tl.static_range(len(PARTS)):
            # Queries beyond the end need no mask: their logits, rows of d_out and δ are zero. Rows of keys beyond the
            # end are not stored, whatever they hold.
            column_lse2 = load_numbers(own_lse2, PARTS[p][0], PARTS[p][1], T, PARTS[p][2])
            column_delta = load_numbers(own_delta, PARTS[p][0], PARTS[p][1], T, PARTS[p][2])
            weight = tl.exp2(tl.dot(k, queries[p].T) * unit - column_lse2[None, :])  # [BLOCK, size]
            d_v = tl.dot(weight.to(k.dtype), d_outs[p], d_v)
            d_logits = weight * (tl.dot(v, d_outs[p].T) - column_delta[None, :])
            d_k = tl.dot(d_logits.to(k.dtype), queries[p], d_k)
        d_k = d_k * scale
        if rope is not None:
            d_k = turn(d_k, rope, first, True, T, WHOLE)
        store_rows(d_query + WIDTH, STRIDE, first, d_k, T, WHOLE)
        store_rows(d_query + 2 * WIDTH, STRIDE, first, d_v, T, WHOLE)
        if T > BLOCK:
            first = tl.minimum(block + BLOCK, T - BLOCK)
            k = load_turned(query + WIDTH, STRIDE, rope, first, BLOCK, T, WHOLE, HEAD)
            v = load_rows(query + 2 * WIDTH, STRIDE, first, BLOCK, T, WHOLE, HEAD)

    # Column sums of what was written, still in L2; computing them in the two loops above would spill.
    tl.debug_barrier()
    for which in range(3):
        total = tl.zeros((BLOCK, HEAD), tl.float32)
        for begin in tl.static_range(0, T, BLOCK):
            rows = load_rows(d_query + which * WIDTH, STRIDE, begin, BLOCK, T, begin + BLOCK <= T, HEAD)
            total += rows.to(tl.float32)
        tl.store(own_bias + which * WIDTH, tl.sum(total, 0))


@functools.cache
def _column_parts(tokens: int, largest: int) -> tuple[tuple[int, int, bool], ...]:
    """Cut the columns, up to a multiple of 16, into parts from `largest` down to 16: (first, size, without padding)."""
    parts = []
    first = 0
    while first < tokens:
        left = -(-(tokens - first) // 16) * 16
        size = min(largest, 1 << left.bit_length() - 1)
        parts.append((first, size, first + size <= tokens))
        first += size
    return tuple(parts)


def _rope_stride(rope: Tensor | None) -> int:
    """Return the step from one image's table to the next one's."""
    return 0 if rope is None or rope.ndim == 3 else rope.stride(0)


def _launch_forward(qkv: Tensor, rope: Tensor | None) -> Attention:
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    attention_kernel[(batch * heads,)](
        qkv,
        rope,
        out,
        lse,
        head_dim**-0.5,
        T=tokens,
        H=heads,
        HEAD=head_dim,
        ROPE_STRIDE=_rope_stride(rope),
        BLOCK=BLOCK,
        PARTS=_column_parts(tokens, FORWARD_PART),
        **OPTIONS,
    )
    return Attention(out, lse)


def _launch_backward(d_out: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor, lse: Tensor) -> AttentionGradients:
    batch, tokens, _, heads, head_dim = qkv.shape
    d_qkv = torch.empty_like(qkv)
    d_bias = qkv.new_empty(batch, 3 * heads * head_dim, dtype=torch.float32)
    attention_backward_kernel[(batch * heads,)](
        qkv,
        rope,
        out,
        lse,
        d_out,
        d_qkv,
        d_bias,
        qkv.new_empty(batch, heads, 2, triton.cdiv(tokens, 16) * 16, dtype=torch.float32),
        head_dim**-0.5,
        T=tokens,
        H=heads,
        HEAD=head_dim,
        ROPE_STRIDE=_rope_stride(rope),
        BLOCK=BLOCK,
        PARTS=_column_parts(tokens, BACKWARD_PART),
        **OPTIONS,
    )
    return AttentionGradients(d_qkv, d_bias.sum(0))


def _chosen(backend: str, qkv: Tensor) -> Backend:
    if backend != "auto":
        if backend not in get_args(Backend):
            raise ValueError(
                f"attention backend {backend!r} is unknown: choose from auto, {', '.join(get_args(Backend))}"
            )
        if backend == "triton" and (refusal := _refusal_of_triton(qkv)):
            raise ValueError(f"attention backend 'triton' {refusal}: choose sdpa or auto")
        return cast(Backend, backend)
    if not qkv.is_cuda or qkv.shape[-1] != HEAD_DIM or qkv.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    measured = MEASURED.get((torch.cuda.get_device_name(qkv.device), qkv.shape[1]))
    if measured is not None:
        return measured
    return "triton" if capability_of(qkv.device) >= HOPPER and not _refusal_of_triton(qkv) else "sdpa"


def _refusal_of_triton(qkv: Tensor) -> str | None:
    """Return why the Triton kernels do not take this input, or None where they do."""
    if not qkv.is_cuda or qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16 on a GPU, not {qkv.dtype} on {qkv.device.type}"
    if qkv.shape[1] > LONGEST or qkv.shape[-1] != HEAD_DIM:
        wanted = f"up to {LONGEST} tokens and heads of {HEAD_DIM} channels"
        return f"takes {wanted}, not {qkv.shape[1]} and {qkv.shape[-1]}"
    capability = capability_of(qkv.device)
    if capability < AMPERE:
        return f"takes GPUs of compute capability 8.0 and later, not {'.'.join(map(str, capability))}"
    return None


def _check(qkv: Tensor, rope: Tensor | None) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.is_contiguous():
        raise ValueError(
            f"qkv has shape {list(qkv.shape)} and strides {list(qkv.stride())}: give a contiguous"
            " [batch, tokens, 3, heads, head_dim]"
        )
    if rope is None:
        return
    table = (qkv.shape[1], qkv.shape[-1] // 2, 2)
    shapes = (table, (qkv.shape[0], *table))
    if rope.shape not in shapes or rope.dtype != torch.float32 or not rope.is_contiguous():
        raise ValueError(
            f"rope is {rope.dtype} of shape {list(rope.shape)}: give a contiguous float32 table of shape"
            f" {list(shapes[0])}, or {list(shapes[1])} for a table an image"
        )


def attention(
    qkv: Tensor,  # [B, T, 3, H, d]
    rope: Tensor | None,  # [T, d / 2, 2] or [B, T, d / 2, 2] float32
    *,
    backend: str = "auto",
) -> Attention:
    """Attend from every token to every token of its image. Not recorded by autograd: `attention_backward` goes back.

    Args:
        qkv: contiguous [B, T, 3, H, d], as a linear layer to 3 * H * d channels writes it.
        rope: contiguous float32 [T, d / 2, 2], cosine and sine, by which neighbouring pairs of channels of queries and
            keys turn; [B, T, d / 2, 2] where each image has its own (patches dropped at random); None for none.
        backend:
            ``triton``: the kernels of this file, for float16 and bfloat16, up to 256 tokens, heads of 64 channels, GPUs
            of compute capability 8.0 and later.
            ``sdpa``: what `F.scaled_dot_product_attention` runs for these inputs, on any device and in any type.
            ``flash-attn``, ``flash-attn-4``: these packages, where they are installed.
            ``reference``: the formula.
            ``auto``: what MEASURED names for this GPU and T, where it does. Elsewhere ``triton`` for what it takes on
            GPUs of compute capability 9.0 and later, ``sdpa`` for the rest: older GPUs, long sequences, a CPU.

    Returns:
        out [B, T, H * d] in qkv's type, and the logarithms of the softmax's denominators [B, H, T] in float32 (float64
        for float64), or None where the backend keeps none. `attention_backward` takes both.

    Raises:
        ValueError: tensors of another shape, type or layout, an unknown backend, or one that cannot be had.
    """
    _check(qkv, rope)
    chosen = _chosen(backend, qkv)
    with torch.no_grad():
        if chosen == "triton":
            return _launch_forward(qkv, rope)
        if chosen == "reference":
            return reference(qkv, rope)
        return _by_library(chosen, qkv, rope)


def attention_backward(
    d_out: Tensor,  # [B, T, H * d]
    qkv: Tensor,  # [B, T, 3, H, d]
    rope: Tensor | None,  # [T, d / 2, 2] or [B, T, d / 2, 2] float32
    out: Tensor,  # [B, T, H * d]
    lse: Tensor | None,  # [B, H, T]
    *,
    backend: str = "auto",
) -> AttentionGradients:
    """Return the gradients of `attention` with respect to qkv and to the bias of the layer that made it.

    Args:
        d_out: contiguous gradient of out, in its type.
        qkv: as given to `attention`; rope and backend too.
        rope: see there.
        out: what `attention` returned; lse too.
        lse: see there.
        backend: see there.

    Returns:
        d_qkv [B, T, 3, H, d] in qkv's type; and its sum over images and tokens [3 * H * d] in float32 (float64 for
        float64). ``triton`` gives the same bits in every run.

    Raises:
        ValueError: as `attention`.
    """
    _check(qkv, rope)
    batch, tokens, _, heads_count, head_dim = qkv.shape
    for name, x in (("d_out", d_out), ("out", out)):
        if x.shape != (batch, tokens, heads_count * head_dim) or x.dtype != qkv.dtype or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} of shape {list(x.shape)} and strides {list(x.stride())}: give a contiguous"
                f" {qkv.dtype} of shape {[batch, tokens, heads_count * head_dim]}"
            )
    chosen = _chosen(backend, qkv)
    if chosen == "triton":
        if lse is None:
            raise ValueError(
                "lse is None: give attention_backward the backend that attention had, which was not triton"
            )
        return _launch_backward(d_out, qkv, rope, out, lse)
    if chosen == "reference":
        return _reference_backward(d_out, qkv, rope, out, lse)
    with torch.no_grad():
        return _by_library_backward(chosen, d_out, qkv, rope, out, lse)


@dataclass(frozen=True, kw_only=True)
class _Sizes(TowerSizes):
    table_an_image: bool = False  # of RoPE, as where images keep different patches


def _inputs(sizes: _Sizes, data: Data) -> Inputs:
    head_dim = sizes.width // sizes.heads
    qkv = data.normal(sizes.images, sizes.tokens, 3, sizes.heads, head_dim, dtype=sizes.dtype)
    if not sizes.rotary:
        return {"qkv": qkv, "rope": None}
    tables = (sizes.images,) if sizes.table_an_image else ()
    angles = data.normal(*tables, sizes.tokens, head_dim // 2, dtype=torch.float32, std=2.0)
    angles[..., 0, :] = 0  # the class token
    return {"qkv": qkv, "rope": torch.stack((angles.cos(), angles.sin()), dim=-1)}


def _token_bytes(sizes: _Sizes) -> float:
    return sizes.rows * sizes.width * sizes.dtype.itemsize


def _product(sizes: _Sizes) -> float:
    """Return the operations of one product, such as queries with keys."""
    return 2 * sizes.rows * sizes.tokens * sizes.width


# Benchmarks compare with torch's own attention: the reference holds [B, H, T, T], which nobody does.
_FORWARD = Pass[_Sizes](
    "attention",
    attention_kernel,
    _launch_forward,
    reference,
    _inputs,
    traffic=lambda s: 4 * _token_bytes(s),
    operations=lambda s: 2 * _product(s),
    baseline=partial(_by_library, "sdpa"),
    programs=lambda s: 3 if s.tokens <= 197 else 2,
)
_BACKWARD = Pass[_Sizes](
    "attention_backward",
    attention_backward_kernel,
    _launch_backward,
    _reference_backward,
    lambda sizes, data: inputs_behind(_FORWARD, _launch_backward, sizes, data),
    traffic=lambda s: 8 * _token_bytes(s),
    operations=lambda s: 5 * _product(s),
    baseline=partial(_by_library_backward, "sdpa"),
    programs=lambda s: 2,
    gradients_of=_FORWARD,
)


# Libraries have no RoPE, take query, key and value apart, and return their gradients apart: what they are compared with
# are the same kernels without RoPE, and views of what these return.
class _Apart(NamedTuple):
    out: Tensor  # [B, T, H, d]
    lse: Tensor | None


class _ApartGradients(NamedTuple):
    d_query: Tensor  # [B, T, H, d], as the next two
    d_key: Tensor
    d_value: Tensor


def _apart(run: Callable[..., Attention]) -> Callable[[Tensor], _Apart]:
    """Return a forward pass on [B, T, 3, H, d] without RoPE."""

    def attend(packed: Tensor) -> _Apart:
        out, lse = run(packed, None)
        return _Apart(out.unflatten(-1, packed.shape[-2:]), lse)

    return attend


def _apart_backward(run: Callable[..., AttentionGradients]) -> Callable[..., _ApartGradients]:
    """Return its backward pass."""

    def attend(d_out: Tensor, packed: Tensor, out: Tensor, lse: Tensor) -> _ApartGradients:
        return _ApartGradients(*run(d_out.flatten(2), packed, None, out.flatten(2), lse).d_qkv.unbind(2))

    return attend


_FORWARD_APART = Pass[_Sizes](
    "attention_without_rope",
    None,
    _apart(_launch_forward),
    _apart(reference),
    lambda sizes, data: {"packed": _inputs(sizes, data)["qkv"]},
    traffic=_FORWARD.traffic,
    operations=_FORWARD.operations,
    baseline=_apart(partial(_by_library, "sdpa")),
    libraries={name: partial(prepare_peer, name) for name in PEERS},
)
_BACKWARD_APART = Pass[_Sizes](
    "attention_without_rope_backward",
    None,
    _apart_backward(_launch_backward),
    _apart_backward(_reference_backward),
    lambda sizes, data: inputs_behind(_FORWARD_APART, _apart_backward(_launch_backward), sizes, data),
    traffic=_BACKWARD.traffic,
    operations=_BACKWARD.operations,
    baseline=_apart_backward(partial(_by_library_backward, "sdpa")),
    libraries={name: partial(prepare_peer, name) for name in PEERS},
)
_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32


def _sizes(images: int, tokens: int, heads: int, dtype: torch.dtype, tables: int) -> _Sizes:
    """Return sizes with heads of 64 channels and 0, 1 or more tables of RoPE."""
    return _Sizes(
        images=images,
        tokens=tokens,
        width=heads * HEAD_DIM,
        heads=heads,
        dtype=dtype,
        rotary=tables > 0,
        table_an_image=tables > 1,
    )


CARDS = (
    Card(
        (_FORWARD, _BACKWARD),
        _Sizes,
        odd={
            f"{tokens} tokens, heads: {heads}, {dtype}, RoPE tables: {tables}": _sizes(2, tokens, heads, dtype, tables)
            for tokens, heads, dtype, tables in (
                *((5, 1, _F16, 1), (5, 3, _F32, 2), (17, 12, _F16, 0), (50, 3, _F32, 1), (64, 1, _F16, 1)),
                *((65, 2, _F32, 0), (65, 2, _F16, 1), (70, 1, _F16, 2), (113, 1, _F32, 1), (113, 1, _F16, 0)),
                *((197, 3, _F16, 1), (197, 2, _F32, 2), (256, 1, _F16, 1), (256, 1, _F32, 0), (256, 1, _BF16, 1)),
                (197, 2, _BF16, 1),
            )
        },
        compiled={
            f"{tokens} tokens, {dtype}, RoPE tables: {tables}": _sizes(512, tokens, 12, dtype, tables)
            for tokens, tables, dtype in (
                *((197, 1, _BF16), (197, 512, _BF16), (197, 0, _BF16), (197, 1, _F16), (192, 512, _BF16)),
                *((50, 0, _BF16), (65, 1, _BF16), (256, 1, _BF16)),
            )
        },
        multiplies=True,
    ),
    Card(
        (_FORWARD_APART, _BACKWARD_APART),
        _Sizes,
        odd={"65 tokens": _sizes(2, 65, 2, _F16, 0)},
        compiled={},
        multiplies=True,
    ),
)
