import os
import tarfile

import pytest

from textlock.data.captions import caption_id
from textlock.data.images import BadSample
from textlock.data.index import index_shards, open_index
from textlock.data.reader import ShardReader

from .tars import jpeg, sample, write_shards, write_tar


def reader_of(folder, members, format=tarfile.USTAR_FORMAT):
    write_tar(folder / "0.tar", members, format)
    index_shards(folder)
    return ShardReader(open_index(folder))


def kind_of(reader, number):
    with pytest.raises(BadSample) as caught:
        reader.read(number)
    return caught.value.kind


def test_samples_are_read_as_they_were_written_and_files_closed(tmp_path):
    index = open_index(write_shards(tmp_path / "shards", [3, 3, 1]))
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(index)
    for number in (6, *range(7)):
        raw, caption = reader.read(number), f"caption {number}"
        assert (raw.key, raw.image) == (f"{number:09d}", jpeg(number, 36 + number % 9))
        assert (raw.caption.decode(), raw.caption_id, reader.read_caption(number)) == (
            caption,
            caption_id(caption),
            caption,
        )
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("stem", ["n" * 150, "d" * 120 + "/" + "n" * 700, "漢字" * 20], ids=["long", "path", "unicode"])
def test_long_keys_are_found(format, stem, tmp_path):
    raw = reader_of(tmp_path, [*sample("first"), *sample(stem, seed=1)], format).read(1)
    assert (raw.key, raw.image) == (stem, jpeg(1))


def test_captions_are_read_before_and_far_from_their_image(tmp_path):
    far = ("x.bin", bytes(20_000))
    reader = reader_of(tmp_path, [("a.txt", b"before"), ("a.jpg", jpeg()), ("b.jpg", jpeg(1)), far, ("b.txt", b"far")])
    assert [reader.read(number).caption for number in range(2)] == [b"before", b"far"]


def test_what_is_not_where_the_index_says_is_a_bad_sample(tmp_path):
    reader = reader_of(
        tmp_path, [*sample("a"), *sample("b", 1), ("big.jpg", bytes(17 * 2**20)), ("big.txt", b"x"), *sample("c", 2)]
    )
    assert kind_of(reader, 2) == "too-large"
    with open(tmp_path / "0.tar", "r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(b"c")  # another key
        file.seek(content.index(b"caption of b"))
        file.write(b"Another one.")
        file.truncate(len(content.split(b"c.jpg")[0]) + 600)
    assert [kind_of(reader, number) for number in (0, 1, 3)] == ["moved", "moved", "unreadable"]
    with pytest.raises(BadSample) as caught:
        reader.read_caption(1)
    assert caught.value.kind == "moved"
