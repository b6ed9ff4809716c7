"""Sources: sets of shards that a run trains on together, each with a weight.

    --data.shards photos                       one set, every sample once an epoch
    --data.shards photos:2,s3://bucket/web:0.5
    --data.shards photos:2 s3://bucket/web:0.5     the same; in YAML: shards: [photos:2, s3://bucket/web:0.5]

A weight says how often each sample of its set comes in an epoch: 2 is twice in every epoch, 0.5 once in every second
one (order.py). What is written is read so:

- A word holds one set, or several between commas. It is one set where a folder has that very name.
- A number after the last colon is the weight, 1 if there is none. It is no weight where a folder has that very name,
  and where it is the port of a URL without a path: ``http://host:8000`` and ``http://host:8000/x`` have none,
  ``http://host:8000:2``, ``http://host:8000/x:2`` and ``s3://bucket:2`` have the weight 2.

Where there are several sets, their samples and shards are numbered on, those of the second after those of the first.
With a weight above 1 a batch may hold a sample twice; ``--loss.mask-duplicates`` keeps equal captions from being
negatives of each other.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .cache import is_remote
from .index import ShardIndex, open_index
from .order import Share
from .reader import RawSample, ShardReader, cached_files
from .stored_text import Float16Array, StoredText, cached_shards

if TYPE_CHECKING:
    from ..models.text import TextTowerDescription

MAX_WEIGHT = 1000
_WEIGHT = re.compile(r"\+?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# Of the URLs whose host may have a port; others name a bucket there.
_SCHEMES_WITH_PORT = {"http", "https", "ftp", "ftps", "sftp", "ssh", "smb", "hdfs", "webhdfs", "webdav", "dav"}


@dataclass(frozen=True)
class Source:
    """A set of shards by its folder or URL, and how often each of its samples comes in an epoch."""

    address: str
    weight: Fraction = Fraction(1)


def parse_sources(words: Sequence[str]) -> list[Source]:
    """Return the sources that words of ``--data.shards`` name.

    Raises:
        ValueError: a word or a part of one is empty, a weight is no number above 0 and at most MAX_WEIGHT, or a set is
            named twice.
    """
    sources = [_parse_source(part) for part in _parts(words, "--data.shards")]
    _require_distinct(sources, [_place(source.address) for source in sources], "names the same set twice")
    return sources


def parse_folders(words: Sequence[str]) -> list[str]:
    """Return the folders that words of ``--data.text-embeddings`` name, written as sources without weights are.

    Raises:
        ValueError: a word or a part of one is empty, or a folder is named twice.
    """
    flag = "--data.text-embeddings"
    folders = list(_parts(words, flag))
    places = [_place(folder) for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ValueError(f"{flag} names {folders[number]} twice: every set of shards has a folder of its own")
    return folders


def _parts(words: Sequence[str], flag: str) -> Iterator[str]:
    if not words:
        raise ValueError(f"{flag} names nothing: give it a folder")
    for word in words:
        if os.path.isdir(word) or os.path.isdir(_split_weight(word)[0]):
            yield word
            continue
        for part in word.split(","):
            if not part.strip():
                where = "is an empty text" if not word.strip() else f"is {word!r}, with nothing on one side of a comma"
                raise ValueError(f"{flag} {where}: name a folder there, or leave it out")
            yield part.strip()


def _split_weight(word: str) -> tuple[str, str]:
    """Return the address in a word and the text of its weight, which is empty where there is none."""
    address, colon, weight = word.rpartition(":")
    if not colon or os.path.isdir(word) or _is_port(address, weight):
        return word, ""
    try:
        float(weight)
    except ValueError:
        return word, ""
    return address, weight.strip()


def _is_port(address: str, number: str) -> bool:
    """Whether a number after a colon is the port of the URL before it."""
    scheme, colon, host = address.rpartition("://")
    if not colon or "/" in host or scheme.rpartition("::")[2].lower() not in _SCHEMES_WITH_PORT:
        return False
    return number.isdecimal() and not re.search(r":\d+$", host)


def _parse_source(part: str) -> Source:
    address, text = _split_weight(part)
    if not address.strip():
        raise ValueError(f"--data.shards has {part!r}, a weight without a set: name a folder or a URL before the colon")
    if address.endswith(":") and not os.path.isdir(address):
        raise ValueError(
            f"--data.shards has {part!r}, a colon without a weight: name a number after it, or leave it out"
        )
    weight = Fraction(1)
    if text:
        # As a float first: the fraction of 1e-999999999 has as many digits.
        if not _WEIGHT.fullmatch(text) or not 0 < float(text) <= MAX_WEIGHT:
            raise _wrong_weight(address, text)
        try:
            weight = Fraction(text)
        except ValueError as error:  # thousands of digits
            raise _wrong_weight(address, text) from error
    return Source(address.strip(), weight)


def _wrong_weight(address: str, text: str) -> ValueError:
    return ValueError(
        f"--data.shards gives {address} the weight {text[:40]}, must be a number above 0 and at most {MAX_WEIGHT}, such"
        " as 2 or 0.5: how often each of its samples comes in an epoch"
    )


def _place(address: str) -> str:
    return address.rstrip("/") if is_remote(address) else os.path.realpath(address)


def _require_distinct(sources: Sequence[Source], keys: Sequence[str], what: str) -> None:
    """Raise ValueError where two sources have the same key."""
    for number, key in enumerate(keys):
        if key in keys[:number]:
            first, second = sources[keys.index(key)], sources[number]
            both = ", ".join(dict.fromkeys([first.address, second.address]))
            total = in_words(first.weight + second.weight)
            raise ValueError(f"--data.shards {what} ({both}): name one, with the weight {total}")


def in_words(weight: Fraction) -> str:
    """Return a weight as it is written."""
    return f"{float(weight):.15g}"


@dataclass(frozen=True)
class OpenSource:
    """A source that is open, and which numbers its samples and shards have among those of all."""

    address: str
    weight: Fraction
    index: ShardIndex
    reader: ShardReader
    stored_text: StoredText | None
    first_sample: int
    first_shard: int

    @property
    def samples_per_epoch(self) -> Fraction:
        """Samples that an epoch takes, on average."""
        return len(self.index) * self.weight

    def describe(self) -> str:
        """Return what the index counted, and the shards in which it found nothing."""
        index = self.index
        said = f"{len(index):,} samples with {index.captions:,} captions in {self.address}"
        if index.left_out:
            more = ", ..." if len(index.left_out) > 3 else ""
            said += f", without {len(index.left_out):,} shards that hold none ({', '.join(index.left_out[:3])}{more})"
        return said


class Sources:
    """The open sources of a run, which any number of threads may read from.

    Args:
        sources: what to open.
        cache_dir: folder for copies of remote shards.
        cache_gb: bytes of it in GB, for all sources together.
        fetchers: remote shards that are fetched ahead at a time, of all sources together; at least one of each.
        text_embeddings: a folder of stored text embeddings for each source.
        text_tower: the tower that they must be those of.

    Raises:
        FileNotFoundError: a source has no shards or no index, or a shard no stored text embeddings.
        ValueError: an index is damaged or stale, two sources hold the same samples, an epoch takes less than one sample
            of a source, or the stored text embeddings are those of another text tower.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        cache_dir: str,
        cache_gb: float,
        fetchers: int,
        text_embeddings: Sequence[str] | None,
        text_tower: "TextTowerDescription | None",
    ) -> None:
        fetchers = max(1, fetchers // max(1, sum(is_remote(source.address) for source in sources)))
        indexes = [
            open_index(source.address, cache_dir=cache_dir, cache_gb=cache_gb, fetchers=fetchers) for source in sources
        ]
        _require_distinct(sources, [index.fingerprint for index in indexes], "names two sets of the same samples")
        open_file, open_stored = cached_files(), cached_shards()
        self.opened: list[OpenSource] = []
        samples = shards = 0
        for number, (source, index) in enumerate(zip(sources, indexes, strict=True)):
            stored_text = None
            if text_embeddings is not None:
                assert text_tower is not None
                stored_text = StoredText(text_embeddings[number], index, text_tower, open_stored)
            reader = ShardReader(index, open_file)
            opened = OpenSource(source.address, source.weight, index, reader, stored_text, samples, shards)
            if opened.samples_per_epoch < 1:
                raise ValueError(
                    f"--data.shards gives {source.address} the weight {in_words(source.weight)}, which takes less than "
                    f"one of its {len(index):,} samples in an epoch: give it more"
                )
            self.opened.append(opened)
            samples += len(index)
            shards += len(index.shard_names)
        self._remote = [source for source in self.opened if source.index.remote is not None]
        self._first_samples = [source.first_sample for source in self.opened]

    @property
    def is_remote(self) -> bool:
        """Whether shards of any source are fetched."""
        return bool(self._remote)

    @property
    def shares(self) -> list[Share]:
        """What decides the order of the samples."""
        return [Share(source.index.samples_per_shard, source.weight) for source in self.opened]

    @property
    def fingerprint(self) -> Any:
        """What decides which samples come, JSON-able: of one set that of its index; else one and the weight of each."""
        if len(self.opened) == 1 and self.opened[0].weight == 1:
            return self.opened[0].index.fingerprint
        return [[source.index.fingerprint, str(source.weight)] for source in self.opened]

    @property
    def addresses(self) -> list[str]:
        """Folders and URLs of the sources, as they are written."""
        return [source.address for source in self.opened]

    def locate(self, sample: int) -> tuple[OpenSource, int]:
        """Return the source of a sample, and the sample's number in its index."""
        source = self.opened[bisect_right(self._first_samples, sample) - 1]
        return source, sample - source.first_sample

    def read(self, sample: int) -> RawSample:
        """Return the bytes of a sample; raises BadSample as ``ShardReader.read``."""
        source, number = self.locate(sample)
        return source.reader.read(number)

    def text_embedding(self, sample: int, which: int, caption: int) -> Float16Array | None:
        """Return the stored embedding of a caption, as ``StoredText.row`` does, or None where none are stored."""
        source, number = self.locate(sample)
        return None if source.stored_text is None else source.stored_text.row(number, which, caption)

    def shard_name(self, sample: int) -> str:
        """Return the name of the shard that holds a sample; where there are several sources, that of its source too."""
        source, number = self.locate(sample)
        name = source.index.shard_names[source.index.shard_of(number)]
        return name if len(self.opened) == 1 else f"{source.address.rstrip('/')}/{name}"

    def expect(self, shards: Sequence[int]) -> None:
        """Announce the shards read next, the soonest first: remote ones are fetched ahead, all others released."""
        of_each = []
        for source in self._remote:
            end = source.first_shard + len(source.index.shard_names)
            of_each.append([shard - source.first_shard for shard in shards if source.first_shard <= shard < end])
        # The local copies of all are held before anything is fetched for one, which might remove those of another.
        for source, expected in zip(self._remote, of_each, strict=True):
            source.reader.hold(expected)
        for source, expected in zip(self._remote, of_each, strict=True):
            source.reader.expect(expected)

    def close(self) -> None:
        """Stop fetching ahead."""
        for source in self.opened:
            source.reader.close()

    def describe(self) -> list[str]:
        """Return lines that say what each source holds, of several sources or by weights also in an epoch."""
        lines = [source.describe() for source in self.opened]
        if isinstance(self.fingerprint, str):
            return lines
        return [
            f"{line}; weight {in_words(source.weight)}: {float(source.samples_per_epoch):,.15g} an epoch"
            for line, source in zip(lines, self.opened, strict=True)
        ]

    def changes_since(self, then: Any, addresses: Any) -> list[str]:
        """Say what is not as it was when ``fingerprint`` was ``then`` and the addresses those given.

        Both come from a saved state and may be anything.
        """
        now = self.fingerprint
        if then == now:
            return []
        before, after = _pairs(then), _pairs(now)
        if (len(before) == len(after) == 1 and before[0][1] == after[0][1]) or not before:
            return [f"shards was {then} and is {now}"]
        if not isinstance(addresses, list) or len(addresses) != len(before):
            addresses = [
                f"source {number} (fingerprint {fingerprint})" for number, (fingerprint, _) in enumerate(before, 1)
            ]
        names = {source.index.fingerprint: source.address for source in self.opened}
        weights = dict(before)
        gone = [
            str(address)
            for (fingerprint, _), address in zip(before, addresses, strict=True)
            if fingerprint not in names
        ]
        new = [names[fingerprint] for fingerprint, _ in after if fingerprint not in weights]
        changes = [f"{name} holds other samples" for name in gone if name in new]
        changes += [f"{name} is missing from --data.shards" for name in gone if name not in new]
        changes += [f"{name} is new in --data.shards" for name in new if name not in gone]
        changes += [
            f"the weight of {names[fingerprint]} was {in_words(weights[fingerprint])} and is {in_words(weight)}"
            for fingerprint, weight in after
            if weights.get(fingerprint, weight) != weight
        ]
        if not changes:
            order = [names[fingerprint] for fingerprint, _ in before]
            changes.append(f"--data.shards had the order {', '.join(order)} and has {', '.join(self.addresses)}")
        return changes


def _pairs(fingerprint: Any) -> list[tuple[str, Fraction]]:
    """Return fingerprint and weight of each source; none where a saved state does not say them."""
    if isinstance(fingerprint, str):
        return [(fingerprint, Fraction(1))]
    try:
        return [(str(of_index), Fraction(weight)) for of_index, weight in fingerprint]
    except (TypeError, ValueError, ArithmeticError):
        return []
