"""The command: what it writes, says and ends with."""

from textlock.data.images import decode_image
from textlock.data.index import INDEX_NAME, index_shards

from ..commands import run_here
from ..conftest import records
from .tars import read_all, sample, write_dataset, write_shards, write_tar


def run(*arguments):
    return run_here("textlock.data.shards", *arguments)


def test_pack_index_verify_and_repack(tmp_path):
    images, captions = write_dataset(tmp_path)
    shards, smaller = tmp_path / "shards", tmp_path / "smaller"
    source = ("--images", images, "--captions", captions)
    said = f"7 rows of {captions} name 7 images\n7 samples in 3 shards in {shards}; 0 left out\n"
    assert run("pack", *source, "--output", shards, "--samples-per-shard", 3, "--resize", 16) == (0, said, "")
    (shards / INDEX_NAME).unlink()
    said = "members of other fields, which are not read: 7 json\n7 samples in 3 shards; 0 problems\n"
    assert run("index", shards, "--workers", 1) == (0, said, "")
    assert run("verify", shards, "--workers", 1) == (0, "7 good samples; 0 problems\n", "")
    assert run("pack", "--shards", shards, "--output", smaller, "--resize", 8, "--workers", 1)[0] == 0
    assert [min(decode_image(read_all(folder)[0].image).shape[:2]) for folder in (shards, smaller)] == [16, 8]
    captions.write_text('file\tcaption\talt\n0.jpg\tx\ta "b"\n0.jpg\ty\t"c"\n2.jpg\t\t"d"\n', encoding="utf-8")
    options = ("--caption-column", "alt", "--output", tmp_path / "alt")
    said = (
        "3 rows of {} name 2 images\n2 captions stand in quotation marks, which were kept; --quoting takes them off a"
    )
    assert run("pack", *source, *options)[1].startswith(said.format(captions))
    assert [raw.caption for raw in read_all(tmp_path / "alt")] == [b'a "b"', b'"c"', b'"d"']
    assert run("pack", *source, "--quoting", *options[:3], tmp_path / "unmarked")[0] == 0
    assert read_all(tmp_path / "unmarked")[2].caption == b"d"
    for wrong in ([], ["--images", images], ["--shards", shards], ["--shards", shards, "--captions", captions]):
        refused = (2, "", "error: name --images and --captions, or --shards with --resize\n")
        assert run("pack", "--output", tmp_path / "out", *wrong) == refused


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
