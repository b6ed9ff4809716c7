"""Reads the samples of indexed shards: their bytes, as they are in the tar.

Keys and captions are compared with the index: a shard that has changed gives bad samples, not wrong ones.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .cache import Lease
from .captions import MAX_MEMBER_BYTES, captions_hash, is_blank, read_captions
from .images import MAX_IMAGE_BYTES, BadSample
from .index import ShardIndex, hash_key
from .tar import BLOCK, DamagedTar, header_name, keys_of, read_members

# A long name sits in extended headers before the member's own: the header blocks and a path of at most 4 KiB.
_MAX_HEADER_BLOCKS = 16
_MAX_READ_AHEAD = 4096
_OPEN_FILES = 256


class _OpenFile:
    """An open file, closed when no thread reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass(frozen=True)
class RawSample:
    """The bytes of one sample, and its captions."""

    key: str
    image: bytes
    member: bytes
    """Of the captions, at most one byte more than ``read_captions`` reads."""
    captions: list[str]

    def caption(self, draw: float) -> tuple[int, str]:
        """Return the caption that a uniform number in [0, 1) chooses, and its place among those of the sample.

        Raises:
            BadSample: of kind no-caption where there is none.
        """
        require_captions(self.captions)
        place = int(draw * len(self.captions))
        return place, self.captions[place]


def cached_files() -> Callable[[Path], _OpenFile]:
    """Return a function that opens files and keeps the last few hundred of them open."""
    return lru_cache(maxsize=_OPEN_FILES)(_OpenFile)


class ShardReader:
    """Reads samples of an index, from any number of threads.

    ``open_file`` is what ``cached_files`` returns, where readers share it.
    """

    def __init__(self, index: ShardIndex, open_file: Callable[[Path], _OpenFile] | None = None) -> None:
        self._index = index
        self._open_file = open_file or cached_files()

    def hold(self, shards: Sequence[int]) -> None:
        """Keep the local copies that there are of remote shards until the next ``expect``."""
        if self._index.remote is not None:
            self._index.remote.hold(shards)

    def expect(self, shards: Sequence[int]) -> None:
        """Announce the shards read next, the soonest first: remote ones are fetched ahead, all others released."""
        if self._index.remote is not None:
            self._index.remote.expect(shards)

    def close(self) -> None:
        """Stop fetching ahead."""
        if self._index.remote is not None:
            self._index.remote.close()

    def _open(self, shard: int) -> _OpenFile | Lease:
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
        image_offset, caption_offset, image_size, caption_size, key_hash, caption_hash, _, place = self._index.samples[
            sample
        ].item()
        if image_size > MAX_IMAGE_BYTES:
            raise BadSample("too-large", f"the image has {image_size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        caption_size = min(caption_size, MAX_MEMBER_BYTES + 1)
        image_end, caption_end = image_offset + image_size, caption_offset + caption_size
        # One read brings the header, which has the key, the image, and the caption where it follows closely.
        start = image_offset - BLOCK
        together = image_end <= caption_offset <= image_end + _MAX_READ_AHEAD
        try:
            file = self._open(shard)
            block = _read_exactly(file.descriptor, start, (caption_end if together else image_end) - start)
            if together:
                member = block[caption_offset - start :]
            else:
                member = _read_exactly(file.descriptor, caption_offset, caption_size)
            key = self._key(file.descriptor, block[:BLOCK], image_offset, key_hash)
        except (OSError, OverflowError) as error:  # the latter for an offset beyond 2^63, which an index may hold
            name = self._index.shard_names[shard]
            raise BadSample("unreadable", f"{name} cannot be read at byte {image_offset}: {error}") from error
        captions = self._captions(member, caption_offset, caption_hash, place)
        return RawSample(key, block[BLOCK : image_end - start], member, captions)

    def read_captions(self, sample: int) -> list[str]:
        """Return the captions of a sample without reading its image; none where it has none.

        Raises:
            BadSample: of kind unreadable or moved, as in ``read``.
        """
        shard = self._index.shard_of(sample)
        _, offset, _, size, _, caption_hash, _, place = self._index.samples[sample].item()
        try:
            member = _read_exactly(self._open(shard).descriptor, offset, min(size, MAX_MEMBER_BYTES + 1))
        except (OSError, OverflowError) as error:
            name = self._index.shard_names[shard]
            raise BadSample("unreadable", f"{name} cannot be read at byte {offset}: {error}") from error
        return self._captions(member, offset, caption_hash, place)

    def _captions(self, member: bytes, offset: int, caption_hash: int, place: int) -> list[str]:
        fields = self._index.fields
        captions: list[str] = []
        try:
            if member:
                captions = read_captions(member, fields.caption[place], whole_text=fields.whole_text).texts
            moved = captions_hash(captions) != caption_hash
        except (ValueError, IndexError):  # what is there is no JSON, or the index names a field that does not exist
            moved = True
        if moved:
            raise BadSample("moved", f"byte {offset} does not begin the captions that were indexed there")
        return captions

    def _key(self, descriptor: int, header: bytes, image_offset: int, key_hash: int) -> str:
        for key in keys_of(header_name(header)):
            if hash_key(key) == key_hash:
                return key
        # The header may hold a cut name, with the whole one in extended headers some blocks before.
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            for blocks in range(3, min(_MAX_HEADER_BLOCKS, image_offset // BLOCK) + 1):
                try:
                    member = next(read_members(file, image_offset - blocks * BLOCK), None)
                except DamagedTar:  # no header begins here
                    continue
                if member and member.offset == image_offset:
                    for key in keys_of(member.name):
                        if hash_key(key) == key_hash:
                            return key
        raise BadSample("moved", f"byte {image_offset} does not begin the sample that was indexed there")


def _read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    payload = os.pread(descriptor, size, offset)
    if len(payload) < size:
        raise OSError(f"only {len(payload)} of {size} bytes are there")
    return payload


def require_captions(captions: Sequence[str]) -> None:
    """Raise BadSample of kind no-caption unless one of the captions says something."""
    if all(map(is_blank, captions)):
        raise BadSample("no-caption", "the caption is missing or empty")
