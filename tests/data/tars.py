"""Shards and captions files for tests. Shards are written by tarfile, so that a test decides what every byte is."""

import csv
import io
import json
import tarfile
from contextlib import contextmanager
from functools import cache
from itertools import islice

import pytest

from textlock.data.images import BadSample
from textlock.data.index import index_shards, open_index
from textlock.data.reader import ShardReader
from textlock.data.tar import read_members

from .zoo import encode, photo

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@cache
def jpeg(seed=0, width=40, height=32):
    return encode(photo(width, height, seed=seed), quality=95)


def key_of(number):
    return f"{number:09d}"


def image_of(number):
    return jpeg(number, 36 + number % 9)


def caption_of(number):
    return f"caption {number}"


def sample(key, seed=0, **fields):
    """Return the members of a sample. ``fields`` are their contents by extension; None leaves one out."""
    fields = {"jpg": jpeg(seed), "txt": f"caption of {key}".encode(), **fields}
    return [(f"{key}.{extension}", content) for extension, content in fields.items() if content is not None]


def tar_bytes(members, format=tarfile.USTAR_FORMAT):
    """Return a tar of (name, content), or (name, content, type) for what is no regular file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content, *kind in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if kind:
                (info.type,) = kind
                info.linkname = "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    path.write_bytes(tar_bytes(members, format))
    return path


def write_shard(folder, members, format=tarfile.USTAR_FORMAT):
    """Write one shard of these members, with its index."""
    folder.mkdir(exist_ok=True)
    write_tar(folder / "0.tar", members, format)
    index_shards(folder)
    return folder


def write_shards(folder, sizes, changes=None, *, first=0):
    """Write shards of the given sizes with their index; keys, images and captions are those of the samples' numbers.

    Samples are numbered from ``first``. ``changes`` maps their numbers to the ``fields`` of ``sample`` that are others
    there.
    """
    folder.mkdir(exist_ok=True)
    numbers = iter(range(first, first + sum(sizes)))
    for shard, size in enumerate(sizes):
        members = []
        for number in islice(numbers, size):
            fields = {"jpg": image_of(number), "txt": caption_of(number).encode(), **(changes or {}).get(number, {})}
            members += sample(key_of(number), **fields)
        write_tar(folder / f"{shard:05d}.tar", members)
    index_shards(folder)
    return folder


def write_captions(path, rows, columns=("file", "caption")):
    """Write a captions file in the format of its suffix."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
        elif path.suffix == ".tsv":
            file.writelines("\t".join(row) + "\n" for row in (columns, *rows))
        else:
            csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([columns, *rows])
    return path


def write_dataset(folder, count=7, suffix=".tsv"):
    """Write images, half of them in a folder below, and a captions file that names them. Return the paths of both."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    names = [f"sub/{number}.jpg" if number % 2 else f"{number}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (images / name).write_bytes(jpeg(number, width=30 + number))
    rows = [(name, f"caption, number {number} é") for number, name in enumerate(names)]
    return images, write_captions(folder / f"captions{suffix}", rows, columns=("filepath", "title"))


def set_field(raw, header, at, content):
    """Write bytes at a place of the header that begins at byte ``header``, and the checksum that goes with them."""
    raw[header : header + 512] = raw[header : header + 512].ljust(512, b"\0")
    raw[header + at : header + at + len(content)] = content
    raw[header + 148 : header + 156] = b" " * 8
    raw[header + 148 : header + 156] = f"{sum(raw[header : header + 512]):06o}\0 ".encode()


def set_size(raw, header, field):
    set_field(raw, header, 124, field)


def extended_header(kind, body):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(-(-len(body) // 512) * 512, b"\0")


def flip(path, at, bit=4):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def members_of(path):
    with open(path, "rb") as file:
        return list(read_members(file))


def contents(path):
    """Return (name, content) of the files in a tar as our reader finds them."""
    raw = path.read_bytes()
    return [(member.name, raw[member.offset :][: member.size]) for member in members_of(path) if member.is_file]


def tarfile_contents(path):
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]


def read_all(shards):
    index = open_index(shards)
    reader = ShardReader(index)
    return [reader.read(number) for number in range(len(index))]


@contextmanager
def bad_sample(kind, message=None):
    """Expect a BadSample of this kind."""
    with pytest.raises(BadSample, match=message) as caught:
        yield
    assert caught.value.kind == kind
