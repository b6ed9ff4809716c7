"""The benchmark of the losses at a size of no interest: it runs, checks itself, refuses figures of wrong results."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from textlock.bench import contrastive as bench

ROOT = Path(__file__).parents[2]
EAGER = tuple(name for name in bench.CANDIDATES if "compiled" not in name)
TINY = bench.Options(batch=(24,), width=(16,), losses=EAGER, seconds=0.001)


def lines_of(options, capsys, *, fault=False):
    """Run the benchmark; return its lines by candidate but those that this machine has not."""
    with pytest.raises(SystemExit, match="1") if fault else nullcontext():
        bench.main(options)
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return {line["candidate"]: line for line in lines if "absent" not in line}


@pytest.mark.parametrize("world", [1, 3])
def test_every_candidate_is_checked_and_measured(world, capsys):
    lines = lines_of(replace(TINY, world=world), capsys)
    assert set(lines) >= {"ours_chunked", "open_clip", "ours_sigmoid_chunked", "open_clip_sigmoid"}
    assert ("linear_cross_entropy" in lines) == hasattr(torch.nn, "LinearCrossEntropyOptions")
    assert ("ours_reference" in lines) == (world == 1)
    for line in lines.values():
        assert line["case"]["B"] == 24 * world
        assert line["ms"] > 0 and line["floor_ms"] > 0 and line["peak_bytes"] > 0
        assert line["percent_of_floor"] == pytest.approx(100 * line["floor_ms"] / line["ms"])
        assert line["tflops"] * line["ms"] == pytest.approx(4 * 24 * 24 * world * 16 / 1e9)
        assert line["errors"].keys() >= {"loss", "image_grad", "scale_grad"}
        assert ("bias_grad" in line["errors"]) == (line["operation"] == "sigmoid")
        assert max(line["errors"].values()) < 1e-3
        assert line["device"] and line["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("spoil", [lambda loss: loss * 1.01, lambda loss: loss * torch.nan], ids=["1 % off", "nan"])
def test_a_wrong_result_prints_no_figure(spoil, capsys, monkeypatch):
    right = bench.contrastive.contrastive_loss

    def wrong(*arguments, mode="auto", **settings):
        loss = right(*arguments, mode=mode, **settings)
        return spoil(loss) if mode == "chunked" else loss

    monkeypatch.setattr(bench.contrastive, "contrastive_loss", wrong)
    lines = lines_of(TINY, capsys, fault=True)
    assert "wrong" in lines["ours_chunked"] and "ms" not in lines["ours_chunked"]
    assert "ms" in lines["ours_reference"]


def test_a_loss_without_one_of_its_gradients_is_wrong(capsys, monkeypatch):
    right = bench.sigmoid_loss
    monkeypatch.setattr(
        bench,
        "sigmoid_loss",
        lambda image, text, scale, bias, *, mode: right(
            image, text, scale, bias.detach() if mode == "chunked" else bias, mode=mode
        ),
    )
    lines = lines_of(replace(TINY, losses=("ours_sigmoid_chunked",)), capsys, fault=True)
    assert "wrong" in lines["ours_sigmoid_chunked"]


def test_what_is_missing_is_named_in_one_line_and_left_out(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.loss", None)
    bench.main(TINY)
    printed = capsys.readouterr()
    lines = {line["candidate"]: line for line in map(json.loads, printed.out.splitlines())}
    assert all("open_clip is not installed" in lines[name]["absent"] for name in ("open_clip", "open_clip_sigmoid"))
    (named,) = [line for line in printed.err.splitlines() if "open_clip is not installed" in line]
    assert named.startswith("left out open_clip, open_clip_sigmoid, open_clip_sigmoid_256: ")


def test_without_a_compiler_the_compiled_peer_is_left_out(monkeypatch):
    case = bench.make_case(8, 1, 16, 50.0, 0, torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(bench.Unavailable, match="no-such-compiler"):
        bench.check(case, "open_clip_compiled")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_peer_is_right_and_compiled():
    case = bench.make_case(24, 3, 16, 50.0, 0, torch.device("cpu"))
    trial = bench.check(case, "open_clip_compiled")
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    trial.runner()()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_memory_of_other_runs_does_not_count():
    """A dense loss holds its logits; the chunked one, cut to a row at a time, does not."""
    case = bench.make_case(256, 1, 16, 50.0, 0, torch.device("cpu"))
    dense = bench.check(case, "open_clip")
    logits = case.b * case.B * 4
    assert 2 * logits <= dense.peak_bytes() <= 8 * logits
    assert dense.peak_bytes() == dense.peak_bytes()


def test_an_unknown_loss_is_an_error():
    with pytest.raises(ValueError, match="no loss is named chunkd; choose from ours_reference, ours_chunked"):
        bench.main(replace(TINY, losses=("chunkd",)))


@pytest.mark.slow
def test_the_same_figures_through_pytest_benchmark(tmp_path):
    script = (
        "import sys, pytest; from textlock.bench import contrastive as bench;"
        "bench.SIZES['cpu'], bench.WIDTHS['cpu'] = ((24, 2),), (16,);"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    flags = ["bench/test_contrastive.py", "--benchmark-only", f"--benchmark-json={tmp_path / 'out.json'}"]
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
