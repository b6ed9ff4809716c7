"""Several sets of shards: how they are named, and what a run makes of them."""

import gc
import os
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from textlock.data import cache, reader, stored_text
from textlock.data.cache import CachedShards
from textlock.data.captions import caption_id
from textlock.data.embeddings import FOLDER_NAME, encode_shards
from textlock.data.index import index_shards
from textlock.data.loader import require_few_skipped
from textlock.data.order import SampleOrder
from textlock.data.sources import MAX_WEIGHT, Source, parse_folders, parse_sources
from textlock.demo.text_tower import write_random_text_tower
from textlock.models.text import build_text_tower

from ..conftest import records
from .loading import content, keys, open_one, settings, take
from .tars import key_of, write_shards


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a", "a 1"),
        ("a:2", "a 2"),
        ("a:2,b:1", "a 2, b 1"),
        ("a:2, b", "a 2, b 1"),
        (" a : 2 ", "a 2"),
        ("a b:0.5 c,d:1.5", "a 1, b 1/2, c 1, d 3/2"),
        ("a:.1 b:1e-2 c:+3 d:2. e:1E2", "a 1/10, b 1/100, c 3, d 2, e 100"),
        ("a:0.3333333333333333333333333", "a 3333333333333333333333333/10000000000000000000000000"),
        ("/data/a:2/b", "/data/a:2/b 1"),
        ("a:b c:2:3 d:2x", "a:b 1, c:2 3, d:2x 1"),
        ("s3://bucket/a:2", "s3://bucket/a 2"),
        ("s3://bucket:2", "s3://bucket 2"),
        ("http://host:8000", "http://host:8000 1"),
        ("http://host:8000/x", "http://host:8000/x 1"),
        ("http://host:8000/x:2", "http://host:8000/x 2"),
        ("http://host:8000:2", "http://host:8000 2"),
        ("http://host:2.5", "http://host 5/2"),
        ("https://user:7@[::1]:80", "https://user:7@[::1]:80 1"),
        ("https://[::1]/x:3", "https://[::1]/x 3"),
        ("simplecache::http://host:80 simplecache::s3://b:3", "simplecache::http://host:80 1, simplecache::s3://b 3"),
        ("s3://bucket/a:2,http://host:80,c:3", "s3://bucket/a 2, http://host:80 1, c 3"),
    ],
)
def test_a_number_after_the_last_colon_is_a_weight_unless_it_is_a_port(words, expected):
    words = [words] if words.startswith(" ") or ", " in words else words.split(" ")
    assert ", ".join(f"{source.address} {source.weight}" for source in parse_sources(words)) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a:2", [("a:2", 1)]),
        ("a:2:3", [("a:2", 3)]),
        ("a,b", [("a,b", 1)]),
        ("a,b:0.5", [("a,b", Fraction(1, 2))]),
        ("a,b:0.5,c", [("a", 1), ("b", Fraction(1, 2)), ("c", 1)]),
        ("c,d", [("c", 1), ("d", 1)]),
        ("e:", [("e:", 1)]),
    ],
)
def test_what_is_the_name_of_a_folder_is_read_as_that(word, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a:2", "a,b", "c", "e:"):
        Path(name).mkdir()
    assert parse_sources([word]) == [Source(address, Fraction(weight)) for address, weight in expected]


WEIGHT = f"must be a number above 0 and at most {MAX_WEIGHT}, such as 2 or 0.5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data.shards names nothing"),
        ([""], "--data.shards is an empty text"),
        (["a", "  "], "--data.shards is an empty text"),
        (["a:2,"], "--data.shards is 'a:2,', with nothing on one side of a comma"),
        ([",a"], "with nothing on one side of a comma"),
        (["a,,b"], "with nothing on one side of a comma"),
        ([":2"], "':2', a weight without a set"),
        (["a:"], "'a:', a colon without a weight"),
        *(
            ([f"a:{text}"], f"gives a the weight {text}, {WEIGHT}")
            for text in ("0", "-1", "nan", "inf", "1e9", "1e-999")
        ),
        *(([f"a:{text}"], WEIGHT) for text in ("1_0", "٢", "1000.1", "1e-999999999", "1e999999999", "0." + "3" * 5000)),
        (["a", "a"], r"names the same set twice \(a\): name one, with the weight 2"),
        (["a:0.5,./a/:2"], r"names the same set twice \(a, ./a/\): name one, with the weight 2.5"),
        (["s3://b/x", "s3://b/x/:2"], "names the same set twice"),
    ],
)
def test_what_names_no_sources_is_one_sentence(words, message):
    with pytest.raises(ValueError, match=f"--data.shards .*{message}|{message}") as caught:
        settings(*words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("shards", "folders", "message"),
    [
        ("a b", ["x"], "names 1 folders and --data.shards 2 sets of shards: name one for each, in the same order"),
        ("a", ["x", "y"], "names 2 folders and --data.shards 1 sets"),
        ("a b", ["x,./x"], "names ./x twice"),
        ("a", [""], "--data.text-embeddings is an empty text"),
    ],
)
def test_every_set_has_a_folder_of_text_embeddings(shards, folders, message):
    with pytest.raises(ValueError, match=message):
        settings(*shards.split(), text_embeddings=tuple(folders))
    assert parse_folders(["x,y", "z"]) == ["x", "y", "z"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three sets, whose shards have the same names: a of 22 samples, b of 12 and c of 20."""
    root = tmp_path_factory.mktemp("sources")
    write_shards(root / "a", [7, 9, 6], {3: {"jpg": b"<html>"}})
    write_shards(root / "b", [5, 7], {507: {"jpg": b"<html>"}}, first=500)
    write_shards(root / "c", [4] * 5, first=900)
    return root


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
    monkeypatch.chdir(root)


def test_a_weight_of_one_changes_nothing():
    assert content(take(settings("a:1"), 6)) == content(take(settings("a"), 6))
    with open_one(settings("a:1")) as one, open_one(settings("a")) as other:
        fingerprint = other.sources.opened[0].index.fingerprint
        assert one.state()["fingerprint"] == other.state()["fingerprint"]
        assert one.state()["fingerprint"]["shards"] == fingerprint


def test_shards_without_a_sample_are_said(tmp_path):
    folder = write_shards(tmp_path / "some", [5, 5], {1: {"txt": b"one\ntwo"}, 2: {"txt": None}})
    for number in range(6, 10):
        (folder / f"0000{number}.tar").write_bytes(b"")
    index_shards(folder)
    with open_one(settings(folder)) as loader:
        assert loader.sources.describe() == [
            f"10 samples with 10 captions in {folder}, without 4 shards that hold none "
            "(00006.tar, 00007.tar, 00008.tar, ...)"
        ]


def test_what_is_said_of_them():
    with open_one(settings("a")) as loader:
        assert loader.sources.describe() == ["22 samples with 22 captions in a"]
    with open_one(settings("a:2,b:0.25", "c:1.125")) as loader:
        assert loader.sources.describe() == [
            "22 samples with 22 captions in a; weight 2: 44 an epoch",
            "12 samples with 12 captions in b; weight 0.25: 3 an epoch",
            "20 samples with 20 captions in c; weight 1.125: 22.5 an epoch",
        ]
        assert loader.samples_per_epoch == (44 + 3 + 22) // 8 * 8
        with pytest.raises(
            ValueError, match=r"textlock.data.shards verify a and python .* verify b and .* verify c, or"
        ):
            require_few_skipped({"format": 30}, 1000, settings("a:2,b:0.25", "c:1.125"))


def test_bad_samples_are_logged_with_their_set(tmp_path):
    log = tmp_path / "skipped.jsonl"
    batches = take(settings("a", "b/", batch_size=34), 1, skipped_log=log)
    found = {(line["shard"], line["sample"], line["key"]) for line in records(log)}
    assert found == {("a/00000.tar", 3, key_of(3)), ("b/00001.tar", 7, key_of(507))}
    assert len(set(keys(batches))) == 32


def test_a_bad_sample_is_replaced_in_the_order_of_its_epoch(tmp_path):
    log = tmp_path / "skipped.jsonl"
    with open_one(settings("a:0.75"), skipped_log=log) as loader:  # 16 samples, 17, 16, ...
        order = SampleOrder(loader.sources.shares, batch_size=8, open_shards=2, seed=42)
        for _ in range(12):
            next(loader)
        lines = records(log)
        for line in lines:
            epoch, place = order.locate(line["position"])
            sample = order.epoch(epoch).samples(np.array([next(order.replacements(epoch, place))]))[0]
            assert line["replaced_by"] == loader.sources.read(int(sample)).key
    assert {line["epoch"] % 2 for line in lines} == {0, 1}


def test_nothing_but_bad_samples_names_the_set_to_verify(tmp_path):
    write_shards(tmp_path / "bad", [9], {number: {"jpg": b""} for number in range(9)})
    with (
        open_one(settings(f"{tmp_path}/bad:2")) as loader,
        pytest.raises(ValueError, match=f"shards verify {tmp_path}/bad$"),
    ):
        next(loader)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a b:2", "the weight of b was 1 and is 2"),
        ("a:0.5 b:2", "the weight of a was 1 and is 0.5; the weight of b was 1 and is 2"),
        ("b a", "--data.shards had the order a, b and has b, a"),
        ("a", "b is missing from --data.shards"),
        ("b:1.5", "a is missing from --data.shards; the weight of b was 1 and is 1.5"),
        ("a b c", "c is new in --data.shards"),
        ("a c", "b is missing from --data.shards; c is new in --data.shards"),
    ],
)
def test_a_state_of_other_sources_is_refused_by_their_names(words, message):
    with open_one(settings("a", "b")) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match=f"is not what the state was saved with: {message}: restore it"):
        open_one(settings(*words.split()), state=state)
    open_one(settings("./a,b:1.0"), state=state).close()


def test_a_state_of_sources_without_names_or_of_one_with_other_samples_is_refused(tmp_path):
    with open_one(settings("a", "b")) as loader:
        state = loader.state()
    del state["sources"]
    with pytest.raises(ValueError, match=r"source 2 \(fingerprint \w+\) is missing from --data.shards"):
        open_one(settings("a"), state=state)
    with pytest.raises(ValueError, match=r"b is new in --data.shards"), open_one(settings("a")) as loader:
        open_one(settings("a", "b"), state=loader.state())
    for broken in (None, 3, [1], [["x"]], [["x", "1/0"]], [["x", None]]):
        with pytest.raises(ValueError, match=r"saved with: shards was .* and is"):
            open_one(settings("a:2"), state=state | {"fingerprint": state["fingerprint"] | {"shards": broken}})
    write_shards(tmp_path / "a", [7])
    with open_one(settings(f"{tmp_path}/a", "b", batch_size=8)) as loader:
        state = loader.state()
    write_shards(tmp_path / "a", [8])
    with pytest.raises(ValueError, match=r"saved with: .*/a holds other samples: restore it"):
        open_one(settings(f"{tmp_path}/a", "b"), state=state)


@pytest.mark.parametrize("other", ["link", "copy", "url"])
def test_the_same_samples_by_two_names_are_refused(other, root, tmp_path):
    name = {"link": f"{tmp_path}/link", "copy": f"{tmp_path}/copy", "url": f"file://{root}/a"}[other]
    if other == "link":
        Path(name).symlink_to(root / "a")
    elif other == "copy":
        write_shards(Path(name), [7, 9, 6], {3: {"jpg": b"<html>"}})
    with pytest.raises(ValueError, match=r"names (two sets of the same samples|the same set twice) \(a, .*weight 1.25"):
        open_one(settings("a", f"{name}:0.25", cache_dir=f"{tmp_path}/cache"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a b:0.08", r"gives b the weight 0.08, which takes less than one of its 12 samples in an epoch"),
        ("b:0.5", "the shards give 6 samples an epoch, fewer than one global batch of 8"),
        ("a nowhere:2", "no folder nowhere"),
        ("a nowhere:2x", "no folder nowhere:2x"),
    ],
)
def test_sources_that_cannot_be_trained_on_are_one_sentence(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_one(settings(*words.split()))


def test_remote_and_local_sets_together_are_the_local_ones(root, tmp_path):
    local = ("a:2", "b:0.5", "c")
    mixed = (f"file://{root}/a:2", "b:0.5", f"file://{root}/c")
    remote = {"cache_dir": f"{tmp_path}/cache", "cache_gb": 1.0}
    for _ in range(2):
        assert content(take(settings(*mixed, **remote), 20)) == content(take(settings(*local), 20))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3 + 5


def test_shards_are_expected_of_their_own_set_after_the_copies_of_all_are_held(root, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(CachedShards, "hold", lambda self, shards: events.append(("hold", shards)))
    monkeypatch.setattr(CachedShards, "expect", lambda self, shards: events.append(("expect", shards)))
    config = settings(f"file://{root}/a", "b", f"file://{root}/c", cache_dir=str(tmp_path), cache_gb=1.0)
    with open_one(config) as loader:  # numbers: a has 0 to 2, b 3 and 4, c 5 to 9
        loader.sources.expect([9, 1, 4, 5, 0])
    assert events == [("hold", [1, 0]), ("hold", [4, 0]), ("expect", [1, 0]), ("expect", [4, 0])]


def test_a_cache_must_hold_what_is_read_at_a_time_of_all_remote_sets(root, tmp_path):
    sizes = sorted(path.stat().st_size for name in "ac" for path in (root / name).glob("*.tar"))
    # The smallest groups of two shards have 4 + 4 samples: a batch of eight may reach into another one.
    least = sum(sizes[-2 * 2 :])
    words = (f"file://{root}/a", "b", f"file://{root}/c")
    config = settings(*words, prefetch_batches=0, cache_dir=str(tmp_path), cache_gb=(least - 1) / 1e9)
    with pytest.raises(ValueError, match=r"data.cache-gb is .* 2 times --data.open-shards 2") as caught:
        open_one(config)
    assert " ".join(words) in str(caught.value)
    take(replace(config, cache_gb=least / 1e9), 1)
    # With weights a group may be the smallest shard twice: 6 + 6 samples.
    config = settings(f"file://{root}/a:2", batch_size=13, prefetch_batches=0, cache_dir=str(tmp_path), cache_gb=0.0)
    with pytest.raises(ValueError, match=r"a:2 that are read at a time, 3 times --data.open-shards 2"):
        open_one(config)


def test_fetchers_are_those_of_all_remote_sets_together(root, tmp_path, monkeypatch):
    asked = []
    original = CachedShards.__init__

    def counted(self, *arguments, fetchers):
        asked.append(fetchers)
        original(self, *arguments, fetchers=fetchers)

    monkeypatch.setattr(cache.CachedShards, "__init__", counted)
    words = (f"file://{root}/a", "b", f"file://{root}/c")
    for fetchers in (5, 1):
        open_one(settings(*words, cache_dir=str(tmp_path), fetchers=fetchers)).close()
    assert asked == [2, 2, 1, 1]


@pytest.fixture(scope="module")
def tower(root):
    write_random_text_tower(root / "tower", ["caption 0 1 2 3 4 5 6 7 8 9"], width=16, depth=1, heads=1, std=0.1)
    tower = build_text_tower(root / "tower", max_length=16)
    for name in "abc":
        encode_shards(root / name, tower)
    return tower


def test_captions_are_joined_with_the_embeddings_of_their_own_set(tower):
    folders = tuple(f"{name}/{FOLDER_NAME}" for name in "abc")
    for batch in take(settings("a:2", "b:0.5", "c", text_embeddings=folders), 12, text_tower=tower.describe()):
        assert (batch.text_embeddings.float() - tower.encode(batch.captions)).abs().max() < 1e-3


def test_all_sets_together_keep_a_few_hundred_files_open(tower, root, monkeypatch):
    monkeypatch.setattr(reader, "_OPEN_FILES", 2)
    monkeypatch.setattr(stored_text, "_OPEN_FILES", 3)
    folders = tuple(f"{name}/{FOLDER_NAME}" for name in "abc")
    gc.collect()  # files that earlier loaders had open
    with open_one(settings("a", "b", "c", text_embeddings=folders), text_tower=tower.describe()) as loader:
        for sample in range(54):
            raw = loader.sources.read(sample)
            loader.sources.text_embedding(sample, 0, caption_id(raw.captions[0]))
        links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        targets = [os.readlink(link) for link in links if link.is_symlink()]
    ours = Counter(Path(target).suffix for target in targets if target.startswith(str(root)))
    assert (ours[".tar"], ours[".embeddings"]) == (2, 3)
