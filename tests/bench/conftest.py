"""What tests of benchmarks share: ceilings at a size of no interest, and a benchmark run as its command runs it."""

import json
from contextlib import nullcontext

import pytest

from textlock.bench import ceilings


@pytest.fixture
def measure(monkeypatch, capsys):
    """Return what runs a benchmark and gives the lines on stdout and the text on stderr."""
    monkeypatch.setitem(ceilings.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**12)

    def measure(benchmark, options, *, status=0):
        with pytest.raises(SystemExit, match=f"^{status}$") if status else nullcontext():
            benchmark.run(options)
        printed = capsys.readouterr()
        return [json.loads(line) for line in printed.out.splitlines()], printed.err

    return measure
