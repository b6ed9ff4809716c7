"""Remote shards: fetched whole into a folder of the local disk that all processes of a node share.

The address is any URL that fsspec reads: ``s3://``, ``gs://``, ``https://``, ``hf://``, ``file://`` for a slow mount.
A file in the folder is named by its SHA-256 and size, which the index knows, so no untrusted name becomes a path, and
sets that share shards share copies.

- A file gets its name only when its length and checksum are right and it is synced to disk. A killed process leaves a
  partial file, which the next one removes.
- Only the process that holds a file's lock fetches it; the others wait for it or go on with another. Nothing is
  fetched twice by one node while it is needed.
- A file in use is held by a shared lock on itself, which the system drops when its process ends, however that ends.
  The least recently used files that nobody holds are removed when the budget or the disk is full.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import fsspec
import tenacity
from filelock import FileLock, Timeout
from fsspec.callbacks import Callback

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Where copies of remote shards are kept unless the config says otherwise.
DEFAULT_CACHE_DIR = "~/.cache/textlock"

_ATTEMPTS = 6
_BACK_OFF = 1.0  # seconds; doubled with every attempt
# A shard that could not be fetched is not requested for each of its samples.
_SECONDS_BEFORE_ANOTHER_TRY = 300.0
_SECONDS_BETWEEN_LOOKS = 0.2
# Shards held although they are not expected: of an evaluation, which reads in turn, or of a replacement sample.
_UNEXPECTED = 4


def is_remote(address: Path | str) -> bool:
    """Return whether an address is a URL and not a folder."""
    return isinstance(address, str) and "://" in address


class FetchError(OSError):
    """A remote file cannot be fetched. The message is one sentence."""


@dataclass(frozen=True)
class RemoteFile:
    """A file in the folder at a URL, and what it must hold."""

    name: str
    size: int
    sha256: bytes

    @property
    def local_name(self) -> str:
        """The name of its copy."""
        return f"{self.sha256.hex()}-{self.size}.tar"


class RemoteFolder:
    """The files directly below a URL.

    Raises:
        ValueError: fsspec cannot read such URLs, for want of a package or at all.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._filesystem, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f'{url} cannot be read: {error}; pip install "textlock[remote]" has the usual ones'
            ) from error
        self._path = path.rstrip("/")
        self._closed = threading.Event()

    def close(self) -> None:
        """Retry nothing from now on: a pending retry ends at once with the error of its last attempt."""
        self._closed.set()

    def read_start(self, name: str, size: int) -> bytes:
        """Return the first ``size`` bytes of a file. Raises FetchError."""

        def read() -> bytes:
            # A server that knows no ranges answers with more.
            return bytes(self._filesystem.cat_file(f"{self._path}/{name}", start=0, end=size)[:size])

        return self._try(name, read)

    def fetch(self, name: str, size: int, target: Path, check: Callable[[Path], None]) -> None:
        """Copy a file of ``size`` bytes to ``target``; ``check`` raises OSError when its content is wrong.

        Raises:
            FetchError: it is not there, or after some attempts it is still not whole.
            OSError: the disk is full (ENOSPC).
        """

        def fetch() -> None:
            self._filesystem.get_file(f"{self._path}/{name}", str(target), callback=_Limit(size))
            found = target.stat().st_size
            if found != size:
                raise OSError(f"it has {found:,} bytes and not the {size:,} of the index")
            check(target)

        self._try(name, fetch)

    def _try(self, name: str, action: Callable[[], T]) -> T:
        """Return what ``action`` returns; retry, with growing pauses, where that may help."""
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS) | tenacity.stop_when_event_set(self._closed),
            wait=tenacity.wait_random_exponential(multiplier=_BACK_OFF, max=30),
            sleep=tenacity.sleep_using_event(self._closed),
            # What the many filesystems raise for a broken connection has no common type.
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not _is_final(error)),
            reraise=True,
        )
        try:
            return retrying(action)
        except FileNotFoundError as error:
            raise FetchError(f"{self.url}/{name} is not there: put it there, or index the shards again") from error
        except PermissionError as error:
            raise FetchError(f"{self.url}/{name} may not be read: {error}") from error
        except Exception as error:
            if _is_full(error):
                raise
            reason = str(error) or type(error).__name__
            attempts = retrying.statistics["attempt_number"]
            raise FetchError(f"{self.url}/{name} cannot be fetched, {attempts} times tried: {reason}") from error


def _is_final(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError | PermissionError) or _is_full(error)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class _Limit(Callback):
    """Stops a transfer that brings more than it should: a server must not fill the disk."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._limit = size

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._limit:
            raise OSError(f"it has more than the {self._limit:,} bytes of the index")


class Lease:
    """A file of the cache, open for reading; it is not removed while this object exists."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        with suppress(OSError):  # the clock of the least recent use starts now
            _touch(self.descriptor)
        os.close(self.descriptor)


class ShardCache:
    """The local copies of remote shards in ``folder``, which may hold ``budget`` bytes of them.

    Every process that reads has one; all of a node name the same folder. The index of each set is there too and does
    not count towards the budget.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder
        self.budget = budget
        self._locks = folder / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        _require_locks(self._locks)
        self._failures: dict[str, tuple[float, str]] = {}
        with self._locked("folder"):
            for partial in folder.glob("*.partial"):
                with suppress(Timeout), self._locked(partial.name[:2], blocking=False):
                    partial.unlink(missing_ok=True)

    def open(self, remote: RemoteFolder, file: RemoteFile) -> Lease:
        """Return a file of ``remote``, fetched unless this or another process has fetched it.

        Raises:
            FetchError: it cannot be fetched, or could not a moment ago.
            ValueError: the disk is full.
        """
        lease = self.hold(file)
        if lease is None:
            with self._locked(file.local_name[:2]):
                lease = self.hold(file) or self._fetch(remote, file, overrun=True)
        assert lease is not None
        return lease

    def open_ahead(self, remote: RemoteFolder, file: RemoteFile) -> Lease | None:
        """Return a file as ``open`` does, or None when another process is fetching it or there is no room yet."""
        lease = self.hold(file)
        if lease is None:
            with suppress(Timeout), self._locked(file.local_name[:2], blocking=False):
                lease = self.hold(file) or self._fetch(remote, file, overrun=False)
        return lease

    def fetch_index(
        self, remote: RemoteFolder, name: str, size: int, start: bytes, check: Callable[[Path], None]
    ) -> Path:
        """Return the copy of the file ``name`` of ``remote`` that has ``size`` bytes and begins with ``start``."""
        digest = hashlib.sha256(start).hexdigest()
        path = self.folder / f"{digest}.index"
        with self._locked(digest[:2]):
            if not path.is_file():
                if shutil.disk_usage(self.folder).free < size:
                    raise self._full(size)
                self._receive(remote, name, size, path, check)
        return path

    def hold(self, file: RemoteFile) -> Lease | None:
        """Return a file that is here already."""
        try:
            lease = Lease(os.open(self.folder / file.local_name, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        fcntl.flock(lease.descriptor, fcntl.LOCK_SH)
        status = os.fstat(lease.descriptor)
        if status.st_nlink == 0 or status.st_size != file.size:  # it was removed in between, or something cut it
            return None
        _touch(lease.descriptor)
        return lease

    def _fetch(self, remote: RemoteFolder, file: RemoteFile, *, overrun: bool) -> Lease | None:
        """Fetch a file whose lock is held. None when there is no room for it, unless ``overrun`` lets it have some."""
        failed_at, message = self._failures.get(file.local_name, (-_SECONDS_BEFORE_ANOTHER_TRY, ""))
        if time.monotonic() - failed_at < _SECONDS_BEFORE_ANOTHER_TRY:
            raise FetchError(message)
        path = self.folder / file.local_name

        def check(partial: Path) -> None:
            with open(partial, "rb") as content:
                if hashlib.file_digest(content, "sha256").digest() != file.sha256:
                    raise OSError("its bytes are not those that were indexed")

        if not self._reserve(file, overrun=overrun):
            return None
        try:
            return self._receive(remote, file.name, file.size, path, check)
        except FetchError as error:
            self._failures[file.local_name] = (time.monotonic(), str(error))
            raise

    def _receive(self, remote: RemoteFolder, name: str, size: int, path: Path, check: Callable[[Path], None]) -> Lease:
        partial = path.with_suffix(".partial")
        try:
            remote.fetch(name, size, partial, check)
            # Locked before it has its name: another process that makes room could remove it in between.
            lease = Lease(os.open(partial, os.O_RDONLY | os.O_CLOEXEC))
            fcntl.flock(lease.descriptor, fcntl.LOCK_SH)
            _touch(lease.descriptor)
            os.fsync(lease.descriptor)
            partial.replace(path)
        except OSError as error:
            if _is_full(error):
                raise self._full(size) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        return lease

    def _reserve(self, file: RemoteFile, *, overrun: bool) -> bool:
        """Remove the least recently used files that nobody holds until there is room; set it aside.

        Returns whether there is room. With ``overrun`` the budget may be exceeded, the disk may not.
        """
        with self._locked("folder"):
            copies = sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
            partials = self.folder.glob("*.partial")
            used = sum(_size_in_name(path) for path in (*copies, *partials))
            free = shutil.disk_usage(self.folder).free
            for path in copies:
                if used + file.size <= self.budget and file.size <= free:
                    break
                if _remove_unheld(path):
                    used -= _size_in_name(path)
                    free += _size_in_name(path)
            if file.size > free:
                if overrun:
                    raise self._full(file.size)
                return False
            if used + file.size > self.budget:
                if not overrun:
                    return False
                logger.warning(
                    "the shards in use exceed the cache budget of %.1f GB in %s", self.budget / 1e9, self.folder
                )
            (self.folder / file.local_name).with_suffix(".partial").touch()
        return True

    def _full(self, size: int) -> ValueError:
        return ValueError(
            f"the disk of the cache {self.folder} has no room for {size:,} bytes more: free some, lower cache_gb, or "
            "name another cache_dir"
        )

    @contextmanager
    def _locked(self, name: str, *, blocking: bool = True) -> Iterator[None]:
        with FileLock(self._locks / name, thread_local=False).acquire(blocking=blocking):
            yield


def _require_locks(folder: Path) -> None:
    """Raise ValueError where the file system of the cache has no locks: its processes could not share it."""
    with open(folder / "probe", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError as error:
            raise ValueError(
                f"{folder.parent} cannot hold copies of shards, its file system has no locks ({error.strerror}): name "
                "a folder on a local disk by --data.cache-dir"
            ) from error


def _touch(descriptor: int) -> None:
    # Without an explicit time the kernel takes its own, which moves in steps of milliseconds.
    os.utime(descriptor, ns=(time.time_ns(), time.time_ns()))


def _size_in_name(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _remove_unheld(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        path.unlink()
        return True
    finally:
        os.close(descriptor)


class CachedShards:
    """The shards of one remote set as a reader opens them: expected ones are fetched ahead and held."""

    def __init__(self, remote: RemoteFolder, files: Sequence[RemoteFile], cache: ShardCache, *, fetchers: int) -> None:
        self._remote = remote
        self._files = files
        self._cache = cache
        self._fetchers = fetchers
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._expected: frozenset[int] = frozenset()
        self._held: dict[int, Lease] = {}
        self._open_unexpected = lru_cache(maxsize=_UNEXPECTED)(self._open)
        self._queue: deque[int] = deque()
        self._closed = False

    def open(self, shard: int) -> Lease:
        """Return an open shard. Raises FetchError, or ValueError when the disk is full."""
        lease = self._held.get(shard)
        if lease is None and shard not in self._expected:
            return self._open_unexpected(shard)
        if lease is None:
            lease = self._open(shard)
            with self._changed:
                if shard in self._expected:
                    self._held[shard] = lease
        return lease

    def _open(self, shard: int) -> Lease:
        return self._cache.open(self._remote, self._files[shard])

    def hold(self, shards: Sequence[int]) -> None:
        """Hold the local copies that there are of these shards."""
        with self._changed:
            for shard in shards:
                if shard not in self._held and (lease := self._cache.hold(self._files[shard])):
                    self._held[shard] = lease

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch these shards, the first ones first, and release the others."""
        with self._changed:
            self._expected = frozenset(shards)
            for shard in [shard for shard in self._held if shard not in self._expected]:
                del self._held[shard]
            # Local copies are held before anything is fetched, or they might be removed to make room for it.
            self.hold(shards)
            self._queue = deque(shard for shard in shards if shard not in self._held)
            self._changed.notify_all()
            while len(self._threads) < self._fetchers and not self._closed:
                thread = threading.Thread(target=self._fetch_ahead, name=f"fetch_{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """Stop fetching ahead; a transfer that is under way is not waited for."""
        self._remote.close()
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._held.clear()
            self._open_unexpected.cache_clear()
            self._changed.notify_all()

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                shard = self._queue.popleft()
            lease = None
            final = False
            try:
                lease = self._cache.open_ahead(self._remote, self._files[shard])
            except (OSError, ValueError) as error:
                # Reading from the shard raises the same error, where it is reported.
                logger.warning("%s is not fetched ahead: %s", self._files[shard].name, error)
                final = True
            with self._changed:
                if self._closed:
                    return
                if lease is not None and shard in self._expected:
                    self._held.setdefault(shard, lease)
                elif not final and shard in self._expected and shard not in self._held:
                    self._queue.append(shard)
                    self._changed.wait(_SECONDS_BETWEEN_LOOKS)
