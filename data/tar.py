"""Reads untrusted or damaged tar files.

Sizes are bounded by the file, links and devices are ignored, and a name is never used as a path. Damage is reported and
the samples around it are kept. ``tarfile.open(ignore_zeros=True)`` goes on after a damaged header too, but ends at a
size larger than the file, says nothing of what it skips, does not notice a file cut between two members, and takes
1.7 to 2.6 times as long for 15,000 members.

What may be wrong with a shard is counted by these kinds:

    tar-header        a header with a wrong checksum or number, or that is cut: reading goes on at the next header
    tar-extended      a PAX or GNU header that cannot be read: reading goes on at the next header
    tar-size          a member said to be longer than the file: reading goes on at the next header
    tar-sparse        a sparse member: it is left out
    tar-truncated     no end marker: the file was cut short
    tar-concatenated  a second archive after the end marker of the first: it is read too
    tar-garbage       bytes after the end marker that are no archive
    link              an image or caption that is a link, a device or a folder
    name              an image or caption whose name is absolute or climbs with ``..``
    duplicate         a second image with one key, or a second member of one name: the first counts
    no-image          captions without an image
    dots              an image whose name has dots besides that of its extension, without a caption of such a name
    captions          the member of the captions cannot be read: it is no JSON, or has no such key
    compressed        the shard is compressed or another kind of archive, which is not read at random
    unreadable        the shard cannot be read at all
    tar-empty         no sample with an image at all
"""

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .captions import Fields

BLOCK = 512
NO_FIELD = "(no field)"
# How files begin that are mistaken for tars, and what undoes it.
_OTHER_ARCHIVES = {
    b"\x1f\x8b": "it is compressed with gzip: decompress it (gzip -d)",
    b"BZh": "it is compressed with bzip2: decompress it (bzip2 -d)",
    b"\xfd7zXZ\0": "it is compressed with xz: decompress it (xz -d)",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: decompress it (zstd -d)",
    b"PK\x03\x04": "it is a zip archive: write its files as a tar",
}
_MAX_EXTENDED_HEADER = 2**20
_MAX_DAMAGES = 100
_SCAN_BYTES = 2**20
# Links, devices and folders have no data, whatever their size says.
_KINDS_WITHOUT_DATA = b"123456"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a shard or a sample of it. ``key`` is empty where the shard itself is meant."""

    shard: str
    key: str
    kind: str
    message: str
    place: int | None = None  # of a sample that the index counts: its place in its shard, from 0


class DamagedTar(ValueError):
    """A part of a tar that cannot be read. ``kind`` is one of those above; ``resume`` is the byte to go on from."""

    def __init__(self, kind: str, message: str, resume: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.resume = resume


@dataclass(frozen=True)
class TarMember:
    """A member of a tar: its name, and where its bytes are. ``is_file`` is False for a link, a device or a folder."""

    name: str
    offset: int
    size: int
    is_file: bool = True


def read_members(
    file: BinaryIO, start: int = 0, *, on_damage: Callable[[DamagedTar], None] | None = None
) -> Iterator[TarMember]:
    """Yield the members of a USTAR, GNU or PAX tar in order, reading only the headers.

    ``on_damage`` is called at every damaged part, and reading goes on at the next header after it; after a hundred
    damaged parts the rest of the file is not read.

    Raises:
        DamagedTar: at the first damaged part, when there is no ``on_damage``.
    """
    descriptor = file.fileno()
    at: int | None = start
    damages = 0
    while at is not None:
        try:
            yield from _read_archive(descriptor, at)
            return
        except DamagedTar as damage:
            if on_damage is None:
                raise
            damages += 1
            on_damage(damage)
            resume = damage.resume
        if damages == _MAX_DAMAGES:
            on_damage(DamagedTar("tar-header", f"{_MAX_DAMAGES} places are damaged: the rest is not read", resume))
            return
        at = _find_header(descriptor, resume)


def _read_archive(descriptor: int, at: int) -> Iterator[TarMember]:
    end = os.fstat(descriptor).st_size
    long_name: str | None = None
    long_size: int | None = None
    sparse = False
    while True:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) < BLOCK:
            raise DamagedTar(
                "tar-truncated", f"the file ends at byte {end} without an end marker: it was cut short", end
            )
        if header == bytes(BLOCK):
            break
        _check_header_sum(header, at)
        kind = header[156:157]
        size = _read_number(header[124:136], at)
        if kind in _KINDS_WITHOUT_DATA:
            size = 0
        elif long_size is not None and kind not in b"xgLK":
            size = long_size
        offset = at + BLOCK
        if size > end - offset:
            what = "tar-truncated" if _find_header(descriptor, offset) is None else "tar-size"
            message = f"the member at byte {at} has {size} bytes but the file ends after {max(0, end - offset)}"
            raise DamagedTar(what, message, offset)
        if kind in b"xL":
            if size > _MAX_EXTENDED_HEADER:
                raise DamagedTar("tar-extended", f"the extended header at byte {at} has {size} bytes", offset)
            body = os.pread(descriptor, size, offset)
            if kind == b"L":
                long_name = _text(body)
            else:
                name, long_size, sparse = _read_pax(body, at)
                long_name = name or long_name
        elif kind == b"S" or (sparse and kind not in b"gK"):
            # What it holds is passed over: it may be a tar itself.
            after = _end_of_sparse_headers(descriptor, header, kind, offset) + -(-size // BLOCK) * BLOCK
            raise DamagedTar("tar-sparse", f"the member at byte {at} is sparse, which is not read", after)
        elif kind not in b"gK":
            name = long_name or header_name(header)
            # Tars from before POSIX mark a folder by its name alone.
            is_file = kind not in _KINDS_WITHOUT_DATA and not name.endswith("/")
            yield TarMember(name, offset, size, is_file)
            long_name = long_size = None
        at = offset + -(-size // BLOCK) * BLOCK
    _check_end(descriptor, at)


def _end_of_sparse_headers(descriptor: int, header: bytes, kind: bytes, at: int) -> int:
    """Return where the data of a sparse member begins: GNU's old format has further headers, each marked by a byte."""
    more = kind == b"S" and header[482:483] == b"\1"
    while more:
        block = os.pread(descriptor, BLOCK, at)
        at += BLOCK
        more = block[504:505] == b"\1"
    return at


def _find_header(descriptor: int, at: int) -> int | None:
    """Return where the next header with the mark of POSIX or GNU and the right checksum is, a multiple of BLOCK on."""
    while chunk := os.pread(descriptor, _SCAN_BYTES, at):
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar":
                try:
                    _check_header_sum(chunk[start : start + BLOCK], at + start)
                except DamagedTar:
                    continue
                return at + start
        if len(chunk) < BLOCK:
            return None
        at += len(chunk) // BLOCK * BLOCK
    return None


def _check_header_sum(header: bytes, at: int) -> None:
    stored = _read_number(header[148:156], at)
    blanked = header[:148] + b" " * 8 + header[156:]
    # Some old writers summed signed bytes.
    if stored not in (sum(blanked), sum(struct.unpack("512b", blanked))):
        raise DamagedTar("tar-header", f"the header at byte {at} has a wrong checksum", at + BLOCK)


def _read_number(digits: bytes, at: int) -> int:
    if digits[0] == 0x80:  # GNU base 256
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0", 1)[0].strip(b" ")
    if text.strip(b"01234567"):
        raise DamagedTar("tar-header", f"the header at byte {at} has the number {digits!r}", at + BLOCK)
    return int(text or b"0", 8)


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def header_name(header: bytes) -> str:
    """Return the name in a 512-byte header, which a long one may be cut to."""
    name = _text(header[:100])
    # Only POSIX headers have a prefix there; GNU headers keep times in its place.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _read_pax(body: bytes, at: int) -> tuple[str | None, int | None, bool]:
    """Return the path and size that the records ``length key=value`` give, and whether they say the file is sparse."""
    sparse = False
    name: str | None = None
    size: int | None = None
    resume = at + BLOCK
    end = len(body.rstrip(b"\0"))
    start = 0
    while start < end:
        # The length counts itself, the space and the newline; 2^20 has seven digits.
        digits, space, _ = body[start : start + 8].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = body[start + len(digits) + 1 : start + length].partition(b"=")
        if not (space and equals and value.endswith(b"\n")):
            raise DamagedTar("tar-extended", f"the extended header at byte {at} is malformed", resume)
        value = value[:-1]
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                message = f"the extended header at byte {at} has the size {value[:20]!r}"
                raise DamagedTar("tar-extended", message, resume)
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            sparse = True
        start += length
    return name, size, sparse


def _check_end(descriptor: int, at: int) -> None:
    while chunk := os.pread(descriptor, _SCAN_BYTES, at):
        if chunk.strip(b"\0"):
            following = _find_header(descriptor, at)
            if following is None:
                end = os.fstat(descriptor).st_size
                raise DamagedTar(
                    "tar-garbage", f"there is no archive in the data after the end marker at byte {at}", end
                )
            message = f"there is data after the end marker at byte {at}: several tars in one file?"
            raise DamagedTar("tar-concatenated", message, following)
        at += len(chunk)


@dataclass
class TarSample:
    """The members of one key that are read, by the place of their field in `Fields`."""

    key: str
    images: dict[int, TarMember] = field(default_factory=dict)
    captions: dict[int, TarMember] = field(default_factory=dict)

    @property
    def image(self) -> TarMember:
        """The image of a sample that has one: the first of the fields counts."""
        return self.images[min(self.images)]

    @property
    def start(self) -> int:
        """Where the first of its members begins."""
        return min(member.offset for members in (self.images, self.captions) for member in members.values())


class ShardContent(NamedTuple):
    """What a shard holds."""

    samples: list[TarSample]
    """Those with an image, in the order of their first member."""
    problems: list[Problem]
    left: Counter[str]
    """How many members have each of the fields that are not read, or no field: names with no dot or one in front."""


def printable(text: str) -> str:
    """Return a name from a shard for a message: a character that is not printable could forge a line of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def split_key(name: str) -> tuple[str, str]:
    """Return (key, field) of a member as webdataset does: the path up to the first dot of the base name; what follows.

    ``000.depth.png`` is the field depth.png of 000. The field is in lower case. The key is empty for names such as
    ``.hidden`` or ``folder/._001.jpg``.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, field = base.partition(".")
    if not stem or not dot:
        return "", ""
    return folder + slash + stem, field.lower()


def keys_of(name: str) -> Iterator[str]:
    """Yield the keys that a member may have, the one of ``split_key`` first: its path up to each of the dots."""
    folder, slash, base = name.rpartition("/")
    dot = base.find(".")
    while dot > 0:
        yield folder + slash + base[:dot]
        dot = base.find(".", dot + 1)


def read_samples(path: Path, fields: Fields) -> ShardContent:
    """Read the samples of a shard: which members its ``fields`` name, not what is in them.

    Members of a key may be adjacent or not, and in any order. Where no member of a key is an image, but names with more
    dots (``cat.1.jpg``, ``cat.1.txt``) are pairs of image and caption, each of these pairs is a sample.

    Raises:
        OSError: the shard cannot be read, or is no file.
    """
    if not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path} is no file")
    with open(path, "rb", buffering=0) as file:
        grouping = _Grouping(path.name, fields)
        start = file.read(BLOCK)
        for magic, advice in _OTHER_ARCHIVES.items():
            if start.startswith(magic) and start[257:262] != b"ustar":
                grouping.add("", "compressed", f"{advice} and index again")
                return grouping.content()
        for member in read_members(file, on_damage=lambda damage: grouping.add("", damage.kind, str(damage))):
            grouping.take(member)
    return grouping.content()


class _Grouping:
    """Joins the members of a shard to samples."""

    def __init__(self, shard: str, fields: Fields) -> None:
        self._shard = shard
        self._samples: dict[str, TarSample] = {}
        self._problems: list[Problem] = []
        self._left: Counter[str] = Counter()
        self._dotted: dict[str, list[TarMember]] = {}  # by key, of those left: what ends like an image or a caption
        self._image_places = {name: place for place, name in enumerate(fields.image)}
        self._caption_places: dict[str, list[int]] = {}  # several keys of one JSON object may be named
        for place, name in enumerate(fields.caption):
            self._caption_places.setdefault(name.partition(":")[0], []).append(place)

    def add(self, key: str, kind: str, message: str) -> None:
        """Note a problem."""
        self._problems.append(Problem(self._shard, key, kind, message))

    def _is_read(self, field: str) -> bool:
        return field in self._image_places or field in self._caption_places

    def take(self, member: TarMember) -> None:
        """Join a member to the sample of its key, or leave it."""
        key, field = split_key(member.name)
        if not self._is_read(field):
            if member.is_file:
                self._left[field or NO_FIELD] += 1
                if key and self._is_read(field.rpartition(".")[2]):
                    self._dotted.setdefault(key, []).append(member)
        elif self._may_be_read(key, member):
            self._join(self._samples, key, field, member)

    def _may_be_read(self, key: str, member: TarMember) -> bool:
        # The reader opens no path from a name, but a user may unpack the shard or name files by keys.
        # A byte that is no UTF-8 is written \xe9 in a name, which is no separator.
        if re.match(r"/|\\(?!x[0-9a-f]{2})", member.name) or ".." in re.split(r"[/\\]", member.name):
            self.add(key, "name", f"the name {member.name} leads out of its folder")
        elif not member.is_file:
            self.add(key, "link", f"{member.name} is a link, a device or a folder, which is not followed")
        else:
            return True
        return False

    def _join(self, samples: dict[str, TarSample], key: str, field: str, member: TarMember) -> None:
        sample = samples.setdefault(key, TarSample(key))
        known, places = sample.captions, self._caption_places.get(field, [])
        if field in self._image_places:
            known, places = sample.images, [self._image_places[field]]
        if places[0] in known:
            self.add(key, "duplicate", f"a second member {member.name} is not used")
        else:
            known |= dict.fromkeys(places, member)

    def content(self) -> ShardContent:
        """Return the samples of all members taken, and what is wrong with them."""
        for key, members in self._dotted.items():
            if key not in self._samples or not self._samples[key].images:
                self._pair(key, members)
        for sample in self._samples.values():
            if not sample.images:
                if sample.key not in self._dotted:
                    self.add(sample.key, "no-image", "the sample has a caption but no image")
            elif len(sample.images) > 1:
                others = " and ".join(other.name for other in sample.images.values() if other is not sample.image)
                self.add(sample.key, "duplicate", f"its image is {sample.image.name}; {others} is not used")
        found = [sample for sample in self._samples.values() if sample.images]
        return ShardContent(sorted(found, key=lambda sample: sample.start), self._problems, self._left)

    def _pair(self, key: str, members: list[TarMember]) -> None:
        """Make samples of the members of a key that has no image, by names up to a later dot."""
        pairs: dict[str, TarSample] = {}
        for member in members:
            for stem in islice(keys_of(member.name), 1, None):  # the longest field first
                field = member.name[len(stem) + 1 :].lower()
                if self._is_read(field):
                    if self._may_be_read(stem, member):
                        self._join(pairs, stem, field, member)
                    break
        for stem, pair in pairs.items():
            if pair.images and pair.captions:
                self._samples[stem] = pair
                for member in {*pair.images.values(), *pair.captions.values()}:
                    self._left[split_key(member.name)[1]] -= 1
            elif pair.images:
                name = pair.image.name
                said = f"{name} is the field {split_key(name)[1]} of {key}, which is no image"
                self.add(key, "dots", f"{said}, and {stem} has no caption: write other dots in names as - or _")
        self._left += Counter()  # drops what is all used
