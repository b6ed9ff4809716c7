"""SwiGLU and the LayerNorm after it in one pass over N rows, forward and backward.

Gate a and up u [H] lie side by side in a row [2H], as one matrix product writes them. With σ the logistic function:

    p = a·σ(a)·u         SwiGLU (https://arxiv.org/abs/2002.05202)
    z = (p - µ)·ρ        µ and ρ: mean and reciprocal deviation of the row
    h = w·z + b          sub-LayerNorm (EVA02, https://arxiv.org/abs/2303.11331); without it h = p

    dp = ρ·(g - mean(g) - z·mean(g·z)) with g = w·dh; without the LayerNorm dp = dh
    du = dp·a·σ(a)       da = dp·u·σ(a)·(1 + a·(1 - σ(a)))
    dw = Σ dh·z          db = Σ dh          Σ over rows
    Σ da and Σ du are the gradient of the bias of the linear layer that made a and u.

Only a, u, µ and ρ are kept for the backward pass, which makes h again on its way: the weight gradient of the next
linear layer needs it. The arithmetic is float32; nothing is rounded between a, u and h. Blocks of rows, persistent
programs and sums as in `rows.py`.

Floor: memory traffic, 6 bytes an element of h forward and 12 backward in bfloat16. Not yet measured.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, Data, Inputs, Pass, TowerSizes, inputs_behind
from .norm import layer_norm_backward, moments, through_norm
from .rows import check_contiguous, row_block, runs_rows

_FORWARD_ROWS, _BACKWARD_ROWS = 2, 1
# On a CPU the reference takes as many rows at a time: 512 KiB of float32, which the caches keep from pass to pass.
_REFERENCE_ELEMENTS = 64 * 2048


class Swiglu(NamedTuple):
    """What `swiglu_norm` returns; mean and rstd are None where there is no LayerNorm."""

    h: Tensor  # [..., H]
    mean: Tensor | None  # [...] float32
    rstd: Tensor | None  # [...] float32


class SwigluGradients(NamedTuple):
    """What `swiglu_norm_backward` returns; sums over rows are float32."""

    d_gate_up: Tensor  # [..., 2H]
    h: Tensor  # [..., H], made again
    d_weight: Tensor | None  # [H]
    d_bias: Tensor | None  # [H]
    d_gate_up_sum: Tensor  # [2H]


def _swiglu_norm_reference(gate_up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Swiglu:
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    h = F.silu(gate).mul_(up)
    if weight is None or bias is None:
        return Swiglu(h.to(gate_up.dtype), None, None)
    h, mean, rstd = torch.native_layer_norm(h, weight.shape, weight.to(wide), bias.to(wide), eps)
    return Swiglu(h.to(gate_up.dtype), mean.squeeze(-1), rstd.squeeze(-1))


def _swiglu_norm_backward_reference(
    d_h: Tensor, gate_up: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> SwigluGradients:
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    d_gate_up, h = gate_up.new_empty(gate_up.shape), gate_up.new_empty(d_h.shape)
    sums = gate_up.new_zeros((4, d_h.shape[-1]), dtype=wide)  # of d_gate, d_up, d_weight, d_bias
    d_h, gate_up, d_gate_up_rows, h_rows = (t.flatten(0, -2) for t in (d_h, gate_up, d_gate_up, h))
    part = max(1, (_REFERENCE_ELEMENTS if d_h.device.type == "cpu" else d_h.numel()) // d_h.shape[-1])
    for start in range(0, len(d_h), part):
        rows = slice(start, start + part)
        gate, up = gate_up[rows].to(wide).chunk(2, dim=-1)
        d_gate, d_up = d_gate_up_rows[rows].chunk(2, dim=-1)
        d_product = d_h[rows].to(wide)
        silu = F.silu(gate)
        product = silu * up
        if weight is None or bias is None or mean is None or rstd is None:
            h_rows[rows] = product
        else:
            row_mean, row_rstd = mean.flatten()[rows], rstd.flatten()[rows]
            d_product, d_weight, d_bias = layer_norm_backward(d_product, product, row_mean, row_rstd, weight)
            sums[2:] += torch.stack((d_weight, d_bias))
            z = product.sub_(row_mean[:, None]).mul_(row_rstd[:, None])
            torch.addcmul(bias.to(wide), z, weight.to(wide), out=h_rows[rows])
        torch.mul(d_product, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(torch.mul(d_product, up, out=silu), gate, grad_input=d_gate)
        sums[:2] += d_gate_up_rows[rows].sum(0, dtype=wide).view(2, -1)
    if weight is None:
        return SwigluGradients(d_gate_up, h, None, None, sums[:2].flatten())
    return SwigluGradients(d_gate_up, h, sums[2], sums[3], sums[:2].flatten())


@triton.jit
def swiglu_kernel(
    gate_up,  # [N, 2 H]
    weight,  # [H], or None without LayerNorm
    bias,  # [H] or None
    h,  # [N, H]
    mean,  # [N] float32 or None
    rstd,  # [N] float32 or None
    N,
    eps,
    D: tl.constexpr,  # H
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    j = tl.arange(0, BLOCK_D)
    if weight is not None:
        w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
        b = tl.load(bias + j, mask=j < D, other=0.0).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (i < N)[:, None] & (j < D)[None, :]
        row = i.to(tl.int64)[:, None] * D
        gate = tl.load(gate_up + 2 * row + j[None, :], mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        up = tl.load(gate_up + 2 * row + D + j[None, :], mask=inside, other=0.0).to(tl.float32)
        product = gate * tl.sigmoid(gate) * up
        if weight is not None:
            row_mean, row_rstd = moments(product, inside, eps, D)
            tl.store(mean + i, row_mean, mask=i < N)
            tl.store(rstd + i, row_rstd, mask=i < N)
            product = (product - row_mean[:, None]) * row_rstd[:, None] * w[None, :] + b[None, :]
        tl.store(h + row + j[None, :], product.to(h.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    d_h,  # [N, H]
    gate_up,  # [N, 2 H]
    mean,  # [N] float32, or None without LayerNorm
    rstd,  # [N] float32 or None
    weight,  # [H] or None
    bias,  # [H] or None
    d_gate_up,  # [N, 2 H]
    h,  # [N, H]
    sums,  # [programs, 2 or 4, H] float32: of d_gate, d_up, d_weight, d_bias
    N,
    D: tl.constexpr,  # H
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    j = tl.arange(0, BLOCK_D)
    if weight is not None:
        w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
        b = tl.load(bias + j, mask=j < D, other=0.0).to(tl.float32)
    gate_sum = tl.zeros((BLOCK_D,), tl.float32)
    up_sum = tl.zeros((BLOCK_D,), tl.float32)
    weight_sum = tl.zeros((BLOCK_D,), tl.float32)
    bias_sum = tl.zeros((BLOCK_D,), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (i < N)[:, None] & (j < D)[None, :]
        row = i.to(tl.int64)[:, None] * D
        dh = tl.load(d_h + row + j[None, :], mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        gate = tl.load(gate_up + 2 * row + j[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + 2 * row + D + j[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        product = silu * up
        if weight is not None:
            row_mean = tl.load(mean + i, mask=i < N, other=0.0)
            row_rstd = tl.load(rstd + i, mask=i < N, other=0.0)
            z = (product - row_mean[:, None]) * row_rstd[:, None]
            product = z * w[None, :] + b[None, :]
            weight_sum += tl.sum(dh * z, 0)
            bias_sum += tl.sum(dh, 0)
            dh = through_norm(dh * w[None, :], z, row_rstd, D)
        tl.store(h + row + j[None, :], product.to(h.dtype.element_ty), mask=inside)
        d_gate = dh * up * (sigmoid + silu * (1 - sigmoid))
        d_up = dh * silu
        gate_sum += tl.sum(d_gate, 0)
        up_sum += tl.sum(d_up, 0)
        tl.store(d_gate_up + 2 * row + j[None, :], d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
        tl.store(d_gate_up + 2 * row + D + j[None, :], d_up.to(d_gate_up.dtype.element_ty), mask=inside)
    own = sums + tl.program_id(0) * SUMS * D + j
    tl.store(own, gate_sum, mask=j < D)
    tl.store(own + D, up_sum, mask=j < D)
    if weight is not None:
        tl.store(own + 2 * D, weight_sum, mask=j < D)
        tl.store(own + 3 * D, bias_sum, mask=j < D)


def _launch_swiglu_norm(gate_up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Swiglu:
    check_contiguous(gate_up=gate_up, weight=weight, bias=bias)
    hidden = gate_up.shape[-1] // 2
    rows = gate_up.numel() // (2 * hidden)
    h = gate_up.new_empty((*gate_up.shape[:-1], hidden))
    mean = rstd = None
    if weight is not None:
        mean, rstd = (gate_up.new_empty(gate_up.shape[:-1], dtype=torch.float32) for _ in range(2))
    block = row_block(hidden, _FORWARD_ROWS)
    swiglu_kernel[(block.programs(rows, gate_up.device),)](
        gate_up, weight, bias, h, mean, rstd, rows, eps, D=hidden, **block.settings()
    )
    return Swiglu(h, mean, rstd)


def _launch_swiglu_norm_backward(
    d_h: Tensor, gate_up: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> SwigluGradients:
    check_contiguous(d_h=d_h, gate_up=gate_up, mean=mean, rstd=rstd, weight=weight, bias=bias)
    hidden = d_h.shape[-1]
    rows = d_h.numel() // hidden
    d_gate_up, h = torch.empty_like(gate_up), torch.empty_like(d_h, dtype=gate_up.dtype)
    block = row_block(hidden, _BACKWARD_ROWS)
    programs = block.programs(rows, d_h.device)
    count = 2 if weight is None else 4
    sums = d_h.new_empty((programs, count, hidden), dtype=torch.float32)
    swiglu_backward_kernel[(programs,)](
        d_h, gate_up, mean, rstd, weight, bias, d_gate_up, h, sums, rows, D=hidden, SUMS=count, **block.settings()
    )
    totals = sums.sum(0)
    d_weight, d_bias = (None, None) if weight is None else (totals[2], totals[3])
    return SwigluGradients(d_gate_up, h, d_weight, d_bias, totals[:2].flatten())


def swiglu_norm(
    gate_up: Tensor,  # [..., 2H]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
    eps: float,
) -> Swiglu:
    """Return h = LayerNorm(SiLU(gate)·up), or without a weight h = SiLU(gate)·up.

    Args:
        gate_up: bfloat16, float16 or float32, the first H columns are the gate; contiguous, like all tensors here.
        weight: of the LayerNorm; None: there is none.
        bias: of the LayerNorm, None with the weight.
        eps: of the LayerNorm.

    Returns:
        h in the dtype of gate_up, and mean and rstd of the product's rows in float32, or None. Everything is float64
        for float64. Not differentiable: the gradients are `swiglu_norm_backward`'s.

    Raises:
        ValueError: a tensor on a GPU that is not contiguous.
    """
    run = _launch_swiglu_norm if runs_rows(gate_up) else _swiglu_norm_reference
    return run(gate_up, weight, bias, eps)


def swiglu_norm_backward(
    d_h: Tensor,  # [..., H]
    gate_up: Tensor,  # [..., 2H]
    mean: Tensor | None,  # [...]
    rstd: Tensor | None,  # [...]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
) -> SwigluGradients:
    """Return the gradients of `swiglu_norm`, and h again.

    Args:
        d_h: gradient of h.
        gate_up: as given to `swiglu_norm`, like weight and bias.
        mean: as returned by `swiglu_norm`, like rstd.
        rstd: of the product's rows.
        weight: of the LayerNorm; None: there was none.
        bias: of the LayerNorm, needed for h.

    Returns:
        d_gate_up and h in the dtype of gate_up, and the sums over rows d_weight, d_bias (None without LayerNorm) and
        d_gate_up_sum, the bias gradient of the linear layer that made gate_up, in float32.

    Raises:
        ValueError: a tensor on a GPU that is not contiguous.
    """
    run = _launch_swiglu_norm_backward if runs_rows(gate_up) else _swiglu_norm_backward_reference
    return run(d_h, gate_up, mean, rstd, weight, bias)


@dataclass(frozen=True, kw_only=True)
class _Sizes(TowerSizes):
    sub_norm: bool = True


def _inputs(sizes: _Sizes, data: Data) -> Inputs:
    return {
        "gate_up": data.normal(sizes.images, sizes.tokens, 2 * sizes.hidden, dtype=sizes.dtype),
        "weight": data.vector(sizes.hidden) if sizes.sub_norm else None,
        "bias": data.vector(sizes.hidden) if sizes.sub_norm else None,
        "eps": 1e-5,
    }


_FORWARD = Pass[_Sizes](
    "swiglu_norm",
    swiglu_kernel,
    _launch_swiglu_norm,
    _swiglu_norm_reference,
    _inputs,
    traffic=lambda s: 3 * s.rows * s.hidden * s.dtype.itemsize,
    programs="grid",
)
_BACKWARD = Pass[_Sizes](
    "swiglu_norm_backward",
    swiglu_backward_kernel,
    _launch_swiglu_norm_backward,
    _swiglu_norm_backward_reference,
    lambda sizes, data: inputs_behind(_FORWARD, _launch_swiglu_norm_backward, sizes, data),
    traffic=lambda s: 6 * s.rows * s.hidden * s.dtype.itemsize,
    programs="grid",
    gradients_of=_FORWARD,
)
_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
CARDS = (
    Card(
        (_FORWARD, _BACKWARD),
        _Sizes,
        odd={
            "3x37 unaligned rows": _Sizes(tokens=3, hidden=37, dtype=_F16),
            "2x33x352": _Sizes(images=2, tokens=33, hidden=352, dtype=_F16),
            "130x64 float32": _Sizes(tokens=130, dtype=_F32),
            "9x2048 float32": _Sizes(tokens=9, hidden=2048, dtype=_F32),
            "20x352 bfloat16": _Sizes(tokens=20, hidden=352),
            "2x33x352 no LayerNorm": _Sizes(images=2, tokens=33, hidden=352, dtype=_F16, sub_norm=False),
            "5x2048 float32, no LayerNorm": _Sizes(tokens=5, hidden=2048, dtype=_F32, sub_norm=False),
        },
        compiled={
            "2048, sub norm": _Sizes(images=512, tokens=197, hidden=2048),
            "352, sub norm": _Sizes(images=512, tokens=197, hidden=352),
            "2048": _Sizes(images=512, tokens=197, hidden=2048, sub_norm=False),
        },
    ),
)
