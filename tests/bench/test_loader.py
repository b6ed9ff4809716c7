"""The benchmark of the loaders at a size of no interest: they are right, measured, and refused when they are wrong."""

import json
import multiprocessing
import sys
import time
from dataclasses import replace

import pytest
import torch

from textlock.bench import loader as bench
from textlock.bench.measure import Unavailable, Wrong
from textlock.models.vision import build_vision_tower

TINY = bench.Options(sizes=(256,), samples=200, batch=16, workers=1, seconds=0.2, loaders=("ours_cpu",))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return bench.write_shards(tmp_path_factory.mktemp("bench"), 200, 320, 256, bad=0.05)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_loader_is_measured_in_a_process_of_its_own(capsys):
    bench.main(TINY)
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["candidate"] == "ours_cpu" and line["case"]["width"] == 320 and line["case"]["workers"] == 1
    assert line["images_per_second"] > 0 and line["images_per_cpu_second"] > 0 and line["host_bytes"] > 2**20
    assert line["images_per_second"] == pytest.approx(16e3 / line["ms"]) and line["runs"] == bench.WINDOWS
    assert line["percent_of_floor"] == pytest.approx(100 * line["floor_ms"] / line["ms"])
    assert 0 < line["skipped"] < 0.05 and line["errors"]["grey_levels"] < 0.1
    assert line["device"] and line["versions"]["torch"] == torch.__version__.partition("+")[0]


class Probe(torch.nn.Module):
    """Stands for a tower: remembers what it is given."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.weight = seen, torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        self.seen.append(images)
        return self.weight * images.float().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", ["ours_cpu", "webdataset_pil", "webdataset_torchvision"])
def test_a_tower_trains_on_what_comes(name, shards, monkeypatch):
    """Pictures of every loader are in a form that a tower takes, and each batch goes through it."""
    if name != "ours_cpu":
        pytest.importorskip("webdataset")
    seen = []
    probe = Probe(seen)
    monkeypatch.setattr(bench, "build_vision_tower", lambda *arguments, **settings: probe)
    outcome = bench.measure(name, shards, replace(TINY, tower="eva02_micro_patch8_32"))
    assert len(seen) > 2 and probe.weight.grad != 0
    assert outcome["images_per_second"] > 0 and outcome["device_bytes"] is None
    build_vision_tower("eva02_micro_patch8_32", image_size=bench.CROP)._check(seen[0])


@pytest.mark.parametrize("name", ["webdataset_pil", "webdataset_torchvision"])
def test_the_peers_are_right_and_leave_out_what_is_cut_short(name, shards):
    pytest.importorskip("webdataset")
    assert bench.check(name, shards, TINY) < 0.1
    batches = bench.CANDIDATES[name].open(shards, TINY, (0.9, 1.0))
    keys = [key for _ in range(20) for key in next(batches)[1]]
    assert set(keys) <= set(shards.pictures) and len(set(keys)) > 150


def test_a_loader_that_is_wrong_has_no_figures(shards, monkeypatch):
    right = bench.CANDIDATES["ours_cpu"]
    shifted = replace(right, levels=lambda images: right.levels(images).roll(4, dims=2))
    monkeypatch.setitem(bench.CANDIDATES, "ours_cpu", shifted)
    with pytest.raises(Wrong, match="grey_levels"):
        bench.published("ours_cpu", shards, TINY, 1.0)


def test_a_missing_peer_is_named(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(Unavailable, match="webdataset is not installed"):
        bench.published("webdataset_pil", shards, TINY, 1.0)


def raise_wrong(name):
    raise Wrong(name, {"grey_levels": 3.0})


def test_what_a_process_raises_arrives():
    with pytest.raises(Wrong, match="ours_cpu is wrong") as caught:
        bench.in_a_process(raise_wrong, "ours_cpu")
    assert caught.value.errors == {"grey_levels": 3.0}


def test_a_process_ends_with_its_time(capsys):
    start = time.monotonic()
    bench.main(replace(TINY, seconds=60.0, limit=8.0))
    assert time.monotonic() - start < 40
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["failed"] == "time limit"
    assert not multiprocessing.active_children()


def test_without_dali_nothing_is_known_of_decoding_on_a_gpu(shards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "importable", lambda name: False)
    assert bench.decoding_alone("dali", shards, TINY) is None
    monkeypatch.undo()
    outcome = bench.published("ours_cpu", shards, TINY, None)
    assert "floor_ms" not in outcome and outcome["images_per_second"] > 0


def test_decoding_alone_decodes_every_picture(shards, monkeypatch):
    decoded = []
    monkeypatch.setattr(bench, "decode_image", lambda payload: decoded.append(payload))
    rate = bench.decoding_alone("cpu", shards, replace(TINY, seconds=0.01))
    assert rate > 0 and set(decoded) == {*list(shards.pictures.values())[: bench.DALI_BATCH]}


def test_memory_is_marked_ten_times(shards):
    marks = bench.memory_of_a_long_run("ours_cpu", shards, replace(TINY, memory_samples=400))
    assert [mark["samples"] for mark in marks] == [48, 80, 128, 160, 208, 240, 288, 320, 368, 400]
    assert all(mark["resident_bytes"] > 2**20 for mark in marks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loaders": ("cpuu",)}, "no loader is named cpuu; choose from ours_cpu, ours_dali"),
        ({"tower": "eva02_huge"}, "no tower is named eva02_huge; choose from eva02_base"),
        ({"sizes": (300,)}, "no pictures of size 300; choose from 256, 512"),
        ({"seconds": 0.0}, "must be positive"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        bench.main(replace(TINY, **changes))
