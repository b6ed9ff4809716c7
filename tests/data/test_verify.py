import json
import os

import pytest

from textlock.data.index import INDEX_NAME, index_shards
from textlock.data.loader import DataConfig, open_loader
from textlock.data.verify import verify_shards

from .tars import jpeg, sample, write_shards, write_tar
from .zoo import DAMAGED

# Two good samples, five bad ones of which the loader meets four, and members that belong to no sample.
MEMBERS = [
    *sample("good"),
    ("scan.jpg", DAMAGED["scan data"]),
    ("scan.txt", b"x"),
    ("html.jpg", b"<html>"),
    ("html.txt", b"x"),
    ("silent.jpg", jpeg()),
    ("blank.jpg", jpeg()),
    ("blank.txt", b" \n"),
    ("alone.txt", b"x"),
    *sample("good"),
    *sample("fine"),
    ("big.jpg", bytes(17 * 2**20)),
    ("big.txt", b"x"),
]
BAD = [
    ("alone", "no-image", None),
    ("big", "too-large", 6),
    ("blank", "no-caption", 4),
    ("good", "duplicate", None),
    ("good", "duplicate", None),
    ("html", "format", 2),
    ("scan", "damaged", 1),
    ("silent", "no-caption", 3),
]


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", [3, 3, 1])


@pytest.fixture
def damaged(tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    write_tar(folder / "0.tar", MEMBERS)
    index_shards(folder)
    return folder


def kinds_of(shards):
    return [(problem.shard, problem.kind) for problem in verify_shards(shards, workers=1).problems]


def test_every_bad_sample_is_named_by_any_number_of_processes(damaged):
    write_tar(damaged / "1.tar", sample("other"))
    index_shards(damaged)
    seen = []
    report = verify_shards(damaged, workers=2, on_problem=seen.append)
    assert report.good == 3
    assert seen == report.problems
    assert sorted((problem.key, problem.kind, problem.place) for problem in seen) == BAD
    assert verify_shards(damaged, workers=1) == report


def test_what_the_loader_skips_is_what_is_listed(damaged, tmp_path):
    log = tmp_path / "skipped.jsonl"
    config = DataConfig(
        shards=str(damaged), batch_size=7, image_size=16, workers=1, decoder="cpu", max_skipped_fraction=1.0
    )
    with open_loader(config, rank=0, world_size=1, skipped_log=log) as loader:
        next(loader)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["sample"] for line in lines if line["epoch"] == 0) == [1, 2, 3, 4, 6]
    assert {place for _, _, place in BAD} == {None, 1, 2, 3, 4, 6}


def test_shards_without_an_index_are_checked_all_the_same(shards):
    (shards / INDEX_NAME).unlink()
    report = verify_shards(shards, workers=1)
    assert (report.good, [problem.kind for problem in report.problems]) == (7, ["index"])


def test_the_index_is_compared_with_the_shards(shards):
    assert kinds_of(shards) == []
    index = bytearray((shards / INDEX_NAME).read_bytes())
    index[-3] ^= 1
    (shards / INDEX_NAME).write_bytes(index)
    assert kinds_of(shards) == [("00002.tar", "index")]

    index_shards(shards)
    status = (shards / "00000.tar").stat()
    tar = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(tar.replace(b"caption 0", b"Daption 0"))
    os.utime(shards / "00000.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert kinds_of(shards) == [("00000.tar", "index"), (INDEX_NAME, "index")]
