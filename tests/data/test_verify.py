import os

from textlock.data import index as module
from textlock.data.captions import Fields
from textlock.data.index import INDEX_NAME, index_shards, open_index
from textlock.data.verify import verify_shards

from ..conftest import records
from .loading import settings, take
from .tars import flip, sample, write_shard, write_shards, write_tar
from .zoo import DAMAGED

# Two good samples, five bad ones that have a place in the index, and members that belong to no sample.
MEMBERS = [
    *sample("good"),
    *sample("scan", jpg=DAMAGED["scan data"]),
    *sample("html", jpg=b"<html>"),
    *sample("silent", txt=None),
    *sample("blank", txt=b" \n"),
    *sample("alone", jpg=None),
    *sample("good"),
    *sample("fine"),
    *sample("big", jpg=bytes(17 * 2**20)),
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


def kinds_of(shards):
    return [(problem.shard, problem.kind) for problem in verify_shards(shards, workers=1).problems]


def test_every_bad_sample_is_named_and_skipped_by_the_loader(tmp_path):
    damaged, log = write_shard(tmp_path / "damaged", MEMBERS), tmp_path / "skipped.jsonl"
    take(settings(damaged, batch_size=7), 1, skipped_log=log)
    skipped = [line["sample"] for line in records(log)]
    assert {place for _, _, place in BAD} == {None, *skipped} and len(skipped) == 5

    write_tar(damaged / "1.tar", sample("other"))
    index_shards(damaged)
    seen = []
    report = verify_shards(damaged, workers=2, on_problem=seen.append)
    assert report.good == 3
    assert seen == report.problems
    assert sorted((problem.key, problem.kind, problem.place) for problem in seen) == BAD
    assert verify_shards(damaged, workers=1) == report


def test_a_shard_that_the_index_leaves_out_or_that_cannot_be_read_is_a_problem(tmp_path):
    shards = write_shards(tmp_path / "shards", [3, 1])
    (shards / "00002.tar").write_bytes(b"")
    index_shards(shards)
    assert kinds_of(shards) == [("00002.tar", "tar-truncated")]
    (shards / "00003.tar").symlink_to("nowhere")
    kinds = [(INDEX_NAME, "index"), ("00002.tar", "tar-truncated"), ("00003.tar", "unreadable")]
    report = verify_shards(shards, workers=2)
    assert (report.good, [(problem.shard, problem.kind) for problem in report.problems]) == (4, kinds)


def test_a_stale_index_still_says_which_fields_are_the_captions(tmp_path):
    members = [*sample("a", txt=None, caption=b"x"), *sample("b", txt=None, caption=b"y")]
    write_tar(tmp_path / "0.tar", members)
    index_shards(tmp_path, fields=Fields(caption=("caption",)))
    write_tar(tmp_path / "1.tar", members)
    assert verify_shards(tmp_path, workers=1).good == 4


def test_the_index_is_compared_with_the_shards(tmp_path):
    shards = write_shards(tmp_path / "shards", [3, 3, 1])
    assert kinds_of(shards) == []
    flip(shards / INDEX_NAME, module._HEADER.size + open_index(shards).samples.nbytes - 8)
    assert kinds_of(shards) == [("00002.tar", "index")]
    (shards / INDEX_NAME).unlink()
    report = verify_shards(shards, workers=1)
    assert (report.good, [problem.kind for problem in report.problems]) == (7, ["index"])

    index_shards(shards)
    status = (shards / "00000.tar").stat()
    tar = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(tar.replace(b"caption 0", b"Daption 0"))
    os.utime(shards / "00000.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert kinds_of(shards) == [("00000.tar", "index"), (INDEX_NAME, "index")]
