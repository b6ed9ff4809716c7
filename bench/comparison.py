"""Operations of an image tower as a `Comparison`: what decides their data, and how wrong they may be."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from textlock.bench.candidates import Comparison, Ready, name_of
from textlock.bench.ceilings import TOLERANCE
from textlock.bench.entry import Outcome
from textlock.bench.measure import check_compiler
from textlock.bench.records import is_ours
from textlock.kernels.device import peak_rate
from textlock.models.vision import VisionConfig

Part = Literal["gemm", "kernels", "block", "tower"]

# As TOLERANCE, for ours in a single operation: it rounds less often than a tower, and less than some peers, which add
# up in 16 bits.
TOLERANCE_OF_ONE_OPERATION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Setting:
    """A tower's shapes, how many images, and where: everything that decides the data of an operation."""

    tower: str
    config: VisionConfig
    micro_batch: int
    device: torch.device
    dtype: torch.dtype  # of products
    seed: int

    @property
    def rows(self) -> int:
        """Tokens of all images."""
        return self.micro_batch * self.config.tokens

    def case(self) -> dict[str, Any]:
        """Return the data, as in the JSON lines."""
        return {
            "tower": self.tower,
            "micro_batch": self.micro_batch,
            "tokens": self.config.tokens,
            "width": self.config.width,
            "dtype": name_of(self.dtype),
        }

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a training step's products."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


Result = dict[str, Tensor]
Run = Callable[[], Result]


@dataclass(frozen=True)
class Prepared:
    """A candidate that is ready to be timed, and what it computes."""

    run: Callable[[], object]
    result: Result


def comparison_of(
    part: Part,
    operation: str,
    setting: Setting,
    candidates: Mapping[str, Callable[[], Prepared]],
    errors: Callable[[Result], dict[str, float]],
    *,
    traffic: float = 0,
    operations: float = 0,
    many: bool = False,
) -> Comparison:
    """Return the comparison of an operation.

    Args:
        part: of the benchmark.
        operation: its name.
        setting: what decides its data.
        candidates: prepared by a call, which raises Unavailable.
        errors: of a candidate's results, relative to float64.
        traffic: bytes that have to be read or written.
        operations: floating-point operations that have to be done.
        many: a block or a tower, whose memory and images a second are reported too.
    """

    def ready(name: str, prepare: Callable[[], Prepared]) -> Ready:
        prepared = prepare()
        tolerance = TOLERANCE if many or not is_ours(name) else TOLERANCE_OF_ONE_OPERATION
        return Ready(prepared.run, errors(prepared.result), tolerance[setting.dtype], setting.dtype)

    def of_images(seconds: float) -> Outcome:
        peak = peak_rate(setting.device)
        return {
            "images_per_second": setting.micro_batch / seconds,
            "mfu_percent": None if peak is None else 100 * operations / seconds / peak,
        }

    return Comparison(
        part,
        operation,
        setting.case(),
        (operation, f"{setting.micro_batch} images"),
        {name: partial(ready, name, prepare) for name, prepare in candidates.items()},
        traffic=traffic,
        operations=operations,
        memory=many,
        more=of_images if many else lambda seconds: {},
    )


def ran(run: Run) -> Prepared:
    """Return a candidate that has run once."""
    return Prepared(run, run())


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return a function that torch.compile makes; raises Unavailable where there is no compiler."""
    check_compiler(device)
    return torch.compile(function, dynamic=False)
