"""The ceilings at a size of no interest: they are right, read back, and refused where they are of another device."""

import json

import pytest
import torch

from textlock.bench import ceilings as bench
from textlock.bench.measure import Wrong

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(bench.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 2**12)


@pytest.fixture
def printed(tmp_path, capsys):
    bench.BENCHMARK.run(bench.CeilingOptions(device="cpu", seconds=0.001))
    path = tmp_path / "ceilings.jsonl"
    path.write_text(capsys.readouterr().out)
    return path


def test_they_are_read_as_they_were_printed(printed):
    lines = {line["operation"]: line for line in map(json.loads, printed.read_text().splitlines())}
    assert lines.keys() == {"copy", "matrix_float32"}
    assert lines["copy"]["gigabytes_per_second"] == pytest.approx(2 * 2**12 / lines["copy"]["ms"] / 1e6)
    assert lines["matrix_float32"]["tflops"] == pytest.approx(2 * 64**3 / lines["matrix_float32"]["ms"] / 1e9)
    found = bench.read_ceilings(printed, CPU)
    assert found == bench.Ceilings.of(lines) and found.host_to_device is None
    assert found.bandwidth == pytest.approx(1e9 * lines["copy"]["gigabytes_per_second"])


def test_the_floor_is_the_longer_of_traffic_and_operations():
    ceilings = bench.Ceilings(1e9, {torch.float32: 1e12, torch.bfloat16: 4e12}, None)
    assert ceilings.floor(torch.float32, traffic=2e9, operations=1e12) == 2
    assert ceilings.floor(torch.float32, traffic=2e9, operations=4e12) == 4
    assert ceilings.floor(torch.bfloat16, operations=4e12) == 1


def test_those_of_another_device_are_refused(printed):
    printed.write_text(printed.read_text().replace('"device": "', '"device": "another '))
    with pytest.raises(ValueError, match=r"is of another .+, not of this .+; write it anew"):
        bench.read_ceilings(printed, CPU)
    printed.write_text("")
    with pytest.raises(ValueError, match="holds no ceilings; write it with"):
        bench.read_ceilings(printed, CPU)


def test_a_wrong_product_is_no_ceiling(monkeypatch):
    monkeypatch.setattr(bench, "relative_error", lambda found, true: float("nan"))
    with pytest.raises(Wrong, match="matrix_"):
        dict(bench.measure_ceilings(CPU, 0.001))
