"""The index of tar shards: one file in their folder that says where each sample is.

A shard is a tar file of samples in the layout of img2dataset and webdataset: members that share a key (the path up to
the first dot of the base name) are one sample; what follows is the field. The fields jpg, jpeg, png and webp are its
image, txt is its caption. Members of other fields are left, and counted.

The index holds 40 bytes a sample and is memory-mapped, so that opening two billion samples takes no longer than opening
two thousand. Its layout, little-endian:

    header   96 bytes: magic, version u32, shards u32, samples u64, offset of the records u64,
             fingerprint (sha256 of shard names, sizes, counts and all records), sha256 of the header and table
    table    for each shard: size u64, modification time in ns i64, samples u64, its sha256, length of the name u16,
             name
    records  for each sample: SAMPLE_DTYPE

Shards at a URL have their index there too: it is written while they are in a folder, and ``cache.py`` fetches it.
"""

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .atomic import atomic_file
from .cache import CachedShards, FetchError, RemoteFile, RemoteFolder, ShardCache, is_remote
from .captions import MAX_CAPTION_BYTES, caption_id, decode_caption
from .processes import map_in_processes
from .tar import Problem, ShardContent, TarSample, printable, read_samples

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

_MAGIC = b"TEXTLOCK"
_VERSION = 2
_HEADER = struct.Struct("<8sIIQQ32s32s")
_TABLE_ENTRY = struct.Struct("<QqQ32sH")
_MAX_U32 = 2**32 - 1


def hash_key(key: str) -> int:
    """Return the ``key_hash`` of a key: 64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


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
class ShardEntry:
    """A shard in the table of an index."""

    name: str
    size: int
    modified_ns: int
    samples: int
    sha256: bytes

    def pack(self) -> bytes:
        name = os.fsencode(self.name)
        return _TABLE_ENTRY.pack(self.size, self.modified_ns, self.samples, self.sha256, len(name)) + name

    def hashed(self) -> bytes:
        """Return what goes into the fingerprint: all but the modification time, which a copy changes."""
        return os.fsencode(f"{self.name}\0{self.size}\0{self.samples}\0") + self.sha256


@dataclass(frozen=True)
class _Header:
    shards: int
    samples: int
    records_offset: int
    fingerprint: bytes

    @property
    def file_size(self) -> int:
        return self.records_offset + self.samples * SAMPLE_DTYPE.itemsize

    def pack(self, table: bytes) -> bytes:
        """Return the header that goes before ``table``, with the checksum of both."""
        fields = (_MAGIC, _VERSION, self.shards, self.samples, self.records_offset, self.fingerprint)
        return _HEADER.pack(*fields, hashlib.sha256(_HEADER.pack(*fields, bytes(32)) + table).digest())


@dataclass(frozen=True)
class IndexReport:
    """What ``index_shards`` found."""

    shards: int
    samples: int
    problems: list[Problem]
    left: Counter[str]
    """How many members have each of the fields that are not read."""


def list_shards(folder: Path) -> list[Path]:
    """Return the tar shards of a folder, sorted by name.

    Raises:
        FileNotFoundError: the folder does not exist or holds no .tar file.
    """
    return [folder / name for name in shard_names(folder)]


def shard_names(folder: Path) -> list[str]:
    """Return the file names of the tar shards of a folder, sorted. Raises FileNotFoundError as ``list_shards`` does."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name a folder of .tar shards")
    with os.scandir(folder) as entries:  # no stat of each file, of which there may be 150,000
        names = sorted(entry.name for entry in entries if entry.name.endswith(".tar") and entry.is_file())
    if not names:
        raise FileNotFoundError(
            f"no .tar shards in {folder}: write some with python -m textlock.data.shards pack, or name another folder"
        )
    return names


def scan_shard(path: Path) -> tuple[ShardEntry, ShardContent]:
    """Return the table entry of one shard and what it holds, from all of its bytes."""
    status = path.stat()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    content = read_samples(path)
    return ShardEntry(path.name, status.st_size, status.st_mtime_ns, len(content.samples), digest), content


def _index_shard(path: Path) -> tuple[ShardEntry, bytes, list[Problem], Counter[str]]:
    entry, content = scan_shard(path)
    return entry, _records(path, content.samples).tobytes(), content.problems, content.left


def index_of_one_shard(path: Path, samples: list[TarSample]) -> ShardIndex:
    """Return the index of one shard alone, in memory, from the samples that its tar holds."""
    return ShardIndex(
        address=str(path.parent),
        shard_names=[path.name],
        shard_sizes=[path.stat().st_size],
        first_sample=np.array([0, len(samples)]),
        samples=_records(path, samples),
        fingerprint="",
    )


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
                    # Sizes beyond 32 bits are over every limit: the reader refuses the largest value as well.
                    min(sample.image.size, _MAX_U32),
                    min(sample.caption.size, _MAX_U32) if sample.caption else 0,
                    hash_key(sample.key),
                    caption_id(decode_caption(caption)) % 2**64,
                )
            )
    return np.array(rows, dtype=SAMPLE_DTYPE)


def index_shards(folder: Path, *, workers: int = 1) -> IndexReport:
    """Write ``folder/index.textlock`` for the shards in ``folder``, replacing an earlier index atomically.

    Damaged parts of a tar, duplicate keys and captions without an image are left out; ``problems`` of the result
    names them all. ``workers`` processes read a shard each: all of its bytes, for the checksum.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a shard has no sample at all.
    """
    shards = list_shards(folder)
    table_size = sum(len(ShardEntry(path.name, 0, 0, 0, bytes(32)).pack()) for path in shards)
    records_offset = _HEADER.size + table_size
    fingerprint = hashlib.sha256()
    entries: list[ShardEntry] = []
    problems: list[Problem] = []
    empty: list[str] = []
    left: Counter[str] = Counter()
    with atomic_file(folder / INDEX_NAME) as file:
        file.seek(records_offset)
        for entry, records, found, left_here in map_in_processes(_index_shard, shards, min(workers, len(shards))):
            problems += found
            left += left_here
            if not entry.samples:
                empty.append(f"{entry.name} ({_why_empty(entry, found, left_here)})")
                continue
            fingerprint.update(entry.hashed())
            fingerprint.update(records)
            file.write(records)
            entries.append(entry)
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(shards)} shards in {folder} hold no sample with an image: {'; '.join(empty[:5])}"
                f"{'; ...' if len(empty) > 5 else ''}. Mend them, or move them elsewhere, and index again"
            )
        total = sum(entry.samples for entry in entries)
        table = b"".join(entry.pack() for entry in entries)
        file.seek(0)
        file.write(_Header(len(entries), total, records_offset, fingerprint.digest()).pack(table) + table)
    return IndexReport(len(entries), total, problems, left)


def _why_empty(entry: ShardEntry, problems: list[Problem], left: Counter[str]) -> str:
    """Say why a shard holds no sample with an image."""
    if problems:
        return printable(f"{problems[0].key and problems[0].key + ': '}{problems[0].message}")
    if left:
        fields = ", ".join(printable(field) for field, _ in left.most_common(5))
        return f"its fields are {fields}, none of them an image"
    return f"{entry.size} bytes without a member"


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
    names = shard_names(folder)
    path = folder / INDEX_NAME
    advice = f"run python -m textlock.data.shards index {folder}"
    if not path.is_file():
        raise FileNotFoundError(f"no {INDEX_NAME} in {folder}: {advice}")
    header, entries = _read_index(path, path, advice)
    _check_fresh(folder, names, entries, advice)
    return _map_index(str(folder), path, header, entries)


def _open_remote_index(remote: RemoteFolder, cache: ShardCache, fetchers: int) -> ShardIndex:
    where = f"{remote.url}/{INDEX_NAME}"
    advice = "index the shards where they are files and put the index next to them"
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


def _unpack_header(start: bytes, where: Path | str, advice: str) -> _Header:
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise ValueError(f"{where} is not an index of textlock: {advice}")
    _, version, *fields, _ = _HEADER.unpack(start)
    if version != _VERSION:
        raise ValueError(f"{where} has version {version}, this textlock reads version {_VERSION}: {advice}")
    return _Header(*fields)


def _read_index(path: Path, where: Path | str, advice: str) -> tuple[_Header, list[ShardEntry]]:
    with open(path, "rb") as file:
        start = file.read(_HEADER.size)
        header = _unpack_header(start, where, advice)
        size = os.fstat(file.fileno()).st_size
        table = (
            file.read(header.records_offset - _HEADER.size) if _HEADER.size <= header.records_offset <= size else b""
        )
    if size != header.file_size or header.pack(table) != start:
        raise ValueError(f"{where} is damaged: {advice}")
    try:
        entries = list(_unpack_table(table))
    except struct.error as error:
        raise ValueError(f"{where} is damaged: {advice}") from error
    if len(entries) != header.shards or sum(entry.samples for entry in entries) != header.samples or not entries:
        raise ValueError(f"{where} is damaged: {advice}")
    for entry in entries:
        # A table is untrusted too: its names are looked up in the folder of the index alone, and appear in messages.
        if "/" in entry.name or not entry.name.isprintable() or not entry.name.endswith(".tar") or not entry.samples:
            raise ValueError(f"{where} names {entry.name!r} with {entry.samples} samples, which is no shard: {advice}")
    return header, entries


def _map_index(
    address: str, path: Path, header: _Header, entries: list[ShardEntry], remote: CachedShards | None = None
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


def _check_records(path: Path, header: _Header, entries: list[ShardEntry], where: str, advice: str) -> None:
    """Compare the fingerprint of an index with all of its records. Raises ValueError."""
    fingerprint = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(header.records_offset)
        for entry in entries:
            fingerprint.update(entry.hashed())
            fingerprint.update(file.read(entry.samples * SAMPLE_DTYPE.itemsize))
    if fingerprint.digest() != header.fingerprint:
        raise ValueError(f"the records in {where} are damaged: {advice}")


def _unpack_table(table: bytes) -> Iterator[ShardEntry]:
    at = 0
    while at < len(table):
        size, modified_ns, samples, sha256, length = _TABLE_ENTRY.unpack_from(table, at)
        at += _TABLE_ENTRY.size
        yield ShardEntry(os.fsdecode(table[at : at + length]), size, modified_ns, samples, sha256)
        at += length


def _check_fresh(folder: Path, names: list[str], entries: list[ShardEntry], advice: str) -> None:
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
