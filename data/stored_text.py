"""Stored text embeddings: one file for each shard, written by data/embeddings.py and read by the loader.

A file is little-endian, with one record for each caption of the shard, the captions of a sample one after the other, in
the order of the index:

    start    16 bytes: magic, version u32, bytes of the header u32
    header   JSON: shard, captions (their number), embed_dim and tower (name, revision, recipe, fingerprint)
    checksum 32 bytes: sha256 of start and header
    records  from the next multiple of 64 bytes: key_hash u64, caption_hash u64, crc32 of the row u32, row f16 [d]

A record names the sample and the caption it belongs to by their hashes, so an embedding is never joined to another
caption. ``numpy.memmap(path, record_dtype(d), "r", offset)["row"]`` is the matrix [N, d].
"""

import hashlib
import json
import os
import struct
import weakref
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .images import BadSample
from .index import ShardIndex

if TYPE_CHECKING:
    from ..models.text import TextTowerDescription

Float16Array = npt.NDArray[np.float16]

COMMAND = "python -m textlock.data.embeddings"
SUFFIX = ".embeddings"

_MAGIC = b"TEXTROWS"
_VERSION = 3
_START = struct.Struct("<8sII")
_CHECKSUM_BYTES = 32
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 2**16
_MAX_EMBED_DIM = 2**16
_OPEN_FILES = 256


def record_dtype(embed_dim: int) -> np.dtype[np.void]:
    """Return the layout of one record."""
    return np.dtype([("key_hash", "<u8"), ("caption_hash", "<u8"), ("crc32", "<u4"), ("row", "<f2", (embed_dim,))])


def file_name(shard_name: str) -> str:
    """Return the name of the file that holds the embeddings of a shard."""
    return shard_name.removesuffix(".tar") + SUFFIX


@dataclass(frozen=True)
class StoredHeader:
    """What a file of stored embeddings says of itself."""

    shard: str
    captions: int
    embed_dim: int
    tower: dict[str, Any]
    records_offset: int

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Layout of a record."""
        return record_dtype(self.embed_dim)


def read_header(path: Path) -> StoredHeader:
    """Read and check the header of a file of stored embeddings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, is damaged, or is not as long as its header says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: run {COMMAND} to encode the captions")
    damaged = ValueError(f"{path} is damaged: delete it and run {COMMAND} again")
    with open(path, "rb") as file:
        start = file.read(_START.size)
        if len(start) < _START.size or not start.startswith(_MAGIC):
            raise ValueError(f"{path} holds no stored text embeddings: delete it and run {COMMAND} again")
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
        shard, captions, embed_dim, tower = (content[name] for name in ("shard", "captions", "embed_dim", "tower"))
    except (ValueError, TypeError, KeyError) as error:
        raise damaged from error
    whole = (
        isinstance(shard, str)
        and isinstance(captions, int)
        and isinstance(embed_dim, int)
        and isinstance(tower, dict)
        and isinstance(tower.get("fingerprint"), str)
        and 0 < embed_dim <= _MAX_EMBED_DIM
        and size == _records_offset(length) + captions * record_dtype(embed_dim).itemsize
    )
    if not whole:
        raise damaged
    return StoredHeader(shard, captions, embed_dim, tower, _records_offset(length))


def pack_header(shard: str, captions: int, tower: "TextTowerDescription") -> bytes:
    """Return all that comes before the records of a file."""
    content = {"shard": shard, "captions": captions, "embed_dim": tower.embed_dim, "tower": asdict(tower)}
    header = json.dumps(content).encode()
    start = _START.pack(_MAGIC, _VERSION, len(header))
    packed = start + header + hashlib.sha256(start + header).digest()
    return packed.ljust(_records_offset(len(header)), b"\0")


def samples_of(index: ShardIndex, shard: int) -> npt.NDArray[np.void]:
    """Return the records that the index has of the samples of a shard."""
    first, last = index.first_sample[shard : shard + 2]
    return index.samples[first:last]


def first_captions(index: ShardIndex, shard: int) -> npt.NDArray[np.int64]:
    """Return the record with which the captions of each sample of a shard begin, [n + 1] with their number at last."""
    return np.concatenate([[0], np.cumsum(samples_of(index, shard)["captions"], dtype=np.int64)])


def _records_offset(header_bytes: int) -> int:
    return -(-(_START.size + header_bytes + _CHECKSUM_BYTES) // _ALIGNMENT) * _ALIGNMENT


def require_tower(header: StoredHeader, path: Path, tower: "TextTowerDescription") -> None:
    """Raise ValueError, naming what differs, when stored embeddings were not made by ``tower``."""
    if difference := tower.difference_from(header.tower):
        raise ValueError(
            f"{path} holds embeddings of another text tower than {tower.name}: {difference}; "
            f"take the settings of the stored ones, or encode the captions again into another folder with {COMMAND}"
        )


class StoredText:
    """The stored embeddings of a set of shards, which any number of threads may read.

    ``open_shard`` is what ``cached_shards`` returns, where several sets share it.

    Raises:
        FileNotFoundError: the folder does not exist, or a shard has no file in it.
        ValueError: the embeddings are those of another text tower.
    """

    def __init__(
        self,
        folder: Path | str,
        index: ShardIndex,
        tower: "TextTowerDescription",
        open_shard: "Callable[[StoredText, int], _StoredShard] | None" = None,
    ) -> None:
        self._folder = Path(folder)
        self._index = index
        self._tower = tower
        if not self._folder.is_dir():
            raise FileNotFoundError(f"no folder {folder} of stored text embeddings: run {COMMAND} to make it")
        # One listing: opening every file of a large set would take minutes. The others are checked when first read.
        there = {entry.name for entry in os.scandir(self._folder)}
        missing = [name for name in index.shard_names if file_name(name) not in there]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(index.shard_names)} shards have no stored text embeddings in {folder}, the "
                f"first is {missing[0]}: run {COMMAND} again to encode the rest"
            )
        self._open = partial(open_shard or cached_shards(), self)
        self._open(0)

    def row(self, sample: int, which: int, caption: int) -> Float16Array:
        """Return the embedding of a caption of a sample of the index, float16 [d], a unit vector but for rounding.

        Args:
            sample: its number.
            which: place of the caption among those of the sample.
            caption: ``captions.caption_id`` of it.

        Raises:
            BadSample: of kind no-embedding (its captions could not be read when the captions were encoded, or have
                changed since) or damaged-embedding (it is not what was written, or the storage fails).
            ValueError: the file is damaged or of another text tower.
        """
        shard = self._index.shard_of(sample)
        file = self._open(shard)
        number = int(file.first_caption[sample - int(self._index.first_sample[shard])]) + which
        key_hash = int(self._index.samples[sample]["key_hash"])
        try:
            record = file.record(number)
        except OSError as error:
            raise BadSample("damaged-embedding", f"the stored text embedding cannot be read: {error}") from error
        if (record["key_hash"], record["caption_hash"]) != (key_hash, caption % 2**64):
            raise BadSample("no-embedding", f"{file.path.name} has no embedding of this caption: run {COMMAND} again")
        row: Float16Array = record["row"]
        if zlib.crc32(row.tobytes()) != record["crc32"]:
            raise BadSample("damaged-embedding", f"embedding {number} of {file.path.name} does not have its checksum")
        return row

    def _open_shard(self, shard: int) -> "_StoredShard":
        name = self._index.shard_names[shard]
        path = self._folder / file_name(name)
        header = read_header(path)
        require_tower(header, path, self._tower)
        first = first_captions(self._index, shard)
        if header.captions != first[-1]:
            raise ValueError(
                f"{path} has embeddings of {header.captions} captions and {name} has {first[-1]}: run {COMMAND} again"
            )
        return _StoredShard(path, header, first)


def cached_shards() -> "Callable[[StoredText, int], _StoredShard]":
    """Return a function that opens the embeddings of a shard and keeps the last few hundred files open."""
    return lru_cache(maxsize=_OPEN_FILES)(StoredText._open_shard)


class _StoredShard:
    """An open file of embeddings, closed when the last thread that reads from it lets go.

    Read, not mapped: a mapped file that is cut short on a shared disk kills the process.
    """

    def __init__(self, path: Path, header: StoredHeader, first_caption: npt.NDArray[np.int64]) -> None:
        self.path = path
        self.first_caption = first_caption
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
