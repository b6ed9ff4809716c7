import gzip
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from textlock.data import index as module
from textlock.data.captions import caption_id
from textlock.data.index import INDEX_NAME, index_shards, open_index
from textlock.data.reader import ShardReader

from .tars import bad_sample, flip, key_of, members_of, read_all, write_shards, write_tar


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", [3, 3, 1])


def test_the_index_says_where_every_sample_is(shards):
    index = open_index(shards)
    assert (len(index), index.samples_per_shard, index.samples.dtype.itemsize) == (7, [3, 3, 1], 40)
    assert index.shard_names == ["00000.tar", "00001.tar", "00002.tar"]
    assert index.shard_sizes == [(shards / name).stat().st_size for name in index.shard_names]
    assert [index.shard_of(number) for number in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    offsets = [member.offset for name in index.shard_names for member in members_of(shards / name)]
    assert index.samples[["image_offset", "caption_offset"]].tolist() == list(
        zip(offsets[::2], offsets[1::2], strict=True)
    )
    assert index.samples["caption_hash"].astype(np.int64).tolist() == [caption_id(f"caption {n}") for n in range(7)]


def test_the_fingerprint_is_that_of_the_content_and_not_of_times(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    os.utime(copy / "00000.tar", (5, 5))
    index_shards(copy)
    assert open_index(copy).fingerprint == open_index(shards).fingerprint
    write_shards(copy, [3, 3, 1], {6: {"txt": b"another caption"}})
    assert open_index(copy).fingerprint != open_index(shards).fingerprint


def test_processes_write_the_index_that_one_does(shards):
    before = (shards / INDEX_NAME).read_bytes()
    (shards / INDEX_NAME).unlink()
    index_shards(shards, workers=2)
    assert (shards / INDEX_NAME).read_bytes() == before


def test_missing_shards_and_shards_without_an_image_are_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.tar shards in"):
        index_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_index(tmp_path / "nowhere")
    before = (shards / INDEX_NAME).read_bytes()
    (shards / "90000.tar").write_bytes(b"")
    (shards / "90001.tar").write_bytes(gzip.compress(before))
    write_tar(shards / "90002.tar", [("a.txt", b"text alone")])
    write_tar(shards / "90003.tar", [("a.cls", b"1"), ("a.x\x1b.pyd", b"1")])
    write_tar(shards / "90004.tar", [("a.1.jpg", b"1"), ("a.1.txt", b"1")])
    with pytest.raises(ValueError, match=r"5 of 8 shards .* hold no sample with an image: ") as caught:
        index_shards(shards)
    said = str(caught.value)
    for reason in (
        "90000.tar (the file ends at byte 0 without an end marker: it was cut short)",
        "90001.tar (it is compressed with gzip: decompress it (gzip -d) and index again)",
        "90002.tar (a: the sample has a caption but no image)",
        r"90003.tar (its fields are cls, x\x1b.pyd, none of them an image)",
        "90004.tar (a: a.1.jpg is the field 1.jpg of a, which is no image: write other dots in names as - or _)",
    ):
        assert reason in said
    assert "delete" not in said and said.isprintable()
    assert (shards / INDEX_NAME).read_bytes() == before
    assert not list(shards.glob(".*"))


STALE = {
    "no index": (lambda s: (s / INDEX_NAME).unlink(), "no index.textlock"),
    "another size": (lambda s: os.truncate(s / "00001.tar", 20_000), "00001.tar has changed"),
    "another time": (lambda s: os.utime(s / "00001.tar", (5, 5)), "00001.tar has changed"),
    "one more shard": (lambda s: shutil.copy(s / "00001.tar", s / "00009.tar"), "00009.tar is not in"),
    "one shard less": (lambda s: (s / "00001.tar").unlink(), "names 00001.tar, which is not there"),
    "cut": (lambda s: os.truncate(s / INDEX_NAME, 300), "index.textlock is damaged"),
    "something else": (lambda s: (s / INDEX_NAME).write_bytes(b"x" * 200), "is not an index"),
    "another version": (lambda s: flip(s / INDEX_NAME, 8, bit=1), "has version 3, this textlock reads version 2"),
    **{
        f"a flipped bit of {what}": (lambda s, at=at: flip(s / INDEX_NAME, at), "damaged")
        for what, at in {"shards": 12, "samples": 16, "offset": 24, "fingerprint": 40, "size": 100, "time": 105}.items()
    },
}


@pytest.mark.parametrize(("change", "message"), STALE.values(), ids=STALE)
def test_a_stale_or_damaged_index_is_refused_with_the_command_that_mends_it(change, message, shards):
    change(shards)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_index(shards)
    assert f"python -m textlock.data.shards index {shards}" in str(caught.value)
    index_shards(shards)
    open_index(shards)


@pytest.mark.parametrize("name", ["../00.tar", "/etc0.tar", "a/000.tar", "secretxyz", "a\n000.tar"])
def test_an_index_that_names_files_elsewhere_is_refused(name, shards, monkeypatch):
    scan = module.scan_shard

    def lie(path):
        entry, content = scan(path)
        return replace(entry, name=name), content

    monkeypatch.setattr(module, "scan_shard", lie)
    index_shards(shards)
    with pytest.raises(ValueError, match=r"names '.*' with 3 samples, which is no shard") as caught:
        open_index(shards)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_record_is_a_bad_sample_not_another_caption(shards):
    samples = open_index(shards).samples
    records = (shards / INDEX_NAME).stat().st_size - samples.nbytes
    flip(shards / INDEX_NAME, records + samples.dtype.fields["caption_offset"][1] + 1)
    with bad_sample("moved"):
        ShardReader(open_index(shards)).read(0)


def test_the_index_of_a_cut_tar_keeps_the_samples_before_the_cut(shards):
    member = next(member for member in members_of(shards / "00001.tar") if member.name == "000000005.jpg")
    os.truncate(shards / "00001.tar", member.offset + 10)
    report = index_shards(shards)
    assert report.samples == 3 + 2 + 1
    assert [(problem.shard, problem.kind) for problem in report.problems] == [("00001.tar", "tar-truncated")]
    assert [raw.key for raw in read_all(shards)] == [key_of(number) for number in (0, 1, 2, 3, 4, 6)]
