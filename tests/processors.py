"""Run the numeric tests as other processors would: `make test-processors`.

Results in floating point are the same bits within one machine only. Another instruction set or number of threads adds
the terms of a sum in another order, so a bound that was fitted to one processor fails on the next. Each run below sets
what decides that order here; the last stands for processors that are not here, and adds to every float32 matrix product
as much as its own rounding may be.

As a pytest plugin (`-p textlock.tests.processors`) this file is that last run.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from textlock.tests.kernels.rounding import UNIT

ROOT = Path(__file__).parents[1]
NUMERIC = ("tests/kernels", "tests/models", "tests/evals", "tests/engine/test_step.py", "tests/engine/test_optim.py")
RUNS: dict[str, dict[str, str]] = {
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "torch with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch with AVX-512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "oneDNN with SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "oneDNN with AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL without AVX": {"MKL_CBWR": "COMPATIBLE"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "3 threads": {"OMP_NUM_THREADS": "3"},
}
NEEDED = {"avx2": "avx2", "avx512": "avx512f"}  # flag of /proc/cpuinfo
# These count operations or bytes, which the other rounding adds to, or trace the product into a graph.
NOT_ROUNDED = ("never_holds", "registered_consistently", "compile")


def rounded_otherwise(product: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the float32 product a @ b [..., M, N] as another order of its sums might round it.

    The same for the same numbers, so that what is promised bit for bit stays so.
    """
    exact = a.detach().double() @ b.detach().double()
    size = a.detach().double().abs() @ b.detach().double().abs()
    rounded = product.detach()
    bits = rounded.contiguous().view(torch.int32).long()
    draw = (bits * 2654435761 % 2**32).double() / 2**31 - 1  # from -1 to 1
    error = draw * a.shape[-1] ** 0.5 * UNIT * size
    return product + torch.where(exact == rounded, 0.0, error).float()  # what is exact is so everywhere


def _is_rounded(*tensors: object) -> bool:
    plain = (torch.Tensor, torch.nn.Parameter)
    return not torch.compiler.is_compiling() and all(
        type(x) in plain and x.dtype == torch.float32 and x.device.type == "cpu" and x.ndim > 1 for x in tensors
    )


@pytest.fixture(autouse=True)
def another_processor(monkeypatch):
    """Round the float32 matrix products that Python code asks torch for as another processor might."""

    def replace(owner, name):
        original = getattr(owner, name)

        def product(a, b, *, out=None):
            found = original(a, b) if out is None else original(a, b, out=out)
            if not _is_rounded(a, b):
                return found
            return rounded_otherwise(found, a, b) if out is None else out.copy_(rounded_otherwise(found, a, b))

        monkeypatch.setattr(owner, name, product)

    for owner, name in ((torch, "mm"), (torch, "bmm"), (torch, "matmul"), (torch.Tensor, "__matmul__")):
        replace(owner, name)
    linear, addmm_ = F.linear, torch.Tensor.addmm_

    def other_linear(x, weight, bias=None):
        if not _is_rounded(x, weight):
            return linear(x, weight, bias)
        product = rounded_otherwise(linear(x, weight), x, weight.mT)
        return product if bias is None else product + bias

    def other_addmm_(self, a, b, **scalars):
        return self.add_(torch.mm(a, b)) if _is_rounded(a, b) and not scalars else addmm_(self, a, b, **scalars)

    monkeypatch.setattr(F, "linear", other_linear)
    monkeypatch.setattr(torch.Tensor, "addmm_", other_addmm_)


def main() -> None:
    """Run the tests once for each setting that this processor has; exit status 1 if any run failed."""
    flags = Path("/proc/cpuinfo").read_text().split()
    failed = []
    runs = [(name, settings, []) for name, settings in RUNS.items()]
    deselected = " and ".join(f"not {name}" for name in NOT_ROUNDED)
    runs.append(("another rounding", {}, ["-p", "textlock.tests.processors", "-k", deselected]))
    for name, settings, options in runs:
        needed = NEEDED.get(settings.get("ATEN_CPU_CAPABILITY", ""))
        if needed is not None and needed not in flags:
            print(f"{name}: left out, this processor has no {needed}", flush=True)
            continue
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *(sys.argv[1:] or NUMERIC)]
        outcome = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
        lines = outcome.stdout.strip().splitlines() or outcome.stderr.strip().splitlines() or ["nothing was printed"]
        print(f"{name}: {lines[-1]} ({time.monotonic() - started:.0f} s)", flush=True)
        if outcome.returncode:
            failed.append(name)
            print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), flush=True)
    if failed:
        raise SystemExit(f"error: the numeric tests fail with {', '.join(failed)}")


if __name__ == "__main__":
    main()
