"""The command for tar shards: write, index and check them.

python -m textlock.data.shards pack --images photos --captions captions.tsv --output shards
python -m textlock.data.shards pack --shards shards --resize 256 --quality 90 --output smaller
python -m textlock.data.shards index shards
python -m textlock.data.shards verify shards --output skipped.jsonl
"""

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro

from ..settings import exit_with
from .atomic import atomic_file
from .captions import MAX_CAPTION_BYTES, MAX_CAPTIONS, MAX_MEMBER_BYTES, Fields
from .captions_file import CaptionsFile
from .index import index_shards
from .pack import Reencoding, pack_shards, repack_shards
from .tar import Problem, printable
from .verify import verify_shards


def _show(problem: Problem) -> None:
    print("\t".join(map(printable, [problem.shard, problem.key or "-", problem.kind, problem.message])))


def _pack(
    output: Path,
    images: Path | None = None,
    captions: Path | None = None,
    shards: Path | None = None,
    samples_per_shard: int = 1000,
    skip_bad: bool = False,
    resize: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    quoting: bool = False,
    file_column: str | None = None,
    caption_column: str | None = None,
) -> None:
    """Write a folder of images and a captions file, or other shards, as tar shards with an index.

    Args:
        output: New folder for the shards.
        images: Folder of the images.
        captions: .tsv or .csv with a header line, or .jsonl; a row for each caption of an image.
        shards: Folder of shards to re-encode with --resize, instead of images and captions; bad samples are left out.
        samples_per_shard: Samples in each shard; the last may have fewer.
        skip_bad: Leave out images that are no JPEG, PNG or WebP and empty captions, instead of stopping at the first.
        resize: Re-encode as baseline JPEG whose short side has at most so many pixels; smaller ones are not enlarged.
        quality: Of those JPEGs, 1 to 100.
        workers: Threads, or for shards processes; by default one for each CPU.
        quoting: Cells of the .tsv may stand in quotation marks, as those of a .csv do. Otherwise a mark is a character.
        file_column: Column of the image files, which lie inside the folder of the images; by default file, filepath or
            filename.
        caption_column: Column of the captions; by default caption, title or text.
    """
    reencoding = Reencoding(resize, quality) if resize is not None else None
    workers = workers or os.cpu_count() or 1
    if shards is not None and images is None and captions is None and reencoding is not None:
        report = repack_shards(shards, output, reencoding, workers=workers)
    elif shards is None and images is not None and captions is not None:
        report = pack_shards(
            images,
            CaptionsFile(path=captions, quoting=quoting, file_column=file_column, caption_column=caption_column),
            output,
            samples_per_shard=samples_per_shard,
            skip_bad=skip_bad,
            reencoding=reencoding,
            workers=workers,
        )
    else:
        raise ValueError("name --images and --captions, or --shards with --resize")
    for problem in report.skipped:
        _show(problem)
    if report.rows is not None:
        print(f"{report.rows} rows of {captions}")
    if report.in_marks and not quoting:
        print(f"{report.in_marks} captions stand in quotation marks, which were kept; --quoting takes them off a .tsv")
    _show_cut(report.cut)
    left = (
        f"{len(report.skipped)} problems" if report.rows is None else f"{report.rows - report.captions} rows left out"
    )
    print(f"{report.samples} images with {report.captions} captions in {report.shards} shards in {output}; {left}")


def _show_cut(cut: int) -> None:
    if cut:
        print(
            f"at least {cut} captions are not read to their end: {MAX_CAPTION_BYTES:,} bytes are read of each, "
            f"{MAX_MEMBER_BYTES:,} bytes and {MAX_CAPTIONS:,} captions of a member"
        )


def _index(
    folder: tyro.conf.Positional[Path],
    image_fields: tuple[str, ...] | None = None,
    caption_fields: tuple[str, ...] | None = None,
    whole_text: bool = False,
    index: Path | None = None,
    workers: int | None = None,
) -> None:
    """Write the index of a folder of tar shards.

    Args:
        folder: Folder of .tar shards.
        image_fields: Fields of the image, the first that a sample has counts; by default jpg,jpeg,png,webp. A field is
            what follows the first dot of a member's name.
        caption_fields: Fields of the captions, the first in which a sample has one counts; by default txt. A key of a
            JSON object is written json:KEY; it holds a text, or a list of texts.
        whole_text: Take a text of several lines as one caption, instead of each line.
        index: Folder for the index, where that of the shards cannot be written; name it in place of the shards then.
        workers: Processes, which read a shard each; by default one for each CPU.
    """
    fields = Fields(whole_text=whole_text).named(image_fields, caption_fields)
    report = index_shards(folder, fields=fields, output=index, workers=workers or os.cpu_count() or 1)
    for problem in report.problems:
        _show(problem)
    if report.left_out:
        shards = report.shards + len(report.left_out)
        print(f"{len(report.left_out)} of {shards} shards are left out: {'; '.join(report.left_out[:5])}")
    if report.left:
        others = ", ".join(f"{count:,} {printable(name)}" for name, count in report.left.most_common(8))
        more = len(report.left) - 8
        print(
            f"members of other fields, which are not read: {others}" + (f" and {more} more fields" if more > 0 else "")
        )
    if report.with_several:
        of_lines = not whole_text and any(":" not in name for name in fields.caption)
        how = " (a line of a text is one, unless --whole-text is given)" if of_lines else ""
        print(f"{report.with_several} samples have several captions{how}")
    if report.without_caption:
        print(f"{report.without_caption} samples have no caption")
    _show_cut(report.cut)
    print(f"read: {report.fields}")
    if index is not None:
        print(f"the index is in {index}: name that folder in place of {folder}")
    print(
        f"{report.samples} samples with {report.captions} captions in {report.shards} shards; "
        f"{len(report.problems)} problems"
    )


def _verify(
    shards: tyro.conf.Positional[str],
    output: Path | None = None,
    workers: int | None = None,
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
) -> None:
    """Read a set of shards as the loader would and list the samples it will skip; exit status 1 if there are any.

    Args:
        shards: Folder of .tar shards, or its URL.
        output: File for the list, one JSON object a line: shard, key, kind, message, place.
        workers: Processes, which read a shard each; by default one for each CPU.
        cache_dir: Folder for copies of remote shards.
        cache_gb: Size of that folder in GB (10^9 bytes).
    """
    arguments: dict[str, Any] = {"workers": workers, "cache_dir": cache_dir, "cache_gb": cache_gb}
    if output is None:
        report = verify_shards(shards, on_problem=_show, **arguments)
    else:
        with atomic_file(output) as file:

            def record(problem: Problem) -> None:
                _show(problem)
                file.write(json.dumps(asdict(problem)).encode() + b"\n")

            report = verify_shards(shards, on_problem=record, **arguments)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(p.kind for p in report.problems).most_common())
    print(f"{report.good} good samples; {len(report.problems)} problems{kinds and ': '}{kinds}")
    if report.problems:
        raise SystemExit(1)


def main() -> None:
    """Run the command line."""
    try:
        tyro.extras.subcommand_cli_from_dict({"pack": _pack, "index": _index, "verify": _verify})
    except (ValueError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
