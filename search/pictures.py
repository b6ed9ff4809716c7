"""The images that are searched: files in a folder, in any depth, or the samples of tar shards."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.captions import MAX_MEMBER_BYTES, read_captions
from ..data.images import EVALUATION_EXTENSIONS, MAX_IMAGE_BYTES, BadSample
from ..data.index import INDEX_NAME, open_index
from ..data.reader import ShardReader

IDENTITY_BYTES = 16


@dataclass(frozen=True)
class Pictures:
    """N images, numbered from 0: files in the order of their paths, samples in the order of the index."""

    folder: Path
    identities: list[bytes]
    """Of each image IDENTITY_BYTES that change when it does. Two have the same only where they are the same image of
    two copies of a shard."""
    captions: list[list[str]]
    """Of each image; none where it has none that can be read."""
    problems: list[str]
    """A sentence for each thing that could not be read."""
    name: Callable[[int], str]
    """What an image is called. Raises BadSample."""
    read: Callable[[int], bytes]
    """The bytes of an image. Raises BadSample where it cannot be read or has changed since it was listed."""

    def __len__(self) -> int:
        return len(self.identities)


def find_pictures(folder: Path) -> Pictures:
    """List the images of a folder: the samples of its indexed shards where it holds any, or its image files.

    Raises:
        FileNotFoundError: there is no folder, no image in it, or no index of its shards.
        ValueError: it holds shards and image files, or the index is damaged or stale.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name a folder of images or of tar shards")
    names = [entry.name for entry in os.scandir(folder) if not entry.is_dir()]
    if any(name.endswith(".tar") for name in names) or INDEX_NAME in names:
        loose = next((name for name in sorted(names) if _is_image(name)), None)
        if loose is not None:
            raise ValueError(f"{folder} holds tar shards and image files such as {loose}: name a folder of one kind")
        return _samples(folder)
    return _files(folder)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in EVALUATION_EXTENSIONS


def _samples(folder: Path) -> Pictures:
    index = open_index(folder)
    reader = ShardReader(index)
    identities, captions, problems = [], [], []
    for sample in range(len(index)):
        offset = int(index.samples[sample]["image_offset"])
        digest = index.shard_digests[index.shard_of(sample)]
        identities.append(hashlib.blake2b(digest + offset.to_bytes(8, "little"), digest_size=IDENTITY_BYTES).digest())
        try:
            captions.append(reader.read_captions(sample))
        except BadSample as fault:
            captions.append([])
            problems.append(f"captions of sample {sample} ({fault.kind}): {fault}")

    def name(sample: int) -> str:
        return f"{reader.read(sample).key} in {index.shard_names[index.shard_of(sample)]}"

    return Pictures(folder, identities, captions, problems, name, lambda sample: reader.read(sample).image)


def _files(folder: Path) -> Pictures:
    paths: list[Path] = []
    others: Counter[str] = Counter()
    problems: list[str] = []

    def cannot_list(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be listed: {error.strerror}")

    texts: set[Path] = set()
    for below, folders, names in os.walk(folder, onerror=cannot_list):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(below, name)
            if _is_image(name):
                paths.append(path)
            else:
                others[path.suffix.lower() or name] += 1
                if path.suffix == ".txt":
                    texts.add(path)
    found, identities, captions = [], [], []
    for path in paths:
        relative = path.relative_to(folder)
        try:
            identity = _identity(relative, path.stat())
        except (OSError, BadSample) as error:
            problems.append(f"{relative}: {error}")
            continue
        found.append(path)
        identities.append(identity)
        captions.append(_sidecar(path.with_suffix(".txt"), problems) if path.with_suffix(".txt") in texts else [])
    if not found:
        kinds = ", ".join(sorted(EVALUATION_EXTENSIONS))
        held = ", ".join(f"{suffix} ({count:,})" for suffix, count in others.most_common(3))
        held = problems[0] if problems else f"it holds {held}" if held else "it is empty"
        raise FileNotFoundError(f"no images ({kinds}) in {folder}, {held}: name a folder of images or of tar shards")

    def name_of(place: int) -> str:
        return str(found[place].relative_to(folder))

    def read(place: int) -> bytes:
        path = found[place]
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if _identity(path.relative_to(folder), status) != identities[place]:
                    raise BadSample("moved", "it has changed since it was listed: start again")
                if status.st_size > MAX_IMAGE_BYTES:
                    raise BadSample("too-large", f"the image has more than {MAX_IMAGE_BYTES:,} bytes")
                return file.read()
        except OSError as error:
            raise BadSample("unreadable", str(error)) from error

    return Pictures(folder, identities, captions, problems, name_of, read)


def _identity(relative: Path, status: os.stat_result) -> bytes:
    """Hash what tells a file from what was there before; the time of its inode changes with every write to it."""
    if not stat.S_ISREG(status.st_mode):
        raise BadSample("unreadable", "it is no file")  # reading a pipe would wait for ever
    facts = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} ".encode() + os.fsencode(relative)
    return hashlib.blake2b(facts, digest_size=IDENTITY_BYTES).digest()


def _sidecar(path: Path, problems: list[str]) -> list[str]:
    """Return the captions in the text file next to an image, as a sample of a shard has them."""
    try:
        with open(path, "rb") as file:
            return read_captions(file.read(MAX_MEMBER_BYTES + 1), "txt").texts
    except (OSError, ValueError) as error:
        problems.append(f"captions in {path}: {error}")
        return []
