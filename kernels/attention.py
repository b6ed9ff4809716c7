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
import importlib
from types import ModuleType
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend

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
    # A complex product is one fused pass on every device; the usual form with stack and negation makes four.
    pairs = torch.view_as_complex(x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)))
    turns = torch.view_as_complex(rope)  # [T, d / 2] or [B, T, d / 2]
    turns = turns.view(*turns.shape[:-1], *[1] * (x.ndim - 3), turns.shape[-1])
    return torch.view_as_real(pairs * (turns.conj() if inverse else turns)).flatten(-2).to(x.dtype)


def _rotated_heads(qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return q', k' and v, [B, T, H, d] each."""
    query_key, value = qkv.split((2, 1), dim=2)
    if rope is not None:
        query_key = rotate(query_key, rope)
    query, key = query_key.unbind(2)
    return query, key, value.squeeze(2)


def reference(qkv: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention by its formula in the inputs' own type, differentiable by autograd: the truth the kernels are held to.

    Args:
        qkv: [B, T, 3, H, d], any floating-point type.
        rope: [T, d / 2, 2] or [B, T, d / 2, 2] float32, as in `rotate`, or None.

    Returns:
        out [B, T, H * d] and lse [B, H, T].
    """
    query, key, value = _rotated_heads(qkv, rope)
    logits = torch.einsum("bihd,bjhd->bhij", query, key) * qkv.shape[-1] ** -0.5
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value)
    return out.flatten(2), logits.logsumexp(-1)


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

    They come past L1, unless KEEP: what is left of it beside shared memory is for the table of RoPE, which is read
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

    # Column sums of what was written, still in L2; in the halves above they would take registers that are not there.
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


def _launch_forward(qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
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
    return out, lse


def _launch_backward(
    d_out: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
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
    return d_qkv, d_bias.sum(0)


class _Heads(NamedTuple):
    """What a library's kernel reads, [B, H, T, d] each."""

    query: Tensor
    key: Tensor
    value: Tensor


def _sdpa_kernel(heads: _Heads) -> SDPBackend:
    """Return the kernel that `F.scaled_dot_product_attention` runs on these."""
    return SDPBackend(torch._fused_sdp_choice(*heads))


def _sdpa(heads: _Heads) -> tuple[Tensor, Tensor | None]:
    # The operators behind F.scaled_dot_product_attention, called by name: they return what a backward needs.
    if heads.query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    kernel = _sdpa_kernel(heads)
    if kernel == SDPBackend.FLASH_ATTENTION:
        return torch.ops.aten._scaled_dot_product_flash_attention(*heads)[:2]
    if kernel == SDPBackend.CUDNN_ATTENTION:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True)[:2]
        return out, lse.squeeze(-1)
    return F.scaled_dot_product_attention(*heads), None


def _sdpa_backward(d_out: Tensor, heads: _Heads, out: Tensor, lse: Tensor | None) -> tuple[Tensor, ...]:
    aten, tokens = torch.ops.aten, heads.query.shape[2]
    if lse is None:  # a kernel that keeps nothing: run it again
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in heads]
            again = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
            return torch.autograd.grad(again, leaves, d_out)
    if d_out.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(d_out, *heads, out, lse, 0.0, False)
    lengths = (None, None, tokens, tokens)  # cumulative lengths are for batches of unequal ones
    if _sdpa_kernel(heads) == SDPBackend.CUDNN_ATTENTION:
        seed = offset = torch.empty((), dtype=torch.int64, device=d_out.device)  # of a dropout that there is not
        return aten._scaled_dot_product_cudnn_attention_backward(
            d_out, *heads, out, lse.unsqueeze(-1), seed, offset, None, *lengths, 0.0, False
        )
    state = torch.empty(2, dtype=torch.uint64, device=d_out.device)
    return aten._scaled_dot_product_flash_attention_backward(
        d_out, *heads, out, lse, *lengths, 0.0, False, state, state[0]
    )


def _flash_attn(backend: Backend) -> ModuleType:
    name = "flash_attn.cute.interface" if backend == "flash-attn-4" else "flash_attn.flash_attn_interface"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"attention backend {backend!r} needs {name}, which does not import ({error}): install {backend}, or choose"
            " triton or sdpa"
        ) from error


def _library_forward(backend: Backend, heads: _Heads) -> tuple[Tensor, Tensor | None]:
    if backend == "sdpa":
        return _sdpa(heads)
    library = _flash_attn(backend)
    rows = [x.transpose(1, 2) for x in heads]  # [B, T, H, d]
    if backend == "flash-attn-4":
        out, lse = library._flash_attn_fwd(*rows, return_lse=True)[:2]
    else:
        scale = rows[0].shape[-1] ** -0.5
        out, lse = library._wrapped_flash_attn_forward(*rows, 0.0, scale, False, -1, -1, 0.0, None, False)[:2]
    return out.transpose(1, 2), lse


def _library_backward(
    backend: Backend, d_out: Tensor, heads: _Heads, out: Tensor, lse: Tensor | None
) -> tuple[Tensor, ...]:
    if backend == "sdpa":
        return _sdpa_backward(d_out, heads, out, lse)
    library = _flash_attn(backend)
    d_out, out, *rows = (x.transpose(1, 2) for x in (d_out, out, *heads))  # [B, T, H, d]
    if backend == "flash-attn-4":
        gradients = library._flash_attn_bwd(*rows, out, d_out, lse)[:3]
    else:
        gradients = tuple(torch.empty_like(x) for x in rows)
        scale = rows[0].shape[-1] ** -0.5
        library._wrapped_flash_attn_backward(
            d_out, *rows, out, lse, *gradients, 0.0, scale, False, -1, -1, 0.0, None, False
        )
    return tuple(x.transpose(1, 2) for x in gradients)


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
    hopper = torch.cuda.get_device_capability(qkv.device) >= (9, 0)
    return "triton" if hopper and not _refusal_of_triton(qkv) else "sdpa"


def _refusal_of_triton(qkv: Tensor) -> str | None:
    """Say what the Triton kernels take where they do not take this."""
    if not qkv.is_cuda or qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16 on a GPU, not {qkv.dtype} on {qkv.device.type}"
    if qkv.shape[1] > LONGEST or qkv.shape[-1] != HEAD_DIM:
        wanted = f"up to {LONGEST} tokens and heads of {HEAD_DIM} channels"
        return f"takes {wanted}, not {qkv.shape[1]} and {qkv.shape[-1]}"
    major, minor = torch.cuda.get_device_capability(qkv.device)
    if major < 8:
        return f"takes GPUs of compute capability 8.0 and later, not {major}.{minor}"
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
) -> tuple[Tensor, Tensor | None]:
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
        heads = _Heads(*(x.transpose(1, 2) for x in _rotated_heads(qkv, rope)))
        out, lse = _library_forward(chosen, heads)
        return out.transpose(1, 2).flatten(2), lse


def attention_backward(
    d_out: Tensor,  # [B, T, H * d]
    qkv: Tensor,  # [B, T, 3, H, d]
    rope: Tensor | None,  # [T, d / 2, 2] or [B, T, d / 2, 2] float32
    out: Tensor,  # [B, T, H * d]
    lse: Tensor | None,  # [B, H, T]
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
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
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            (d_qkv,) = torch.autograd.grad(reference(leaf, rope)[0], leaf, d_out)
    else:
        with torch.no_grad():
            heads = _Heads(*(x.transpose(1, 2) for x in _rotated_heads(qkv, rope)))
            d_rows, rows = (x.unflatten(-1, (heads_count, head_dim)).transpose(1, 2) for x in (d_out, out))
            d_query, d_key, d_value = _library_backward(chosen, d_rows, heads, rows, lse)
            d_qkv = torch.empty_like(qkv)
            for n, gradient in enumerate((d_query, d_key, d_value)):
                gradient = gradient.transpose(1, 2)  # [B, T, H, d]
                d_qkv[:, :, n] = rotate(gradient, rope, inverse=True) if rope is not None and n < 2 else gradient
    return d_qkv, d_qkv.sum((0, 1), dtype=torch.promote_types(qkv.dtype, torch.float32)).flatten()
