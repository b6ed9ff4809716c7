"""One exact step of a very large batch on a CPU: time, peak memory, and a check of its gradients.

    python -m textlock.bench.large_batch --batch 65536 --tower eva02_micro_patch8_32
    python -m textlock.bench.large_batch --check 4096     # compares a smaller step with float64

Symmetric InfoNCE of random images against random text embeddings, through the training step, without optimiser. The
peak is that of the process, interpreter and libraries included. `--check` then runs a smaller batch with the same tiers
and as many micro-batches, and once more as one float64 graph with dense logits: another attention, another loss, no
micro-batches. A result that is off, or images that ran forward more or less often than the plan says, print no figure.
One JSON line on stdout, a table on stderr; exit status 1 without a figure.
"""

import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textlock.bench.candidates import Ready, judged
from textlock.bench.entry import CPU, Benchmark, Column, Line, Outcome, Session, require_known, require_positive
from textlock.bench.measure import Wrong, relative_error
from textlock.engine.distributed import World
from textlock.engine.objective import LossConfig, Objective
from textlock.engine.optim import FlatGradients
from textlock.engine.plan import Plan, StepConfig, Tier, available_bytes, choose_plan, tier_costs
from textlock.engine.step import LargeBatchStep, StepResult, autocast_for
from textlock.models.pooling import AttentionPooling
from textlock.models.vision import VISION_CONFIGS, VisionTower, build_vision_tower

# Largest relative error, in the Euclidean norm over all of it, that still counts as right in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class LargeBatchOptions:
    """Options of the command."""

    batch: int = 65536
    """Images, and as many texts."""
    tower: str = "eva02_micro_patch8_32"
    """Name of the image tower."""
    micro_batch: int = 512
    """Images of one forward pass."""
    keep: Literal["auto"] | Tier = "auto"
    """Tier of all micro-batches, or the plan with the least extra time."""
    memory_gib: float = 1.5
    """For the activations."""
    check: int = 0
    """Batch of the comparison with float64; 0: none."""
    seed: int = 0
    """Of weights and data."""


@dataclass(frozen=True)
class Data:
    """Random images and the unit text embeddings that they belong to."""

    images: Tensor  # [B, S, S, 3] uint8
    text: Tensor  # [B, d]

    @classmethod
    def random(cls, batch: int, tower: VisionTower, seed: int) -> "Data":
        """Draw a batch for a tower."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, tower.image_size, tower.image_size, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        text = torch.randn(batch, tower.embed_dim, generator=generator)
        return cls(images, F.normalize(text, dim=-1, out=text))


@dataclass(frozen=True)
class Stepped:
    """What one step gave."""

    result: StepResult
    gradients: dict[str, Tensor]
    seconds: float


def make_tower(options: LargeBatchOptions) -> VisionTower:
    """Build the tower; the pooling's latent starts at zero, where gradients vanish, and is moved away from there."""
    torch.manual_seed(options.seed)
    tower = build_vision_tower(options.tower)
    assert isinstance(tower.pool, AttentionPooling)
    with torch.no_grad():
        tower.pool.latent.normal_()
    return tower


def make_objective(tower: VisionTower, batch: int) -> Objective:
    return Objective(LossConfig(), texts=batch, width=tower.embed_dim, dtype=torch.float32, device=CPU)


def parameters_of(tower: nn.Module, objective: Objective) -> dict[str, nn.Parameter]:
    return {**dict(tower.named_parameters()), **dict(objective.named_parameters())}


def gradients_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def one_step(tower: VisionTower, plan: Plan, data: Data, seed: int) -> Stepped:
    """Run and time one step. Raises Wrong when images ran forward another number of times than the plan says."""
    objective = make_objective(tower, len(data.text))
    parameters = parameters_of(tower, objective)
    gradients = FlatGradients(parameters.values())
    step = LargeBatchStep(
        tower,
        objective,
        gradients,
        plan,
        masks_duplicates=False,
        world=World(0, 1, CPU, None),
        autocast=autocast_for(CPU, "fp32"),
        seed=seed,
    )
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal counted
        counted += len(inputs[0])

    ids = torch.arange(len(data.text))
    with tower.register_forward_hook(count):
        before = time.perf_counter()
        result = step(0, data.images, data.text, ids)
        seconds = time.perf_counter() - before
    planned = round(len(data.images) * (1 + plan.second_forwards))
    if not counted == result.images_forward == planned:
        raise Wrong("the number of images that ran forward", {"counted": counted, "planned": planned})
    return Stepped(result, gradients_of(parameters), seconds)


def dense_step(tower: VisionTower, data: Data, options: LargeBatchOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of a step in one float64 graph with dense logits."""
    twin = build_vision_tower(options.tower, block="plain")
    twin.load_state_dict(tower.state_dict())
    twin.double()
    objective = make_objective(tower, len(data.text)).double()
    logits = objective.logit_scale() * F.normalize(twin(data.images), dim=-1) @ data.text.double().T
    labels = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return loss.detach(), gradients_of(parameters_of(twin, objective))


def comparison_of(tower: VisionTower, plan: Plan, options: LargeBatchOptions) -> Outcome:
    """Compare loss and gradients of ``options.check`` images with float64. Raises Wrong when they differ."""
    data = Data.random(options.check, tower, options.seed + 1)
    found = one_step(tower, replace(plan, micro_batch=options.check // len(plan.tiers)), data, options.seed)
    loss, true = dense_step(tower, data, options)
    flat, flat_true = (
        torch.cat([every[name].flatten().double() for name in true]) for every in (found.gradients, true)
    )
    errors = {"loss": relative_error(found.result.loss, loss), "gradients": relative_error(flat, flat_true)}
    errors = judged("the step", Ready(lambda: None, errors, TOLERANCE, torch.float32)).errors
    return {"batch": options.check, "micro_batch": options.check // len(plan.tiers), "errors": errors}


def plan_of(tower: VisionTower, options: LargeBatchOptions) -> Plan:
    """Return the plan of the step; raises ValueError where there is none, or none that can be compared."""
    plan = choose_plan(
        StepConfig(micro_batch=options.micro_batch, keep=options.keep),
        tier_costs(tower, autocast_for(CPU, "fp32")),
        local_batch=options.batch,
        memory_bytes=available_bytes(CPU, options.memory_gib, fixed_bytes=0),
    )
    if options.check % len(plan.tiers):
        raise ValueError(f"--check {options.check} is no multiple of the {len(plan.tiers)} micro-batches of the plan")
    return plan


def figures_of(tower: VisionTower, plan: Plan, options: LargeBatchOptions) -> Outcome:
    """Run the step, then the comparison if one is asked for."""
    data = Data.random(options.batch, tower, options.seed)
    before = peak_resident_bytes()
    stepped = one_step(tower, plan, data, options.seed)
    peak = peak_resident_bytes()
    compared = {"check": comparison_of(tower, plan, options)} if options.check else {}
    return {
        "ms": 1e3 * stepped.seconds,
        "runs": 1,
        "tiers": Counter(plan.tiers),
        "images_per_second": options.batch / stepped.seconds,
        "images_forward": stepped.result.images_forward,
        "peak_resident_bytes": peak,
        "resident_bytes_before": before,
        "planned_activation_bytes": plan.activation_bytes,
        "loss": stepped.result.loss.item(),
    } | compared


def lines(options: LargeBatchOptions, session: Session) -> Iterator[Line]:
    """Measure the one step."""
    tower = make_tower(options)
    plan = plan_of(tower, options)
    session.notes.append(str(plan))
    case = {name: getattr(options, name) for name in ("batch", "tower", "micro_batch", "keep", "memory_gib")}
    outcome = session.outcome_of(partial(figures_of, tower, plan, options))
    yield Line("large_batch", "one_step", case, "ours", outcome, (f"{options.batch:,}",))


def check(options: LargeBatchOptions) -> None:
    """Raise ValueError for what cannot be."""
    require_positive(options, "batch", "micro_batch")
    require_known("tower", [options.tower], VISION_CONFIGS)
    if options.check < 0:
        raise ValueError(f"--check is {options.check}, must be positive or 0")


def peak_resident_bytes() -> int:
    """Return the most memory that this process has had in RAM so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


BENCHMARK = Benchmark(
    about=__doc__,
    options=LargeBatchOptions,
    check=check,
    lines=lines,
    before=("images",),
    columns=(
        *(Column("ms", "ms", ",.0f"), Column("images/s", "images_per_second", ",.0f")),
        Column("images forward", "images_forward", ",.0f"),
        Column("peak resident GiB", "peak_resident_bytes", ".2f", 2**30),
        Column("of it before", "resident_bytes_before", ".2f", 2**30),
        Column("error", lambda o: max(o["check"]["errors"].values()) if "check" in o else None, ".0e"),
    ),
)

if __name__ == "__main__":
    BENCHMARK.command()
