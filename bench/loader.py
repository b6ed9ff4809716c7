"""Images a second of the loader, next to those of other projects, on the same shards with the same crop.

    python -m textlock.bench.loader                                    # every loader that this machine can run
    python -m textlock.bench.loader --candidates ours_cpu webdataset_pil --sizes 256 > loaders.jsonl

Drawn images, a few of them cut short, are packed into shards in a temporary folder. Every loader makes batches of
random crops of 224 pixels, with as many threads or processes as `--workers`. Each is first compared with Pillow on
whole images; one that is wrong prints no figure. The floor is decoding alone: whole images from memory, by
libjpeg-turbo in as many threads, or on the GPU by DALI for what decodes there; no crop, no batch. One JSON line a
loader on stdout, a table on stderr; exit status 1 if ours is wrong or fails. Images a CPU-second count the time of all
processes: on a machine that does other work too they are the steadier figure.
"""

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from textlock.bench import entry
from textlock.bench.entry import (
    FLOOR,
    TIMING,
    Benchmark,
    Column,
    Line,
    Outcome,
    Session,
    device_of,
    require_known,
    require_positive,
)
from textlock.bench.measure import Spread, TimeUp, Unavailable, Wrong, importable
from textlock.bench.records import is_ours
from textlock.data.images import decode_image
from textlock.data.index import index_shards
from textlock.data.loader import DataConfig, Loader, open_loader
from textlock.models.vision import IMAGE_MEAN, IMAGE_STD

# Width and height of the images, by the short side that names them.
SIZES = {256: (320, 256), 512: (512, 384)}
CROP = 224
RATIO = (0.75, 1.3333333)
COMPARED = 64  # images of a batch that are compared with Pillow, at most
WINDOWS = 8  # of a measurement, whose spread is published
DALI_BATCH = 128
# Mean difference from Pillow's bicubic, in grey levels, that still counts as the same image: DALI's is 0.2.
TOLERANCE = 1.0


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(entry.Options):
    """Options of the command."""

    sizes: tuple[int, ...] = (256, 512)
    """Which images: 256 are 320 x 256 pixels, 512 are 512 x 384."""
    samples: int = 2000
    """Images in the shards."""
    bad: float = 0.01
    """Part of them that are cut short."""
    batch: int = 64
    """Images of a batch."""
    workers: int = os.cpu_count() or 1
    """Threads of our loader, processes of the others."""
    seconds: float = 10.0
    """Time spent on each figure."""


Result = TypeVar("Result")


@dataclass(frozen=True)
class Shards:
    """A folder of shards and the whole JPEGs in it, by key."""

    folder: Path
    jpegs: dict[str, bytes]

    @property
    def paths(self) -> list[str]:
        return sorted(map(str, self.folder.glob("*.tar")))


Batches = Iterator[tuple[Tensor, list[str]]]  # images and keys
Decoder = Literal["cpu", "dali"]


@dataclass(frozen=True)
class LoaderCandidate:
    """A loader: how it is opened with a scale of crops, and how its images become grey levels [b, S, S, 3]."""

    open: Callable[[Shards, LoaderOptions, tuple[float, float]], Batches]
    decodes_by: Decoder
    levels: Callable[[Tensor], Tensor] = lambda images: images.float()


def draw(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Return a JPEG about as large as a photo of its size: smooth colours and some noise."""
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, samples: int, width: int, height: int, bad: float) -> Shards:
    """Draw a hundred images and pack them repeatedly, evenly into eight shards."""
    rng = np.random.default_rng(0)
    drawn = [draw(rng, width, height) for _ in range(100)]
    jpegs = {}
    shards = max(1, min(8, samples // 100))
    spoilt = set(rng.choice(samples, round(bad * samples), replace=False).tolist())
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * samples // shards, (shard + 1) * samples // shards):
                key, jpeg = f"{number:09d}", drawn[number % len(drawn)]
                if number in spoilt:
                    jpeg = jpeg[: len(jpeg) // 2]
                else:
                    jpegs[key] = jpeg
                for name, content in ((f"{key}.jpg", jpeg), (f"{key}.txt", f"image {number}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    index_shards(folder)
    return Shards(folder, jpegs)


def config_of(shards: Shards, options: LoaderOptions, scale: tuple[float, float], decoder: Decoder) -> DataConfig:
    return DataConfig(
        shards=(str(shards.folder),),
        batch_size=options.batch,
        image_size=CROP,
        decoder=decoder,
        crop_scale=scale,
        crop_ratio=RATIO,
        workers=options.workers,
        max_skipped_fraction=1.0,
    )


def open_ours(config: DataConfig, options: LoaderOptions) -> Loader:
    """Open our loader; raises Unavailable without DALI."""
    try:
        return open_loader(config, rank=0, world_size=1, device=device_of(options.device))
    except ValueError as error:
        if "not installed" in str(error):
            raise Unavailable("DALI is not installed (pip install 'textlock[gpu]')") from error
        raise


def ours(shards: Shards, options: LoaderOptions, scale: tuple[float, float], *, decoder: Decoder) -> Batches:
    """Yield the batches of our loader."""
    with open_ours(config_of(shards, options, scale, decoder), options) as loader:
        for batch in loader:
            yield batch.images, batch.keys


def webdataset_loader(
    shards: Shards, options: LoaderOptions, decode: Callable[[bytes], Tensor], collate: Callable[[list[Any]], Any]
) -> Iterator[Any]:
    """Batches of what ``decode`` makes of each JPEG, in processes; what it raises on is left out without a word."""
    try:
        import webdataset
    except ImportError:
        raise Unavailable("webdataset is not installed (pip install webdataset)") from None
    dataset = (
        webdataset.WebDataset(shards.paths, shardshuffle=False, handler=webdataset.ignore_and_continue)
        .shuffle(1000)
        .repeat()
        .to_tuple("jpg", "__key__")
        .map_tuple(decode, lambda key: key, handler=webdataset.ignore_and_continue)
        .batched(options.batch, collation_fn=collate)
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=options.workers,
        worker_init_fn=lambda _: torch.set_num_threads(1),
        multiprocessing_context="fork",
    )
    return iter(loader)


def stacked(samples: list[Any]) -> tuple[Tensor, list[str]]:
    return torch.stack([image for image, _ in samples]), [key for _, key in samples]


def webdataset_pil(shards: Shards, options: LoaderOptions, scale: tuple[float, float]) -> Batches:
    """Decode with Pillow, crop and normalise with torchvision, as open_clip and contrastors train."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(CROP, scale, RATIO, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(IMAGE_MEAN, IMAGE_STD),
        ]
    )
    return webdataset_loader(
        shards, options, lambda payload: transform(Image.open(io.BytesIO(payload)).convert("RGB")), stacked
    )


def webdataset_torchvision(shards: Shards, options: LoaderOptions, scale: tuple[float, float]) -> Batches:
    """Take the fastest of torchvision on a CPU: libjpeg-turbo, and an antialiased resize of uint8."""
    from torchvision import io as images
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(CROP, scale, RATIO, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)

    def decode(payload: bytes) -> Tensor:
        encoded = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        return crop(images.decode_jpeg(encoded, images.ImageReadMode.RGB))

    return webdataset_loader(shards, options, decode, stacked)


def webdataset_nvjpeg(shards: Shards, options: LoaderOptions, scale: tuple[float, float]) -> Batches:
    """Read in processes; decode a batch at once with torchvision's nvJPEG, crop and resize on the GPU."""
    if not torch.cuda.is_available():
        raise Unavailable("torchvision's nvJPEG needs a GPU")
    from torchvision import io as images
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(CROP, scale, RATIO, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)

    def read(payload: bytes) -> Tensor:
        if b"\xff\xd9" not in payload[-64:]:  # one that is cut short would take its whole batch with it
            raise ValueError("cut short")
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8)

    for batch in webdataset_loader(shards, options, read, list):
        decoded = images.decode_jpeg([payload for payload, _ in batch], images.ImageReadMode.RGB, device="cuda")
        yield torch.stack([crop(image) for image in decoded]), [key for _, key in batch]


def levels_of_normalised(images: Tensor) -> Tensor:
    return ((images * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(IMAGE_MEAN).view(3, 1, 1)) * 255).permute(
        0, 2, 3, 1
    )


def levels_of_planes(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).float()


CANDIDATES: dict[str, LoaderCandidate] = {
    "ours_cpu": LoaderCandidate(partial(ours, decoder="cpu"), "cpu"),
    "ours_dali": LoaderCandidate(partial(ours, decoder="dali"), "dali"),
    "webdataset_pil": LoaderCandidate(webdataset_pil, "cpu", levels_of_normalised),
    "webdataset_torchvision": LoaderCandidate(webdataset_torchvision, "cpu", levels_of_planes),
    "webdataset_nvjpeg": LoaderCandidate(webdataset_nvjpeg, "dali", levels_of_planes),
}


def grey_levels_off(name: str, shards: Shards, options: LoaderOptions) -> float:
    """Return the usual difference from Pillow on whole images; raises Unavailable, or Wrong when it is too large."""
    few = replace(options, workers=1, batch=min(options.batch, COMPARED))
    batches = CANDIDATES[name].open(shards, few, (1.0, 1.0))
    differences = []
    for images, keys in islice(batches, 2):
        for image, key in zip(CANDIDATES[name].levels(images.cpu()), keys, strict=True):
            whole = Image.open(io.BytesIO(shards.jpegs[key])).resize((CROP, CROP), Image.Resampling.BICUBIC)
            differences.append((image - torch.from_numpy(np.array(whole)).float()).abs().mean())
    # Not the largest: a crop of the whole area may by chance be a pixel narrower than the image.
    difference = torch.stack(differences).median().item()
    if not difference <= TOLERANCE:
        raise Wrong(name, {"grey_levels": difference})
    return difference


def rates_of(name: str, shards: Shards, options: LoaderOptions) -> Outcome:
    """Return the rates of a loader, and its memory, over ``seconds`` after two batches that do not count."""
    device = device_of(options.device)
    batches = CANDIDATES[name].open(shards, options, (0.9, 1.0))
    for _ in range(2):
        next(batches)
    wait_for(device)
    used, taken = cpu_seconds(), 0
    spans: list[float] = []  # seconds of a batch, over a window each: single batches come in bursts
    for _ in range(WINDOWS):
        start, images = time.perf_counter(), 0
        while images == 0 or time.perf_counter() - start < options.seconds / WINDOWS:
            images += len(next(batches)[1])
        wait_for(device)
        spans.append((time.perf_counter() - start) / images * options.batch)
        taken += images
    spread = Spread.of(spans)
    return spread.published() | {
        "images_per_second": options.batch / spread.median,
        "images_per_cpu_second": taken / (cpu_seconds() - used),
        "host_bytes": host_bytes(),
        "device_bytes": device_bytes(device),
    }


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decoding_alone(decoder: Decoder, shards: Shards, options: LoaderOptions) -> float | None:
    """Return the images a second that are decoded, whole, from memory; None where nothing here decodes on the GPU."""
    gpu = on_gpu(decoder, options)
    if gpu and not importable("nvidia.dali"):
        return None
    jpegs, decoded = list(shards.jpegs.values()), 0
    decode = decode_on_gpu(options.workers) if gpu else decode_in_threads(options.workers)
    some = [jpegs[number % len(jpegs)] for number in range(DALI_BATCH)]
    decode(some)
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < options.seconds / 2:
        decode(some)
        decoded += len(some)
    return decoded / elapsed


def on_gpu(decoder: Decoder, options: LoaderOptions) -> bool:
    """Return whether a decoder runs on the GPU."""
    return decoder == "dali" and device_of(options.device).type == "cuda"


def decode_in_threads(workers: int) -> Callable[[list[bytes]], object]:
    """Return a function that decodes JPEGs as the cpu decoder does, in so many threads."""
    pool = ThreadPoolExecutor(workers)
    return lambda jpegs: list(pool.map(decode_image, jpegs))


def decode_on_gpu(workers: int) -> Callable[[list[bytes]], object]:
    """Return a function that decodes JPEGs with DALI on the GPU."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(DALI_BATCH, workers, device_id=torch.cuda.current_device())
    with pipeline:
        payloads = fn.external_source(name="payloads", dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(payloads, device="mixed", output_type=types.RGB))
    pipeline.build()

    def decode(jpegs: list[bytes]) -> None:
        pipeline.feed_input("payloads", [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs])
        pipeline.run()
        torch.cuda.synchronize()

    return decode


def device_bytes(device: torch.device) -> int | None:
    """Return the memory used on the GPU by any process: decoders allocate outside of torch."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def published(name: str, shards: Shards, options: LoaderOptions, floor: float | None) -> Outcome:
    """Return a loader's figures; its decoder alone reaches ``floor`` images a second, if that is known."""
    torch.set_num_threads(1)
    difference = grey_levels_off(name, shards, options)
    rates = rates_of(name, shards, options)
    if floor is not None:
        rates["floor_ms"] = 1e3 * options.batch / floor
        rates["percent_of_floor"] = 100 * rates["images_per_second"] / floor
    return {
        **rates,
        "skipped": skipped_share(name, shards, options),
        "errors": {"grey_levels": difference},
    }


def in_a_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run in a separate process: no loader inherits the threads or the memory of another."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["textlock.data.loader"])  # seconds of imports, once for all
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (TimeUp, KeyboardInterrupt):  # the pool would wait for its end
            for process in active_children():
                process.kill()
            raise


def family() -> list[Path]:
    """Return what /proc holds of this process and its children."""
    own = Path("/proc/self").resolve()
    children = " ".join(path.read_text() for path in own.glob("task/*/children")).split()
    return [own, *(Path("/proc") / child for child in children)]


def cpu_seconds() -> float:
    """Return the processor time of this process and its children."""
    ticks = 0
    for process in family():
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def host_bytes() -> int:
    """Return the memory of this process and its children; what they share is counted once."""
    lines = [line for process in family() for line in (process / "smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def skipped_share(name: str, shards: Shards, options: LoaderOptions) -> float | None:
    """Return the part of one epoch that our loader replaced; the others do not say."""
    if not is_ours(name):
        return None
    with open_ours(config_of(shards, options, (0.9, 1.0), CANDIDATES[name].decodes_by), options) as loader:
        for _ in range(loader.samples_per_epoch // options.batch):
            next(loader)
        return loader.skipped_by_kind.total() / loader.samples_per_epoch


def lines(options: LoaderOptions, session: Session) -> Iterator[Line]:
    """Measure every loader on images of every size."""
    names = [name for name in CANDIDATES if not options.candidates or name in options.candidates]
    for width, height in (SIZES[size] for size in options.sizes):
        with tempfile.TemporaryDirectory() as folder:
            shards = write_shards(Path(folder), options.samples, width, height, options.bad)
            kilobytes = sum(map(len, shards.jpegs.values())) / len(shards.jpegs) / 1000
            case = {"width": width, "height": height, "kilobytes": kilobytes, "batch": options.batch}
            case |= {"workers": options.workers}
            floor_of = cache(partial(floor_in_a_process, shards, options))

            def work(name: str, shards: Shards = shards, floor_of: Any = floor_of) -> Outcome:
                decoder = CANDIDATES[name].decodes_by
                floor = floor_of(decoder if on_gpu(decoder, options) else "cpu")
                return in_a_process(published, name, shards, options, floor)

            for name in names:
                shown = ("loader", f"{width} x {height}", f"{kilobytes:.0f}")
                yield Line("loader", "loader", case, name, session.outcome_of(partial(work, name)), shown)


def floor_in_a_process(shards: Shards, options: LoaderOptions, decoder: Decoder) -> float | None:
    """As `decoding_alone`, in a separate process."""
    return in_a_process(decoding_alone, decoder, shards, options)


def check(options: LoaderOptions) -> None:
    """Raise ValueError for what cannot be."""
    require_positive(options, "samples", "batch", "workers", "seconds", "limit")
    if not 0 <= options.bad < 1:
        raise ValueError(f"--bad is {options.bad:g}, must be at least 0 and below 1")
    require_known("candidates", options.candidates, CANDIDATES)
    require_known("sizes", options.sizes, SIZES)


BENCHMARK = Benchmark(
    about=__doc__,
    options=LoaderOptions,
    check=check,
    lines=lines,
    before=("operation", "pixels", "KB"),
    columns=(
        *(*TIMING, Column("images/s", "images_per_second", ",.0f"), FLOOR),
        Column("images/CPU-s", "images_per_cpu_second", ",.0f"),
        *(Column("host MiB", "host_bytes", ",.0f", 2**20), Column("GPU MiB", "device_bytes", ",.0f", 2**20)),
        *(
            Column("% skipped", "skipped", ".2f", 0.01),
            Column("levels off", lambda o: o["errors"]["grey_levels"], ".2f"),
        ),
    ),
    title=lambda options: f"batches of {options.batch} crops, {options.workers} workers",
)

if __name__ == "__main__":
    BENCHMARK.command()
