"""Residual add and LayerNorm in one pass over N rows of D channels, forward and backward.

    r = x + (y + c)      x: residual stream, y: output of the branch before (or none), c: bias [D] of its last linear
                         layer, whose matrix product ran without it (or none)
    z = (r - µ)·ρ        µ and ρ: mean and reciprocal deviation of the row
    n = w·z + b

With g = w·dn, and dr for the gradient that reaches r along the residual stream:

    dx = dr + ρ·(g - mean(g) - z·mean(g·z))     dy = dx
    dw = Σ dn·z     db = Σ dn     dc = Σ dx     all Σ over rows, taken while the terms are in registers

A layer scale has no place here: s·(aWᵀ + c) = a(diag(s)W)ᵀ + s·c, so it belongs in the weights that made y.

r is kept for the backward pass, z and n never are: `add_norm` of r without a branch recomputes n, µ and ρ, bit for
bit. The arithmetic is float32. The residual stream may be float32 under bfloat16 branches; where r is rounded, its
statistics are those of the rounded values, so that the backward pass sees the same z.

Blocks of rows, persistent programs and sums as in `rows.py`.

Floor: memory traffic, every tensor read or written once. Bytes an element with a bfloat16 (float32) residual stream:
forward 8 (12), backward 8 (16). Not yet measured.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, Data, Inputs, Pass, TowerSizes, inputs_behind
from .rows import check_contiguous, row_block, runs_rows

_FORWARD_ROWS = 2


class AddNorm(NamedTuple):
    """What `add_norm` returns."""

    residual: Tensor  # [..., D], of x's dtype
    normed: Tensor  # [..., D]
    mean: Tensor  # [...] float32
    rstd: Tensor  # [...] float32


class NormGradients(NamedTuple):
    """What `add_norm_backward` returns; sums over rows are float32."""

    d_x: Tensor  # [..., D], of the residual's dtype
    d_branch: Tensor | None  # [..., D]; the same tensor as d_x where that is the same thing
    d_weight: Tensor  # [D]
    d_bias: Tensor  # [D]
    d_branch_bias: Tensor | None  # [D]


def layer_norm_backward(
    d_normed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias of a LayerNorm, all of one floating-point type: for references."""
    weight = weight.to(x.dtype)
    bias = weight  # its values do not matter
    return torch.ops.aten.native_layer_norm_backward(
        d_normed, x, weight.shape, mean[..., None], rstd[..., None], weight, bias, [True, True, True]
    )


def _add_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> AddNorm:
    wide = torch.promote_types(x.dtype, torch.float32)
    residual = x
    if branch is not None:
        branch = branch.to(wide)
        residual = (x + branch if branch_bias is None else (branch + branch_bias.to(wide)).add_(x)).to(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(residual.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return AddNorm(residual, normed.to(dtype), mean.squeeze(-1), rstd.squeeze(-1))


def _add_norm_backward_reference(
    d_normed: Tensor,
    d_residual: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    branch_dtype: torch.dtype | None,
) -> NormGradients:
    d_x, d_weight, d_bias = layer_norm_backward(d_normed.to(mean.dtype), residual.to(mean.dtype), mean, rstd, weight)
    if d_residual is not None:
        d_x += d_residual
    rounded = d_x.to(residual.dtype)
    d_branch = d_branch_bias = None
    if branch_dtype is not None:
        d_branch = rounded if branch_dtype == residual.dtype else d_x.to(branch_dtype)
        d_branch_bias = d_x.flatten(0, -2).sum(0)
    return NormGradients(rounded, d_branch, d_weight, d_bias, d_branch_bias)


@triton.jit
def moments(x, inside, eps, D: tl.constexpr):
    """Return mean and reciprocal deviation [BLOCK_N] of rows [BLOCK_N, BLOCK_D] that are zero outside."""
    mean = tl.sum(x, 1) / D
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)


@triton.jit
def through_norm(g, z, rstd, D: tl.constexpr):
    """Return the gradient of what was normalised to z, from that of z; g is zero outside."""
    mean, slope = tl.sum(g, 1) / D, tl.sum(g * z, 1) / D
    return (g - mean[:, None] - z * slope[:, None]) * rstd[:, None]


@triton.jit
def add_norm_kernel(
    x,  # [N, D]
    branch,  # [N, D] or None
    branch_bias,  # [D] or None
    weight,  # [D]
    bias,  # [D]
    residual,  # [N, D] or None
    normed,  # [N, D]
    mean,  # [N] float32
    rstd,  # [N] float32
    N,
    eps,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    j = tl.arange(0, BLOCK_D)
    w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
    b = tl.load(bias + j, mask=j < D, other=0.0).to(tl.float32)
    if branch_bias is not None:
        c = tl.load(branch_bias + j, mask=j < D, other=0.0).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (i < N)[:, None] & (j < D)[None, :]
        at = i.to(tl.int64)[:, None] * D + j[None, :]
        r = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        if branch is not None:
            y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            if branch_bias is not None:
                y += c[None, :]
            rounded = (r + y).to(residual.dtype.element_ty)
            tl.store(residual + at, rounded, mask=inside)
            r = rounded.to(tl.float32)
        row_mean, row_rstd = moments(r, inside, eps, D)
        tl.store(mean + i, row_mean, mask=i < N)
        tl.store(rstd + i, row_rstd, mask=i < N)
        n = (r - row_mean[:, None]) * row_rstd[:, None] * w[None, :] + b[None, :]
        tl.store(normed + at, n.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_backward_kernel(
    d_normed,  # [N, D]
    d_residual,  # [N, D] or None
    residual,  # [N, D]
    mean,  # [N] float32
    rstd,  # [N] float32
    weight,  # [D]
    d_x,  # [N, D]
    d_branch,  # [N, D], or None where d_x serves as both
    sums,  # [programs, 2 or 3, D] float32: of d_weight, d_bias, d_branch_bias
    N,
    D: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    j = tl.arange(0, BLOCK_D)
    w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK_D,), tl.float32)
    bias_sum = tl.zeros((BLOCK_D,), tl.float32)
    branch_bias_sum = tl.zeros((BLOCK_D,), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (i < N)[:, None] & (j < D)[None, :]
        at = i.to(tl.int64)[:, None] * D + j[None, :]
        dn = tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        r = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + i, mask=i < N, other=0.0)
        row_rstd = tl.load(rstd + i, mask=i < N, other=0.0)
        z = (r - row_mean[:, None]) * row_rstd[:, None]
        weight_sum += tl.sum(dn * z, 0)
        bias_sum += tl.sum(dn, 0)
        dx = through_norm(dn * w[None, :], z, row_rstd, D)
        if d_residual is not None:
            dx += tl.load(d_residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + at, dx.to(d_x.dtype.element_ty), mask=inside)
        if SUMS > 2:
            branch_bias_sum += tl.sum(dx, 0)
        if d_branch is not None:
            tl.store(d_branch + at, dx.to(d_branch.dtype.element_ty), mask=inside)
    own = sums + tl.program_id(0) * SUMS * D + j
    tl.store(own, weight_sum, mask=j < D)
    tl.store(own + D, bias_sum, mask=j < D)
    if SUMS > 2:
        tl.store(own + 2 * D, branch_bias_sum, mask=j < D)


def _launch_add_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> AddNorm:
    check_contiguous(x=x, branch=branch, branch_bias=branch_bias, weight=weight, bias=bias)
    width = weight.numel()
    rows = x.numel() // width
    summed = None if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    block = row_block(width, _FORWARD_ROWS)
    add_norm_kernel[(block.programs(rows, x.device),)](
        x, branch, branch_bias, weight, bias, summed, normed, mean, rstd, rows, eps, D=width, **block.settings()
    )
    return AddNorm(x if summed is None else summed, normed, mean, rstd)


def _launch_add_norm_backward(
    d_normed: Tensor,
    d_residual: Tensor | None,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    branch_dtype: torch.dtype | None,
) -> NormGradients:
    check_contiguous(d_normed=d_normed, d_residual=d_residual, residual=residual, mean=mean, rstd=rstd, weight=weight)
    rows, width = mean.numel(), weight.numel()
    d_x = torch.empty_like(residual)
    one_gradient = branch_dtype in (None, residual.dtype)
    d_branch = None if one_gradient else torch.empty_like(residual, dtype=branch_dtype)
    # A second row would spill registers where a row takes more of them.
    block = row_block(width, 2 if residual.element_size() == 2 else 1)
    programs = block.programs(rows, residual.device)
    count = 2 if branch_dtype is None else 3
    sums = mean.new_empty((programs, count, width))
    add_norm_backward_kernel[(programs,)](
        d_normed,
        d_residual,
        residual,
        mean,
        rstd,
        weight,
        d_x,
        d_branch,
        sums,
        rows,
        D=width,
        SUMS=count,
        **block.settings(),
    )
    d_weight, d_bias, *of_branch = sums.sum(0)
    if branch_dtype is None:
        return NormGradients(d_x, None, d_weight, d_bias, None)
    return NormGradients(d_x, d_x if d_branch is None else d_branch, d_weight, d_bias, *of_branch)


def add_norm(
    x: Tensor,  # [..., D]
    branch: Tensor | None,  # [..., D]
    branch_bias: Tensor | None,  # [D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> AddNorm:
    """Add a branch to the residual stream and normalise the sum.

    Args:
        x: residual stream, bfloat16, float16 or float32; contiguous, like all tensors here.
        branch: output of the branch before, of any of these types; None: nothing to add.
        branch_bias: of the linear layer that made the branch without adding it, of any of these types; None: there is
            none, or the branch has it.
        weight: of the LayerNorm.
        bias: of the LayerNorm.
        eps: of the LayerNorm.
        dtype: of ``normed``; None: that of the branch, or of x without one.

    Returns:
        residual = x + (branch + branch_bias) in x's dtype (x itself without a branch, not a copy), normed = its
        LayerNorm, and mean and rstd of its rows in float32. Everything is float64 for float64 x. Not differentiable:
        the gradients are `add_norm_backward`'s.

    Raises:
        ValueError: a bias without its branch; a tensor on a GPU that is not contiguous.
    """
    if branch is None and branch_bias is not None:
        raise ValueError("branch_bias is added to a branch, and there is none: give the branch, or no bias")
    if dtype is None:
        dtype = x.dtype if branch is None else branch.dtype
    run = _launch_add_norm if runs_rows(x) else _add_norm_reference
    return run(x, branch, branch_bias, weight, bias, eps, dtype)


def add_norm_backward(
    d_normed: Tensor,  # [..., D]
    d_residual: Tensor | None,  # [..., D]
    residual: Tensor,  # [..., D]
    mean: Tensor,  # [...]
    rstd: Tensor,  # [...]
    weight: Tensor,  # [D]
    *,
    branch_dtype: torch.dtype | None,
) -> NormGradients:
    """Return the gradients of `add_norm`.

    Args:
        d_normed: gradient of ``normed``.
        d_residual: gradient of ``residual`` from all that reads it later; None: nothing does.
        residual: as returned by `add_norm`, like mean and rstd.
        mean: of the rows.
        rstd: of the rows.
        weight: of the LayerNorm.
        branch_dtype: of d_branch, the branch's; None: there was no branch, or its gradient is not wanted.

    Returns:
        d_x in the residual's dtype, d_branch (the same tensor as d_x if the types agree), and the sums over rows
        d_weight, d_bias and d_branch_bias in float32. What belongs to the branch is None without a dtype for it.

    Raises:
        ValueError: a tensor on a GPU that is not contiguous.
    """
    run = _launch_add_norm_backward if runs_rows(residual) else _add_norm_backward_reference
    return run(d_normed, d_residual, residual, mean, rstd, weight, branch_dtype)


@dataclass(frozen=True, kw_only=True)
class _Sizes(TowerSizes):
    branch: bool = True
    bias: torch.dtype | None = torch.float32  # of the branch; None: there is none
    residual_used: bool = True  # the residual stream is used later, so it has a gradient


def _inputs(sizes: _Sizes, data: Data) -> Inputs:
    shape, bias = (sizes.images, sizes.tokens, sizes.width), sizes.bias if sizes.branch else None
    return {
        "x": data.normal(*shape, dtype=sizes.residual),
        "branch": data.normal(*shape, dtype=sizes.dtype) if sizes.branch else None,
        "branch_bias": None if bias is None else data.vector(sizes.width).to(bias),
        "weight": data.vector(sizes.width),
        "bias": data.vector(sizes.width),
        "eps": 1e-6,
        "dtype": sizes.dtype,
    }


def _backward_inputs(sizes: _Sizes, data: Data) -> Inputs:
    branch_dtype = sizes.dtype if sizes.branch else None
    inputs = inputs_behind(_FORWARD, _launch_add_norm_backward, sizes, data, branch_dtype=branch_dtype)
    return inputs if sizes.residual_used else inputs | {"d_residual": None}


_FORWARD = Pass[_Sizes](
    "add_norm",
    add_norm_kernel,
    _launch_add_norm,
    _add_norm_reference,
    _inputs,
    traffic=lambda s: 2 * s.rows * s.width * (s.residual.itemsize + s.dtype.itemsize),
    programs="grid",
)
_BACKWARD = Pass[_Sizes](
    "add_norm_backward",
    add_norm_backward_kernel,
    _launch_add_norm_backward,
    _add_norm_backward_reference,
    _backward_inputs,
    traffic=lambda s: s.rows * s.width * (3 * s.residual.itemsize + s.dtype.itemsize),
    programs="grid",
    gradients_of=_FORWARD,
)
_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
_COMPILED: dict[str, dict[str, Any]] = {
    "": {"bias": None},
    "branch bias": {},
    "residual unused": {"bias": None, "residual_used": False},
    "no branch": {"branch": False},
}
CARDS = (
    Card(
        (_FORWARD, _BACKWARD),
        _Sizes,
        odd={
            "3x37 wide stream, unaligned rows": _Sizes(tokens=3, width=37, dtype=_F16, residual=_F32, bias=_F16),
            "5x64 no bias": _Sizes(tokens=5, dtype=_F16, residual=_F16, bias=None),
            "5x2048 wide stream": _Sizes(tokens=5, width=2048, dtype=_F16, residual=_F32, bias=None),
            "2x50x96 float32": _Sizes(images=2, tokens=50, width=96, dtype=_F32, residual=_F32),
            "33x768": _Sizes(tokens=33, width=768, dtype=_F16, residual=_F16),
            "9x768 no branch": _Sizes(tokens=9, width=768, dtype=_F16, residual=_F32, branch=False),
            "130x64 wide stream, residual unused": _Sizes(tokens=130, dtype=_F16, residual=_F32, residual_used=False),
            "20x352 bfloat16": _Sizes(tokens=20, width=352, bias=_BF16),
        },
        compiled={
            ", ".join(filter(None, (stream, setting))): _Sizes(
                images=512, tokens=197, width=768, residual=residual, **given
            )
            for stream, residual in {"": _BF16, "wide stream": _F32}.items()
            for setting, given in _COMPILED.items()
        },
    ),
)
