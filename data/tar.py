"""Reading tar files that nobody vouches for.

The reader is our own because it must report damage and go on, give offsets, and trust nothing: sizes are bounded by the
file, links and devices are ignored, and a name is never used as a path.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .images import IMAGE_EXTENSIONS

BLOCK = 512
_MAX_EXTENDED_HEADER = 2**20


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a shard or a sample of it. ``key`` is empty where the shard itself is meant."""

    shard: str
    key: str
    kind: str
    message: str


class DamagedTar(ValueError):
    """The tar cannot be read beyond this point."""


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def read_members(file: BinaryIO, start: int = 0) -> Iterator[TarMember]:
    """Yield the regular files of a USTAR, GNU or PAX tar in order, reading only the headers.

    Raises:
        DamagedTar: after the last good member, when the rest cannot be trusted: a wrong header checksum, a member that
            runs past the end of the file, no end marker, or data behind it.
    """
    descriptor = file.fileno()
    end = os.fstat(descriptor).st_size
    at = start
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) < BLOCK:
            raise DamagedTar(f"the file ends at byte {end} without an end marker: it was cut short")
        if header == bytes(BLOCK):
            break
        _check_header_sum(header, at)
        kind = header[156:157]
        size = _read_number(header[124:136], at)
        if kind in b"123456":  # links, devices and folders have no data, whatever their size says
            size = 0
        elif long_size is not None and kind not in b"xgLK":
            size = long_size
        offset = at + BLOCK
        if size > end - offset:
            raise DamagedTar(f"the member at byte {at} has {size} bytes but the file ends after {max(0, end - offset)}")
        if kind in b"xL":
            if size > _MAX_EXTENDED_HEADER:
                raise DamagedTar(f"the extended header at byte {at} has {size} bytes")
            body = os.pread(descriptor, size, offset)
            if kind == b"L":
                long_name = _text(body)
            else:
                name, long_size = _read_pax(body, at)
                long_name = name or long_name
        elif kind == b"S":
            raise DamagedTar(f"the member at byte {at} is sparse, which is not read")
        elif kind not in b"gK":
            name = long_name or header_name(header)
            # Tars from before POSIX mark a folder by its name alone.
            if kind in b"0\x007" and not name.endswith("/"):
                yield TarMember(name, offset, size)
            long_name = long_size = None
        at = offset + -(-size // BLOCK) * BLOCK
    _check_end(descriptor, at)


def _check_header_sum(header: bytes, at: int) -> None:
    stored = _read_number(header[148:156], at)
    blanked = header[:148] + b" " * 8 + header[156:]
    # Some old writers summed signed bytes.
    if stored not in (sum(blanked), sum(struct.unpack("512b", blanked))):
        raise DamagedTar(f"the header at byte {at} has a wrong checksum")


def _read_number(digits: bytes, at: int) -> int:
    if digits[0] == 0x80:  # GNU base 256
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0", 1)[0].strip(b" ")
    if text.strip(b"01234567"):
        raise DamagedTar(f"the header at byte {at} has the number {digits!r}")
    return int(text or b"0", 8)


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def header_name(header: bytes) -> str:
    name = _text(header[:100])
    # Only POSIX headers have a prefix there; GNU headers keep times in its place.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _read_pax(body: bytes, at: int) -> tuple[str | None, int | None]:
    name: str | None = None
    size: int | None = None
    while body.strip(b"\0"):
        digits, space, _ = body.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = body[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not (space and equals and record.endswith(b"\n")):
            raise DamagedTar(f"the extended header at byte {at} is malformed")
        value = value[:-1]
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise DamagedTar(f"the extended header at byte {at} has the size {value[:20]!r}")
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise DamagedTar(f"the member at byte {at} is sparse, which is not read")
        body = body[length:]
    return name, size


def _check_end(descriptor: int, at: int) -> None:
    while chunk := os.pread(descriptor, 2**20, at):
        if chunk.strip(b"\0"):
            raise DamagedTar(f"there is data behind the end marker at byte {at}: several tars in one file?")
        at += len(chunk)


@dataclass
class TarSample:
    """The members of one key."""

    key: str
    image: TarMember | None = None
    caption: TarMember | None = None


def split_key(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member: the path up to the first dot of the base name; what follows the last dot.

    The extension is in lower case. The key is empty for names such as ``.hidden`` or ``folder/._001.jpg``.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return "", ""
    return folder + slash + stem, extension.rpartition(".")[2].lower()


def read_samples(path: Path) -> tuple[list[TarSample], list[Problem]]:
    """Return the samples of a shard that have an image, in the order of their first member, and what is wrong with it.

    Members of a key may be adjacent or not. Of two images (or captions) with one key the first counts.
    """
    samples: dict[str, TarSample] = {}
    problems: list[Problem] = []
    with open(path, "rb", buffering=0) as file:
        try:
            for member in read_members(file):
                key, extension = split_key(member.name)
                if not key or extension not in IMAGE_EXTENSIONS | {"txt"}:
                    continue
                sample = samples.setdefault(key, TarSample(key))
                slot = "caption" if extension == "txt" else "image"
                if getattr(sample, slot) is None:
                    setattr(sample, slot, member)
                else:
                    message = f"a second {slot} with this key, {member.name}, is not used"
                    problems.append(Problem(path.name, key, "duplicate", message))
        except DamagedTar as damage:
            problems.append(Problem(path.name, "", "tar", f"{damage}; the samples before it are kept"))
    for sample in samples.values():
        if sample.image is None:
            problems.append(Problem(path.name, sample.key, "no-image", "the sample has a caption but no image"))
    return [sample for sample in samples.values() if sample.image is not None], problems
