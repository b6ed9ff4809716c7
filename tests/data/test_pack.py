import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from textlock.data.captions_file import CaptionsFile
from textlock.data.images import CropWindow, crop_and_resize, decode_image
from textlock.data.index import INDEX_NAME, open_index
from textlock.data.pack import Reencoding, pack_shards, repack_shards
from textlock.data.verify import verify_shards

from .tars import bad_sample, contents, jpeg, read_all, sample, tarfile_contents, write_dataset, write_tar
from .zoo import encode, photo


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_what_is_packed_is_read_back(suffix, tmp_path):
    images, captions = write_dataset(tmp_path, suffix=suffix)
    shards = tmp_path / "shards"
    report = pack_shards(images, CaptionsFile(path=captions), shards, samples_per_shard=3)
    assert (report.shards, report.samples, report.skipped) == (3, 7, [])
    assert sorted(path.name for path in shards.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", INDEX_NAME]
    assert open_index(shards).samples_per_shard == [3, 3, 1]
    for number, (raw, (_, name, caption)) in enumerate(
        zip(read_all(shards), CaptionsFile(path=captions).rows(bool), strict=True)
    ):
        assert raw.key == f"{number // 3:05d}{number % 3:04d}"
        assert raw.image == (images / name).read_bytes()
        assert raw.member.decode() == caption == f"caption, number {number} é"
    assert json.loads(dict(tarfile_contents(shards / "00001.tar"))["000010000.json"]) == {
        "key": "000010000",
        "caption": "caption, number 3 é",
        "width": 33,
        "height": 32,
        "file": "sub/3.jpg",
        "sha256": hashlib.sha256((images / "sub/3.jpg").read_bytes()).hexdigest(),
    }
    assert [name for name, _ in contents(shards / "00002.tar")] == ["000020000.jpg", "000020000.txt", "000020000.json"]
    assert verify_shards(shards, workers=1).problems == []


def test_equal_input_gives_equal_bytes_and_nothing_is_overwritten(tmp_path):
    images, captions = write_dataset(tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    other.mkdir()
    pack_shards(images, CaptionsFile(path=captions), one, samples_per_shard=4)
    os.utime(images / "0.jpg", (5, 5))
    pack_shards(images, CaptionsFile(path=captions), other, samples_per_shard=4, workers=3)
    tars = {path.name: path.read_bytes() for path in one.glob("*.tar")}
    assert tars == {path.name: path.read_bytes() for path in other.glob("*.tar")} and len(tars) == 2
    with pytest.raises(ValueError, match="is not an empty folder"):
        pack_shards(images, CaptionsFile(path=captions), one)
    assert tars == {path.name: path.read_bytes() for path in one.glob("*.tar")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("sub/9.jpg\tx\n", r"captions\.tsv line 9: there is no image .*sub/9\.jpg"),
        ("../captions.tsv\tx\n", "line 9: ../captions.tsv is outside"),
        ("html.jpg\tx\n", "line 9: html.jpg: not a JPEG"),
        (
            "0.jpg\t \n",
            "line 9: 0.jpg: the caption is missing or empty; mend it, or leave such samples out with --skip-bad",
        ),
    ],
    ids=["missing image", "path outside the folder", "bad image", "empty caption"],
)
def test_a_bad_row_is_refused_and_nothing_written(row, message, tmp_path):
    images, captions = write_dataset(tmp_path)
    (images / "html.jpg").write_bytes(b"<html>")
    with open(captions, "a") as file:
        file.write(row)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack_shards(images, CaptionsFile(path=captions), tmp_path / "out", samples_per_shard=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.tsv", "images"]


def gradient(mode="RGB", size=(60, 40)):
    values = np.linspace(0, 255, size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0])
    return Image.fromarray(values).convert(mode)


REENCODED = {
    "large": (encode(gradient()), (48, 32), False),
    "tall": (encode(gradient(size=(40, 60))), (32, 48), False),
    "png": (encode(gradient(), "PNG"), (48, 32), False),
    "alpha": (encode(gradient("RGBA"), "PNG"), (48, 32), False),
    "cmyk": (encode(gradient("CMYK")), (48, 32), False),
    "small": (encode(gradient(size=(40, 32))), (40, 32), True),
    "tiny": (encode(gradient(size=(8, 5))), (8, 5), True),
    "small progressive": (encode(gradient(size=(40, 32)), progressive=True), (40, 32), False),
    "small png": (encode(gradient(size=(40, 32)), "PNG"), (40, 32), False),
}


@pytest.mark.parametrize(("payload", "size", "same"), REENCODED.values(), ids=REENCODED)
def test_reencoding(payload, size, same):
    smaller, header = Reencoding(32, 90)(payload)
    assert (header.format, header.width, header.height) == ("jpeg", *size)
    assert (smaller == payload) == same
    with Image.open(io.BytesIO(smaller)) as image:
        assert (image.format, image.size) == ("JPEG", size) and not image.info.get("progressive")
    expected = torch.empty(size[1], size[0], 3, dtype=torch.uint8)
    whole = decode_image(payload)
    crop_and_resize(whole, CropWindow(0, 0, *whole.shape[:2]), expected)
    assert np.abs(decode_image(smaller).astype(int) - expected.numpy()).mean() < 3


def test_a_banner_longer_than_a_jpeg_can_be_is_a_bad_sample():
    with bad_sample("unsupported", "a JPEG of 100000 x 1 pixels cannot be: it has at most 65,500"):
        Reencoding(32)(encode(Image.new("RGB", (100_000, 1)), "PNG"))


def test_quality_decides_the_size():
    payload = encode(photo(80, 60))
    sizes = [len(Reencoding(32, quality)(payload)[0]) for quality in (10, 60, 90)]
    assert sizes == sorted(sizes) and sizes[0] < 0.7 * sizes[2]
    for resize, quality in ((0, 90), (32, 0), (32, 101)):
        with pytest.raises(ValueError, match="must be at least 1"):
            Reencoding(resize, quality)


@pytest.mark.parametrize("workers", [1, 3])
def test_resized_images_keep_their_captions_and_bad_ones_are_left_out(workers, tmp_path):
    images, captions = write_dataset(tmp_path, count=20)
    (images / "4.jpg").write_bytes(jpeg()[:-2])
    with open(captions, "a") as file:
        file.write("0.jpg\t \n")
    resize = Reencoding(16)
    report = pack_shards(
        images,
        CaptionsFile(path=captions),
        tmp_path / "out",
        samples_per_shard=8,
        skip_bad=True,
        reencoding=resize,
        workers=workers,
    )
    found = [(problem.key, problem.kind) for problem in report.skipped]
    assert (report.samples, found) == (19, [("0.jpg", "no-caption"), ("4.jpg", "truncated")])
    good = [row for row in CaptionsFile(path=captions).rows(bool) if row[1] != "4.jpg"][:-1]
    for raw, (_, name, caption) in zip(read_all(tmp_path / "out"), good, strict=True):
        assert raw.captions == [caption]
        assert raw.image == resize((images / name).read_bytes())[0]
        assert min(decode_image(raw.image).shape[:2]) == 16


def test_other_shards_keep_their_keys_and_bad_samples_are_left_out(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    long = "d" * 120 + "/é"
    write_tar(source / "a.tar", [*sample("1"), *sample(long, 2), *sample("bad", jpg=b"<html>")], tarfile.GNU_FORMAT)
    write_tar(source / "b.tar", [*sample("only", txt=None), *sample("3", 3), *sample("x", txt=b" ")])
    write_tar(source / "c.tar", sample("none", txt=None))
    outputs = [tmp_path / "one", tmp_path / "two"]
    report, other = (
        repack_shards(source, output, Reencoding(16), workers=workers)
        for workers, output in enumerate(outputs, start=1)
    )
    assert report == other
    assert (report.shards, report.samples) == (2, 3)
    assert [(problem.shard, problem.key, problem.kind, problem.place) for problem in report.skipped] == [
        ("a.tar", "bad", "format", 2),
        ("b.tar", "only", "no-caption", 0),
        ("b.tar", "x", "no-caption", 2),
        ("c.tar", "none", "no-caption", 0),
    ]
    for name in ("a.tar", "b.tar"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
    samples = read_all(outputs[0])
    assert [raw.key for raw in samples] == ["1", long, "3"]
    assert samples[1].captions == [f"caption of {long}"]
    assert decode_image(samples[2].image).shape == (16, 20, 3)
    assert verify_shards(outputs[0], workers=1).problems == []
    with pytest.raises(ValueError, match="is not an empty folder"):
        repack_shards(source, outputs[0], Reencoding(16))
    (source / "a.tar").unlink()
    (source / "b.tar").unlink()
    with pytest.raises(ValueError, match="holds no good sample"):
        repack_shards(source, tmp_path / "nothing", Reencoding(16))
    assert not (tmp_path / "nothing").exists()
