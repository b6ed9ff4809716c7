"""The index of tar shards: one file that says where each sample is, in their folder or in another that stands for it.

A shard is a tar file of samples in the layout of img2dataset and webdataset: members that share a key (the path up to
the first dot of the base name) are one sample; what follows is the field. `captions.Fields` says which of them are its
image and its captions. Members of other fields are left, and counted.

The index holds 44 bytes a sample and is memory-mapped, so that opening two billion samples takes no longer than opening
two thousand. Its layout, little-endian:

    header   104 bytes: magic, version u32, shards u32, samples u64, bytes of the table u64, bytes of the facts u64,
             fingerprint (sha256 of the fields, of shard names, sizes, counts and all records), sha256 of header, table
             and facts
    records  for each sample: SAMPLE_DTYPE
    table    for each shard: size u64, modification time in ns i64, samples u64, its sha256, length of the name u16,
             name. A shard without a sample is named too, so that it is known to be left out.
    facts    JSON: image_fields, caption_fields, whole_text, captions (their number), and shards, the folder of the
             shards, or null where it is that of the index

Shards at a URL have their index there too: it is written while they are in a folder, and ``cache.py`` fetches it.
"""

import errno
import hashlib
import json
import os
import re
import shlex
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .atomic import atomic_file
from .cache import DEFAULT_CACHE_DIR, CachedShards, FetchError, RemoteFile, RemoteFolder, ShardCache, is_remote
from .captions import MAX_MEMBER_BYTES, Captions, Fields, captions_hash, read_captions
from .freshness import check_unchanged
from .processes import map_in_processes
from .tar import Problem, ShardContent, TarMember, TarSample, printable, read_samples

INDEX_NAME = "index.textlock"
SAMPLE_DTYPE = np.dtype(
    [
        ("image_offset", "<u8"),
        ("caption_offset", "<u8"),
        ("image_size", "<u4"),
        ("caption_size", "<u4"),  # of the member that holds the captions; 0: the sample has none
        ("key_hash", "<u8"),
        ("caption_hash", "<u8"),  # captions.captions_hash
        ("captions", "<u2"),
        ("caption_field", "<u2"),  # place of their field in Fields.caption
    ]
)

_MAGIC = b"TEXTLOCK"
_VERSION = 3
_HEADER = struct.Struct("<8sIIQQQ32s32s")
_TABLE_ENTRY = struct.Struct("<QqQ32sH")
_MAX_U32 = 2**32 - 1
_COMMAND = "python -m textlock.data.shards index"
# Tars by their names, compressed in one of many ways or with a suffix in capitals.
_OTHER_TARS = re.compile(r"\.tar\.(gz|bz2|xz|zst|lz4|lzma|lz|br|z|7z)$|\.(tgz|tbz2?|txz|tzst)$|\.tar$", re.IGNORECASE)


def hash_key(key: str) -> int:
    """Return the ``key_hash`` of a key: 64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class ShardIndex:
    """An open index: N samples in S shards, numbered from 0 in the order of shard names and of members."""

    address: str  # folder or URL of the shards
    fields: Fields
    shard_names: list[str]  # of those with samples
    shard_sizes: list[int]  # bytes
    first_sample: npt.NDArray[np.int64]  # [S + 1]
    samples: npt.NDArray[np.void]  # [N] SAMPLE_DTYPE, memory-mapped
    captions: int  # of all samples
    fingerprint: str  # sha256, in hex: the same for equal shards wherever and whenever they are copied
    left_out: list[str] = field(default_factory=list)  # shards without a sample
    folder: Path | None = None  # of the index file, where it is in one
    shard_digests: list[bytes] = field(default_factory=list)  # sha256 of each shard; none of an index in memory alone
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
class _Facts:
    """What an index says of all of its samples."""

    fields: Fields
    captions: int
    shards: str | None  # folder of the shards; None: that of the index

    def pack(self) -> bytes:
        return json.dumps(
            {
                "image_fields": self.fields.image,
                "caption_fields": self.fields.caption,
                "whole_text": self.fields.whole_text,
                "captions": self.captions,
                "shards": self.shards,
            }
        ).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> "_Facts":
        """Read what ``pack`` has written. Raises ValueError, KeyError or TypeError."""
        facts = json.loads(packed)
        names = facts["image_fields"], facts["caption_fields"]
        if not all(isinstance(name, str) for part in names for name in part):
            raise TypeError("a field is no text")
        if not isinstance(facts["captions"], int) or not isinstance(facts["shards"], str | None):
            raise TypeError("captions is no number, or shards no path")
        fields = Fields(tuple(names[0]), tuple(names[1]), bool(facts["whole_text"]))
        return cls(fields, facts["captions"], facts["shards"])


@dataclass(frozen=True)
class _Header:
    shards: int
    samples: int
    table_size: int
    facts_size: int
    fingerprint: bytes

    @property
    def table_offset(self) -> int:
        return _HEADER.size + self.samples * SAMPLE_DTYPE.itemsize

    @property
    def file_size(self) -> int:
        return self.table_offset + self.table_size + self.facts_size

    def pack(self, rest: bytes) -> bytes:
        """Return the header of an index with the table and the facts ``rest``, with the checksum of all three."""
        sizes = (self.shards, self.samples, self.table_size, self.facts_size)
        fields = (_MAGIC, _VERSION, *sizes, self.fingerprint)
        return _HEADER.pack(*fields, hashlib.sha256(_HEADER.pack(*fields, bytes(32)) + rest).digest())


def start_of_fingerprint(fields: Fields) -> "hashlib._Hash":
    """Return the hash that the entries and records of shards are added to."""
    return hashlib.sha256(json.dumps([fields.image, fields.caption, fields.whole_text]).encode())


@dataclass
class IndexReport:
    """What ``index_shards`` found."""

    fields: Fields
    shards: int = 0
    samples: int = 0
    captions: int = 0
    with_several: int = 0
    """Samples with several captions."""
    without_caption: int = 0
    """Samples whose captions are missing, empty or cannot be read."""
    cut: int = 0
    """Captions that are longer than what is read of them."""
    problems: list[Problem] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    """How many members have each of the fields that are not read."""
    left_out: list[str] = field(default_factory=list)
    """Shards without a sample, and why."""


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
        # A link to nothing is listed: that a shard cannot be read is said where it is read.
        names = sorted(entry.name for entry in entries if entry.name.endswith(".tar") and not entry.is_dir())
    if not names:
        others = _unread_tars(folder)
        what = next((f"{name} {why}" for name, _, why in others), "write some with python -m textlock.data.shards pack")
        raise FileNotFoundError(f"no .tar shards in {folder}: {what}, or name another folder")
    return names


def _unread_tars(folder: Path) -> list[tuple[str, str, str]]:
    """Return what looks like shards in a folder and is not read: each name, a kind of problem, why and what to do."""
    found = []
    with os.scandir(folder) as entries:  # no stat of each file, as above
        kinds = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_dir in kinds:
        if is_dir:
            path = folder / name
            if os.access(path, os.R_OK) and any(inner.endswith(".tar") for inner in os.listdir(path)):
                found.append((name, "folder", "is a folder of shards: index it, too, and name both"))
        elif not name.endswith(".tar") and (match := _OTHER_TARS.search(name)):
            if match[0].lower() == ".tar":
                found.append((name, "name", "is no .tar by its name: rename it"))
            else:
                found.append((name, "compressed", "is compressed and not read: decompress it"))
    return found


def scan_shard(path: Path, fields: Fields) -> tuple[ShardEntry, ShardContent]:
    """Return the table entry of one shard and what it holds, from all of its bytes. Raises OSError."""
    content = read_samples(path, fields)
    status = path.stat()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return ShardEntry(path.name, status.st_size, status.st_mtime_ns, len(content.samples), digest), content


def index_of_one_shard(path: Path, samples: list[TarSample], fields: Fields) -> ShardIndex:
    """Return the index of one shard alone, in memory, from the samples that its tar holds."""
    records = _records(path, samples, fields, IndexReport(fields))
    return ShardIndex(
        address=str(path.parent),
        fields=fields,
        shard_names=[path.name],
        shard_sizes=[path.stat().st_size],
        first_sample=np.array([0, len(samples)]),
        samples=records,
        captions=int(records["captions"].sum()),
        fingerprint="",
    )


def _records(path: Path, samples: list[TarSample], fields: Fields, report: IndexReport) -> npt.NDArray[np.void]:
    """Return the index records of one shard, read from the tar; count its captions in ``report``."""
    rows = []
    with open(path, "rb", buffering=0) as file:
        for sample in samples:
            place, member, captions = _captions_of(file.fileno(), path.name, sample, fields, report)
            report.captions += len(captions.texts)
            report.with_several += len(captions.texts) > 1
            report.without_caption += not captions.texts
            report.cut += captions.cut
            rows.append(
                (
                    sample.image.offset,
                    member.offset if member else 0,
                    # Sizes beyond 32 bits are over every limit: the reader refuses the largest value as well.
                    min(sample.image.size, _MAX_U32),
                    min(member.size, _MAX_U32) if member else 0,
                    hash_key(sample.key),
                    captions_hash(captions.texts),
                    len(captions.texts),
                    place,
                )
            )
    return np.array(rows, dtype=SAMPLE_DTYPE)


def _captions_of(
    descriptor: int, shard: str, sample: TarSample, fields: Fields, report: IndexReport
) -> tuple[int, TarMember | None, Captions]:
    """Return the captions of a sample, and in which field and member they are: the first that holds one."""
    faults = []
    for place, member in sorted(sample.captions.items()):
        payload = os.pread(descriptor, min(member.size, MAX_MEMBER_BYTES + 1), member.offset)
        try:
            captions = read_captions(payload, fields.caption[place], whole_text=fields.whole_text)
        except ValueError as error:
            faults.append(f"{member.name}: {error}")
            continue
        if captions.texts:
            return place, member, captions
    if faults:
        report.problems.append(Problem(shard, sample.key, "captions", "; ".join(faults)))
    return 0, None, Captions([], 0)


@dataclass(frozen=True)
class _ShardIndexing:
    """Reads shards for an index, in a worker process."""

    fields: Fields

    def __call__(self, path: Path) -> tuple[ShardEntry, bytes, IndexReport]:
        report = IndexReport(self.fields)
        try:
            entry, content = scan_shard(path, self.fields)
            records = _records(path, content.samples, self.fields, report).tobytes()
        except OSError as error:
            report.problems.append(Problem(path.name, "", "unreadable", str(error)))
            size = path.stat().st_size if path.exists() else 0
            return ShardEntry(path.name, size, 0, 0, bytes(32)), b"", report
        report.problems[:0] = content.problems
        report.left = content.left
        return entry, records, report


def index_shards(
    folder: Path, *, fields: Fields | None = None, output: Path | None = None, workers: int = 1
) -> IndexReport:
    """Write ``index.textlock`` for the shards in ``folder``, replacing an earlier index atomically.

    Damaged parts of a tar, duplicate keys and captions without an image are left out, and so are shards without any
    sample; ``problems`` of the result names them all.

    Args:
        folder: the shards.
        fields: which members are images and captions.
        output: folder for the index where it cannot be that of the shards; it then stands for them everywhere.
        workers: processes, which read a shard each: all of its bytes, for the checksum.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: no shard has a sample, or no sample a caption.
    """
    fields = fields or Fields()
    shards = list_shards(folder)
    home = folder if output is None else output
    elsewhere = None if home.resolve() == folder.resolve() else str(folder.resolve())
    if unprintable := [path.name for path in shards if not path.name.isprintable()]:
        raise ValueError(f"the name of shard {printable(ascii(unprintable[0]))} cannot be printed: rename it")
    if elsewhere is not None:
        _require_place_for_index(home, elsewhere)
    report = IndexReport(fields)
    fingerprint = start_of_fingerprint(fields)
    entries: list[ShardEntry] = []
    with _writing_into(home), atomic_file(home / INDEX_NAME) as file:
        file.seek(_HEADER.size)
        for entry, records, found in map_in_processes(_ShardIndexing(fields), shards, min(workers, len(shards))):
            entries.append(entry)
            _add(report, found)
            if not entry.samples:
                report.left_out.append(f"{entry.name} ({_why_empty(entry, found)})")
                continue
            fingerprint.update(entry.hashed())
            fingerprint.update(records)
            file.write(records)
            report.shards += 1
            report.samples += entry.samples
        if not report.samples:
            raise ValueError(
                f"no shard in {folder} holds a sample with an image: {'; '.join(report.left_out[:5])}"
                f"{'; ...' if len(report.left_out) > 5 else ''}. Mend them, or move them elsewhere, and index again"
            )
        if not report.captions:
            first = next(entry.name for entry in entries if entry.samples)
            raise ValueError(_no_captions(folder, folder / first, report))
        table, facts = b"".join(entry.pack() for entry in entries), _Facts(fields, report.captions, elsewhere).pack()
        file.write(table + facts)
        header = _Header(len(entries), report.samples, len(table), len(facts), fingerprint.digest())
        file.seek(0)
        file.write(header.pack(table + facts))
    report.problems += [Problem(name, "", kind, f"it {why}") for name, kind, why in _unread_tars(folder)]
    return report


def _require_place_for_index(home: Path, shards: str) -> None:
    """Raise ValueError where a folder is not free for the index of the shards in another one."""
    if home.is_dir() and any(name.endswith(".tar") for name in os.listdir(home)):
        raise ValueError(f"{home} holds shards of its own: name another folder by --index")
    if (home / INDEX_NAME).is_file() and str(recorded_source(home)[0]) not in (shards, str(home)):
        raise ValueError(f"{home} holds the index of {recorded_source(home)[0]}: name another folder by --index")


@contextmanager
def _writing_into(folder: Path) -> Iterator[None]:
    """Say where an index may be written instead, where it cannot be in this folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            f"{folder} cannot be written ({error.strerror}): name another folder for the index by --index"
        ) from error


def _add(report: IndexReport, of_shard: IndexReport) -> None:
    report.captions += of_shard.captions
    report.with_several += of_shard.with_several
    report.without_caption += of_shard.without_caption
    report.cut += of_shard.cut
    report.problems += of_shard.problems
    report.left += of_shard.left


def _why_empty(entry: ShardEntry, found: IndexReport) -> str:
    """Say why a shard holds no sample with an image."""
    if found.problems:
        problem = found.problems[0]
        return printable(f"{problem.key and problem.key + ': '}{problem.message}")
    if found.left:
        fields = ", ".join(printable(name) for name, _ in found.left.most_common(5))
        return f"its fields are {fields}, none of them an image"
    return f"{entry.size} bytes without a member"


def _no_captions(folder: Path, shard: Path, report: IndexReport) -> str:
    """Say that no sample has a caption, and where it may have one."""
    asked = " or ".join(report.fields.caption)
    said = f"no sample of the {report.samples:,} in {folder} has a caption in {asked}"
    wrong = next((problem for problem in report.problems if problem.kind == "captions"), None)
    if wrong is not None:
        said += f" ({printable(f'{wrong.key}: {wrong.message}')})"
    others = ", ".join(f"{printable(name)} ({count:,})" for name, count in report.left.most_common(8))
    said += f"; its other fields are {others}" if others else "; it has no other fields"
    keys = _keys_of_json(shard)
    if keys:
        said += f", and the JSON has texts under {', '.join(map(printable, keys))}"
    example = f"json:{keys[0]}" if keys else "caption"
    return f"{said}. Name the one of the captions, for example --caption-fields {example}"


def _keys_of_json(shard: Path) -> list[str]:
    """Return the keys that hold text in the first JSON object of a shard; the likely names of captions first."""
    samples = read_samples(shard, Fields(caption=("json:caption",))).samples
    member = next((member for sample in samples for member in sample.captions.values()), None)
    if member is None:
        return []
    with open(shard, "rb") as file:
        payload = os.pread(file.fileno(), min(member.size, MAX_MEMBER_BYTES), member.offset)
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):
        return []
    keys = []
    for key in content if isinstance(content, dict) else ():
        try:
            if read_captions(payload, f"json:{key}").texts:
                keys.append(key)
        except ValueError:
            continue
    return sorted(keys, key=lambda key: not any(word in key.lower() for word in ("caption", "title", "text")))[:8]


def _command_of(shards: Path | str, home: Path | None, fields: Fields) -> str:
    words = [str(shards)]
    if home is not None and str(home) != str(shards):
        words += ["--index", str(home)]
    if fields.image != Fields.image:
        words += ["--image-fields", ",".join(fields.image)]
    if fields.caption != Fields.caption:
        words += ["--caption-fields", ",".join(fields.caption)]
    return f"{_COMMAND} {shlex.join(words)}" + " --whole-text" * fields.whole_text


def open_index(
    shards: Path | str, *, cache_dir: Path | str | None = None, cache_gb: float = 100.0, fetchers: int = 4
) -> ShardIndex:
    """Open the index of shards in a folder or below a URL; its records stay on disk, memory-mapped.

    ``shards`` may be a folder that holds the index alone. Where a shard has another time than when it was indexed, as a
    copy has, its bytes are compared. Copies of remote shards go to ``cache_dir`` (by default ``DEFAULT_CACHE_DIR``), up
    to ``cache_gb`` * 10^9 bytes of them; ``fetchers`` threads fetch ahead what ``ShardReader.expect`` names.

    Raises:
        FileNotFoundError: there are no shards, or no index.
        ValueError: the index is damaged, or the shards have changed since it was made.
    """
    if is_remote(shards):
        cache = ShardCache(Path(cache_dir or DEFAULT_CACHE_DIR).expanduser(), round(cache_gb * 1e9))
        return _open_remote_index(RemoteFolder(str(shards)), cache, fetchers)
    home = Path(shards)
    path = home / INDEX_NAME
    if not path.is_file():
        shard_names(home)  # the folder is missing, or holds no shards
        raise FileNotFoundError(f"no {INDEX_NAME} in {home}: run {_COMMAND} {home}")
    header, entries, facts = _read_index(path, path, f"run {_COMMAND} {home}")
    folder = home if facts.shards is None else Path(facts.shards)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path} is of the shards in {folder}, which is not there: put them there, or index them again with "
            f"{_COMMAND} FOLDER --index {home}"
        )
    advice = f"run {_command_of(folder, home, facts.fields)}"
    check_unchanged(folder, shard_names(folder), entries, path, header.fingerprint.hex(), advice)
    return _map_index(str(folder), path, header, entries, facts, folder=home)


def recorded_source(folder: Path) -> tuple[Path, Fields]:
    """Return the folder of the shards and the fields that the index in ``folder`` is made with, be it stale or not.

    Without an index that can be read: that folder and the usual fields.
    """
    path = folder / INDEX_NAME
    try:
        facts = _read_index(path, path, "")[2]
    except (OSError, ValueError):
        return folder, Fields()
    return folder if facts.shards is None else Path(facts.shards), facts.fields


def require_fields(index: ShardIndex, image: Sequence[str] | None, caption: Sequence[str] | None) -> None:
    """Raise ValueError, with the command that mends it, unless an index is of the fields that are asked for.

    ``image`` and ``caption`` are words as in `Fields.named`; None asks for nothing.
    """
    asked = index.fields.named(image, caption)
    if asked != index.fields:
        raise ValueError(
            f"{index.address} is indexed with {index.fields}, and not with {asked}: run "
            f"{_command_of(index.address, index.folder, asked)}"
        )


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
    header, entries, facts = _read_index(path, where, advice)
    if facts.shards is not None:
        raise ValueError(f"{where} is of shards in the folder {facts.shards}: {advice}")
    files = [RemoteFile(entry.name, entry.size, entry.sha256) for entry in entries if entry.samples]
    shards = CachedShards(remote, files, cache, fetchers=fetchers)
    return _map_index(remote.url, path, header, entries, facts, remote=shards)


def _unpack_header(start: bytes, where: Path | str, advice: str) -> _Header:
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise ValueError(f"{where} is not an index of textlock: {advice}")
    _, version, *fields, _ = _HEADER.unpack(start)
    if version != _VERSION:
        raise ValueError(f"{where} has version {version}, this textlock reads version {_VERSION}: {advice}")
    return _Header(*fields)


def _read_index(path: Path, where: Path | str, advice: str) -> tuple[_Header, list[ShardEntry], _Facts]:
    damaged = ValueError(f"{where} is damaged: {advice}")
    with open(path, "rb") as file:
        start = file.read(_HEADER.size)
        header = _unpack_header(start, where, advice)
        if os.fstat(file.fileno()).st_size != header.file_size:
            raise damaged
        file.seek(header.table_offset)
        rest = file.read(header.table_size + header.facts_size)
    if header.pack(rest) != start:
        raise damaged
    try:
        entries = list(_unpack_table(rest[: header.table_size]))
        facts = _Facts.unpack(rest[header.table_size :])
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged from error
    if len(entries) != header.shards or sum(entry.samples for entry in entries) != header.samples or not header.samples:
        raise damaged
    for entry in entries:
        # A table is untrusted too: its names are looked up in the folder of the shards alone, and appear in messages.
        if "/" in entry.name or not entry.name.isprintable() or not entry.name.endswith(".tar"):
            raise ValueError(f"{where} names {entry.name!r} with {entry.samples} samples, which is no shard: {advice}")
    return header, entries, facts


def _map_index(
    address: str,
    path: Path,
    header: _Header,
    entries: list[ShardEntry],
    facts: _Facts,
    *,
    folder: Path | None = None,
    remote: CachedShards | None = None,
) -> ShardIndex:
    used = [entry for entry in entries if entry.samples]
    counts = np.array([entry.samples for entry in used], dtype=np.int64)
    return ShardIndex(
        address=address,
        fields=facts.fields,
        shard_names=[entry.name for entry in used],
        shard_sizes=[entry.size for entry in used],
        first_sample=np.concatenate([[0], np.cumsum(counts)]),
        samples=np.memmap(path, dtype=SAMPLE_DTYPE, mode="r", offset=_HEADER.size, shape=(header.samples,)),
        captions=facts.captions,
        fingerprint=header.fingerprint.hex(),
        left_out=[entry.name for entry in entries if not entry.samples],
        folder=folder,
        shard_digests=[entry.sha256 for entry in used],
        remote=remote,
    )


def _check_records(
    path: Path, header: _Header, entries: list[ShardEntry], facts: _Facts, where: str, advice: str
) -> None:
    """Compare the fingerprint of an index with all of its records. Raises ValueError."""
    fingerprint = start_of_fingerprint(facts.fields)
    with open(path, "rb") as file:
        file.seek(_HEADER.size)
        for entry in entries:
            if entry.samples:
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
