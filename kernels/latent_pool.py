"""Attention pooling by one query for H heads, absorbed into the tokens' space, in one pass over [B, T, D].

B images, T tokens x_t of D channels, one absorbed query a_h [D] for each head:

    s_th = x_t·a_h,  P = softmax over t,  pooled_h = Σ_t P_th x_t,  lse_h = log Σ_t exp(s_th)
    dS_th = P_th (dpooled_h·x_t - δ_h),  δ_h = dpooled_h·pooled_h
    dx_t = Σ_h P_th dpooled_h + dS_th a_h,  da_h = Σ dS_th x_t over tokens and images

The first token is returned next to what is pooled, and its gradient is taken with the other's, so that the gradient of
the tokens is written once: a slice taken outside would cost a tensor of zeros and an addition over all tokens.

The products are in the type of the absorbed queries, as under autocast; wider tokens are rounded to it, once, and kept
like that for the backward pass. Softmax and sums are float32. P is recomputed from lse. In exact arithmetic Σ_t dS_th
is 0; rounding (mostly of pooled_h in δ_h) leaves a residue. Multiplied by the tokens' common mean it would dominate
da_h's error, so it is subtracted: da_h -= pooled_h Σ_t dS_th.

The Triton kernels work on 64 tokens at a time, which lie in shared memory whole and are read there twice: as [tokens,
D] for the scores, and transposed, as [D, tokens], for the sums over tokens. Tokens and channels are thus the long side
of every product, and the heads, padded to 16, its short one. The forward softmax keeps a running maximum. Programs are
persistent, two on a multiprocessor: one computes while the other loads. Each adds up its images' da, and a second step
adds the programs': no atomics, the same bits in every run.

Floor: memory traffic, in 16 bits 2 T D bytes an image forward and 4 T D backward; pooled and its gradient add H / T of
that each. At T = 197, D = 768 that is 0.10 and 0.20 µs at 3 TB/s. Not yet measured.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .card import Card, Data, Inputs, Pass, TowerSizes, inputs_behind
from .device import HOPPER, multiprocessors_of
from .rows import check_contiguous
from .tiles import runs_tiles

# Limits of the kernels: tokens of more channels leave no room for a second program.
WIDEST, MOST_HEADS = 768, 16

_TOKENS = 64  # rows of one wgmma
_PROGRAMS = 2  # on a multiprocessor
LOG2E = tl.constexpr(1.4426950408889634)


class LatentPool(NamedTuple):
    """What `latent_pool` returns."""

    pooled: Tensor  # [B, H, D], of absorbed's dtype
    first: Tensor  # [B, D], of the tokens' dtype
    lse: Tensor  # [B, H] float32
    rounded: Tensor  # [B, T, D]: the tokens in absorbed's dtype; the tensor that was given if it has that type


class LatentPoolGradients(NamedTuple):
    """What `latent_pool_backward` returns."""

    d_tokens: Tensor  # [B, T, D], of d_first's dtype
    d_absorbed: Tensor  # [H, D] float32


def _latent_pool_reference(tokens: Tensor, absorbed: Tensor) -> LatentPool:
    rounded = tokens.to(absorbed.dtype)
    scores = (absorbed @ rounded.mT).to(torch.promote_types(absorbed.dtype, torch.float32))  # [B, H, T]
    pooled = scores.softmax(-1).to(rounded.dtype) @ rounded
    return LatentPool(pooled, tokens[:, 0].clone(), scores.logsumexp(-1), rounded)


def _latent_pool_backward_reference(
    d_pooled: Tensor, d_first: Tensor, rounded: Tensor, absorbed: Tensor, pooled: Tensor, lse: Tensor
) -> LatentPoolGradients:
    directions = torch.cat((absorbed.expand(rounded.shape[0], -1, -1), d_pooled), 1)  # [B, 2 H, D]
    scores, slopes = (directions @ rounded.mT).to(lse.dtype).chunk(2, 1)  # [B, H, T] each
    # All tokens of an image are here, so P and δ are computed without the kept lse and pooled.
    weights = scores.softmax(-1)
    delta = (weights * slopes).sum(-1, keepdim=True)
    d_scores = (weights * (slopes - delta)).to(rounded.dtype)
    d_tokens = torch.cat((d_scores, weights.to(rounded.dtype)), 1).mT @ directions
    d_tokens = d_tokens.to(d_first.dtype)
    d_tokens[:, 0] += d_first
    return LatentPoolGradients(d_tokens, (d_scores @ rounded).sum(0, dtype=lse.dtype))


@triton.jit
def load_heads(base, stride, column, H: tl.constexpr, BLOCK_H: tl.constexpr, SIZE: tl.constexpr):
    """Load SIZE channels of all heads, [BLOCK_H, SIZE]; heads beyond H are zero."""
    h = tl.arange(0, BLOCK_H)
    at = base + h[:, None] * stride + (column + tl.arange(0, SIZE))[None, :]
    return tl.load(at, mask=(h < H)[:, None], other=0.0)


@triton.jit
def load_tokens(rounded, image, block, CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr):
    """Load a block of an image's tokens, a tuple of [BLOCK_T, CHUNK]; tokens beyond T are zero."""
    chunks = tl.tuple([])
    for c in tl.static_range(CHUNKS):
        chunks += (rounded.load([image, block * BLOCK_T, c * CHUNK]).reshape((BLOCK_T, CHUNK)),)
    return chunks


@triton.jit
def latent_pool_kernel(
    rounded,  # [B, T, D], described
    tokens,  # [B, T, D]
    absorbed,  # [H, D]
    pooled,  # [B, H, D]
    first,  # [B, D]
    lse,  # [B, H] float32
    B,
    T: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    CHUNKS: tl.constexpr = D // CHUNK
    BLOCKS: tl.constexpr = (T + BLOCK_T - 1) // BLOCK_T
    h = tl.arange(0, BLOCK_H)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    sums = tl.tuple([])  # [CHUNK, BLOCK_H] each
    for _ in tl.static_range(CHUNKS):
        sums += (tl.zeros((CHUNK, BLOCK_H), tl.float32),)
    images = tl.cdiv(B - tl.program_id(0), tl.num_programs(0))
    # Without LICM: the queries, moved out of the loop, would take shared memory that the second program needs.
    for step in tl.range(0, images * BLOCKS, disable_licm=True):
        image = tl.program_id(0) + step // BLOCKS * tl.num_programs(0)
        block = step % BLOCKS
        x = load_tokens(rounded, image, block, CHUNKS, BLOCK_T, CHUNK)
        scores = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for c in tl.static_range(CHUNKS):
            scores = tl.dot(x[c], load_heads(absorbed, D, c * CHUNK, H, BLOCK_H, CHUNK).T, scores)
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        scores = tl.where((t < T)[:, None], scores * LOG2E, float("-inf"))
        before = tl.where(block == 0, float("-inf"), peak)  # so that nothing is left of the image before
        peak = tl.maximum(before, tl.max(scores, 0))
        shrink = tl.exp2(before - peak)
        weights = tl.exp2(scores - peak[None, :])
        total = total * shrink + tl.sum(weights, 0)
        grown = tl.tuple([])
        for c in tl.static_range(CHUNKS):
            grown += (tl.dot(x[c].T, weights.to(rounded.dtype), sums[c] * shrink[None, :]),)
        sums = grown
        if block == BLOCKS - 1:
            wide = tl.cast(image, tl.int64)
            tl.store(lse + wide * H + h, (peak + tl.log2(total)) / LOG2E, mask=h < H)
            for c in tl.static_range(CHUNKS):
                j = c * CHUNK + tl.arange(0, CHUNK)
                own = pooled + wide * (H * D) + h[None, :] * D + j[:, None]
                tl.store(own, (sums[c] / total[None, :]).to(pooled.dtype.element_ty), mask=(h < H)[None, :])
                tl.store(first + wide * D + j, tl.load(tokens + wide * (T * D) + j))


@triton.jit
def latent_pool_backward_kernel(
    d_pooled,  # [B, H, D], strides given
    d_first,  # [B, D]
    rounded,  # [B, T, D], described
    absorbed,  # [H, D]
    pooled,  # [B, H, D]
    lse,  # [B, H] float32
    d_tokens,  # [B, T, D], described
    sums,  # [programs, H, D] float32: of d_absorbed
    B,
    image_stride,
    head_stride,
    T: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    CHUNKS: tl.constexpr = D // CHUNK
    BLOCKS: tl.constexpr = (T + BLOCK_T - 1) // BLOCK_T
    h = tl.arange(0, BLOCK_H)
    totals = tl.tuple([])  # [CHUNK, BLOCK_H] each
    for _ in tl.static_range(CHUNKS):
        totals += (tl.zeros((CHUNK, BLOCK_H), tl.float32),)
    for image in tl.range(tl.program_id(0), B, tl.num_programs(0), disable_licm=True):
        wide = tl.cast(image, tl.int64)
        own = d_pooled + wide * image_stride
        delta = tl.zeros((BLOCK_H,), tl.float32)
        for c in tl.static_range(CHUNKS):
            direction = load_heads(own, head_stride, c * CHUNK, H, BLOCK_H, CHUNK).to(tl.float32)
            average = load_heads(pooled + wide * (H * D), D, c * CHUNK, H, BLOCK_H, CHUNK).to(tl.float32)
            delta += tl.sum(direction * average, 1)
        row = tl.load(lse + wide * H + h, mask=h < H, other=0.0) * LOG2E
        excess = tl.zeros((BLOCK_H,), tl.float32)
        # Without LICM here too: queries and directions are reread, from L2, where they are needed.
        for block in tl.range(0, BLOCKS, disable_licm=True):
            x = load_tokens(rounded, image, block, CHUNKS, BLOCK_T, CHUNK)
            scores = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
            slopes = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
            for c in tl.static_range(CHUNKS):
                scores = tl.dot(x[c], load_heads(absorbed, D, c * CHUNK, H, BLOCK_H, CHUNK).T, scores)
                slopes = tl.dot(x[c], load_heads(own, head_stride, c * CHUNK, H, BLOCK_H, CHUNK).T, slopes)
            t = block * BLOCK_T + tl.arange(0, BLOCK_T)
            weights = tl.where((t < T)[:, None], tl.exp2(scores * LOG2E - row[None, :]), 0.0)
            d_scores = (weights * (slopes - delta[None, :])).to(rounded.dtype)
            grown = tl.tuple([])
            for c in tl.static_range(CHUNKS):
                grown += (tl.dot(x[c].T, d_scores, totals[c]),)
            totals = grown
            excess += tl.sum(d_scores.to(tl.float32), 0)
            for p in tl.static_range(D // PART):
                d_x = tl.dot(weights.to(rounded.dtype), load_heads(own, head_stride, p * PART, H, BLOCK_H, PART))
                d_x = tl.dot(d_scores, load_heads(absorbed, D, p * PART, H, BLOCK_H, PART), d_x)
                j = p * PART + tl.arange(0, PART)
                of_first = tl.load(d_first + wide * D + j, mask=block == 0, other=0.0).to(tl.float32)
                d_x += tl.where((t == 0)[:, None], of_first[None, :], 0.0)
                d_tokens.store([image, block * BLOCK_T, p * PART], d_x.to(d_tokens.dtype).reshape((1, BLOCK_T, PART)))
        centred = tl.tuple([])
        for c in tl.static_range(CHUNKS):
            average = load_heads(pooled + wide * (H * D), D, c * CHUNK, H, BLOCK_H, CHUNK).to(tl.float32)
            centred += (totals[c] - average.T * excess[None, :],)
        totals = centred
    for c in tl.static_range(CHUNKS):
        j = c * CHUNK + tl.arange(0, CHUNK)
        at = sums + tl.program_id(0) * (H * D) + h[None, :] * D + j[:, None]
        tl.store(at, totals[c], mask=(h < H)[None, :])


def _settings(width: int) -> dict[str, int]:
    """Return the constants and the compiler's options that both launches share."""
    return {
        "BLOCK_T": _TOKENS,
        "BLOCK_H": MOST_HEADS,
        "CHUNK": next(size for size in (256, 128, 64) if width % size == 0),
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _described(tokens: Tensor, channels: int) -> TensorDescriptor:
    """Describe blocks of an image's tokens: reads beyond its last one are zero, writes there are dropped."""
    return TensorDescriptor.from_tensor(tokens, [1, _TOKENS, channels])


def _programs(batch: int, device: torch.device) -> int:
    return min(batch, _PROGRAMS * multiprocessors_of(device))


def _launch_latent_pool(tokens: Tensor, absorbed: Tensor) -> LatentPool:
    check_contiguous(tokens=tokens, absorbed=absorbed)
    batch, length, width = tokens.shape
    heads = absorbed.shape[0]
    rounded = tokens.to(absorbed.dtype)
    pooled = absorbed.new_empty(batch, heads, width)
    first = tokens.new_empty(batch, width)
    lse = absorbed.new_empty(batch, heads, dtype=torch.float32)
    settings = _settings(width)
    latent_pool_kernel[(_programs(batch, tokens.device),)](
        _described(rounded, settings["CHUNK"]),
        tokens,
        absorbed,
        pooled,
        first,
        lse,
        batch,
        T=length,
        D=width,
        H=heads,
        **settings,
    )
    return LatentPool(pooled, first, lse, rounded)


def _launch_latent_pool_backward(
    d_pooled: Tensor, d_first: Tensor, rounded: Tensor, absorbed: Tensor, pooled: Tensor, lse: Tensor
) -> LatentPoolGradients:
    check_contiguous(d_first=d_first, rounded=rounded, absorbed=absorbed, pooled=pooled, lse=lse)
    if d_pooled.stride(-1) != 1:
        d_pooled = d_pooled.contiguous()
    batch, length, width = rounded.shape
    heads = absorbed.shape[0]
    d_tokens = torch.empty_like(rounded, dtype=d_first.dtype)
    programs = _programs(batch, rounded.device)
    sums = lse.new_empty(programs, heads, width)
    settings = _settings(width)
    # What is stored at a time waits in the shared memory that the tokens leave.
    part = min(settings["CHUNK"], 256 // d_tokens.element_size())
    latent_pool_backward_kernel[(programs,)](
        d_pooled,
        d_first,
        _described(rounded, settings["CHUNK"]),
        absorbed,
        pooled,
        lse,
        _described(d_tokens, part),
        sums,
        batch,
        d_pooled.stride(0),
        d_pooled.stride(1),
        T=length,
        D=width,
        H=heads,
        PART=part,
        **settings,
    )
    return LatentPoolGradients(d_tokens, sums.sum(0))


def _runs_kernels(tokens: Tensor, absorbed: Tensor) -> bool:
    """Whether the kernels run for these; products in float32 and wider are for the references."""
    heads, width = absorbed.shape
    fits = width % 64 == 0 and width <= WIDEST and heads <= MOST_HEADS
    return fits and tokens.is_cuda and runs_tiles(tokens) and absorbed.element_size() == 2


def latent_pool(
    tokens: Tensor,  # [B, T, D]
    absorbed: Tensor,  # [H, D]
) -> LatentPool:
    """Average the tokens by softmax(tokens · absorbed) over the tokens, and hand out the first one.

    Args:
        tokens: any floating-point type; contiguous on a GPU.
        absorbed: the query of each head times its key projection and 1 / sqrt(head_dim), in the type of the products.

    Returns:
        pooled in absorbed's dtype, first in the tokens', lse in float32 (float64 for float64), and the tokens as the
        products read them, which the backward pass needs. Not differentiable: the gradients are
        `latent_pool_backward`'s. On a GPU from Hopper on, with products in 16 bits, D a multiple of 64 up to 768 and
        H up to 16 these are the kernels, elsewhere the references.

    Raises:
        ValueError: tokens on a GPU that are not contiguous.
    """
    run = _launch_latent_pool if _runs_kernels(tokens, absorbed) else _latent_pool_reference
    return run(tokens, absorbed)


def latent_pool_backward(
    d_pooled: Tensor,  # [B, H, D]
    d_first: Tensor,  # [B, D]
    rounded: Tensor,  # [B, T, D]
    absorbed: Tensor,  # [H, D]
    pooled: Tensor,  # [B, H, D]
    lse: Tensor,  # [B, H]
) -> LatentPoolGradients:
    """Return the gradients of `latent_pool`.

    Args:
        d_pooled: gradient of pooled, with any strides.
        d_first: gradient of first, in the tokens' dtype.
        rounded: as returned by `latent_pool`, like pooled and lse.
        absorbed: as given to `latent_pool`.
        pooled: the averages.
        lse: logarithms of the softmax's denominators.

    Returns:
        d_tokens [B, T, D] in d_first's dtype, and d_absorbed [H, D] in float32 (float64 for float64).

    Raises:
        ValueError: a tensor on a GPU that is not contiguous.
    """
    run = _launch_latent_pool_backward if _runs_kernels(rounded, absorbed) else _latent_pool_backward_reference
    return run(d_pooled, d_first, rounded, absorbed, pooled, lse)


@dataclass(frozen=True, kw_only=True)
class _Sizes(TowerSizes):
    common: float = 0.0  # length of a direction that all tokens share, in lengths of a token


def _inputs(sizes: _Sizes, data: Data) -> Inputs:
    own = data.normal(sizes.images, sizes.tokens, sizes.width, dtype=torch.float32)
    shared = data.normal(sizes.width, dtype=torch.float32, std=sizes.common)
    std = 1.5 * sizes.width**-0.5
    return {
        "tokens": (own + shared).to(sizes.residual),
        "absorbed": data.normal(sizes.heads, sizes.width, dtype=sizes.dtype, std=std),
    }


def _traffic(sizes: _Sizes) -> float:
    """Return the bytes of the tokens, in the type of the products, and of what is pooled of them."""
    return (sizes.tokens + sizes.heads) * sizes.images * sizes.width * sizes.dtype.itemsize


def _product(sizes: _Sizes) -> float:
    """Return the operations of one product of all tokens and heads, such as the scores."""
    return 2 * sizes.rows * sizes.heads * sizes.width


_FORWARD = Pass[_Sizes](
    "latent_pool",
    latent_pool_kernel,
    _launch_latent_pool,
    _latent_pool_reference,
    _inputs,
    traffic=_traffic,
    operations=lambda s: 2 * _product(s),
    programs="grid",
)
_BACKWARD = Pass[_Sizes](
    "latent_pool_backward",
    latent_pool_backward_kernel,
    _launch_latent_pool_backward,
    _latent_pool_backward_reference,
    lambda sizes, data: inputs_behind(_FORWARD, _launch_latent_pool_backward, sizes, data),
    traffic=lambda s: 2 * _traffic(s),
    operations=lambda s: 5 * _product(s),
    programs="grid",
    gradients_of=_FORWARD,
)
_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32


def _odd(
    images: int, tokens: int, width: int, heads: int, residual: torch.dtype, dtype: torch.dtype, common: float = 0.0
) -> _Sizes:
    return _Sizes(images=images, tokens=tokens, width=width, heads=heads, residual=residual, dtype=dtype, common=common)


def _compiled(tokens: int, width: int, heads: int, residual: torch.dtype, dtype: torch.dtype) -> tuple[str, _Sizes]:
    name = f"{tokens} tokens of {width} channels, {residual}, products {dtype}"
    return name, _odd(512, tokens, width, heads, residual, dtype)


CARDS = (
    Card(
        (_FORWARD, _BACKWARD),
        _Sizes,
        odd={
            "5 tokens": _odd(14, 5, 64, 1, _F16, _F16),  # six programs in the interpreter share the images
            "one token float32": _odd(1, 1, 64, 2, _F32, _F32),
            "50 tokens float32, alike": _odd(2, 50, 192, 3, _F32, _F32, 3.0),
            "64 tokens, wide stream": _odd(8, 64, 128, 2, _F32, _F16),
            "197 tokens": _odd(1, 197, 768, 12, _F16, _F16),
            "197 tokens, wide stream, alike": _odd(1, 197, 768, 12, _F32, _F16, 3.0),
            "197 tokens float32": _odd(2, 197, 64, 12, _F32, _F32),
            "257 tokens, alike": _odd(2, 257, 128, 1, _F16, _F16, 3.0),
            "257 tokens float32": _odd(1, 257, 256, 16, _F32, _F32),
            "197 tokens bfloat16": _odd(600, 197, 768, 12, _BF16, _BF16),
        },
        compiled=dict(
            (
                _compiled(197, 768, 12, _BF16, _BF16),
                _compiled(197, 768, 12, _F32, _BF16),
                _compiled(197, 768, 12, _F16, _F16),
                _compiled(65, 128, 2, _BF16, _BF16),
                _compiled(17, 64, 1, _F32, _BF16),
            )
        ),
        multiplies=True,
        least=HOPPER,
        empty=False,
    ),
)
