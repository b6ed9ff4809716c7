"""The command: what it writes, says and ends with."""

import json

from textlock.data.images import decode_image
from textlock.data.index import INDEX_NAME, index_shards

from ..commands import run_here
from ..conftest import records
from .tars import read_all, sample, tarfile_contents, write_dataset, write_shards, write_tar

CUT = (
    "at least 1 captions are not read to their end: 2,048 bytes are read of each, 1,048,576 bytes and 65,535 captions "
    "of a member"
)


def run(*arguments):
    return run_here("textlock.data.shards", *arguments)


def test_pack_index_verify_and_repack(tmp_path):
    images, captions = write_dataset(tmp_path)
    shards, smaller = tmp_path / "shards", tmp_path / "smaller"
    source = ("--images", images, "--captions", captions)
    said = f"7 rows of {captions}\n7 images with 7 captions in 3 shards in {shards}; 0 rows left out\n"
    assert run("pack", *source, "--output", shards, "--samples-per-shard", 3, "--resize", 16) == (0, said, "")
    (shards / INDEX_NAME).unlink()
    read = "read: image in jpg or jpeg or png or webp, captions in txt\n"
    said = f"members of other fields, which are not read: 7 json\n{read}"
    said += "7 samples with 7 captions in 3 shards; 0 problems\n"
    assert run("index", shards, "--workers", 1) == (0, said, "")
    assert run("verify", shards, "--workers", 1) == (0, "7 good samples; 0 problems\n", "")
    assert run("pack", "--shards", shards, "--output", smaller, "--resize", 8, "--workers", 1)[0] == 0
    assert [min(decode_image(read_all(folder)[0].image).shape[:2]) for folder in (shards, smaller)] == [16, 8]
    for wrong in ([], ["--images", images], ["--shards", shards], ["--shards", shards, "--captions", captions]):
        refused = (2, "", "error: name --images and --captions, or --shards with --resize\n")
        assert run("pack", "--output", tmp_path / "out", *wrong) == refused


def test_rows_of_one_image_are_its_captions(tmp_path):
    images, captions = write_dataset(tmp_path)
    long = "x" * 2049
    rows = [("0.jpg", "x", 'a "b"'), ("2.jpg", "y", f'"{long}"'), ("./0.jpg", "z", '"c"'), ("2.jpg", "", "d")]
    captions.write_text("file\tcaption\talt\n" + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    command = ("pack", "--images", images, "--captions", captions, "--caption-column", "alt", "--output")
    assert run(*command, tmp_path / "alt") == (
        0,
        f"4 rows of {captions}\n"
        "2 captions stand in quotation marks, which were kept; --quoting takes them off a .tsv\n"
        f"{CUT}\n"
        f"2 images with 4 captions in 1 shards in {tmp_path / 'alt'}; 0 rows left out\n",
        "",
    )
    assert [raw.member.decode() for raw in read_all(tmp_path / "alt")] == ['a "b"\n"c"', f'"{long}"\nd']
    facts = json.loads(tarfile_contents(tmp_path / "alt" / "00000.tar")[2][1])
    assert (facts["file"], facts["caption"]) == ("0.jpg", ['a "b"', '"c"'])
    assert run(*command, tmp_path / "unmarked", "--quoting")[0] == 0
    assert read_all(tmp_path / "unmarked")[0].captions == ['a "b"', "c"]
    # The same captions from the JSON that pack writes, and in shards made of these.
    json_fields = ("--caption-fields", "json:caption")
    assert run("index", tmp_path / "unmarked", *json_fields)[0] == 0
    assert run("pack", "--shards", tmp_path / "unmarked", "--resize", 8, "--output", tmp_path / "again")[0] == 0
    assert [raw.captions for raw in read_all(tmp_path / "again")] == [['a "b"', "c"], ["x" * 2048, "d"]]

    refused = run(*command[:-3], "--output", tmp_path / "out")
    why = "2.jpg: the caption is missing or empty; mend it, or leave such samples out with --skip-bad"
    assert refused == (2, "", f"error: {captions} line 5: {why}\n")
    said = f"{captions.name}\t2.jpg\tno-caption\tthe caption is missing or empty\n4 rows of {captions}\n"
    said += f"2 images with 3 captions in 1 shards in {tmp_path / 'out'}; 1 rows left out\n"
    assert run(*command[:-3], "--output", tmp_path / "out", "--skip-bad") == (0, said, "")


def test_a_caption_of_several_lines_is_one_and_stays_one_in_other_shards(tmp_path):
    images, _ = write_dataset(tmp_path)
    rows = ({"file": "0.jpg", "caption": "a dog\non grass"}, {"file": "2.jpg", "caption": "a\u2028b"})
    table = tmp_path / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("pack", "--images", images, "--captions", table, "--output", tmp_path / "a")[0] == 0
    assert [raw.captions for raw in read_all(tmp_path / "a")] == [["a dog on grass"], ["a b"]]
    both = [
        *sample("a", txt=None, json=json.dumps({"caption": ["a dog", "a cat"]}).encode()),
        *sample("b", txt=b"c\nd"),
    ]
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b" / "0.tar", both)
    fields = ("--caption-fields", "json:caption,txt", "--whole-text")
    assert run("index", tmp_path / "b", *fields, "--index", tmp_path / "home")[0] == 0
    assert run("pack", "--shards", tmp_path / "home", "--resize", 8, "--output", tmp_path / "c")[0] == 0
    assert [raw.captions for raw in read_all(tmp_path / "c")] == [["a dog", "a cat"], ["c d"]]
    write_tar(tmp_path / "b" / "1.tar", both)
    said = run("verify", tmp_path / "home")[1]
    assert "1.tar is not in the index" in said and said.endswith("4 good samples; 1 problems: 1 index\n")


def test_index_says_what_it_read_left_and_cut(tmp_path):
    members = [*sample("a", txt=b"one\ntwo", npz=b"x"), *sample("b", txt=b""), *sample("c", txt=b"x" * 3000)]
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "1.tar").write_bytes(b"")
    home = tmp_path / "home"
    status, said, _ = run("index", tmp_path, "--caption-fields", "caption,TXT", "--index", home)
    why = "the file ends at byte 0 without an end marker: it was cut short"
    assert (status, said.splitlines()) == (
        0,
        [
            f"1.tar\t-\ttar-truncated\t{why}",
            f"1 of 2 shards are left out: 1.tar ({why})",
            "members of other fields, which are not read: 1 npz",
            "1 samples have several captions (a line of a text is one, unless --whole-text is given)",
            "1 samples have no caption",
            CUT,
            "read: image in jpg or jpeg or png or webp, captions in caption or txt",
            f"the index is in {home}: name that folder in place of {tmp_path}",
            "3 samples with 3 captions in 1 shards; 1 problems",
        ],
    )
    assert run("verify", home)[1].splitlines()[-1] == "2 good samples; 2 problems: 1 tar-truncated, 1 no-caption"
    assert run("index", tmp_path, "--caption-fields", "json") == (
        2,
        "",
        "error: caption-fields is 'json': name the key of a JSON object, and of it alone, such as json:caption\n",
    )


def test_verify_lists_every_problem_and_a_key_cannot_forge_a_line(tmp_path):
    shards, listed = write_shards(tmp_path / "shards", [2]), tmp_path / "bad.jsonl"
    forged = "a\nb\x1b[2J"
    write_tar(shards / "00001.tar", [*sample(forged, jpg=b"no image"), *sample("c"), *sample("c")])
    index_shards(shards)
    status, out, err = run("verify", shards, "--output", listed)
    assert (status, err) == (1, "")
    assert out.splitlines()[-1] == "3 good samples; 3 problems: 2 duplicate, 1 format"
    assert "00001.tar\ta\\nb\\x1b[2J\tformat\tnot a JPEG, PNG or WebP" in out
    assert len(out.splitlines()) == 4 and "\x1b" not in out
    problems = records(listed)
    assert {tuple(problem) for problem in problems} == {("shard", "key", "kind", "message", "place")}
    assert [problem["key"] for problem in problems if problem["place"] == 0] == [forged]


def test_an_error_is_one_line(tmp_path):
    status, out, err = run("index", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("error: no .tar shards in") and err.count("\n") == 1
