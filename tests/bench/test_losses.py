"""The benchmark of the losses at a size of no interest: it runs, checks itself, refuses figures of wrong results."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from textlock.bench import losses as bench
from textlock.bench.candidates import judged
from textlock.bench.measure import Unavailable, peak_bytes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EAGER = tuple(name for name in bench.CANDIDATES if "compiled" not in name)
TINY = bench.LossOptions(device="cpu", batch=(24,), width=(16,), candidates=EAGER, seconds=0.001)


@pytest.mark.parametrize("world", [1, 3])
def test_every_candidate_is_checked_and_measured(world, measure):
    found, _ = measure(bench.BENCHMARK, replace(TINY, world=world))
    lines = {line["candidate"]: line for line in found if "absent" not in line}
    assert set(lines) >= {"ours_chunked", "open_clip", "ours_sigmoid_chunked", "open_clip_sigmoid"}
    assert ("linear_cross_entropy" in lines) == hasattr(torch.nn, "LinearCrossEntropyOptions")
    assert ("ours_reference" in lines) == (world == 1)
    for name, line in lines.items():
        assert line["case"] == {"b": 24, "B": 24 * world, "d": 16, "scale": 50.0}
        assert line["operation"] == ("sigmoid" if "sigmoid" in name else "contrastive")
        assert line["percent_of_floor"] == pytest.approx(100 * line["floor_ms"] / line["ms"]) and line["peak_bytes"] > 0
        assert line["tflops"] * line["ms"] == pytest.approx(4 * 24 * 24 * world * 16 / 1e9)
        gradients = {"loss", "image_grad", "scale_grad"} | ({"bias_grad"} if line["operation"] == "sigmoid" else set())
        assert line["errors"].keys() == gradients and max(line["errors"].values()) < 1e-3


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("contrastive_loss", lambda right: lambda *a, **k: right(*a, **k) * 1.01),
        ("contrastive_loss", lambda right: lambda *a, **k: right(*a, **k) * torch.nan),
        ("sigmoid_loss", lambda right: lambda image, text, s, bias, **k: right(image, text, s, bias.detach(), **k)),
    ],
    ids=["1 % off", "nan", "without a gradient"],
)
def test_a_wrong_result_prints_no_figure(name, spoil, measure, monkeypatch):
    module = bench.contrastive if name == "contrastive_loss" else bench
    right = getattr(module, name)
    wrong = spoil(right)
    chosen = lambda *a, mode, **k: (wrong if mode == "chunked" else right)(*a, mode=mode, **k)  # noqa: E731
    monkeypatch.setattr(module, name, chosen)
    ours = "ours_chunked" if name == "contrastive_loss" else "ours_sigmoid_chunked"
    lines, _ = measure(bench.BENCHMARK, replace(TINY, candidates=(ours, "ours_reference")), status=1)
    assert {line["candidate"]: "ms" in line for line in lines} == {"ours_reference": True, ours: False}


def comparison_of(b, world):
    return next(bench.comparisons(bench.make_case(b, world, 16, 50.0, 0, CPU)))


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.loss", None)
    with pytest.raises(Unavailable, match="open_clip is not installed"):
        comparison_of(8, 1).candidates["open_clip"]()
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match="no-such-compiler"):
        comparison_of(8, 1).candidates["open_clip_compiled"]()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_peer_is_right_and_compiled():
    ready = judged("open_clip_compiled", comparison_of(24, 3).candidates["open_clip_compiled"]())
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    ready.run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_the_memory_of_a_dense_loss_is_that_of_its_logits():
    run = comparison_of(256, 1).candidates["open_clip"]().run
    assert 2 * 256**2 * 4 <= peak_bytes(run, CPU) <= 8 * 256**2 * 4


@pytest.mark.slow
def test_the_same_figures_through_pytest_benchmark(tmp_path):
    script = (
        "import sys, pytest; from textlock.bench import losses as bench;"
        "bench.SIZES['cpu'], bench.WIDTHS['cpu'] = ((24, 2),), (16,);"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    flags = ["bench/test_losses.py", "--benchmark-only", f"--benchmark-json={tmp_path / 'out.json'}"]
    flags += ["--benchmark-max-time=0.01", "-k", "chunked or reference", "-p", "no:cacheprovider"]
    outcome = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    names = {benchmark["name"] for benchmark in found}  # `reference` is left out: it takes one rank
    assert names == {f"test_loss_and_gradient[24-2-16-{loss}]" for loss in ("ours_chunked", "ours_sigmoid_chunked")}
    for benchmark in found:
        extra = benchmark["extra_info"]
        assert extra["ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
        assert extra["floor_ms"] > 0 and extra["peak_bytes"] > 0 and max(extra["errors"].values()) < 1e-3
