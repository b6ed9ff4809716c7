import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from textlock.data.captions import caption_id
from textlock.data.images import BadSample, CropWindow, crop_and_resize, decode_image
from textlock.data.loader import DataConfig, open_loader
from textlock.data.shards import (
    INDEX_NAME,
    Reencoding,
    ShardReader,
    index_shards,
    main,
    open_index,
    pack_shards,
    read_captions,
    repack_shards,
    verify_shards,
)
from textlock.data.tar import read_members


def jpeg(seed=0, width=40, height=30):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key, seed=0):
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", f"caption of {key}".encode())]


def members_of(path):
    with open(path, "rb") as file:
        return list(read_members(file))


def contents(path):
    payload = path.read_bytes()
    return [(member.name, payload[member.offset : member.offset + member.size]) for member in members_of(path)]


def tarfile_contents(path):
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]


def write_dataset(folder, count=7, suffix=".tsv"):
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = f"sub/{number}.jpg" if number % 2 else f"{number}.jpg"
        (images / name).write_bytes(jpeg(number, width=30 + number))
        rows.append({"filepath": name, "title": f"caption, number {number} é"})
    captions = folder / f"captions{suffix}"
    if suffix == ".jsonl":
        captions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        mark = "\t" if suffix == ".tsv" else ","
        lines = [mark.join(["filepath", "title"])] + [f'{row["filepath"]}{mark}"{row["title"]}"' for row in rows]
        captions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return images, captions


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_pack_index_read_round_trip(suffix, tmp_path):
    images, captions = write_dataset(tmp_path, suffix=suffix)
    report = pack_shards(images, captions, tmp_path / "shards", samples_per_shard=3)
    assert (report.shards, report.samples, report.skipped) == (3, 7, [])
    shards = tmp_path / "shards"
    assert sorted(path.name for path in shards.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", INDEX_NAME]
    index = open_index(shards)
    assert (len(index), index.shard_names, index.samples_per_shard) == (
        7,
        ["00000.tar", "00001.tar", "00002.tar"],
        [3, 3, 1],
    )
    assert index.samples.dtype.itemsize == 40
    reader = ShardReader(index)
    for number, (_, name, caption) in enumerate(read_captions(captions)):
        raw = reader.read(number)
        assert raw.key == f"{number // 3:05d}{number % 3:04d}"
        assert raw.image == (images / name).read_bytes()
        assert raw.caption.decode() == caption
        assert raw.caption_id == caption_id(caption)
        assert index.shard_of(number) == number // 3
    facts = json.loads(dict(tarfile_contents(shards / "00001.tar"))["000010000.json"])
    assert facts == {
        "key": "000010000",
        "caption": "caption, number 3 é",
        "width": 33,
        "height": 30,
        "file": "sub/3.jpg",
        "sha256": hashlib.sha256((images / "sub/3.jpg").read_bytes()).hexdigest(),
    }
    assert [name for name, _ in contents(shards / "00002.tar")] == ["000020000.jpg", "000020000.txt", "000020000.json"]
    assert verify_shards(shards, workers=1).problems == []


def test_pack_is_deterministic_and_the_fingerprint_ignores_times(tmp_path):
    images, captions = write_dataset(tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    pack_shards(images, captions, one, samples_per_shard=4)
    os.utime(images / "0.jpg", (5, 5))
    pack_shards(images, captions, other, samples_per_shard=4)
    for name in ("00000.tar", "00001.tar"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    os.utime(other / "00000.tar", (5, 5))
    index_shards(other)
    assert open_index(one).fingerprint == open_index(other).fingerprint


def break_nothing_written(images, captions, output, message, error, **options):
    with pytest.raises(error, match=message):
        pack_shards(images, captions, output, **options)
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if "partial" in path.name]


def test_pack_refuses_a_missing_image(tmp_path):
    images, captions = write_dataset(tmp_path)
    (images / "sub/5.jpg").unlink()
    break_nothing_written(
        images, captions, tmp_path / "out", r"captions\.tsv line 7: there is no image .*sub/5\.jpg", FileNotFoundError
    )


def test_pack_refuses_a_path_outside_the_folder(tmp_path):
    images, captions = write_dataset(tmp_path)
    captions.write_text("file\tcaption\n../captions.tsv\tx\n")
    break_nothing_written(images, captions, tmp_path / "out", "line 2: ../captions.tsv is outside", ValueError)


def test_pack_refuses_or_leaves_out_bad_samples(tmp_path):
    images, captions = write_dataset(tmp_path)
    (images / "2.jpg").write_bytes(b"<html>")
    with open(captions, "a") as file:
        file.write("0.jpg\t \n")
    break_nothing_written(images, captions, tmp_path / "out", "line 4: 2.jpg: not a JPEG", ValueError)
    report = pack_shards(images, captions, tmp_path / "out", skip_bad=True)
    assert report.samples == 6
    assert [(problem.key, problem.kind) for problem in report.skipped] == [
        ("2.jpg", "format"),
        ("0.jpg", "empty-caption"),
    ]


def test_pack_refuses_an_output_that_is_not_empty(tmp_path):
    images, captions = write_dataset(tmp_path)
    (tmp_path / "out").mkdir()
    pack_shards(images, captions, tmp_path / "out")
    before = (tmp_path / "out" / "00000.tar").read_bytes()
    with pytest.raises(ValueError, match="is not an empty folder"):
        pack_shards(images, captions, tmp_path / "out")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.tsv", "image\tcaption\na\tb\n", "no column file, filepath or filename; the columns are: image, caption"),
        ("c.jsonl", '{"file": "a", "words": "b"}\n', "no column caption, title or text; the columns are: file, words"),
        ("c.csv", "file,caption\na.jpg,one,two\n", "line 2: it does not have the 2 columns"),
        ("c.csv", "file,caption\na.jpg\n", "line 2: it does not have the 2 columns"),
        ("c.tsv", 'file\tcaption\na.jpg\t"Hello" he said\n', "line 2: .*quote the caption"),
        ("c.tsv", 'file\tcaption\na.jpg\t"never closed\nb.jpg\tx\n', "line 2: .*quote the caption"),
        ("c.jsonl", '{"file": "a", "caption": "b"}\n{oops\n', "line 2 is not JSON"),
        ("c.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("c.jsonl", '{"file": "a", "caption": null}\n', "line 1: file and caption must both hold text"),
        ("c.txt", "", r"must be \.tsv, \.csv or \.jsonl"),
    ],
)
def test_captions_file_errors(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_captions(tmp_path / name))


def packed(tmp_path, **options):
    images, captions = write_dataset(tmp_path)
    pack_shards(images, captions, tmp_path / "shards", samples_per_shard=3, **options)
    return tmp_path / "shards"


def test_missing_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.tar shards in"):
        index_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_index(tmp_path / "nowhere")


@pytest.mark.parametrize("members", [[], [("a.txt", b"text alone")]], ids=["no members", "no images"])
def test_empty_shard(members, tmp_path):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=r"1 of 1 shards .* no sample with an image: 0\.tar"):
        index_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def grow(shards):
    with open(shards / "00001.tar", "ab") as file:
        file.write(bytes(512))


STALE = [
    pytest.param(lambda s: (s / INDEX_NAME).unlink(), "no index.textlock", id="no index"),
    pytest.param(grow, "00001.tar has changed", id="another size"),
    pytest.param(lambda s: os.utime(s / "00001.tar", (5, 5)), "00001.tar has changed", id="another time"),
    pytest.param(lambda s: shutil.copy(s / "00001.tar", s / "00009.tar"), "00009.tar is not in", id="one more shard"),
    pytest.param(lambda s: (s / "00001.tar").unlink(), "names 00001.tar, which is not there", id="one shard less"),
    pytest.param(lambda s: os.truncate(s / INDEX_NAME, 300), "index.textlock is damaged", id="cut"),
    pytest.param(lambda s: (s / INDEX_NAME).write_bytes(b"x" * 200), "is not an index", id="something else"),
]


@pytest.mark.parametrize(("change", "message"), STALE)
def test_stale_index(change, message, tmp_path):
    shards = packed(tmp_path)
    change(shards)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_index(shards)
    assert f"python -m textlock.data.shards index {shards}" in str(caught.value)
    index_shards(shards)
    open_index(shards)


@pytest.mark.parametrize("at", [12, 16, 24, 40, 100, 130])
def test_a_flipped_bit_in_the_index_header_is_found(at, tmp_path):
    shards = packed(tmp_path)
    raw = bytearray((shards / INDEX_NAME).read_bytes())
    raw[at] ^= 1
    (shards / INDEX_NAME).write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        open_index(shards)


def test_index_of_a_cut_tar_keeps_the_samples_before_the_cut(tmp_path):
    shards = packed(tmp_path)
    member = next(member for member in members_of(shards / "00001.tar") if member.name == "000010002.jpg")
    os.truncate(shards / "00001.tar", member.offset + 10)
    report = index_shards(shards)
    assert report.samples == 3 + 2 + 1
    assert [(problem.shard, problem.kind) for problem in report.problems] == [("00001.tar", "tar-truncated")]
    assert ShardReader(open_index(shards)).read(4).key == "000010001"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("stem", ["n" * 150, "d" * 120 + "/" + "n" * 700, "漢字" * 20], ids=["long", "path", "unicode"])
def test_reader_finds_long_keys(format, stem, tmp_path):
    write_tar(tmp_path / "0.tar", [*sample("first"), *sample(stem, seed=1)], format)
    index_shards(tmp_path)
    raw = ShardReader(open_index(tmp_path)).read(1)
    assert (raw.key, raw.image) == (stem, jpeg(1))


def test_reader_reads_captions_before_and_far_from_their_image(tmp_path):
    far = ("x.bin", bytes(20_000))
    write_tar(tmp_path / "0.tar", [("a.txt", b"before"), ("a.jpg", jpeg()), ("b.jpg", jpeg(1)), far, ("b.txt", b"far")])
    index_shards(tmp_path)
    reader = ShardReader(open_index(tmp_path))
    assert [reader.read(number).caption for number in range(2)] == [b"before", b"far"]


def test_reader_refuses_what_is_not_where_the_index_says(tmp_path):
    write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b", 1), ("big.jpg", bytes(17 * 2**20)), ("big.txt", b"x")])
    index_shards(tmp_path)
    reader = ShardReader(open_index(tmp_path))
    with pytest.raises(BadSample) as caught:
        reader.read(2)
    assert caught.value.kind == "too-large"
    raw = (tmp_path / "0.tar").read_bytes()
    with open(tmp_path / "0.tar", "r+b") as file:
        file.write(b"c")
        file.truncate(len(raw.split(b"b.jpg")[0]) + 600)
    for number, kind in ((0, "moved"), (1, "unreadable")):
        with pytest.raises(BadSample) as caught:
            reader.read(number)
        assert caught.value.kind == kind


def test_reader_closes_its_files(tmp_path):
    shards = packed(tmp_path)
    index = open_index(shards)
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(index)
    for number in range(7):
        reader.read(number)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def damaged_dataset(tmp_path):
    damaged = bytearray(jpeg(3, 200, 200))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 40] = b"\xff\x01" * 20
    write_tar(
        tmp_path / "0.tar",
        [
            *sample("good"),
            ("scan.jpg", bytes(damaged)),
            ("scan.txt", b"x"),
            ("html.jpg", b"<html>"),
            ("html.txt", b"x"),
            ("silent.jpg", jpeg()),
            ("blank.jpg", jpeg()),
            ("blank.txt", b" \n"),
            ("alone.txt", b"x"),
            *sample("good"),
        ],
    )
    index_shards(tmp_path)
    return tmp_path


def test_verify_names_every_bad_sample(tmp_path):
    seen = []
    report = verify_shards(damaged_dataset(tmp_path), workers=2, on_problem=seen.append)
    assert report.good == 1
    assert seen == report.problems
    assert sorted((problem.key, problem.kind) for problem in report.problems) == [
        ("alone", "no-image"),
        ("blank", "empty-caption"),
        ("good", "duplicate"),
        ("good", "duplicate"),
        ("html", "format"),
        ("scan", "damaged"),
        ("silent", "no-caption"),
    ]


def test_verify_lists_what_the_loader_skips(tmp_path, monkeypatch, capsys):
    folder = damaged_dataset(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shards", "verify", str(folder), "--output", str(tmp_path / "bad.jsonl")])
    with pytest.raises(SystemExit):
        main()
    assert "1 good samples; 7 problems: 2 duplicate, " in capsys.readouterr().out
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {tuple(line) for line in listed} == {("shard", "key", "kind", "message", "place")}
    log = tmp_path / "skipped.jsonl"
    config = DataConfig(
        shards=str(folder), batch_size=5, image_size=16, workers=1, decoder="cpu", max_skipped_fraction=1.0
    )
    with open_loader(config, rank=0, world_size=1, skipped_log=log) as loader:
        next(loader)
    skipped = [json.loads(line) for line in log.read_text().splitlines()]
    skipped = {(line["shard"], line["sample"]) for line in skipped if line["epoch"] == 0}
    assert {(line["shard"], line["place"]) for line in listed if line["place"] is not None} == skipped
    assert len(skipped) == 4


def test_verify_names_a_sample_that_is_too_large(tmp_path):
    write_tar(tmp_path / "0.tar", [*sample("a"), ("big.jpg", bytes(17 * 2**20)), ("big.txt", b"x")])
    index_shards(tmp_path)
    (problem,) = verify_shards(tmp_path, workers=1).problems
    assert (problem.key, problem.kind, problem.place) == ("big", "too-large", 1)


def test_verify_without_an_index(tmp_path):
    shards = packed(tmp_path)
    (shards / INDEX_NAME).unlink()
    report = verify_shards(shards, workers=1)
    assert (report.good, [problem.kind for problem in report.problems]) == (7, ["index"])


def test_processes_do_what_one_does(tmp_path):
    shards = packed(tmp_path)
    before = (shards / INDEX_NAME).read_bytes()
    (shards / INDEX_NAME).unlink()
    index_shards(shards, workers=2)
    assert (shards / INDEX_NAME).read_bytes() == before
    write_tar(shards / "00001.tar", [*sample("a"), ("b.jpg", b"<html>"), ("b.txt", b"x")])
    index_shards(shards)
    assert verify_shards(shards, workers=2) == verify_shards(shards, workers=1)
    for workers in (1, 2):
        repack_shards(shards, tmp_path / str(workers), Reencoding(16), workers=workers)
    for path in (tmp_path / "1").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    assert open_index(tmp_path / "1").fingerprint == open_index(tmp_path / "2").fingerprint


def test_verify_compares_the_index_with_the_shards(tmp_path):
    shards = packed(tmp_path)
    raw = bytearray((shards / INDEX_NAME).read_bytes())
    raw[-3] ^= 1
    (shards / INDEX_NAME).write_bytes(raw)
    assert [(problem.shard, problem.kind) for problem in verify_shards(shards, workers=1).problems] == [
        ("00002.tar", "index")
    ]

    status = (shards / "00000.tar").stat()
    tar = bytearray((shards / "00000.tar").read_bytes())
    at = tar.index(b"caption, number 0")
    tar[at] = ord("C") + 1
    (shards / "00000.tar").write_bytes(tar)
    os.utime(shards / "00000.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    found = {(problem.shard, problem.kind) for problem in verify_shards(shards, workers=1).problems}
    assert found >= {("00000.tar", "index"), (INDEX_NAME, "index")}


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["shards", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    images, captions = write_dataset(tmp_path)
    shards = tmp_path / "shards"
    status, out, err = run("pack", "--images", images, "--captions", captions, "--output", shards)
    assert (status, err) == (0, "")
    assert "7 samples in 1 shards" in out
    (shards / INDEX_NAME).unlink()
    assert run("index", shards)[0] == 0
    assert run("verify", shards) == (0, "7 good samples; 0 problems\n", "")

    status, _, err = run("index", tmp_path / "nowhere")
    assert status == 2
    assert err.startswith("error: no folder") and err.count("\n") == 1

    (tmp_path / "bad").mkdir()
    status, out, _ = run("verify", damaged_dataset(tmp_path / "bad"))
    assert status == 1
    assert "0.tar\thtml\tformat\tnot a JPEG, PNG or WebP" in out


def encoded(mode="RGB", size=(60, 40), format="JPEG", **options):
    buffer = io.BytesIO()
    gradient = np.linspace(0, 255, size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0])
    Image.fromarray(gradient).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


REENCODED = {
    "large": (encoded(), (48, 32), False),
    "tall": (encoded(size=(40, 60)), (32, 48), False),
    "png": (encoded(format="PNG"), (48, 32), False),
    "alpha": (encoded("RGBA", format="PNG"), (48, 32), False),
    "cmyk": (encoded("CMYK"), (48, 32), False),
    "small": (encoded(size=(40, 32)), (40, 32), True),
    "tiny": (encoded(size=(8, 5)), (8, 5), True),
    "small progressive": (encoded(size=(40, 32), progressive=True), (40, 32), False),
    "small png": (encoded(size=(40, 32), format="PNG"), (40, 32), False),
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


def test_quality_decides_the_size():
    payload = jpeg(width=80, height=60)
    sizes = [len(Reencoding(32, quality)(payload)[0]) for quality in (30, 60, 90)]
    assert sizes == sorted(sizes) and sizes[0] < 0.7 * sizes[2]
    for resize, quality in ((0, 90), (32, 0), (32, 101)):
        with pytest.raises(ValueError, match="must be at least 1"):
            Reencoding(resize, quality)


@pytest.mark.parametrize("workers", [1, 3])
def test_pack_with_resize(workers, tmp_path):
    images, captions = write_dataset(tmp_path, count=20)
    (images / "4.jpg").write_bytes(jpeg()[:-2])
    shards = tmp_path / "shards"
    report = pack_shards(
        images, captions, shards, samples_per_shard=8, skip_bad=True, reencoding=Reencoding(16), workers=workers
    )
    assert (report.samples, [problem.key for problem in report.skipped]) == (19, ["4.jpg"])
    reader = ShardReader(open_index(shards))
    left = [row for row in read_captions(captions) if row[1] != "4.jpg"]
    for number, (_, name, caption) in enumerate(left):
        raw = reader.read(number)
        assert raw.caption.decode() == caption
        assert min(decode_image(raw.image).shape[:2]) == 16
        assert raw.image == Reencoding(16)((images / name).read_bytes())[0]


def test_repack_keeps_keys_and_leaves_bad_samples_out(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    long = "d" * 120 + "/é"
    write_tar(source / "a.tar", [*sample("1"), *sample(long, 2), ("bad.jpg", b"<html>"), ("bad.txt", b"x")], 1)
    write_tar(source / "b.tar", [("only.jpg", jpeg()), *sample("3", 3)], 1)
    write_tar(source / "c.tar", [("none.jpg", jpeg())])
    report = repack_shards(source, output, Reencoding(16))
    assert (report.shards, report.samples) == (2, 3)
    found = [(problem.shard, problem.key, problem.kind) for problem in report.skipped]
    assert found == [
        ("a.tar", "bad", "format"),
        ("b.tar", "only", "no-caption"),
        ("c.tar", "none", "no-caption"),
    ]
    reader = ShardReader(open_index(output))
    assert [reader.read(number).key for number in range(3)] == ["1", long, "3"]
    assert reader.read(1).caption.decode() == f"caption of {long}"
    assert decode_image(reader.read(2).image).shape == (16, 21, 3)
    assert verify_shards(output, workers=1).problems == []
    with pytest.raises(ValueError, match="is not an empty folder"):
        repack_shards(source, output, Reencoding(16))
    (source / "a.tar").unlink()
    (source / "b.tar").unlink()
    with pytest.raises(ValueError, match="holds no good sample"):
        repack_shards(source, tmp_path / "nothing", Reencoding(16))
    assert not (tmp_path / "nothing").exists()


def test_pack_command_needs_one_source(tmp_path, monkeypatch, capsys):
    images, captions = write_dataset(tmp_path)
    for arguments in ([], ["--images", images], ["--shards", tmp_path], ["--shards", tmp_path, "--captions", captions]):
        monkeypatch.setattr(sys, "argv", ["shards", "pack", "--output", str(tmp_path / "out"), *map(str, arguments)])
        with pytest.raises(SystemExit):
            main()
        assert "error: name --images and --captions, or --shards with --resize" in capsys.readouterr().err
    arguments = ["pack", "--images", images, "--captions", captions, "--output", tmp_path / "out", "--resize", "16"]
    monkeypatch.setattr(sys, "argv", ["shards", *map(str, arguments)])
    main()
    arguments = ["pack", "--shards", tmp_path / "out", "--output", tmp_path / "smaller", "--resize", "8"]
    monkeypatch.setattr(sys, "argv", ["shards", *map(str, arguments)])
    main()
    assert min(decode_image(ShardReader(open_index(tmp_path / "smaller")).read(0).image).shape[:2]) == 8


def test_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "textlock.data.shards", "index", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no .tar shards in")


def test_a_flipped_bit_in_a_record_is_a_bad_sample_not_another_caption(tmp_path):
    shards = packed(tmp_path)
    index = open_index(shards)
    offset = (shards / INDEX_NAME).stat().st_size - index.samples.nbytes
    content = bytearray((shards / INDEX_NAME).read_bytes())
    content[offset + index.samples.dtype.fields["caption_offset"][1] + 1] ^= 4
    (shards / INDEX_NAME).write_bytes(content)
    with pytest.raises(BadSample) as caught:
        ShardReader(open_index(shards)).read(0)
    assert caught.value.kind == "moved"


def test_every_shard_without_a_sample_is_named(tmp_path):
    shards = packed(tmp_path)
    for name in ("90000.tar", "90001.tar"):
        (shards / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"2 of \d+ shards .* hold no sample with an image: 90000.tar, 90001.tar; delete"
    ):
        index_shards(shards)


def test_keys_cannot_forge_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "shards").mkdir()
    write_tar(
        tmp_path / "shards" / "0.tar", [("a\nb\x1b[2J.jpg", b"no image"), ("a\nb\x1b[2J.txt", b"x"), *sample("good")]
    )
    index_shards(tmp_path / "shards")
    monkeypatch.setattr("sys.argv", ["shards", "verify", str(tmp_path / "shards")])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert "\\n" in out and "\x1b" not in out and len(out.splitlines()) == 2
