"""The loader: batches of decoded images and captions, in an order that survives restarts and other world sizes.

A global batch is a function of the sources (sets of shards with weights, sources.py), the seed and its position; rank r
of P makes the r-th contiguous part of it. Nothing passes between ranks, and the state of a run is one integer with a
fingerprint of what it depends on.

A sample is bad when it cannot be read, its image fails the check or the decoder, or its caption is missing or empty.
Its slot in the batch goes to the first good sample of ``SampleOrder.replacements``, with the crop drawn for the slot.
Each bad sample is counted by kind when its own slot comes up and written as one line of JSON to ``skipped_log``.

The threads hold no state: each task makes a few consecutive slots of a batch. Reading, JPEG decoding and resizing
release the interpreter lock. With DALI the same tasks read and check, and decode what is no JPEG; one more thread feeds
the decoder.

On a GPU that thread also brings the batches to the device, on a separate stream: when a batch is handed out, the next
one is copied (from pinned memory) or decoded while the step runs. So the device holds two batches; later ones wait on
the host.
"""

import json
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from ..settings import FREE_ON_RESUME, RISING, Settings, above, at_least, at_most
from .cache import DEFAULT_CACHE_DIR
from .captions import Fields, caption_draws
from .images import (
    BadSample,
    CropWindow,
    ImageHeader,
    check_image,
    crop_and_resize,
    crop_draws,
    crop_window,
    decode_image,
)
from .index import require_fields
from .order import EpochOrder, SampleOrder
from .sources import Sources, parse_folders, parse_sources
from .stored_text import COMMAND

if TYPE_CHECKING:
    from ..models.text import TextTowerDescription
    from .dali import DaliDecoder

# Every kind of bad sample, in the order in which ranks report their counts to each other; one that is not named here
# counts as the last.
SKIP_KINDS = (
    "empty",
    "too-large",
    "format",
    "header",
    "truncated",
    "unsupported",
    "too-many-pixels",
    "too-many-scans",
    "damaged",
    "no-caption",
    "unreadable",
    "moved",
    "no-embedding",
    "damaged-embedding",
    "other",
)

_SLOTS_PER_TASK = 16
# One bad sample among the first few is no reason to stop.
_MIN_SAMPLES_TO_JUDGE = 1000
# With one sample in a hundred bad, a run this long has probability 10^-128.
_MAX_REPLACEMENTS = 64
# Part of every state: a change of the order or of the crop must not go unnoticed by runs that resume.
_ORDER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings, section="data"):
    """The source, order and decoding of the batches."""

    shards: Annotated[tuple[str, ...], FREE_ON_RESUME]
    """Folder of tar shards with their index (python -m textlock.data.shards), or its URL (s3, gs, https, hf, ...).
    Several with weights: photos:2,s3://bucket/web:0.5 takes each sample of photos twice in every epoch and each of web
    in every second epoch."""
    image_fields: Annotated[tuple[str, ...] | None, FREE_ON_RESUME] = None
    """Fields of the image in a sample, the first that is there counts: jpg,jpeg,png,webp. None: as they were indexed;
    others than these are refused, with the command that indexes them."""
    caption_fields: Annotated[tuple[str, ...] | None, FREE_ON_RESUME] = None
    """Fields of the captions, the first that holds one counts: txt, or json:KEY. None: as they were indexed."""
    batch_size: Annotated[int, at_least(1)]
    """Global batch: samples a step over all GPUs."""
    image_size: Annotated[int, at_least(1)]
    """Height and width of the images, in pixels."""
    text_embeddings: Annotated[tuple[str, ...] | None, FREE_ON_RESUME] = None
    """Folder of stored text embeddings (python -m textlock.data.embeddings), one for each of several shards in the same
    order; None encodes captions in every step."""
    decoder: Literal["auto", "cpu", "dali"] = "auto"
    """Image decoder; auto takes dali on a GPU where it is installed, else cpu."""
    hw_decoder_load: Annotated[float, at_least(0), at_most(1)] = 0.65
    """Part of the baseline JPEGs that the GPU's JPEG engine decodes for dali; the rest goes to its CUDA cores."""
    crop_scale: Annotated[tuple[float, float], above(0), at_most(1), RISING] = (0.9, 1.0)
    """Part of the image's area that the random crop takes: smallest, largest."""
    crop_ratio: Annotated[tuple[float, float], above(0), RISING] = (0.75, 1.3333333)
    """Width over height of the random crop: smallest, largest."""
    workers: Annotated[int, at_least(1), FREE_ON_RESUME]
    """Decoding threads of each rank."""
    prefetch_batches: Annotated[int, at_least(0), FREE_ON_RESUME] = 2
    """Batches prepared ahead of the one in use."""
    open_shards: Annotated[int, at_least(1)] = 64
    """Shards shuffled together: more mix better, fewer read more sequentially."""
    seed: Annotated[int, at_least(0)] = 42
    """Seed of the order and of the crops."""
    max_skipped_fraction: Annotated[float, at_least(0), FREE_ON_RESUME] = 0.01
    """Part of the samples of a run that may be bad before it stops."""
    cache_dir: Annotated[str, FREE_ON_RESUME] = DEFAULT_CACHE_DIR
    """Folder on the local disk for copies of remote shards, which all processes of a node share."""
    cache_gb: Annotated[float, at_least(0), FREE_ON_RESUME] = 100.0
    """Cache size in GB (10^9 bytes); must hold at least 2 x open_shards shards. The index is not counted."""
    fetchers: Annotated[int, at_least(1), FREE_ON_RESUME] = 4
    """Remote shards that each rank fetches at a time."""

    def __post_init__(self) -> None:
        """Also refuse sources that are not written as such, and fields that no member of a shard has."""
        super().__post_init__()
        sets = len(parse_sources(self.shards))
        if self.text_embeddings is not None and (folders := len(parse_folders(self.text_embeddings))) != sets:
            raise ValueError(
                f"--data.text-embeddings names {folders} folders and --data.shards {sets} sets of shards: name one for "
                "each, in the same order"
            )
        Fields().named(self.image_fields, self.caption_fields)

    def local_batch(self, world_size: int) -> int:
        """Return the samples of one rank in a step. Raises ValueError where the ranks do not divide the batch."""
        if self.batch_size % world_size:
            self.refuse("batch_size", f"be divisible by the number of processes, {world_size}")
        return self.batch_size // world_size


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: b samples."""

    images: torch.Tensor
    """uint8 [b, S, S, 3], on the device of the loader, as the other tensors are."""
    captions: list[str]
    """One of each image, drawn by seed, epoch and position where it has several."""
    text_embeddings: torch.Tensor | None
    """Stored embeddings of the captions, float16 [b, d], where the config names a folder of them. `Feed` fills in unit
    embeddings, float32 [b, d], of all captions."""
    ids: torch.Tensor
    """int64 [b], ``captions.caption_id`` of each caption."""
    keys: list[str]
    epoch: int
    position: int
    """Global samples consumed, this batch included."""
    skipped_by_kind: dict[str, int]
    """Bad samples replaced (training) or left out (evaluation) here."""

    @property
    def skipped(self) -> int:
        """Bad samples of all kinds."""
        return sum(self.skipped_by_kind.values())

    @property
    def text(self) -> torch.Tensor:
        """The text embeddings of a batch that has them: a stored or an encoded one."""
        assert self.text_embeddings is not None
        return self.text_embeddings


@dataclass(frozen=True)
class _Skipped:
    """A bad sample, as it is logged."""

    epoch: int
    position: int
    shard: str
    sample: int
    key: str
    kind: str
    message: str
    replaced_by: str


@dataclass(frozen=True)
class _Slot:
    """One sample of a batch, before or after decoding."""

    key: str
    caption: str
    caption_id: int
    text: npt.NDArray[np.float16] | None
    payload: bytes  # empty once decoded: kept, a batch of them would cost fresh memory for every image
    pixels: torch.Tensor | None  # [S, S, 3] where they are not in the batch yet and need no payload
    window: CropWindow
    skipped: _Skipped | None


@dataclass(frozen=True)
class _Plan:
    """One rank's part of one global batch: the slots at ``places`` of the epoch's order."""

    order: EpochOrder
    epoch: int
    places: npt.NDArray[np.int64]  # [b]
    samples: npt.NDArray[np.int64]  # [b] their sample numbers
    draws: npt.NDArray[np.float64]  # [b, tries, 4] the random numbers of their crops
    choices: npt.NDArray[np.float64]  # [b] those of their captions, where an image has several
    end: int  # global position after the whole batch

    def part(self, part: slice) -> "_Plan":
        """Return the plan of some consecutive slots."""
        return replace(
            self,
            places=self.places[part],
            samples=self.samples[part],
            draws=self.draws[part],
            choices=self.choices[part],
        )


# A batch that waits to be handed out, its bad samples, and what the device has to reach before it is used.
_Prepared = tuple[Batch, list[_Skipped], torch.cuda.Event | None]

# Decodes a payload and writes the resized window somewhere; raises BadSample.
_Decode = Callable[[ImageHeader, bytes, CropWindow], None]

_open_loaders: "weakref.WeakSet[Loader]" = weakref.WeakSet()


def _stop_open_loaders() -> None:
    for loader in list(_open_loaders):
        loader._closed.set()
        loader.sources.close()


# At exit the interpreter first has the executors finish all queued tasks, and only then calls what atexit holds: a run
# that failed would decode its whole prefetch queue before it ends. These hooks run in reverse, so this one comes first.
threading._register_atexit(_stop_open_loaders)  # type: ignore[attr-defined]


class Loader:
    """Endless iterator of batches. Made by ``open_loader``; ``close`` it, or use it in a ``with`` statement."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sources,
        order: SampleOrder,
        *,
        rank: int,
        local_batch: int,
        position: int,
        skipped_log: Path | None,
        device: torch.device,
        dali: "DaliDecoder | None",
    ) -> None:
        self.sources = sources
        self.samples_per_epoch = order.samples_per_epoch
        self.skipped_by_kind: Counter[str] = Counter()
        self._config = config
        self._order = order
        self._part = slice(rank * local_batch, (rank + 1) * local_batch)
        self._position = position
        self._planned = position
        self._expected: tuple[tuple[int, int], tuple[int, int]] | None = None
        self._handed_out = 0
        self._skipped_log = skipped_log
        self._is_only_loader = local_batch == config.batch_size
        self._device = device
        self._dali = dali
        self._closed = threading.Event()
        self._workers = ThreadPoolExecutor(config.workers, thread_name_prefix="decode")
        self._feeder = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        copies = self._stream is not None and dali is None
        self._slots_per_task = _slots_of_a_pinned_piece(config.image_size) if copies else _SLOTS_PER_TASK
        self._room_for_next = threading.Semaphore(1)
        self._pending: deque[Callable[[], _Prepared]] = deque()
        _open_loaders.add(self)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            ValueError: too many samples are bad, or the loader is closed.
        """
        if self._closed.is_set():
            raise ValueError("the loader is closed: open another one from its state")
        try:
            while len(self._pending) <= self._config.prefetch_batches:
                plan = self._next_plan()
                self._expect_shards()
                self._pending.append(self._start(plan))
            batch, faults, ready = self._pending.popleft()()
            self._account(batch, faults)
        except BaseException:
            self.close()
            raise
        if ready is not None:
            _hand_to_current_stream(batch, ready, self._device)
        self._position = batch.position
        self._room_for_next.release()
        return batch

    def state(self) -> dict[str, Any]:
        """Return the state after the batches handed out, for ``open_loader``: JSON-able, the same on every rank."""
        fingerprint = _fingerprint(self._config, self.sources)
        return {"position": self._position, "fingerprint": fingerprint, "sources": self.sources.addresses}

    def close(self) -> None:
        """Stop the threads. Batches in preparation are dropped."""
        self._closed.set()
        self.sources.close()  # a thread that waits to fetch a shard again would keep the others waiting
        self._pending.clear()
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._feeder.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _expect_shards(self) -> None:
        """Have remote shards fetched ahead: from the next batch to the group after the planned ones."""
        groups = self._order.group_of(self._position), self._order.group_of(self._planned)
        if self.sources.is_remote and groups != self._expected:
            self._expected = groups
            self.sources.expect(self._order.shards_from(*groups))

    def _next_plan(self) -> _Plan:
        epoch, place = self._order.locate(self._planned)
        self._planned += self._config.batch_size
        places = np.arange(place + self._part.start, place + self._part.stop)
        order = self._order.epoch(epoch)
        draws = crop_draws(self._config.seed, epoch, places)
        choices = caption_draws(self._config.seed, epoch, places)
        return _Plan(order, epoch, places, order.samples(places), draws, choices, self._planned)

    def _start(self, plan: _Plan) -> Callable[[], _Prepared]:
        """Hand the work of a batch to the threads; the result waits for the batch."""
        count, size = len(plan.places), self._config.image_size
        parts = [slice(start, start + self._slots_per_task) for start in range(0, count, self._slots_per_task)]
        if self._dali is not None:
            tasks = [self._workers.submit(self._load, plan.part(part), None) for part in parts]
            return self._feeder.submit(self._feed, plan, tasks, []).result
        if self._stream is not None:
            pinned = [
                torch.empty(len(plan.places[part]), size, size, 3, dtype=torch.uint8, pin_memory=True) for part in parts
            ]
            tasks = [
                self._workers.submit(self._load, plan.part(part), piece)
                for part, piece in zip(parts, pinned, strict=True)
            ]
            return self._feeder.submit(self._feed, plan, tasks, pinned).result
        images = torch.empty(count, size, size, 3, dtype=torch.uint8)
        tasks = [self._workers.submit(self._load, plan.part(part), images[part]) for part in parts]
        return lambda: self._assemble(plan, images, _slots_of(tasks))

    def _feed(self, plan: _Plan, tasks: Sequence[Future[list[_Slot]]], pinned: Sequence[torch.Tensor]) -> _Prepared:
        """Decode with DALI what the tasks have read, or copy to the device what they have decoded into ``pinned``."""
        slots = _slots_of(tasks)
        while not self._room_for_next.acquire(timeout=0.1):
            if self._closed.is_set():
                raise RuntimeError("the loader was closed")
        count, size = len(slots), self._config.image_size
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            images = torch.empty(count, size, size, 3, dtype=torch.uint8, device=self._device)
            if self._dali is not None:
                for row, slot in enumerate(slots):
                    if slot.pixels is not None:
                        images[row] = slot.pixels.to(self._device)
                rows = [row for row, slot in enumerate(slots) if slot.pixels is None]
                for first in range(0, len(rows), self._dali.batch):
                    self._decode_with_dali(self._dali, plan, slots, images, rows[first : first + self._dali.batch])
            for piece, part in zip(pinned, images.split(self._slots_per_task), strict=False):
                part.copy_(piece, non_blocking=True)
            return self._assemble(plan, images, slots)

    def _assemble(self, plan: _Plan, images: torch.Tensor, slots: Sequence[_Slot]) -> _Prepared:
        """Make the batch of some slots, on the device; on a GPU inside the stream of the loader."""
        faults = [slot.skipped for slot in slots if slot.skipped is not None]
        text = None
        if self._config.text_embeddings is not None:
            text = torch.from_numpy(np.stack([slot.text for slot in slots if slot.text is not None]))
        ids = torch.tensor([slot.caption_id for slot in slots], dtype=torch.int64)
        ready = None
        if self._stream is not None:
            ids = ids.pin_memory().to(self._device, non_blocking=True)
            text = None if text is None else text.pin_memory().to(self._device, non_blocking=True)
            ready = self._stream.record_event()
        batch = Batch(
            images=images,
            captions=[slot.caption for slot in slots],
            text_embeddings=text,
            ids=ids,
            keys=[slot.key for slot in slots],
            epoch=plan.epoch,
            position=plan.end,
            skipped_by_kind=dict(Counter(fault.kind for fault in faults)),
        )
        return batch, faults, ready

    def _load(self, plan: _Plan, images: torch.Tensor | None) -> list[_Slot]:
        """Make the slots of a plan; decode them into ``images`` [n, S, S, 3] unless that is None."""
        slots = []
        for number in range(len(plan.places)):
            if self._closed.is_set():
                raise RuntimeError("the loader was closed")
            decode = None if images is None else partial(_decode_on_cpu, images[number])
            slots.append(self._fill(plan, number, decode))
        return slots

    def _fill(self, plan: _Plan, number: int, decode: _Decode | None) -> _Slot:
        """Fill one slot with its sample or, when that is bad, with the first good replacement."""
        place, sample = int(plan.places[number]), int(plan.samples[number])
        draws, choice = plan.draws[number], float(plan.choices[number])
        try:
            return self._use(sample, draws, choice, decode)
        except BadSample as fault:
            first_fault = fault
        replacements = self._order.replacements(plan.epoch, place)
        for _ in range(_MAX_REPLACEMENTS):
            candidate = int(plan.order.samples(np.array([next(replacements)]))[0])
            try:
                slot = self._use(candidate, draws, choice, decode)
            except BadSample:
                continue
            skipped = _Skipped(
                epoch=plan.epoch,
                position=plan.epoch * self.samples_per_epoch + place,
                shard=self.sources.shard_name(sample),
                sample=self.sources.locate(sample)[1],
                key=first_fault.key,
                kind=first_fault.kind,
                message=str(first_fault),
                replaced_by=slot.key,
            )
            return replace(slot, skipped=skipped)
        raise ValueError(
            f"{_MAX_REPLACEMENTS + 1} samples in a row are bad, the first because {first_fault} ({first_fault.kind}): "
            f"run {_command_for(first_fault.kind, self.sources.locate(sample)[0].address)}"
        )

    def _use(self, sample: int, draws: npt.NDArray[np.float64], choice: float, decode: _Decode | None) -> _Slot:
        """Read and check a sample, and decode it unless ``decode`` is None. Raises BadSample."""
        raw = self.sources.read(sample)
        config = self._config
        try:
            which, caption = raw.caption(choice)
            identity = raw.ids[which]
            text = self.sources.text_embedding(sample, which, identity)
            header = check_image(raw.image)
            window = crop_window(header.height, header.width, draws, scale=config.crop_scale, ratio=config.crop_ratio)
            pixels, payload = None, b""
            if decode is not None:
                decode(header, raw.image, window)
            elif header.is_plain_jpeg:
                payload = raw.image
            else:
                pixels = torch.empty(config.image_size, config.image_size, 3, dtype=torch.uint8)
                _decode_on_cpu(pixels, header, raw.image, window)
        except BadSample as fault:
            fault.key = raw.key
            raise
        return _Slot(raw.key, caption, identity, text, payload, pixels, window, None)

    def _decode_with_dali(
        self, dali: "DaliDecoder", plan: _Plan, slots: list[_Slot], images: torch.Tensor, rows: list[int]
    ) -> None:
        """Decode the payloads of some slots into their rows of ``images`` [n, S, S, 3]; replace those of bad samples.

        The check lets some images through that do not decode, and DALI drops the whole batch of one. Halves are tried
        until the bad ones are alone. All other pixels stay DALI's, so that a sample looks the same next to any other.
        """
        try:
            payloads, windows = [slots[row].payload for row in rows], [slots[row].window for row in rows]
            dali.decode(payloads, windows, images, rows, are_plain=True)
        except RuntimeError:
            if len(rows) == 1:
                slots[rows[0]] = self._fill(plan, rows[0], partial(_decode_one_with_dali, dali, images, rows[0]))
            else:
                half = len(rows) // 2
                self._decode_with_dali(dali, plan, slots, images, rows[:half])
                self._decode_with_dali(dali, plan, slots, images, rows[half:])

    def _account(self, batch: Batch, faults: list[_Skipped]) -> None:
        """Log the bad samples of a batch that is handed out. Raises ValueError when there have been too many."""
        self._handed_out += len(batch.keys)
        self.skipped_by_kind.update(batch.skipped_by_kind)
        if faults and self._skipped_log is not None:
            with open(self._skipped_log, "a", encoding="utf-8") as log:
                log.writelines(json.dumps(asdict(fault)) + "\n" for fault in faults)
        if self._is_only_loader:
            require_few_skipped(self.skipped_by_kind, self._handed_out, self._config)


def require_few_skipped(skipped_by_kind: Mapping[str, int], samples: int, config: DataConfig) -> None:
    """Raise ValueError when more of ``samples`` were bad than the config allows.

    A loader checks this when it is the only one. Loaders that share global batches do not, because one that stopped
    alone would leave the others waiting: the caller checks the total.
    """
    skipped, limit = sum(skipped_by_kind.values()), config.max_skipped_fraction
    if samples >= _MIN_SAMPLES_TO_JUDGE and skipped > limit * samples:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(skipped_by_kind).most_common())
        worst = max(skipped_by_kind, key=lambda kind: skipped_by_kind[kind])
        commands = [_command_for(worst, source.address) for source in parse_sources(config.shards)]
        raise ValueError(
            f"{skipped} of {samples} samples are bad ({kinds}), more than --data.max-skipped-fraction {limit}: run "
            f"{' and '.join(commands)}, or raise it"
        )


def _command_for(kind: str, address: str) -> str:
    """Return the command that shows the bad samples of a kind, or mends them."""
    if kind in ("no-embedding", "damaged-embedding"):
        return f"{COMMAND} {address} again"
    return f"python -m textlock.data.shards verify {address}"


def _slots_of_a_pinned_piece(image_size: int) -> int:
    """Return how many images come next to a power of two of bytes: torch rounds pinned memory up to one."""
    image = 3 * image_size**2
    return (1 << (_SLOTS_PER_TASK * image - 1).bit_length()) // image


def _slots_of(tasks: Sequence[Future[list[_Slot]]]) -> list[_Slot]:
    return [slot for task in tasks for slot in task.result()]


def _decode_on_cpu(out: torch.Tensor, header: ImageHeader, payload: bytes, window: CropWindow) -> None:
    crop_and_resize(decode_image(payload, header), window, out)


def _decode_one_with_dali(
    dali: "DaliDecoder", images: torch.Tensor, row: int, header: ImageHeader, payload: bytes, window: CropWindow
) -> None:
    if header.is_plain_jpeg:
        try:
            dali.decode([payload], [window], images, [row], are_plain=True)
            return
        except RuntimeError:  # what DALI cannot read may still be a good image
            pass
    image = torch.empty(images.shape[1:], dtype=torch.uint8)
    _decode_on_cpu(image, header, payload, window)
    images[row] = image


def _hand_to_current_stream(batch: Batch, ready: torch.cuda.Event, device: torch.device) -> None:
    """Make the current stream wait for a batch, and keep the batch's memory until that stream is done with it."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(ready)
    for tensor in (batch.images, batch.text_embeddings, batch.ids):
        if tensor is not None:
            tensor.record_stream(stream)


def open_loader(
    config: DataConfig,
    *,
    rank: int,
    world_size: int,
    state: dict[str, Any] | None = None,
    skipped_log: Path | None = None,
    device: torch.device | str | None = None,
    text_tower: "TextTowerDescription | None" = None,
) -> Loader:
    """Open the training batches of one rank: global slots [rank * b / P, (rank + 1) * b / P) of every global batch.

    ``state`` is that of an earlier loader, of any world size: the batches go on after the last one it handed out.
    ``device`` is where training runs and where the batches are put. ``text_tower`` is the tower that stored text
    embeddings must be those of.

    Raises:
        FileNotFoundError: there are no shards, no index, or no stored text embeddings of a shard.
        ValueError: the ranks do not divide the batch, the decoder is not installed, the cache is too small, the index
            is stale, the state belongs to other data or other settings, or the stored text embeddings to another tower.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks: ranks count from 0")
    local_batch = config.local_batch(world_size)
    device = torch.device(device or "cpu")
    if device.type == "cuda" and device.index is None:  # the current device differs between threads
        device = torch.device("cuda", torch.cuda.current_device())
    if config.text_embeddings is not None and text_tower is None:
        raise ValueError("--data.text-embeddings is set, but open_loader was not told of which text tower they must be")
    sources = Sources(
        parse_sources(config.shards),
        cache_dir=config.cache_dir,
        cache_gb=config.cache_gb,
        fetchers=config.fetchers,
        text_embeddings=None if config.text_embeddings is None else parse_folders(config.text_embeddings),
        text_tower=text_tower,
    )
    for source in sources.opened:
        require_fields(source.index, config.image_fields, config.caption_fields)
    _check_cache(config, sources)
    order = SampleOrder(sources.shares, batch_size=config.batch_size, open_shards=config.open_shards, seed=config.seed)
    position = 0 if state is None else _check_state(state, config, sources)
    dali = _open_dali(config, device)
    return Loader(
        config,
        sources,
        order,
        rank=rank,
        local_batch=local_batch,
        position=position,
        skipped_log=skipped_log,
        device=device,
        dali=dali,
    )


def _check_cache(config: DataConfig, sources: Sources) -> None:
    """Refuse a cache too small for the shards that are read at a time: it would fetch them again and again."""
    counts: list[int] = []
    for source in sources.opened:
        smallest = sorted(source.index.samples_per_shard)[: config.open_shards]
        counts += smallest * min(ceil(source.weight), config.open_shards)
    group = sum(sorted(counts)[: config.open_shards])
    # The batches in preparation may reach across the end of a group.
    groups = 1 - (-config.batch_size * (config.prefetch_batches + 1) // group)
    remote = [size for source in sources.opened if source.index.remote for size in source.index.shard_sizes]
    least = sum(sorted(remote, reverse=True)[: groups * config.open_shards])
    if round(config.cache_gb * 1e9) < least:
        raise ValueError(
            f"--data.cache-gb is {config.cache_gb:g}, must be at least {least / 1e9:.3g}: so much have the shards of "
            f"{' '.join(config.shards)} that are read at a time, {groups} times --data.open-shards {config.open_shards}"
        )


def _fingerprint(config: DataConfig, sources: Sources) -> dict[str, Any]:
    """Return everything that decides which pixels and captions come at a position, by name."""
    return {
        "shards": sources.fingerprint,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "open_shards": config.open_shards,
        "image_size": config.image_size,
        "crop_scale": list(config.crop_scale),
        "crop_ratio": list(config.crop_ratio),
        "order_version": _ORDER_VERSION,
    }


def _check_state(state: dict[str, Any], config: DataConfig, sources: Sources) -> int:
    position, then = state.get("position"), state.get("fingerprint")
    if not isinstance(position, int) or position < 0 or not isinstance(then, dict):
        raise ValueError("the loader state has no position and fingerprint: it is not one that a loader has saved")
    now = _fingerprint(config, sources)
    changed = sources.changes_since(then.get("shards"), state.get("sources"))
    changed += [
        f"{name} was {then.get(name)} and is {value}"
        for name, value in now.items()
        if name != "shards" and then.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"the data is not what the state was saved with: {'; '.join(changed)}: restore it, or start a new run"
        )
    if position % config.batch_size:
        raise ValueError(f"the loader state's position {position} is not a multiple of batch_size {config.batch_size}")
    return position


def require_decoder(config: DataConfig) -> None:
    """Raise ValueError where the decoder that the config names is not installed."""
    if config.decoder == "dali":
        _import_dali()


def _import_dali() -> "type[DaliDecoder]":
    try:
        # DALI takes seconds to import and is not installed everywhere.
        from .dali import DaliDecoder
    except ImportError as error:
        raise ValueError(
            '--data.decoder dali needs DALI, which is not installed: pip install "textlock[gpu]", or take '
            "--data.decoder cpu"
        ) from error
    return DaliDecoder


def _open_dali(config: DataConfig, device: torch.device) -> "DaliDecoder | None":
    if config.decoder == "cpu" or (config.decoder == "auto" and device.type != "cuda"):
        return None
    try:
        decoder = _import_dali()
    except ValueError:
        if config.decoder == "auto":
            return None
        raise
    return decoder(
        config.image_size,
        threads=config.workers,
        device_id=device.index if device.type == "cuda" else None,
        hw_decoder_load=config.hw_decoder_load,
    )
