import json

import pytest

from textlock.data.captions import MAX_CAPTION_BYTES, caption_id, decode_caption


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        pytest.param(b"a red bus", "a red bus", id="plain"),
        pytest.param(b"  a bus\r\n", "a bus", id="stripped"),
        pytest.param(b"a\0b\0", "a b", id="nul"),
        pytest.param("Grüße 🐘".encode(), "Grüße 🐘", id="utf-8"),
        pytest.param(b"caf\xe9", "caf\ufffd", id="latin-1"),
        pytest.param(b"\xed\xa0\x80x", "\ufffd\ufffd\ufffdx", id="surrogate"),
        pytest.param(b"", "", id="empty"),
        pytest.param(b" \0\n", "", id="only white space"),
        pytest.param(b"\xc3", "\ufffd", id="an incomplete character at the end"),
    ],
)
def test_decode(payload, text):
    assert decode_caption(payload) == text
    json.dumps(decode_caption(payload)).encode("utf-8")


def test_cut_is_in_bytes_and_drops_a_split_character():
    payload = b"a" * (MAX_CAPTION_BYTES - 1) + "é".encode() * 5_000_000
    assert decode_caption(payload) == "a" * (MAX_CAPTION_BYTES - 1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A red  bus", "a red bus", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("a red bus", "a red car", False),
        ("ab", "a b", False),
    ],
)
def test_identity(one, other, same):
    assert (caption_id(one) == caption_id(other)) is same


def test_identity_is_signed_64_bit_and_stable():
    ids = [caption_id(str(number)) for number in range(100)]
    assert min(ids) < 0 < max(ids)
    assert all(-(2**63) <= value < 2**63 for value in ids)
    assert ids[0] == 8493733112532773764, "an index holds these numbers"
    assert len(set(ids)) == 100
    caption_id("lone surrogate \ud800")
