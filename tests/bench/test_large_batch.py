"""The benchmark of the very large step at a size of no interest, and the figures that were published with it."""

from dataclasses import replace
from pathlib import Path

import pytest

from textlock.bench import large_batch as bench
from textlock.bench.records import read_figures

ROOT = Path(__file__).parents[2]
TINY = bench.LargeBatchOptions(batch=96, micro_batch=12, check=48)


MICRO_BATCH_GIB = 12 * 160_000 / 2**30  # what one takes with everything kept


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        (replace(TINY), 96),
        (replace(TINY, keep="block"), 96),
        (replace(TINY, keep="none"), 192),
        (replace(TINY, memory_gib=1.5 * MICRO_BATCH_GIB), None),
    ],
    ids=["auto", "block", "none", "little memory"],
)
def test_a_step_is_checked_and_measured(options, forwards, measure):
    (line,), _ = measure(bench.BENCHMARK, options)
    assert line["case"]["batch"] == 96 and sum(line["tiers"].values()) == 8
    twice = line["tiers"].get("none", 0) * 12
    assert line["images_forward"] == 96 + twice
    if forwards is None:
        assert 0 < twice < 96, "some are kept and some recomputed"
    else:
        assert line["images_forward"] == forwards
    assert line["images_per_second"] == pytest.approx(96e3 / line["ms"])
    assert line["peak_resident_bytes"] >= line["resident_bytes_before"] > 2**26
    assert line["check"]["batch"] == 48 and line["check"]["micro_batch"] == 6
    assert max(line["check"]["errors"].values()) < 1e-5


def spoil_gradient(patch):
    right = bench.Objective.of_batch
    patch.setattr(bench.Objective, "of_batch", lambda self, images, *rest, **k: right(self, images * 1.001, *rest, **k))


def run_twice(patch):
    right = bench.LargeBatchStep._forward
    patch.setattr(bench.LargeBatchStep, "_forward", lambda self, *a: [right(self, *a), right(self, *a)][1])


@pytest.mark.parametrize(
    ("spoil", "names"), [(spoil_gradient, {"loss", "gradients"}), (run_twice, {"counted", "planned"})]
)
def test_a_wrong_step_prints_no_figure(spoil, names, measure, monkeypatch):
    spoil(monkeypatch)
    (line,), _ = measure(bench.BENCHMARK, TINY, status=1)
    assert line["wrong"].keys() == names and "ms" not in line


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ({"check": 50}, "--check 50 is no multiple of the 8 micro-batches"),
        ({"micro_batch": 11}, "--step.micro-batch is 11, must divide the 96 images"),
        ({"memory_gib": 0.0}, "not even one image fits"),
    ],
)
def test_bad_input_is_one_sentence(flaw, message):
    with pytest.raises(ValueError, match=message):
        bench.BENCHMARK.run(replace(TINY, **flaw))


def test_the_published_step_stays_under_four_gibibytes():
    files = [path for path in (ROOT / "bench" / "results").glob("*.json") if not path.name.startswith("demo")]
    lines = [line for path in files for line in read_figures(path) if line["part"] == "large_batch" and "ms" in line]
    assert any(line["case"]["batch"] == 65536 for line in lines)
    for line in lines:
        assert line["peak_resident_bytes"] < 4 * 2**30
        assert line["check"]["batch"] == 4096 and max(line["check"]["errors"].values()) < 1e-4
