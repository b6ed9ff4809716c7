"""The benchmark of whole steps at a size of no interest: it runs, checks itself, and stands for one rank of many."""

import gzip
import io
import json
import tarfile
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from textlock.bench import loops
from textlock.bench import step as bench
from textlock.bench.ceilings import Ceilings
from textlock.bench.entry import CPU, Session
from textlock.models.vision import VISION_CONFIGS

EAGER = tuple(name for name in bench.CANDIDATES if "compiled" not in name)
TINY = bench.StepOptions(
    device="cpu",
    tower="eva02_micro_patch8_32",
    local_batches=(4, 8),
    texts=8,
    micro_batch=2,
    candidates=EAGER,
    seconds=0.001,
)


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(bench, "ceilings_for", lambda *_: Ceilings(1e9, {torch.float32: 1e9}, None))


@pytest.fixture
def setting():
    with bench.group_of_one(CPU):
        yield bench.setting_of(TINY)


def test_every_loop_is_checked_and_measured(measure):
    lines, _ = measure(bench.BENCHMARK, TINY)
    config = VISION_CONFIGS[TINY.tower]
    found = [(line["candidate"], line["case"]["local_batch"]) for line in lines]
    assert found == [(name, b) for name in EAGER for b in (4, 8)], "ours before any other"
    for line in lines:
        local_batch = line["case"]["local_batch"]
        assert line["case"]["texts"] == 8 and line["case"]["ranks"] == 8 // local_batch and line["runs"] >= 3
        assert line["floor_ms"] == pytest.approx(local_batch * (config.training_flops() + 4 * 8 * config.width) / 1e6)
        assert line["percent_of_floor"] == pytest.approx(100 * line["floor_ms"] / line["ms"])
        assert line["images_per_second"] == pytest.approx(1e3 * local_batch / line["ms"]) and line["peak_bytes"] > 0
        assert line["shares"].keys() == set(bench.PHASES) and sum(line["shares"].values()) == pytest.approx(1)
        assert all(line["shares"][phase] > 0 for phase in ("tower", "loss", "reduction", "optimizer", "data_wait"))
        assert line["errors"].keys() == {"weight_grads_of_1", "weight_grads_of_2"}
        assert 0 < max(line["errors"].values()) < 1e-4
        assert ("predicted_activation_bytes" in line) == (line["candidate"] == "ours")


@pytest.mark.parametrize("keep", [4, 0.0005], ids=["plenty of memory", "little memory"])
def test_one_rank_of_many_computes_its_share_of_the_global_batch(setting, keep):
    """Against a dense float64 loss over the images of all ranks, those of the others constant."""
    setting = replace(setting, texts=24, memory_gib=keep)
    case, images = setting.case(8, 24), bench.draw_images(setting, 8)
    source = bench.batch_of(images, case.text[:8])
    prepared = bench.CANDIDATES["ours"].prepare(setting, case)
    assert (set(prepared.plan.tiers) == {"all"}) == (keep == 4)
    found = prepared.weight_gradients(replace(source, images=images, text_embeddings=case.text[:8]))

    tower, exact = setting.build("plain").double(), case.double()
    logits = exact.scale * torch.cat([F.normalize(tower(images), dim=-1), exact.images[8:]]) @ exact.text.T
    labels = torch.arange(24)
    ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
    truth = {name: weight.grad for name, weight in tower.named_parameters()}
    assert bench.relative_error(bench.flat(found), bench.flat(truth)) < 1e-5


def spoil(target, name, wrong):
    return lambda patch: patch.setattr(target, name, wrong(getattr(target, name)))


NOT_OTHERS = {"ours", "gradcache_fused", "gradcache_eager"}


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (spoil(loops.Objective, "of_batch", lambda right: lambda *a, **k: right(*a, **k) * 1.1), NOT_OTHERS),
        (spoil(loops, "image_rows", lambda right: lambda *a: right(*a) * torch.nan), set(EAGER) - {"ours"}),
        (spoil(loops.losses, "other_ranks", lambda right: lambda *a: 0 * right(*a)), NOT_OTHERS),
    ],
    ids=["loss 10 % off", "embeddings nan", "other ranks forgotten"],
)
def test_a_wrong_loop_has_no_figures(spoil, wrong, setting, monkeypatch):
    spoil(monkeypatch)
    session = Session(CPU, float("inf"))
    monkeypatch.setattr(Session, "seconds_left", lambda self: 60.0)
    found = {name: session.outcome_of(lambda name=name: bench.errors_of(name, setting)) for name in EAGER}
    assert {name for name, outcome in found.items() if "wrong" in outcome} == wrong


def test_jpegs_and_a_profile_are_of_ours_and_come_before_its_peers(measure, monkeypatch, tmp_path):
    opened, open_loader = [], loops.open_loader
    monkeypatch.setattr(loops, "open_loader", lambda *a, **k: opened.append(open_loader(*a, **k)) or opened[-1])
    path = tmp_path / "trace.json.gz"
    options = replace(TINY, candidates=("gradcache_eager", "ours"), jpegs=(40, 64), workers=1, profile=path)
    lines, printed = measure(bench.BENCHMARK, options)
    kernels = {line["operation"]: line for line in lines if line["part"] == "profile"}
    places = [(line["candidate"], line["case"]["local_batch"], line["case"]["jpeg_short_side"]) for line in lines]
    ours = [("ours", 4, None), ("ours", 8, None), ("ours", 4, 40), ("ours", 4, 64)]
    assert places[:4] == ours and places[4 + len(kernels) :] == [("gradcache_eager", b, None) for b in (4, 8)]
    assert [loader.samples_per_epoch for loader in opened] == [4, 4]
    small, large = lines[2:4]
    assert 0 < small["case"]["kilobytes_per_jpeg"] < large["case"]["kilobytes_per_jpeg"]
    assert small["shares"]["data_wait"] > 0 and small["images_per_second"] == pytest.approx(4e3 / small["ms"])

    assert len(kernels) == 12 and list(kernels)[-2:] == ["everything else", "idle"]
    assert all(line["case"] == lines[0]["case"] and line["ms"] >= 0 for line in kernels.values())
    # One thread, so that nothing overlaps, and what an operator takes is counted once.
    assert sum(line["share"] for line in kernels.values()) == pytest.approx(1, abs=1e-3)
    assert all(kernels[name]["floor_ms"] > 0 for name in kernels if name in ("aten::mm", "aten::addmm"))
    assert "| idle " in printed
    assert any(event["name"] == "aten::mm" for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


def test_after_the_limit_nothing_more_is_started(measure, monkeypatch, tmp_path):
    left, figures_of = [1000.0], bench.figures_of
    monkeypatch.setattr(Session, "seconds_left", lambda self: left[0])
    monkeypatch.setattr(bench, "figures_of", lambda *a: [figures_of(*a), left.__setitem__(0, 0.0)][0])
    options = replace(TINY, candidates=("ours", "gradcache_eager"), jpegs=(40,), profile=tmp_path / "trace.json.gz")
    (first, *others), _ = measure(bench.BENCHMARK, options)
    assert (first["case"]["local_batch"], first["candidate"]) == (4, "ours") and first["ms"] > 0
    assert {line["failed"] for line in others} == {"time limit"} and not list(tmp_path.iterdir())
    places = [(line["part"], line["candidate"], line["case"]["jpeg_short_side"]) for line in others]
    ours, theirs = ("step", "ours"), ("step", "gradcache_eager")
    assert places == [(*ours, None), (*ours, 40), ("profile", "ours", None), (*theirs, None), (*theirs, None)]


def test_images_come_from_shards_when_they_are_given(setting, monkeypatch):
    class Decoder:
        closed = False

        def __iter__(self):
            while True:
                yield bench.batch_of(torch.full((4, 32, 32, 3), 7, dtype=torch.uint8), torch.zeros(4, 64))

        def close(self):
            self.closed = True

    opened, decoder = [], Decoder()
    monkeypatch.setattr(loops, "open_loader", lambda config, **place: opened.append(config) or decoder)
    case = setting.case(4, 8)
    with bench.batches(setting, case, "data/train", 3) as feed:
        batch = next(feed)
    (config,) = opened
    assert (config.shards, config.batch_size, config.image_size, config.workers) == (("data/train",), 4, 32, 3)
    assert (batch.images == 7).all() and torch.allclose(batch.text, case.text[:4]) and decoder.closed


def test_a_large_batch_repeats_images_but_no_text(setting, monkeypatch):
    monkeypatch.setattr(loops, "DISTINCT_IMAGES", 3)
    case = setting.case(8, 8)
    with bench.batches(setting, case, None, 1) as feed:
        batch = next(feed)
        gone = weakref.ref(next(feed).images)
    distinct = bench.draw_images(setting, 3)
    assert torch.equal(batch.images, torch.cat([distinct, distinct, distinct[:2]]))
    assert len(distinct.unique(dim=0)) == 3
    assert len(batch.text.unique(dim=0)) == 8 and torch.allclose(batch.text, case.text)
    assert gone() is None  # 10 GB at 65,536 images, if anything but the step held them


def test_drawn_jpegs_have_the_short_side_and_fill_a_batch(tmp_path):
    told = bench.draw_jpegs(str(tmp_path), 48, 7)
    (shard,) = tmp_path.glob("*.tar")
    with tarfile.open(shard) as tar:
        jpegs = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    assert len(jpegs) == 7 and {Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs} == {(60, 48)}
    assert told == {"kilobytes_per_jpeg": round(sum(map(len, jpegs)) / 7e3, 1)}


def test_gradcache_and_open_clip_run_every_image_twice_and_ours_once(setting):
    case, batch = bench.small_batch(setting, 1)
    images = {}
    for name in EAGER:
        prepared = bench.CANDIDATES[name].prepare(setting, case)
        seen = []
        prepared.rank.tower.register_forward_hook(lambda tower, inputs, out, seen=seen: seen.append(len(inputs[0])))
        prepared.add_gradients(prepared.rank, batch)
        images[name] = sum(seen)
    twice = {name for name in EAGER if name.startswith(("gradcache", "open_clip"))}
    assert images == {name: (2 if name in twice else 1) * bench.COMPARED_IMAGES for name in EAGER}
