"""GELU, exact, in one pass over N rows of H columns, forward and backward.

    h = x·Φ(x)        Φ: distribution function of the normal distribution, φ its density
    dx = dh·(Φ(x) + x·φ(x))

The backward pass makes h again on its way, for the weight gradient of the next linear layer, and adds dx up over rows:
Σ dx is the gradient of the bias of the linear layer that made x. The arithmetic is float32.

No sum runs along a row, so a block takes a part of the columns. Persistent programs and sums as in `rows.py`.

Floor: memory traffic, 4 bytes an element forward and 8 backward in bfloat16. Not yet measured.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, Data, Inputs, Pass, TowerSizes, inputs_behind
from .rows import RowBlock, check_contiguous, runs_rows

_BLOCK = RowBlock(rows=2, columns=512, num_warps=2)


class Gelu(NamedTuple):
    """What the launcher and the reference of `gelu` return."""

    h: Tensor  # [..., H]


class GeluGradients(NamedTuple):
    """What `gelu_backward` returns."""

    d_fc1: Tensor  # [..., H]
    h: Tensor  # [..., H], made again
    d_fc1_sum: Tensor  # [H] float32


def _gelu_reference(fc1: Tensor) -> Gelu:
    return Gelu(F.gelu(fc1))


def _gelu_backward_reference(d_h: Tensor, fc1: Tensor) -> GeluGradients:
    wide = torch.promote_types(fc1.dtype, torch.float32)
    d_fc1 = torch.ops.aten.gelu_backward(d_h.to(wide), fc1.to(wide))
    return GeluGradients(d_fc1.to(fc1.dtype), F.gelu(fc1), d_fc1.flatten(0, -2).sum(0))


@triton.jit
def normal_distribution(x):
    """Return Φ(x)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def gelu_kernel(
    fc1,  # [N, H]
    h,  # [N, H]
    N,
    D: tl.constexpr,  # H
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (i < N)[:, None] & (j < D)[None, :]
        at = i.to(tl.int64)[:, None] * D + j[None, :]
        x = tl.load(fc1 + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        tl.store(h + at, (x * normal_distribution(x)).to(h.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(
    d_h,  # [N, H]
    fc1,  # [N, H]
    d_fc1,  # [N, H]
    h,  # [N, H]
    sums,  # [programs, H] float32: of d_fc1
    N,
    D: tl.constexpr,  # H
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (i < N)[:, None] & (j < D)[None, :]
        at = i.to(tl.int64)[:, None] * D + j[None, :]
        dh = tl.load(d_h + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        x = tl.load(fc1 + at, mask=inside, other=0.0).to(tl.float32)
        share = normal_distribution(x)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        dx = dh * (share + x * density)
        total += tl.sum(dx, 0)
        tl.store(h + at, (x * share).to(h.dtype.element_ty), mask=inside)
        tl.store(d_fc1 + at, dx.to(d_fc1.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * D + j, total, mask=j < D)


def _launch_gelu(fc1: Tensor) -> Gelu:
    check_contiguous(fc1=fc1)
    hidden = fc1.shape[-1]
    rows = fc1.numel() // hidden
    h = torch.empty_like(fc1)
    column_blocks = triton.cdiv(hidden, _BLOCK.columns)
    grid = (_BLOCK.programs(rows, fc1.device, column_blocks), column_blocks)
    gelu_kernel[grid](fc1, h, rows, D=hidden, **_BLOCK.settings())
    return Gelu(h)


def _launch_gelu_backward(d_h: Tensor, fc1: Tensor) -> GeluGradients:
    check_contiguous(d_h=d_h, fc1=fc1)
    hidden = fc1.shape[-1]
    rows = fc1.numel() // hidden
    d_fc1, h = torch.empty_like(fc1), torch.empty_like(fc1)
    column_blocks = triton.cdiv(hidden, _BLOCK.columns)
    programs = _BLOCK.programs(rows, fc1.device, column_blocks)
    sums = fc1.new_empty((programs, hidden), dtype=torch.float32)
    gelu_backward_kernel[(programs, column_blocks)](d_h, fc1, d_fc1, h, sums, rows, D=hidden, **_BLOCK.settings())
    return GeluGradients(d_fc1, h, sums.sum(0))


def gelu(
    fc1: Tensor,  # [..., H]
) -> Tensor:
    """Return h = GELU(fc1) in the dtype of fc1, bfloat16, float16 or float32 (contiguous), or float64.

    Not differentiable: the gradient is `gelu_backward`'s.

    Raises:
        ValueError: a tensor on a GPU that is not contiguous.
    """
    run = _launch_gelu if runs_rows(fc1) else _gelu_reference
    return run(fc1).h


def gelu_backward(
    d_h: Tensor,  # [..., H]
    fc1: Tensor,  # [..., H]
) -> GeluGradients:
    """Return the gradient of `gelu`, and h again.

    Args:
        d_h: gradient of h.
        fc1: as given to `gelu`.

    Returns:
        d_fc1 and h in the dtype of fc1, and d_fc1_sum, the sum of d_fc1 over rows, in float32: the bias gradient of
        the linear layer that made fc1.

    Raises:
        ValueError: a tensor on a GPU that is not contiguous.
    """
    run = _launch_gelu_backward if runs_rows(fc1) else _gelu_backward_reference
    return run(d_h, fc1)


def _inputs(sizes: TowerSizes, data: Data) -> Inputs:
    return {"fc1": data.normal(sizes.images, sizes.tokens, sizes.hidden, dtype=sizes.dtype, std=2.0)}


_FORWARD = Pass[TowerSizes](
    "gelu",
    gelu_kernel,
    _launch_gelu,
    _gelu_reference,
    _inputs,
    traffic=lambda s: 2 * s.rows * s.hidden * s.dtype.itemsize,
    programs="grid",
)
_BACKWARD = Pass[TowerSizes](
    "gelu_backward",
    gelu_backward_kernel,
    _launch_gelu_backward,
    _gelu_backward_reference,
    lambda sizes, data: inputs_behind(_FORWARD, _launch_gelu_backward, sizes, data),
    traffic=lambda s: 4 * s.rows * s.hidden * s.dtype.itemsize,
    programs="grid",
    gradients_of=_FORWARD,
)
_F16, _F32 = torch.float16, torch.float32
CARDS = (
    Card(
        (_FORWARD, _BACKWARD),
        TowerSizes,
        odd={
            "33x513 unaligned, a last block of one column": TowerSizes(tokens=33, hidden=513, dtype=_F16),
            "5x64 float32": TowerSizes(tokens=5, dtype=_F32),
            "2x50x768": TowerSizes(images=2, tokens=50, hidden=768, dtype=_F16),
            "7x3072 float32": TowerSizes(tokens=7, hidden=3072, dtype=_F32),
            "20x352 bfloat16": TowerSizes(tokens=20, hidden=352),
        },
        compiled={"": TowerSizes(images=512, tokens=197, hidden=3072)},
    ),
)
