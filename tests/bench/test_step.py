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

from textlock.bench import ceilings
from textlock.bench import step as bench
from textlock.bench.measure import Unavailable
from textlock.models.vision import VISION_CONFIGS

CPU = torch.device("cpu")
EAGER = tuple(name for name in bench.CANDIDATES if "compiled" not in name)
TINY = bench.Options(
    tower="eva02_micro_patch8_32", local_batches=(4, 8), texts=8, micro_batch=2, only=EAGER, seconds=0.001
)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Measure on the CPU whatever the machine: figures of bfloat16 and names of operators are others on a GPU."""
    monkeypatch.setattr(bench, "device_of_this_machine", lambda: CPU)
    monkeypatch.setitem(ceilings.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**12)


@pytest.fixture
def group():
    with bench.group_of_one(CPU):
        yield


def lines_of(options, capsys):
    bench.main(options)
    printed = capsys.readouterr()
    return {
        (line["case"]["local_batch"], line["candidate"]): line for line in map(json.loads, printed.out.splitlines())
    }


@pytest.fixture
def ceilings_file(tmp_path, capsys):
    ceilings.main(ceilings.Options(seconds=0.001))
    path = tmp_path / "ceilings.jsonl"
    path.write_text(capsys.readouterr().out)
    return path


def test_every_loop_is_checked_and_measured(ceilings_file, capsys):
    lines = lines_of(replace(TINY, ceilings=ceilings_file), capsys)
    config = VISION_CONFIGS[TINY.tower]
    rate = ceilings.read_ceilings(ceilings_file, CPU).matrix_rate[torch.float32]
    assert lines.keys() == {(b, name) for b in (4, 8) for name in EAGER}
    for (local_batch, name), line in lines.items():
        assert line["part"] == "step"
        assert line["case"]["texts"] == 8 and line["case"]["ranks"] == 8 // local_batch
        assert line["case"]["pictures"] is None
        assert line["runs"] >= 3 and line["peak_bytes"] > 0
        operations = local_batch * (config.training_flops() + 4 * 8 * config.width)
        assert line["floor_ms"] == pytest.approx(1e3 * operations / rate)
        assert line["percent_of_floor"] == pytest.approx(100 * line["floor_ms"] / line["ms"])
        assert line["images_per_second"] == pytest.approx(1e3 * local_batch / line["ms"])
        assert line["shares"].keys() == set(bench.PARTS) and sum(line["shares"].values()) == pytest.approx(1)
        assert all(line["shares"][part] > 0 for part in ("tower", "loss", "reduction", "optimizer", "data_wait"))
        assert line["errors"].keys() == {"weight_grads_of_1", "weight_grads_of_2"}
        assert 0 < max(line["errors"].values()) < 1e-4
        assert ("predicted_activation_bytes" in line) == (name == "ours")
        assert line["device"] and line["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("keep", [4, 0.0005], ids=["plenty of memory", "little memory"])
def test_one_rank_of_many_computes_its_share_of_the_global_batch(group, keep):
    """Against a dense float64 loss over the images of all ranks, those of the others constant."""
    setting = bench.setting_of(replace(TINY, texts=24, local_batches=(8,), memory_gib=keep), CPU)
    case = setting.case(8, 24)
    images = bench.draw_images(setting, 8)
    source = bench.batch_of(images, case.text[:8])
    batch = replace(source, images=images, text_embeddings=case.text[:8])
    prepared = bench.CANDIDATES["ours"].prepare(setting, case)
    assert (set(prepared.plan.tiers) == {"all"}) == (keep == 4)
    found = prepared.weight_gradients(batch)

    tower, exact = setting.build("plain").double(), case.double()
    rows = F.normalize(tower(images), dim=-1)
    logits = exact.scale * torch.cat([rows, exact.images[8:]]) @ exact.text.T
    labels = torch.arange(24)
    ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
    truth = {name: weight.grad for name, weight in tower.named_parameters()}
    assert bench.relative_error(bench.flat(found), bench.flat(truth)) < 1e-5


def spoil_loss(monkeypatch):
    right = bench.Objective.of_batch
    monkeypatch.setattr(bench.Objective, "of_batch", lambda *a, **k: right(*a, **k) * 1.1)


def spoil_gradient(monkeypatch):
    right = bench.image_rows
    monkeypatch.setattr(bench, "image_rows", lambda *a, **k: right(*a, **k) * torch.nan)


def forget_other_ranks(monkeypatch):
    monkeypatch.setattr(bench.losses, "other_ranks", lambda case, mode: torch.zeros(case.B + 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (spoil_loss, {"ours", "gradcache_fused", "gradcache_eager"}),
        (spoil_gradient, set(EAGER) - {"ours"}),
        (forget_other_ranks, {"ours", "gradcache_fused", "gradcache_eager"}),
    ],
)
def test_a_wrong_loop_has_no_figures(spoil, wrong, group, monkeypatch):
    spoil(monkeypatch)
    setting = bench.setting_of(TINY, CPU)
    for name in EAGER:
        outcome = bench.outcome_of(lambda name=name: bench.check(name, setting), CPU, 60)
        assert ("wrong" in outcome) == (name in wrong), name


def test_ours_wrong_is_a_fault_and_prints_no_figure(capsys, monkeypatch):
    spoil_loss(monkeypatch)
    with pytest.raises(SystemExit) as exit:
        bench.main(replace(TINY, only=("ours",), local_batches=(8,)))
    printed = capsys.readouterr()
    assert exit.value.code == 1
    (line,) = map(json.loads, printed.out.splitlines())
    assert "wrong" in line and "ms" not in line
    assert "fault: step, 8 images, ours" in printed.err


def test_a_peer_that_runs_out_of_memory_or_time_leaves_the_others_their_figures(capsys, monkeypatch):
    def fails(rank, batch):
        if rank.case.b != bench.COMPARED_IMAGES:
            raise torch.OutOfMemoryError("no")
        bench_checkpoints(rank, batch)

    bench_checkpoints = bench.checkpoints
    monkeypatch.setattr(bench, "checkpoints", fails)
    lines = lines_of(replace(TINY, only=("ours", "checkpoints_eager"), local_batches=(4,)), capsys)
    assert lines[4, "checkpoints_eager"]["failed"] == "out of memory"
    assert lines[4, "ours"]["ms"] > 0


def test_ours_is_measured_before_its_peers_are_checked(monkeypatch, capsys):
    called = []
    check, measure = bench.check, bench.measure
    monkeypatch.setattr(bench, "check", lambda name, *a: called.append(("check", name)) or check(name, *a))
    monkeypatch.setattr(bench, "measure", lambda name, *a: called.append(("measure", name)) or measure(name, *a))
    bench.main(replace(TINY, only=("gradcache_eager", "ours")))
    assert called == [(what, name) for name in ("ours", "gradcache_eager") for what in ("check", "measure", "measure")]


def test_after_the_limit_nothing_more_is_started(monkeypatch, tmp_path, capsys):
    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    measure, options = bench.measure, replace(TINY, only=("ours", "gradcache_eager"), limit=1000.0)

    def measure_until_the_limit(*arguments):
        found = measure(*arguments)
        now[0] = 1000.0
        return found

    monkeypatch.setattr(bench, "measure", measure_until_the_limit)
    bench.main(replace(options, pictures=(40,), profile=tmp_path / "trace.json.gz"))
    first, *others = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["case"]["local_batch"], first["candidate"]) == (4, "ours") and first["ms"] > 0
    assert {line["failed"] for line in others} == {"time limit"}
    places = [(line["part"], line["candidate"], line["case"]["pictures"]) for line in others]
    ours, theirs = ("step", "ours"), ("step", "gradcache_eager")
    assert places == [(*ours, None), (*ours, 40), ("profile", "ours", None), (*theirs, None), (*theirs, None)]
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_and_left_out(capsys, monkeypatch):
    def missing():
        raise Unavailable("open_clip is not installed")

    monkeypatch.setattr(bench.losses, "open_clip_losses", missing)
    bench.main(replace(TINY, only=("ours", "open_clip_eager", "open_clip_fused"), local_batches=(4,)))
    printed = capsys.readouterr()
    lines = list(map(json.loads, printed.out.splitlines()))
    assert [line["candidate"] for line in lines if "ms" in line] == ["ours"]
    assert {line["absent"] for line in lines if "absent" in line} == {"open_clip is not installed"}
    assert "left out open_clip_eager, open_clip_fused: open_clip is not installed" in printed.err


def test_images_come_from_shards_when_they_are_given(group, monkeypatch):
    class Decoder:
        closed = False

        def __iter__(self):
            while True:
                yield bench.batch_of(torch.full((4, 32, 32, 3), 7, dtype=torch.uint8), torch.zeros(4, 64))

        def close(self):
            self.closed = True

    opened, decoder = [], Decoder()
    monkeypatch.setattr(bench, "open_loader", lambda config, **place: opened.append(config) or decoder)
    setting = bench.setting_of(TINY, CPU)
    case = setting.case(4, 8)
    with bench.batches(setting, case, "data/train", 3) as feed:
        batch = next(feed)
    (config,) = opened
    assert (config.shards, config.batch_size, config.image_size, config.workers) == ("data/train", 4, 32, 3)
    assert (batch.images == 7).all() and torch.allclose(batch.text, case.text[:4])
    assert decoder.closed


def test_a_large_batch_repeats_images_but_no_text(group, monkeypatch):
    monkeypatch.setattr(bench, "DISTINCT_IMAGES", 3)
    setting = bench.setting_of(TINY, CPU)
    case = setting.case(8, 8)
    with bench.batches(setting, case, None, 1) as feed:
        batch = next(feed)
        gone = weakref.ref(next(feed).images)
    distinct = bench.draw_images(setting, 3)
    assert torch.equal(batch.images, torch.cat([distinct, distinct, distinct[:2]]))
    assert len(distinct.unique(dim=0)) == 3
    assert len(batch.text.unique(dim=0)) == 8 and torch.allclose(batch.text, case.text)
    assert gone() is None  # 10 GB at 65,536 images, if anything but the step held them


def test_ours_is_measured_from_drawn_jpegs_of_every_size(capsys, monkeypatch):
    opened, open_loader = [], bench.open_loader
    monkeypatch.setattr(bench, "open_loader", lambda *a, **k: opened.append(open_loader(*a, **k)) or opened[-1])
    bench.main(replace(TINY, only=("ours", "gradcache_eager"), pictures=(40, 64), workers=1))
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    places = [(line["candidate"], line["case"]["local_batch"], line["case"]["pictures"]) for line in lines]
    assert places == [
        *(("ours", 4, None), ("ours", 8, None), ("ours", 4, 40), ("ours", 4, 64)),
        *(("gradcache_eager", 4, None), ("gradcache_eager", 8, None)),
    ]
    assert [loader.samples_per_epoch for loader in opened] == [4, 4]
    *_, small, large = lines[:4]
    assert 0 < small["case"]["kilobytes_a_picture"] < large["case"]["kilobytes_a_picture"]
    assert small["shares"]["data_wait"] > 0 and small["images_per_second"] == pytest.approx(4e3 / small["ms"])


def test_drawn_jpegs_have_the_short_side_and_fill_a_batch(tmp_path):
    told = bench.write_pictures(str(tmp_path), 48, 7)
    config = bench.DataConfig(shards=str(tmp_path), batch_size=7, image_size=32, workers=1)
    with bench.open_loader(config, rank=0, world_size=1) as opened:
        assert opened.samples_per_epoch == 7
        assert next(opened).images.shape == (7, 32, 32, 3)
    (shard,) = tmp_path.glob("*.tar")
    with tarfile.open(shard) as tar:
        jpegs = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    assert {Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs} == {(60, 48)}
    assert told == {"kilobytes_a_picture": round(sum(map(len, jpegs)) / 7e3, 1)}


def test_the_step_of_ours_is_profiled(tmp_path, capsys):
    path = tmp_path / "trace.json.gz"
    bench.main(replace(TINY, only=("ours",), profile=path))
    printed = capsys.readouterr()
    lines = list(map(json.loads, printed.out.splitlines()))
    found = {line["operation"]: line for line in lines if line["part"] == "profile"}
    assert len(found) == 12 and list(found)[-2:] == ["everything else", "idle"]
    step = next(line["case"] for line in lines if line["part"] == "step")
    for line in found.values():
        assert line["case"] == step and line["candidate"] == "ours"
        assert line["ms"] >= 0 and 0 <= line["share"] <= 1
        assert ("launches" in line) == (line["operation"] != "idle")
    # One thread, so that nothing overlaps, and what an operator takes is counted once.
    assert sum(line["share"] for line in found.values()) == pytest.approx(1, abs=1e-3)
    assert all(found[name]["floor_ms"] > 0 for name in found if name in ("aten::mm", "aten::addmm"))
    assert "idle" in printed.err
    assert any(event["name"] == "aten::mm" for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


def test_gradcache_and_open_clip_run_every_image_twice_and_ours_once(group, monkeypatch):
    setting = bench.setting_of(TINY, CPU)
    case, batch = bench.compared(setting, 1)
    images = {}
    for name in EAGER:
        prepared = bench.CANDIDATES[name].prepare(setting, case)
        seen = []
        prepared.rank.tower.register_forward_hook(lambda tower, inputs, out, seen=seen: seen.append(len(inputs[0])))
        prepared.add_gradients(prepared.rank, batch)
        images[name] = sum(seen)
    twice = {name for name in EAGER if name.startswith(("gradcache", "open_clip"))}
    assert images == {name: (2 if name in twice else 1) * bench.COMPARED_IMAGES for name in EAGER}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(TINY, only=("theirs",)), "no candidate is named theirs; choose from ours"),
        (replace(TINY, local_batches=(3,)), "8 texts are no multiple of the local batch 3"),
        (replace(TINY, micro_batch=3), "the micro-batch 3 does not divide the local batch 4"),
        (replace(TINY, tower="vit_huge"), "vision tower 'vit_huge' is unknown"),
        (replace(TINY, seconds=0), "must be positive"),
        (replace(TINY, pictures=(0,)), "must be positive"),
        (replace(TINY, only=("open_clip_eager",), pictures=(256,)), "--pictures and --profile are of ours"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        bench.main(options)
