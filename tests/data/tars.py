"""Tar shards for tests: written by tarfile, member by member, so that a test decides what every byte is."""

import io
import tarfile
from itertools import islice

from textlock.data.index import index_shards
from textlock.data.tar import read_members

from .zoo import encode, photo

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def jpeg(seed=0, width=40, height=32):
    return encode(photo(width, height, seed=seed), quality=95)


def sample(key, seed=0):
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", f"caption of {key}".encode())]


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


def set_checksum(raw, at):
    """Give the header at byte ``at`` of a bytearray the checksum of its content."""
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = f"{sum(raw[at : at + 512]):06o}\0 ".encode()


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


def write_shards(folder, sizes, bad=None):
    """Write shards of the given sizes with their index; keys and captions count the samples.

    ``bad`` maps sample numbers to the (image, caption) that replace good ones; None leaves that member out.
    """
    folder.mkdir(exist_ok=True)
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        members = []
        for number in islice(numbers, size):
            image, caption = (bad or {}).get(number, (jpeg(number, 36 + number % 9), f"caption {number}".encode()))
            members += [(f"{number:09d}.{suffix}", content) for suffix, content in (("jpg", image), ("txt", caption))]
        write_tar(folder / f"{shard:05d}.tar", [member for member in members if member[1] is not None])
    index_shards(folder)
    return folder
