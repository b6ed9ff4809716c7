"""Whether shards are still those that were indexed.

A shard of the size and time that the index knows is. One of another time may be a copy: its bytes decide, by their
SHA-256. What was found is remembered in a file next to the index, or in the cache folder of the user where nothing can
be written there, so that the bytes of a copied set are compared once and not at every start.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from .atomic import write_text_atomically
from .cache import DEFAULT_CACHE_DIR

if TYPE_CHECKING:
    from .index import ShardEntry

logger = logging.getLogger(__name__)


def check_unchanged(
    folder: Path, names: Sequence[str], entries: "Sequence[ShardEntry]", index: Path, fingerprint: str, advice: str
) -> None:
    """Raise ValueError unless the shards ``names`` of a folder are those of the index.

    Args:
        folder: the shards.
        names: those that are there.
        entries: those that were indexed.
        index: file of the index, next to which is remembered what was compared.
        fingerprint: of the index, in hex.
        advice: what to do where they are others.
    """
    found = set(names)
    elsewhen: list[tuple[ShardEntry, int]] = []
    for entry in entries:
        if entry.name in found:
            found.remove(entry.name)
        elif entry.samples:
            raise ValueError(f"the index names {entry.name}, which is not there: restore the shard, or {advice}")
        else:
            continue
        try:
            status = os.stat(os.path.join(folder, entry.name))
        except OSError:
            if not entry.samples:  # it could not be read when it was indexed either
                continue
            raise
        if status.st_size != entry.size:
            raise ValueError(f"{entry.name} has changed since it was indexed: {advice}")
        if status.st_mtime_ns != entry.modified_ns and entry.samples:
            elsewhen.append((entry, status.st_mtime_ns))
    if found:
        raise ValueError(f"{min(found)} is not in the index: {advice}")
    if elsewhen:
        _compare(folder, elsewhen, index, fingerprint, advice)


def _compare(
    folder: Path, shards: "Sequence[tuple[ShardEntry, int]]", index: Path, fingerprint: str, advice: str
) -> None:
    """Compare the bytes of shards, given with their times, unless that was done before. Raises ValueError."""
    place = hashlib.sha256(f"{fingerprint} {folder.resolve()}".encode()).hexdigest()[:32]
    of_user = Path(DEFAULT_CACHE_DIR).expanduser() / "times"
    memories = [index.with_name(f"{index.name}.times"), of_user / f"{place}.json"]
    if all(_remembered(memories, fingerprint).get(entry.name) == time for entry, time in shards):
        return
    with _alone(of_user / f"{place}.lock"):
        known = _remembered(memories, fingerprint)  # another process of this machine may have compared them meanwhile
        todo = [(entry, time) for entry, time in shards if known.get(entry.name) != time]
        if not todo:
            return
        logger.warning(
            "%d shards of %s have another time than when they were indexed, as copies have: comparing %.3g GB with "
            "their checksums",
            len(todo),
            folder,
            sum(entry.size for entry, _ in todo) / 1e9,
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(_sha256, (folder / entry.name for entry, _ in todo))
            for (entry, _), digest in zip(todo, digests, strict=True):
                if digest != entry.sha256:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise ValueError(f"{entry.name} has changed since it was indexed: {advice}")
        times = known | {entry.name: time for entry, time in todo}
        _remember(memories, json.dumps({"fingerprint": fingerprint, "modified_ns": times}))


def _sha256(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _remembered(memories: Sequence[Path], fingerprint: str) -> dict[str, int]:
    """Return the times at which shards were seen to be those that were indexed."""
    times: dict[str, int] = {}
    for path in memories:
        try:
            content = json.loads(path.read_text())
            if content["fingerprint"] == fingerprint:
                times |= content["modified_ns"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # there is none, or it says nothing: the bytes are compared
    return times


def _remember(memories: Sequence[Path], text: str) -> None:
    for path in memories:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, text)
            return
        except OSError as error:
            logger.debug("%s cannot be written: %s", path, error)
    logger.warning("neither %s nor %s can be written: the next start compares the shards again", *memories)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process of a machine compare while others wait for what it finds."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire()
    except OSError:  # without locks each compares for itself
        yield
        return
    try:
        yield
    finally:
        held.release()
