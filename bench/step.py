"""Whole training steps: images a second, memory and where the time goes, next to the loops of other projects.

    python -m textlock.bench.step                                                # the sizes that fit this device
    python -m textlock.bench.step --local-batches 4096 --candidates ours gradcache_fused
    python -m textlock.bench.step --shards data/train --local-batches 1024       # with the loader's decoding
    python -m textlock.bench.step --candidates ours --jpegs 256 512              # the same from JPEGs that it draws
    python -m textlock.bench.step --candidates ours --profile trace.json.gz      # and where a step's time goes

A step is what train.py does: a batch on its way to the device, the tower forward and backward, the loss over all texts,
the reduction, clipping and AdamW, the logit scale included. Text embeddings are stored ones.

One process stands for the first of `texts / local batch` ranks. The text embeddings of all ranks lie on the device; the
image embeddings of the other ranks are random unit vectors, whose column sums are computed beforehand and added where
`contrastive_loss` would all-reduce them. So its work, memory and numbers are those of one rank of many. Collectives run
in a group of this one process: `gather` is the copy of the own text embeddings among those of all, `reduction` what
such a group takes. Network time is not measured; `python -m textlock.bench.scaling` adds it.

Peers, all with the same weights, data, optimiser and clipping, on the fused blocks, torch's own (`eager`) or these
under torch.compile:

| gradcache   | every image forward twice, one loss, ours (https://arxiv.org/abs/2101.06983)                         |
| open_clip   | its training loop with accum_freq: forward twice, its loss once for every micro-batch                |
| checkpoints | as the released code: the local batch at once, every block recomputed, dense logits in both directions |

Ours is measured first. Before a candidate is timed, its weight gradients of a small batch are compared with a dense
step in float64; one that is wrong has no figures. On one rank all must agree. As one of two ranks, the gradients of
`open_clip` and `checkpoints` lack the share a reduce-scatter would add, because the second rank is simulated, and are
compared with what remains. `open_clip` adds the gradient of its logit scale once for every micro-batch, which is
not compared. Medians of steps; parts are the times between events on the device's stream. One JSON line a figure on
stdout, a table on stderr; exit status 1 if ours is wrong or fails.

The floor of a step is the operations of the tower, forward and backward with nothing recomputed, and the two matrix
products of the loss, over the rate of large products (`textlock.bench.ceilings`). The data, what is done to it between
the products and the optimiser come on top, so no step gets there.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from textlock.bench import ceilings, comparison, losses, trace
from textlock.bench.candidates import Ready, at_floor, judged, name_of
from textlock.bench.ceilings import Ceilings, ceilings_for
from textlock.bench.entry import (
    ERROR,
    FLOOR,
    PEAK,
    TIMING,
    Benchmark,
    Column,
    Line,
    Outcome,
    Session,
    device_of,
    has_figures,
    require_known,
    require_positive,
)
from textlock.bench.loader import write_shards
from textlock.bench.loops import (
    CANDIDATES,
    PHASES,
    Clock,
    Phase,
    StepSetting,
    batch_of,
    batches,
    draw_images,
    group_of_one,
)
from textlock.bench.measure import LEAST_RUNS, Spread, peak_bytes, relative_error
from textlock.bench.records import profile_table
from textlock.bench.tower import flat
from textlock.data.loader import Batch
from textlock.kernels.card import PairSizes
from textlock.kernels.device import peak_rate
from textlock.models.vision import VISION_CONFIGS

# Relative error of the weight gradients against float64 that still counts as right, by the type of the products.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
COMPARED_IMAGES = 8  # of one rank, in two micro-batches
COMPARED_RANKS = (1, 2)
SECONDS_OF_CEILINGS = 1.0  # on each, where they are not read from a file

LOCAL_BATCHES = {"cpu": (16, 32), "cuda": (1024, 2048, 4096, 65536)}
TEXTS = {"cpu": 128, "cuda": 65536}
MICRO_BATCH = {"cpu": 8, "cuda": 512}
TOWERS = {"cpu": "eva02_micro_patch8_32", "cuda": "eva02_base_patch16_224"}


@dataclass(frozen=True, kw_only=True)
class StepOptions(ceilings.Options):
    """Options of the command."""

    tower: str | None = None
    """Name of the image tower; left out: one that fits the device, like all sizes below."""
    local_batches: tuple[int, ...] = ()
    """Images of one rank in a step."""
    texts: int | None = None
    """Texts of the global batch, a multiple of every local batch."""
    micro_batch: int | None = None
    """Images of one forward pass."""
    memory_gib: float | None = None
    """Memory for the activations of ours in GiB; left out: what is free on the device."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the tower: bf16 on a GPU, fp32 on a CPU."""
    shards: str | None = None
    """Training shards to decode images from; left out: images that are decoded already."""
    jpegs: tuple[int, ...] = ()
    """Short sides of JPEGs to draw and pack; ours is measured again with each, decoding, at the first local batch."""
    workers: int = 8
    """Decoding threads."""
    profile: Path | None = None
    """File for a Chrome trace (.json.gz) of a step of ours at the first local batch, whose kernels are listed; left
    out: none."""
    seconds: float = 10.0
    """Time spent on each figure, at least three steps."""
    limit: float = 300.0
    """Seconds after which no candidate is started and the running one is stopped."""
    seed: int = 0
    """Of weights and data."""


def draw_jpegs(folder: str, short_side: int, count: int) -> dict[str, Any]:
    """Write shards of JPEGs as large as photos, one batch of ``count`` an epoch; return their part of the case."""
    shards = write_shards(Path(folder), count, short_side * 5 // 4, short_side, bad=0.0)
    return {"kilobytes_per_jpeg": round(mean(map(len, shards.jpegs.values())) / 1e3, 1)}


def small_batch(setting: StepSetting, ranks: int) -> tuple[losses.Case, Batch]:
    """Return a small batch of one of so many ranks."""
    case = setting.case(COMPARED_IMAGES, COMPARED_IMAGES * ranks)
    batch = batch_of(draw_images(setting, case.b).to(setting.device), case.text[: case.b])
    return case, replace(batch, text_embeddings=case.text[: case.b])


@cache
def true_gradients(setting: StepSetting, ranks: int, *, whole: bool) -> Tensor:
    """Return the weight gradients of the compared batch: one dense step of torch's own blocks in float64.

    Of the loss of the global batch, or (not ``whole``) of what a rank differentiates that exchanges the rest. They are
    kept on the host, so that a candidate has the device to itself.
    """
    case, batch = small_batch(setting, ranks)
    tower, exact = setting.build("plain").double(), case.double()
    rows = F.normalize(tower(batch.images), dim=-1)
    everyone = torch.cat([rows, exact.images[case.b :]])
    texts, labels = exact.text, torch.arange(case.B, device=setting.device)
    own = slice(None) if whole else slice(case.b)
    by_image = F.cross_entropy(exact.scale * everyone[own] @ texts.T, labels[own])
    by_text = F.cross_entropy(exact.scale * texts[own] @ everyone.T, labels[own])
    ((by_image + by_text) / 2).backward()
    return flat({name: cast(Tensor, weight.grad) for name, weight in tower.named_parameters()}).cpu()


def errors_of(name: str, setting: StepSetting) -> dict[str, float]:
    """Return the errors of a candidate's weight gradients; raises Unavailable, or Wrong."""
    errors = {}
    for ranks in COMPARED_RANKS:
        case, batch = small_batch(setting, ranks)
        small = replace(setting, micro_batch=COMPARED_IMAGES // 2)
        found = CANDIDATES[name].prepare(small, case).weight_gradients(batch)
        whole = ranks == 1 or CANDIDATES[name].loop in ("ours", "gradcache")
        truth = true_gradients(setting, ranks, whole=whole).to(setting.device)
        errors[f"weight_grads_of_{ranks}"] = relative_error(flat(found), truth)
    return judged(name, Ready(lambda: None, errors, TOLERANCE[setting.dtype], setting.dtype)).errors


def figures_of(
    name: str, setting: StepSetting, local_batch: int, shards: str | None, options: StepOptions, found: Ceilings
) -> Outcome:
    """Time whole steps of one candidate; no other one is alive meanwhile."""
    device, case = setting.device, setting.case(local_batch, setting.texts)
    prepared = CANDIDATES[name].prepare(setting, case)
    with batches(setting, case, shards, options.workers) as feed:
        prepared.step(feed).wait()
        peak = peak_bytes(lambda: prepared.step(feed).wait(), device)
        reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
        allocated = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        phases = timed(partial(prepared.step, feed), options.seconds)
    spread = Spread.of([sum(step.values()) for step in phases])
    middle = {phase: median(step[phase] for step in phases) for phase in PHASES}
    rate, highest = case.b / spread.median, peak_rate(device)
    floor, operations = floor_of(setting, case, found), VISION_CONFIGS[setting.tower].training_flops()
    figures = spread.published() | ({} if floor is None else at_floor(floor, spread.median))
    figures |= {
        "images_per_second": rate,
        "mfu_percent": None if highest is None else 100 * rate * operations / highest,
        "shares": {phase: seconds / sum(middle.values()) for phase, seconds in middle.items()},
        "seconds": middle,
        "peak_bytes": peak,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
    }
    if prepared.plan is not None:
        figures["plan"] = str(prepared.plan)
        figures["predicted_extra_time"] = prepared.plan.extra_time
        figures["predicted_activation_bytes"] = prepared.plan.activation_bytes
    return figures


def floor_of(setting: StepSetting, case: losses.Case, found: Ceilings) -> float | None:
    """Return the seconds below which no step gets, or None where products of this type have no ceiling."""
    if setting.dtype not in found.matrix_rate:
        return None
    operations = case.b * VISION_CONFIGS[setting.tower].training_flops() + 4 * case.b * case.B * case.d
    return found.floor(setting.dtype, operations=operations)


def profiled(
    setting: StepSetting, local_batch: int, path: Path, options: StepOptions, found: Ceilings
) -> dict[str, Outcome]:
    """Return the figures of the largest kernels of one step of ours, and write its trace."""
    case = setting.case(local_batch, setting.texts)
    prepared = CANDIDATES["ours"].prepare(setting, case)
    micro_batch = prepared.rank.micro_batch
    shapes = comparison.Setting(
        setting.tower, VISION_CONFIGS[setting.tower], micro_batch, setting.device, setting.dtype, setting.seed
    )
    with batches(setting, case, options.shards, options.workers) as feed:
        prepared.step(feed).wait()
        recorded = trace.record(lambda: prepared.step(feed), setting.device)
    trace.write_trace(recorded, path)
    pairs = PairSizes(images=case.b, texts=case.B, width=case.d)
    return trace.largest(trace.activities(recorded, shapes, pairs, found))


def timed(step: Callable[[Clock | None], Clock], seconds: float) -> list[dict[Phase, float]]:
    """Return the phases of steps that run for about this time; the host has one step queued ahead, as in training."""
    clocks = [step(None)]
    end = time.perf_counter() + seconds
    while len(clocks) < LEAST_RUNS or time.perf_counter() < end:
        clocks.append(step(clocks[-1]))
        clocks[-2].wait()
    clocks[-1].wait()
    return [clock.seconds() for clock in clocks]


def setting_of(options: StepOptions) -> StepSetting:
    """Fill in the options that were left out; raises ValueError for impossible ones."""
    device = device_of(options.device)
    kind = device.type
    setting = StepSetting(
        options.tower or TOWERS[kind],
        device,
        options.texts or TEXTS[kind],
        options.micro_batch or MICRO_BATCH[kind],
        options.precision,
        options.memory_gib,
        options.seed,
    )
    require_known("tower", [setting.tower], VISION_CONFIGS)
    require_known("candidates", options.candidates, CANDIDATES)
    require_positive(options, "local_batches", "texts", "micro_batch", "jpegs", "workers", "seconds", "limit")
    for local_batch in options.local_batches or LOCAL_BATCHES[kind]:
        if setting.texts % local_batch:
            raise ValueError(f"{setting.texts} texts are no multiple of the local batch {local_batch}")
        if local_batch % min(setting.micro_batch, local_batch):
            raise ValueError(f"the micro-batch {setting.micro_batch} does not divide the local batch {local_batch}")
    if (options.jpegs or options.profile) and options.candidates and "ours" not in options.candidates:
        raise ValueError("--jpegs and --profile are of ours, which --candidates leaves out")
    return setting


def lines(options: StepOptions, session: Session) -> Iterator[Line]:
    """Measure candidate after candidate, ours first: checking all beforehand would take the time of ours."""
    setting = setting_of(options)
    local_batches = options.local_batches or LOCAL_BATCHES[setting.device.type]
    found = ceilings_for(options.ceilings, setting.device, min(options.seconds, SECONDS_OF_CEILINGS))

    def line(name: str, errors: Outcome, local_batch: int, shards: str | None, jpegs: Outcome) -> Line:
        outcome = errors
        if has_figures(errors):
            work = partial(figures_of, name, setting, local_batch, shards, options, found)
            outcome = session.outcome_of(work) | {"errors": errors}
        side = jpegs["jpeg_short_side"]
        shown = f"{local_batch:,} images" if side is None else f"{local_batch:,} JPEGs of {side}"
        return Line("step", "step", shape_of(setting, local_batch) | jpegs, name, outcome, ("step", shown))

    def line_of_jpegs(errors: Outcome, side: int) -> Line:
        with tempfile.TemporaryDirectory() as folder:
            drawn = session.outcome_of(partial(draw_jpegs, folder, side, local_batches[0]))
            if has_figures(drawn):
                return line("ours", errors, local_batches[0], folder, {"jpeg_short_side": side} | drawn)
            return line("ours", drawn, local_batches[0], folder, {"jpeg_short_side": side})

    with group_of_one(setting.device):
        for name in CANDIDATES:
            if options.candidates and name not in options.candidates:
                continue
            errors = session.outcome_of(partial(errors_of, name, setting))
            for local_batch in local_batches:
                yield line(name, errors, local_batch, options.shards, {"jpeg_short_side": None})
            if name == "ours" and has_figures(errors):
                for side in options.jpegs:
                    yield line_of_jpegs(errors, side)
                if options.profile is not None:
                    work = partial(profiled, setting, local_batches[0], options.profile, options, found)
                    yield from lines_of_kernels(setting, local_batches[0], session.outcome_of(work), session)


def lines_of_kernels(
    setting: StepSetting, local_batch: int, found: dict[str, Outcome], session: Session
) -> Iterator[Line]:
    """Make a line of each kernel, or of why there is none, and a separate table below that of the steps."""
    case = shape_of(setting, local_batch) | {"jpeg_short_side": None}
    kernels = found if has_figures(found) else {"step": found}
    of_kernels = [Line("profile", name, case, "ours", outcome, None) for name, outcome in kernels.items()]
    session.notes.append(profile_table(line.told() for line in of_kernels))
    yield from of_kernels


def shape_of(setting: StepSetting, local_batch: int) -> dict[str, Any]:
    """Return the data, as in the JSON lines."""
    return {
        "tower": setting.tower,
        "local_batch": local_batch,
        "texts": setting.texts,
        "ranks": setting.texts // local_batch,
        "micro_batch": min(setting.micro_batch, local_batch),
        "dtype": name_of(setting.dtype),
    }


def share_of(phase: Phase) -> Column:
    """Return the column of a phase, in percent of the step."""
    return Column(f"% {phase.replace('_', ' ')}", lambda outcome: 100 * outcome["shares"][phase], ".1f")


def title(options: StepOptions) -> str:
    """Return what stands above the table."""
    setting = setting_of(options)
    return f"{setting.tower}, {setting.texts:,} texts, {name_of(setting.dtype)}"


BENCHMARK = Benchmark(
    about=__doc__,
    options=StepOptions,
    check=setting_of,
    lines=lines,
    before=("operation", "case"),
    columns=(
        *(*TIMING, FLOOR, Column("images/s", "images_per_second", ".4g"), Column("MFU %", "mfu_percent", ".1f")),
        *(PEAK, *map(share_of, PHASES), ERROR),
    ),
    title=title,
)

if __name__ == "__main__":
    BENCHMARK.command()
