import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import tenacity

from textlock.data import cache as module
from textlock.data.cache import FetchError, RemoteFile, RemoteFolder, ShardCache
from textlock.data.evaluation import iterate_shards
from textlock.data.index import INDEX_NAME, index_shards, open_index
from textlock.data.reader import ShardReader
from textlock.data.verify import verify_shards

from ..conftest import records
from . import loading
from .loading import content, keys, open_one, take
from .tars import key_of, write_shards


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(module, "_BACK_OFF", 0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Nine shards of four samples."""
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [4] * 9)


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        self.server.requests[name] += 1
        faults = self.server.faults.get(name)
        if faults:
            faults.pop(0)(self, Path(self.directory, name).read_bytes())
        else:
            super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(shards):
    """The shards over HTTP. ``faults`` maps a file's name to the answers that come before the right one."""
    pytest.importorskip("aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=shards)) as server:
        server.requests, server.faults, server.url = Counter(), {}, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def answer(handler, payload, *, said=None):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(payload) if said is None else said))
    handler.end_headers()
    handler.wfile.write(payload)
    handler.close_connection = True


FAULTS = {
    "busy": lambda handler, payload: handler.send_error(503),
    "broken off": lambda handler, payload: answer(handler, payload[:700], said=len(payload)),
    "cut": lambda handler, payload: answer(handler, payload[:-1]),
    "too much": lambda handler, payload: answer(handler, payload + b"x"),
    "a page instead": lambda handler, payload: answer(handler, b"<html>please log in</html>"),
    "a flipped bit": lambda handler, payload: answer(handler, payload[:-1] + bytes([payload[-1] ^ 1])),
}


@pytest.fixture
def memory(shards):
    """Return the URL of the shards in the memory of this process."""
    filesystem = fsspec.filesystem("memory")
    for path in shards.iterdir():
        filesystem.pipe_file(f"/shards/{path.name}", path.read_bytes())
    yield "memory://shards"
    filesystem.rm("/shards", recursive=True)


@pytest.fixture
def remote(memory):
    return RemoteFolder(memory)


@pytest.fixture(scope="module")
def files(shards):
    """The shards as an index names them: all have the same size."""
    payloads = {path.name: path.read_bytes() for path in sorted(shards.glob("*.tar"))}
    return [RemoteFile(name, len(content), hashlib.sha256(content).digest()) for name, content in payloads.items()]


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path, 2**30)


@pytest.fixture
def fetched(monkeypatch):
    count = Counter()
    fetch = RemoteFolder.fetch

    def counted(self, name, *arguments):
        count[name] += 1
        fetch(self, name, *arguments)

    monkeypatch.setattr(RemoteFolder, "fetch", counted)
    return count


def settings(address, cache, **changes):
    return loading.settings(address, cache_dir=str(cache), **{"batch_size": 4, "cache_gb": 1.0, **changes})


def copies(folder):
    return list(folder.glob("*.tar"))


def names(folder):
    return [path.name for path in folder.iterdir() if path.is_file()]


def used(folder):
    """Return the bytes of the copies at one moment: one that is removed meanwhile restarts the count."""
    while True:
        with suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in copies(folder))


def bytes_of(lease):
    return os.pread(lease.descriptor, 2**20, 0)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_batches_are_those_of_the_same_shards_in_a_folder_and_a_second_run_fetches_nothing(
    shards, memory, fetched, tmp_path
):
    with open_one(settings(shards, tmp_path)) as loader:
        local = content([next(loader) for _ in range(18)])
        state = loader.state()
        following = content([next(loader)])
    for _ in range(2):
        assert content(take(settings(memory, tmp_path), 18)) == local
        assert fetched == {INDEX_NAME: 1, **{f"{number:05d}.tar": 1 for number in range(9)}}
    assert content(take(settings(memory, tmp_path), 1, state=state)) == following


def test_the_budget_holds_and_shards_are_fetched_once_an_epoch(memory, files, fetched, tmp_path):
    budget = 6 * files[0].size
    largest = 0
    with open_one(settings(memory, tmp_path, cache_gb=budget / 1e9)) as loader:
        for step in range(9):
            next(loader)
            largest = max(largest, used(tmp_path))
            if step < 5:  # the batches after these are made while shards of the next epoch are fetched
                assert all(count == 1 for count in fetched.values())
    assert 0 < largest <= budget
    assert len(fetched) == 1 + 9


def test_shards_are_fetched_before_they_are_read(memory, tmp_path):
    with open_one(settings(memory, tmp_path, prefetch_batches=0)) as loader:
        next(loader)
        wait_until(lambda: len(copies(tmp_path)) >= 4)
        assert len(copies(tmp_path)) == 4, "the group being read and the next, and no more"
        for _ in range(2):  # into the second group
            next(loader)
        wait_until(lambda: len(copies(tmp_path)) == 6)


@pytest.mark.parametrize(("prefetch", "groups"), [(0, 2), (1, 2), (2, 3)])
def test_a_cache_for_less_than_what_is_read_at_a_time_is_refused(memory, files, tmp_path, prefetch, groups):
    least = groups * 2 * files[0].size
    config = settings(memory, tmp_path, prefetch_batches=prefetch, cache_gb=(least - 1) / 1e9)
    with pytest.raises(
        ValueError, match=rf"data.cache-gb is .*, must be at least .*, {groups} times --data.open-shards"
    ):
        open_one(config)
    take(replace(config, cache_gb=least / 1e9), 1)


def test_evaluation_reads_remote_shards_too(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("textlock.data.index.DEFAULT_CACHE_DIR", str(tmp_path))
    assert keys(iterate_shards(memory, 16, batch_size=5)) == [key_of(number) for number in range(36)]


def test_transfers_are_tried_again(server, shards, tmp_path):
    server.faults = {f"{number:05d}.tar": [fault, fault] for number, fault in enumerate(FAULTS.values())}
    assert content(take(settings(server.url, tmp_path), 9)) == content(take(settings(shards, tmp_path), 9))
    assert [server.requests[f"{number:05d}.tar"] for number in range(9)] == [3] * len(FAULTS) + [1] * 3


@pytest.mark.parametrize(
    ("fault", "requests", "message"),
    [
        (FAULTS["a flipped bit"], module._ATTEMPTS, "cannot be fetched, 6 times tried: its bytes are not those"),
        (lambda handler, payload: handler.send_error(404), 1, "is not there: put it there, or index the shards again"),
    ],
    ids=["damaged", "missing"],
)
def test_a_shard_that_cannot_be_had_costs_its_samples_only(server, fault, requests, message, tmp_path):
    server.faults = {"00003.tar": [fault] * 100}
    log = tmp_path / "skipped.jsonl"
    batches = take(settings(server.url, tmp_path / "cache"), 9, skipped_log=log)
    assert len(set(keys(batches))) == 32
    assert len(copies(tmp_path / "cache")) == 8 and not list((tmp_path / "cache").glob("*.partial"))
    assert server.requests["00003.tar"] == requests, "not again for every sample"
    lines = records(log)
    assert [(line["shard"], line["kind"]) for line in lines] == [("00003.tar", "unreadable")] * 4
    assert all(f"{server.url}/00003.tar {message}" in line["message"] for line in lines)


def test_an_endless_answer_is_broken_off(server, cache, files, tmp_path, monkeypatch):
    sent = []

    def endless(handler, payload):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(400):
                handler.wfile.write(bytes(2**20))
                sent.append(2**20)
        except OSError:
            handler.close_connection = True

    monkeypatch.setattr(module, "_ATTEMPTS", 1)
    server.faults = {"00000.tar": [endless]}
    with pytest.raises(FetchError, match=r"00000\.tar cannot be fetched, 1 times tried: it has more than the"):
        cache.open(RemoteFolder(server.url), files[0])
    assert sum(sent) < 200 * 2**20
    assert not names(tmp_path)


def test_verify_reads_remote_shards(shards, memory, tmp_path):
    assert verify_shards(memory, workers=1, cache_dir=tmp_path) == verify_shards(shards, workers=1)
    fsspec.filesystem("memory").rm_file("/shards/00004.tar")
    report = verify_shards(memory, workers=1, cache_dir=tmp_path / "other")
    (problem,) = report.problems
    assert (report.good, problem.shard, problem.kind) == (32, "00004.tar", "unreadable")


def test_an_index_that_is_missing_damaged_or_none(shards, memory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/index\.textlock is not there: put it there, or"):
        open_index(f"{memory}/nowhere", cache_dir=tmp_path)
    filesystem = fsspec.filesystem("memory")
    whole = (shards / INDEX_NAME).read_bytes()
    for at, message in ((200, r"records in memory://shards/index\.textlock are damaged"), (-1, "textlock is damaged")):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        filesystem.pipe_file(f"/shards/{INDEX_NAME}", bytes(damaged))
        with pytest.raises(FileNotFoundError, match=message):
            open_index(memory, cache_dir=tmp_path)
    index_shards(shards, output=tmp_path / "elsewhere")
    filesystem.pipe_file(f"/shards/{INDEX_NAME}", (tmp_path / "elsewhere" / INDEX_NAME).read_bytes())
    with pytest.raises(ValueError, match=r"is of shards in the folder .*: index the shards where they are files"):
        open_index(memory, cache_dir=tmp_path)
    filesystem.pipe_file(f"/shards/{INDEX_NAME}", b"<html>")
    with pytest.raises(ValueError, match="is not an index of textlock"):
        open_index(memory, cache_dir=tmp_path)


def test_a_new_index_is_noticed(memory, tmp_path):
    before = open_index(memory, cache_dir=tmp_path)
    fewer = write_shards(tmp_path / "fewer", [4] * 8)
    fsspec.filesystem("memory").pipe_file(f"/shards/{INDEX_NAME}", (fewer / INDEX_NAME).read_bytes())
    assert (len(before), len(open_index(memory, cache_dir=tmp_path))) == (36, 32)


@pytest.mark.parametrize("url", ["nothing://bucket/shards", "s3://bucket/shards"])
def test_urls_that_cannot_be_read(url, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=rf"{url} cannot be read: .*textlock\[remote\]"):
        open_index(url, cache_dir=tmp_path)


def test_processes_of_a_node_share_what_one_of_them_fetches(server, shards, files, tmp_path):
    program = """
import hashlib, os, random, sys
from textlock.data.index import open_index
url, cache, seed = sys.argv[1:]
index = open_index(url, cache_dir=cache, fetchers=2)
order = list(range(9))
random.Random(int(seed)).shuffle(order)
index.remote.expect(order)
content = b"".join(os.pread(index.remote.open(shard).descriptor, 2**20, 0) for shard in range(9))
print(hashlib.sha256(content).hexdigest())
index.remote.close()
"""
    slow = lambda handler, payload: (time.sleep(0.2), answer(handler, payload))  # noqa: E731
    server.faults = {file.name: [slow] * 3 for file in files}
    command = [sys.executable, "-c", program, server.url, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(3)]
    read = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert read == {hashlib.sha256(b"".join((shards / file.name).read_bytes() for file in files)).hexdigest()}
    del server.requests[INDEX_NAME]
    assert server.requests == {file.name: 1 for file in files}


def test_least_recently_used_files_go_and_those_in_use_stay(shards, remote, files, tmp_path):
    cache = ShardCache(tmp_path, 3 * files[0].size)

    def present():
        return [number for number, file in enumerate(files) if (tmp_path / file.local_name).exists()]

    held = [cache.open(remote, files[0])]
    for number in (1, 2, 1):
        cache.open(remote, files[number])
    assert present() == [0, 1, 2]
    cache.open(remote, files[3])
    assert present() == [0, 1, 3], "0 is in use, and 1 was used after 2"
    held += [cache.open(remote, files[number]) for number in (1, 3)]
    assert cache.open_ahead(remote, files[4]) is None, "nothing can go"
    assert present() == [0, 1, 3]
    assert bytes_of(held[0]) == (shards / "00000.tar").read_bytes()
    for _ in range(3):
        held.pop(0)
    assert cache.open_ahead(remote, files[4]) is not None
    assert present() == [1, 3, 4]


def test_a_reader_never_waits_for_room(remote, files, tmp_path, caplog):
    cache = ShardCache(tmp_path, files[0].size)
    held = cache.open(remote, files[0])
    other = cache.open(remote, files[1])
    assert len(copies(tmp_path)) == 2 and held is not other
    assert "the shards in use exceed the cache budget" in caplog.text


def test_a_shard_that_has_just_arrived_makes_no_room_for_another(shards, remote, files, tmp_path, monkeypatch):
    other = ShardCache(tmp_path, files[0].size)
    held = []
    rename = Path.replace

    def rename_and_be_overtaken(self, target):
        rename(self, target)
        monkeypatch.setattr(Path, "replace", rename)
        held.append(other.open_ahead(remote, files[1]))

    monkeypatch.setattr(Path, "replace", rename_and_be_overtaken)
    lease = ShardCache(tmp_path, files[0].size).open(remote, files[0])
    assert held == [None]
    assert bytes_of(lease) == (shards / "00000.tar").read_bytes()
    assert names(tmp_path) == [files[0].local_name]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(remote, files, cache, tmp_path):
    file = files[0]
    partial = (tmp_path / file.local_name).with_suffix(".partial")
    partial.write_bytes(b"half")
    with cache._locked(file.local_name[:2]):
        ShardCache(tmp_path, 2**30)
        assert partial.exists()
        assert cache.open_ahead(remote, file) is None
    ShardCache(tmp_path, 2**30)
    assert not partial.exists()
    partial.write_bytes(b"half")
    cache.open(remote, file)
    assert names(tmp_path) == [file.local_name]


def test_a_copy_that_was_cut_is_fetched_again(shards, remote, files, cache, tmp_path, fetched):
    cache.open(remote, files[0])
    os.truncate(tmp_path / files[0].local_name, 100)
    assert bytes_of(cache.open(remote, files[0])) == (shards / "00000.tar").read_bytes()
    assert fetched["00000.tar"] == 2


def test_a_failure_is_forgotten_after_a_while(remote, cache, fetched, monkeypatch):
    missing = RemoteFile("absent.tar", 5, bytes(32))
    for seconds, requests in ((300.0, 1), (300.0, 1), (0.0, 2)):
        monkeypatch.setattr(module, "_SECONDS_BEFORE_ANOTHER_TRY", seconds)
        with pytest.raises(FetchError, match=r"absent\.tar is not there"):
            cache.open(remote, missing)
        assert fetched["absent.tar"] == requests


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    return lambda: monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


def test_a_full_disk_stops_the_run_in_one_sentence(memory, full_disk, tmp_path):
    open_index(memory, cache_dir=tmp_path)
    full_disk()
    with pytest.raises(ValueError, match=r"the disk of the cache .* has no room for [\d,]+ bytes more: free some"):
        take(settings(memory, tmp_path), 1)
    assert not copies(tmp_path) and not list(tmp_path.glob("*.partial"))


def test_a_full_disk_makes_room_among_the_copies_first(remote, files, cache, full_disk, tmp_path):
    cache.open(remote, files[0])
    full_disk()
    cache.open(remote, files[1])
    assert names(tmp_path) == [files[1].local_name]


def test_a_disk_that_fills_up_while_a_shard_arrives(remote, files, cache, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote._filesystem, "get_file", fail)
    with pytest.raises(ValueError, match="has no room for"):
        cache.open(remote, files[0])
    assert not names(tmp_path)


def test_closing_does_not_wait_for_a_server_to_come_back(server, tmp_path, monkeypatch):
    waiting = threading.Event()

    def an_hour(attempt):
        waiting.set()
        return 3600

    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda **_: an_hour)
    server.faults = {f"{number:05d}.tar": [FAULTS["busy"]] * 100 for number in range(9)}
    loader = open_one(settings(server.url, tmp_path, fetchers=1))

    def consume():
        with suppress(Exception):
            next(loader)

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    assert waiting.wait(30)
    closer = threading.Thread(target=loader.close, daemon=True)
    closer.start()
    for thread in (closer, consumer):
        thread.join(20)
        assert not thread.is_alive()


def test_closing_ends_the_fetching_threads(memory, tmp_path):
    take(settings(memory, tmp_path), 3)
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("fetch_")])
    assert ShardReader(open_index(memory, cache_dir=tmp_path)).read(0).key == key_of(0)
