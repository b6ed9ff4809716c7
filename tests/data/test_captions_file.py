"""What a captions file says, row by row, and every way it can say it wrongly."""

import pytest

from textlock.data.captions import read_captions
from textlock.data.captions_file import CaptionsFile
from textlock.data.images import BadSample
from textlock.data.reader import require_captions

IMAGES = {"a.jpg", "b.jpg", "c.jpg", "d.png"}


def rows(folder, name, text, **settings):
    (folder / name).write_text(text, encoding="utf-8")
    return [row[1:] for row in CaptionsFile(path=folder / name, **settings).rows(IMAGES.__contains__)]


def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path):
    """One that opened a cell would join the rows up to the next: 477 of 500 in a public report."""
    captions = ['"Welcome to the zoo', "a dog", 'a sign that reads "open"', 'it says closed"', '""']
    text = "file\tcaption\n" + "".join(f"{number}.jpg\t{caption}\n" for number, caption in enumerate(captions))
    assert rows(tmp_path, "c.tsv", text) == [(f"{number}.jpg", caption) for number, caption in enumerate(captions)]


def test_cells_in_quotation_marks(tmp_path):
    """Of a .csv always, of a .tsv when asked; line breaks inside are captions of one image."""
    assert rows(tmp_path, "c.csv", 'file,caption\na.jpg,"one, two\nthree ""four"""\n') == [
        ("a.jpg", 'one, two\nthree "four"')
    ]
    assert rows(tmp_path, "c.tsv", 'file\tcaption\na.jpg\t"one\ttwo"\n', quoting=True) == [("a.jpg", "one\ttwo")]


def test_columns_are_found_by_name_or_named(tmp_path):
    text = "url\tfilepath\ttitle\ttext\nu\ta.jpg\tA title\tsome text\n"
    assert rows(tmp_path, "c.tsv", text, caption_column="text") == [("a.jpg", "some text")]
    assert rows(tmp_path, "c.tsv", text, file_column="url", caption_column="title") == [("u", "A title")]
    assert rows(tmp_path, "c.tsv", "filepath\ttitle\na.jpg\tA title\n") == [("a.jpg", "A title")]
    assert rows(tmp_path, "c.jsonl", '{"filename": "a.jpg", "x": [1], "caption": "b"}\n\n') == [("a.jpg", "b")]
    assert rows(tmp_path, "c.tsv", "﻿file\tcaption\r\na.jpg\tx\r\n\r\n") == [("a.jpg", "x")]


REFUSED = {
    "no file column": ("c.tsv", "image\tcaption\na\tb\n", {}, "no column file, filepath or filename; .*image, cap"),
    "no caption column": ("c.jsonl", '{"file": "a", "words": "b"}\n', {}, "no column caption, title or text; .*file"),
    "a column that is not there": ("c.tsv", "file\tcaption\na\tb\n", {"caption_column": "alt"}, "no column alt; the"),
    "two caption columns": (
        "c.tsv", "file\ttitle\ttext\na\tb\tc\n", {}, "title and text are both columns; say by --caption-column",
    ),
    "two file columns": ("c.tsv", "file\tfilename\ttext\na\tb\tc\n", {}, "both columns; say by --file-column"),
    "a name twice": ("c.tsv", "file\tcaption\tcaption\na\tb\tc\n", {}, "line 1: the header names caption more than"),
    "a key twice": ("c.jsonl", '{"file": "a", "caption": "b", "caption": "c"}\n', {}, "line 1 names caption more than"),
    "cells in marks without --quoting": ("c.tsv", '"file"\t"caption"\n"a.jpg"\t"b"\n', {}, "say so by --quoting"),
    "a column too many": ("c.csv", "file,caption\na.jpg,one,two\n", {}, "line 2: it has 3 columns and not the 2"),
    "a column too few": ("c.tsv", "file\tcaption\na.jpg\n", {}, "line 2: it has 1 columns and not the 2"),
    "text behind a mark": ("c.csv", 'file,caption\na.jpg,"Hello" he said\n', {}, "line 2: .*quote the caption"),
    "a mark never closed": (
        "c.tsv", 'file\tcaption\na.jpg\t"never closed\nb.jpg\tx\n', {"quoting": True}, "line 2: .*quote the caption",
    ),
    "rows joined by marks": (
        "c.csv", 'file,caption\na.jpg,"Welcome\nb.jpg,a dog\nc.jpg,closed"\n', {},
        "lines 2 to 4: a quotation mark makes one row of them, and a cell of several lines names b.jpg",
    ),
    **{
        f"rows joined by marks, {number}": ("c.csv", text, {}, f"and a cell of several lines names {named}")
        for number, (text, named) in enumerate([
            ('caption,file\n"open quote,a.jpg\nother",b.jpg\n', "a.jpg"),
            ('file,caption\na.jpg,"6 inch\nd.png,a dog\nb.jpg,12"\n', "d.png"),
            ('file,caption\na.jpg,"Welcome\nb.jpg,one, two\nc.jpg,closed"\n', "b.jpg"),
        ])
    },
    "rows joined by marks in a .tsv": (
        "c.tsv", 'caption\tfile\n"Welcome\ta.JPG\na dog\tb.jpg\nx"\tc.jpg\n', {"quoting": True}, "names b.jpg",
    ),
    "a carriage return inside a line": ("c.tsv", "file\tcaption\na.jpg\tone\rtwo\n", {}, "line 3: it has 1 columns"),
    "too deep": ("c.jsonl", "[" * 100_000, {}, "line 1 is not JSON: it is nested too deeply"),
    "no JSON": ("c.jsonl", '{"file": "a", "caption": "b"}\n{oops\n', {}, "line 2 is not JSON"),
    "no object": ("c.jsonl", "[1]\n", {}, "line 1 is not a JSON object"),
    "null": ("c.jsonl", '{"file": "a", "caption": null}\n', {}, "line 1: file and caption must both hold text"),
    "another kind of file": ("c.txt", "", {}, r"must be \.tsv, \.csv or \.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, text, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        rows(tmp_path, name, text, **settings)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("caption", ["", " \t\n", "​​", "﻿", "⁠ ­", "\0", "　"])
def test_a_caption_without_width_is_none(caption):
    assert read_captions(caption.encode(), "txt", whole_text=True).texts == []
    with pytest.raises(BadSample, match="the caption is missing or empty"):
        require_captions([caption])


@pytest.mark.parametrize("caption", ["👩‍👩‍👧", "می‌خواهم", "​a​", "7", "!", "\U0001fae8", "\U000e1234", "\ue000"])
def test_characters_without_width_inside_a_caption_stay(caption):
    assert read_captions(caption.encode(), "txt").texts == [caption]
    require_captions([caption, ""])
