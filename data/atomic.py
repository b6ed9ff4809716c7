"""Files and folders that appear whole or not at all, whatever kills the process while they are written.

They are written under a hidden name in the same folder, synced to disk, and renamed.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a draft of ``path`` for writing; it replaces ``path`` when the block ends, or is deleted if that raises.

    Of two processes that write the same file one waits for the other.
    """
    draft = _draft_of(path)
    with _open_alone(draft) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


@contextmanager
def _open_alone(draft: Path) -> Iterator[BinaryIO]:
    """Open a draft, empty, that no other process of this machine writes to until it is closed."""
    while True:
        is_ours = False
        with open(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
            with suppress(OSError):  # a file system without locks: writers are not kept apart there
                fcntl.flock(file, fcntl.LOCK_EX)
            # What another process wrote meanwhile has its final name now, or is gone: it is not ours to empty.
            with suppress(FileNotFoundError):
                is_ours = os.path.samestat(draft.stat(), os.fstat(file.fileno()))
            if is_ours:
                file.truncate()
                yield file
                return


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file in UTF-8, in place of an older one; a lone surrogate becomes a question mark."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "replace"))


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Make a draft of ``folder`` and yield it; it is renamed when the block ends and deleted if the block raises.

    The files in it are synced before the rename, and whoever may read the folder may read them. The draft of
    an earlier, killed process is removed.

    Raises:
        ValueError: ``folder`` exists and is not an empty folder.
    """
    folder = folder.resolve()
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        readers = draft.stat().st_mode & 0o666
        for path in draft.rglob("*"):
            if path.is_file():
                path.chmod(readers)  # safetensors makes files that nobody but their owner can read
            _sync(path)
        _sync(draft)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _sync(folder.parent)


def require_free(folder: Path) -> None:
    """Raise ValueError where there is something that `atomic_folder` would have to replace."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: remove it, or choose another")


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
