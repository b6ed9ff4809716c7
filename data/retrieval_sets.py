"""Turns the caption files of Flickr30k, Flickr8k and COCO into shards for image-text retrieval.

python -m textlock.data.retrieval_sets karpathy --captions dataset_coco.json --images coco --output mscoco_captions
python -m textlock.data.retrieval_sets tokens --captions Flickr8k.token.txt --split-list Flickr_8k.testImages.txt \
  --images Flicker8k_Dataset --output flickr8k
python -m textlock.data.retrieval_sets coco --captions captions_val2017.json --images val2017 --output coco_2017

They are written in the layout of clip_benchmark's webdatasets, ``OUTPUT/test/0.tar`` and so on, with an index:
evaluate.py reads ``--data OUTPUT/test``, and its suites find OUTPUT by the name that clip_benchmark gives the set.
Every caption of an image counts.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ..settings import exit_with
from .atomic import atomic_folder, require_free, write_text_atomically
from .benchmark_sets import COUNT_FILE, SPLIT, TYPE_FILE
from .captions import read_utf8, unique_keys
from .pack import PackReport, pack_shards

_SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class SetCaptions:
    """The captions of the images of one split, as ``pack_shards`` takes them."""

    path: Path
    images: list[tuple[int, str, list[str]]]
    """(number, file name below the folder of images, captions)."""
    unit: str
    """What the number counts in the file."""

    def rows(self, is_image: Callable[[str], bool]) -> Iterator[tuple[int, str, str]]:
        """Yield (number, file, caption) of every caption."""
        for number, name, captions in self.images:
            for caption in captions:
                yield number, name, caption

    def where(self, number: int) -> str:
        """Return the place of an image in words."""
        return f"{self.path} {self.unit} {number}"


def read_karpathy(path: Path, split: str) -> SetCaptions:
    """Read a split of Karpathy's ``dataset_flickr30k.json``, ``dataset_flickr8k.json`` or ``dataset_coco.json``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or has no image of the split.
    """
    found, splits = [], set()
    for number, image in enumerate(_list_of(_read_object(path), "images", path), start=1):
        where = f"{path} image {number}"
        name, of = _text_of(image, "filename", where), _text_of(image, "split", where)
        splits.add(of)
        if of == split:
            captions = [_text_of(sentence, "raw", where) for sentence in _list_of(image, "sentences", where)]
            # COCO's images lie in a folder of their own year.
            folder = f"{_text_of(image, 'filepath', where)}/" if "filepath" in image else ""
            found.append((number, folder + name, captions))
    if not found:
        raise ValueError(f"{path} has no image of the split {split}: it has {', '.join(sorted(splits)) or 'none'}")
    return _with_captions(SetCaptions(path, found, "image"))


def read_coco(path: Path) -> SetCaptions:
    """Read all images of COCO's own ``captions_val2014.json``, ``captions_val2017.json`` and their like.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    content = _read_object(path)
    captions: dict[int, list[str]] = {}
    names: dict[int, str] = {}
    for number, image in enumerate(_list_of(content, "images", path), start=1):
        where = f"{path} image {number}"
        key = _number_of(image, "id", where)
        if key in names:
            raise ValueError(f"{where}: {key} is the id of another image too")
        names[key] = _text_of(image, "file_name", where)
    for number, annotation in enumerate(_list_of(content, "annotations", path), start=1):
        where = f"{path} annotation {number}"
        key = _number_of(annotation, "image_id", where)
        if key not in names:
            raise ValueError(f"{where}: there is no image {key}")
        captions.setdefault(key, []).append(_text_of(annotation, "caption", where))
    found = [(number, name, captions.get(key, [])) for number, (key, name) in enumerate(names.items(), start=1)]
    return _with_captions(SetCaptions(path, found, "image"))


def read_tokens(path: Path, split_list: Path | None) -> SetCaptions:
    """Read ``Flickr8k.token.txt`` or Flickr30k's ``results.token``: lines of ``NAME.jpg#0``, a tab and a caption.

    Args:
        path: the file of captions.
        split_list: a file with the name of an image a line, such as ``Flickr_8k.testImages.txt``; None for all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is of another form, or the list names an image without a caption.
    """
    captions: dict[str, tuple[int, list[str]]] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        reference, tab, caption = line.rstrip("\r").partition("\t")
        name, mark, place = reference.rpartition("#")
        if not (tab and mark and name and place.isdecimal()):
            raise ValueError(f"{path} line {number} is no NAME#NUMBER, a tab and a caption")
        captions.setdefault(name, (number, []))[1].append(caption)
    names = list(captions)
    if split_list is not None:
        names = [name.strip() for name in _read_text(split_list).splitlines() if name.strip()]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"{split_list} names {twice[0]} more than once")
        without = next((name for name in names if name not in captions), None)
        if without is not None:
            raise ValueError(f"{split_list} names {without}, of which {path} has no caption")
    if not names:
        raise ValueError(f"{split_list or path} names no image")
    return SetCaptions(path, [(captions[name][0], name, captions[name][1]) for name in names], "line")


def _with_captions(found: SetCaptions) -> SetCaptions:
    if not found.images:
        raise ValueError(f"{found.path} names no image")
    for number, name, captions in found.images:
        if not captions:
            raise ValueError(f"{found.where(number)}: {name} has no caption: retrieval needs one of every image")
    return found


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return read_utf8(path)


def _read_object(path: Path) -> Any:
    try:
        return json.loads(_read_text(path), object_pairs_hook=unique_keys)
    except KeyError as error:
        raise ValueError(f"{path} names {error.args[0]} more than once in an object") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _list_of(holder: Any, key: str, where: Path | str) -> list[Any]:
    if not isinstance(holder, dict) or not isinstance(holder.get(key), list):
        raise ValueError(f"{where} has no list {key}: it is another kind of file")
    return holder[key]


def _text_of(holder: Any, key: str, where: str) -> str:
    if not isinstance(holder, dict) or not isinstance(holder.get(key), str):
        raise ValueError(f"{where} has no text {key}: it is another kind of file")
    return holder[key]


def _number_of(holder: Any, key: str, where: str) -> int:
    if not isinstance(holder, dict) or type(holder.get(key)) is not int:
        raise ValueError(f"{where} has no number {key}: it is another kind of file")
    return holder[key]


def write_retrieval_set(
    images: Path, captions: SetCaptions, output: Path, *, skip_bad: bool = False, workers: int = 1
) -> PackReport:
    """Write the images of a split with their captions to ``output``, whole or not at all.

    Raises:
        FileNotFoundError: the folder of images, or one of them, does not exist.
        ValueError: an image or caption is bad (unless ``skip_bad`` leaves them out), or ``output`` is not empty.
    """
    require_free(output)
    with atomic_folder(output) as draft:
        report = pack_shards(
            images,
            captions,
            draft / SPLIT,
            samples_per_shard=_SAMPLES_PER_SHARD,
            shard_digits=1,
            skip_bad=skip_bad,
            workers=workers,
        )
        write_text_atomically(draft / COUNT_FILE, f"{report.shards}\n")
        write_text_atomically(draft / TYPE_FILE, "retrieval\n")
    return report


def _write(captions: SetCaptions, images: Path, output: Path, skip_bad: bool, workers: int) -> None:
    report = write_retrieval_set(images, captions, output, skip_bad=skip_bad, workers=workers)
    for problem in report.skipped:
        print(f"left out: {problem.key}: {problem.message}")
    print(
        f"{report.samples} images with {report.captions} captions in {report.shards} shards in {output / SPLIT}; "
        f"{len(captions.images) - report.samples} images left out"
    )


def _karpathy(
    captions: Path, images: Path, output: Path, split: str = "test", skip_bad: bool = False, workers: int = 2
) -> None:
    """Write a split of Karpathy's dataset_flickr30k.json, dataset_flickr8k.json or dataset_coco.json.

    Args:
        captions: The file.
        images: Folder of the images; of COCO the one that holds val2014.
        output: New folder for the shards.
        split: Which images: train, val or test, and restval in COCO.
        skip_bad: Leave out images that cannot be packed and empty captions, instead of stopping at the first.
        workers: Threads that read images.
    """
    _write(read_karpathy(captions, split), images, output, skip_bad, workers)


def _tokens(
    captions: Path,
    images: Path,
    output: Path,
    split_list: Path | None = None,
    skip_bad: bool = False,
    workers: int = 2,
) -> None:
    """Write the images of Flickr8k.token.txt, or of Flickr30k's results.token, that a list of a split names.

    Args:
        captions: The file, with lines of NAME.jpg#0, a tab and a caption.
        images: Folder of the images.
        output: New folder for the shards.
        split_list: File with the name of an image a line, such as Flickr_8k.testImages.txt; by default all images.
        skip_bad: Leave out images that cannot be packed and empty captions, instead of stopping at the first.
        workers: Threads that read images.
    """
    _write(read_tokens(captions, split_list), images, output, skip_bad, workers)


def _coco(captions: Path, images: Path, output: Path, skip_bad: bool = False, workers: int = 2) -> None:
    """Write all images of COCO's own captions_val2014.json or captions_val2017.json.

    Args:
        captions: The file.
        images: Folder of the images, such as val2017.
        output: New folder for the shards.
        skip_bad: Leave out images that cannot be packed and empty captions, instead of stopping at the first.
        workers: Threads that read images.
    """
    _write(read_coco(captions), images, output, skip_bad, workers)


def main() -> None:
    """Run the command line; bad input ends in one sentence and exit status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict({"karpathy": _karpathy, "tokens": _tokens, "coco": _coco})
    except (ValueError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
