"""What the pairwise losses take: image and text embeddings, which of them match, and how ranks share a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from .gather import group_of
from .tiles import runs_tiles

# How the caller combines the gradients of the ranks; see `for_reduction`.
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Pairs:
    """The pairs of one call."""

    image: Tensor  # [b, d]
    text: Tensor  # [B, d]
    logit_scale: Tensor  # []
    first_row: int = 0  # the row of `text` that matches row 0 of `image`
    ids: Tensor | None = None  # [B] int64, equal for equal captions
    group: dist.ProcessGroup | None = None  # whose ranks hold the other image embeddings
    bank: int = 0  # rows of `text` at the end that belong to no image of any rank

    @property
    def labels(self) -> slice:
        """The text rows that match the image rows."""
        return slice(self.first_row, self.first_row + self.image.shape[0])

    @property
    def window(self) -> slice:
        """The text rows that have an image: of all ranks, or of this call."""
        return self.labels if self.group is None else slice(0, self.text.shape[0] - self.bank)

    @property
    def own(self) -> slice:
        """The labels, counted inside the window."""
        return slice(self.labels.start - self.window.start, self.labels.stop - self.window.start)

    @property
    def terms(self) -> int:
        """How many pairs the mean is over."""
        return self.window.stop - self.window.start

    @property
    def dtype(self) -> torch.dtype:
        """Of the loss, and of what is computed outside of the kernels of tiles."""
        return compute_dtype(self.image, self.text)

    @property
    def group_name(self) -> str | None:
        """The group as an operator takes it."""
        return None if self.group is None else self.group.group_name


def checked_pairs(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    bank: int = 0,
) -> Pairs:
    """Return the pairs of a call, or raise a ValueError or TypeError of one sentence. Arguments as in `Pairs`."""
    for name, tensor in {"image": image, "text": text}.items():
        _check_tensor(name, tensor, image)
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1] or 0 in image.shape:
        raise ValueError(
            f"image must be [b, d] and text [B, d] with one d and b > 0, not {list(image.shape)} and {list(text.shape)}"
        )
    for name, number in {"first_row": first_row, "bank": bank}.items():
        if not isinstance(number, int | torch.SymInt):
            raise TypeError(f"{name} must be an int, not {type(number).__name__}")
    b, B = image.shape[0], text.shape[0]
    if bank < 0:
        raise ValueError(f"bank is {bank}; pass how many text rows at the end belong to no image, 0 or more")
    if first_row < 0 or first_row + b > B - bank:
        before, what = (" before the bank", "first_row or bank") if bank else ("", "first_row")
        raise ValueError(
            f"image rows {first_row}:{first_row + b} must lie inside the {B - bank} text rows{before}; correct {what}"
        )
    if ids is not None and not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, not {type(ids).__name__}")
    if ids is not None and (ids.shape != (B,) or ids.dtype != torch.int64 or ids.device != image.device):
        raise ValueError(
            f"ids must be int64 [{B}] on {image.device}, one for every text row, "
            f"not {ids.dtype} {list(ids.shape)} on {ids.device}"
        )
    scale = as_scalar("logit_scale", logit_scale, image, text)
    if not isinstance(logit_scale, Tensor):
        check_scale(logit_scale)
    return Pairs(image, text, scale, first_row, ids, group, bank)


def as_scalar(name: str, value: Tensor | float, image: Tensor, text: Tensor) -> Tensor:
    """Return a 0-dim tensor next to the embeddings; a number becomes a constant, without a copy from the host."""
    if isinstance(value, int | float):
        return image.new_full((), value, dtype=compute_dtype(image, text))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor, not {type(value).__name__}")
    _check_tensor(name, value, image)
    if value.ndim != 0:
        raise ValueError(f"{name} must be a 0-dim tensor, not of shape {list(value.shape)}")
    return value


def _check_tensor(name: str, value: Tensor, image: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, not {value.dtype}")
    if value.device != image.device:
        raise ValueError(f"{name} is on {value.device} but image on {image.device}; move them to one device")


def check_scale(value: Tensor | float) -> None:
    """Raise a ValueError for a scale at or below 0 where that is known at once: of a number or a CPU's tensor."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return  # asking a GPU would make the host wait for it
    if value <= 0:
        raise ValueError(
            f"logit_scale is {float(value)}; pass the exponentiated scale, which is above 0: a learned one that is not "
            f"has diverged, and a lower learning rate is the remedy"
        )


def check_settings(
    pairs: Pairs,
    mode: str,
    modes: Sequence[str],
    tiled: Sequence[str],
    *,
    chunk_mib: int | None = None,
    gradient_reduction: str = "sum",
) -> None:
    """Raise a ValueError of one sentence for a setting that a loss does not have or cannot run here.

    Args:
        pairs: of the call.
        mode: that was asked for.
        modes: that the loss has.
        tiled: those of them that run the kernels of tiles.
        chunk_mib: see the losses.
        gradient_reduction: see the losses.
    """
    if mode not in modes:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(modes)}")
    if mode in tiled and (refused := why_not_tiles(pairs.image, pairs.text)) is not None:
        raise ValueError(f"mode {mode!r} cannot take {refused}; use mode='chunked' or 'auto'")
    if chunk_mib is not None and chunk_mib < 1:
        raise ValueError(f"chunk_mib is {chunk_mib}; pass 1 or more, or None for the default of the device")
    if mode == "reference" and not torch.compiler.is_compiling():  # the other modes look at it in their operators
        check_scale(pairs.logit_scale)
    if gradient_reduction not in get_args(Reduction):
        raise ValueError(f"gradient_reduction is {gradient_reduction!r}; choose sum or mean")


def compute_dtype(image: Tensor, text: Tensor) -> torch.dtype:
    """Return float64 if either input is, else float32: half-width embeddings are data, not an arithmetic."""
    return torch.float64 if torch.float64 in (image.dtype, text.dtype) else torch.float32


def why_not_tiles(image: Tensor, text: Tensor) -> str | None:
    """Return what keeps the kernels of tiles from these embeddings, or None if they can take them."""
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


def check_layout(pairs: Pairs) -> None:
    """Raise a ValueError on every rank if the ranks' image rows are not all rows of the batch once."""
    group, B, bank, labels = pairs.group, pairs.text.shape[0], pairs.bank, pairs.labels
    if group is None:
        return
    agreed = _AGREED.setdefault(group, set())
    if (B, bank) in agreed:
        return
    mine = torch.tensor([labels.start, labels.stop, B - bank, bank], device=pairs.image.device)
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


def pairs_of_operator(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None = None,
    first_row: int = 0,
    group_name: str | None = None,
    bank: int = 0,
) -> Pairs:
    """Return the pairs that an operator was given, where the value of the scale may be looked at."""
    check_scale(logit_scale)
    return Pairs(image, text, logit_scale, first_row, ids, None if group_name is None else group_of(group_name), bank)


def asked_for(*inputs: Tensor) -> list[bool]:
    """Return which inputs take a gradient."""
    return [torch.is_grad_enabled() and x.requires_grad for x in inputs]


def register_ready_gradients(loss: CustomOpDef, places: tuple[int, ...]) -> None:
    """Tell torch what an operator returns that makes its gradients together with its loss, and let autograd take them.

    Args:
        loss: takes image and text first, and last a bool for each gradient that is wanted; returns the loss, 0-dim,
            and the gradients in the compute dtype, [0] where they are not wanted. Without further derivatives.
        places: of the arguments that the gradients belong to, in their order.
    """

    def shapes(*arguments: Any) -> tuple[Tensor, ...]:
        image, text, wants = *arguments[:2], arguments[-1]
        dtype = compute_dtype(image, text)
        inputs = [arguments[place] for place in places]
        gradients = [
            x.new_empty(x.shape if wanted else (0,), dtype=dtype) for x, wanted in zip(inputs, wants, strict=True)
        ]
        return image.new_empty((), dtype=dtype), *gradients

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtypes = [inputs[place].dtype for place in places]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    def scale(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: these gradients are constants to autograd, not functions
            raise RuntimeError("this loss is differentiable once; use mode='reference' for more")
        gradients: list[Tensor | None] = [None for _ in ctx.needs_input_grad]
        for place, gradient, dtype in zip(places, ctx.saved_tensors, ctx.dtypes, strict=True):
            if ctx.needs_input_grad[place]:
                gradients[place] = (loss_grad * gradient).to(dtype)
        return tuple(gradients)

    loss.register_fake(shapes)
    loss.register_autograd(scale, setup_context=save)


class _ScaledGradient(torch.autograd.Function):
    """The loss as it is, with its gradient times a constant."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


def for_reduction(loss: Tensor, pairs: Pairs, gradient_reduction: Reduction) -> Tensor:
    """Return the loss with the gradients that become the true ones by the SUM, or by the mean, over the ranks.

    They are made for the SUM: each rank has its images' part of the gradient of one loss. Where they are averaged
    instead, as DistributedDataParallel does, they have to be larger by the number of ranks. Gradients that meet in
    `gather_rows` on their way are summed there, and are then averaged with those of the text tower's weights.
    """
    if pairs.group is None or gradient_reduction == "sum":
        return loss
    return _ScaledGradient.apply(loss, pairs.group.size())
