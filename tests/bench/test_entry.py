"""The interface that all benchmarks share: right results are timed, others reported, bad input is one sentence."""

import importlib
import signal
import sys
from dataclasses import replace

import pytest
import torch

from textlock.bench import candidates, entry
from textlock.bench import ceilings as ceilings_module
from textlock.bench.candidates import Comparison, Ready, compared
from textlock.bench.ceilings import Ceilings
from textlock.bench.entry import CPU, Benchmark, Column, Options, require_positive
from textlock.bench.measure import Unavailable

CEILINGS = Ceilings(1e9, {torch.float32: 1e12, torch.bfloat16: 4e12}, None)
ran = []


def ready(name, error=0.0, dtype=torch.float32):
    return lambda: Ready(lambda: ran.append(name), {"loss": error, "gradient": 0.0}, 1e-3, dtype)


def raising(error):
    def prepare():
        raise error

    return prepare


CANDIDATES = {
    "ours": ready("ours"),
    "peer": ready("peer", 1e-3, torch.bfloat16),
    "slightly_wrong": ready("slightly_wrong", 1.01e-3),
    "peer_nan": ready("peer_nan", float("nan")),
    "missing": raising(Unavailable("it is not installed")),
    "missing_too": raising(Unavailable("it is not installed")),
    "broken": raising(RuntimeError("one line\nand another")),
    "large": raising(torch.OutOfMemoryError("much text")),
}
COMPARISON = Comparison(
    *("loss", "symmetric", {"b": 4}, ("symmetric", "4"), CANDIDATES),
    traffic=2e6,
    operations=4e9,
    memory=True,
    more=lambda seconds: {"images_per_second": 4 / seconds},
)


def benchmark(comparison=COMPARISON, seconds=0.0):
    ran.clear()
    return Benchmark(
        about="What it does.",
        options=Options,
        check=lambda options: require_positive(options, "seconds", "limit"),
        lines=lambda options, session: compared(comparison, options.candidates, CEILINGS, seconds, session),
        before=("operation", "b"),
        columns=(*entry.TIMING, entry.FLOOR, Column("images/s", "images_per_second", ".1f"), entry.ERROR),
    )


def test_candidates_are_checked_then_timed_in_turns_and_the_rest_is_told(measure, monkeypatch):
    times = {"ours": [1e-3, 2e-3, 4e-3], "peer": [2e-3, 6e-3, 4e-3]}

    def interleaved(runs, seconds, device):
        assert runs.keys() == times.keys()
        return times

    monkeypatch.setattr(candidates, "interleaved_times", interleaved)
    lines, table = measure(benchmark(), Options(device="cpu"))
    found = {line["candidate"]: line for line in lines}
    assert found.keys() == CANDIDATES.keys()
    ours, peer = found["ours"], found["peer"]
    assert ours["ms"] == 2 and ours["quartiles_ms"] == [1.5, 3] and ours["runs"] == 3 and ours["dtype"] == "float32"
    assert ours["floor_ms"] == 4 and ours["percent_of_floor"] == 200, "operations at the rate of float32"
    assert peer["floor_ms"] == 2 and peer["percent_of_floor"] == 50, "traffic, at the faster rate of bfloat16"
    assert (ours["gigabytes_per_second"], ours["tflops"], ours["images_per_second"]) == (1.0, 2.0, 2000.0)
    assert ours["speedup"] == {"peer": 2} and "speedup" not in peer and "peak_bytes" in ours
    assert ours["case"] == {"b": 4} and ours["part"] == "loss" and ours["device"] and ours["versions"]["torch"]
    assert found["slightly_wrong"]["wrong"] == {"loss": 1.01e-3, "gradient": 0.0} and "wrong" in found["peer_nan"]
    assert found["broken"]["failed"] == "RuntimeError: one line" and found["large"]["failed"] == "out of memory"
    assert all(("ms" in line) == (name in times) for name, line in found.items())
    assert "left out missing, missing_too: it is not installed" in table
    assert "2000.0" in table and "wrong: 1e-03" in table and "fault" not in table


def test_runs_take_turns_and_only_those_that_are_chosen(measure):
    lines, _ = measure(benchmark(), Options(device="cpu", candidates=("peer", "ours", "missing")))
    assert [line["candidate"] for line in lines] == ["missing", "ours", "peer"]
    assert ran[:8] == ["ours", "peer"] * 4


def test_where_not_all_fit_together_each_is_timed_by_itself(measure, monkeypatch):
    def interleaved(runs, seconds, device):
        if len(runs) > 1 or "peer" in runs:
            raise torch.OutOfMemoryError("much text")
        return {name: [2e-3, 2e-3] for name in runs}

    monkeypatch.setattr(candidates, "interleaved_times", interleaved)
    lines, _ = measure(benchmark(), Options(device="cpu", candidates=("ours", "peer")))
    assert lines[0]["ms"] == 2 and "speedup" not in lines[0] and lines[1]["failed"] == "out of memory"


@pytest.mark.parametrize(
    ("ours", "fault"),
    [
        (ready("ours", float("nan")), "symmetric, 4, ours: wrong, its relative errors are {'loss': nan"),
        (raising(RuntimeError("no")), "symmetric, 4, ours: RuntimeError: no"),
    ],
)
def test_ours_wrong_or_failed_is_exit_status_1_and_peers_keep_their_figures(ours, fault, measure):
    lines, table = measure(benchmark(replace(COMPARISON, candidates=CANDIDATES | {"ours": ours})), Options(), status=1)
    assert f"fault: {fault}" in table
    assert {line["candidate"] for line in lines if "ms" in line} == {"peer"}


def test_after_the_limit_nothing_more_is_started_and_that_is_no_fault(measure, monkeypatch):
    slow = lambda: signal.pause()  # noqa: E731
    named = {"ours": ready("ours"), "ours_slow": slow, "peer": ready("peer")}
    lines, _ = measure(benchmark(replace(COMPARISON, candidates=named)), Options(device="cpu", limit=0.5))
    found = {line["candidate"]: line for line in lines}
    assert found["ours_slow"]["failed"] == found["peer"]["failed"] == "time limit" and found["ours"]["ms"] > 0


def test_a_wrong_ceiling_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(ceilings_module, "relative_error", lambda found, true: float("nan"))
    monkeypatch.setitem(ceilings_module.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setattr(sys, "argv", ["ceilings", "--seconds", "0.001", "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"^1$"):
        ceilings_module.BENCHMARK.command()
    assert "error: matrix_float32 is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("ceilings", "--seconds 0", "--seconds is 0, must be positive"),
        ("losses", "--candidates chunkd", "--candidates chunkd is unknown: choose from ours_reference, ours_chunked"),
        ("losses", "--batch 8 0", "--batch is 0, must be positive"),
        ("losses", "--seconds nan", "--seconds is nan, must be positive"),
        ("step", "--candidates theirs", "--candidates theirs is unknown: choose from ours, gradcache_fused"),
        ("step", "--texts 8 --local-batches 3", "8 texts are no multiple of the local batch 3"),
        ("step", "--texts 8 --local-batches 4 --micro-batch 3", "the micro-batch 3 does not divide the local batch 4"),
        ("step", "--tower vit_huge", "--tower vit_huge is unknown: choose from eva02_base"),
        ("step", "--jpegs 0", "--jpegs is 0, must be positive"),
        ("step", "--candidates open_clip_eager --jpegs 256", "--jpegs and --profile are of ours"),
        ("loader", "--candidates cpuu", "--candidates cpuu is unknown: choose from ours_cpu, ours_dali"),
        ("loader", "--sizes 300", "--sizes 300 is unknown: choose from 256, 512"),
        ("loader", "--bad 1", "--bad is 1, must be at least 0 and below 1"),
        ("plan", "--tower vit_huge", "--tower vit_huge is unknown"),
        ("plan", "--texts 0", "--texts is 0, must be positive"),
        ("large_batch", "--batch 0", "--batch is 0, must be positive"),
        ("large_batch", "--check -1", "--check is -1, must be positive or 0"),
        ("scaling", "", "give --parts or --steps, one of them"),
        ("scaling", "--parts a.json --steps b.json", "give --parts or --steps, one of them"),
        ("scaling", "--parts a.json --local-batch 0", "--local-batch is 0, must be positive"),
        ("scaling", "--parts no_such.json", "no_such.json"),
        ("scaling_check", "--tower vit_huge", "--tower vit_huge is unknown"),
        ("scaling_check", "--local-batch 6", "--local-batch 6 is no multiple of 4"),
        ("scaling_check", "--rounds 1", "--rounds is 1, must be at least 2"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_measured(module, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *flags.split()])
    with pytest.raises(SystemExit, match=r"^2$"):
        importlib.import_module(f"textlock.bench.{module}").BENCHMARK.command()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    assert entry.device_of(None) == CPU
    with pytest.raises(ValueError, match="--device cuda: torch sees no NVIDIA GPU on this machine"):
        entry.device_of("cuda")
