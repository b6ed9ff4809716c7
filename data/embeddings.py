"""Stored text embeddings: every caption of a set of shards encoded once, for all epochs and runs.

The text tower never changes, so its rows can be written beside the shards and read instead of computed.

    python -m textlock.data.embeddings shards --tower nomic-ai/nomic-embed-text-v1.5
    torchrun --nproc-per-node 8 -m textlock.data.embeddings shards --tower nomic-ai/nomic-embed-text-v1.5

Run again, it checks what is there and writes only the files that are missing, damaged or of an older index. Training
reads them with ``data.text_embeddings`` set to their folder.

There is one file for each shard, little-endian, with one record for each sample of the shard in the order of the index:

    start    16 bytes: magic, version u32, bytes of the header u32
    header   JSON: shard, samples, embed_dim and tower (name, revision, prefix, max_length, pooling, layer_norm, ...)
    checksum 32 bytes: sha256 of start and header
    records  from the next multiple of 64 bytes: key_hash u64, caption_hash u64, crc32 of the row u32, row f16 [d]

A record names the sample it belongs to by the hashes that the index holds, so a row is never joined to another caption.
``numpy.memmap(path, record_dtype(d), "r", offset)["row"]`` is the matrix [N, d].
"""

import hashlib
import json
import os
import struct
import sys
import time
import weakref
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro

from .atomic import atomic_file
from .captions import caption_id
from .images import BadSample
from .index import ShardIndex, open_index
from .reader import ShardReader
from .tar import Problem

if TYPE_CHECKING:
    from ..models.text import TextTower, TextTowerDescription

Float16Array = npt.NDArray[np.float16]

FOLDER_NAME = "text_embeddings"
SUFFIX = ".embeddings"

_MAGIC = b"TEXTROWS"
_VERSION = 1
_START = struct.Struct("<8sII")
_CHECKSUM_BYTES = 32
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 2**16
_MAX_EMBED_DIM = 2**16
_OPEN_FILES = 256
_COMMAND = "python -m textlock.data.embeddings"
# What a user can change back, in the order worth reading; the fingerprint covers the weights and the tokenizer too.
_SETTINGS = ("embed_dim", "prefix", "max_length", "pooling", "layer_norm")


def record_dtype(embed_dim: int) -> np.dtype[np.void]:
    """Return the layout of one record."""
    return np.dtype([("key_hash", "<u8"), ("caption_hash", "<u8"), ("crc32", "<u4"), ("row", "<f2", (embed_dim,))])


def file_name(shard_name: str) -> str:
    """Return the name of the file that holds the rows of a shard."""
    return shard_name.removesuffix(".tar") + SUFFIX


@dataclass(frozen=True)
class StoredHeader:
    """What a file of stored rows says of itself."""

    shard: str
    samples: int
    embed_dim: int
    tower: dict[str, Any]
    records_offset: int

    @property
    def dtype(self) -> np.dtype[np.void]:
        return record_dtype(self.embed_dim)


def read_header(path: Path) -> StoredHeader:
    """Read and check the header of a file of stored rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, is damaged, or is not as long as its header says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: run {_COMMAND} to encode the captions")
    damaged = ValueError(f"{path} is damaged: delete it and run {_COMMAND} again")
    with open(path, "rb") as file:
        start = file.read(_START.size)
        if len(start) < _START.size or not start.startswith(_MAGIC):
            raise ValueError(f"{path} holds no stored text embeddings: delete it and run {_COMMAND} again")
        _, version, length = _START.unpack(start)
        if version != _VERSION:
            raise ValueError(f"{path} has version {version}, this textlock reads version {_VERSION}: encode again")
        if length > _MAX_HEADER_BYTES:
            raise damaged
        header, checksum = file.read(length), file.read(_CHECKSUM_BYTES)
        if hashlib.sha256(start + header).digest() != checksum:
            raise damaged
        size = os.fstat(file.fileno()).st_size
    try:
        content = json.loads(header)
        shard, samples, embed_dim, tower = (content[name] for name in ("shard", "samples", "embed_dim", "tower"))
    except (ValueError, TypeError, KeyError) as error:
        raise damaged from error
    whole = (
        isinstance(shard, str)
        and isinstance(samples, int)
        and isinstance(embed_dim, int)
        and isinstance(tower, dict)
        and isinstance(tower.get("fingerprint"), str)
        and 0 < embed_dim <= _MAX_EMBED_DIM
        and size == _records_offset(length) + samples * record_dtype(embed_dim).itemsize
    )
    if not whole:
        raise damaged
    return StoredHeader(shard, samples, embed_dim, tower, _records_offset(length))


def _records_offset(header_bytes: int) -> int:
    return -(-(_START.size + header_bytes + _CHECKSUM_BYTES) // _ALIGNMENT) * _ALIGNMENT


def require_tower(header: StoredHeader, path: Path, tower: "TextTowerDescription") -> None:
    """Raise ValueError, naming what differs, when stored rows were not made by ``tower``."""
    if header.tower["fingerprint"] == tower.fingerprint:
        return
    wanted = asdict(tower)
    changed = [
        f"{name} is {header.tower.get(name)!r} there and {wanted[name]!r} here"
        for name in _SETTINGS
        if header.tower.get(name) != wanted[name]
    ]
    difference = "; ".join(changed) or f"the weights or the tokenizer of {header.tower.get('name')} are other ones"
    raise ValueError(
        f"{path} holds rows of another text tower than {tower.name}: {difference}; "
        f"take the settings of the stored rows, or encode the captions again into another folder with {_COMMAND}"
    )


class StoredText:
    """The stored rows of a set of shards. Rows may be read from any number of threads.

    Raises:
        FileNotFoundError: the folder does not exist, or a shard has no file in it.
        ValueError: the rows are those of another text tower.
    """

    def __init__(self, folder: Path | str, index: ShardIndex, tower: "TextTowerDescription") -> None:
        self._folder = Path(folder)
        self._index = index
        self._tower = tower
        if not self._folder.is_dir():
            raise FileNotFoundError(f"no folder {folder} of stored text embeddings: run {_COMMAND} to make it")
        # One listing: opening every file of a large set would take minutes. The others are checked when first read.
        there = {entry.name for entry in os.scandir(self._folder)}
        missing = [name for name in index.shard_names if file_name(name) not in there]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(index.shard_names)} shards have no stored text embeddings in {folder}, the "
                f"first is {missing[0]}: run {_COMMAND} again to encode the rest"
            )
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_shard)
        self._open(0)

    def row(self, sample: int) -> Float16Array:
        """Return the row of a sample of the index, float16 [d], a unit vector but for rounding.

        Raises:
            BadSample: of kind no-embedding (its caption could not be read when the captions were encoded, or has
                changed since) or damaged-embedding (the row is not what was written, or the storage fails).
            ValueError: the file is damaged or of another text tower.
        """
        shard = self._index.shard_of(sample)
        file = self._open(shard)
        number = sample - int(self._index.first_sample[shard])
        _, _, _, _, key_hash, caption_hash = self._index.samples[sample].item()
        try:
            record = file.record(number)
        except OSError as error:
            raise BadSample("damaged-embedding", f"the stored text row cannot be read: {error}") from error
        if (record["key_hash"], record["caption_hash"]) != (key_hash, caption_hash):
            raise BadSample("no-embedding", f"{file.path.name} has no row for this sample: run {_COMMAND} again")
        row: Float16Array = record["row"]
        if zlib.crc32(row.tobytes()) != record["crc32"]:
            raise BadSample("damaged-embedding", f"row {number} of {file.path.name} does not have its checksum")
        return row

    def _open_shard(self, shard: int) -> "_StoredShard":
        name = self._index.shard_names[shard]
        path = self._folder / file_name(name)
        header = read_header(path)
        require_tower(header, path, self._tower)
        samples = len(_samples_of(self._index, shard))
        if header.samples != samples:
            raise ValueError(
                f"{path} has rows for {header.samples} samples and {name} has {samples}: run {_COMMAND} again"
            )
        return _StoredShard(path, header)


class _StoredShard:
    """An open file of rows, closed when the last thread that reads from it lets go.

    Read, not mapped: a mapped file that is cut short on a shared disk kills the process.
    """

    def __init__(self, path: Path, header: StoredHeader) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._dtype = header.dtype
        self._offset = header.records_offset

    def record(self, number: int) -> np.void:
        size = self._dtype.itemsize
        content = os.pread(self._descriptor, size, self._offset + number * size)
        if len(content) < size:
            raise OSError(f"only {len(content)} of {size} bytes are there")
        return np.frombuffer(content, self._dtype)[0]


@dataclass
class EncodeReport:
    """What ``encode_shards`` has done on this process."""

    encoded: int = 0
    """Shards whose captions were encoded."""
    kept: int = 0
    """Shards whose file was there and whole."""
    rows: int = 0
    """Rows written."""
    without_row: list[Problem] = field(default_factory=list)
    """Samples whose caption is missing, empty or cannot be read. The loader replaces them."""


def encode_shards(
    shards: Path | str,
    tower: "TextTower",
    output: Path | str | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_shard: Callable[[str], None] | None = None,
) -> EncodeReport:
    """Write the rows of this rank's shards, every ``world_size``-th, into ``output``, by default beside the shards.

    Each file appears whole or not at all. Files that are there, whole, of this index and of this tower are kept.
    ``on_shard`` is called with the name of each shard that is done.

    Raises:
        FileNotFoundError: there are no shards, or no index.
        ValueError: the index is stale, a file holds rows of another tower, rows are not finite, or the shards are
            remote and there is no ``output``.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks: ranks count from 0")
    index = open_index(shards)
    if output is None and index.remote is not None:
        raise ValueError(f"{index.address} is remote and nothing can be written beside it: give --output with a folder")
    folder = Path(output) if output is not None else Path(index.address) / FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    reader = ShardReader(index)
    report = EncodeReport()
    description = tower.describe()
    own = range(rank, len(index.shard_names), world_size)
    for place, shard in enumerate(own):
        reader.expect(own[place : place + 2])
        path = folder / file_name(index.shard_names[shard])
        if path.exists() and _is_current(path, index, shard, description):
            report.kept += 1
        else:
            _encode_shard(path, index, shard, reader, tower, report)
            report.encoded += 1
        if on_shard is not None:
            on_shard(index.shard_names[shard])
    reader.close()
    return report


def _is_current(path: Path, index: ShardIndex, shard: int, tower: "TextTowerDescription") -> bool:
    """Whether a file is whole and of this index. Raises ValueError when it holds the rows of another tower."""
    try:
        header = read_header(path)
    except ValueError:
        return False
    require_tower(header, path, tower)
    samples = _samples_of(index, shard)
    if header.samples != len(samples):
        return False
    records = np.fromfile(path, header.dtype, offset=header.records_offset)
    has_row = samples["caption_hash"] != np.uint64(caption_id("") % 2**64)
    for column in ("key_hash", "caption_hash"):
        if not np.array_equal(records[column], np.where(has_row, samples[column], 0)):
            return False
    return all(zlib.crc32(record["row"].tobytes()) == record["crc32"] for record in records[has_row])


def _samples_of(index: ShardIndex, shard: int) -> npt.NDArray[np.void]:
    first, last = index.first_sample[shard : shard + 2]
    return index.samples[first:last]


def _encode_shard(
    path: Path, index: ShardIndex, shard: int, reader: ShardReader, tower: "TextTower", report: EncodeReport
) -> None:
    samples = _samples_of(index, shard)
    name = index.shard_names[shard]
    # A record of zeros is that of no sample: the loader finds no row there.
    records = np.zeros(len(samples), record_dtype(tower.embed_dim))
    numbers, captions = [], []
    for number in range(len(samples)):
        try:
            caption = reader.read_caption(int(index.first_sample[shard]) + number)
            if not caption:
                raise BadSample("no-caption", "the caption is missing or empty")
        except BadSample as fault:
            report.without_row.append(Problem(name, f"sample {number}", fault.kind, str(fault)))
            continue
        numbers.append(number)
        captions.append(caption)
    if captions:
        rows = tower.encode(captions).half().cpu().numpy()  # [n, d]
        if not np.isfinite(rows).all():
            raise ValueError(f"text tower {tower.name} gives rows that are not finite for captions of {name}")
        records["row"][numbers] = rows
        for column in ("key_hash", "caption_hash"):
            records[column][numbers] = samples[column][numbers]
        records["crc32"][numbers] = [zlib.crc32(row.tobytes()) for row in rows]
    report.rows += len(captions)
    header = json.dumps(
        {"shard": name, "samples": len(samples), "embed_dim": tower.embed_dim, "tower": asdict(tower.describe())}
    ).encode()
    start = _START.pack(_MAGIC, _VERSION, len(header))
    with atomic_file(path) as file:
        file.write(start + header + hashlib.sha256(start + header).digest())
        file.write(bytes(_records_offset(len(header)) - file.tell()))
        file.write(records.tobytes())


@dataclass(frozen=True, kw_only=True)
class Options:
    """Encode every caption of a set of shards once. Run again, or on more processes, it does what is left."""

    shards: tyro.conf.Positional[Path]
    """Folder of .tar shards with their index."""
    tower: str
    """Text tower: a transformers or sentence-transformers folder, or a hub name."""
    layer_norm: bool = True
    """LayerNorm without affine after pooling: True for Nomic Embed Text v1.5, False for v1."""
    prefix: str = "search_query: "
    """Written in front of every caption."""
    max_length: int = 77
    """Tokens kept of a caption, prefix included."""
    output: Path | None = None
    """Folder for the rows; left out: text_embeddings in the folder of the shards."""
    rank: int = int(os.environ.get("RANK", "0"))
    """Number of this process; torchrun sets it."""
    world_size: int = int(os.environ.get("WORLD_SIZE", "1"))
    """Number of processes that share the shards; torchrun sets it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one; under torchrun each process takes its own."""


def main(options: Options) -> None:
    """Encode, and print what was done."""
    # transformers takes seconds to import, and training reads rows without it.
    from ..models.text import build_text_tower

    device = "cpu"
    if options.device != "cpu" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    elif options.device == "cuda":
        raise ValueError("--device cuda: there is no GPU here; take --device cpu")
    open_index(options.shards)  # the same kind of error, before a slow load
    tower = build_text_tower(
        options.tower,
        layer_norm=options.layer_norm,
        prefix=options.prefix,
        max_length=options.max_length,
        device=device,
    )
    start = time.perf_counter()
    report = encode_shards(
        options.shards, tower, options.output, rank=options.rank, world_size=options.world_size, on_shard=print
    )
    for problem in report.without_row:
        print(f"no row: {problem.shard} {problem.key} ({problem.kind}): {problem.message}")
    seconds = time.perf_counter() - start
    print(
        f"{report.rows} captions of {report.encoded} shards encoded, {report.rows / seconds:,.0f} a second; "
        f"{report.kept} shards were there; {len(report.without_row)} samples have no caption"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
