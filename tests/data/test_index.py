import errno
import gzip
import json
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from textlock.data import freshness
from textlock.data import index as module
from textlock.data.atomic import atomic_file
from textlock.data.captions import Fields, caption_id
from textlock.data.index import INDEX_NAME, index_shards, open_index, require_fields
from textlock.data.reader import ShardReader
from textlock.data.verify import verify_shards

from .tars import (
    bad_sample,
    caption_of,
    flip,
    key_of,
    members_of,
    read_all,
    sample,
    write_shard,
    write_shards,
    write_tar,
)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", [3, 3, 1])


def test_the_index_says_where_every_sample_is(shards):
    index = open_index(shards)
    assert (len(index), index.samples_per_shard, index.samples.dtype.itemsize) == (7, [3, 3, 1], 44)
    assert index.shard_names == ["00000.tar", "00001.tar", "00002.tar"]
    assert index.shard_sizes == [(shards / name).stat().st_size for name in index.shard_names]
    assert [index.shard_of(number) for number in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    offsets = [member.offset for name in index.shard_names for member in members_of(shards / name)]
    assert index.samples[["image_offset", "caption_offset"]].tolist() == list(
        zip(offsets[::2], offsets[1::2], strict=True)
    )
    assert (index.captions, index.samples["captions"].tolist(), index.left_out) == (7, [1] * 7, [])
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
    fingerprint = open_index(shards).fingerprint
    (shards / "90000.tar").write_bytes(b"")
    (shards / "90001.tar").write_bytes(gzip.compress(b"tar"))
    write_tar(shards / "90002.tar", [("a.txt", b"text alone")])
    write_tar(shards / "90003.tar", [("a.cls", b"1"), ("a.x\x1b.pyd", b"1")])
    write_tar(shards / "90004.tar", [("a.1.jpg", b"1"), ("a.2.txt", b"1")])
    (shards / "90005.tar").symlink_to("nowhere")
    (shards / "90006.tar.gz").write_bytes(b"")
    (shards / "90007.tar.lz4").write_bytes(b"")
    (shards / "90008.TAR").write_bytes(b"")
    (shards / "more").mkdir()
    write_tar(shards / "more" / "0.tar", sample("m"))
    (shards / "notes.tart").write_bytes(b"")
    reasons = (
        "90000.tar (the file ends at byte 0 without an end marker: it was cut short)",
        "90001.tar (it is compressed with gzip: decompress it (gzip -d) and index again)",
        "90002.tar (a: the sample has a caption but no image)",
        r"90003.tar (its fields are cls, x\x1b.pyd, none of them an image)",
        "90004.tar (a: a.1.jpg is the field 1.jpg of a, which is no image, and a.1 has no caption: write other dots in "
        "names as - or _)",
    )
    report = index_shards(shards, workers=2)
    assert tuple(report.left_out[:-1]) == reasons and "is no file" in report.left_out[-1]
    kinds = ["tar-truncated", "compressed", "no-image", "dots", "unreadable"]
    kinds += ["compressed", "compressed", "name", "folder"]
    assert [problem.kind for problem in report.problems] == kinds
    assert [problem.shard for problem in report.problems[-3:]] == ["90007.tar.lz4", "90008.TAR", "more"]
    assert (report.shards, report.samples) == (3, 7)
    index = open_index(shards)
    assert (len(read_all(shards)), index.samples_per_shard) == (7, [3, 3, 1])
    assert index.left_out == [f"9000{number}.tar" for number in range(6)]
    assert index.fingerprint == fingerprint, "that of the shards that are used"
    write_tar(shards / "90000.tar", sample("mended"))
    with pytest.raises(ValueError, match=r"90000\.tar has changed since it was indexed"):
        open_index(shards)

    alone = tmp_path / "alone"
    alone.mkdir()
    (shards / "90003.tar").rename(alone / "90003.tar")
    with pytest.raises(ValueError, match=r"no shard in .* holds a sample with an image: ") as caught:
        index_shards(alone)
    said = str(caught.value)
    assert reasons[3] in said and "delete" not in said and said.isprintable()
    assert sorted(path.name for path in alone.iterdir()) == ["90003.tar"]
    (alone / "90003.tar").rename(alone / "a.tgz")
    with pytest.raises(FileNotFoundError, match=r"no \.tar shards in .*: a\.tgz is compressed and not read: decomp"):
        index_shards(alone)


STALE = {
    "no index": (lambda s: (s / INDEX_NAME).unlink(), "no index.textlock"),
    "another size": (lambda s: os.truncate(s / "00001.tar", 20_000), "00001.tar has changed"),
    "other bytes": (lambda s: flip(s / "00001.tar", -1), "00001.tar has changed"),
    "one more shard": (lambda s: shutil.copy(s / "00001.tar", s / "00009.tar"), "00009.tar is not in"),
    "one shard less": (lambda s: (s / "00001.tar").unlink(), "names 00001.tar, which is not there"),
    "cut": (lambda s: os.truncate(s / INDEX_NAME, 300), "index.textlock is damaged"),
    "something else": (lambda s: (s / INDEX_NAME).write_bytes(b"x" * 200), "is not an index"),
    "another version": (lambda s: flip(s / INDEX_NAME, 8, bit=1), "has version 2, this textlock reads version 3"),
    **{
        f"a flipped bit of {what}": (lambda s, at=at: flip(s / INDEX_NAME, at), "damaged")
        for what, at in {"shards": 12, "samples": 16, "table": 24, "fingerprint": 40, "facts": -9}.items()
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

    def lie(path, fields):
        entry, content = scan(path, fields)
        return replace(entry, name=name), content

    monkeypatch.setattr(module, "scan_shard", lie)
    index_shards(shards)
    with pytest.raises(ValueError, match=r"names '.*' with 3 samples, which is no shard") as caught:
        open_index(shards)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_record_is_a_bad_sample_not_another_caption(shards):
    samples = open_index(shards).samples
    for field in ("caption_offset", "caption_hash", "caption_field"):
        at = module._HEADER.size + samples.dtype.fields[field][1]
        flip(shards / INDEX_NAME, at)
        with bad_sample("moved"):
            ShardReader(open_index(shards)).read(0)
        flip(shards / INDEX_NAME, at)


def test_the_index_of_a_cut_tar_keeps_the_samples_before_the_cut(shards):
    member = next(member for member in members_of(shards / "00001.tar") if member.name == "000000005.jpg")
    os.truncate(shards / "00001.tar", member.offset + 10)
    report = index_shards(shards)
    assert report.samples == 3 + 2 + 1
    assert [(problem.shard, problem.kind) for problem in report.problems] == [("00001.tar", "tar-truncated")]
    assert [raw.key for raw in read_all(shards)] == [key_of(number) for number in (0, 1, 2, 3, 4, 6)]


def titled(key, captions, **fields):
    return sample(key, txt=None, json=json.dumps({"key": key, "title": captions, "width": 3}).encode(), **fields)


def test_captions_are_taken_from_the_fields_that_are_named(tmp_path):
    members = [
        *titled("a", "A title"),
        *titled("b", ["one", "two"], **{"alt.txt": b"not read"}),
        *sample("c"),
        *titled("d", [" "]),
        *sample("e", txt=None, json=b"oops"),
        *sample("f", json=b"{}"),
        (".g.jpg", b"hidden"),
        ("README", b"no dot"),
    ]
    shard = write_tar(tmp_path / "0.tar", members)
    fields = Fields(("png", "jpg"), ("json:title", "txt"))
    report = index_shards(tmp_path, fields=fields)
    counts = (report.samples, report.captions, report.with_several, report.without_caption)
    assert (counts, report.left) == ((6, 5, 1, 2), {"alt.txt": 1, "(no field)": 2})
    assert [(p.shard, p.key, p.kind, p.message) for p in report.problems] == [
        (shard.name, "e", "captions", "e.json: it is not JSON"),
    ]
    assert [raw.captions for raw in read_all(tmp_path)] == [
        *(["A title"], ["one", "two"], ["caption of c"], []),
        *([], ["caption of f"]),
    ]
    index = open_index(tmp_path)
    assert (index.fields, index.captions) == (fields, 5)
    require_fields(index, None, None)
    require_fields(index, ["png,jpg"], ["json:title", "txt"])
    wanted = (
        r"captions in json:title or txt, and not with .* captions in txt: run .* index .*tmp.* --image-fields png,jpg$"
    )
    with pytest.raises(ValueError, match=wanted.replace("tmp", str(tmp_path.name))):
        require_fields(index, None, ["txt"])
    changed = shard.read_bytes().replace(b'"A title"', b'"B title"')
    time = shard.stat().st_mtime_ns
    shard.write_bytes(changed)
    os.utime(shard, ns=(time, time))
    with bad_sample("moved"):
        ShardReader(open_index(tmp_path)).read(0)


def test_a_text_of_several_lines_may_be_one_caption(tmp_path):
    shards = write_shard(tmp_path, [*sample("a", txt=b"one\n two"), *sample("b")])
    assert read_all(shards)[0].captions == ["one", "two"]
    lines = open_index(shards).fingerprint
    report = index_shards(shards, fields=Fields(whole_text=True))
    assert (report.captions, report.with_several) == (2, 0)
    assert read_all(shards)[0].captions == ["one\n two"]
    assert open_index(shards).fingerprint != lines


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (
            [*titled("a", "A title"), *sample("b", txt=None, caption=b"x")],
            "has a caption in txt; its other fields are json (1), caption (1), and the JSON has texts under title, "
            "key. Name the one of the captions, for example --caption-fields json:title",
        ),
        (sample("a", txt=b" \n"), "has a caption in txt; it has no other fields. Name the one of the captions, for"),
        (sample("a", txt=None, json=b"[1]", cls=b"3"), "its other fields are json (1), cls (1). Name the one"),
    ],
)
def test_a_set_without_captions_is_refused_with_the_fields_it_has(members, said, tmp_path):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError) as caught:
        index_shards(tmp_path)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]
    fields = Fields(caption=("json:caption",))
    if b"title" in (tmp_path / "0.tar").read_bytes():
        with pytest.raises(
            ValueError, match=r"\(a: a\.json: its JSON has no key caption\); .* under title, key\. Name"
        ):
            index_shards(tmp_path, fields=fields)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named_with_the_way_round(number, shards, monkeypatch):
    before = (shards / INDEX_NAME).read_bytes()

    @contextmanager
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))
        yield

    monkeypatch.setattr(module, "atomic_file", refuse)
    way_round = rf"^{shards} cannot be written \({os.strerror(number)}\): name another folder for the index by --index$"
    with pytest.raises(OSError, match="No space left" if number == errno.ENOSPC else way_round):
        index_shards(shards)
    assert (shards / INDEX_NAME).read_bytes() == before


def test_two_processes_write_one_index_after_the_other(shards, tmp_path):
    """Their drafts have one name: the first must not rename what the second is writing."""
    order = []

    def write(letter):
        with atomic_file(tmp_path / "file") as file:
            order.append(letter)
            file.write(letter.encode() * 3)
            if letter == "a":
                other.start()
                other.join(0.2)
                assert order == ["a"]

    other = threading.Thread(target=write, args="b")
    write("a")
    other.join()
    assert (order, (tmp_path / "file").read_bytes()) == (["a", "b"], b"bbb")


def test_the_index_of_shards_does_not_replace_that_of_others(shards, tmp_path):
    others = write_shards(tmp_path / "others", [2])
    with pytest.raises(ValueError, match=f"{others} holds shards of its own: name another folder by --index"):
        index_shards(shards, output=others)
    index_shards(shards, output=tmp_path / "home")
    index_shards(shards, output=tmp_path / "home")
    with pytest.raises(ValueError, match=f"home holds the index of {shards}: name another folder by --index"):
        index_shards(others, output=tmp_path / "home")
    (others / "b\x1b.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the name of shard 'b\\x1b\.tar' cannot be printed: rename it"):
        index_shards(others)


def test_a_pipe_among_the_shards_is_not_waited_for(shards):
    os.mkfifo(shards / "00000a.tar")
    assert index_shards(shards).left_out == [f"00000a.tar ({shards / '00000a.tar'} is no file)"]


def test_an_index_in_another_folder_stands_for_the_shards(shards, tmp_path):
    before = open_index(shards)
    (shards / INDEX_NAME).unlink()
    shards.chmod(0o555)
    home = tmp_path / "of the index" / "x"
    index_shards(shards, output=home)
    index = open_index(home)
    assert (index.address, index.folder, index.fingerprint) == (str(shards), home, before.fingerprint)
    assert [raw.captions for raw in read_all(home)] == [[caption_of(number)] for number in range(7)]
    assert verify_shards(home, workers=2).good == 7
    with pytest.raises(ValueError, match=f"run .* index {shards} --index '{home}' --caption-fields json:x$"):
        require_fields(index, None, ["json:x"])
    shards.chmod(0o755)
    shards.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=f"is of the shards in {shards}, which is not there"):
        open_index(home)


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Return the list of the shards whose bytes are read; what is remembered for a user is in a folder of the test."""
    read = []
    sha256 = freshness._sha256
    monkeypatch.setattr(freshness, "_sha256", lambda path: read.append(path.name) or sha256(path))
    monkeypatch.setattr(freshness, "DEFAULT_CACHE_DIR", tmp_path / "cache")
    return read


def test_the_bytes_of_copied_shards_decide_and_are_read_once(shards, compared, tmp_path, caplog):
    open_index(shards)
    assert not compared
    copy = shutil.copytree(shards, tmp_path / "copy")
    for name in ("00000.tar", "00002.tar"):
        os.utime(copy / name, (5, 5))
    for _ in range(2):
        assert len(open_index(copy)) == 7
    assert sorted(compared) == ["00000.tar", "00002.tar"]
    assert "2 shards of" in caplog.text and "comparing" in caplog.text
    os.utime(copy / "00001.tar", (6, 6))
    open_index(copy)
    assert sorted(compared) == ["00000.tar", "00001.tar", "00002.tar"]
    flip(copy / "00000.tar", 3000)
    os.utime(copy / "00000.tar", (7, 7))
    with pytest.raises(ValueError, match=r"00000\.tar has changed since it was indexed: run .* index"):
        open_index(copy)


def test_what_was_compared_is_remembered_for_the_user_where_the_folder_cannot_be_written(
    shards, compared, tmp_path, monkeypatch
):
    os.utime(shards / "00000.tar", (5, 5))
    write = freshness.write_text_atomically

    def refuse(path, text):
        if path.parent == shards:
            raise PermissionError(path)
        write(path, text)

    monkeypatch.setattr(freshness, "write_text_atomically", refuse)
    for _ in range(2):
        open_index(shards)
    assert compared == ["00000.tar"]
    (shards / f"{INDEX_NAME}.times").write_text("[]")  # what is no memory is none
    for memory in (tmp_path / "cache" / "times").glob("*.json"):
        memory.unlink()
    open_index(shards)
    assert compared == ["00000.tar"] * 2
