"""The benchmark of the loaders at a size of no interest: they are right, measured, and refused when they are wrong."""

import multiprocessing
import sys
import time
from dataclasses import replace

import pytest
import torch

from textlock.bench import loader as bench
from textlock.bench.measure import Unavailable, Wrong

TINY = bench.LoaderOptions(
    device="cpu", sizes=(256,), samples=200, batch=16, workers=1, seconds=0.2, candidates=("ours_cpu",)
)
PEERS = ["webdataset_pil", "webdataset_torchvision"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return bench.write_shards(tmp_path_factory.mktemp("bench"), 200, 320, 256, bad=0.05)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_loader_is_measured_in_a_process_of_its_own(measure):
    (line,), _ = measure(bench.BENCHMARK, TINY)
    assert line["candidate"] == "ours_cpu" and line["case"]["width"] == 320 and line["case"]["workers"] == 1
    assert line["images_per_cpu_second"] > 0 and line["host_bytes"] > 2**20
    assert line["images_per_second"] == pytest.approx(16e3 / line["ms"]) and line["runs"] == bench.WINDOWS
    assert line["percent_of_floor"] == pytest.approx(100 * line["floor_ms"] / line["ms"])
    assert 0 < line["skipped"] < 0.05 and line["errors"]["grey_levels"] < 0.1


@pytest.mark.parametrize("name", PEERS)
def test_the_peers_are_right_and_leave_out_what_is_cut_short(name, shards):
    pytest.importorskip("webdataset")
    assert bench.grey_levels_off(name, shards, TINY) < 0.1
    batches = bench.CANDIDATES[name].open(shards, TINY, (0.9, 1.0))
    keys = [key for _ in range(20) for key in next(batches)[1]]
    assert set(keys) <= set(shards.jpegs) and len(set(keys)) > 150


def test_a_loader_that_is_wrong_or_missing_has_no_figures(shards, monkeypatch):
    right = bench.CANDIDATES["ours_cpu"]
    shifted = replace(right, levels=lambda images: right.levels(images).roll(4, dims=2))
    monkeypatch.setitem(bench.CANDIDATES, "ours_cpu", shifted)
    with pytest.raises(Wrong, match="grey_levels"):
        bench.published("ours_cpu", shards, TINY, 1.0)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(Unavailable, match="webdataset is not installed"):
        bench.published("webdataset_pil", shards, TINY, 1.0)


def raise_wrong(name):
    raise Wrong(name, {"grey_levels": 3.0})


def test_what_a_process_raises_arrives_and_it_ends_with_its_time(measure):
    with pytest.raises(Wrong, match="ours_cpu is wrong") as caught:
        bench.in_a_process(raise_wrong, "ours_cpu")
    assert caught.value.errors == {"grey_levels": 3.0}
    start = time.monotonic()
    (line,), _ = measure(bench.BENCHMARK, replace(TINY, seconds=60.0, limit=3.0))
    assert time.monotonic() - start < 40 and line["failed"] == "time limit"
    assert not multiprocessing.active_children()


def test_without_dali_nothing_is_known_of_decoding_on_a_gpu(shards, monkeypatch):
    monkeypatch.setattr(bench, "on_gpu", lambda decoder, options: True)
    monkeypatch.setattr(bench, "importable", lambda name: False)
    assert bench.decoding_alone("dali", shards, TINY) is None
    monkeypatch.undo()
    assert "floor_ms" not in bench.published("ours_cpu", shards, TINY, None)


def test_decoding_alone_decodes_every_image(shards, monkeypatch):
    decoded = []
    monkeypatch.setattr(bench, "decode_image", decoded.append)
    assert bench.decoding_alone("cpu", shards, replace(TINY, seconds=0.01)) > 0
    assert set(decoded) == {*list(shards.jpegs.values())[: bench.DALI_BATCH]}
