"""What an operation says of itself, once: its passes, the inputs they take, their floor, the sizes they are held to.

A pass is a launcher of Triton kernels and its reference in plain torch, two functions of one signature. Every file of
an operation ends in ``CARDS``, and everybody who needs to know an operation walks these cards: the tests compare
launcher and reference, the benchmarks time those of a tower next to the floor, the check of the machine code launches
them on tensors without data, the profile of a step finds the floor of a kernel by its name.

Names tie the passes together. A backward pass names its arguments as the forward pass names its inputs and outputs,
and ``d_NAME`` for the gradient of an output; it returns ``d_NAME`` for the gradient of an input, the name of an output
for what it recomputes, and ``d_NAME_sum`` for a gradient summed over all but the last dimensions, flattened.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import AMPERE

# `TowerSizes`, `PairSizes` or an operation's own: a frozen dataclass of what decides shapes and types
S = TypeVar("S")
Inputs = dict[str, Any]  # arguments by name: tensors, None, and settings
Outputs = dict[str, Tensor]


class Absent(Exception):
    """A library is missing, or does not run on this device; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class TowerSizes:
    """Plain numbers of an image tower; an operation reads those it needs, and adds its own settings in a subclass."""

    images: int = 1
    tokens: int = 1
    width: int = 64
    hidden: int = 64  # inner channels of the MLP
    heads: int = 1
    image_size: int = 8
    patch_size: int = 8
    rotary: bool = True  # queries and keys are rotated (RoPE)
    dtype: torch.dtype = torch.bfloat16  # of matrix products
    residual: torch.dtype = torch.bfloat16  # of the residual stream

    @property
    def rows(self) -> int:
        """Tokens of all images."""
        return self.images * self.tokens


@dataclass(frozen=True, kw_only=True)
class PairSizes:
    """Plain numbers of a loss of images against texts; an operation adds its own settings in a subclass."""

    images: int = 1
    texts: int = 1
    width: int = 64
    first_row: int = 0  # the text that matches image 0
    ids: bool = False  # some texts are equal
    dtype: ClassVar[torch.dtype] = torch.float16  # of matrix products

    @property
    def product(self) -> int:
        """Operations of a product that has every pair."""
        return 2 * self.images * self.texts * self.width

    @property
    def embedding_bytes(self) -> int:
        """Bytes of all embeddings, as the kernels read them."""
        return (self.images + self.texts) * self.width * self.dtype.itemsize


# For the cards of losses. The interpreter's tiles are 32 x 32 x 32, and a launch of the sums takes 64 images.
ODD_PAIRS: Mapping[str, Mapping[str, Any]] = {
    "1x40x64 one image, last text": {"texts": 40, "first_row": 39},
    "33x70x72 ragged in all three, duplicates": {"images": 33, "texts": 70, "width": 72, "first_row": 11, "ids": True},
    "70x98x136 two launches": {"images": 70, "texts": 98, "width": 136, "first_row": 28},
}
ONE_OF_16_RANKS: Mapping[str, Any] = {"images": 4096, "texts": 65536, "width": 768}  # at a batch of 65,536


class Data:
    """Draws the inputs of a pass, the same in every run; on the device ``meta`` they have shapes and no values."""

    def __init__(self, device: torch.device | str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Return normal numbers [*shape], drawn in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        numbers = torch.empty(shape, dtype=wide, device=self.device).normal_(mean, std, generator=self._generator)
        return numbers.to(dtype)

    def vector(self, size: int) -> Tensor:
        """Return a bias or the weight of a LayerNorm, float32 [size], that is neither 0 nor 1."""
        return self.normal(size, dtype=torch.float32, mean=0.5, std=0.2)

    def integers(self, below: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return integers [*shape] from 0 up to ``below``, which is left out."""
        return torch.empty(shape, dtype=dtype, device=self.device).random_(0, below, generator=self._generator)


@dataclass(frozen=True)
class Pass(Generic[S]):
    """One direction of an operation.

    ``launch``, ``reference`` and ``baseline`` take the arguments that ``inputs`` returns, by name, and return a
    NamedTuple of tensors and None. A launcher that writes into tensors that it is given is wrapped. The reference in
    float64 is the truth.
    """

    name: str  # in benchmarks
    kernel: Any  # the Triton kernel whose floor `traffic` and `operations` are; others may run around it
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[S, Data], Inputs]
    traffic: Callable[[S], float]  # bytes that have to be read or written
    operations: Callable[[S], float] = lambda sizes: 0  # floating-point operations that have to be done
    # What benchmarks measure in place of the reference where that was written to be clear and would flatter the kernel.
    baseline: Callable[..., Any] | None = None
    # Programs of the kernel that a multiprocessor must hold at once; "grid": as many as the launcher starts for each.
    programs: Callable[[S], int] | Literal["grid"] = lambda sizes: 1
    gradients_of: "Pass[S] | None" = None  # the forward pass, of a backward pass
    # Others' functions that benchmarks compare with, by candidate: take the inputs, prepare a run and return it, or
    # raise Absent. A run returns tensors by the names of the outputs, not all of them.
    libraries: Mapping[str, Callable[..., Callable[[], Outputs]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Card(Generic[S]):
    """An operation."""

    passes: tuple[Pass[S], ...]
    sizes: type[S]
    odd: Mapping[str, S]  # by name, what tests use: ragged edges, one row, wide rows, every setting and type
    compiled: Mapping[str, S]  # by name, what the check of the machine code uses
    # The kernels multiply matrices on tensor cores: in 16 bits on a GPU; in the interpreter, whose product of bfloat16
    # is wrong, in float16 and, to see errors that float16 hides, in float32.
    multiplies: bool = False
    least: tuple[int, int] = AMPERE  # compute capability that the kernels need
    empty: bool = True  # a batch without images is allowed


def draw_pairs(sizes: PairSizes, data: Data) -> Inputs:
    """Return image [b, d] and text [B, d], unit embeddings in float16, scale [] float32, ids [B] int32 and first_row.

    An image is nearer to its text than to others, but not by so much that only that counts.
    """
    b, B, d = sizes.images, sizes.texts, sizes.width
    text = F.normalize(data.normal(B, d, dtype=torch.float32))
    image = F.normalize(data.normal(b, d, dtype=torch.float32, std=d**-0.5) + 0.2 * text[sizes.first_row :][:b])
    return {
        "image": image.to(sizes.dtype),
        "text": text.to(sizes.dtype),
        "scale": torch.full((), 14.3, device=data.device),
        "ids": data.integers(max(1, 2 * B // 3), B, dtype=torch.int32) if sizes.ids else None,
        "first_row": sizes.first_row,
    }


def listed(**settings: bool) -> str:
    """Return the names of the settings that are on, as the name of some sizes."""
    return ", ".join(name.replace("_", " ") for name, on in settings.items() if on)


def find_cards() -> Iterator[Card[Any]]:
    """Import all files next to this one and return their cards."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        yield from getattr(importlib.import_module(f"{__package__}.{module.name}"), "CARDS", ())


def by_name(found: Any) -> Outputs:
    """Return the tensors of a NamedTuple by name, without what is None."""
    return {name: value for name, value in found._asdict().items() if value is not None}


def in_float64(inputs: Inputs) -> Inputs:
    """Return inputs of a pass with which its reference computes in float64."""

    def widened(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    return {name: widened(value) for name, value in inputs.items()}


def inputs_behind(forward: Pass[S], backward: Callable[..., Any], sizes: S, data: Data, **settings: Any) -> Inputs:
    """Return inputs of a backward pass: inputs and outputs of the forward pass, random ``d_NAME`` and ``settings``.

    Args:
        forward: its inputs are drawn first, and its reference run on them.
        backward: launcher or reference; its arguments say what is wanted.
        sizes: of both passes.
        data: draws.
        settings: arguments that are none of these.
    """
    inputs = forward.inputs(sizes, data)
    known = inputs | forward.reference(**inputs)._asdict() | settings
    names = inspect.signature(backward).parameters
    gradients = (name for name in names if name not in known)
    known |= {name: like(known[name.removeprefix("d_")], data) for name in gradients}
    return {name: known[name] for name in names}


def like(value: Tensor, data: Data) -> Tensor:
    """Return normal numbers of a tensor's shape and type."""
    return data.normal(*value.shape, dtype=value.dtype)
