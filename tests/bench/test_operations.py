"""The benchmark of the operations at a size of no interest: every part runs, checks itself, refuses wrong results."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from textlock.bench import ceilings, tower
from textlock.bench import operations as bench
from textlock.bench.candidates import compared, judged
from textlock.bench.entry import Session
from textlock.models.vision import VISION_CONFIGS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOWER = "eva02_micro_patch8_32"
PARTS = ("gemm", "kernels", "block", "tower")
OURS = ("ours", "ours_all", "ours_no-mlp", "ours_lean", "ours_block", "ours_none")
UNCOMPILED = (*OURS, "round_and_add", "eager", "timm", "timm_checkpoints")
TINY = bench.OperationOptions(tower=TOWER, micro_batch=(3,), candidates=UNCOMPILED, seconds=0.001)


@pytest.fixture(autouse=True)
def tiny_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**12)


def setting(tower=TOWER, micro_batch=3):
    return bench.setting_of(tower, micro_batch, CPU, 0)


def lines_of(options, capsys):
    """Run the benchmark; return its lines but those of candidates that this machine has not."""
    bench.BENCHMARK.run(options)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if "absent" not in line]


@pytest.fixture
def ceilings_file(tmp_path, capsys):
    ceilings.BENCHMARK.run(ceilings.CeilingOptions(device="cpu", seconds=0.001))
    path = tmp_path / "ceilings.jsonl"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("part", PARTS)
def test_every_operation_is_checked_and_measured_next_to_its_floor(part, ceilings_file, kernels_run, capsys):
    options = replace(TINY, only=(part,), ceilings=ceilings_file)
    lines = {(line["operation"], line["candidate"]): line for line in lines_of(options, capsys)}
    highest = ceilings.read_ceilings(ceilings_file, CPU)
    assert {name for name, _ in lines} == {c.operation for c in bench.comparisons(part, setting())}
    for (_, name), line in lines.items():
        assert line["part"] == part and line["case"]["micro_batch"] == 3 and line["case"]["tower"] == TOWER
        assert line["ms"] > 0 and line["runs"] >= 3
        low, high = line["quartiles_ms"]
        assert low <= line["ms"] <= high
        assert line["percent_of_floor"] == pytest.approx(100 * line["floor_ms"] / line["ms"])
        by_traffic = line.get("gigabytes_per_second", 0) / (highest.bandwidth / 1e9)
        by_operations = line.get("tflops", 0) / (highest.matrix_rate[torch.float32] / 1e12)
        assert line["percent_of_floor"] == pytest.approx(100 * max(by_traffic, by_operations))
        assert line["percent_of_floor"] > 0
        assert line["errors"] and max(line["errors"].values()) < 1e-4
        assert "speedup" not in line or name.startswith("ours")
        assert line["device"] and line["versions"]["torch"] == torch.__version__.partition("+")[0]
        if part in ("block", "tower"):
            assert line["images_per_second"] == pytest.approx(3e3 / line["ms"])
            assert line["peak_bytes"] > 0


def test_every_tier_and_timm_are_compared_in_one_run(capsys):
    bench.BENCHMARK.run(replace(TINY, only=("tower",)))
    printed = capsys.readouterr()
    lines = {line["candidate"]: line for line in map(json.loads, printed.out.splitlines()) if line["part"] == "tower"}
    assert lines.keys() == {*OURS[1:], "eager", "timm", "timm_checkpoints"}
    assert lines["ours_all"]["speedup"].keys() == {"eager", "timm", "timm_checkpoints"}
    assert lines["ours_all"]["errors"].keys() == {"embeddings", "position_grad", "parameter_grads"}
    assert lines["timm"]["errors"].keys() == {"embeddings", "position_grad"}
    assert f"{TOWER}, 3 images: ours_all / timm = {lines['ours_all']['speedup']['timm']:.3f}" in printed.err


@pytest.mark.parametrize(
    ("tower", "candidates"),
    [("vit_base_patch16_224", {"fc1_forward"}), ("eva02_base_patch16_224", {"gate_up_forward"})],
)
def test_products_are_those_of_the_layers(tower, candidates):
    names = {c.operation for c in bench.comparisons("gemm", setting(tower))}
    assert len(names) == 12 and names >= candidates | {"qkv_d_input", "out_proj_forward", "fc2_d_weight"}


def test_layers_are_those_of_a_block():
    config = VISION_CONFIGS["eva02_base_patch16_224"]
    assert bench.layers_of(config) == {
        "qkv": (2304, 768),
        "out_proj": (768, 768),
        "gate_up": (4096, 768),
        "fc2": (768, 2048),
    }


def test_products_and_the_least_traffic_add_up_to_what_a_block_does():
    """Two ways to count: the forward products of a block and its attention, by layer and by formula."""
    at = setting()
    products = sum(c.operations for c in bench.comparisons("gemm", at) if c.operation.endswith("_forward"))
    attention = next(c for c in bench.comparisons("kernels", at) if c.operation == "attention").operations
    assert products + attention == 3 * sum(at.config.block_flops(at.config.tokens).values())


@pytest.fixture
def kernels_run(monkeypatch):
    """Let kernels be launched on a CPU, in Triton's interpreter."""
    monkeypatch.setattr(bench, "capability_of", lambda device: (9, 0))


SPOILED = {
    "a factor": ("gelu", "h", lambda h: h * 1.0001),
    "nan": ("gelu", "h", lambda h: h * torch.nan),
    "last image": ("patchify", "patches", lambda patches: torch.cat((patches[:-1], patches[:1]))),
    "sum over images": ("add_norm_backward", "d_bias", lambda d_bias: d_bias * 1.01),
}


@pytest.mark.parametrize(("operation", "output", "change"), SPOILED.values(), ids=SPOILED)
def test_a_wrong_kernel_has_no_figures(operation, output, change, kernels_run, capsys, monkeypatch):
    card, one = next((card, one) for card in bench.tower_cards() for one in card.passes if one.name == operation)

    def wrong(**inputs):
        found = one.launch(**inputs)
        return found._replace(**{output: change(getattr(found, output))})

    monkeypatch.setattr(bench, "tower_cards", lambda: [replace(card, passes=(replace(one, launch=wrong),))])
    with pytest.raises(SystemExit, match="1"):
        bench.BENCHMARK.run(replace(TINY, only=("kernels",)))
    printed = capsys.readouterr()
    lines = {line["candidate"]: line for line in map(json.loads, printed.out.splitlines()) if line["part"] == "kernels"}
    assert "wrong" in lines["ours"] and "ms" not in lines["ours"]
    assert "ms" in lines["eager"]
    assert f"fault: {operation}, 3 images, ours: wrong" in printed.err


def test_kernels_are_no_figure_of_a_cpu(capsys):
    lines = [line for line in lines_of(replace(TINY, only=("kernels",)), capsys) if line["part"] == "kernels"]
    assert {line["candidate"] for line in lines} == {"eager"}


def test_a_product_that_forgets_its_main_gradient_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(bench, "weight_gradient", lambda d_y, x, main: main.copy_(d_y.mT @ x))
    with pytest.raises(SystemExit, match="1"):
        bench.BENCHMARK.run(replace(TINY, only=("gemm",)))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wrong = {(line["operation"], line["candidate"]) for line in lines if "wrong" in line}
    assert wrong == {(f"{layer}_d_weight", "ours") for layer in ("qkv", "out_proj", "gate_up", "fc2")}


@pytest.mark.parametrize("part", ["block", "tower"])
def test_a_wrong_gradient_of_a_parameter_is_seen(part, capsys, monkeypatch):
    take = tower.take_gradients

    def forgetful(module):
        taken = take(module)
        fused = [m for m in module.modules() if getattr(m, "implementation", "") == "fused"]
        return {name: g * (0.9 if fused and "norm2.weight" in name else 1) for name, g in taken.items()}

    monkeypatch.setattr(tower, "take_gradients", forgetful)
    with pytest.raises(SystemExit, match="1"):
        bench.BENCHMARK.run(replace(TINY, only=(part,)))
    lines = {line["candidate"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert all("wrong" in line for name, line in lines.items() if name.startswith("ours"))
    assert "ms" in lines["eager"]


def test_in_bfloat16_as_on_a_gpu_everything_is_right(capsys, monkeypatch):
    monkeypatch.setitem(bench.DTYPES, "cpu", torch.bfloat16)
    monkeypatch.setitem(ceilings.MATRIX_DTYPES, "cpu", (torch.bfloat16,))
    lines = lines_of(TINY, capsys)
    assert {line["part"] for line in lines} == {*PARTS}
    for line in lines:
        assert "ms" in line and line["case"]["dtype"] == "bfloat16"
        added_in_float32 = line["operation"].endswith("d_weight") and line["candidate"] == "ours"
        assert (max(line["errors"].values()) < 1e-6) == added_in_float32


def test_a_candidate_that_crashes_or_runs_out_of_memory_costs_only_its_own_figures(capsys, monkeypatch):
    def crash(*_):
        raise RuntimeError("no kernel image\nis available")

    def too_large(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tower, "TimmTower", crash)
    lines = {line["candidate"]: line for line in lines_of(replace(TINY, only=("tower",)), capsys)}
    assert lines["timm"]["failed"] == "RuntimeError: no kernel image"
    assert "ms" in lines["ours_all"]
    monkeypatch.setattr(tower, "TimmTower", too_large)
    lines = {line["candidate"]: line for line in lines_of(replace(TINY, only=("tower",)), capsys)}
    assert lines["timm"]["failed"] == "out of memory" and "ms" in lines["eager"]


def test_what_is_not_ready_in_time_is_given_up_and_the_rest_is_measured():
    case = next(c for c in bench.comparisons("kernels", setting()) if c.operation == "gelu")
    stuck = replace(case, candidates={"eager": case.candidates["eager"], "ours": lambda: time.sleep(60)})
    stuck = replace(stuck, candidates=stuck.candidates | {"late": case.candidates["eager"]})
    low = ceilings.Ceilings(1e9, {torch.float32: 1e9}, None)
    start = time.monotonic()
    found = {line.candidate: line.outcome for line in compared(stuck, (), low, 0.001, Session.lasting(CPU, 2))}
    assert time.monotonic() - start < 50
    assert found["ours"] == found["late"] == {"failed": "time limit"}
    assert found["eager"]["ms"] > 0


def test_a_part_that_ran_out_of_time_is_no_fault(capsys):
    lines = lines_of(replace(TINY, only=("gemm",), limit=1e-9), capsys)
    assert {line["failed"] for line in lines} == {"time limit"}


def test_what_is_missing_is_named_and_left_out(capsys):
    libraries = ("eager", "sdpa_cudnn", "sdpa_flash", "flash_attn", "flash_attn_4")
    bench.BENCHMARK.run(replace(TINY, only=("kernels",), candidates=libraries))
    printed = capsys.readouterr()
    lines = list(map(json.loads, printed.out.splitlines()))
    assert {line["candidate"] for line in lines if "ms" in line} == {"eager"}
    absent = {line["candidate"]: line["absent"] for line in lines if "absent" in line}
    assert absent.keys() == {*libraries} - {"eager"} and "needs a GPU" in absent["flash_attn"]
    assert "left out sdpa_cudnn, sdpa_flash: " in printed.err
    assert "left out flash_attn: flash-attn needs a GPU" in printed.err


def test_a_tower_without_a_timm_peer_is_measured_without_it(monkeypatch, capsys):
    small = replace(VISION_CONFIGS[TOWER], gated=False, sub_norm=False, rotary_grid=None, layer_scale=0.1)
    monkeypatch.setitem(VISION_CONFIGS, TOWER, small)
    lines = lines_of(replace(TINY, candidates=("ours", "ours_all", "eager", "timm")), capsys)
    assert {line["operation"] for line in lines} >= {"fc1_forward", "block", "tower", "attention_backward"}
    assert all("ms" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": ("compield",)}, "--candidates compield is unknown: choose from compiled, eager"),
        ({"tower": "eva03"}, "--tower eva03 is unknown: choose from"),
        ({"micro_batch": (0,)}, "must be positive"),
    ],
    ids=["candidate", "tower", "size"],
)
def test_an_unknown_name_or_size_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        bench.BENCHMARK.run(replace(TINY, **change))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("part", "operation"), [("kernels", "attention_backward"), ("block", "block")])
def test_the_compiled_peers_are_right_and_compiled(part, operation):
    (case,) = (c for c in bench.comparisons(part, setting()) if c.operation == operation)
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    candidate = judged("compiled", case.candidates["compiled"]())
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > before and max(candidate.errors.values()) < 1e-4
    candidate.run()
    candidate.run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.slow
def test_the_same_figures_through_pytest_benchmark(tmp_path):
    script = (
        "import sys, pytest; from textlock.bench import operations as bench;"
        f"bench.OperationOptions.__dataclass_fields__['tower'].default = bench.OperationOptions.tower = '{TOWER}';"
        "bench.MICRO_BATCHES['cpu'] = dict.fromkeys(bench.MICRO_BATCHES['cpu'], (2,));"
        "from textlock.bench import ceilings;"
        "ceilings.MATRIX_SIDE['cpu'], ceilings.COPY_BYTES['cpu'] = 64, 4096;"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    flags = ["bench/test_operations.py", "--benchmark-only", f"--benchmark-json={tmp_path / 'out.json'}"]
    flags += [
        "--benchmark-max-time=0.01",
        "-k",
        "gelu-2-eager or block-2-ours or flash_attn_4",
        "-p",
        "no:cacheprovider",
    ]
    outcome = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = {b["name"]: b for b in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    assert found.keys() == {"test_operation[gelu-2-eager]", "test_operation[block-2-ours]"}
    for benchmark in found.values():
        extra = benchmark["extra_info"]
        assert extra["ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
        assert extra["floor_ms"] > 0 and max(extra["errors"].values()) < 1e-4
