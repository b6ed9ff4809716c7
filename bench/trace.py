"""Where the time of a step goes: its largest kernels next to their floors, and the time in which nothing runs.

`textlock.bench.step --profile PATH` runs one step under torch's profiler, writes a Chrome trace and prints a line for
each of the largest kernels, for everything else together and for the idle time. The step begins on an idle device, so
nothing hides the copy of its images. Shares are of its span, from the first kernel to the end of the last; kernels that
run side by side on several streams count in full, so that shares may add up to more than one. On a CPU operators stand
for kernels, without the time of those that they call.

The floor of a kernel is that of all its launches, and is left out where one of them is unknown. Known are

    matrix products     operations, from the shapes of the operator that launched it, over the rate of large products
    kernels             traffic and operations as their cards count them; of a launch that is given less, such as a
                        LayerNorm with nothing to add, the bytes of its tensors. A kernel of the loss visits every
                        pair once a step: its launches share that floor equally
    copies and fills    their bytes
    sums and the like   what plain element-wise operators read and write
"""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from textlock.bench.ceilings import Ceilings
from textlock.bench.comparison import Setting
from textlock.bench.measure import Unavailable, to_its_end
from textlock.bench.operations import sizes_of
from textlock.kernels.card import PairSizes, TowerSizes, find_cards

LARGEST = 10
LONGEST_NAME = 80

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
# What else the trace keeps: launches and operators of the host would make it many times larger.
KEPT = ("user_annotation", "gpu_user_annotation")

# Types of tensors, as the profiler names them.
DTYPES = {
    "double": torch.float64,
    "float": torch.float32,
    "c10::BFloat16": torch.bfloat16,
    "c10::Half": torch.float16,
    "long int": torch.int64,
    "int": torch.int32,
    "unsigned char": torch.uint8,
    "bool": torch.bool,
}

# Operators that multiply matrices, and which of their tensors is the first factor.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::addmm_": 1, "aten::baddbmm_": 1}

# Element-wise operators that write a new tensor of the common shape and type, and those that write into their first.
OUT_OF_PLACE = {f"aten::{name}" for name in ("add", "sub", "mul", "div")}
IN_PLACE = {f"{name}_" for name in OUT_OF_PLACE}
FILLS_AND_COPIES = ("aten::fill_", "aten::zero_", "aten::copy_")  # every tensor is either read or written


@dataclass(frozen=True)
class Recorded:
    """One step as the profiler saw it."""

    trace: dict[str, Any]  # as Chrome reads it
    launches: Sequence[tuple[str, int]]  # kernels of this project in order, and the bytes of their tensors


@dataclass(frozen=True)
class Activity:
    """A kernel, copy or fill on a GPU, or an operator on a CPU; times in seconds."""

    name: str
    start: float
    end: float
    own: float  # time, without that of operators inside
    floor: float | None


def record(step: Callable[[], object], device: torch.device) -> Recorded:
    """Run a step, to its end, under the profiler; raises Unavailable where it sees nothing of the device."""
    watched = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    if device.type == "cuda":
        torch.cuda.synchronize()
    with noted_launches() as launches, torch.profiler.profile(activities=watched, record_shapes=True) as profiler:
        to_its_end(step, device)()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    if device.type == "cuda" and not on_gpu(trace["traceEvents"]):
        raise Unavailable("torch's profiler sees no kernel on this machine")
    return Recorded(trace, launches)


@contextmanager
def noted_launches() -> Iterator[list[tuple[str, int]]]:
    """Note every launch of a Triton kernel: its name and the bytes of its tensors, which no profiler knows."""
    noted: list[tuple[str, int]] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        given = (value.base if isinstance(value, TensorDescriptor) else value for value in values)
        noted.append((self.fn.__name__, sum(value.nbytes for value in given if isinstance(value, Tensor))))
        return launch(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", run):
        yield noted


def write_trace(recorded: Recorded, path: Path) -> None:
    """Write what ran on the device, with annotations, as a gzipped Chrome trace."""
    events = recorded.trace["traceEvents"]
    kept = (*KEPT, *(ON_GPU if on_gpu(events) else ("cpu_op",)))
    small = {key: value for key, value in recorded.trace.items() if key not in ("host_name", "traceName")}
    small["traceEvents"] = [event for event in events if event["ph"] == "M" or event.get("cat") in kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump(small, file, separators=(",", ":"))


def on_gpu(events: Iterable[dict[str, Any]]) -> bool:
    return any(event.get("cat") in ON_GPU for event in events)


def activities(recorded: Recorded, setting: Setting, pairs: PairSizes, ceilings: Ceilings) -> list[Activity]:
    """Return what ran on the device, with floors; ``setting`` is that of a micro-batch, ``pairs`` those of the step."""
    events = [event for event in recorded.trace["traceEvents"] if event["ph"] == "X"]
    operators = [event for event in events if event["cat"] == "cpu_op"]
    if not on_gpu(events):
        return [
            Activity(shortened(e["name"]), *span(e), own, floor_of_operator(e, ceilings))
            for e, own in own_times(operators)
        ]
    found = sorted((event for event in events if event["cat"] in ON_GPU), key=lambda event: event["ts"])
    floors = floors_of_launches(found, recorded.launches, least_of_kernels(setting, pairs), ceilings)
    floors |= floors_by_operators(found, operators, ceilings)
    return [
        Activity(shortened(e["name"]), *span(e), e["dur"] / 1e6, floors.get(number)) for number, e in enumerate(found)
    ]


def span(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def own_times(operators: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Return operators of the host with their seconds, less those of the operators that they call."""
    own: list[list[Any]] = []
    callers: dict[Any, list[int]] = defaultdict(list)  # by thread: those that are not over, the innermost last
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        stack = callers[event["tid"]]
        while stack and sum(own[stack[-1]][0][key] for key in ("ts", "dur")) <= event["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]][1] -= event["dur"] / 1e6
        stack.append(len(own))
        own.append([event, event["dur"] / 1e6])
    return [(event, seconds) for event, seconds in own]


@dataclass(frozen=True)
class Least:
    """What has to be done by a kernel."""

    traffic: float
    operations: float
    dtype: torch.dtype  # of matrix products
    once_a_step: bool  # by all launches together; otherwise by each


def least_of_kernels(setting: Setting, pairs: PairSizes) -> dict[str, Least]:
    """Return the least of each kernel of the tower and of the losses, by name."""
    found: dict[str, Least] = {}
    for card in find_cards():
        of_tower, of_loss = (issubclass(card.sizes, kind) for kind in (TowerSizes, PairSizes))
        if not (of_tower or of_loss):
            continue
        sizes = sizes_of(card, setting) if of_tower else card.sizes(**asdict(pairs))
        for one in card.passes:
            if one.kernel is not None:
                least = Least(one.traffic(sizes), one.operations(sizes), sizes.dtype, once_a_step=of_loss)
                found.setdefault(one.kernel.__name__, least)
    return found


def floors_of_launches(
    found: Sequence[dict[str, Any]],
    launches: Iterable[tuple[str, int]],
    least_by_kernel: Mapping[str, Least],
    ceilings: Ceilings,
) -> dict[int, float]:
    """Return floors of Triton kernels, by their number among those found, which ran in the order of launches."""
    noted: dict[str, list[int]] = defaultdict(list)
    for name, traffic in launches:
        noted[name].append(traffic)
    floors = {}
    for name, least in least_by_kernel.items():
        numbers = [number for number, event in enumerate(found) if event["name"] == name]
        if len(numbers) != len(noted[name]):  # then nobody knows which is which
            continue
        parts = len(numbers) if least.once_a_step else 1
        for number, given in zip(numbers, noted[name], strict=True):
            least_traffic = min(least.traffic / parts, given)
            floors[number] = ceilings.floor(least.dtype, traffic=least_traffic, operations=least.operations / parts)
    return floors


def floors_by_operators(
    found: Sequence[dict[str, Any]], operators: Iterable[dict[str, Any]], ceilings: Ceilings
) -> dict[int, float]:
    """Return floors of copies, fills and what operators launched, by their number among those found."""
    by_id = {event["args"].get("External id"): event for event in operators}
    launched: dict[Any, list[int]] = defaultdict(list)  # by operator
    floors: dict[int, float] = {}
    for number, event in enumerate(found):
        if event["cat"] != "kernel":
            if (floor := floor_of_copy(event, ceilings)) is not None:
                floors[number] = floor
        elif (operator := event["args"].get("External id")) in by_id:
            launched[operator].append(number)
    for operator, numbers in launched.items():
        event = by_id[operator]
        # A product may be finished by a small kernel, whose floor nobody knows; others are plain with one kernel only.
        if event["name"] not in PRODUCTS and len(numbers) > 1:
            continue
        if (floor := floor_of_operator(event, ceilings)) is not None:
            floors[max(numbers, key=lambda number: found[number]["dur"])] = floor
    return floors


def floor_of_copy(event: dict[str, Any], ceilings: Ceilings) -> float | None:
    name, size = event["name"], event["args"].get("bytes")
    if size is None:
        return None
    if name.startswith("Memcpy HtoD") and ceilings.host_to_device is not None:
        return size / ceilings.host_to_device
    if name.startswith("Memcpy DtoD"):
        return 2 * size / ceilings.bandwidth
    return size / ceilings.bandwidth if name.startswith("Memset") else None


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator was given."""

    shape: Sequence[int]
    dtype: torch.dtype
    nbytes: int  # in memory: what an expanded tensor repeats counts once


def floor_of_operator(event: dict[str, Any], ceilings: Ceilings) -> float | None:
    """Return the seconds below which an operator cannot get, or None where that is not plain from its shapes."""
    name, tensors = event["name"], operands(event["args"])
    if name in PRODUCTS:
        factors = tensors[PRODUCTS[name] :][:2]
        if len(factors) < 2 or factors[0].dtype not in ceilings.matrix_rate:
            return None
        operations = 2 * prod(factors[0].shape) * factors[1].shape[-1]
        return ceilings.floor(factors[0].dtype, operations=operations)
    if not tensors:
        return None
    traffic = sum(tensor.nbytes for tensor in tensors)
    if name in IN_PLACE:
        traffic += tensors[0].nbytes
    elif name in OUT_OF_PLACE:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        traffic += prod(shape) * max(tensor.dtype.itemsize for tensor in tensors)
    elif name not in FILLS_AND_COPIES:
        return None
    return traffic / ceilings.bandwidth


def operands(args: dict[str, Any]) -> list[Operand]:
    """Return the tensors among the arguments of an operator; none if one of them is of a type that is not known."""
    shapes = args.get("Input Dims", [])
    strides = args.get("Input Strides", shapes)  # without them, as if no tensor were expanded
    found = []
    for name, shape, steps in zip(args.get("Input type", []), shapes, strides, strict=True):
        if name in DTYPES:
            in_memory = prod(size for size, step in zip(shape, steps, strict=True) if step != 0)
            found.append(Operand(shape, DTYPES[name], in_memory * DTYPES[name].itemsize))
        elif shape:
            return []
    return found


def shortened(name: str) -> str:
    """Return the name of a kernel without return type, parameters and the noise of templates."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|c10::|, std::array<char ?\*, \d+u?l?> ?", "", name)
    if not name.startswith("Mem"):  # copies say in brackets from where to where
        name = name.partition("(")[0]
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def largest(activities: Sequence[Activity]) -> dict[str, dict[str, Any]]:
    """Return the figures of the kernels that take most, by name, of everything else, and of the idle time."""
    length = max(activity.end for activity in activities) - min(activity.start for activity in activities)
    by_name: dict[str, list[Activity]] = defaultdict(list)
    for activity in activities:
        by_name[activity.name].append(activity)
    names = sorted(by_name, key=lambda name: sum(activity.own for activity in by_name[name]), reverse=True)
    groups = {name: by_name[name] for name in names[:LARGEST]}
    groups["everything else"] = [activity for name in names[LARGEST:] for activity in by_name[name]]
    idle = length - busy(activities)
    found = {name: figures(group, length) for name, group in groups.items()}
    return found | {"idle": {"ms": 1e3 * idle, "share": idle / length}}


def figures(group: Sequence[Activity], length: float) -> dict[str, Any]:
    seconds = sum(activity.own for activity in group)
    found = {"ms": 1e3 * seconds, "launches": len(group), "share": seconds / length}
    floors = [activity.floor for activity in group if activity.floor is not None]
    if not group or len(floors) < len(group):
        return found
    return found | {"floor_ms": 1e3 * sum(floors), "percent_of_floor": 100 * sum(floors) / seconds}


def busy(activities: Iterable[Activity]) -> float:
    """Return the seconds in which anything ran."""
    total, reached = 0.0, float("-inf")
    for activity in sorted(activities, key=lambda activity: activity.start):
        total += max(0.0, activity.end - max(activity.start, reached))
        reached = max(reached, activity.end)
    return total
