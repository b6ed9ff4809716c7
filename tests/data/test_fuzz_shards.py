"""Tars and indices that were tampered with: nothing but the errors that callers expect, no hang, no other file.

The suite tries a few thousand; TEXTLOCK_FUZZ_INPUTS=100000 tries so many of each. A failure names its input, which is a
function of its number.
"""

import hashlib
import os
import random
import signal
import struct
import sys
import tarfile
from contextlib import contextmanager
from dataclasses import replace

import pytest

from textlock.data import freshness
from textlock.data import index as module
from textlock.data.captions import MAX_MEMBER_BYTES, Fields
from textlock.data.images import MAX_IMAGE_BYTES, BadSample
from textlock.data.index import INDEX_NAME, index_of_one_shard, index_shards, open_index
from textlock.data.reader import ShardReader
from textlock.data.tar import read_samples

from .tars import extended_header, sample, set_field, set_size, tar_bytes

INPUTS = int(os.environ.get("TEXTLOCK_FUZZ_INPUTS", "2000"))
SECONDS_AN_INPUT = 20

opened: list[str] | None = None


def note_opened(event, arguments):
    if opened is not None and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
        opened.append(arguments[0])


sys.addaudithook(note_opened)  # for good: there is no way to take one out


@contextmanager
def guarded(number, folder):
    """Fail with the number of the input at any error, after some seconds, or when a file elsewhere is opened."""
    global opened

    def stop(*arguments):
        raise TimeoutError(f"more than {SECONDS_AN_INPUT} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_AN_INPUT)
    opened = []
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"input {number}: {error!r}") from error
    finally:
        signal.alarm(0)
        paths, opened = opened, None
    outside = [path for path in paths if not os.path.realpath(path).startswith(str(folder))]
    assert not outside, f"input {number}: {outside}"


def small_sample(key, size=700):
    return sample(key, jpg=b"\xff\xd8\xff" + bytes(size), txt=b"a caption")


SEEDS = [
    tar_bytes([*small_sample("1"), *small_sample("2"), ("2.json", b"{}")]),
    tar_bytes([*small_sample("é" * 40), *small_sample("d" * 150 + "/n", 100)], tarfile.PAX_FORMAT),
    tar_bytes([*small_sample("n" * 200), *small_sample("k" * 120, 0)], tarfile.GNU_FORMAT),
    tar_bytes([("a.jpg", b"", tarfile.SYMTYPE), ("b.jpg", b"", tarfile.LNKTYPE), *small_sample("c")]),
    tar_bytes([("../a.jpg", b"x"), ("/b.txt", b"x"), *small_sample("d")], tarfile.PAX_FORMAT),
]
SIZES = [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"0" * 11 + b"\0", b"00000001000\0"]
RECORDS = [
    *(b"9 path=b\n", b"0 path=b\n", b"99999999999999999999 path=b\n", b"12 path=\0.jpg\n", b"15 path=\xff\xfe.jpg\n"),
    *(b"18 path=/etc/a.jpg\n", b"20 path=../../x.jpg\n", b"5 a=\n" * 400, b"22 GNU.sparse.major=1\n"),
    *(b"13 size=9999\n", b"11 size=-1\n", b"30 size=99999999999999999999\n"),
]


def mutate_tar(draw):
    raw = bytearray(draw.choice(SEEDS))
    for _ in range(draw.randint(1, 4)):
        at = 512 * draw.randrange(max(1, len(raw) // 512))
        match draw.randrange(11):
            case 0:  # anything, anywhere
                if raw:
                    raw[draw.randrange(len(raw))] = draw.randrange(256)
            case 1:  # in a header, with the right sum, as in the next two
                for _ in range(draw.randint(1, 3)):
                    set_field(raw, at, draw.randrange(512), bytes([draw.randrange(256)]))
            case 2:
                set_size(raw, at, draw.choice(SIZES))
            case 3:
                set_field(raw, at, 156, bytes([draw.choice(b"\x000123456789xgLKSDMNVAX")]))
            case 4:
                del raw[draw.randrange(len(raw) + 1) :]
            case 5:
                del raw[at : at + 512 * draw.randint(1, 3)]
            case 6:
                raw[at:at] = raw[at : at + 512 * draw.randint(1, 3)]
            case 7:
                raw += draw.choice(SEEDS)
            case 8:
                raw[at : at + 512] = draw.choice([bytes(512), b"\xff" * 512, draw.randbytes(512)])
            case 9:
                raw[at:at] = extended_header(draw.choice([b"x", b"g", b"L", b"K"]), draw.choice(RECORDS))
            case 10:
                end = draw.randrange(len(raw) + 1)
                raw[end:end] = draw.randbytes(draw.randint(1, 600))
    return bytes(raw)


def read_all(index, payloads):
    """Return the key of every sample, None for a bad one; the image is what the shard holds where the index says."""
    reader, keys = ShardReader(index), []
    for number, record in enumerate(index.samples):
        try:
            raw = reader.read(number)
        except BadSample:
            keys.append(None)
            continue
        shard = payloads[index.shard_names[index.shard_of(number)]]
        assert raw.image == shard[record["image_offset"] :][: record["image_size"]]
        assert len(raw.image) <= MAX_IMAGE_BYTES and len(raw.member) <= MAX_MEMBER_BYTES + 1
        keys.append(raw.key)
    return keys


def test_tampered_tars(tmp_path):
    path = tmp_path / "0.tar"
    kinds = set()
    kept = 0
    for number in range(INPUTS):
        raw = mutate_tar(random.Random(number))
        path.write_bytes(raw)
        with guarded(number, tmp_path):
            samples, problems, _ = read_samples(path, Fields())
            for found in samples:
                for member in (found.image, *found.captions.values()):
                    assert 0 <= member.offset <= member.offset + member.size <= len(raw)
                assert not found.key.startswith("/") and ".." not in found.key.split("/")
            kinds.update(problem.kind for problem in problems)
            kept += len(samples)
            if not samples:
                continue
            index = index_of_one_shard(path, samples, Fields())
            if number % 20 == 0:
                try:
                    index_shards(tmp_path)
                except ValueError as error:
                    assert "has a caption in txt" in str(error)
                    continue
                index = open_index(tmp_path)
                (tmp_path / INDEX_NAME).unlink()
            keys = read_all(index, {"0.tar": raw})
            assert keys == [found.key if found.image.size <= MAX_IMAGE_BYTES else None for found in samples]
    assert kept > INPUTS / 2, "the inputs are not so broken that nothing is reached"
    assert kinds == {
        *("tar-header", "tar-extended", "tar-size", "tar-sparse", "tar-truncated", "tar-concatenated", "tar-garbage"),
        *("link", "name", "duplicate", "no-image"),
    }


EXTREMES = [0, 1, 511, 512, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
NAMES = ["../0.tar", "/etc/0.tar", "0.tar\0", "", os.fsdecode(b"\xff.tar"), "x" * 300 + ".tar", INDEX_NAME, "1.tar"]
FACTS = [
    *(b"", b"{}", b"[]", b"3", b"[" * 100_000),
    b'{"image_fields": ["jpg"], "caption_fields": [3], "whole_text": 0, "captions": 1, "shards": null}',
    b'{"image_fields": ["jpg"], "caption_fields": ["json"], "whole_text": 0, "captions": 1, "shards": null}',
    b'{"image_fields": ["jpg"], "caption_fields": ["json:x"], "whole_text": 0, "captions": 1e999, "shards": null}',
    b'{"image_fields": ["jpg"], "caption_fields": ["json:x"], "whole_text": 0, "captions": 1, "shards": null}',
    b'{"image_fields": ["jpg"], "caption_fields": ["txt"], "whole_text": 0, "captions": 1, "shards": 3}',
]
FIELDS = {"size": EXTREMES, "samples": EXTREMES, "name": NAMES}


def mutate_index(draw, whole):
    header = bytearray(whole[: module._HEADER.size])
    samples, table_size = struct.unpack_from("<QQ", header, 16)
    size = module.SAMPLE_DTYPE.itemsize
    at = len(header) + samples * size
    records, table, facts = (
        bytearray(part) for part in (whole[len(header) : at], whole[at:][:table_size], whole[at:][table_size:])
    )
    for _ in range(draw.randint(1, 3)):
        match draw.randrange(6):
            case 0:
                part = draw.choice([header, table, records, facts])
                if part:
                    part[draw.randrange(len(part))] ^= draw.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
            case 1:
                struct.pack_into("<Q", header, draw.choice([16, 24, 32]), draw.choice(EXTREMES))
            case 2:
                entries = list(module._unpack_table(whole[at:][:table_size]))
                field, values = draw.choice(
                    [("size", EXTREMES), ("samples", EXTREMES), ("name", NAMES), ("name", NAMES)]
                )
                number = draw.randrange(len(entries))
                entries[number] = replace(entries[number], **{field: draw.choice(values)})
                table = bytearray(b"".join(entry.pack() for entry in entries))
                if draw.random() < 0.7:
                    struct.pack_into("<Q", header, 24, len(table))
            case 3:
                row = size * draw.randrange(max(1, len(records) // size))
                if row + size <= len(records):  # one of the offsets (u64), of the sizes (u32) or of the counts (u16)
                    places = [(0, "<Q"), (8, "<Q"), (16, "<I"), (20, "<I"), (40, "<H"), (42, "<H")]
                    place, format = draw.choice(places)
                    number = draw.choice(EXTREMES) % 256 ** struct.calcsize(format)
                    struct.pack_into(format, records, row + place, number)
            case 4:
                part = draw.choice([table, records, facts])
                del part[draw.randrange(len(part) + 1) :]
            case 5:
                facts = bytearray(draw.choice(FACTS))
                struct.pack_into("<Q", header, 32, len(facts))
    if draw.random() < 0.8:  # as one who wants it to be believed
        header[72:104] = bytes(32)
        header[72:104] = hashlib.sha256(header + table + facts).digest()
    return bytes(header + records + table + facts)


def test_tampered_indices(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    monkeypatch.setattr(freshness, "DEFAULT_CACHE_DIR", folder / "cache")
    payloads = {f"{number}.tar": seed for number, seed in enumerate(SEEDS)}
    for name, payload in payloads.items():
        (folder / name).write_bytes(payload)
    (tmp_path / "0.tar").write_bytes(SEEDS[0])  # outside
    index_shards(folder)
    whole = (folder / INDEX_NAME).read_bytes()
    believed = 0
    for number in range(INPUTS):
        (folder / INDEX_NAME).write_bytes(mutate_index(random.Random(number), whole))
        with guarded(number, folder):
            try:
                index = open_index(folder)
            except ValueError as error:
                assert "\n" not in str(error)
                continue
            believed += 1
            read_all(index, payloads)
    assert believed > INPUTS / 10


def test_the_guard_sees_other_files_and_errors(tmp_path):
    with pytest.raises(AssertionError, match=r"input 7: .*passwd"), guarded(7, tmp_path), open("/etc/passwd"):
        pass
    with pytest.raises(AssertionError, match="input 8: KeyError"), guarded(8, tmp_path):
        raise KeyError
