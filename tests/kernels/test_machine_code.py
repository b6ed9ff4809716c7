"""What the compiler makes of every kernel for an H100, with the installed Triton and with the oldest supported one.

Compiled in a process of its own: in this one the kernels may be set to run in the interpreter.
"""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from textlock.kernels.card import find_cards

ROOT = Path(__file__).parents[2]
TRITON_36 = Path(os.environ.get("TEXTLOCK_TRITON_36", ROOT / ".venv" / "triton-3.6"))


def compile_kernels(*arguments, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def compiling():
    """Start both compilers side by side: the newest takes minutes of one core, so the oldest gets the recipe alone."""
    with ThreadPoolExecutor() as pool:
        yield {
            triton: pool.submit(compile_kernels, "-m", "textlock.bench.machine_code", *flags)
            for triton, flags in (("installed", []), ("3.6", ["--sizes", "first", "--triton", str(TRITON_36)]))
            if triton == "installed" or TRITON_36.is_dir()
        }


@pytest.fixture(scope="module", params=["installed", "3.6"])
def kernels(request, compiling):
    """Return kernel and case -> what was read from the binary."""
    if request.param not in compiling:
        pytest.skip(f"no Triton 3.6 in {TRITON_36}: make test puts it there, TEXTLOCK_TRITON_36 names another folder")
    outcome = compiling[request.param].result()
    assert outcome.stdout, outcome.stderr
    rows = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert request.param == "installed" or {row["triton"] for row in rows} == {"3.6.0"}
    found = {}
    for row in rows:
        found.setdefault(f"{row['kernel']} ({row['case']})", []).append(row)
    return found


@pytest.mark.slow
def test_every_kernel_keeps_to_its_registers(kernels):
    assert [name for name, rows in kernels.items() for row in rows if row["spills"] or row["stack_bytes"]] == []
    assert all(0 < row["registers"] <= 255 for rows in kernels.values() for row in rows)


@pytest.mark.slow
def test_every_dot_product_is_a_wgmma(kernels):
    with_dots = {name: row for name, rows in kernels.items() for row in rows if row["dots"]}
    multiply = {one.kernel.__name__ for card in find_cards() if card.multiplies for one in card.passes if one.kernel}
    assert {name.split(" ")[0] for name in with_dots} >= multiply
    for name, row in with_dots.items():
        operands = "bf16.bf16" if "bfloat16" in name else "f16.f16"
        assert row["wgmma"] and all(kind.endswith(f".f32.{operands}") for kind in row["wgmma"]), name
        assert row["tensor_core"] and all(opcode.startswith("HGMMA") for opcode in row["tensor_core"]), name


@pytest.mark.slow
def test_as_many_programs_fit_as_the_launchers_count_on(kernels):
    short = [name for name, rows in kernels.items() for row in rows if row["programs"] < row["programs_wanted"]]
    assert short == []
    fastest = [kernels[case] for case in ("sums_kernel ()", "sums_kernel (store)") if case in kernels]
    assert fastest and all(row["programs"] == 2 for rows in fastest for row in rows)


@pytest.mark.slow
def test_no_kernel_is_left_out(kernels):
    """A kernel is what has triton.jit and is launched: name[grid](...)."""
    nodes = [node for path in (ROOT / "kernels").glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    compiled = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    }
    called = {
        node.func.value.id
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    assert compiled & called == {name.split(" ")[0] for name in kernels}


BAD_KERNELS = """
import torch
import triton
import triton.language as tl

from textlock.bench import machine_code as bench


@triton.jit
def spilling(rows, M: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :]
    first = tl.load(rows + i)
    product = tl.dot(first, first.T)
    tl.store(rows + i, tl.dot(product.to(tl.float16), first) + tl.sum(product))


@triton.jit
def small(rows, M: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :]
    first = tl.load(rows + i)
    tl.store(rows + tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :], tl.dot(first, first.T))


def cases(which):
    rows = torch.empty(1024, 1024, dtype=torch.float16, device="meta")
    yield bench.Case("wide", lambda: spilling[(1,)](rows, M=256, K=128, num_warps=4))
    launch = lambda: small[(99 * bench.MULTIPROCESSORS,)](rows, M=32, K=32, num_warps=1)
    yield bench.Case("of one warp", launch, {"small": "grid"})


bench.cases = cases
bench.main(bench.Options())
"""


def test_a_spill_a_dot_without_wgmma_and_a_crowd_are_faults(tmp_path):
    (tmp_path / "bad.py").write_text(BAD_KERNELS)
    outcome = compile_kernels(str(tmp_path / "bad.py"))
    assert outcome.returncode == 1
    spilled, by_mma, crowd = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert spilled.startswith("error: spilling (wide) keeps ")
    assert by_mma.startswith("error: small (of one warp) computes a dot product by HMMA")
    assert crowd.endswith("its launcher counts on 99")


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        ([], {"TRITON_INTERPRET": "1"}, "error: TRITON_INTERPRET is set"),
        (["--triton", "nowhere"], {}, "error: nowhere holds no Triton"),
    ],
    ids=["interpreter", "no folder"],
)
def test_what_cannot_be_compiled_is_said(flags, environment, sentence):
    outcome = compile_kernels("-m", "textlock.bench.machine_code", *flags, **environment)
    assert outcome.returncode == 2 and not outcome.stdout
    assert outcome.stderr.splitlines()[-1].startswith(sentence)
