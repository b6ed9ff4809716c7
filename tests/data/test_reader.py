import os

import pytest

from textlock.data.index import open_index
from textlock.data.reader import ShardReader

from .tars import FORMATS, bad_sample, caption_of, image_of, jpeg, key_of, read_all, sample, write_shard, write_shards


def test_samples_are_read_as_they_were_written_and_files_closed(tmp_path):
    index = open_index(write_shards(tmp_path / "shards", [3, 3, 1]))
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(index)
    for number in (6, *range(7)):
        raw, caption = reader.read(number), caption_of(number)
        assert (raw.key, raw.image, raw.member) == (key_of(number), image_of(number), caption.encode())
        assert raw.captions == reader.read_captions(number) == [caption]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("stem", ["n" * 150, "d" * 120 + "/" + "n" * 700, "漢字" * 20], ids=["long", "path", "unicode"])
def test_long_keys_are_found(format, stem, tmp_path):
    raw = read_all(write_shard(tmp_path, [*sample("first"), *sample(stem, seed=1)], FORMATS[format]))[1]
    assert (raw.key, raw.image) == (stem, jpeg(1))


def test_captions_are_read_before_and_far_from_their_image(tmp_path):
    image, caption = sample("b")
    shard = write_shard(tmp_path, [*reversed(sample("a")), image, ("x.bin", bytes(20_000)), caption])
    assert [raw.captions for raw in read_all(shard)] == [["caption of a"], ["caption of b"]]


def test_the_caption_is_the_one_that_the_draw_chooses(tmp_path):
    (raw,) = read_all(write_shard(tmp_path, sample("a", txt=b"one\ntwo\n\nthree")))
    assert [raw.caption(draw) for draw in (0.0, 0.33, 0.34, 1 - 2**-53)] == [
        *((0, "one"), (0, "one")),
        *((1, "two"), (2, "three")),
    ]


def test_what_is_not_where_the_index_says_is_a_bad_sample(tmp_path):
    members = [*sample("a"), *sample("b", 1), *sample("big", jpg=bytes(17 * 2**20)), *sample("c", 2)]
    reader = ShardReader(open_index(write_shard(tmp_path, members)))
    content = bytearray((tmp_path / "0.tar").read_bytes())
    content[:1] = b"c"  # another key
    content = content.replace(b"caption of b", b"Another one.")
    (tmp_path / "0.tar").write_bytes(content[: content.rindex(b"c.jpg") + 600])
    for number, kind in enumerate(["moved", "moved", "too-large", "unreadable"]):
        with bad_sample(kind):
            reader.read(number)
    with bad_sample("moved"):
        reader.read_captions(1)
