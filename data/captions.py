"""Captions: bytes from a shard to text, and a 64-bit identity for each distinct caption.

Tokenising a 10 MB caption takes seconds even when the tokenizer keeps 77 tokens, so the cut comes first, in bytes.
"""

import codecs
import hashlib
import unicodedata

MAX_CAPTION_BYTES = 2048
_BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")  # spaces, line breaks, control characters, characters without width


def decode_caption(payload: bytes) -> str:
    """Return the text of a caption member: its first 2 KiB as UTF-8, stripped.

    Invalid bytes become U+FFFD and NUL becomes a space, so the result can always be tokenised and written as JSON. A
    character that the cut splits is dropped. Empty when nothing that has a width is left.
    """
    whole = len(payload) <= MAX_CAPTION_BYTES
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    caption = decoder.decode(payload[:MAX_CAPTION_BYTES], final=whole).replace("\0", " ").strip()
    return "" if is_blank(caption) else caption


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
