"""One exact step of a very large batch on a CPU: time, peak memory, and a check of its gradients.

    python -m textlock.bench.large_batch --batch 65536 --tower eva02_micro_patch8_32
    python -m textlock.bench.large_batch --check 4096     # compares a smaller step with float64

Symmetric InfoNCE of random images against random text rows, through the step that training takes, without optimiser.
The peak is that of the process, interpreter and libraries included. `--check` then runs a smaller batch with the same
tiers and as many micro-batches, and once more as one float64 graph with dense logits: another attention, another loss,
no micro-batches. A result that is off, or images that ran forward more or less often than the plan says, print no
figure. One JSON line on stdout, the same for people on stderr.
"""

import json
import math
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from textlock.bench.measure import Wrong, relative_error
from textlock.engine.distributed import World
from textlock.engine.objective import LossConfig, Objective
from textlock.engine.optim import FlatGradients
from textlock.engine.plan import Plan, StepConfig, Tier, available_bytes, choose_plan, tier_costs
from textlock.engine.provenance import commit, device_name, versions
from textlock.engine.step import LargeBatchStep, StepResult, autocast_for
from textlock.models.pooling import AttentionPooling
from textlock.models.vision import VisionTower, build_vision_tower

CPU = torch.device("cpu")

# Largest relative error, in the Euclidean norm over all of it, that still counts as right in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Options:
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
    """Random images and the unit text rows that they belong to."""

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
class Outcome:
    """What one step gave."""

    result: StepResult
    gradients: dict[str, Tensor]
    seconds: float


def make_tower(options: Options) -> VisionTower:
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


def one_step(tower: VisionTower, plan: Plan, data: Data, seed: int) -> Outcome:
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
    return Outcome(result, gradients_of(parameters), seconds)


def dense_step(tower: VisionTower, data: Data, options: Options) -> tuple[Tensor, dict[str, Tensor]]:
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


def check(tower: VisionTower, plan: Plan, options: Options) -> dict[str, Any]:
    """Compare loss and gradients of ``options.check`` images with float64. Raises Wrong when they differ."""
    data = Data.random(options.check, tower, options.seed + 1)
    found = one_step(tower, replace(plan, micro_batch=options.check // len(plan.tiers)), data, options.seed)
    loss, true = dense_step(tower, data, options)
    flat, flat_true = (
        torch.cat([every[name].flatten().double() for name in true]) for every in (found.gradients, true)
    )
    errors = {"loss": relative_error(found.result.loss, loss), "gradients": relative_error(flat, flat_true)}
    if not max(errors.values()) <= TOLERANCE or not all(map(math.isfinite, errors.values())):
        raise Wrong("the step", errors)
    return {"batch": options.check, "micro_batch": options.check // len(plan.tiers), "errors": errors}


def main(options: Options) -> None:
    if min(options.batch, options.micro_batch) <= 0 or options.check < 0:
        raise ValueError("batch and micro-batch must be positive, check positive or 0")
    tower = make_tower(options)
    plan = choose_plan(
        StepConfig(micro_batch=options.micro_batch, keep=options.keep),
        tier_costs(tower, autocast_for(CPU, "fp32")),
        local_batch=options.batch,
        memory_bytes=available_bytes(CPU, options.memory_gib, fixed_bytes=0),
    )
    if options.check % len(plan.tiers):
        raise ValueError(f"--check {options.check} is no multiple of the {len(plan.tiers)} micro-batches of the plan")
    print(plan, file=sys.stderr)

    data = Data.random(options.batch, tower, options.seed)
    before = peak_resident_bytes()
    outcome = one_step(tower, plan, data, options.seed)
    peak = peak_resident_bytes()
    rate = options.batch / outcome.seconds
    twice = outcome.result.images_forward - options.batch
    print(
        f"{options.batch:,} images in {outcome.seconds:.1f} s, {rate:,.0f} images/s, {twice:,} forward twice; "
        f"peak resident memory {peak / 2**30:.2f} GiB, {before / 2**30:.2f} GiB of it before the step",
        file=sys.stderr,
    )
    line: dict[str, Any] = {
        "part": "large_batch",
        "operation": "one_step",
        "case": {name: getattr(options, name) for name in ("batch", "tower", "micro_batch", "keep", "memory_gib")},
        "candidate": "ours",
        "ms": 1e3 * outcome.seconds,
        "runs": 1,
        "tiers": Counter(plan.tiers),
        "images_per_second": rate,
        "images_forward": outcome.result.images_forward,
        "peak_resident_bytes": peak,
        "resident_bytes_before": before,
        "planned_activation_bytes": plan.activation_bytes,
        "loss": outcome.result.loss.item(),
    }
    if options.check:
        line["check"] = check(tower, plan, options)
        print(f"relative errors against float64: {line['check']['errors']}", file=sys.stderr)
    machine = {"device": device_name(CPU), "versions": versions(), "commit": commit()}
    print(json.dumps(line | machine), flush=True)


def peak_resident_bytes() -> int:
    """Return the most memory that this process has had in RAM so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError, Wrong) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
