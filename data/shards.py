"""Tar shards: writing, indexing, checking and reading them.

A shard is a tar file of samples in the layout of img2dataset: members that share a key (the path up to the first dot of
the base name) are one sample: an image (jpg, jpeg, png or webp) and a caption (txt). Other members are ignored.

    python -m textlock.data.shards pack --images photos --captions captions.tsv --output shards
    python -m textlock.data.shards index shards
    python -m textlock.data.shards verify shards

The index, one file beside the shards, holds 40 bytes a sample and is memory-mapped, so that opening two billion samples
takes no longer than opening two thousand. Its layout, little-endian:

    header   96 bytes: magic, version u32, shards u32, samples u64, offset of the records u64,
             fingerprint (sha256 of shard names, sizes, counts and all records), sha256 of the header and table
    table    for each shard: size u64, modification time in ns i64, samples u64, length of the name u16, name
    records  for each sample: SAMPLE_DTYPE
"""

import csv
import hashlib
import json
import os
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tyro

from .captions import MAX_CAPTION_BYTES, caption_id, decode_caption
from .images import MAX_IMAGE_BYTES, BadSample, ImageHeader, check_image, decode_image
from .publish import published_file, published_folder
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
FILE_COLUMNS = ("file", "filepath", "filename")
CAPTION_COLUMNS = ("caption", "title", "text")

_MAGIC = b"TEXTLOCK"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQ32s32s")
_TABLE_ENTRY = struct.Struct("<QqQH")
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

    folder: Path
    shard_names: list[str]
    first_sample: npt.NDArray[np.int64]  # [S + 1]
    samples: npt.NDArray[np.void]  # [N] SAMPLE_DTYPE, memory-mapped
    fingerprint: str  # sha256, in hex: the same for equal shards wherever and whenever they are copied

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

    def pack(self) -> bytes:
        name = self.name.encode()
        return _TABLE_ENTRY.pack(self.size, self.modified_ns, self.samples, len(name)) + name

    def hashed(self) -> bytes:
        # Without the modification time, which a copy changes.
        return f"{self.name}\0{self.size}\0{self.samples}\0".encode()


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
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name a folder of .tar shards")
    shards = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and path.is_file())
    if not shards:
        raise FileNotFoundError(
            f"no .tar shards in {folder}: write some with python -m textlock.data.shards pack, or name another folder"
        )
    return shards


def index_shards(folder: Path) -> IndexReport:
    """Write ``folder/index.textlock`` for the shards in ``folder``, replacing an earlier index atomically.

    A damaged tar keeps the samples before the damage; duplicate keys and captions without an image are left out.
    ``problems`` of the result names them all.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a shard has no sample at all.
    """
    shards = list_shards(folder)
    table_size = sum(len(_TableEntry(path.name, 0, 0, 0).pack()) for path in shards)
    records_offset = _HEADER.size + table_size
    fingerprint = hashlib.sha256()
    entries: list[_TableEntry] = []
    problems: list[Problem] = []
    empty: list[str] = []
    with published_file(folder / INDEX_NAME) as file:
        file.seek(records_offset)
        for path in shards:
            status = path.stat()
            samples, found = read_samples(path)
            problems += found
            if not samples:
                empty.append(path.name)
                continue
            entry = _TableEntry(path.name, status.st_size, status.st_mtime_ns, len(samples))
            records = _records(path, samples).tobytes()
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


def open_index(folder: Path | str) -> ShardIndex:
    """Open the index of a folder of shards; its records stay on disk, memory-mapped.

    Raises:
        FileNotFoundError: there are no shards, or no index.
        ValueError: the index is damaged, or the shards have changed since it was made.
    """
    folder = Path(folder)
    shards = list_shards(folder)
    path = folder / INDEX_NAME
    advice = f"run python -m textlock.data.shards index {folder}"
    if not path.is_file():
        raise FileNotFoundError(f"no {INDEX_NAME} in {folder}: {advice}")
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise ValueError(f"{path} is not an index of textlock: {advice}")
        *fields, checksum = _HEADER.unpack(header)
        _, version, _, total, records_offset, fingerprint = fields
        if version != _VERSION:
            raise ValueError(f"{path} has version {version}, this textlock reads version {_VERSION}: {advice}")
        size = os.fstat(file.fileno()).st_size
        table = file.read(records_offset - _HEADER.size) if _HEADER.size <= records_offset <= size else b""
        whole = size == records_offset + total * SAMPLE_DTYPE.itemsize
        if not whole or hashlib.sha256(_HEADER.pack(*fields, bytes(32)) + table).digest() != checksum:
            raise ValueError(f"{path} is damaged: {advice}")
    entries = list(_unpack_table(table))
    _check_fresh(shards, entries, advice)
    counts = np.array([entry.samples for entry in entries], dtype=np.int64)
    return ShardIndex(
        folder=folder,
        shard_names=[entry.name for entry in entries],
        first_sample=np.concatenate([[0], np.cumsum(counts)]),
        samples=np.memmap(path, dtype=SAMPLE_DTYPE, mode="r", offset=records_offset, shape=(total,)),
        fingerprint=fingerprint.hex(),
    )


def _unpack_table(table: bytes) -> Iterator[_TableEntry]:
    at = 0
    while at < len(table):
        size, modified_ns, samples, length = _TABLE_ENTRY.unpack_from(table, at)
        at += _TABLE_ENTRY.size
        yield _TableEntry(table[at : at + length].decode(), size, modified_ns, samples)
        at += length


def _check_fresh(shards: list[Path], entries: list[_TableEntry], advice: str) -> None:
    found = {path.name: path.stat() for path in shards}
    for entry in entries:
        status = found.pop(entry.name, None)
        if status is None:
            raise ValueError(f"the index names {entry.name}, which is not there: restore the shard, or {advice}")
        if (status.st_size, status.st_mtime_ns) != (entry.size, entry.modified_ns):
            raise ValueError(f"{entry.name} has changed since it was indexed: {advice}")
    if found:
        raise ValueError(f"{next(iter(found))} is not in the index: {advice}")


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
        self._open = lru_cache(maxsize=_OPEN_FILES)(_Descriptor)

    def read(self, sample: int) -> RawSample:
        """Return the bytes of a sample, as they are in the shard.

        Raises:
            BadSample: of kind too-large, unreadable (the storage fails, or the file is shorter than it was) or moved
                (another image or caption is where the index says the sample's is).
        """
        shard = self._index.shard_of(sample)
        path = self._index.folder / self._index.shard_names[shard]
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
            file = self._open(path)
            block = _read_exactly(file.number, start, (caption_end if together else image_end) - start)
            if together:
                caption = block[caption_offset - start :]
            else:
                caption = _read_exactly(file.number, caption_offset, caption_size)
            key = self._key(file.number, block[:BLOCK], image_offset, key_hash)
        except OSError as error:
            raise BadSample("unreadable", f"{path.name} cannot be read at byte {image_offset}: {error}") from error
        signed_id = caption_hash - (caption_hash >> 63 << 64)
        if caption_id(decode_caption(caption)) != signed_id:
            raise BadSample("moved", f"byte {caption_offset} does not begin the caption that was indexed there")
        return RawSample(key, block[BLOCK : image_end - start], caption, signed_id)

    def read_caption(self, sample: int) -> str:
        """Return the text of a sample's caption without reading its image; empty when there is none.

        Raises:
            BadSample: of kind unreadable or moved, as in ``read``.
        """
        path = self._index.folder / self._index.shard_names[self._index.shard_of(sample)]
        _, offset, _, size, _, caption_hash = self._index.samples[sample].item()
        try:
            caption = decode_caption(_read_exactly(self._open(path).number, offset, min(size, MAX_CAPTION_BYTES + 1)))
        except OSError as error:
            raise BadSample("unreadable", f"{path.name} cannot be read at byte {offset}: {error}") from error
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
    folder: Path, *, workers: int | None = None, on_problem: Callable[[Problem], None] | None = None
) -> VerifyReport:
    """Decode every image and caption of the shards in ``folder``, and compare the shards with their index.

    ``on_problem`` is called with each problem as it is found. ``workers`` is the number of decoding threads, by default
    one for each CPU.

    Raises:
        FileNotFoundError: there are no shards.
    """
    report = VerifyReport()

    def add(problem: Problem) -> None:
        report.problems.append(problem)
        if on_problem:
            on_problem(problem)

    index: ShardIndex | None = None
    shards = list_shards(folder)
    try:
        index = open_index(folder)
    except (ValueError, FileNotFoundError) as error:
        add(Problem(INDEX_NAME, "", "index", str(error)))
    fingerprint = hashlib.sha256()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for number, path in enumerate(shards):
            samples, problems = read_samples(path)
            records = _records(path, samples)
            fingerprint.update(_TableEntry(path.name, path.stat().st_size, 0, len(samples)).hashed())
            fingerprint.update(records.tobytes())
            if index is not None:
                first, last = index.first_sample[number : number + 2]
                if not np.array_equal(index.samples[first:last], records):
                    add(Problem(path.name, "", "index", "the index does not say what is in this shard: index it again"))
            if not samples and not problems:
                add(Problem(path.name, "", "tar", "the shard holds no sample with an image"))
            for problem in problems:
                add(problem)
            with open(path, "rb", buffering=0) as file:
                for fault in pool.map(_Judge(path.name, file.fileno()), samples):
                    if fault is None:
                        report.good += 1
                    else:
                        add(fault)
    if index is not None and fingerprint.hexdigest() != index.fingerprint:
        add(
            Problem(INDEX_NAME, "", "index", "the fingerprint in the index is not that of the shards: index them again")
        )
    return report


@dataclass(frozen=True)
class _Judge:
    """Reads and decodes one sample of a shard and says what is wrong with it."""

    shard: str
    descriptor: int

    def __call__(self, sample: TarSample) -> Problem | None:
        assert sample.image is not None
        try:
            if sample.image.size > MAX_IMAGE_BYTES:
                raise BadSample("too-large", f"the image has {sample.image.size:,} bytes")
            decode_image(_read_exactly(self.descriptor, sample.image.offset, sample.image.size))
            if sample.caption is None:
                raise BadSample("no-caption", "the sample has no caption")
            size = min(sample.caption.size, MAX_CAPTION_BYTES + 1)
            if not decode_caption(_read_exactly(self.descriptor, sample.caption.offset, size)):
                raise BadSample("empty-caption", "the caption is empty")
        except BadSample as fault:
            return Problem(self.shard, sample.key, fault.kind, str(fault))
        except OSError as error:
            return Problem(self.shard, sample.key, "unreadable", str(error))
        return None


@dataclass(frozen=True)
class PackReport:
    """What ``pack_shards`` has written and, with ``skip_bad``, left out."""

    shards: int
    samples: int
    skipped: list[Problem]


def pack_shards(
    images: Path, captions: Path, output: Path, *, samples_per_shard: int = 1000, skip_bad: bool = False
) -> PackReport:
    """Write the images that ``captions`` names, with their captions, as tar shards with an index in ``output``.

    Image bytes are copied as they are. Each sample is ``key.jpg`` (or png, webp), ``key.txt`` and ``key.json`` with
    key, caption, width, height, file and sha256. The shards of the same input are the same bytes.

    Raises:
        FileNotFoundError: the captions file, the folder or a named image does not exist.
        ValueError: the captions file cannot be read, an image or caption is bad (unless ``skip_bad`` leaves them out),
            or ``output`` is not empty. Nothing is left behind in any of these cases.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    if not images.is_dir():
        raise FileNotFoundError(f"no folder {images}: name the folder of the images")
    with published_folder(output) as draft:
        report = _write_shards(images, captions, draft, samples_per_shard, skip_bad)
        index_shards(draft)
    return report


def _write_shards(images: Path, captions: Path, folder: Path, samples_per_shard: int, skip_bad: bool) -> PackReport:
    digits = max(4, len(str(samples_per_shard - 1)))
    skipped: list[Problem] = []
    written = 0
    tar: tarfile.TarFile | None = None
    try:
        for line, name, caption in read_captions(captions):
            path = _image_path(images, name, f"{captions} line {line}")
            try:
                payload, header = _load_image(path)
                if not caption.strip():
                    raise BadSample("empty-caption", "the caption is empty")
            except BadSample as fault:
                if not skip_bad:
                    raise ValueError(
                        f"{captions} line {line}: {name}: {fault}; mend it, or leave such samples out with --skip-bad"
                    ) from fault
                skipped.append(Problem(captions.name, name, fault.kind, str(fault)))
                continue
            shard, place = divmod(written, samples_per_shard)
            if place == 0:
                _close_shard(tar)
                # USTAR and fixed times and owners: equal input gives equal bytes.
                tar = tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            assert tar is not None
            _add_sample(tar, f"{shard:05d}{place:0{digits}d}", name, payload, header, caption)
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
    extension = "jpg" if header.format == "jpeg" else header.format
    members = {
        extension: payload,
        "txt": caption.encode("utf-8", "replace"),
        "json": json.dumps(facts).encode(),
    }
    for suffix, content in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
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


def _pack(images: Path, captions: Path, output: Path, samples_per_shard: int = 1000, skip_bad: bool = False) -> None:
    """Write a folder of images and a captions file as tar shards with an index.

    Args:
        images: Folder of the images.
        captions: .tsv or .csv with a header line, or .jsonl; with a column file, filepath or filename (inside the
            folder of the images) and a column caption, title or text.
        output: New folder for the shards.
        samples_per_shard: Samples in each shard; the last may have fewer.
        skip_bad: Leave out images that are no JPEG, PNG or WebP and empty captions, instead of stopping at the first.
    """
    report = pack_shards(images, captions, output, samples_per_shard=samples_per_shard, skip_bad=skip_bad)
    for problem in report.skipped:
        _show(problem)
    print(f"{report.samples} samples in {report.shards} shards in {output}; {len(report.skipped)} left out")


def _index(folder: tyro.conf.Positional[Path]) -> None:
    """Write the index of a folder of tar shards.

    Args:
        folder: Folder of .tar shards.
    """
    report = index_shards(folder)
    for problem in report.problems:
        _show(problem)
    print(f"{report.samples} samples in {report.shards} shards; {len(report.problems)} problems")


def _verify(folder: tyro.conf.Positional[Path], workers: int | None = None) -> None:
    """List every bad sample of a folder of tar shards; exit status 1 when there is any.

    Args:
        folder: Folder of .tar shards.
        workers: Decoding threads; by default one for each CPU.
    """
    report = verify_shards(folder, workers=workers, on_problem=_show)
    print(f"{report.good} good samples; {len(report.problems)} problems")
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
