"""How the kernels that work row by row cut up [N, D]: blocks of whole rows, walked through by persistent programs.

8 neighbouring columns go to a thread, which makes accesses of 16 bytes in bfloat16. A program adds up what it sums over
rows, and a second step adds the programs' sums: no atomics, the same bits in every run.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .device import AMPERE, capability_of, multiprocessors_of

# The programs of a multiprocessor have this many threads together: enough loads under way to keep the memory busy,
# and 128 registers for each thread.
_THREADS = 512
_REGISTERS = 128
_STAGES = 3  # the loads of two blocks are under way while a third is worked on


@dataclass(frozen=True)
class RowBlock:
    """Rows and columns that a program holds at once, and the warps it has for them."""

    rows: int
    columns: int
    num_warps: int

    def programs(self, rows: int, device: torch.device, column_blocks: int = 1) -> int:
        """Return how many persistent programs walk through the rows of one block of columns."""
        side_by_side = max(1, _THREADS // (32 * self.num_warps))
        return min(multiprocessors_of(device) * side_by_side // column_blocks, triton.cdiv(rows, self.rows))

    def settings(self) -> dict[str, int]:
        """Return the constants and the compiler's options of a launch."""
        return {
            "BLOCK_N": self.rows,
            "BLOCK_D": self.columns,
            "STAGES": _STAGES,
            "num_warps": self.num_warps,
            "maxnreg": _REGISTERS,
            "enable_fp_fusion": True,  # the default until Triton 3.9
        }


def row_block(width: int, rows: int) -> RowBlock:
    """Return a block of whole rows: 8 columns a thread; rows below 256 columns, a warp's share, come in more."""
    columns = triton.next_power_of_2(width)
    return RowBlock(rows * max(1, 256 // columns), columns, num_warps=min(max(1, columns // 256), 16))


def runs_rows(rows: Tensor) -> bool:
    """Whether the kernels of rows run for this tensor: GPUs from Ampere on; float64 is for the references."""
    return rows.dtype != torch.float64 and capability_of(rows.device) >= AMPERE


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that is not contiguous, as the kernels read them."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}: give a contiguous tensor"
            )
