"""What the tests of the pairwise losses share: data, one way to run a loss in any mode, and bounds on its error.

A bound follows from the arithmetic; `rounding.py` says by how much a sum of K products is off:
- a logit by s times that of d products, a sum over B texts by that of B, relative to itself; the matching pair is
  exact. A loss is off by at most that, relative to itself.
- a weight of the gradient is off by four times that (a logit and a normaliser, in two softmaxes), and by what its type
  rounds off: 2^-11 in float16, 2^-9 stored.
- embeddings that float16 does not hold shift every logit by 3e-4 s / sqrt(d).
"""

import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from textlock.kernels import contrastive, image_to_text, sigmoid
from textlock.kernels.tiles import runs_tiles

from .rounding import sum_rounding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WEIGHTS = {
    **{"contrastive recompute": 2**-11, "contrastive store": 2**-9},
    **{"sigmoid fused": 2**-11, "image_to_text fused": 2**-9},
}
INPUTS = ("image", "text", "logit_scale", "logit_bias")

needs_tiles = pytest.mark.skipif(
    not runs_tiles(torch.empty(1, device=DEVICE)),
    reason="the kernels need compute capability 9.0, or TRITON_INTERPRET=1 on a CPU",
)


@dataclass(frozen=True)
class Loss:
    """A pairwise loss and what its tests have to know of it."""

    name: str
    module: ModuleType
    function: Callable[..., Tensor]
    learnt: tuple[str, ...]  # inputs that can take a gradient
    tiled: tuple[str, ...]  # modes that run kernels

    def __str__(self) -> str:
        return self.name


def softmax_terms(logits: Tensor, own: int, negatives: list[int]) -> Tensor:
    return torch.stack([logits[own], *(logits[j] for j in negatives)]).logsumexp(0) - logits[own]


def loss_by_definition(loss, image, text, scale, bias=0.0, first_row=0, ids=None) -> Tensor:
    """Second spelling of the losses, image by image, so that `reference` itself is not the only witness."""
    b, B = len(image), len(text)
    z = scale * image @ text.T
    total = 0.0
    for i in range(b):
        t = first_row + i
        texts = [j for j in range(B) if j != t and (ids is None or ids[j] != ids[t])]
        images = [k for k in range(b) if k != i and (ids is None or ids[first_row + k] != ids[t])]
        if loss.name == "sigmoid":
            total = total - F.logsigmoid(z[i, t] + bias) - sum(F.logsigmoid(-z[i, j] - bias) for j in texts)
        elif loss.name == "image_to_text":
            total = total + softmax_terms(z[i], t, texts)
        else:
            total = total + (softmax_terms(z[i], t, texts) + softmax_terms(z[:, t], i, images)) / 2
    return total / b


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("contrastive", contrastive, contrastive.contrastive_loss, INPUTS[:3], ("store", "recompute")),
        Loss("sigmoid", sigmoid, sigmoid.sigmoid_loss, INPUTS, ("fused",)),
        Loss("image_to_text", image_to_text, image_to_text.image_to_text_loss, INPUTS[:3:2], ("fused",)),
    )
}

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=str)
ALL_MODES = [
    pytest.param(loss, mode, id=f"{loss}, {mode}", marks=needs_tiles if mode in loss.tiled else ())
    for loss in LOSSES.values()
    for mode in ("chunked", *loss.tiled)
]
every_mode = pytest.mark.parametrize(("loss", "mode"), ALL_MODES)
tiled_modes = pytest.mark.parametrize(("loss", "mode"), [case for case in ALL_MODES if case.marks])


def make_rows(b, B, d, first_row=0, *, half=True) -> tuple[Tensor, Tensor]:
    """Draw unit float64 rows, that float16 holds if `half`; image i is noise with a share of its text, so that hard
    negatives remain at any scale.
    """
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(B, d, dtype=torch.float64, generator=generator))
    noise = F.normalize(torch.randn(b, d, dtype=torch.float64, generator=generator))
    image = F.normalize(noise + 0.1 * text[first_row : first_row + b])
    return (image.half().double(), text.half().double()) if half else (image, text)


def nearly_sure_rows() -> tuple[Tensor, Tensor]:
    """Draw rows whose loss is near 1e-6 at a scale of 100: their texts crowd around one direction."""
    axes = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    text = F.normalize(axes[:64] + 2.1 * axes[64])
    return F.normalize(text + 0.003 * axes.roll(1, 0)[:64]).half().double(), text.half().double()


def some_duplicates(B: int) -> Tensor:
    return (torch.arange(B) % max(1, 2 * B // 3)) << 33  # they differ in the high half alone


@contextmanager
def in_chunks_of(rows: int | None):
    """Let the losses work on that many images at a time."""
    with ExitStack() as stack:
        if rows is not None:
            for loss in LOSSES.values():
                stack.enter_context(mock.patch.object(loss.module, "rows_per_chunk", lambda *_: rows))
            stack.enter_context(mock.patch.object(image_to_text, "ROWS_PER_TILE", 1))
        yield


def inputs_of(loss, image, text, scale=50.0, bias=-10.0, *, dtype=torch.float32, device=DEVICE, learnt=()):
    """Return the tensors that a loss takes, by name, as leaves of which some take a gradient."""
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"image": image.to(device, dtype, copy=True), "text": text.to(device, dtype, copy=True)}
    inputs["logit_scale"] = torch.tensor(scale, dtype=scalar, device=device)
    if loss.name == "sigmoid":
        inputs["logit_bias"] = torch.tensor(bias, dtype=scalar, device=device)
    return {name: x.requires_grad_(name in learnt) for name, x in inputs.items()}


def run(
    loss,
    mode,
    image,
    text,
    scale=50.0,
    bias=-10.0,
    *,
    dtype=torch.float32,
    device=DEVICE,
    chunk=None,
    learnt=None,
    **options,
) -> dict[str, Tensor]:
    """Return the loss, and the gradients of what is learnt by name, in float64 on the CPU."""
    learnt = loss.learnt if learnt is None else learnt
    inputs = inputs_of(loss, image, text, scale, bias, dtype=dtype, device=device, learnt=learnt)
    if options.get("ids") is not None:
        options["ids"] = options["ids"].to(device)
    with in_chunks_of(chunk):
        value = loss.function(**inputs, mode=mode, **options)
    if learnt:
        value.backward()
    assert all(inputs[name].grad.dtype == inputs[name].dtype for name in learnt)
    return {"loss": value.detach().double().cpu()} | {name: inputs[name].grad.double().cpu() for name in learnt}


def truth_of(loss, image, text, scale=50.0, bias=-10.0, **options) -> dict[str, Tensor]:
    """Return what `run` does, by dense autograd in float64."""
    options = {"dtype": torch.float64, "device": torch.device("cpu")} | options
    return run(loss, "reference", image, text, scale, bias, **options)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_close(loss, mode, result, truth, image, text, scale, *, exact=True, factor=1.0) -> None:
    """Hold every gradient in `result` to the bounds at the top of this file.

    `exact` says that float16 holds the rows. `factor` widens the bounds where parts of a gradient cancel.
    """
    (b, d), B = image.shape, len(text)
    logit = scale * sum_rounding(d) + sum_rounding(B)
    rounding = WEIGHTS.get(f"{loss} {mode}", 0.0)
    logit += 0.0 if exact or not rounding else 3e-4 * scale / math.sqrt(d)
    weight = 4 * logit + rounding + (0 if image.dtype == torch.float64 else torch.finfo(image.dtype).eps)
    bounds = {name: weight * truth[name].norm() for name in ("image", "text") if name in truth}
    # A scalar's gradient is a sum that may cancel, so it is measured by the size of its terms.
    bounds |= {"loss": logit * truth["loss"], "logit_bias": weight * truth["loss"]}
    bounds["logit_scale"] = weight * truth["image"].norm(dim=1).sum() / scale
    for name, value in result.items():
        error = (value - truth[name]).norm()
        assert error <= factor * bounds[name], f"{name}: error {error:.1e} exceeds {factor * bounds[name]:.1e}"
    if "image" in result:  # roundings of b rows, each in its own direction, make no longer or shorter gradient
        length = (result["image"] * truth["image"]).sum() / truth["image"].square().sum() - 1
        assert abs(length) <= factor * (weight - rounding + 2 * rounding / math.sqrt(b)), f"length: {length:.1e}"


def profiled(function) -> tuple[list[int], int, int]:
    """Return the bytes of a call's allocations, the most that are alive at once, and its number of matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    products = sum(event.name() in ("aten::mm", "aten::addmm", "aten::addmm_") for event in events)
    return [n for n in changes if n > 0], max(accumulate(changes, initial=0)), products
