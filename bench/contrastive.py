"""Time and peak memory of the contrastive loss with its gradient, against open_clip's, in one process on one data set.

    python -m textlock.bench.contrastive                               # CPU: 2,048 and 8,192 pairs, width 128 and 768
    python -m textlock.bench.contrastive --batch 4096 --world 16       # one rank of 16: 4,096 images, 65,536 texts

The text rows are frozen, the logit scale is learnt. With `--world` the other ranks' share of each collective is
computed beforehand and added where the collective would run, so results are exact and no communication is timed.
Every candidate is first compared with float64; one that is wrong prints no figure. One JSON line a figure on stdout,
a table on stderr. `floor` is two matrix products of the logits' size, timed in the same run: no exact method with
a gradient does less.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from textlock.engine.provenance import commit, device_name, versions
from textlock.kernels import contrastive

# Largest relative error of (loss, d loss/d image, d loss/d scale) against float64 that still counts as right. Rows
# in half width round every logit before open_clip sees it: its error, not this bound, is the figure to read there.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True, kw_only=True)
class Options:
    batch: tuple[int, ...] = (2048, 8192)
    """Image rows of one rank."""
    width: tuple[int, ...] = (128, 768)
    """Width of the embedding."""
    world: int = 1
    """Ranks; the text rows are batch x world."""
    scale: float = 50.0
    """Logit scale."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the image and text rows."""
    seconds: float = 2.0
    """Time spent on each figure, at least three runs."""
    seed: int = 0
    """Of the data."""


@dataclass(frozen=True)
class Case:
    """Image rows of all ranks and text rows, unit, with a mean positive cosine near 0.2; this rank is the first."""

    images: Tensor  # [B, d]
    text: Tensor  # [B, d]
    scale: Tensor
    b: int

    def to(self, dtype: torch.dtype) -> "Case":
        return replace(self, images=self.images.to(dtype), text=self.text.to(dtype), scale=self.scale.to(dtype))


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # own image rows, all text rows, scale


@dataclass(frozen=True)
class Result:
    loss: Tensor
    image_grad: Tensor
    scale_grad: Tensor

    def errors(self, truth: "Result") -> dict[str, float]:
        pairs = {name: (getattr(self, name).double(), getattr(truth, name)) for name in vars(truth)}
        return {name: ((value - true).norm() / true.norm()).item() for name, (value, true) in pairs.items()}


def make_case(b: int, world: int, d: int, scale: float, seed: int, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(seed)

    def noise() -> Tensor:
        return F.normalize(torch.randn(b * world, d, device=device, generator=generator))

    text = noise()
    images = F.normalize(noise() + 0.2 * text)
    return Case(images, text, torch.tensor(scale, device=device), b)


def evaluate(loss: Loss, case: Case) -> Result:
    image = case.images[: case.b].clone().requires_grad_()
    scale = case.scale.clone().requires_grad_()
    value = loss(image, case.text, scale)
    value.backward()
    assert image.grad is not None and scale.grad is not None
    return Result(value.detach(), image.grad, scale.grad)


def truth_of(case: Case) -> Result:
    """Float64 loss of the global batch, its gradient for the own rows and their share of the scale gradient."""
    exact = case.to(torch.float64)
    image, scale = exact.images.requires_grad_(), exact.scale.requires_grad_()
    dense = image.shape[0] ** 2 * 8 <= 2**29
    loss = contrastive.contrastive_loss(image, exact.text, scale, mode="reference" if dense else "chunked")
    loss.backward()
    assert image.grad is not None
    own = image.grad[: case.b]
    return Result(loss.detach(), own, (own * image.detach()[: case.b]).sum() / scale.detach())


@contextmanager
def collectives(add: Callable[[Tensor], object]) -> Iterator[None]:
    """Run `add` on the message where `contrastive_loss` would all-reduce it."""
    with (
        mock.patch.object(contrastive, "_check_layout"),
        mock.patch.object(contrastive, "_all_reduce", lambda message, *_: add(message)),
    ):
        yield


def other_ranks(case: Case, world: int) -> Tensor:
    """Sum of the messages that all ranks but the first send."""
    messages: list[Tensor] = []
    with torch.no_grad(), collectives(lambda message: messages.append(message.clone())):
        for first_row in range(case.b, case.b * world, case.b):
            rows = case.images[first_row : first_row + case.b]
            contrastive.contrastive_loss(rows, case.text, case.scale, first_row=first_row, group=dist.group.WORLD)
    return torch.stack(messages).sum(0)


def candidates(case: Case, world: int) -> dict[str, tuple[Loss, Result]]:
    """Name -> (loss, its float64 truth)."""
    truth = truth_of(case)
    found: dict[str, tuple[Loss, Result]] = {}
    if world == 1:
        # The dense form holds the logits of all ranks on each, so it is a candidate for one rank only.
        found["reference"] = partial(contrastive.contrastive_loss, mode="reference"), truth
        found["chunked"] = partial(contrastive.contrastive_loss, mode="chunked"), truth
    else:
        message = other_ranks(case, world)

        def chunked(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            with collectives(lambda values: values.add_(message)):
                return contrastive.contrastive_loss(image, text, scale, group=dist.group.WORLD, mode="chunked")

        found["chunked"] = chunked, truth
    try:
        import open_clip.loss
    except ImportError:
        print("open_clip is not installed: no figure of it (pip install open-clip-torch)", file=sys.stderr)
        return found
    clip_loss = open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, world_size=world)

    def open_clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        everyone = torch.cat([image, case.images[case.b :].to(image.dtype)])
        with mock.patch.object(open_clip.loss, "gather_features", lambda *_, **__: (everyone, text)):
            return clip_loss(image, text[: case.b], scale)

    # Its ranks differentiate their own part of the loss and exchange the rest, so on one rank its truth is its own.
    own_truth = truth if world == 1 else evaluate(open_clip_loss, case.to(torch.float64))
    found["open_clip"] = (open_clip_loss, own_truth)
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_of(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Seconds of the fastest run, after one that is not counted: other work on the machine can only add."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive during a run beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def machine(device: torch.device) -> dict[str, object]:
    return {"device": device_name(device), "versions": versions(), "commit": commit()}


def main(options: Options) -> None:
    if min(*options.batch, *options.width, options.world, options.scale) <= 0:
        raise ValueError("batch, width, world and scale must be positive")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: torch.dtype = getattr(torch, options.dtype)
    if options.world > 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    table = Table(
        title=f"contrastive loss and gradient, {options.dtype}, scale {options.scale:g}, one of {options.world}"
    )
    for column in ("b", "B", "d", "loss", "ms", "x floor", "TFLOP/s", "peak MiB", "error loss", "error dI", "error ds"):
        table.add_column(column, justify="right")
    for b in options.batch:
        for d in options.width:
            B = b * options.world
            case = make_case(b, options.world, d, options.scale, options.seed, device).to(dtype)
            image, text = case.images[:b], case.text
            floor = 2 * time_of(partial(torch.mm, image, text.T), options.seconds / 2, device)
            for name, (loss, truth) in candidates(case, options.world).items():
                errors = evaluate(loss, case).errors(truth)
                row = {"case": {"b": b, "B": B, "d": d, "scale": options.scale, "dtype": options.dtype}, "loss": name}
                cells = [f"{b}", f"{B}", f"{d}", name]
                if not all(error <= TOLERANCE[dtype] for error in errors.values()):  # nan is wrong too
                    print(json.dumps(row | {"wrong": errors} | machine(device)), flush=True)
                    table.add_row(*cells, "wrong", "", "", "", *(f"{error:.0e}" for error in errors.values()))
                    continue
                run = partial(evaluate, loss, case)
                seconds, peak = time_of(run, options.seconds, device), peak_bytes(run, device)
                rate = 4 * b * B * d / seconds / 1e12
                figures = {"ms": seconds * 1e3, "floor_ms": floor * 1e3, "useful_tflops": rate, "peak_bytes": peak}
                print(json.dumps(row | figures | {"errors": errors} | machine(device)), flush=True)
                table.add_row(
                    *cells,
                    f"{seconds * 1e3:.1f}",
                    f"{seconds / floor:.2f}",
                    f"{rate:.3g}",
                    f"{peak / 2**20:.0f}",
                    *(f"{error:.0e}" for error in errors.values()),
                )
    Console(stderr=True, width=120).print(table)
    if options.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
