import io
import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from textlock.data.captions import caption_id
from textlock.data.evaluation import iterate_class_folder, iterate_shards, list_classes
from textlock.data.images import crop_and_resize, crop_draws, crop_window, decode_image, eval_image
from textlock.data.index import INDEX_NAME
from textlock.data.loader import (
    SKIP_KINDS,
    DataConfig,
    _slots_of_a_pinned_piece,
    open_loader,
    require_few_skipped,
)

from .tars import jpeg, write_shards
from .zoo import DAMAGED, EMPTY_CAPTIONS, GARBAGE_FOR_DALI, GOOD, ODD_CAPTIONS, REFUSED


def damaged_png():
    """Return what passes the check and fails in every decoder (DALI decodes a damaged JPEG scan to garbage)."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(0))).save(buffer, "PNG")
    payload = bytearray(buffer.getvalue())
    payload[len(payload) // 2 : len(payload) // 2 + 40] = b"\x55" * 40
    return bytes(payload)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [11, 5, 9, 12])  # 37 samples


def settings(shards, **changes):
    base = DataConfig(shards=str(shards), batch_size=8, image_size=16, decoder="cpu", workers=2, open_shards=2)
    return replace(base, **changes)


def take(config, count, *, rank=0, world_size=1, **options):
    with open_loader(config, rank=rank, world_size=world_size, **options) as loader:
        return list(islice(loader, count))


def content(batches):
    return [(b.epoch, b.position, b.keys, b.captions, b.ids.tolist(), b.images.numpy().tobytes()) for b in batches]


def keys(batches):
    return [key for batch in batches for key in batch.keys]


def test_a_batch(shards):
    (batch,) = take(settings(shards), 1)
    assert batch.images.shape == (8, 16, 16, 3) and batch.images.dtype == torch.uint8
    assert batch.captions == [f"caption {int(key)}" for key in batch.keys]
    assert batch.ids.dtype == torch.int64
    assert batch.ids.tolist() == [caption_id(caption) for caption in batch.captions]
    assert (batch.text_embeddings, batch.epoch, batch.position, batch.skipped) == (None, 0, 8, 0)
    for image, key in zip(batch.images, batch.keys, strict=True):
        whole = eval_image(jpeg(int(key), 36 + int(key) % 9), 16).int()
        other = eval_image(jpeg(int(key) + 1, 36 + int(key) % 9), 16).int()
        assert (image - whole).abs().float().mean() < (image - other).abs().float().mean(), (
            "image and key belong together"
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_of_a_cpu(shards):
    expected, found = take(settings(shards), 5), []
    with open_loader(settings(shards), rank=0, world_size=1, device="cuda") as loader:
        for batch in islice(loader, 5):
            assert batch.images.device.type == batch.ids.device.type == "cuda"
            found.append(replace(batch, images=batch.images.cpu(), ids=batch.ids.cpu()))
    assert content(found) == content(expected)


def test_every_sample_once_an_epoch(shards):
    with open_loader(settings(shards), rank=0, world_size=1) as loader:
        assert (loader.num_samples, loader.samples_per_epoch) == (37, 32)
        epochs = [list(islice(loader, 4)) for _ in range(3)]
    left_out = []
    for number, batches in enumerate(epochs):
        assert [(batch.epoch, batch.position) for batch in batches] == [
            (number, 32 * number + 8 * step) for step in (1, 2, 3, 4)
        ]
        assert len(set(keys(batches))) == 32
        left_out.append({f"{n:09d}" for n in range(37)} - set(keys(batches)))
    assert left_out[0] != left_out[1] or left_out[1] != left_out[2]
    assert keys(epochs[0]) != keys(epochs[1])


def test_the_crop_is_the_one_drawn_for_seed_epoch_and_place(shards):
    config = settings(shards, seed=7)
    for step, batch in enumerate(take(config, 8)):
        epoch, place = divmod(8 * step, 32)
        draws = crop_draws(7, epoch, np.arange(place, place + 8))
        for image, key, row in zip(batch.images, batch.keys, draws, strict=True):
            whole = decode_image(jpeg(int(key), 36 + int(key) % 9))
            window = crop_window(*whole.shape[:2], row, scale=config.crop_scale, ratio=config.crop_ratio)
            expected = torch.empty(16, 16, 3, dtype=torch.uint8)
            crop_and_resize(whole, window, expected)
            assert torch.equal(image, expected)


def test_crops_change_with_the_epoch_and_fill_the_batch(shards):
    batches = take(settings(shards), 8)
    first = dict(zip(keys(batches[:4]), torch.cat([b.images for b in batches[:4]]), strict=True))
    second = dict(zip(keys(batches[4:]), torch.cat([b.images for b in batches[4:]]), strict=True))
    both = first.keys() & second.keys()
    assert sum(torch.equal(first[key], second[key]) for key in both) < len(both) // 2
    assert all(image.float().std() > 1 for image in first.values())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_make_the_parts_of_the_same_global_batches(shards, world_size):
    whole = take(settings(shards), 6)
    parts = [take(settings(shards), 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        of_ranks = [part[step] for part in parts]
        assert keys(of_ranks) == batch.keys
        assert torch.equal(torch.cat([part.images for part in of_ranks]), batch.images)
        assert torch.equal(torch.cat([part.ids for part in of_ranks]), batch.ids)
        assert {part.position for part in of_ranks} == {batch.position}


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (1, 3), (5, 1)])
def test_threads_do_not_change_the_batches(shards, workers, prefetch):
    changed = settings(shards, workers=workers, prefetch_batches=prefetch)
    assert content(take(changed, 5)) == content(take(settings(shards), 5))


@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 8], ids=lambda done: f"after {done}")
def test_resume_gives_the_same_bytes(shards, done):
    whole = content(take(settings(shards), 10))
    with open_loader(settings(shards), rank=0, world_size=1) as loader:
        for _ in range(done):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
    assert state["position"] == done * 8, "batches that were only prefetched do not count"
    assert content(take(settings(shards), 10 - done, state=state)) == whole[done:]
    halves = [take(settings(shards), 10 - done, rank=rank, world_size=2, state=state) for rank in (0, 1)]
    images = [torch.cat([one.images, other.images]) for one, other in zip(*halves, strict=True)]
    assert [image.numpy().tobytes() for image in images] == [batch[-1] for batch in whole[done:]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"batch_size": 4}, "batch_size was 8 and is 4"),
        ({"image_size": 32}, "image_size was 16 and is 32"),
        ({"crop_scale": (0.5, 1.0)}, "crop_scale was"),
        ({"crop_ratio": (1.0, 1.0)}, "crop_ratio was"),
        ({"open_shards": 1}, "open_shards was 2 and is 1"),
    ],
)
def test_resume_refuses_other_settings(shards, change, named):
    with open_loader(settings(shards), rank=0, world_size=1) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match=named):
        open_loader(settings(shards, **change), rank=0, world_size=1, state=state)


def test_resume_refuses_other_shards_and_broken_states(shards, tmp_path):
    with open_loader(settings(shards), rank=0, world_size=1) as loader:
        state = loader.state()
    other = write_shards(tmp_path / "other", [11, 5, 9, 13])
    with pytest.raises(ValueError, match=r"shards was .* and is"):
        open_loader(settings(other), rank=0, world_size=1, state=state)
    for broken in ({}, {"position": "8", "fingerprint": {}}, {"position": -8, "fingerprint": state["fingerprint"]}):
        with pytest.raises(ValueError, match="no position and fingerprint"):
            open_loader(settings(shards), rank=0, world_size=1, state=broken)
    with pytest.raises(ValueError, match="position 3 is not a multiple"):
        open_loader(settings(shards), rank=0, world_size=1, state={**state, "position": 3})


BAD = {
    3: (b"<html>", b"x"),
    10: (jpeg(10)[:-2], b"x"),
    17: (jpeg(17), b" \n"),
    20: (damaged_png(), b"x"),
    30: (b"", b"x"),
}


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_bad_samples_are_replaced_counted_and_logged(tmp_path, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    config = settings(write_shards(tmp_path / "shards", [20, 20], BAD), max_skipped_fraction=1.0, decoder=decoder)
    log = tmp_path / "skipped.jsonl"
    with open_loader(config, rank=0, world_size=1, skipped_log=log) as loader:
        batches = list(islice(loader, 5))  # 40 samples: the whole epoch
        by_kind = dict(loader.skipped_by_kind)
    assert all(batch.images.shape[0] == len(batch.keys) == 8 for batch in batches)
    assert not {f"{number:09d}" for number in BAD} & set(keys(batches))
    assert {f"{number:09d}" for number in range(40) if number not in BAD} == set(keys(batches))
    assert all(len(set(batch.keys)) == 8 for batch in batches), "a replacement comes from another batch"
    assert batches[0].images.float().std(dim=(1, 2, 3)).min() > 1
    assert sum(batch.skipped for batch in batches) == 5
    assert by_kind == {"format": 1, "truncated": 1, "no-caption": 1, "damaged": 1, "empty": 1}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["sample"], line["kind"], line["shard"]) for line in lines} == {
        (3, "format", "00000.tar"),
        (10, "truncated", "00000.tar"),
        (17, "no-caption", "00000.tar"),
        (20, "damaged", "00001.tar"),
        (30, "empty", "00001.tar"),
    }
    flat = keys(batches)
    assert all(flat[line["position"]] == line["replaced_by"] for line in lines)


def test_what_is_no_jpeg_has_the_same_pixels_from_both_decoders(tmp_path):
    """DALI crashes on some PNG and WebP headers, so it is given none."""
    pytest.importorskip("nvidia.dali")
    names = [name for name in GOOD if "png" in name or "webp" in name]
    folder = write_shards(tmp_path / "shards", [60], {2 * at: (GOOD[name], b"x") for at, name in enumerate(names)})
    config = settings(folder, batch_size=60)
    (ours,), (theirs,) = take(config, 1), take(replace(config, decoder="dali"), 1)
    assert ours.keys == theirs.keys and theirs.skipped == ours.skipped == 0
    same = {
        key for key, one, other in zip(ours.keys, ours.images, theirs.images, strict=True) if torch.equal(one, other)
    }
    assert same >= {f"{2 * at:09d}" for at in range(len(names))}
    assert (ours.images.int() - theirs.images.int()).abs().float().mean() < 1


def test_what_dali_cannot_read_is_asked_of_the_other_decoder(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from textlock.data.dali import DaliDecoder

    def picky(self, payloads, windows, images, rows):
        if any(payload == jpeg(4, 40) for payload in payloads):
            raise RuntimeError("one of them is not to its taste")
        decode(self, payloads, windows, images, rows)

    decode = DaliDecoder.decode
    monkeypatch.setattr(DaliDecoder, "decode", picky)
    config = settings(write_shards(tmp_path / "shards", [200]), batch_size=200)
    (ours,), (theirs,) = take(config, 1), take(replace(config, decoder="dali"), 1)
    assert ours.keys == theirs.keys and theirs.skipped == 0
    at = ours.keys.index("000000004")
    assert torch.equal(ours.images[at], theirs.images[at])
    monkeypatch.undo()
    (untroubled,) = take(replace(config, decoder="dali"), 1)
    others = [row for row in range(200) if row != at]
    assert torch.equal(theirs.images[others], untroubled.images[others])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Every kind of bad sample between good ones, and a second set where good ones are in the places of the bad."""
    bad = {f"image: {name}": (payload, b"x", kind) for name, (payload, kind) in REFUSED.items()}
    bad |= {f"damaged: {name}": (payload, b"x", "damaged") for name, payload in DAMAGED.items()}
    bad |= {f"caption: {name}": (jpeg(0), caption, "no-caption") for name, caption in EMPTY_CAPTIONS.items()}
    bad["caption: no member"] = (jpeg(0), None, "no-caption")
    bad["neither"] = (b"", None, "no-caption")
    odd = {f"image: {name}": (payload, b"x") for name, payload in GOOD.items()}
    odd |= {f"caption: {name}": (jpeg(1), caption) for name, caption in ODD_CAPTIONS.items()}
    assert len(bad) >= 40
    places = {2 * number + 1: name for number, name in enumerate([*bad, *odd])}
    count = 2 * len(places) + 40
    sizes = [count // 3, count // 3, count - 2 * (count // 3)]
    samples = {at: (bad | odd)[name][:2] for at, name in places.items()}
    kinds = {at: bad[name][2] for at, name in places.items() if name in bad}
    root = tmp_path_factory.mktemp("zoo")
    clean = {at: sample for at, sample in samples.items() if at not in kinds}
    names = {at: places[at] for at in kinds}
    return write_shards(root / "zoo", sizes, samples), write_shards(root / "clean", sizes, clean), kinds, names, count


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_the_zoo(zoo, decoder, tmp_path):
    """The run goes on, each bad sample is counted and named, and the pixels and captions beside it are as ever."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    folder, clean_folder, kinds, names, count = zoo
    if decoder == "dali":  # it takes these two for good
        kinds = {at: kind for at, kind in kinds.items() if names[at] not in map("damaged: {}".format, GARBAGE_FOR_DALI)}
    config = settings(folder, batch_size=count, max_skipped_fraction=1.0, decoder=decoder, prefetch_batches=0)
    (batch,) = take(config, 1, skipped_log=tmp_path / "skipped.jsonl")
    (clean,) = take(replace(config, shards=str(clean_folder)), 1)

    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {line["sample"]: (names[line["sample"]], line["kind"]) for line in lines} == {
        at: (names[at], kind) for at, kind in kinds.items()
    }
    size = count // 3
    for line in lines:
        assert line["shard"] == f"{min(line['sample'] // size, 2):05d}.tar"
        assert line["key"] == ("" if line["kind"] == "too-large" else f"{line['sample']:09d}")
        assert line["message"] and len(line["message"]) < 300
        assert batch.keys[line["position"]] == line["replaced_by"]
    assert batch.skipped_by_kind == {kind: list(kinds.values()).count(kind) for kind in set(kinds.values())}
    assert set(batch.skipped_by_kind) <= set(SKIP_KINDS)

    replaced = {line["position"] for line in lines}
    assert clean.skipped == 0
    for at in set(range(count)) - replaced:
        if int(batch.keys[at]) in names:
            continue  # garbage that DALI lets through
        assert (batch.keys[at], batch.captions[at]) == (clean.keys[at], clean.captions[at])
        assert torch.equal(batch.images[at], clean.images[at]), batch.keys[at]
    for caption in batch.captions:
        assert 0 < len(caption) <= 2048
        json.dumps(caption).encode()


def test_replacement_does_not_depend_on_ranks(tmp_path):
    config = settings(write_shards(tmp_path / "shards", [20, 20], BAD), max_skipped_fraction=1.0)
    whole = take(config, 6)
    parts = [take(config, 6, rank=rank, world_size=4) for rank in range(4)]
    assert [keys([part[step] for part in parts]) for step in range(6)] == [batch.keys for batch in whole]
    assert [sum(part[step].skipped for part in parts) for step in range(6)] == [batch.skipped for batch in whole]


def test_a_shard_that_vanishes_costs_its_samples_only(tmp_path):
    folder = write_shards(tmp_path / "shards", [30, 10])
    with open_loader(settings(folder, max_skipped_fraction=1.0), rank=0, world_size=1) as loader:
        (folder / "00001.tar").unlink()
        batches = list(islice(loader, 5))
        assert loader.skipped_by_kind == {"unreadable": 10}
    assert set(keys(batches)) == {f"{number:09d}" for number in range(30)}


def test_skip_budget_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("textlock.data.loader._MIN_SAMPLES_TO_JUDGE", 40)
    config = settings(write_shards(tmp_path / "shards", [20, 20], BAD), max_skipped_fraction=0.05)
    with open_loader(config, rank=0, world_size=1) as loader:
        for _ in range(4):
            next(loader)
        with pytest.raises(
            ValueError, match=r"5 of 40 samples are bad \(.*1 truncated.*more than --data.max-skipped-fraction 0.05"
        ):
            next(loader)
        with pytest.raises(ValueError, match="closed"):
            next(loader)
    assert len(take(replace(config, max_skipped_fraction=0.125), 5)) == 5


def test_skip_budget_of_several_ranks_is_the_callers(tmp_path, monkeypatch):
    """One rank that stopped alone would leave the others waiting: the sum over all of them is judged."""
    monkeypatch.setattr("textlock.data.loader._MIN_SAMPLES_TO_JUDGE", 40)
    config = settings(write_shards(tmp_path / "shards", [20, 20], BAD), max_skipped_fraction=0.05)
    parts = [take(config, 5, rank=rank, world_size=2) for rank in range(2)]
    counts = sum((Counter(batch.skipped_by_kind) for part in parts for batch in part), Counter())
    with pytest.raises(ValueError, match="5 of 40 samples are bad"):
        require_few_skipped(counts, 40, config)
    require_few_skipped(counts, 100, config)
    require_few_skipped(counts, 39, config)


def test_nothing_but_bad_samples(tmp_path):
    folder = write_shards(tmp_path / "shards", [9], dict.fromkeys(range(9), (b"<html>", b"x")))
    with (
        open_loader(settings(folder), rank=0, world_size=1) as loader,
        pytest.raises(ValueError, match=r"samples in a row are bad, the first because not a JPEG.*shards verify"),
    ):
        next(loader)


def decode_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "dali"))]


def test_errors_of_a_worker_reach_the_consumer_and_close_the_loader(shards, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no memory for the image")

    monkeypatch.setattr("textlock.data.loader.crop_and_resize", fail)
    loader = open_loader(settings(shards), rank=0, world_size=1)
    with pytest.raises(MemoryError, match="no memory"):
        next(loader)
    assert not decode_threads()


def test_prefetch_is_bounded(shards, monkeypatch):
    made = []
    monkeypatch.setattr("textlock.data.loader.crop_and_resize", lambda image, window, out: made.append(1))
    with open_loader(settings(shards, prefetch_batches=2), rank=0, world_size=1) as loader:
        next(loader)
        loader.close()
        assert 8 <= len(made) <= 24
    assert not decode_threads()


def test_threads_of_torch_are_left_alone(shards):
    before = torch.get_num_threads()
    take(settings(shards), 2)
    assert torch.get_num_threads() == before


def test_a_run_that_dies_does_not_hang(shards):
    program = f"""
from textlock.data.loader import DataConfig, open_loader
import textlock.data.loader as module, time
module.crop_and_resize = lambda image, window, out: time.sleep(0.5)
config = DataConfig(shards={str(shards)!r}, batch_size=4, image_size=16, decoder="cpu", workers=1, prefetch_batches=50)
loader = open_loader(config, rank=0, world_size=1)
next(loader)
raise SystemExit("the training loop failed")
"""
    # The queue holds 100 seconds of work.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the training loop failed" in done.stderr


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"batch_size": 38}, {}, "the shards hold 37 samples, fewer than one global batch of 38"),
        ({}, {"world_size": 3}, "--data.batch-size is 8, must be divisible by the number of processes, 3"),
        ({}, {"rank": 2, "world_size": 2}, "rank 2 is not one of 2 ranks"),
        ({"workers": 0}, {}, "--data.workers is 0, must be at least 1"),
        ({"open_shards": 0}, {}, "--data.open-shards is 0"),
        ({"crop_scale": (0.9, 1.1)}, {}, r"--data.crop-scale is \(0.9, 1.1\), must be at most 1"),
        ({"crop_ratio": (0.0, 1.0)}, {}, r"--data.crop-ratio is \(0.0, 1.0\), must be above 0"),
    ],
)
def test_impossible_settings(shards, changes, options, message):
    with pytest.raises(ValueError, match=message):
        open_loader(settings(shards, **changes), **{"rank": 0, "world_size": 1, **options})


def test_stale_and_missing_index(tmp_path):
    folder = write_shards(tmp_path / "shards", [9])
    with open(folder / "00000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match="has changed since it was indexed: run python -m textlock"):
        open_loader(settings(folder), rank=0, world_size=1)
    (folder / INDEX_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"run python -m textlock\.data\.shards index"):
        open_loader(settings(folder), rank=0, world_size=1)


def test_dali_that_is_not_installed(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "textlock.data.dali", None)
    with pytest.raises(ValueError, match=r'decoder dali needs DALI.*"textlock\[gpu\]", or take --data.decoder cpu'):
        open_loader(settings(shards, decoder="dali"), rank=0, world_size=1)


def test_auto_takes_the_cpu_decoder_without_a_gpu(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "textlock.data.dali", None)
    assert content(take(settings(shards, decoder="auto"), 2)) == content(take(settings(shards), 2))


def test_dali_gives_the_batches_of_the_cpu_decoder(tmp_path):
    pytest.importorskip("nvidia.dali")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    special = {}
    kinds = [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"exif": rotated}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("RGB", "WEBP", {}),
    ]
    for number, (mode, format, options) in enumerate(kinds):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(jpeg(number, 90, 60))).convert(mode).save(buffer, format, **options)
        special[number] = (buffer.getvalue(), b"special")
    config = settings(write_shards(tmp_path / "shards", [160, 40], special), batch_size=200, image_size=32)
    ours = take(config, 2)
    theirs = take(replace(config, decoder="dali"), 2)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.keys, one.captions, one.position) == (other.keys, other.captions, other.position)
        assert other.images.dtype == torch.uint8
        difference = (one.images.int() - other.images.int()).abs().float().mean(dim=(1, 2, 3))
        assert difference.max() <= 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_iterate_shards_gives_every_sample_once(shards, world_size):
    found = []
    for rank in range(world_size):
        for batch in iterate_shards(shards, 16, batch_size=4, rank=rank, world_size=world_size):
            assert len(batch.keys) == len(batch.captions) == len(batch.ids) == len(batch.images) <= 4
            found += zip(batch.keys, batch.captions, batch.images, strict=True)
    assert [key for key, _, _ in found] == [f"{number:09d}" for number in range(37)]
    for number, (_, caption, image) in enumerate(found):
        assert caption == f"caption {number}"
        assert torch.equal(image, eval_image(jpeg(number, 36 + number % 9), 16))


def test_iterate_shards_leaves_out_bad_samples(tmp_path, caplog):
    folder = write_shards(tmp_path / "shards", [20, 20], BAD)
    batches = list(iterate_shards(folder, 16, batch_size=8))
    assert keys(batches) == [f"{number:09d}" for number in range(40) if number not in BAD]
    assert sum(batch.skipped for batch in batches) == len(caplog.records) == 5
    assert all(f"{number:09d}: " in record.getMessage() for number, record in zip(BAD, caplog.records, strict=True))
    assert batches[-1].position == 40


@pytest.fixture
def classes(tmp_path):
    for name, count in (("tabby_cat", 3), ("dog", 4), ("zebra", 2)):
        folder = tmp_path / "classes" / name
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.{'JPEG' if number else 'jpg'}").write_bytes(jpeg(number))
        (folder / "notes.txt").write_text("not an image")
    return tmp_path / "classes"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_class_folder(classes, world_size):
    assert list_classes(classes) == ["dog", "tabby cat", "zebra"]
    labels, images = [], []
    for rank in range(world_size):
        for batch in iterate_class_folder(classes, 16, batch_size=2, rank=rank, world_size=world_size):
            assert batch.images.shape[1:] == (16, 16, 3) and len(batch.labels) == len(batch.images) <= 2
            labels += batch.labels.tolist()
            images += batch.images
    assert labels == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert torch.equal(images[3], eval_image(jpeg(3), 16))


def test_class_folder_leaves_out_bad_images(classes, caplog):
    (classes / "dog" / "1.JPEG").write_bytes(b"<html>")
    batches = list(iterate_class_folder(classes, 16, batch_size=4))
    assert sum(len(batch.labels) for batch in batches) == 8
    assert sum(batch.skipped for batch in batches) == 1
    assert "dog/1.JPEG" in caplog.text


def test_empty_class_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_classes(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no class folders in"):
        list_classes(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.jpg, \.png or \.webp images in .*cat"):
        list(iterate_class_folder(tmp_path, 16, batch_size=2))


@pytest.mark.parametrize("size", [32, 64, 224, 256, 336])
def test_pinned_pieces_fill_what_torch_gives_them(size):
    slots = _slots_of_a_pinned_piece(size)
    needed = slots * 3 * size**2
    given = 1 << (needed - 1).bit_length()
    assert 16 <= slots < 32 and needed > given * 15 / 16
