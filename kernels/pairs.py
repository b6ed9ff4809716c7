"""What the pairwise losses take: image rows, text rows, which of them belong together, and how ranks share a batch."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from .tiles import runs_tiles


def check_rows(
    image: Tensor, text: Tensor, first_row: int, ids: Tensor | None, scalars: dict[str, Tensor], *, bank: int = 0
) -> None:
    """Raise a ValueError of one sentence for inputs that do not fit together.

    Args:
        image: [b, d].
        text: [B, d].
        first_row: the text row that matches image row 0.
        ids: int64 [B] or None.
        scalars: what else the loss takes, 0-dim, by name.
        bank: text rows at the end that belong to no image.
    """
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1] or 0 in image.shape:
        raise ValueError(
            f"image must be [b, d] and text [B, d] with one d and b > 0, not {list(image.shape)} and {list(text.shape)}"
        )
    for name, scalar in scalars.items():
        if scalar.ndim != 0:
            raise ValueError(f"{name} must be a 0-dim tensor, not of shape {list(scalar.shape)}")
    for name, tensor in {"image": image, "text": text, **scalars}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
        if tensor.device != image.device:
            raise ValueError(f"{name} is on {tensor.device} but image on {image.device}; move them to one device")
    b, B = image.shape[0], text.shape[0]
    if bank < 0:
        raise ValueError(f"bank is {bank}; pass how many text rows at the end belong to no image, 0 or more")
    if first_row < 0 or first_row + b > B - bank:
        before, what = (" before the bank", "first_row or bank") if bank else ("", "first_row")
        raise ValueError(
            f"image rows {first_row}:{first_row + b} must lie inside the {B - bank} text rows{before}; correct {what}"
        )
    if ids is not None and (ids.shape != (B,) or ids.dtype != torch.int64 or ids.device != image.device):
        raise ValueError(
            f"ids must be int64 [{B}] on {image.device}, one for every text row, "
            f"not {ids.dtype} {list(ids.shape)} on {ids.device}"
        )


def compute_dtype(image: Tensor, text: Tensor) -> torch.dtype:
    """Return float64 if either input is, else float32: half-width rows are data, not an arithmetic."""
    return torch.float64 if torch.float64 in (image.dtype, text.dtype) else torch.float32


def why_not_tiles(image: Tensor, text: Tensor) -> str | None:
    """Return what keeps the kernels of tiles from these rows, or None if they can take them."""
    d = image.shape[1]
    if compute_dtype(image, text) == torch.float64:
        return "float64 rows"
    if d % 8 or not 64 <= d <= 4096:
        return f"rows of width {d} (a multiple of 8 from 64 to 4,096 is needed)"
    if not runs_tiles(image):
        return f"rows on {image.device} (an NVIDIA GPU of compute capability 9.0 or later is needed)"
    return None


def dense_ids(ids: Tensor) -> Tensor:
    """Return int32 [B] numbers that are equal where ids are, without asking the device how many ids there are."""
    ordered, order = ids.sort()
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(ids, dtype=torch.int32).scatter_(0, order, first.cumsum(0).int())


# The sizes (text rows, bank) whose layout a group has agreed on. Asking costs a collective and a wait of the host for
# the device, so it is asked once per size, which all ranks have in common.
_AGREED: WeakKeyDictionary[dist.ProcessGroup, set[tuple[int, int]]] = WeakKeyDictionary()


def check_layout(
    group: dist.ProcessGroup, first_row: int, b: int, B: int, device: torch.device, *, bank: int = 0
) -> None:
    """Raise a ValueError on every rank if the ranks' image rows are not all rows of the batch once.

    Args:
        group: the ranks.
        first_row: the text row that matches image row 0 of this rank.
        b: image rows of this rank.
        B: text rows.
        device: where the group's backend communicates.
        bank: text rows at the end that belong to no image of any rank.
    """
    agreed = _AGREED.setdefault(group, set())
    if (B, bank) in agreed:
        return
    mine = torch.tensor([first_row, first_row + b, B - bank, bank], device=device)
    everyone = mine.new_empty(group.size() * 4)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    layout = sorted(everyone.view(-1, 4).tolist())
    end = 0
    for start, stop, *sizes in layout:
        if start != end or sizes != [B - bank, bank]:
            break
        end = stop
    if end != B - bank:
        rows = ", ".join(
            f"{start}:{stop} of {total}" + (f" before a bank of {behind}" if behind else "")
            for start, stop, total, behind in layout
        )
        raise ValueError(
            f"the ranks of the group must hold every image row once and the same text rows, but they hold {rows}; "
            "pass the text rows of all ranks as text, rows that belong to no image behind them and counted as bank, "
            "and this rank's offset as first_row"
        )
    agreed.add((B, bank))


# MiB of a chunk where none is asked for: enough rows for a matrix product of a GPU, near to the caches of a CPU.
CHUNK_MIB = {"cuda": 128, "cpu": 32}


def rows_per_chunk(chunk_mib: int | None, row_bytes: int, device: torch.device) -> int:
    """Return how many rows of a matrix fit a chunk: at least one."""
    chunk_mib = CHUNK_MIB.get(device.type, 32) if chunk_mib is None else chunk_mib
    return max(1, chunk_mib * 2**20 // row_bytes)


def register_ready_gradients(loss: CustomOpDef, places: tuple[int, ...]) -> None:
    """Let autograd take the gradients that an operator makes together with its loss.

    Args:
        loss: returns the loss first and the gradients last, whatever lies between; without further derivatives.
        places: of the arguments that the gradients belong to, in their order.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtypes = [inputs[place].dtype for place in places]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[-len(places) :])

    def scale(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: these gradients are constants to autograd, not functions
            raise RuntimeError("this loss is differentiable once; use mode='reference' for more")
        gradients: list[Tensor | None] = [None for _ in ctx.needs_input_grad]
        for place, gradient, dtype in zip(places, ctx.saved_tensors, ctx.dtypes, strict=True):
            if ctx.needs_input_grad[place]:
                gradients[place] = (loss_grad * gradient).to(dtype)
        return tuple(gradients)

    loss.register_autograd(scale, setup_context=save)
