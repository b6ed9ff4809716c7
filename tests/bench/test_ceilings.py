"""The ceilings at a size of no interest: read back as printed, refused where they are of another device."""

import json

import pytest
import torch

from textlock.bench import ceilings as bench
from textlock.bench.entry import CPU


def test_they_are_read_as_they_were_printed_and_refused_where_they_are_of_another_device(measure, tmp_path):
    printed, _ = measure(bench.BENCHMARK, bench.CeilingOptions(device="cpu", seconds=0.001))
    lines = {line["operation"]: line for line in printed}
    assert lines.keys() == {"copy", "matrix_float32"}
    assert lines["copy"]["gigabytes_per_second"] == pytest.approx(2 * 2**12 / lines["copy"]["ms"] / 1e6)
    assert lines["matrix_float32"]["tflops"] == pytest.approx(2 * 64**3 / lines["matrix_float32"]["ms"] / 1e9)
    path = tmp_path / "ceilings.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in printed))
    found = bench.read_ceilings(path, CPU)
    assert found == bench.Ceilings.of(lines) and found.host_to_device is None
    assert found.bandwidth == pytest.approx(1e9 * lines["copy"]["gigabytes_per_second"])

    path.write_text(path.read_text().replace('"device": "', '"device": "another '))
    with pytest.raises(ValueError, match=r"is of another .+, not of this .+; measure again"):
        bench.read_ceilings(path, CPU)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no ceilings; write it with"):
        bench.read_ceilings(path, CPU)


def test_the_floor_is_the_longer_of_traffic_and_operations():
    ceilings = bench.Ceilings(1e9, {torch.float32: 1e12, torch.bfloat16: 4e12}, None)
    assert ceilings.floor(torch.float32, traffic=2e9, operations=1e12) == 2
    assert ceilings.floor(torch.float32, traffic=2e9, operations=4e12) == 4
    assert ceilings.floor(torch.bfloat16, operations=4e12) == 1
