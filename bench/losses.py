"""Time and memory of the contrastive losses with their gradients, next to those of other projects, on the same data.

    python -m textlock.bench.losses                             # the sizes that fit this device
    python -m textlock.bench.losses --batch 4096 --world 16     # one rank of 16: 4,096 images, 65,536 texts
    python -m textlock.bench.losses --candidates ours_chunked open_clip > losses.jsonl
    pytest bench/test_losses.py --benchmark-only                # the same figures through pytest-benchmark

Embeddings are float32, those of the texts frozen; logit scale and bias are learned. With `--world` the other ranks'
share of each collective is computed beforehand and added where the collective would run, so results are exact and no
communication is timed. Every loss is first compared with float64; one that is wrong prints no figure. The losses of one
operation then take turns. One JSON line a candidate on stdout, a table on stderr; exit status 1 if one of ours is wrong
or fails. The floor is two matrix products of the size of the logits in the loss's own dtype, at the rate of large
products (`textlock.bench.ceilings`): no exact method with a gradient does less. TFLOP/s count those two products alone.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from textlock.bench import ceilings
from textlock.bench.candidates import Comparison, Ready, compared
from textlock.bench.ceilings import ceilings_for
from textlock.bench.entry import FLOOR, PEAK, TIMING, Benchmark, Column, Line, Session, require_known, require_positive
from textlock.bench.measure import Unavailable, check_compiler, relative_error
from textlock.kernels import contrastive
from textlock.kernels.sigmoid import sigmoid_loss
from textlock.kernels.tiles import runs_tiles

# Largest relative error of loss and gradients against float64 that still counts as right, by the dtype of the matrix
# products. bfloat16 rounds every logit before a loss sees it: its error, not this bound, is the figure to read there.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-1}

# Images of one rank and ranks; widths of the embeddings.
SIZES = {"cpu": ((2048, 1), (4096, 2)), "cuda": ((4096, 16), (16384, 1), (65536, 1))}
WIDTHS = {"cpu": (128, 768), "cuda": (768,)}

# Logits whose dense reference a GPU still holds next to their gradients.
DENSE_BYTES = 2**33


@dataclass(frozen=True, kw_only=True)
class LossOptions(ceilings.Options):
    """Options of the command."""

    batch: tuple[int, ...] = ()
    """Images of one rank; left out: sizes that fit the device."""
    world: int = 1
    """Ranks; there are batch x world texts."""
    width: tuple[int, ...] = ()
    """Width of the embeddings; left out: 768, on a CPU also 128."""
    scale: float = 50.0
    """Logit scale."""
    seed: int = 0
    """Of the data."""


@dataclass(frozen=True, eq=False)
class Case:
    """Unit embeddings of all ranks, with a mean positive cosine near 0.2; this rank is the first."""

    images: Tensor  # [B, d]
    text: Tensor  # [B, d]
    scale: Tensor
    bias: Tensor
    b: int

    @property
    def B(self) -> int:
        return self.text.shape[0]

    @property
    def d(self) -> int:
        return self.text.shape[1]

    @property
    def world(self) -> int:
        return self.B // self.b

    def double(self) -> "Case":
        return Case(self.images.double(), self.text.double(), self.scale.double(), self.bias.double(), self.b)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # own image embeddings, scale, bias
Result = dict[str, Tensor]  # "loss" and the gradient of what it depends on


@dataclass(frozen=True)
class LossCandidate:
    """A loss of one case, the dtype of its matrix products, and what float64 says."""

    loss: Loss
    dtype: torch.dtype
    truth: Callable[[], Result]

    def ready(self, case: Case) -> Ready:
        """Run loss and gradient on new leaves and compare them with the truth."""
        inputs = leaves(case)
        found = errors(evaluate(self.loss, inputs), self.truth())
        return Ready(lambda: evaluate(self.loss, inputs), found, TOLERANCE[self.dtype], self.dtype)


def make_case(b: int, world: int, d: int, scale: float, seed: int, device: torch.device) -> Case:
    """Draw the embeddings of all ranks."""
    generator = torch.Generator(device).manual_seed(seed)

    def noise() -> Tensor:
        return F.normalize(torch.randn(b * world, d, device=device, generator=generator))

    text = noise()
    images = F.normalize(noise() + 0.2 * text)
    return Case(images, text, torch.tensor(scale, device=device), torch.tensor(-10.0, device=device), b)


def leaves(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return own image embeddings, scale and bias as fresh tensors that take gradients."""
    return (
        case.images[: case.b].clone().requires_grad_(),
        case.scale.clone().requires_grad_(),
        case.bias.clone().requires_grad_(),
    )


def evaluate(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Result:
    """Run a loss forward and backward."""
    for tensor in inputs:
        tensor.grad = None
    value = loss(*inputs)
    value.backward()
    names = ("image_grad", "scale_grad", "bias_grad")
    grads = {name: tensor.grad for name, tensor in zip(names, inputs, strict=True) if tensor.grad is not None}
    return {"loss": value.detach()} | grads


def errors(result: Result, truth: Result) -> dict[str, float]:
    """Return the relative error of the loss and of every gradient, in the Euclidean norm."""
    if missing := truth.keys() - result.keys():
        return dict.fromkeys(sorted(missing), float("nan"))
    return {name: relative_error(result[name], true) for name, true in truth.items()}


@lru_cache(1)
def contrastive_truth(case: Case) -> Result:
    """Float64 loss of the global batch, its gradient for the own images and their share of the scale gradient."""
    exact = case.double()
    image, scale = exact.images.requires_grad_(), exact.scale.requires_grad_()
    dense = case.B**2 * 8 <= 2**29
    loss = contrastive.contrastive_loss(image, exact.text, scale, mode="reference" if dense else "chunked")
    loss.backward()
    assert image.grad is not None
    own = image.grad[: case.b]
    share = (own * image.detach()[: case.b]).sum() / scale.detach()
    return {"loss": loss.detach(), "image_grad": own, "scale_grad": share}


@lru_cache(1)
def contrastive_share_truth(case: Case) -> Result:
    """Float64 truth of libraries whose ranks differentiate their own images and texts and exchange the rest."""
    if case.world == 1:
        return contrastive_truth(case)
    exact = case.double()

    def share(image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        labels = torch.arange(case.b, device=image.device)
        everyone = torch.cat([image, exact.images[case.b :]])
        image_to_text = F.cross_entropy(scale * image @ exact.text.T, labels)
        text_to_image = F.cross_entropy(scale * exact.text[: case.b] @ everyone.T, labels)
        return (image_to_text + text_to_image) / 2

    return evaluate(share, leaves(exact))


@lru_cache(1)
def sigmoid_truth(case: Case) -> Result:
    """Float64 mean over the own images of their losses against all texts, which is what every rank differentiates."""
    exact = case.double()
    mode: Literal["reference", "chunked"] = "reference" if case.b * case.B * 8 <= 2**29 else "chunked"

    def loss(image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(image, exact.text, scale, bias, mode=mode)

    return evaluate(loss, leaves(exact))


@contextmanager
def collectives(add: Callable[[Tensor], object]) -> Iterator[None]:
    """Run `add` on the message where `contrastive_loss` would all-reduce it."""
    with (
        mock.patch.object(contrastive, "check_layout"),
        mock.patch.object(contrastive, "_all_reduce", lambda message, *_: add(message)),
    ):
        yield


def other_ranks(case: Case, mode: contrastive.Mode) -> Tensor:
    """Sum of the messages that all ranks but the first send."""
    messages: list[Tensor] = []
    with torch.no_grad(), collectives(lambda message: messages.append(message.clone())):
        for first_row in range(case.b, case.B, case.b):
            rows = case.images[first_row : first_row + case.b]
            contrastive.contrastive_loss(
                rows, case.text, case.scale, first_row=first_row, group=dist.group.WORLD, mode=mode
            )
    return torch.stack(messages).sum(0)


def ours(case: Case, *, mode: contrastive.Mode) -> LossCandidate:
    """`contrastive_loss` in one of its modes, as the first of all ranks."""
    dtype = dtype_of_tiles(case) if mode in ("store", "recompute") else torch.float32
    if mode == "reference" and case.b * case.B * 4 > DENSE_BYTES:
        raise Unavailable("its dense logits and their gradients do not fit")
    if case.world == 1:

        def loss(image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return contrastive.contrastive_loss(image, case.text, scale, mode=mode)
    elif mode == "reference":
        raise Unavailable("it holds the logits of all ranks on each, so it is measured on one rank only")
    else:
        message = other_ranks(case, mode)

        def loss(image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            with collectives(lambda values: values.add_(message)):
                return contrastive.contrastive_loss(image, case.text, scale, group=dist.group.WORLD, mode=mode)

    return LossCandidate(loss, dtype, partial(contrastive_truth, case))


def our_sigmoid(case: Case, *, mode: Literal["chunked", "fused"]) -> LossCandidate:
    """`sigmoid_loss` in one of its modes."""
    dtype = dtype_of_tiles(case) if mode == "fused" else torch.float32

    def loss(image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(image, case.text, scale, bias, mode=mode)

    return LossCandidate(loss, dtype, partial(sigmoid_truth, case))


def dtype_of_tiles(case: Case) -> torch.dtype:
    """Return the dtype our kernels round embeddings to; raises Unavailable where they would be interpreted."""
    if not (case.text.is_cuda and runs_tiles(case.text)):
        raise Unavailable("its kernels need an H100 or later")
    return torch.float16


def open_clip_losses() -> Any:
    """Import open_clip's losses; raises Unavailable."""
    try:
        import open_clip.loss
    except ImportError:
        raise Unavailable("open_clip is not installed (pip install open-clip-torch)") from None
    return open_clip.loss


def peers_dtype(case: Case) -> torch.dtype:
    """Return the dtype other projects train in."""
    return torch.bfloat16 if case.text.is_cuda else torch.float32


def peers_autocast(case: Case) -> AbstractContextManager[object]:
    return torch.autocast("cuda", peers_dtype(case)) if case.text.is_cuda else nullcontext()


def open_clip(case: Case, *, compiled: bool) -> LossCandidate:
    """ClipLoss as its training command uses it: bfloat16 autocast on a GPU, local against gathered embeddings."""
    losses = open_clip_losses()
    clip_loss = losses.ClipLoss(local_loss=True, gather_with_grad=True, world_size=case.world)
    if compiled:
        check_compiler(case.text.device)
        clip_loss = torch.compile(clip_loss, dynamic=False)
    others = case.images[case.b :]

    def gather(image: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return torch.cat([image, others]), case.text

    def loss(image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        with mock.patch.object(losses, "gather_features", gather), peers_autocast(case):
            return clip_loss(image, case.text[: case.b], scale)

    return LossCandidate(loss, peers_dtype(case), partial(contrastive_share_truth, case))


def open_clip_sigmoid(case: Case, *, chunk_size: int | None = None) -> LossCandidate:
    """SigLipLoss with the texts of the other ranks arriving where it exchanges them."""
    losses = open_clip_losses()
    settings = {} if chunk_size is None else {"chunk_size": chunk_size}
    if not settings.keys() <= inspect.signature(losses.SigLipLoss).parameters.keys():
        raise Unavailable("SigLipLoss of this open_clip has no chunk_size")
    siglip_loss = losses.SigLipLoss(world_size=case.world, dist_impl="shift", **settings)

    def loss(image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        arriving = iter(case.text.split(case.b)[1:])
        exchange = mock.patch.object(losses, "neighbour_exchange_with_grad", lambda *_: next(arriving))
        with exchange, peers_autocast(case):
            return siglip_loss(image, case.text[: case.b], scale, bias)

    return LossCandidate(loss, peers_dtype(case), partial(sigmoid_truth, case))


def linear_cross_entropy(case: Case) -> LossCandidate:
    """PyTorch's chunked projection and cross entropy, once a direction.

    It has one direction only, so the logits are computed twice, and on many ranks the second call needs all image
    embeddings gathered and their gradients reduced (neither is timed here). It knows no mask for duplicate captions.
    """
    function, settings = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or settings is None:
        raise Unavailable("torch has F.linear_cross_entropy with options from 2.13 on")
    dtype = peers_dtype(case)
    text, others = case.text.to(dtype), case.images[case.b :]
    labels = torch.arange(case.b, device=text.device)

    def loss(image: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        everyone = (scale * torch.cat([image, others])).to(dtype)
        image_to_text = function(everyone[: case.b], text, labels, options=settings())
        text_to_image = function(text[: case.b], everyone, labels, options=settings())
        return (image_to_text + text_to_image) / 2

    return LossCandidate(loss, dtype, partial(contrastive_share_truth, case))


CANDIDATES: dict[str, Callable[[Case], LossCandidate]] = {
    "ours_reference": partial(ours, mode="reference"),
    "ours_chunked": partial(ours, mode="chunked"),
    "ours_recompute": partial(ours, mode="recompute"),
    "ours_store": partial(ours, mode="store"),
    "open_clip": partial(open_clip, compiled=False),
    "open_clip_compiled": partial(open_clip, compiled=True),
    "linear_cross_entropy": linear_cross_entropy,
    "ours_sigmoid_chunked": partial(our_sigmoid, mode="chunked"),
    "ours_sigmoid_fused": partial(our_sigmoid, mode="fused"),
    "open_clip_sigmoid": open_clip_sigmoid,
    "open_clip_sigmoid_256": partial(open_clip_sigmoid, chunk_size=256),
}


@contextmanager
def process_group() -> Iterator[None]:
    """Make the group of this one process, which stands for that of all ranks."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def comparisons(case: Case) -> Iterator[Comparison]:
    """Return the comparison of the symmetric loss and that of the sigmoid loss on the same data."""
    for operation in ("contrastive", "sigmoid"):
        named = {name: make for name, make in CANDIDATES.items() if ("sigmoid" in name) == (operation == "sigmoid")}
        yield Comparison(
            "loss",
            operation,
            {"b": case.b, "B": case.B, "d": case.d, "scale": case.scale.item()},
            (operation, str(case.b), str(case.B), str(case.d)),
            {name: partial(prepare, make, case) for name, make in named.items()},
            operations=4 * case.b * case.B * case.d,
            memory=True,
        )


def prepare(make: Callable[[Case], LossCandidate], case: Case) -> Ready:
    """Make a candidate for a case and run it."""
    return make(case).ready(case)


def lines(options: LossOptions, session: Session) -> Iterator[Line]:
    """Measure every loss on every case."""
    kind, found = session.device.type, ceilings_for(options.ceilings, session.device, options.seconds)
    with process_group():
        for b, world in tuple((b, options.world) for b in options.batch) or SIZES[kind]:
            for d in options.width or WIDTHS[kind]:
                case = make_case(b, world, d, options.scale, options.seed, session.device)
                for comparison in comparisons(case):
                    yield from compared(comparison, options.candidates, found, options.seconds, session)


def check(options: LossOptions) -> None:
    """Raise ValueError for what cannot be."""
    require_positive(options, "batch", "width", "world", "scale", "seconds", "limit")
    require_known("candidates", options.candidates, CANDIDATES)


def error_of(name: str) -> Column:
    """Return the column of an error, empty for a loss that has none of this name."""
    return Column({"loss": "errors: loss"}.get(name, name), lambda outcome: outcome["errors"].get(name), ".0e")


BENCHMARK = Benchmark(
    about=__doc__,
    options=LossOptions,
    check=check,
    lines=lines,
    before=("operation", "b", "B", "d"),
    columns=(
        *(*TIMING, Column("dtype", "dtype"), FLOOR, Column("TFLOP/s", "tflops", ".3g"), PEAK),
        *map(error_of, ("loss", "image_grad", "scale_grad", "bias_grad")),
    ),
    title=lambda options: f"loss and gradient, scale {options.scale:g}",
)

if __name__ == "__main__":
    BENCHMARK.command()
