"""The command: what it writes, says and ends with."""

import json
import subprocess
import sys

import pytest

from textlock.data.images import decode_image
from textlock.data.index import INDEX_NAME, index_shards, open_index
from textlock.data.reader import ShardReader
from textlock.data.shards import main

from .tars import jpeg, sample, write_shards, write_tar


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["shards", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def test_pack_index_verify_and_repack(run, tmp_path):
    images, captions, shards = tmp_path / "images", tmp_path / "captions.tsv", tmp_path / "shards"
    images.mkdir()
    for number in range(7):
        (images / f"{number}.jpg").write_bytes(jpeg(number))
    captions.write_text("file\tcaption\n" + "".join(f"{number}.jpg\tcaption {number}\n" for number in range(7)))
    source = ("--images", images, "--captions", captions)
    said = f"7 samples in 3 shards in {shards}; 0 left out\n"
    assert run("pack", *source, "--output", shards, "--samples-per-shard", "3", "--resize", "16") == (0, said, "")
    (shards / INDEX_NAME).unlink()
    assert run("index", shards) == (0, "7 samples in 3 shards; 0 problems\n", "")
    assert run("verify", shards) == (0, "7 good samples; 0 problems\n", "")
    assert run("pack", "--shards", shards, "--output", tmp_path / "smaller", "--resize", "8")[0] == 0
    short = [
        min(decode_image(ShardReader(open_index(folder)).read(0).image).shape[:2])
        for folder in (shards, tmp_path / "smaller")
    ]
    assert short == [16, 8]
    for wrong in ([], ["--images", images], ["--shards", shards], ["--shards", shards, "--captions", captions]):
        refused = (2, "", "error: name --images and --captions, or --shards with --resize\n")
        assert run("pack", "--output", tmp_path / "out", *wrong) == refused


def test_verify_lists_every_problem_and_a_key_cannot_forge_a_line(run, tmp_path):
    shards, listed = write_shards(tmp_path / "shards", [2]), tmp_path / "bad.jsonl"
    members = [("a\nb\x1b[2J.jpg", b"no image"), ("a\nb\x1b[2J.txt", b"x"), *sample("c"), *sample("c")]
    write_tar(shards / "00001.tar", members)
    index_shards(shards)
    status, out, err = run("verify", shards, "--output", listed)
    assert (status, err) == (1, "")
    assert out.splitlines()[-1] == "3 good samples; 3 problems: 2 duplicate, 1 format"
    assert "00001.tar\ta\\nb\\x1b[2J\tformat\tnot a JPEG, PNG or WebP" in out
    assert len(out.splitlines()) == 4 and "\x1b" not in out
    problems = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {tuple(problem) for problem in problems} == {("shard", "key", "kind", "message", "place")}
    assert sorted((problem["key"], problem["place"]) for problem in problems if problem["place"] is not None) == [
        ("a\nb\x1b[2J", 0)
    ]


def test_it_runs_as_a_module_and_an_error_is_one_line(tmp_path):
    command = [sys.executable, "-m", "textlock.data.shards", "index", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no .tar shards in") and done.stderr.count("\n") == 1
