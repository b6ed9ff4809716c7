"""Captions: from the bytes of a member of a shard to texts, and a 64-bit identity for each distinct caption.

An image may have several: each line of a text is a caption, as in clip_benchmark's datasets, or each text of a list in
JSON. What is read is bounded: tokenising a 10 MB caption takes seconds even when the tokenizer keeps 77 tokens.
"""

import codecs
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .order import mix64, stream_key, uniform

MAX_CAPTION_BYTES = 2048
MAX_MEMBER_BYTES = 2**20
MAX_CAPTIONS = 2**16 - 1  # of one image: the index counts them with 16 bits
_BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")  # spaces, line breaks, control characters, characters without width


@dataclass(frozen=True)
class Fields:
    """The members of a sample that are read. Member ``000.depth.png`` is the field depth.png of sample 000.

    Raises:
        ValueError: no field, one that is named twice or that no member can have, or a .json without a key.
    """

    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Fields of the image: the first of them that a sample has is its image."""
    caption: tuple[str, ...] = ("txt",)
    """Fields of the captions: the first of them in which a sample has one. ``json:title`` is what the key title holds
    in the JSON object of the field json: a text, or a list of texts."""
    whole_text: bool = False
    """A text of several lines is one caption; otherwise each line is one."""

    def __post_init__(self) -> None:
        for flag, fields in (("image-fields", self.image), ("caption-fields", self.caption)):
            if not fields or len(set(fields)) < len(fields):
                raise ValueError(f"{flag} is {','.join(fields)!r}: name at least one field, and none twice")
            for field in fields:
                member = field.partition(":")[0]
                if not member or re.search(r"[\s/;]", member) or member.startswith("."):
                    raise ValueError(f"{flag} is {','.join(fields)!r}: a field is what follows the first dot of a name")
        both = {field for field in self.image if field in self.caption}
        if both:
            raise ValueError(f"{', '.join(sorted(both))} is named both as image-fields and as caption-fields")
        for field in self.image:
            if ":" in field:
                raise ValueError(f"image-fields is {','.join(self.image)!r}: only captions are read from JSON")
        for field in self.caption:
            member, colon, key = field.partition(":")
            if (member.rpartition(".")[2] == "json") != bool(key) or (colon and not key):
                raise ValueError(
                    f"caption-fields is {','.join(self.caption)!r}: name the key of a JSON object, and of it alone, "
                    "such as json:caption"
                )

    def named(self, image: Sequence[str] | None, caption: Sequence[str] | None) -> "Fields":
        """Return these fields with those in their place that words name, each of one or several between commas."""
        return replace(
            self,
            image=self.image if image is None else _split_fields(image),
            caption=self.caption if caption is None else _split_fields(caption),
        )

    def __str__(self) -> str:
        lines = ", a text of several lines being one caption" if self.whole_text else ""
        return f"image in {' or '.join(self.image)}, captions in {' or '.join(self.caption)}{lines}"


def _split_fields(words: Sequence[str]) -> tuple[str, ...]:
    """Return the fields in words that may hold several between commas. Members are in lower case, keys of JSON not."""
    fields = (field.strip() for word in words for field in word.split(","))
    parts = (field.partition(":") for field in fields)
    return tuple(member.lower() + colon + key.strip() for member, colon, key in parts)


class Captions(NamedTuple):
    """The captions in one member."""

    texts: list[str]
    """Those that say something, in their order; each has at most MAX_CAPTION_BYTES of UTF-8."""
    cut: int
    """How often a limit took the end of a caption, or all captions behind it."""


def read_captions(payload: bytes, field: str, *, whole_text: bool = False) -> Captions:
    """Return the captions in ``payload``, which has at most MAX_MEMBER_BYTES + 1 bytes of a member.

    NUL becomes a space, so a caption can always be written as JSON.

    Args:
        payload: the first bytes of the member.
        field: as in `Fields.caption`.
        whole_text: as in `Fields`.

    Raises:
        ValueError: the payload is not UTF-8; or the field is one of JSON, and the payload is none or no object, or its
            key holds no text.
    """
    key = field.partition(":")[2]
    too_long = len(payload) > MAX_MEMBER_BYTES
    if key:
        if too_long:
            raise ValueError(f"the JSON has more than {MAX_MEMBER_BYTES:,} bytes")
        texts = _texts_of_json(payload, key)
    else:
        text = _decode(payload[:MAX_MEMBER_BYTES], is_whole=not too_long)
        texts = [text] if whole_text else text.splitlines()
    found = without_blanks(texts)
    cut = int(too_long)
    for place, caption in enumerate(found[:MAX_CAPTIONS]):
        if len(caption) > MAX_CAPTION_BYTES // 4:  # a character has at most four bytes
            encoded = caption.encode()
            if len(encoded) > MAX_CAPTION_BYTES:
                # A character that the cut splits is dropped.
                found[place] = encoded[:MAX_CAPTION_BYTES].decode("utf-8", "ignore").strip()
                cut += 1
    return Captions(found[:MAX_CAPTIONS], cut + max(0, len(found) - MAX_CAPTIONS))


def _decode(payload: bytes, *, is_whole: bool) -> str:
    """Return UTF-8 text; where it is not ``is_whole``, its end may lie inside a character."""
    inner = payload.strip(b"\0")
    if inner.count(0) * 3 > len(inner):
        raise ValueError("more than a third of its bytes are zero: it is UTF-16 or UTF-32, and captions are UTF-8")
    try:
        return codecs.utf_8_decode(payload.removeprefix(codecs.BOM_UTF8), "strict", is_whole)[0]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"it is not UTF-8, as captions are (byte {byte:#04x})") from error


def without_blanks(texts: Sequence[str]) -> list[str]:
    """Return the texts that say something, without the space around them; NUL becomes a space."""
    return [caption for caption in (text.replace("\0", " ").strip() for text in texts) if not is_blank(caption)]


def _texts_of_json(payload: bytes, key: str) -> list[str]:
    try:
        content = json.loads(payload, object_pairs_hook=unique_keys)
    except KeyError as error:
        raise ValueError(f"its JSON names {error.args[0]} more than once") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"its JSON has no key {key}")
    value = content[key]
    texts = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"the key {key} of its JSON holds no text and no list of texts")
    # A text of JSON is one caption whatever breaks its lines; half a surrogate pair is no character.
    return [one_line(text).encode("utf-8", "replace").decode() for text in texts if text is not None]


def read_utf8(path: Path) -> str:
    """Return the text of a file, without a byte-order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of JSON pairs; raises KeyError for a name that comes twice, of which Python takes the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise KeyError(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return content


def one_line(text: str) -> str:
    """Return a caption with spaces in place of the breaks of its lines."""
    return " ".join(text.splitlines())


def is_blank(caption: str) -> bool:
    """Whether a caption says nothing: white space, or characters without width such as U+200B and the byte-order mark.

    A tokenizer makes of it what it makes of no text. A character that this Python does not know, a new emoji, counts.
    """
    return all(unicodedata.category(character) in _BLANK for character in caption)


def caption_id(caption: str) -> int:
    """Return a signed 64-bit identity (BLAKE2b): equal for captions that differ only in case, spacing or composition.

    An uncased tokenizer maps such captions to the same tokens, so in a contrastive batch they are the same text.
    """
    normalised = " ".join(unicodedata.normalize("NFC", caption).lower().split())
    digest = hashlib.blake2b(normalised.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def captions_hash(captions: Sequence[str]) -> int:
    """Return 64 bits for the captions of an image: those of ``caption_id`` where it has one; none is the empty one."""
    return hash_of_ids([caption_id(caption) for caption in captions])


def hash_of_ids(ids: Sequence[int]) -> int:
    """Return what ``captions_hash`` does for captions of these ``caption_id``."""
    if len(ids) < 2:
        return (ids[0] if ids else caption_id("")) % 2**64
    digest = hashlib.blake2b(np.array(ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def caption_draws(seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the uniform number in [0, 1) that chooses the caption at each position, shape [n] -> [n]."""
    return uniform(mix64(positions.astype(np.uint64) ^ stream_key(seed, epoch, "caption")))
