"""Encode every caption of a set of shards once, for all epochs and runs.

The text tower never changes, so its embeddings can be written next to the shards and read instead of computed.

    python -m textlock.data.embeddings shards --tower nomic-ai/nomic-embed-text-v1.5
    torchrun --nproc-per-node 8 -m textlock.data.embeddings shards --tower nomic-ai/nomic-embed-text-v1.5

Run again, it checks what is there and writes only the files that are missing, damaged or of an older index. Training
reads them with ``data.text_embeddings`` set to their folder; data/stored_text.py has the format.
"""

import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from ..models.text import TextConfig, TextTower, TextTowerDescription, make_text_tower
from ..settings import exit_with
from .atomic import atomic_file
from .captions import caption_id, hash_of_ids
from .images import BadSample
from .index import ShardIndex, open_index
from .reader import ShardReader, require_captions
from .stored_text import (
    file_name,
    first_captions,
    pack_header,
    read_header,
    record_dtype,
    require_tower,
    samples_of,
)
from .tar import Problem

FOLDER_NAME = "text_embeddings"


@dataclass
class EncodeReport:
    """What ``encode_shards`` has done on this process."""

    encoded: int = 0
    """Shards whose captions were encoded."""
    kept: int = 0
    """Shards whose file was there and whole."""
    rows: int = 0
    """Embeddings written."""
    without_row: list[Problem] = field(default_factory=list)
    """Samples whose caption is missing, empty or cannot be read. The loader replaces them."""


def encode_shards(
    shards: Path | str,
    tower: TextTower,
    output: Path | str | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_shard: Callable[[str], None] | None = None,
) -> EncodeReport:
    """Write the embeddings of this rank's shards, every ``world_size``-th; without ``output`` next to their index.

    Each file appears whole or not at all. Files that are there, whole, of this index and of this tower are kept.
    ``on_shard`` is called with the name of each shard that is done.

    Raises:
        FileNotFoundError: there are no shards, or no index.
        ValueError: the index is stale, a file holds those of another tower, embeddings are not finite, or the shards
            are remote and there is no ``output``.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks: ranks count from 0")
    index = open_index(shards)
    if output is None and index.remote is not None:
        raise ValueError(
            f"{index.address} is remote and nothing can be written next to it: give --output with a folder"
        )
    folder = Path(output) if output is not None else (index.folder or Path(index.address)) / FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    reader = ShardReader(index)
    report = EncodeReport()
    description = tower.describe()
    own = range(rank, len(index.shard_names), world_size)
    for place, shard in enumerate(own):
        reader.expect(own[place : place + 2])
        path = folder / file_name(index.shard_names[shard])
        if path.exists() and _is_current(path, index, shard, description):
            report.kept += 1
        else:
            _encode_shard(path, index, shard, reader, tower, report)
            report.encoded += 1
        if on_shard is not None:
            on_shard(index.shard_names[shard])
    reader.close()
    return report


def _is_current(path: Path, index: ShardIndex, shard: int, tower: TextTowerDescription) -> bool:
    """Whether a file is whole and of this index. Raises ValueError when it holds those of another tower."""
    try:
        header = read_header(path)
    except ValueError:
        return False
    require_tower(header, path, tower)
    samples, first = samples_of(index, shard), first_captions(index, shard)
    if header.captions != first[-1]:
        return False
    records = np.fromfile(path, header.dtype, offset=header.records_offset)
    if not np.array_equal(records["key_hash"], np.repeat(samples["key_hash"], samples["captions"])):
        return False
    ids = records["caption_hash"].astype(np.int64).tolist()
    for number in np.flatnonzero(samples["captions"]):
        if hash_of_ids(ids[first[number] : first[number + 1]]) != samples["caption_hash"][number]:
            return False
    return all(zlib.crc32(record["row"].tobytes()) == record["crc32"] for record in records)


def _encode_shard(
    path: Path, index: ShardIndex, shard: int, reader: ShardReader, tower: TextTower, report: EncodeReport
) -> None:
    samples = samples_of(index, shard)
    name = index.shard_names[shard]
    first = first_captions(index, shard)
    # A record of zeros is that of no sample: the loader finds no embedding there.
    records = np.zeros(first[-1], record_dtype(tower.embed_dim))
    numbers: list[int] = []
    captions: list[str] = []
    for number in range(len(samples)):
        try:
            found = reader.read_captions(int(index.first_sample[shard]) + number)
            require_captions(found)
        except BadSample as fault:
            report.without_row.append(Problem(name, f"sample {number}", fault.kind, str(fault)))
            continue
        numbers += range(first[number], first[number] + len(found))
        captions += found
        records["key_hash"][first[number] : first[number + 1]] = samples["key_hash"][number]
    if captions:
        rows = tower.encode(captions).half().cpu().numpy()  # [n, d]
        if not np.isfinite(rows).all():
            raise ValueError(
                f"text tower {tower.config.name} gives embeddings that are not finite for captions of {name}"
            )
        records["row"][numbers] = rows
        records["caption_hash"][numbers] = [caption_id(caption) % 2**64 for caption in captions]
        records["crc32"][numbers] = [zlib.crc32(row.tobytes()) for row in rows]
    report.rows += len(captions)
    with atomic_file(path) as file:
        file.write(pack_header(name, len(records), tower.describe()))
        file.write(records.tobytes())


@dataclass(frozen=True, kw_only=True)
class Tower(TextConfig, section=""):
    """The text tower, by the flags of this command."""

    name: Annotated[str, tyro.conf.arg(name="tower")]
    """Text tower: a transformers or sentence-transformers folder, or a hub name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Encode every caption of a set of shards once. Run again, or on more processes, it encodes the missing shards."""

    shards: tyro.conf.Positional[Path]
    """Folder of .tar shards with their index."""
    text: Annotated[Tower, tyro.conf.arg(name="")]
    output: Path | None = None
    """Folder for the embeddings; left out: text_embeddings in the folder of the index."""
    rank: int = int(os.environ.get("RANK", "0"))
    """Number of this process; torchrun sets it."""
    world_size: int = int(os.environ.get("WORLD_SIZE", "1"))
    """Number of processes that share the shards; torchrun sets it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one; under torchrun each process takes its own."""


def main(options: Options) -> None:
    """Encode, and print what was done."""
    device = torch.device("cpu")
    if options.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    elif options.device == "cuda":
        raise ValueError("--device cuda: there is no GPU here; take --device cpu")
    open_index(options.shards)  # the same kind of error, before a slow load
    tower = make_text_tower(options.text, device)
    print(f"text tower {options.text.name}: {tower.recipe}")
    for note in tower.notes:
        print(note)
    start = time.perf_counter()
    report = encode_shards(
        options.shards, tower, options.output, rank=options.rank, world_size=options.world_size, on_shard=print
    )
    for problem in report.without_row:
        print(f"no row: {problem.shard} {problem.key} ({problem.kind}): {problem.message}")
    seconds = time.perf_counter() - start
    print(
        f"{report.rows} captions of {report.encoded} shards encoded, {report.rows / seconds:,.0f} a second; "
        f"{report.kept} shards were there; {len(report.without_row)} samples have no caption"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
    except (ValueError, OSError) as error:
        exit_with(error)
