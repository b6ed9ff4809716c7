"""Writes tar shards: from a folder of images and a captions file, or from other shards with smaller images."""

import hashlib
import json
import os
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from .atomic import atomic_folder
from .captions import Fields, one_line, without_blanks
from .captions_file import CaptionRows
from .images import (
    MAX_IMAGE_BYTES,
    MAX_JPEG_SIDE,
    BadSample,
    CropWindow,
    ImageHeader,
    check_image,
    crop_and_resize,
    decode_image,
)
from .index import index_of_one_shard, index_shards, list_shards, recorded_source
from .processes import map_in_processes
from .reader import ShardReader, require_captions
from .tar import Problem, read_samples


@dataclass(frozen=True)
class PackReport:
    """Counts of the samples written, and the samples left out."""

    shards: int
    samples: int
    skipped: list[Problem]
    rows: int | None = None
    """Rows of the captions file; None where there is none."""
    in_marks: int = 0
    """Rows whose captions stand in quotation marks and were packed with them."""
    captions: int = 0
    """Captions in the shards."""
    cut: int = 0
    """Captions that are packed whole and of which only the first bytes will be read."""


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
        if max(image.shape) > MAX_JPEG_SIDE:
            raise BadSample(
                "unsupported",
                f"a JPEG of {image.shape[1]} x {image.shape[0]} pixels cannot be: it has at most {MAX_JPEG_SIDE:,}",
            )
        payload = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=self.quality, colorsubsampling="420")
        return payload, check_image(payload)


def _is_progressive(payload: bytes) -> bool:
    with Image.open(BytesIO(payload), formats=["jpeg"]) as image:  # reads no more than the header
        return bool(image.info.get("progressive"))


def pack_shards(
    images: Path,
    captions: CaptionRows,
    output: Path,
    *,
    samples_per_shard: int = 1000,
    shard_digits: int = 5,
    skip_bad: bool = False,
    reencoding: Reencoding | None = None,
    workers: int = 1,
) -> PackReport:
    """Write the images that ``captions`` names, with their captions, as tar shards with an index in ``output``.

    An image is packed once, where its first row is, with the captions of all rows that name it, one in each line of
    ``key.txt``; line breaks inside a caption become spaces. Image bytes are copied as they are unless
    there is a ``reencoding``; ``workers`` threads read, check and re-encode. Each sample is ``key.jpg`` (or png, webp),
    ``key.txt`` and ``key.json`` with key, caption (a list where there are several), width, height, file and sha256. The
    shards of the same input are the same bytes; their names are numbers of at least ``shard_digits`` digits. The rows
    are held in memory meanwhile.

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
        samples = _load_images(_read_rows(images, captions), reencoding, workers)
        report = _write_shards(samples, captions, draft, samples_per_shard, shard_digits, skip_bad)
        indexed = index_shards(draft)
    return replace(report, captions=indexed.captions, cut=indexed.cut)


def repack_shards(source: Path, output: Path, reencoding: Reencoding, *, workers: int = 1) -> PackReport:
    """Write the shards of ``source`` with re-encoded images to ``output``, and their index.

    ``workers`` processes take a shard each.

    Shards, keys and captions keep their names and order. The image and the captions of a sample are those that the
    index of ``source`` says, and become fields jpg (or png, webp) and txt, a caption in each line, without what is
    never read of a long one. Bad samples are left out: the result names them. A shard without a good sample is not
    written.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: no sample is good, or ``output`` is not empty.
    """
    folder, fields = recorded_source(source)
    shards = list_shards(folder)
    skipped: list[Problem] = []
    with atomic_folder(output) as draft:
        repack = _ShardRepacking(draft, fields, reencoding)
        for problems in map_in_processes(repack, shards, min(workers, len(shards))):
            skipped += problems
        if not any(draft.iterdir()):
            raise ValueError(f"{source} holds no good sample: there is nothing to pack")
        report = index_shards(draft, workers=workers)
    return PackReport(report.shards, report.samples, skipped, captions=report.captions, cut=report.cut)


@dataclass(frozen=True)
class _ShardRepacking:
    output: Path
    fields: Fields
    reencoding: Reencoding

    def __call__(self, path: Path) -> list[Problem]:
        try:
            samples, problems, _ = read_samples(path, self.fields)
        except OSError as error:
            return [Problem(path.name, "", "unreadable", str(error))]
        index = index_of_one_shard(path, samples, self.fields)
        reader = ShardReader(index)
        draft = self.output / path.name
        written = 0
        with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
            for place, sample in enumerate(samples):
                try:
                    raw = reader.read(place)
                    require_captions(raw.captions)
                    payload, header = self.reencoding(raw.image)
                except BadSample as fault:
                    problems.append(Problem(path.name, sample.key, fault.kind, str(fault), place))
                    continue
                _add_member(tar, f"{sample.key}.{_extension(header)}", payload)
                _add_member(tar, f"{sample.key}.txt", "\n".join(map(one_line, raw.captions)).encode())
                written += 1
        if not written:
            draft.unlink()
        return problems


@dataclass
class _Named:
    """An image that a captions file names, and the captions of its rows."""

    line: int  # of its first row, or what else ``CaptionRows.where`` counts
    path: Path
    captions: list[tuple[int, str]] = field(default_factory=list)  # (line, text)


@dataclass(frozen=True)
class _Loaded:
    """An image that a captions file names, or why it cannot be packed."""

    name: str
    named: _Named
    image: tuple[bytes, ImageHeader] | BadSample


def _read_rows(images: Path, captions: CaptionRows) -> dict[str, _Named]:
    """Return the images that a captions file names, by their names there, in the order of their first rows."""
    named: dict[str, _Named] = {}
    by_path: dict[Path, _Named] = {}  # a.jpg and ./a.jpg are one image

    root = os.path.normpath(images)

    def is_image(name: str) -> bool:
        path = os.path.normpath(images / name)
        return Path(path).is_relative_to(root) and os.path.isfile(path)

    for line, name, caption in captions.rows(is_image):
        path = _image_path(images, name, captions.where(line))
        image = by_path.get(path)
        if image is None:
            image = by_path[path] = named[name] = _Named(line, path)
        image.captions.append((line, caption))
    return named


def _load_images(named: dict[str, _Named], reencoding: Reencoding | None, workers: int) -> Iterator[_Loaded]:
    """Yield the images in order; ``workers`` threads are a few of them ahead."""

    def load(name: str, image: _Named) -> _Loaded:
        try:
            payload, header = _load_image(image.path)
            return _Loaded(name, image, reencoding(payload) if reencoding else (payload, header))
        except BadSample as fault:
            return _Loaded(name, image, fault)

    pending: deque[Future[_Loaded]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, image in named.items():
            pending.append(pool.submit(load, name, image))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_shards(
    samples: Iterator[_Loaded],
    source: CaptionRows,
    folder: Path,
    samples_per_shard: int,
    shard_digits: int,
    skip_bad: bool,
) -> PackReport:
    digits = max(4, len(str(samples_per_shard - 1)))
    skipped: list[Problem] = []
    written = rows = in_marks = 0

    def leave_out(name: str, line: int, fault: BadSample) -> None:
        if not skip_bad:
            raise ValueError(
                f"{source.where(line)}: {name}: {fault}; mend it, or leave such samples out with --skip-bad"
            ) from fault
        skipped.append(Problem(source.path.name, name, fault.kind, str(fault)))

    tar: tarfile.TarFile | None = None
    try:
        for sample in samples:
            texts = []
            for line, text in sample.named.captions:
                rows += 1
                in_marks += len(text) > 1 and text[0] == text[-1] == '"'
                found = without_blanks([one_line(text.encode("utf-8", "replace").decode())])
                try:
                    require_captions(found)
                except BadSample as fault:
                    leave_out(sample.name, line, fault)
                texts += found
            if isinstance(sample.image, BadSample):
                leave_out(sample.name, sample.named.line, sample.image)
                continue
            if not texts:
                continue
            shard, place = divmod(written, samples_per_shard)
            if place == 0:
                _close_shard(tar)
                # USTAR and fixed times and owners: equal input gives equal bytes.
                tar = tarfile.open(folder / f"{shard:0{shard_digits}d}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            assert tar is not None
            _add_sample(tar, f"{shard:05d}{place:0{digits}d}", sample.name, *sample.image, texts)
            written += 1
        _close_shard(tar)
        tar = None
    finally:
        if tar is not None:
            tar.close()
    if not written:
        raise ValueError(f"{source.path} names no usable image: there is nothing to pack")
    return PackReport(-(-written // samples_per_shard), written, skipped, rows, in_marks)


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


def _add_sample(
    tar: tarfile.TarFile, key: str, name: str, payload: bytes, header: ImageHeader, captions: list[str]
) -> None:
    facts = {
        "key": key,
        "caption": captions[0] if len(captions) == 1 else captions,
        "width": header.width,
        "height": header.height,
        "file": name,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    _add_member(tar, f"{key}.{_extension(header)}", payload)
    _add_member(tar, f"{key}.txt", "\n".join(captions).encode())
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
