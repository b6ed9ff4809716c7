"""Embeddings that were computed once: on disk, added to as they are computed, so that a killed run goes on.

A folder holds the embeddings of one set of images, or of its captions, by one tower. Each `part-*.safetensors` appears
whole or not at all, with ``identities`` uint8 [n, 16], ``embeddings`` float32 [n, d], and the SHA-256 of both. When all
are there they become one part, without those of images that are gone.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..data.atomic import atomic_file
from .pictures import IDENTITY_BYTES

_SECONDS_PER_PART = 20.0
_DIGEST = "sha256"

Rows = npt.NDArray[np.float32]
# Places to embed -> batches of (places that could be, embeddings [b, d]).
Embed = Callable[[list[int]], Iterator[tuple[list[int], Tensor]]]


def cached_embeddings(
    folder: Path, identities: Sequence[bytes], embed_dim: int, embed: Embed, on_wait: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Return the embeddings of what has these identities: those in ``folder``, and new ones, which go there.

    Args:
        folder: made where it is missing. It is that of one tower.
        identities: N of IDENTITY_BYTES each.
        embed_dim: d.
        embed: is given the places of those that are not there.
        on_wait: called once where another process works on the same folder.

    Returns: places int64 [n], rising, of those that have an embedding, and their embeddings float32 [n, d].

    Raises:
        OSError: the folder cannot be written.
        ValueError: a part of it is damaged.
    """
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"embeddings cannot be kept in {folder} ({error.strerror}): name another folder with --cache"
        ) from error
    with lock:
        return _complete(folder, identities, embed_dim, embed)


def _complete(folder: Path, identities: Sequence[bytes], embed_dim: int, embed: Embed) -> tuple[Tensor, Tensor]:
    parts = sorted(folder.glob("part-*.safetensors"))
    rows: dict[bytes, Rows] = {}
    for part in parts:
        rows.update(zip(*_read_part(part, embed_dim), strict=True))
    following = 1 + max((int(part.stem[5:]) for part in parts), default=0)
    stale = len(parts) > 1 or bool(rows.keys() - set(identities))

    fresh: dict[bytes, Rows] = {}
    missing = [place for place, identity in enumerate(identities) if identity not in rows]
    written = time.monotonic()
    try:
        for places, batch in embed(missing) if missing else ():
            fresh.update(zip((identities[place] for place in places), batch.cpu().float().numpy(), strict=True))
            if time.monotonic() - written >= _SECONDS_PER_PART:
                following = _write_part(folder, following, fresh, embed_dim)
                rows |= fresh
                stale, fresh, written = True, {}, time.monotonic()
    finally:  # Ctrl-C keeps what there is
        if fresh:
            following = _write_part(folder, following, fresh, embed_dim)
            rows |= fresh
            stale = True
    have = [place for place, identity in enumerate(identities) if identity in rows]
    if stale:
        kept = {identity: rows[identity] for identity in identities if identity in rows}
        _write_part(folder, following, kept, embed_dim)
        for part in folder.glob("part-*.safetensors"):
            if int(part.stem[5:]) < following:
                part.unlink()
    embeddings = np.empty((len(have), embed_dim), np.float32)
    for row, place in enumerate(have):
        embeddings[row] = rows[identities[place]]
    return torch.tensor(have, dtype=torch.int64), torch.from_numpy(embeddings)


def _digest(identities: npt.NDArray[np.uint8], embeddings: Rows) -> str:
    digest = hashlib.sha256(identities.tobytes())
    digest.update(embeddings.tobytes())
    return digest.hexdigest()


def _write_part(folder: Path, number: int, rows: dict[bytes, Rows], embed_dim: int) -> int:
    """Write a part; return the number of the next."""
    identities = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), IDENTITY_BYTES)
    embeddings = np.stack(list(rows.values())) if rows else np.empty((0, embed_dim), np.float32)
    tensors: dict[str, npt.NDArray[Any]] = {"identities": identities, "embeddings": embeddings}
    with atomic_file(folder / f"part-{number:06d}.safetensors") as file:
        file.write(safetensors.numpy.save(tensors, {_DIGEST: _digest(identities, embeddings)}))
    return number + 1


def _read_part(path: Path, embed_dim: int) -> tuple[list[bytes], Rows]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            identities, embeddings = file.get_tensor("identities"), file.get_tensor("embeddings")
            digest = (file.metadata() or {}).get(_DIGEST)
        whole = (
            (identities.dtype, embeddings.dtype) == (np.uint8, np.float32)
            and identities.shape == (len(embeddings), IDENTITY_BYTES)
            and embeddings.shape[1:] == (embed_dim,)
            and _digest(identities, embeddings) == digest
        )
    except safetensors.SafetensorError as error:
        raise ValueError(_damaged(path)) from error
    if not whole:
        raise ValueError(_damaged(path))
    return [row.tobytes() for row in identities], embeddings


def _damaged(path: Path) -> str:
    return f"{path}, where embeddings are kept, is damaged: delete it, and they are computed again"
