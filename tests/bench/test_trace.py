"""The profile of a step: kernels that ran on a GPU, as the profiler writes them down, and a real run on the CPU."""

import gzip
import json

import pytest
import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from textlock.bench import trace as bench
from textlock.bench.ceilings import Ceilings
from textlock.bench.comparison import Setting
from textlock.bench.measure import Unavailable
from textlock.kernels.card import PairSizes
from textlock.models.vision import VISION_CONFIGS

CPU = torch.device("cpu")
TOWER = "eva02_micro_patch8_32"
SETTING = Setting(TOWER, VISION_CONFIGS[TOWER], 4, torch.device("cuda"), torch.bfloat16, 0)
PAIRS = PairSizes(images=8, texts=64, width=128)
CEILINGS = Ceilings(1e9, {torch.bfloat16: 1e12, torch.float16: 5e11, torch.float32: 1e11}, 1e8)


def ran(name, start, duration, *, stream=7, operator=None, cat="kernel", **args):
    """Return what ran on the GPU for so many microseconds."""
    known = {} if operator is None else {"External id": operator}
    return {
        **{"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": stream, "ts": 1e6 + start, "dur": duration},
        "args": {"stream": stream, **known, **args},
    }


def operator(number, name, *tensors, strides=None, start=0, duration=1, thread=1):
    """Return an operator of the host; ``tensors`` are type and shape."""
    contiguous = [[1] * len(shape) for _, shape in tensors]
    args = {"External id": number, "Input type": [kind for kind, _ in tensors], "Input Dims": [s for _, s in tensors]}
    return {
        **{"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": thread, "ts": 1e6 + start, "dur": duration},
        "args": args | {"Input Strides": strides or contiguous},
    }


def recorded(*events, launches=()):
    return bench.Recorded(
        {"traceEvents": [{"ph": "M", "name": "process_name"}, *events], "host_name": "mine"}, launches
    )


def found_in(*events, launches=()):
    return bench.largest(bench.activities(recorded(*events, launches=launches), SETTING, PAIRS, CEILINGS))


BF16, SCALAR = "c10::BFloat16", ("Scalar", [])


def test_time_in_which_kernels_overlap_is_busy_once_and_gaps_are_idle():
    found = found_in(
        ran("a", 0, 100),
        ran("b", 50, 100, stream=8),
        ran("c", 60, 10, stream=9),  # inside b
        ran("a", 250, 50),
    )
    assert {name: line["ms"] for name, line in found.items()} == pytest.approx(
        {"a": 0.15, "b": 0.1, "c": 0.01, "everything else": 0, "idle": 0.1}
    )
    assert found["a"]["launches"] == 2
    assert {name: line["share"] for name, line in found.items()} == pytest.approx(
        {"a": 0.5, "b": 1 / 3, "c": 1 / 30, "everything else": 0, "idle": 1 / 3}
    )


def test_the_ten_largest_are_named_and_the_rest_is_one_line():
    kernels = [ran(f"kernel_{number}", 100 * number, number + 1) for number in range(13)]
    found = found_in(*kernels)
    assert list(found) == [f"kernel_{number}" for number in range(12, 2, -1)] + ["everything else", "idle"]
    assert found["everything else"]["ms"] == pytest.approx(1e-3 * (1 + 2 + 3))
    assert found["everything else"]["launches"] == 3


def test_products_have_the_floor_of_the_shapes_of_their_operators():
    found = found_in(
        operator(1, "aten::mm", (BF16, [64, 32]), (BF16, [32, 16])),
        operator(
            2, "aten::addmm", ("float", [64, 16]), (BF16, [64, 32]), (BF16, [32, 16]), SCALAR, ("float", [64, 16])
        ),
        operator(3, "aten::bmm", ("float", [5, 64, 32]), ("float", [5, 32, 16])),
        ran("nvjet_a", 0, 10, operator=1),
        ran("nvjet_a", 20, 10, operator=2),
        ran("split_k", 30, 2, operator=2),
        ran("sgemm", 40, 10, operator=3),
    )
    product = 2 * 64 * 32 * 16
    assert found["nvjet_a"]["floor_ms"] == pytest.approx(1e3 * 2 * product / 1e12)
    assert found["nvjet_a"]["percent_of_floor"] == pytest.approx(100 * found["nvjet_a"]["floor_ms"] / 0.02)
    assert found["sgemm"]["floor_ms"] == pytest.approx(1e3 * 5 * product / 1e11)
    assert "floor_ms" not in found["split_k"]


@pytest.mark.parametrize(
    ("name", "tensors", "strides", "traffic"),
    [
        ("aten::fill_", [("float", [10]), SCALAR], None, 40),
        ("aten::copy_", [(BF16, [10, 4]), ("float", [10, 4])], None, 80 + 160),
        ("aten::copy_", [(BF16, [10, 4]), ("float", [10, 4])], [[4, 1], [0, 1]], 80 + 16),
        ("aten::add", [("float", [10, 4]), (BF16, [4]), SCALAR], None, 160 + 8 + 160),
        ("aten::mul_", [("float", [10]), ("float", [10])], None, 40 + 40 + 40),
        ("aten::add", [("c10::complex<float>", [10]), ("float", [10])], None, None),
        ("aten::add", [], None, None),
        ("aten::sum", [("float", [10])], None, None),
        ("aten::mm", [("double", [10, 4]), ("double", [4, 10])], None, None),
    ],
)
def test_element_wise_operators_have_the_floor_of_what_they_read_and_write(name, tensors, strides, traffic):
    found = found_in(operator(1, name, *tensors, strides=strides), ran("kernel", 0, 10, operator=1))
    assert found["kernel"].get("floor_ms") == (None if traffic is None else pytest.approx(1e3 * traffic / 1e9))


def test_what_nobody_knows_has_no_floor():
    copy = operator(1, "aten::copy_", (BF16, [10]), ("float", [10]))
    found = found_in(
        copy,
        ran("two_of_one", 0, 10, operator=1),
        ran("other_of_one", 20, 10, operator=1),
        ran("no_operator", 40, 10),
        ran("gone_operator", 60, 10, operator=99),
        operator(2, "aten::fill_", ("float", [10])),
        ran("sometimes", 80, 10, operator=2),
        ran("sometimes", 100, 10),
    )
    assert all("floor_ms" not in line for line in found.values())


def test_copies_and_fills_have_the_floor_of_their_bytes():
    found = found_in(
        ran("Memcpy HtoD (Pinned -> Device)", 0, 10, cat="gpu_memcpy", bytes=1000),
        ran("Memcpy DtoD (Device -> Device)", 20, 10, cat="gpu_memcpy", bytes=1000),
        ran("Memcpy DtoH (Device -> Pinned)", 40, 10, cat="gpu_memcpy", bytes=1000),
        ran("Memset (Device)", 60, 10, cat="gpu_memset", bytes=1000),
    )
    assert {name: line.get("floor_ms") for name, line in found.items()} == {
        "Memcpy HtoD (Pinned -> Device)": pytest.approx(1e3 * 1000 / 1e8),
        "Memcpy DtoD (Device -> Device)": pytest.approx(1e3 * 2000 / 1e9),
        "Memcpy DtoH (Device -> Pinned)": None,
        "Memset (Device)": pytest.approx(1e3 * 1000 / 1e9),
        "everything else": None,
        "idle": None,
    }


def test_kernels_of_a_tower_have_the_floor_of_each_launch():
    kernels = [
        ran("add_norm_kernel", 20, 10),
        ran("attention_kernel", 40, 10, operator=5),
        ran("add_norm_kernel", 0, 10),
        ran("fold_kernel", 60, 10),
    ]
    much = 10**9  # more than has to be read, such as all tokens where one of an image is
    launches = [("add_norm_kernel", much), ("attention_kernel", much), ("add_norm_kernel", 2000), ("fold_kernel", 1)]
    found = found_in(operator(5, "_FusedBlock"), *kernels, launches=launches)
    config = VISION_CONFIGS[TOWER]
    stream = SETTING.micro_batch * config.tokens * config.width * 2  # bytes
    assert found["add_norm_kernel"]["floor_ms"] == pytest.approx(1e3 * (4 * stream + 2000) / 1e9)
    operations = 4 * SETTING.micro_batch * config.tokens**2 * config.width
    assert found["attention_kernel"]["floor_ms"] == pytest.approx(1e3 * max(4 * stream / 1e9, operations / 1e12))
    assert "floor_ms" not in found["fold_kernel"]
    # A launch that the profiler missed leaves open which launch was which.
    fewer = found_in(*kernels[1:], launches=launches)
    assert "floor_ms" not in fewer["add_norm_kernel"] and "floor_ms" in fewer["attention_kernel"]


@pytest.mark.parametrize("launches", [1, 4])
def test_kernels_of_a_loss_have_one_floor_a_step_in_however_many_launches(launches):
    kernels = [ran(name, 10 * n, 5) for n, name in enumerate(("sums_kernel", "weigh_kernel") * launches)]
    found = found_in(*kernels, launches=[(event["name"], 10**9) for event in kernels])
    traffic = 2 * (8 + 64) * 128 + 2 * 8 * 64  # embeddings, and exponentials in two bytes
    assert found["sums_kernel"]["floor_ms"] == pytest.approx(1e3 * max(2 * 8 * 64 * 128 / 5e11, traffic / 1e9))
    assert found["weigh_kernel"]["floor_ms"] == pytest.approx(1e3 * 4 * 8 * 64 / 1e9)
    found = found_in(*kernels, launches=[(event["name"], 0) for event in kernels])
    assert found["sums_kernel"]["floor_ms"] == pytest.approx(1e3 * 2 * 8 * 64 * 128 / 5e11), "operations alone"


def test_launches_are_noted_with_the_bytes_of_their_tensors(monkeypatch):
    ran = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: ran.append(kwargs["grid"]))

    def some_kernel(x, y, n, z):
        pass

    kernel = JITFunction(some_kernel)
    with bench.noted_launches() as launches:
        described = TensorDescriptor.from_tensor(torch.zeros(8, 16), [4, 16])
        kernel[(3,)](torch.zeros(10), described, 7, z=torch.zeros(2, 4, dtype=torch.float16))
    kernel[(5,)](torch.zeros(10), None, 7, z=None)
    assert launches == [("some_kernel", 40 + 512 + 16)]
    assert ran == [(3,), (5,)]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("add_norm_kernel", "add_norm_kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, "
            "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)",
            "vectorized_elementwise_kernel<4, CUDAFunctor_add<BFloat16>>",
        ),
        ("void at::native::(anonymous namespace)::fused<float>(float*)", "fused<float>"),
        ("void " + "x" * 200, "x" * 79 + "…"),
    ],
)
def test_names_are_short(name, short):
    assert bench.shortened(name) == short


def test_operators_of_the_host_count_without_those_they_call():
    outer = operator(1, "outer", start=0, duration=100)
    found = found_in(
        operator(3, "inner", start=20, duration=5),
        outer,
        operator(2, "aten::mm", ("float", [2, 3]), ("float", [3, 4]), start=10, duration=30),
        operator(4, "next to it", start=10, duration=100, thread=2),
        operator(5, "outer", start=100, duration=10),
    )
    assert {name: line["ms"] for name, line in found.items()} == pytest.approx(
        {"outer": 0.08, "aten::mm": 0.025, "inner": 0.005, "next to it": 0.1, "everything else": 0, "idle": 0}
    )
    assert found["aten::mm"]["floor_ms"] == pytest.approx(1e3 * 48 / 1e11)


def test_a_step_is_recorded_and_its_trace_is_small(tmp_path):
    a, b = torch.randn(64, 32, requires_grad=True), torch.randn(32, 16)

    def step():
        with torch.profiler.record_function("of the user"):
            (a @ b).sum().backward()

    found = bench.record(step, CPU)
    operators = {activity.name: activity for activity in bench.activities(found, SETTING, PAIRS, CEILINGS)}
    assert operators["aten::mm"].floor == pytest.approx(2 * 64 * 32 * 16 / 1e11)
    path = tmp_path / "new" / "trace.json.gz"
    bench.write_trace(found, path)
    trace = json.loads(gzip.decompress(path.read_bytes()))
    assert {event.get("cat") for event in trace["traceEvents"]} <= {"cpu_op", "user_annotation", None}
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"of the user", "aten::mm", "process_name"} <= names
    assert "host_name" not in trace


def test_the_trace_of_a_gpu_holds_what_ran_there_alone(tmp_path):
    events = [
        operator(1, "aten::mm"),
        ran("gemm", 0, 10, operator=1),
        ran("Memset (Device)", 20, 10, cat="gpu_memset"),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 1, "args": {}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 0},
        {"ph": "X", "cat": "user_annotation", "name": "step", "ts": 0, "dur": 1},
    ]
    bench.write_trace(recorded(*events), tmp_path / "trace.json.gz")
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert [event["name"] for event in trace["traceEvents"]] == ["process_name", "gemm", "Memset (Device)", "step"]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpu_that_the_profiler_cannot_see_is_no_profile(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(Unavailable, match="sees no kernel"):
        bench.record(lambda: torch.ones(3) + 1, torch.device("cuda"))
