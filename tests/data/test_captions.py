import json

import numpy as np
import pytest

from textlock.data.captions import (
    MAX_CAPTION_BYTES,
    MAX_CAPTIONS,
    MAX_MEMBER_BYTES,
    Fields,
    caption_draws,
    caption_id,
    captions_hash,
    hash_of_ids,
    read_captions,
)


@pytest.mark.parametrize(
    ("payload", "texts"),
    [
        pytest.param(b"a red bus", ["a red bus"], id="plain"),
        pytest.param(b"  a bus\r\n", ["a bus"], id="stripped"),
        pytest.param(b"a\0bus\0", ["a bus"], id="nul"),
        pytest.param("Grüße 🐘".encode(), ["Grüße 🐘"], id="utf-8"),
        pytest.param(b"", [], id="empty"),
        pytest.param(b" \0\n", [], id="only white space"),
        pytest.param(b"one\n\n two \r\nthree\rfour", ["one", "two", "three", "four"], id="lines"),
        pytest.param("a\u2028b\x85c".encode(), ["a", "b", "c"], id="other line breaks"),
        pytest.param("\ufeffa dog".encode(), ["a dog"], id="byte-order mark"),
        pytest.param("\u200b\na dog".encode(), ["a dog"], id="a line without width"),
    ],
)
def test_each_line_of_a_text_is_a_caption(payload, texts):
    assert read_captions(payload, "txt") == (texts, 0)
    json.dumps(read_captions(payload, "txt").texts).encode("utf-8")
    assert read_captions(payload, "txt", whole_text=True).texts == (
        [payload.decode("utf-8-sig").replace("\0", " ").strip()] if texts else []
    )


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        pytest.param(b"caf\xe9 au lait", "it is not UTF-8, as captions are (byte 0xe9)", id="latin-1"),
        pytest.param(b"a dog\n\xed\xa0\x80x", "byte 0xed", id="half a surrogate pair"),
        pytest.param(b"a dog \xc3", "byte 0xc3", id="an incomplete character at the end"),
        pytest.param("a dog".encode("utf-16"), "it is UTF-16 or UTF-32", id="utf-16 with its mark"),
        pytest.param("a dog, große".encode("utf-16-le"), "UTF-16 or UTF-32, and captions are UTF-8", id="utf-16-le"),
        pytest.param("a dog".encode("utf-32-be"), "it is UTF-16 or UTF-32", id="utf-32-be"),
        pytest.param("狗と犬".encode("utf-16"), "byte 0xff", id="utf-16 of other letters"),
        pytest.param("狗".encode("gbk"), "byte 0xb9", id="gbk"),
    ],
)
@pytest.mark.parametrize("whole_text", [False, True])
def test_a_text_that_is_not_utf_8_is_no_caption(payload, message, whole_text):
    with pytest.raises(ValueError) as caught:
        read_captions(payload, "txt", whole_text=whole_text)
    assert message in str(caught.value)


def test_the_limit_is_of_each_caption_and_what_is_cut_is_counted():
    lines = [f"{number} " + "word " * 80 for number in range(10)]
    assert read_captions("\n".join(lines).encode(), "txt") == ([line.strip() for line in lines], 0)
    long = "a" * (MAX_CAPTION_BYTES - 1)
    assert read_captions(f"{long}ééé\nb\n{long}b".encode(), "txt") == ([long, "b", long + "b"], 1)
    assert read_captions(f"{long}ab\n{long}ab".encode(), "txt").cut == 2
    assert read_captions(b"x" * (MAX_MEMBER_BYTES + 1), "txt") == (["x" * MAX_CAPTION_BYTES], 2)
    # The limit of a member may split a character, which is no damage; the member itself may not end in one.
    assert read_captions(b"x" + "é".encode() * (MAX_MEMBER_BYTES // 2), "txt").cut == 2
    assert read_captions(b"a\n" * (MAX_CAPTIONS + 3), "txt") == (["a"] * MAX_CAPTIONS, 3)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ({"caption": " a dog\nruns ", "title": "b"}, ["a dog runs"]),
        ({"caption": ["a", "", "b\0", None, "\u200b"]}, ["a", "b"]),
        ({"caption": []}, []),
        ({"caption": None}, []),
        ({"caption": "half \ud800"}, ["half ?"]),
    ],
)
def test_a_key_of_json_holds_a_caption_or_a_list(content, texts):
    assert read_captions(json.dumps(content).encode(), "json:caption").texts == texts


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"a dog", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"\xff\xfe\xff", "it is not JSON"),
        (b'["a dog"]', "its JSON has no key caption"),
        (b'{"Caption": "a"}', "its JSON has no key caption"),
        (b'{"caption": "a", "caption": "b"}', "its JSON names caption more than once"),
        (b'{"caption": 3}', "the key caption of its JSON holds no text and no list of texts"),
        (b'{"caption": ["a", ["b"]]}', "the key caption of its JSON holds no text and no list of texts"),
        (b'{"caption": "a", "x": "' + b"x" * MAX_MEMBER_BYTES + b'"}', "the JSON has more than 1,048,576 bytes"),
    ],
)
def test_json_without_a_caption_is_no_caption(payload, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read_captions(payload[: MAX_MEMBER_BYTES + 1], "json:caption")


def test_fields_are_words_between_commas():
    fields = Fields().named(["JPG, depth.png", "webp"], ["txt,json: Caption "])
    assert fields == Fields(("jpg", "depth.png", "webp"), ("txt", "json:Caption"))
    assert Fields().named(None, None) == Fields()
    assert str(fields) == "image in jpg or depth.png or webp, captions in txt or json:Caption"


@pytest.mark.parametrize(
    ("image", "caption", "message"),
    [
        ("jpg,", "txt", "image-fields is 'jpg,': a field is what follows the first dot of a name"),
        ("jpg,jpg", "txt", "image-fields is 'jpg,jpg': name at least one field, and none twice"),
        (".jpg", "txt", "a field is what follows the first dot of a name"),
        ("json:image", "txt", "image-fields is 'json:image': only captions are read from JSON"),
        ("jpg", "json", "caption-fields is 'json': name the key of a JSON object, and of it alone"),
        ("jpg", "json:", "name the key of a JSON object"),
        ("jpg", "txt:caption", "name the key of a JSON object, and of it alone, such as json:caption"),
        ("jpg", "", "caption-fields is ''"),
        ("jpg;png", "txt", "image-fields is 'jpg;png': a field is what follows the first dot of a name"),
        ("jpg,txt", "txt", "txt is named both as image-fields and as caption-fields"),
    ],
)
def test_fields_that_no_member_has_are_refused(image, caption, message):
    with pytest.raises(ValueError) as caught:
        Fields().named([image], [caption])
    assert message in str(caught.value)


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


def test_the_hash_of_captions_is_of_all_of_them_in_their_order():
    one, two = caption_id("one"), caption_id("two")
    assert captions_hash(["one"]) == one % 2**64 == hash_of_ids([one])
    assert captions_hash([]) == captions_hash([""])
    assert captions_hash(["one", "two"]) == hash_of_ids([one, two]) != captions_hash(["two", "one"])
    assert captions_hash(["one", "two"]) == 14869291022761744633, "an index holds these numbers"


def test_the_draw_of_a_caption_is_a_function_of_seed_epoch_and_position():
    draws = caption_draws(42, 3, np.arange(20_000))
    assert np.array_equal(caption_draws(42, 3, np.arange(500, 510)), draws[500:510])
    assert draws.min() >= 0 and draws.max() < 1
    # 5 standard deviations of a share of 20,000 draws.
    assert np.bincount((draws * 5).astype(int)) / 20_000 == pytest.approx([0.2] * 5, abs=5 * (0.16 / 20_000) ** 0.5)
    for other in (caption_draws(43, 3, np.arange(9)), caption_draws(42, 4, np.arange(9))):
        assert not np.isin(other, draws[:9]).any()
