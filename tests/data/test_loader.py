import json
import re
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
from textlock.data.evaluation import iterate_class_folder, iterate_shards, read_class_folders
from textlock.data.images import (
    EVALUATION_EXTENSIONS,
    crop_and_resize,
    crop_draws,
    crop_window,
    decode_image,
    eval_image,
)
from textlock.data.loader import SKIP_KINDS, _slots_of_a_pinned_piece, require_few_skipped

from ..conftest import records
from .loading import content, keys, open_one, settings, take
from .tars import caption_of, image_of, jpeg, key_of, write_shards
from .zoo import DAMAGED, GARBAGE_FOR_DALI, GOOD, JPEG, NO_CAPTIONS, ODD_CAPTIONS, REFUSED

# What is bad among forty samples, and of which kind.
BAD = {
    3: ({"jpg": b"<html>"}, "format"),
    10: ({"jpg": JPEG[:-2]}, "truncated"),
    17: ({"txt": b" \n"}, "no-caption"),
    20: ({"jpg": DAMAGED["png data"]}, "damaged"),
    30: ({"jpg": b""}, "empty"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [11, 5, 9, 12])  # 37 samples


@pytest.fixture(scope="module")
def bad_shards(tmp_path_factory):
    changes = {number: fields for number, (fields, _) in BAD.items()}
    return write_shards(tmp_path_factory.mktemp("bad") / "shards", [20, 20], changes)


@pytest.mark.parametrize(("more", "epoch_size"), [((), 32), (([6, 2], "2"), 48), (([6, 3], "0.5"), 40)])
def test_a_batch_is_what_the_order_and_the_draws_of_its_places_say(shards, tmp_path, more, epoch_size):
    words = [shards]
    if more:
        words.append(f"{write_shards(tmp_path / 'more', more[0], first=500)}:{more[1]}")
    config = settings(*words, seed=7)
    batches = take(config, 8)
    for step, batch in enumerate(batches):
        epoch, place = divmod(8 * step, epoch_size)
        assert (batch.text_embeddings, batch.epoch, batch.position, batch.skipped) == (None, epoch, 8 * step + 8, 0)
        assert batch.images.shape == (8, 16, 16, 3) and batch.images.dtype == torch.uint8
        assert batch.ids.dtype == torch.int64
        assert batch.ids.tolist() == [caption_id(caption) for caption in batch.captions]
        draws = crop_draws(7, epoch, np.arange(place, place + 8))
        for image, key, caption, row in zip(batch.images, batch.keys, batch.captions, draws, strict=True):
            assert caption == caption_of(int(key))
            whole = decode_image(image_of(int(key)))
            window = crop_window(*whole.shape[:2], row, scale=config.crop_scale, ratio=config.crop_ratio)
            expected = torch.empty(16, 16, 3, dtype=torch.uint8)
            crop_and_resize(whole, window, expected)
            assert torch.equal(image, expected)
    with open_one(config) as loader:
        assert loader.samples_per_epoch == epoch_size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_of_a_cpu(shards):
    found = []
    for batch in take(settings(shards), 5, device="cuda"):
        assert batch.images.device.type == batch.ids.device.type == "cuda"
        found.append(replace(batch, images=batch.images.cpu(), ids=batch.ids.cpu()))
    assert content(found) == content(take(settings(shards), 5))


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (1, 3), (5, 1)])
def test_threads_do_not_change_the_batches_and_torch_keeps_its_own(shards, workers, prefetch):
    before = torch.get_num_threads()
    changed = settings(shards, workers=workers, prefetch_batches=prefetch)
    assert content(take(changed, 5)) == content(take(settings(shards), 5))
    assert torch.get_num_threads() == before


def test_resume_refuses_other_settings_other_shards_and_broken_states(shards, tmp_path):
    with open_one(settings(shards)) as loader:
        state = loader.state()
    other = write_shards(tmp_path / "other", [11, 5, 9, 13])
    for changes, broken, named in [
        ({"seed": 1}, {}, "seed was 42 and is 1"),
        ({"batch_size": 4}, {}, "batch_size was 8 and is 4"),
        ({"image_size": 32}, {}, "image_size was 16 and is 32"),
        ({"crop_scale": (0.5, 1.0)}, {}, "crop_scale was"),
        ({"crop_ratio": (1.0, 1.0)}, {}, "crop_ratio was"),
        ({"open_shards": 1}, {}, "open_shards was 2 and is 1"),
        ({"shards": (str(other),)}, {}, r"shards was .* and is"),
        ({}, {"fingerprint": None}, "no position and fingerprint"),
        ({}, {"position": "8"}, "no position and fingerprint"),
        ({}, {"position": -8}, "no position and fingerprint"),
        ({}, {"position": 3}, "position 3 is not a multiple"),
    ]:
        with pytest.raises(ValueError, match=named):
            open_one(replace(settings(shards), **changes), state={**state, **broken})


def test_bad_samples_are_replaced_from_other_batches_counted_and_logged(bad_shards, tmp_path):
    log = tmp_path / "skipped.jsonl"
    with open_one(settings(bad_shards), skipped_log=log) as loader:
        batches = list(islice(loader, 5))  # 40 samples: the whole epoch
        assert loader.skipped_by_kind == Counter(kind for _, kind in BAD.values())
    assert set(keys(batches)) == {key_of(number) for number in range(40) if number not in BAD}
    assert all(len(set(batch.keys)) == len(batch.images) == 8 for batch in batches)
    assert sum(batch.skipped for batch in batches) == 5
    lines = records(log)
    assert {line["sample"]: (line["kind"], line["shard"]) for line in lines} == {
        number: (kind, f"0000{number // 20}.tar") for number, (_, kind) in BAD.items()
    }
    assert all(keys(batches)[line["position"]] == line["replaced_by"] for line in lines)


@pytest.fixture(scope="module")
def good_zoo(tmp_path_factory):
    """Every kind of good image between plain JPEGs, in two batches of 200 that both decoders have made."""
    pytest.importorskip("nvidia.dali")
    changes = {2 * number: {"jpg": image} for number, image in enumerate(GOOD.values())}
    config = settings(write_shards(tmp_path_factory.mktemp("good") / "shards", [160, 40], changes), batch_size=200)
    return config, take(config, 2), take(replace(config, decoder="dali"), 2)


def test_dali_gives_the_batches_of_the_cpu_decoder(good_zoo):
    """What is no JPEG has even the same pixels: DALI crashes on some PNG and WebP headers, so it is given none."""
    _, ours, theirs = good_zoo
    no_jpeg = {key_of(2 * at) for at, image in enumerate(GOOD.values()) if not image.startswith(b"\xff\xd8")}
    for one, other in zip(ours, theirs, strict=True):
        assert (one.keys, one.captions, one.position) == (other.keys, other.captions, other.position)
        assert other.images.dtype == torch.uint8 and other.skipped == one.skipped == 0
        difference = (one.images.int() - other.images.int()).abs().float().mean(dim=(1, 2, 3))
        assert difference.max() <= 1.0
        assert {key for key, apart in zip(one.keys, difference, strict=True) if not apart} >= no_jpeg


def test_what_dali_cannot_read_is_asked_of_the_other_decoder(good_zoo, monkeypatch):
    from textlock.data.dali import DaliDecoder

    def picky(self, payloads, *rest, **options):
        if image_of(5) in payloads:
            raise RuntimeError("one of them is not to its taste")
        decode(self, payloads, *rest, **options)

    decode = DaliDecoder.decode
    monkeypatch.setattr(DaliDecoder, "decode", picky)
    config, (ours, _), (untroubled, _) = good_zoo
    (theirs,) = take(replace(config, decoder="dali"), 1)
    at = ours.keys.index(key_of(5))
    assert theirs.keys == ours.keys and theirs.skipped == 0
    assert torch.equal(ours.images[at], theirs.images[at])
    others = [row for row in range(200) if row != at]
    assert torch.equal(theirs.images[others], untroubled.images[others])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Every kind of bad sample between good ones, and a second set where good ones are in the places of the bad."""
    bad = {f"image: {name}": ({"jpg": payload}, kind) for name, (payload, kind) in REFUSED.items()}
    bad |= {f"damaged: {name}": ({"jpg": payload}, "damaged") for name, payload in DAMAGED.items()}
    bad |= {f"caption: {name}": ({"txt": caption}, "no-caption") for name, caption in NO_CAPTIONS.items()}
    bad |= {"no caption": ({"txt": None}, "no-caption"), "neither": ({"jpg": b"", "txt": None}, "no-caption")}
    odd = [*({"jpg": image} for image in GOOD.values()), *({"txt": caption} for caption in ODD_CAPTIONS.values())]
    names = {2 * number + 1: name for number, name in enumerate(bad)}
    clean = {2 * number + 1: fields for number, fields in enumerate(odd, start=len(bad))}
    samples = clean | {at: bad[name][0] for at, name in names.items()}
    count = 2 * len(samples) + 40
    sizes = [count // 3, count // 3, count - 2 * (count // 3)]
    root = tmp_path_factory.mktemp("zoo")
    kinds = {at: (name, bad[name][1]) for at, name in names.items()}
    return write_shards(root / "zoo", sizes, samples), write_shards(root / "clean", sizes, clean), kinds, count


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_the_zoo(zoo, decoder, tmp_path):
    """The run goes on, each bad sample is counted and named, and the pixels and captions next to it are as ever."""
    folder, clean_folder, kinds, count = zoo
    believed = []
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
        believed = [at for at, (name, _) in kinds.items() if name in map("damaged: {}".format, GARBAGE_FOR_DALI)]
        kinds = {at: kind for at, kind in kinds.items() if at not in believed}
    config = settings(folder, batch_size=count, decoder=decoder, prefetch_batches=0)
    (batch,) = take(config, 1, skipped_log=tmp_path / "skipped.jsonl")
    (clean,) = take(replace(config, shards=(str(clean_folder),)), 1)

    lines = records(tmp_path / "skipped.jsonl")
    assert {line["sample"]: (kinds[line["sample"]][0], line["kind"]) for line in lines} == kinds
    for line in lines:
        assert line["shard"] == f"{min(line['sample'] // (count // 3), 2):05d}.tar"
        assert line["key"] == ("" if line["kind"] == "too-large" else key_of(line["sample"]))
        assert line["message"] and len(line["message"]) < 300
        assert batch.keys[line["position"]] == line["replaced_by"]
    assert batch.skipped_by_kind == Counter(kind for _, kind in kinds.values())
    assert set(batch.skipped_by_kind) <= set(SKIP_KINDS)

    assert clean.skipped == 0
    for at in set(range(count)) - {line["position"] for line in lines}:
        if int(batch.keys[at]) not in believed:
            assert (batch.keys[at], batch.captions[at]) == (clean.keys[at], clean.captions[at])
            assert torch.equal(batch.images[at], clean.images[at]), batch.keys[at]
    for caption in batch.captions:
        assert 0 < len(caption) <= 2048
        json.dumps(caption).encode()


def test_a_shard_that_vanishes_costs_its_samples_only(tmp_path):
    folder = write_shards(tmp_path / "shards", [30, 10])
    with open_one(settings(folder)) as loader:
        (folder / "00001.tar").unlink()
        batches = list(islice(loader, 5))
        assert loader.skipped_by_kind == {"unreadable": 10}
    assert set(keys(batches)) == {key_of(number) for number in range(30)}


def test_too_many_bad_samples_stop_a_loader_that_is_the_only_one(bad_shards, monkeypatch):
    """One rank that stopped alone would leave the others waiting: their sum is judged, by the caller."""
    monkeypatch.setattr("textlock.data.loader._MIN_SAMPLES_TO_JUDGE", 40)
    config = settings(bad_shards, max_skipped_fraction=0.05)
    with open_one(config) as loader:
        for _ in range(4):
            next(loader)
        with pytest.raises(
            ValueError, match=r"5 of 40 samples are bad \(.*1 truncated.*more than --data.max-skipped-fraction 0.05"
        ):
            next(loader)
        with pytest.raises(ValueError, match="closed"):
            next(loader)
    assert len(take(replace(config, max_skipped_fraction=0.125), 5)) == 5
    assert [len(take(config, 10, rank=rank, world_size=2)) for rank in range(2)] == [10, 10]
    with pytest.raises(ValueError, match="3 of 40 samples are bad"):
        require_few_skipped({"format": 1, "empty": 2}, 40, config)
    require_few_skipped({"format": 3}, 60, config)
    require_few_skipped({"format": 3}, 39, config)


def test_nothing_but_bad_samples(tmp_path):
    folder = write_shards(tmp_path / "shards", [9], {number: {"jpg": b"<html>"} for number in range(9)})
    with (
        open_one(settings(folder)) as loader,
        pytest.raises(ValueError, match=r"samples in a row are bad, the first because not a JPEG.*shards verify"),
    ):
        next(loader)


@pytest.mark.parametrize(
    ("counts", "command"),
    [
        (
            {"truncated": 3, "no-embedding": 2},
            "shards verify a and python -m textlock.data.shards verify b",
        ),
        ({"truncated": 3, "no-embedding": 9}, "textlock.data.embeddings a again and"),
        ({"damaged-embedding": 9}, "textlock.data.embeddings a again and"),
    ],
)
def test_the_advice_is_of_what_most_samples_lack(counts, command):
    """Images that verify finds good may be without embeddings, which it does not read."""
    with pytest.raises(ValueError, match=re.escape(command)):
        require_few_skipped(counts, 1000, settings("a", "b", max_skipped_fraction=0.001))


def decode_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "feed"))]


def test_errors_of_a_worker_reach_the_consumer_and_close_the_loader(shards, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no memory for the image")

    monkeypatch.setattr("textlock.data.loader.crop_and_resize", fail)
    loader = open_one(settings(shards))
    with pytest.raises(MemoryError, match="no memory"):
        next(loader)
    assert not decode_threads()


def test_prefetch_is_bounded(shards, monkeypatch):
    made = []
    monkeypatch.setattr("textlock.data.loader.crop_and_resize", lambda image, window, out: made.append(1))
    loader = open_one(settings(shards, prefetch_batches=2))
    next(loader)
    loader.close()
    assert 8 <= len(made) <= 24
    assert not decode_threads()


def test_a_run_that_dies_does_not_hang(shards):
    program = f"""
from textlock.data.loader import DataConfig, open_loader
import textlock.data.loader as module, time
module.crop_and_resize = lambda image, window, out: time.sleep(0.5)
size = dict(batch_size=4, image_size=16, workers=1, prefetch_batches=50)
config = DataConfig(shards=({str(shards)!r},), decoder="cpu", **size)
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
        ({"batch_size": 38}, {}, "the shards give 37 samples an epoch, fewer than one global batch of 38"),
        ({}, {"world_size": 3}, "--data.batch-size is 8, must be divisible by the number of processes, 3"),
        ({}, {"rank": 2, "world_size": 2}, "rank 2 is not one of 2 ranks"),
        ({"workers": 0}, {}, "--data.workers is 0, must be at least 1"),
        ({"open_shards": 0}, {}, "--data.open-shards is 0"),
        ({"fetchers": 0}, {}, "--data.fetchers is 0"),
        ({"crop_scale": (0.9, 1.1)}, {}, r"--data.crop-scale is \(0.9, 1.1\), must be at most 1"),
        ({"crop_ratio": (0.0, 1.0)}, {}, r"--data.crop-ratio is \(0.0, 1.0\), must be above 0"),
    ],
)
def test_impossible_settings(shards, changes, options, message):
    with pytest.raises(ValueError, match=message):
        open_one(settings(shards, **changes), **options)


def test_without_dali_auto_takes_the_cpu_decoder_and_dali_says_how_to_get_it(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "textlock.data.dali", None)
    assert content(take(settings(shards, decoder="auto"), 2)) == content(take(settings(shards), 2))
    with pytest.raises(ValueError, match=r'decoder dali needs DALI.*"textlock\[gpu\]", or take --data.decoder cpu'):
        open_one(settings(shards, decoder="dali"))


@pytest.mark.parametrize("world_size", [1, 3])
def test_iterate_shards_gives_every_good_sample_once_and_names_the_bad_ones(bad_shards, world_size, caplog):
    shares = [iterate_shards(bad_shards, 16, batch_size=4, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [batch for share in shares for batch in share]
    good = [number for number in range(40) if number not in BAD]
    assert keys(batches) == [key_of(number) for number in good]
    assert [caption for batch in batches for caption in batch.captions] == [[caption_of(number)] for number in good]
    assert all(len(batch.keys) == len(batch.images) <= 4 for batch in batches)
    images = torch.stack([eval_image(image_of(number), 16) for number in good])
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)
    assert sum(sum(batch.skipped_by_kind.values()) for batch in batches) == len(caplog.records) == 5
    for number, record in zip(BAD, caplog.records, strict=True):
        assert f"{key_of(number)}: " in record.getMessage()
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
def test_a_class_folder_is_read_once_and_bad_images_are_left_out(classes, world_size, caplog):
    (classes / "dog" / "1.JPEG").write_bytes(b"<html>")
    folders = read_class_folders(classes)
    assert (folders.classes, folders.left) == (["dog", "tabby_cat", "zebra"], {".txt": 3})
    batches = []
    for rank in range(world_size):
        batches += iterate_class_folder(folders, 16, batch_size=2, rank=rank, world_size=world_size)
    assert [label for batch in batches for label in batch.labels.tolist()] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert all(len(batch.images) <= 2 for batch in batches)
    images = torch.stack([eval_image(jpeg(number), 16) for number in (0, 2, 3, 0, 1, 2, 0, 1)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)
    assert sum((Counter(batch.skipped_by_kind) for batch in batches), Counter()) == {"format": 1}
    assert "dog/1.JPEG" in caplog.text


def test_images_of_every_format_and_in_folders_below_are_of_their_class(tmp_path):
    image = Image.new("RGB", (40, 32), (250, 0, 0))
    names = ["a.GIF", "b.bmp", "c.TIF", "d.tiff", "e.ppm", "sub/deep/f.pgm", "sub/g.webp", "h.png"]
    for name in (*names, "x.mat", "sub/y.xml", "sub/README", ".hidden.png", ".cache/z.png"):
        path = tmp_path / "red" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix[1:].lower() in EVALUATION_EXTENSIONS:
            kind = {"pgm": "PPM", "tif": "TIFF"}.get(path.suffix[1:].lower())
            image.convert("L" if path.suffix == ".pgm" else "RGB").save(path, kind)
        else:
            path.write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "red" / "loop").symlink_to(tmp_path)
    folders = read_class_folders(tmp_path)
    assert [path.relative_to(tmp_path / "red").as_posix() for path, _ in folders.files] == sorted(names)
    assert folders.left == {".mat": 1, ".xml": 1, "README": 1, ".csv": 1}
    (batch,) = iterate_class_folder(folders, 16, batch_size=99)
    assert len(batch.images) == 8 and not batch.skipped_by_kind
    reds = [path for path, _ in folders.files if path.suffix != ".pgm"]
    assert (batch.images[:, 8, 8, 0] > 240).sum() == len(reds)


@pytest.mark.parametrize("size", [32, 64, 224, 256, 336])
def test_pinned_pieces_fill_what_torch_gives_them(size):
    slots = _slots_of_a_pinned_piece(size)
    needed = slots * 3 * size**2
    given = 1 << (needed - 1).bit_length()
    assert 16 <= slots < 32 and needed > given * 15 / 16
