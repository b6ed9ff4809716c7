"""Tar shards: writing, indexing, checking and reading them.

A shard is a tar file of samples in the layout of img2dataset: members that share a key (the path up to the first dot of
the base name) are one sample: an image (jpg, jpeg, png or webp) and a caption (txt). Other members are ignored.

    python -m textlock.data.shards pack --images photos --captions captions.tsv --output shards
    python -m textlock.data.shards pack --shards shards --resize 256 --quality 90 --output smaller
    python -m textlock.data.shards index shards
    python -m textlock.data.shards verify shards --output skipped.jsonl

The shards may be elsewhere, at any URL that fsspec reads, with their index beside them (``cache.py``). They are indexed
where they are files.

The index, one file beside the shards, holds 40 bytes a sample and is memory-mapped, so that opening two billion samples
takes no longer than opening two thousand. Its layout, little-endian:

    header   96 bytes: magic, version u32, shards u32, samples u64, offset of the records u64,
             fingerprint (sha256 of shard names, sizes, counts and all records), sha256 of the header and table
    table    for each shard: size u64, modification time in ns i64, samples u64, its sha256, length of the name u16,
             name
    records  for each sample: SAMPLE_DTYPE
"""

import csv
import hashlib
import json
import os
import struct
import sys
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import tyro
from PIL import Image

from .atomic import atomic_file, atomic_folder
from .cache import CachedShards, FetchError, Lease, RemoteFile, RemoteFolder, ShardCache, is_remote
from .captions import MAX_CAPTION_BYTES, caption_id, decode_caption
from .images import (
    MAX_IMAGE_BYTES,
    BadSample,
    CropWindow,
    ImageHeader,
    check_image,
    crop_and_resize,
    decode_image,
)
from .tar import BLOCK, DamagedTar, Problem, TarSample, header_name, read_members, read_samples, split_key

INDEX_NAME = "index.textlock"
SAMPLE_DTYPE = np.dtype(
    [
        ("image_offset", "<u8"),
        ("caption_offset", "<u8"),
        ("image_size", "<u4"),
        ("caption_size", "<u4"),  # 0: the sample has no caption
        ("key_hash", "<u8"),
        ("caption_hash", "<u8"),  # the bits of captions.caption_id
    ]
)
# Where copies of remote shards are kept unless the config says otherwise.
DEFAULT_CACHE_DIR = "~/.cache/textlock"
FILE_COLUMNS = ("file", "filepath", "filename")
CAPTION_COLUMNS = ("caption", "title", "text")

_MAGIC = b"TEXTLOCK"
_VERSION = 2
_HEADER = struct.Struct("<8sIIQQ32s32s")
_TABLE_ENTRY = struct.Struct("<QqQ32sH")
_MAX_U32 = 2**32 - 1
# A long name sits in extended headers before the member's own: the header blocks and a path of at most 4 KiB.
_MAX_HEADER_BLOCKS = 16
_MAX_READ_AHEAD = 4096
_OPEN_FILES = 256


def _hash_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _records(path: Path, samples: list[TarSample]) -> npt.NDArray[np.void]:
    """Return the index records of one shard, read from the tar."""
    rows = []
    with open(path, "rb", buffering=0) as file:
        for sample in samples:
            assert sample.image is not None
            caption = b""
            if sample.caption is not None:
                caption = os.pread(
                    file.fileno(), min(sample.caption.size, MAX_CAPTION_BYTES + 1), sample.caption.offset
                )
            rows.append(
                (
                    sample.image.offset,
                    sample.caption.offset if sample.caption else 0,
                    # Sizes beyond 32 bits are far over every limit: the reader refuses them by any value that large.
                    min(sample.image.size, _MAX_U32),
                    min(sample.caption.size, _MAX_U32) if sample.caption else 0,
                    _hash_key(sample.key),
                    caption_id(decode_caption(caption)) % 2**64,
                )
            )
    return np.array(rows, dtype=SAMPLE_DTYPE)


@dataclass(frozen=True)
class ShardIndex:
    """An open index: N samples in S shards, numbered from 0 in the order of shard names and of members."""

    address: str  # folder or URL
    shard_names: list[str]
    shard_sizes: list[int]  # bytes
    first_sample: npt.NDArray[np.int64]  # [S + 1]
    samples: npt.NDArray[np.void]  # [N] SAMPLE_DTYPE, memory-mapped
    fingerprint: str  # sha256, in hex: the same for equal shards wherever and whenever they are copied
    remote: CachedShards | None = None  # how the shards are opened, when they are not files in a folder

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def samples_per_shard(self) -> list[int]:
        return np.diff(self.first_sample).tolist()

    def shard_of(self, sample: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(np.searchsorted(self.first_sample, sample, side="right")) - 1


@dataclass(frozen=True)
class _TableEntry:
    name: str
    size: int
    modified_ns: int
    samples: int
    sha256: bytes

    def pack(self) -> bytes:
        name = os.fsencode(self.name)
        return _TABLE_ENTRY.pack(self.size, self.modified_ns, self.samples, self.sha256, len(name)) + name

    def hashed(self) -> bytes:
        # Without the modification time, which a copy changes.
        return os.fsencode(f"{self.name}\0{self.size}\0{self.samples}\0") + self.sha256


@dataclass(frozen=True)
class IndexReport:
    """What ``index_shards`` has found."""

    shards: int
    samples: int
    problems: list[Problem]


def list_shards(folder: Path) -> list[Path]:
    """Return the tar shards of a folder, sorted by name.

    Raises:
        FileNotFoundError: the folder does not exist or holds no .tar file.
    """
    return [folder / name for name in _shard_names(folder)]


def _shard_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name a folder of .tar shards")
    with os.scandir(folder) as entries:  # which asks nothing of each file, where there may be 150,000
        names = sorted(entry.name for entry in entries if entry.name.endswith(".tar") and entry.is_file())
    if not names:
        raise FileNotFoundError(
            f"no .tar shards in {folder}: write some with python -m textlock.data.shards pack, or name another folder"
        )
    return names


def _index_shard(path: Path) -> tuple[_TableEntry, bytes, list[Problem]]:
    """Return the table entry of one shard, its records and what is wrong with it."""
    entry, samples, problems = _read_shard(path)
    return entry, _records(path, samples).tobytes(), problems


def _read_shard(path: Path) -> tuple[_TableEntry, list[TarSample], list[Problem]]:
    status = path.stat()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    samples, problems = read_samples(path)
    return _TableEntry(path.name, status.st_size, status.st_mtime_ns, len(samples), digest), samples, problems


def index_shards(folder: Path, *, workers: int = 1) -> IndexReport:
    """Write ``folder/index.textlock`` for the shards in ``folder``, replacing an earlier index atomically.

    What is damaged in a tar, duplicate keys and captions without an image are left out; ``problems`` of the result
    names them all. ``workers`` processes read a shard each: all of its bytes, for the checksum.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a shard has no sample at all.
    """
    shards = list_shards(folder)
    table_size = sum(len(_TableEntry(path.name, 0, 0, 0, bytes(32)).pack()) for path in shards)
    records_offset = _HEADER.size + table_size
    fingerprint = hashlib.sha256()
    entries: list[_TableEntry] = []
    problems: list[Problem] = []
    empty: list[str] = []
    with atomic_file(folder / INDEX_NAME) as file, _processes(min(workers, len(shards))) as run:
        file.seek(records_offset)
        for entry, records, found in run(_index_shard, shards):
            problems += found
            if not entry.samples:
                empty.append(entry.name)
                continue
            fingerprint.update(entry.hashed())
            fingerprint.update(records)
            file.write(records)
            entries.append(entry)
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(shards)} shards in {folder} hold no sample with an image: {', '.join(empty[:5])}"
                f"{', ...' if len(empty) > 5 else ''}; delete them, or write them again"
            )
        total = sum(entry.samples for entry in entries)
        table = b"".join(entry.pack() for entry in entries)
        fields = (_MAGIC, _VERSION, len(entries), total, records_offset, fingerprint.digest())
        checksum = hashlib.sha256(_HEADER.pack(*fields, bytes(32)) + table).digest()
        file.seek(0)
        file.write(_HEADER.pack(*fields, checksum) + table)
    return IndexReport(len(entries), total, problems)


@contextmanager
def _processes(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a ``map`` over ``count`` processes; the built-in one where that is 1."""
    if count <= 1:
        yield map
        return
    # Threads may be running here, and a fork would copy their locks: a fresh process that has what it takes is forked.
    context = get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.shards"])
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        yield pool.map


def open_index(
    shards: Path | str, *, cache_dir: Path | str | None = None, cache_gb: float = 100.0, fetchers: int = 4
) -> ShardIndex:
    """Open the index of shards in a folder or below a URL; its records stay on disk, memory-mapped.

    Copies of remote shards go to ``cache_dir`` (by default ``DEFAULT_CACHE_DIR``), up to ``cache_gb`` * 10^9 bytes of
    them; ``fetchers`` threads fetch ahead what ``ShardReader.expect`` names.

    Raises:
        FileNotFoundError: there are no shards, or no index.
        ValueError: the index is damaged, or the shards have changed since it was made.
    """
    if is_remote(shards):
        cache = ShardCache(Path(cache_dir or DEFAULT_CACHE_DIR).expanduser(), round(cache_gb * 1e9))
        return _open_remote_index(RemoteFolder(str(shards)), cache, fetchers)
    folder = Path(shards)
    names = _shard_names(folder)
    path = folder / INDEX_NAME
    advice = f"run python -m textlock.data.shards index {folder}"
    if not path.is_file():
        raise FileNotFoundError(f"no {INDEX_NAME} in {folder}: {advice}")
    header, entries = _read_index(path, path, advice)
    _check_fresh(folder, names, entries, advice)
    return _map_index(str(folder), path, header, entries)


def _open_remote_index(remote: RemoteFolder, cache: ShardCache, fetchers: int) -> ShardIndex:
    where = f"{remote.url}/{INDEX_NAME}"
    advice = "index the shards where they are files and put the index beside them"
    try:
        start = remote.read_start(INDEX_NAME, _HEADER.size)
        header = _unpack_header(start, where, advice)

        def check(path: Path) -> None:
            try:
                _check_records(path, *_read_index(path, where, advice), where, advice)
            except ValueError as error:
                raise OSError(str(error)) from error

        path = cache.fetch_index(remote, INDEX_NAME, header.file_size, start, check)
    except FetchError as error:
        raise FileNotFoundError(str(error)) from error
    header, entries = _read_index(path, where, advice)
    files = [RemoteFile(entry.name, entry.size, entry.sha256) for entry in entries]
    shards = CachedShards(remote, files, cache, fetchers=fetchers)
    return _map_index(remote.url, path, header, entries, shards)


@dataclass(frozen=True)
class _Header:
    shards: int
    samples: int
    records_offset: int
    fingerprint: bytes
    checksum: bytes

    @property
    def file_size(self) -> int:
        return self.records_offset + self.samples * SAMPLE_DTYPE.itemsize

    def sum_with(self, table: bytes) -> bytes:
        fields = (_MAGIC, _VERSION, self.shards, self.samples, self.records_offset, self.fingerprint)
        return hashlib.sha256(_HEADER.pack(*fields, bytes(32)) + table).digest()


def _unpack_header(start: bytes, where: Path | str, advice: str) -> _Header:
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise ValueError(f"{where} is not an index of textlock: {advice}")
    _, version, *fields = _HEADER.unpack(start)
    if version != _VERSION:
        raise ValueError(f"{where} has version {version}, this textlock reads version {_VERSION}: {advice}")
    return _Header(*fields)


def _read_index(path: Path, where: Path | str, advice: str) -> tuple[_Header, list[_TableEntry]]:
    with open(path, "rb") as file:
        header = _unpack_header(file.read(_HEADER.size), where, advice)
        size = os.fstat(file.fileno()).st_size
        table = (
            file.read(header.records_offset - _HEADER.size) if _HEADER.size <= header.records_offset <= size else b""
        )
    if size != header.file_size or header.sum_with(table) != header.checksum:
        raise ValueError(f"{where} is damaged: {advice}")
    try:
        entries = list(_unpack_table(table))
    except struct.error as error:
        raise ValueError(f"{where} is damaged: {advice}") from error
    if len(entries) != header.shards or sum(entry.samples for entry in entries) != header.samples or not entries:
        raise ValueError(f"{where} is damaged: {advice}")
    for entry in entries:
        # A table is a stranger's too: its names are looked up beside it and nowhere else, and stand in messages.
        if "/" in entry.name or not entry.name.isprintable() or not entry.name.endswith(".tar") or not entry.samples:
            raise ValueError(f"{where} names {entry.name!r} with {entry.samples} samples, which is no shard: {advice}")
    return header, entries


def _map_index(
    address: str, path: Path, header: _Header, entries: list[_TableEntry], remote: CachedShards | None = None
) -> ShardIndex:
    counts = np.array([entry.samples for entry in entries], dtype=np.int64)
    return ShardIndex(
        address=address,
        shard_names=[entry.name for entry in entries],
        shard_sizes=[entry.size for entry in entries],
        first_sample=np.concatenate([[0], np.cumsum(counts)]),
        samples=np.memmap(path, dtype=SAMPLE_DTYPE, mode="r", offset=header.records_offset, shape=(header.samples,)),
        fingerprint=header.fingerprint.hex(),
        remote=remote,
    )


def _check_records(path: Path, header: _Header, entries: list[_TableEntry], where: str, advice: str) -> None:
    """Compare the fingerprint of an index with all of its records. Raises ValueError."""
    fingerprint = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(header.records_offset)
        for entry in entries:
            fingerprint.update(entry.hashed())
            fingerprint.update(file.read(entry.samples * SAMPLE_DTYPE.itemsize))
    if fingerprint.digest() != header.fingerprint:
        raise ValueError(f"the records in {where} are damaged: {advice}")


def _unpack_table(table: bytes) -> Iterator[_TableEntry]:
    at = 0
    while at < len(table):
        size, modified_ns, samples, sha256, length = _TABLE_ENTRY.unpack_from(table, at)
        at += _TABLE_ENTRY.size
        yield _TableEntry(os.fsdecode(table[at : at + length]), size, modified_ns, samples, sha256)
        at += length


def _check_fresh(folder: Path, names: list[str], entries: list[_TableEntry], advice: str) -> None:
    found = set(names)
    for entry in entries:
        if entry.name not in found:
            raise ValueError(f"the index names {entry.name}, which is not there: restore the shard, or {advice}")
        found.remove(entry.name)
        status = os.stat(os.path.join(folder, entry.name))
        if (status.st_size, status.st_mtime_ns) != (entry.size, entry.modified_ns):
            raise ValueError(f"{entry.name} has changed since it was indexed: {advice}")
    if found:
        raise ValueError(f"{min(found)} is not in the index: {advice}")


class _Descriptor:
    """An open file, closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@dataclass(frozen=True)
class RawSample:
    """The bytes of one sample. The caption has at most one byte more than ``decode_caption`` reads."""

    key: str
    image: bytes
    caption: bytes
    caption_id: int


class ShardReader:
    """Reads samples by number, from any number of threads, and keeps the last few hundred shards open."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._open_file = lru_cache(maxsize=_OPEN_FILES)(_Descriptor)

    def expect(self, shards: Sequence[int]) -> None:
        """Say which shards are read next, the soonest first: remote ones are fetched ahead, all others let go."""
        if self._index.remote is not None:
            self._index.remote.expect(shards)

    def close(self) -> None:
        """Stop fetching ahead."""
        if self._index.remote is not None:
            self._index.remote.close()

    def _open(self, shard: int) -> _Descriptor | Lease:
        if self._index.remote is not None:
            return self._index.remote.open(shard)
        return self._open_file(Path(self._index.address) / self._index.shard_names[shard])

    def read(self, sample: int) -> RawSample:
        """Return the bytes of a sample, as they are in the shard.

        Raises:
            BadSample: of kind too-large, unreadable (the storage fails, or the file is shorter than it was) or moved
                (another image or caption is where the index says the sample's is).
        """
        shard = self._index.shard_of(sample)
        image_offset, caption_offset, image_size, caption_size, key_hash, caption_hash = self._index.samples[
            sample
        ].item()
        if image_size > MAX_IMAGE_BYTES:
            raise BadSample("too-large", f"the image has {image_size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        caption_size = min(caption_size, MAX_CAPTION_BYTES + 1)
        image_end, caption_end = image_offset + image_size, caption_offset + caption_size
        # The header goes with the image to show whose it is; a caption that follows shortly goes with them too.
        start = image_offset - BLOCK
        together = image_end <= caption_offset <= image_end + _MAX_READ_AHEAD
        try:
            file = self._open(shard)
            block = _read_exactly(file.number, start, (caption_end if together else image_end) - start)
            if together:
                caption = block[caption_offset - start :]
            else:
                caption = _read_exactly(file.number, caption_offset, caption_size)
            key = self._key(file.number, block[:BLOCK], image_offset, key_hash)
        except (OSError, OverflowError) as error:  # the latter for an offset beyond 2^63, which an index may hold
            name = self._index.shard_names[shard]
            raise BadSample("unreadable", f"{name} cannot be read at byte {image_offset}: {error}") from error
        signed_id = caption_hash - (caption_hash >> 63 << 64)
        if caption_id(decode_caption(caption)) != signed_id:
            raise BadSample("moved", f"byte {caption_offset} does not begin the caption that was indexed there")
        return RawSample(key, block[BLOCK : image_end - start], caption, signed_id)

    def read_caption(self, sample: int) -> str:
        """Return the text of a sample's caption without reading its image; empty when there is none.

        Raises:
            BadSample: of kind unreadable or moved, as in ``read``.
        """
        shard = self._index.shard_of(sample)
        _, offset, _, size, _, caption_hash = self._index.samples[sample].item()
        try:
            caption = decode_caption(_read_exactly(self._open(shard).number, offset, min(size, MAX_CAPTION_BYTES + 1)))
        except (OSError, OverflowError) as error:
            name = self._index.shard_names[shard]
            raise BadSample("unreadable", f"{name} cannot be read at byte {offset}: {error}") from error
        if caption_id(caption) % 2**64 != caption_hash:
            raise BadSample("moved", f"byte {offset} does not begin the caption that was indexed there")
        return caption

    def _key(self, descriptor: int, header: bytes, image_offset: int, key_hash: int) -> str:
        key = split_key(header_name(header))[0]
        if _hash_key(key) == key_hash:
            return key
        # The header may hold a cut name, with the whole one in extended headers some blocks before.
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            for blocks in range(3, min(_MAX_HEADER_BLOCKS, image_offset // BLOCK) + 1):
                try:
                    member = next(read_members(file, image_offset - blocks * BLOCK), None)
                except DamagedTar:  # no header begins here
                    continue
                if member and member.offset == image_offset and _hash_key(split_key(member.name)[0]) == key_hash:
                    return split_key(member.name)[0]
        raise BadSample("moved", f"byte {image_offset} does not begin the sample that was indexed there")


def _read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    payload = os.pread(descriptor, size, offset)
    if len(payload) < size:
        raise OSError(f"only {len(payload)} of {size} bytes are there")
    return payload


@dataclass
class VerifyReport:
    """What ``verify_shards`` has found: the count of good samples, and every problem."""

    good: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify_shards(
    shards: Path | str,
    *,
    workers: int | None = None,
    on_problem: Callable[[Problem], None] | None = None,
    cache_dir: Path | str | None = None,
    cache_gb: float = 100.0,
) -> VerifyReport:
    """Read every sample of the shards in a folder or below a URL as the loader does, and compare them with their index.

    ``on_problem`` is called with each problem, shard by shard. ``workers`` is the number of processes, by default one
    for each CPU; each reads a shard. ``cache_dir`` and ``cache_gb`` are for remote shards, as in ``open_index``.

    Raises:
        FileNotFoundError: there are no shards, or remote ones without an index.
        ValueError: the index of remote shards is damaged.
    """
    report = VerifyReport()

    def add(problem: Problem) -> None:
        report.problems.append(problem)
        if on_problem:
            on_problem(problem)

    index: ShardIndex | None = None
    try:
        index = open_index(shards, cache_dir=cache_dir, cache_gb=cache_gb)
        names = index.shard_names
    except (ValueError, FileNotFoundError) as error:
        if is_remote(shards):
            raise
        names = _shard_names(Path(shards))
        add(Problem(INDEX_NAME, "", "index", str(error)))
    check = _ShardCheck(str(shards), cache_dir, cache_gb, token_hex() if index is not None else None)
    fingerprint = hashlib.sha256()
    with _processes(min(workers or os.cpu_count() or 1, len(names))) as run:
        for found in run(check, enumerate(names)):
            report.good += found.good
            fingerprint.update(found.hashed)
            for problem in found.problems:
                add(problem)
    if index is not None and index.remote is None and fingerprint.hexdigest() != index.fingerprint:
        add(
            Problem(INDEX_NAME, "", "index", "the fingerprint in the index is not that of the shards: index them again")
        )
    return report


@dataclass(frozen=True)
class _CheckedShard:
    """What a ``_ShardCheck`` has found, and the shard's share of the fingerprint."""

    good: int
    hashed: bytes
    problems: list[Problem]


@dataclass(frozen=True)
class _ShardCheck:
    """Checks one shard after the other, in a process of its own."""

    address: str
    cache_dir: Path | str | None
    cache_gb: float
    verification: str | None  # by which a process knows the index that it has opened; None without an index

    def __call__(self, numbered_name: tuple[int, str]) -> _CheckedShard:
        number, name = numbered_name
        index = _opened_index(self) if self.verification else None
        if index is not None and index.remote is not None:
            try:
                # Held while it is read, below by the name that the system has for an open file.
                lease = index.remote.open(number)
            except FetchError as error:
                return _CheckedShard(0, b"", [Problem(name, "", "unreadable", str(error))])
            path = Path(f"/proc/self/fd/{lease.number}")
        else:
            path = Path(self.address) / name
        entry, samples, problems = _read_shard(path)
        entry = replace(entry, name=name)
        problems = [replace(problem, shard=name) for problem in problems]
        records = _records(path, samples)
        if index is not None and index.remote is None:
            first, last = index.first_sample[number : number + 2]
            if not np.array_equal(index.samples[first:last], records):
                message = "the index does not say what is in this shard: index it again"
                problems.append(Problem(name, "", "index", message))
        if not entry.samples and not problems:
            problems.append(Problem(name, "", "tar-empty", "the shard holds no sample with an image"))
        alone = ShardIndex(
            address=str(path.parent),
            shard_names=[path.name],
            shard_sizes=[entry.size],
            first_sample=np.array([0, entry.samples]),
            samples=records,
            fingerprint="",
        )
        reader = ShardReader(alone)
        good = 0
        for place, sample in enumerate(samples):
            try:
                _judge(reader.read(place), sample)
                good += 1
            except BadSample as fault:
                problems.append(Problem(name, sample.key, fault.kind, str(fault), place))
        return _CheckedShard(good, entry.hashed() + records.tobytes(), problems)


@lru_cache(maxsize=1)
def _opened_index(check: _ShardCheck) -> ShardIndex:
    return open_index(check.address, cache_dir=check.cache_dir, cache_gb=check.cache_gb)


def _judge(raw: RawSample, sample: TarSample) -> None:
    """Decode a sample as the loader does. Raises BadSample."""
    if sample.caption is None:
        raise BadSample("no-caption", "the sample has no caption")
    if not decode_caption(raw.caption):
        raise BadSample("empty-caption", "the caption is empty")
    decode_image(raw.image)


@dataclass(frozen=True)
class PackReport:
    """What ``pack_shards`` has written and, with ``skip_bad``, left out."""

    shards: int
    samples: int
    skipped: list[Problem]


@dataclass(frozen=True)
class Reencoding:
    """How images are made cheaper to read: baseline JPEG, the short side at most ``short_side`` pixels."""

    short_side: int
    quality: int = 90

    def __post_init__(self) -> None:
        if self.short_side < 1 or not 1 <= self.quality <= 100:
            raise ValueError(
                f"resize is {self.short_side} and quality {self.quality}: they must be at least 1, and quality at most "
                "100"
            )

    def __call__(self, payload: bytes) -> tuple[bytes, ImageHeader]:
        """Return the image and its header; a baseline JPEG that is small enough stays as it is. Raises BadSample."""
        header = check_image(payload)
        fits = min(header.height, header.width) <= self.short_side
        if fits and header.format == "jpeg" and not _is_progressive(payload):
            return payload, header
        image = decode_image(payload)
        if not fits:
            height, width = image.shape[:2]
            scale = self.short_side / min(height, width)
            resized = torch.empty(round(height * scale), round(width * scale), 3, dtype=torch.uint8)
            crop_and_resize(image, CropWindow(0, 0, height, width), resized)
            image = resized.numpy()
        payload = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=self.quality, colorsubsampling="420")
        return payload, check_image(payload)


def _is_progressive(payload: bytes) -> bool:
    with Image.open(BytesIO(payload), formats=["jpeg"]) as image:  # reads no more than the header
        return bool(image.info.get("progressive"))


def pack_shards(
    images: Path,
    captions: Path,
    output: Path,
    *,
    samples_per_shard: int = 1000,
    skip_bad: bool = False,
    reencoding: Reencoding | None = None,
    workers: int = 1,
) -> PackReport:
    """Write the images that ``captions`` names, with their captions, as tar shards with an index in ``output``.

    Image bytes are copied as they are unless there is a ``reencoding``; ``workers`` threads read, check and re-encode.
    Each sample is ``key.jpg`` (or png, webp), ``key.txt`` and ``key.json`` with key, caption, width, height, file and
    sha256. The shards of the same input are the same bytes.

    Raises:
        FileNotFoundError: the captions file, the folder or a named image does not exist.
        ValueError: the captions file cannot be read, an image or caption is bad (unless ``skip_bad`` leaves them out),
            or ``output`` is not empty. Nothing is left behind in any of these cases.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    if not images.is_dir():
        raise FileNotFoundError(f"no folder {images}: name the folder of the images")
    with atomic_folder(output) as draft:
        samples = _load_samples(images, captions, reencoding, workers)
        report = _write_shards(samples, captions, draft, samples_per_shard, skip_bad)
        index_shards(draft)
    return report


def repack_shards(source: Path, output: Path, reencoding: Reencoding, *, workers: int = 1) -> PackReport:
    """Write the shards of ``source`` again with re-encoded images, and their index; ``workers`` processes take a shard
    each.

    Shards, keys and captions keep their names, order and bytes. Bad samples are left out: the result names them. A
    shard without a good sample is not written.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: no sample is good, or ``output`` is not empty.
    """
    shards = list_shards(source)
    skipped: list[Problem] = []
    with atomic_folder(output) as draft:
        with _processes(min(workers, len(shards))) as run:
            for problems in run(_ShardRepacking(draft, reencoding), shards):
                skipped += problems
        if not any(draft.iterdir()):
            raise ValueError(f"{source} holds no good sample: there is nothing to pack")
        report = index_shards(draft, workers=workers)
    return PackReport(report.shards, report.samples, skipped)


@dataclass(frozen=True)
class _ShardRepacking:
    output: Path
    reencoding: Reencoding

    def __call__(self, path: Path) -> list[Problem]:
        samples, problems = read_samples(path)
        draft = self.output / path.name
        written = 0
        with (
            open(path, "rb", buffering=0) as source,
            tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for place, sample in enumerate(samples):
                try:
                    self._copy(source.fileno(), sample, tar)
                    written += 1
                except BadSample as fault:
                    problems.append(Problem(path.name, sample.key, fault.kind, str(fault), place))
        if not written:
            draft.unlink()
        return problems

    def _copy(self, descriptor: int, sample: TarSample, tar: tarfile.TarFile) -> None:
        assert sample.image is not None
        if sample.image.size > MAX_IMAGE_BYTES:
            raise BadSample("too-large", f"the image has {sample.image.size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        if sample.caption is None:
            raise BadSample("no-caption", "the sample has no caption")
        try:
            size = min(sample.caption.size, MAX_CAPTION_BYTES + 1)
            caption = _read_exactly(descriptor, sample.caption.offset, size)
            payload = _read_exactly(descriptor, sample.image.offset, sample.image.size)
        except OSError as error:
            raise BadSample("unreadable", str(error)) from error
        if not decode_caption(caption):
            raise BadSample("empty-caption", "the caption is empty")
        payload, header = self.reencoding(payload)
        _add_member(tar, f"{sample.key}.{_extension(header)}", payload)
        _add_member(tar, f"{sample.key}.txt", caption)


@dataclass(frozen=True)
class _Loaded:
    """An image that ``captions`` names, or why it cannot be packed."""

    line: int
    name: str
    caption: str
    image: tuple[bytes, ImageHeader] | BadSample


def _load_samples(images: Path, captions: Path, reencoding: Reencoding | None, workers: int) -> Iterator[_Loaded]:
    """Yield what ``captions`` names in its order; ``workers`` threads are a few images ahead."""

    def load(line: int, name: str, caption: str, path: Path) -> _Loaded:
        try:
            payload, header = _load_image(path)
            return _Loaded(line, name, caption, reencoding(payload) if reencoding else (payload, header))
        except BadSample as fault:
            return _Loaded(line, name, caption, fault)

    pending: deque[Future[_Loaded]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for line, name, caption in read_captions(captions):
            path = _image_path(images, name, f"{captions} line {line}")
            pending.append(pool.submit(load, line, name, caption, path))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_shards(
    samples: Iterator[_Loaded], captions: Path, folder: Path, samples_per_shard: int, skip_bad: bool
) -> PackReport:
    digits = max(4, len(str(samples_per_shard - 1)))
    skipped: list[Problem] = []
    written = 0
    tar: tarfile.TarFile | None = None
    try:
        for sample in samples:
            fault = sample.image if isinstance(sample.image, BadSample) else None
            if fault is None and not sample.caption.strip():
                fault = BadSample("empty-caption", "the caption is empty")
            if fault is not None:
                if not skip_bad:
                    raise ValueError(
                        f"{captions} line {sample.line}: {sample.name}: {fault}; mend it, or leave such samples out "
                        "with --skip-bad"
                    ) from fault
                skipped.append(Problem(captions.name, sample.name, fault.kind, str(fault)))
                continue
            shard, place = divmod(written, samples_per_shard)
            if place == 0:
                _close_shard(tar)
                # USTAR and fixed times and owners: equal input gives equal bytes.
                tar = tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            assert tar is not None and not isinstance(sample.image, BadSample)
            _add_sample(tar, f"{shard:05d}{place:0{digits}d}", sample.name, *sample.image, sample.caption)
            written += 1
        _close_shard(tar)
        tar = None
    finally:
        if tar is not None:
            tar.close()
    if not written:
        raise ValueError(f"{captions} names no usable image: there is nothing to pack")
    return PackReport(-(-written // samples_per_shard), written, skipped)


def _image_path(images: Path, name: str, where: str) -> Path:
    path = Path(os.path.normpath(images / name))
    if not path.is_relative_to(os.path.normpath(images)):
        raise ValueError(f"{where}: {name} is outside {images}: name files inside that folder")
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no image {path}")
    return path


def _load_image(path: Path) -> tuple[bytes, ImageHeader]:
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise BadSample("too-large", f"the image has {path.stat().st_size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
    payload = path.read_bytes()
    return payload, check_image(payload)


def _add_sample(tar: tarfile.TarFile, key: str, name: str, payload: bytes, header: ImageHeader, caption: str) -> None:
    facts = {
        "key": key,
        "caption": caption,
        "width": header.width,
        "height": header.height,
        "file": name,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    _add_member(tar, f"{key}.{_extension(header)}", payload)
    _add_member(tar, f"{key}.txt", caption.encode("utf-8", "replace"))
    _add_member(tar, f"{key}.json", json.dumps(facts).encode())


def _extension(header: ImageHeader) -> str:
    return "jpg" if header.format == "jpeg" else header.format


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def _close_shard(tar: tarfile.TarFile | None) -> None:
    if tar is None:
        return
    tar.close()


def read_captions(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, file, caption) of a captions file: .tsv or .csv with a header line, or .jsonl.

    The file's column is called file, filepath or filename; the caption's caption, title or text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another extension, no such columns, or a line that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no captions file {path}")
    readers: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".tsv": _read_table,
        ".csv": _read_table,
        ".jsonl": _read_json_lines,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: the captions file must be .tsv, .csv or .jsonl")
    try:
        for line, row in reader(path):
            file_column = _column(row, FILE_COLUMNS, f"{path} line {line}")
            caption_column = _column(row, CAPTION_COLUMNS, f"{path} line {line}")
            name, caption = row[file_column], row[caption_column]
            if not isinstance(name, str) or not isinstance(caption, str) or not name:
                raise ValueError(f"{path} line {line}: {file_column} and {caption_column} must both hold text")
            yield line, name, caption
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _column(row: dict[str, Any], accepted: tuple[str, ...], where: str) -> str:
    for column in accepted:
        if column in row:
            return column
    seen = ", ".join(str(name) for name in row if name is not None)
    raise ValueError(f"{where}: no column {', '.join(accepted[:-1])} or {accepted[-1]}; the columns are: {seen}")


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path} line {reader.line_num}: it does not have the {len(reader.fieldnames or [])} columns "
                        "of the header line"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            # The line after the last good row: an open quotation mark is only noticed at the end of the file.
            line = reader.line_num + 1
            raise ValueError(f"{path} line {line}: {error}; quote the caption, or use .jsonl") from error


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is not a JSON object")
            yield number, row


def _show(problem: Problem) -> None:
    line = "\t".join([problem.shard, problem.key or "-", problem.kind, problem.message])
    # Keys come from strangers: what is not printable could forge a line or steer the terminal.
    print("".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line))


def _pack(
    output: Path,
    images: Path | None = None,
    captions: Path | None = None,
    shards: Path | None = None,
    samples_per_shard: int = 1000,
    skip_bad: bool = False,
    resize: int | None = None,
    quality: int = 90,
    workers: int | None = None,
) -> None:
    """Write a folder of images and a captions file, or other shards, as tar shards with an index.

    Args:
        output: New folder for the shards.
        images: Folder of the images.
        captions: .tsv or .csv with a header line, or .jsonl; with a column file, filepath or filename (inside the
            folder of the images) and a column caption, title or text.
        shards: Folder of shards to write again with --resize, instead of images and captions; bad samples are left out.
        samples_per_shard: Samples in each shard; the last may have fewer.
        skip_bad: Leave out images that are no JPEG, PNG or WebP and empty captions, instead of stopping at the first.
        resize: Re-encode as baseline JPEG whose short side has at most so many pixels; smaller ones are not enlarged.
        quality: Of those JPEGs, 1 to 100.
        workers: Threads, or for shards processes; by default one for each CPU.
    """
    reencoding = Reencoding(resize, quality) if resize is not None else None
    workers = workers or os.cpu_count() or 1
    if shards is not None and images is None and captions is None and reencoding is not None:
        report = repack_shards(shards, output, reencoding, workers=workers)
    elif shards is None and images is not None and captions is not None:
        report = pack_shards(
            images,
            captions,
            output,
            samples_per_shard=samples_per_shard,
            skip_bad=skip_bad,
            reencoding=reencoding,
            workers=workers,
        )
    else:
        raise ValueError("name --images and --captions, or --shards with --resize")
    for problem in report.skipped:
        _show(problem)
    print(f"{report.samples} samples in {report.shards} shards in {output}; {len(report.skipped)} left out")


def _index(folder: tyro.conf.Positional[Path], workers: int | None = None) -> None:
    """Write the index of a folder of tar shards.

    Args:
        folder: Folder of .tar shards.
        workers: Processes, which read a shard each; by default one for each CPU.
    """
    report = index_shards(folder, workers=workers or os.cpu_count() or 1)
    for problem in report.problems:
        _show(problem)
    print(f"{report.samples} samples in {report.shards} shards; {len(report.problems)} problems")


def _verify(
    shards: tyro.conf.Positional[str],
    output: Path | None = None,
    workers: int | None = None,
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
) -> None:
    """Read a set of shards as the loader would and list what it will skip; exit status 1 when there is anything.

    Args:
        shards: Folder of .tar shards, or its URL.
        output: File for the list, one JSON object a line: shard, key, kind, message, place.
        workers: Processes, which read a shard each; by default one for each CPU.
        cache_dir: Folder for copies of remote shards.
        cache_gb: Room for them there, in 10^9 bytes.
    """
    arguments: dict[str, Any] = {"workers": workers, "cache_dir": cache_dir, "cache_gb": cache_gb}
    if output is None:
        report = verify_shards(shards, on_problem=_show, **arguments)
    else:
        with atomic_file(output) as file:

            def record(problem: Problem) -> None:
                _show(problem)
                file.write(json.dumps(asdict(problem)).encode() + b"\n")

            report = verify_shards(shards, on_problem=record, **arguments)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(p.kind for p in report.problems).most_common())
    print(f"{report.good} good samples; {len(report.problems)} problems{kinds and ': '}{kinds}")
    if report.problems:
        raise SystemExit(1)


def main() -> None:
    """Run the command line."""
    try:
        tyro.extras.subcommand_cli_from_dict({"pack": _pack, "index": _index, "verify": _verify})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
