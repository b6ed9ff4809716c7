"""Writes tar shards: from a folder of images and a captions file, or from other shards with smaller images."""

import hashlib
import json
import os
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from .atomic import atomic_folder
from .captions_file import CaptionsFile
from .images import (
    MAX_IMAGE_BYTES,
    BadSample,
    CropWindow,
    ImageHeader,
    check_image,
    crop_and_resize,
    decode_image,
)
from .index import index_of_one_shard, index_shards, list_shards
from .processes import map_in_processes
from .reader import ShardReader, require_caption
from .tar import Problem, read_samples


@dataclass(frozen=True)
class PackReport:
    """Counts of the samples written, and the samples left out."""

    shards: int
    samples: int
    skipped: list[Problem]
    images: int | None = None
    """Distinct image files that the captions file names; None where there is none."""
    in_marks: int = 0
    """Captions that stand in quotation marks and were packed with them."""


@dataclass(frozen=True)
class Reencoding:
    """Makes images cheaper to read: baseline JPEG, the short side at most ``short_side`` pixels."""

    short_side: int
    quality: int = 90

    def __post_init__(self) -> None:
        if self.short_side < 1 or not 1 <= self.quality <= 100:
            raise ValueError(
                f"resize is {self.short_side} and quality {self.quality}: they must be at least 1, and quality at most "
                "100"
            )

    def __call__(self, payload: bytes) -> tuple[bytes, ImageHeader]:
        """Return the image and its header; a baseline JPEG that is small enough stays as it is. Raises BadSample."""
        header = check_image(payload)
        fits = min(header.height, header.width) <= self.short_side
        if fits and header.format == "jpeg" and not _is_progressive(payload):
            return payload, header
        image = decode_image(payload)
        if not fits:
            height, width = image.shape[:2]
            scale = self.short_side / min(height, width)
            resized = torch.empty(round(height * scale), round(width * scale), 3, dtype=torch.uint8)
            crop_and_resize(image, CropWindow(0, 0, height, width), resized)
            image = resized.numpy()
        payload = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=self.quality, colorsubsampling="420")
        return payload, check_image(payload)


def _is_progressive(payload: bytes) -> bool:
    with Image.open(BytesIO(payload), formats=["jpeg"]) as image:  # reads no more than the header
        return bool(image.info.get("progressive"))


def pack_shards(
    images: Path,
    captions: CaptionsFile,
    output: Path,
    *,
    samples_per_shard: int = 1000,
    skip_bad: bool = False,
    reencoding: Reencoding | None = None,
    workers: int = 1,
) -> PackReport:
    """Write the images that ``captions`` names, with their captions, as tar shards with an index in ``output``.

    Image bytes are copied as they are unless there is a ``reencoding``; ``workers`` threads read, check and re-encode.
    Each sample is ``key.jpg`` (or png, webp), ``key.txt`` and ``key.json`` with key, caption, width, height, file and
    sha256. The shards of the same input are the same bytes.

    Raises:
        FileNotFoundError: the captions file, the folder or a named image does not exist.
        ValueError: the captions file cannot be read, an image or caption is bad (unless ``skip_bad`` leaves them out),
            or ``output`` is not empty. Nothing is left behind in any of these cases.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    if not images.is_dir():
        raise FileNotFoundError(f"no folder {images}: name the folder of the images")
    with atomic_folder(output) as draft:
        samples = _load_samples(images, captions, reencoding, workers)
        report = _write_shards(samples, captions.path, draft, samples_per_shard, skip_bad)
        index_shards(draft)
    return report


def repack_shards(source: Path, output: Path, reencoding: Reencoding, *, workers: int = 1) -> PackReport:
    """Write the shards of ``source`` with re-encoded images to ``output``, and their index.

    ``workers`` processes take a shard each.

    Shards, keys and captions keep their names, order and bytes. Bad samples are left out: the result names them. A
    shard without a good sample is not written.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: no sample is good, or ``output`` is not empty.
    """
    shards = list_shards(source)
    skipped: list[Problem] = []
    with atomic_folder(output) as draft:
        repack = _ShardRepacking(draft, reencoding)
        for problems in map_in_processes(repack, shards, min(workers, len(shards))):
            skipped += problems
        if not any(draft.iterdir()):
            raise ValueError(f"{source} holds no good sample: there is nothing to pack")
        report = index_shards(draft, workers=workers)
    return PackReport(report.shards, report.samples, skipped)


@dataclass(frozen=True)
class _ShardRepacking:
    output: Path
    reencoding: Reencoding

    def __call__(self, path: Path) -> list[Problem]:
        samples, problems, _ = read_samples(path)
        reader = ShardReader(index_of_one_shard(path, samples))
        draft = self.output / path.name
        written = 0
        with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
            for place, sample in enumerate(samples):
                try:
                    raw = reader.read(place)
                    raw.text()
                    payload, header = self.reencoding(raw.image)
                except BadSample as fault:
                    problems.append(Problem(path.name, sample.key, fault.kind, str(fault), place))
                    continue
                _add_member(tar, f"{sample.key}.{_extension(header)}", payload)
                _add_member(tar, f"{sample.key}.txt", raw.caption)
                written += 1
        if not written:
            draft.unlink()
        return problems


@dataclass(frozen=True)
class _Loaded:
    """An image that ``captions`` names, or why it cannot be packed."""

    line: int
    name: str
    caption: str
    image: tuple[bytes, ImageHeader] | BadSample


def _load_samples(
    images: Path, captions: CaptionsFile, reencoding: Reencoding | None, workers: int
) -> Iterator[_Loaded]:
    """Yield what ``captions`` names in its order; ``workers`` threads are a few images ahead."""

    def load(line: int, name: str, caption: str, path: Path) -> _Loaded:
        try:
            payload, header = _load_image(path)
            image = reencoding(payload) if reencoding else (payload, header)
            require_caption(caption)
            return _Loaded(line, name, caption, image)
        except BadSample as fault:
            return _Loaded(line, name, caption, fault)

    pending: deque[Future[_Loaded]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for line, name, caption in captions.rows():
            path = _image_path(images, name, f"{captions.path} line {line}")
            pending.append(pool.submit(load, line, name, caption, path))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_shards(
    samples: Iterator[_Loaded], captions: Path, folder: Path, samples_per_shard: int, skip_bad: bool
) -> PackReport:
    digits = max(4, len(str(samples_per_shard - 1)))
    skipped: list[Problem] = []
    written = 0
    in_marks = 0
    names: set[str] = set()
    tar: tarfile.TarFile | None = None
    try:
        for sample in samples:
            names.add(sample.name)
            in_marks += len(sample.caption) > 1 and sample.caption[0] == sample.caption[-1] == '"'
            if isinstance(sample.image, BadSample):
                fault = sample.image
                if not skip_bad:
                    raise ValueError(
                        f"{captions} line {sample.line}: {sample.name}: {fault}; mend it, or leave such samples out "
                        "with --skip-bad"
                    ) from fault
                skipped.append(Problem(captions.name, sample.name, fault.kind, str(fault)))
                continue
            shard, place = divmod(written, samples_per_shard)
            if place == 0:
                _close_shard(tar)
                # USTAR and fixed times and owners: equal input gives equal bytes.
                tar = tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            assert tar is not None
            _add_sample(tar, f"{shard:05d}{place:0{digits}d}", sample.name, *sample.image, sample.caption)
            written += 1
        _close_shard(tar)
        tar = None
    finally:
        if tar is not None:
            tar.close()
    if not written:
        raise ValueError(f"{captions} names no usable image: there is nothing to pack")
    return PackReport(-(-written // samples_per_shard), written, skipped, len(names), in_marks)


def _image_path(images: Path, name: str, where: str) -> Path:
    path = Path(os.path.normpath(images / name))
    if not path.is_relative_to(os.path.normpath(images)):
        raise ValueError(f"{where}: {name} is outside {images}: name files inside that folder")
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no image {path}")
    return path


def _load_image(path: Path) -> tuple[bytes, ImageHeader]:
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise BadSample("too-large", f"the image has {path.stat().st_size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
    payload = path.read_bytes()
    return payload, check_image(payload)


def _add_sample(tar: tarfile.TarFile, key: str, name: str, payload: bytes, header: ImageHeader, caption: str) -> None:
    facts = {
        "key": key,
        "caption": caption,
        "width": header.width,
        "height": header.height,
        "file": name,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    _add_member(tar, f"{key}.{_extension(header)}", payload)
    _add_member(tar, f"{key}.txt", caption.encode("utf-8", "replace"))
    _add_member(tar, f"{key}.json", json.dumps(facts).encode())


def _extension(header: ImageHeader) -> str:
    return "jpg" if header.format == "jpeg" else header.format


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def _close_shard(tar: tarfile.TarFile | None) -> None:
    if tar is None:
        return
    tar.close()
