"""What the pairwise losses share on a GPU: tiles of I·Tᵀ in float16, the order they are visited in, and their masks.

A tile is [BLOCK_M image rows, BLOCK_N text rows]. Programs are persistent: each takes every `programs`-th tile. Tiles
go down GROUP blocks of image rows before they go one block of text rows on, so that a block of text rows is read from
memory once for each group and stays in L2 meanwhile.

float16, not bfloat16: components of unit rows lie in the middle of its range, and three more bits of mantissa make an
eighth of the error at the same rate. The logit scale multiplies the float32 product, never an operand.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import HOPPER, capability_of

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, one program after the other

# Gradient weights lie in [0, 2]. In float16 they are held times 2^14, so that 2e-9 is still a normal number.
WEIGHT_UNIT = 2.0**14


@dataclass(frozen=True)
class TileShape:
    """Sizes of one kernel's tile and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    max_registers: int | None = None  # 128 lets two programs of eight warps share a multiprocessor
    programs: int = 1  # that a launcher starts for each multiprocessor

    def constants(self) -> dict[str, int]:
        """Return the constants of a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP": self.group}

    def options(self) -> dict[str, int]:
        """Return the compiler's options of a launch."""
        # Triton 3.10 no longer fuses multiplications and additions where it is not asked to.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


# The interpreter takes its time by the tile; small ones also give small inputs several tiles and ragged edges.
INTERPRETED_SHAPE = TileShape(32, 32, 32, num_warps=4, num_stages=1, group=2)


@triton.jit
def tile_of(t, rows, columns, first_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return the block of rows and of columns of tile t; the walk along the columns starts at `first_column`."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    group = t // (GROUP * blocks_n)
    in_group = tl.minimum(blocks_m - group * GROUP, GROUP)
    m = group * GROUP + (t % (GROUP * blocks_n)) % in_group
    n = (t % (GROUP * blocks_n)) // in_group
    return m, (n + first_column // BLOCK_N) % blocks_n


@triton.jit
def cosine_tile(
    images, texts, m, n, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return I·Tᵀ of one tile in float32; rows beyond the end are zero."""
    cosines = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        cosines = tl.dot(images.load([m * BLOCK_M, k]), texts.load([n * BLOCK_N, k]).T, cosines)
    return cosines  # [BLOCK_M, BLOCK_N]


def runs_tiles(rows: Tensor) -> bool:
    """Whether the kernels of tiles run where these rows are: Hopper and later, or the interpreter on a CPU."""
    return capability_of(rows.device) >= HOPPER or (INTERPRETED and rows.device.type == "cpu")


def operand(rows: Tensor) -> Tensor:
    """Return rows as the kernels read them: float16, contiguous, from an address that descriptors accept."""
    rows = rows.to(torch.float16).contiguous()
    # One row is contiguous whatever its stride, which a descriptor looks at all the same.
    if rows.is_meta or (rows.data_ptr() % 16 == 0 and rows.stride(0) == rows.shape[1]):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Describe a matrix to the tensor memory accelerator: reads beyond its edge are zero, writes there are dropped."""
    return TensorDescriptor.from_tensor(matrix, list(block))


def product(weights: Tensor, rows: Tensor, *, out: Tensor) -> Tensor:
    """Write weights [m, k] @ rows [k, d], both float16, with float32 sums into float32 `out` [m, d]."""
    if weights.is_cuda:
        return torch.mm(weights, rows, out_dtype=torch.float32, out=out)
    return torch.mm(weights.float(), rows.float(), out=out)
