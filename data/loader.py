"""The data engine: batches of decoded images and captions, in an order that survives restarts and other world sizes.

A global batch is a function of the shards, the seed and its position; rank r of P makes the r-th contiguous part of it.
Nothing passes between ranks, and the state of a run is one integer with a fingerprint of what it depends on.

A sample is bad when it cannot be read, its image fails the check or the decoder, or its caption is missing or empty.
Its slot in the batch goes to the first good sample of ``SampleOrder.replacements``, with the crop drawn for the slot.
Each bad sample is counted by kind when its own slot comes up and written as one line of JSON to ``skipped_log``.

The threads hold no state: each task makes a few consecutive slots of a batch. Reading, JPEG decoding and resizing
release the interpreter lock. With DALI the same tasks read and check, and one more thread feeds the decoder.
"""

import json
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from .captions import decode_caption
from .images import (
    BadSample,
    CropWindow,
    check_image,
    crop_and_resize,
    crop_draws,
    crop_window,
    decode_image,
)
from .order import EpochOrder, SampleOrder
from .shards import DEFAULT_CACHE_DIR, ShardIndex, ShardReader, open_index

if TYPE_CHECKING:
    from .dali import DaliDecoder


_SLOTS_PER_TASK = 16
# One bad sample among the first few is no reason to stop.
_MIN_SAMPLES_TO_JUDGE = 1000
# With one sample in a hundred bad, a run this long has probability 10^-128.
_MAX_REPLACEMENTS = 64
# Part of every state: a change of the order or of the crop must not go unnoticed by runs that resume.
_ORDER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the batches are made of."""

    shards: str
    """Folder of tar shards with their index (python -m textlock.data.shards), or its URL (s3, gs, https, hf, ...)."""
    batch_size: int
    """Global batch: samples a step over all GPUs."""
    image_size: int
    """Height and width of the images, in pixels."""
    decoder: Literal["auto", "cpu", "dali"] = "auto"
    """Image decoder; auto takes dali on a GPU where it is installed, else cpu."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Part of the image's area that the random crop takes: smallest, largest."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333)
    """Width over height of the random crop: smallest, largest."""
    workers: int
    """Decoding threads of each rank."""
    prefetch_batches: int = 2
    """Batches prepared ahead of the one in use."""
    open_shards: int = 64
    """Shards shuffled together: more mix better, fewer read more sequentially."""
    seed: int = 42
    """Seed of the order and of the crops."""
    max_skipped_fraction: float = 0.01
    """Part of the samples that may be bad before the run stops."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Folder on the local disk for copies of remote shards, which all processes of a node share."""
    cache_gb: float = 100.0
    """Room for them there, in 10^9 bytes: for twice open_shards shards or more. The index comes on top."""
    fetchers: int = 4
    """Remote shards that each rank fetches at a time."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: b samples."""

    images: torch.Tensor
    """uint8 [b, S, S, 3]: on the GPU from the dali decoder, else on the CPU (pinned when the device is a GPU)."""
    captions: list[str]
    text_embeddings: torch.Tensor | None
    """Stored text embeddings [b, d], where the shards have them."""
    ids: torch.Tensor
    """int64 [b], ``captions.caption_id`` of each caption."""
    keys: list[str]
    epoch: int
    position: int
    """Global samples consumed, this batch included."""
    skipped: int
    """Bad samples replaced (training) or left out (evaluation) here."""


@dataclass(frozen=True)
class _Skipped:
    """A bad sample, as it is logged."""

    epoch: int
    position: int
    shard: str
    sample: int
    kind: str
    message: str
    replaced_by: str


@dataclass(frozen=True)
class _Slot:
    """One sample of a batch, before or after decoding."""

    key: str
    caption: str
    caption_id: int
    payload: bytes  # empty once decoded: kept, a batch of them would cost fresh memory for every image
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
    end: int  # global position after the whole batch

    def part(self, part: slice) -> "_Plan":
        """Return the plan of some consecutive slots."""
        return replace(self, places=self.places[part], samples=self.samples[part], draws=self.draws[part])


_open_loaders: "weakref.WeakSet[Loader]" = weakref.WeakSet()


def _stop_open_loaders() -> None:
    for loader in list(_open_loaders):
        loader._closed.set()
        loader._reader.close()


# At exit the interpreter first has the executors finish all queued tasks, and only then calls what atexit holds: a run
# that failed would decode its whole prefetch queue before it ends. These hooks run in reverse, so this one comes first.
threading._register_atexit(_stop_open_loaders)  # type: ignore[attr-defined]


class Loader:
    """Endless iterator of batches. Made by ``open_loader``; ``close`` it, or use it in a ``with`` statement."""

    def __init__(
        self,
        config: DataConfig,
        index: ShardIndex,
        order: SampleOrder,
        *,
        rank: int,
        world_size: int,
        position: int,
        skipped_log: Path | None,
        device: torch.device,
        dali: "DaliDecoder | None",
    ) -> None:
        self.num_samples = order.num_samples
        self.samples_per_epoch = order.samples_per_epoch
        self.skipped_by_kind: Counter[str] = Counter()
        self._config = config
        self._index = index
        self._order = order
        self._reader = ShardReader(index)
        self._part = slice(rank * config.batch_size // world_size, (rank + 1) * config.batch_size // world_size)
        self._position = position
        self._planned = position
        self._expected: tuple[tuple[int, int], tuple[int, int]] | None = None
        self._handed_out = 0
        self._skipped_log = skipped_log
        self._device = device
        self._dali = dali
        self._closed = threading.Event()
        self._workers = ThreadPoolExecutor(config.workers, thread_name_prefix="decode")
        self._feeder = ThreadPoolExecutor(1, thread_name_prefix="dali")
        self._pending: deque[Callable[[], tuple[Batch, list[_Skipped]]]] = deque()
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
            batch, faults = self._pending.popleft()()
            self._account(batch, faults)
        except BaseException:
            self.close()
            raise
        self._position = batch.position
        return batch

    def state(self) -> dict[str, Any]:
        """Return the state after the batches handed out, for ``open_loader``: JSON-able, the same on every rank."""
        return {"position": self._position, "fingerprint": _fingerprint(self._config, self._index)}

    def close(self) -> None:
        """Stop the threads. Batches in preparation are dropped."""
        self._closed.set()
        self._reader.close()  # a thread that waits to fetch a shard again would keep the others waiting
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
        """Have remote shards fetched ahead: those from the batch handed out next to the group behind the planned."""
        groups = self._order.group_of(self._position), self._order.group_of(self._planned)
        if self._index.remote is not None and groups != self._expected:
            self._expected = groups
            self._reader.expect(self._order.shards_from(*groups))

    def _next_plan(self) -> _Plan:
        epoch, place = self._order.locate(self._planned)
        self._planned += self._config.batch_size
        places = np.arange(place + self._part.start, place + self._part.stop)
        order = self._order.epoch(epoch)
        draws = crop_draws(self._config.seed, epoch, places)
        return _Plan(order, epoch, places, order.samples(places), draws, self._planned)

    def _start(self, plan: _Plan) -> Callable[[], tuple[Batch, list[_Skipped]]]:
        """Hand the work of a batch to the threads; the result waits for the batch."""
        count, size = len(plan.places), self._config.image_size
        pin = self._device.type == "cuda"
        images = torch.empty(count, size, size, 3, dtype=torch.uint8, pin_memory=pin) if self._dali is None else None
        parts = [slice(start, start + _SLOTS_PER_TASK) for start in range(0, count, _SLOTS_PER_TASK)]
        tasks = [
            self._workers.submit(self._load, plan.part(part), None if images is None else images[part])
            for part in parts
        ]
        if images is None:
            return self._feeder.submit(self._decode_with_dali, plan, tasks).result
        return lambda: _assemble(plan, images, [slot for task in tasks for slot in task.result()])

    def _load(self, plan: _Plan, images: torch.Tensor | None) -> list[_Slot]:
        """Make the slots of a plan; decode them into ``images`` [n, S, S, 3] unless that is None."""
        slots = []
        for number, (place, sample) in enumerate(zip(plan.places.tolist(), plan.samples.tolist(), strict=True)):
            if self._closed.is_set():
                raise RuntimeError("the loader was closed")
            out = None if images is None else images[number]
            slots.append(self._fill(plan, place, sample, plan.draws[number], out))
        return slots

    def _fill(
        self,
        plan: _Plan,
        place: int,
        sample: int,
        draws: npt.NDArray[np.float64],
        out: torch.Tensor | None,
    ) -> _Slot:
        """Fill one slot with its sample or, when that is bad, with the first good replacement."""
        try:
            return self._use(sample, draws, out)
        except BadSample as fault:
            first_fault = fault
        replacements = self._order.replacements(place)
        for _ in range(_MAX_REPLACEMENTS):
            candidate = int(plan.order.samples(np.array([next(replacements)]))[0])
            try:
                slot = self._use(candidate, draws, out)
            except BadSample:
                continue
            position = plan.epoch * self.samples_per_epoch + place
            shard = self._index.shard_names[self._index.shard_of(sample)]
            skipped = _Skipped(plan.epoch, position, shard, sample, first_fault.kind, str(first_fault), slot.key)
            return replace(slot, skipped=skipped)
        raise ValueError(
            f"{_MAX_REPLACEMENTS + 1} samples in a row are bad, the first because {first_fault} ({first_fault.kind}): "
            f"run python -m textlock.data.shards verify {self._config.shards}"
        )

    def _use(self, sample: int, draws: npt.NDArray[np.float64], out: torch.Tensor | None) -> _Slot:
        """Read and check a sample, and decode it into ``out`` [S, S, 3] unless that is None. Raises BadSample."""
        raw = self._reader.read(sample)
        caption = decode_caption(raw.caption)
        if not caption:
            raise BadSample("no-caption", "the caption is missing or empty")
        header = check_image(raw.image)
        config = self._config
        window = crop_window(header.height, header.width, draws, scale=config.crop_scale, ratio=config.crop_ratio)
        if out is None:
            return _Slot(raw.key, caption, raw.caption_id, raw.image, window, None)
        crop_and_resize(decode_image(raw.image), window, out)
        return _Slot(raw.key, caption, raw.caption_id, b"", window, None)

    def _decode_with_dali(self, plan: _Plan, tasks: Sequence[Future[list[_Slot]]]) -> tuple[Batch, list[_Skipped]]:
        from .dali import DALI_BATCH

        assert self._dali is not None
        slots = [slot for task in tasks for slot in task.result()]
        images = []
        for start in range(0, len(slots), DALI_BATCH):
            part = slots[start : start + DALI_BATCH]
            try:
                decoded = self._dali.decode([slot.payload for slot in part], [slot.window for slot in part])
            except RuntimeError:
                # The check let an image through that does not decode, and DALI drops its whole batch. Decoded one by
                # one the good ones stay and the bad one is replaced.
                size = self._config.image_size
                decoded = torch.empty(len(part), size, size, 3, dtype=torch.uint8)
                within = slice(start, start + DALI_BATCH)
                slots[within] = self._load(plan.part(within), decoded)
            images.append(decoded.to(self._device))
        return _assemble(plan, torch.cat(images), slots)

    def _account(self, batch: Batch, faults: list[_Skipped]) -> None:
        """Log the bad samples of a batch that is handed out. Raises ValueError when there have been too many."""
        self._handed_out += len(batch.keys)
        self.skipped_by_kind.update(fault.kind for fault in faults)
        if faults and self._skipped_log is not None:
            with open(self._skipped_log, "a", encoding="utf-8") as log:
                log.writelines(json.dumps(asdict(fault)) + "\n" for fault in faults)
        skipped = self.skipped_by_kind.total()
        limit = self._config.max_skipped_fraction
        if self._handed_out >= _MIN_SAMPLES_TO_JUDGE and skipped > limit * self._handed_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped_by_kind.most_common())
            raise ValueError(
                f"{skipped} of {self._handed_out} samples are bad ({kinds}), more than max_skipped_fraction {limit}: "
                f"run python -m textlock.data.shards verify {self._config.shards}, or raise max_skipped_fraction"
            )


def _assemble(plan: _Plan, images: torch.Tensor, slots: Sequence[_Slot]) -> tuple[Batch, list[_Skipped]]:
    faults = [slot.skipped for slot in slots if slot.skipped is not None]
    batch = Batch(
        images=images,
        captions=[slot.caption for slot in slots],
        text_embeddings=None,
        ids=torch.tensor([slot.caption_id for slot in slots], dtype=torch.int64),
        keys=[slot.key for slot in slots],
        epoch=plan.epoch,
        position=plan.end,
        skipped=len(faults),
    )
    return batch, faults


def open_loader(
    config: DataConfig,
    *,
    rank: int,
    world_size: int,
    state: dict[str, Any] | None = None,
    skipped_log: Path | None = None,
    device: torch.device | str | None = None,
) -> Loader:
    """Open the training batches of one rank: global slots [rank * b / P, (rank + 1) * b / P) of every global batch.

    ``state`` is that of an earlier loader, of any world size: the batches go on after the last one it handed out.
    ``device`` is where training runs; the dali decoder puts the images there.

    Raises:
        FileNotFoundError: there are no shards, or no index.
        ValueError: a setting is impossible, the index is stale, or the state belongs to other data or other settings.
    """
    _check_config(config, rank, world_size)
    device = torch.device(device or "cpu")
    index = open_index(config.shards, cache_dir=config.cache_dir, cache_gb=config.cache_gb, fetchers=config.fetchers)
    _check_cache(config, index)
    order = SampleOrder(
        index.samples_per_shard, batch_size=config.batch_size, open_shards=config.open_shards, seed=config.seed
    )
    position = 0 if state is None else _check_state(state, config, index)
    dali = _open_dali(config, device)
    return Loader(
        config,
        index,
        order,
        rank=rank,
        world_size=world_size,
        position=position,
        skipped_log=skipped_log,
        device=device,
        dali=dali,
    )


def _check_config(config: DataConfig, rank: int, world_size: int) -> None:
    for name, least in (
        ("batch_size", 1),
        ("image_size", 1),
        ("workers", 1),
        ("prefetch_batches", 0),
        ("open_shards", 1),
        ("fetchers", 1),
    ):
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}: it must be at least {least}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks: ranks count from 0")
    if config.batch_size % world_size:
        raise ValueError(f"batch_size {config.batch_size} is not divisible by {world_size} ranks: change one of them")
    if not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
        raise ValueError(f"crop_scale is {config.crop_scale}: it must be two rising fractions of the area, at most 1")
    if not 0 < config.crop_ratio[0] <= config.crop_ratio[1]:
        raise ValueError(f"crop_ratio is {config.crop_ratio}: it must be two rising positive ratios")


def _check_cache(config: DataConfig, index: ShardIndex) -> None:
    """Refuse a cache too small for the shards that are read at a time: it would fetch them again and again."""
    group = sum(sorted(index.samples_per_shard)[: config.open_shards])
    # The batches in preparation may reach across the end of a group.
    groups = 1 - (-config.batch_size * (config.prefetch_batches + 1) // group)
    least = sum(sorted(index.shard_sizes, reverse=True)[: groups * config.open_shards])
    if index.remote is not None and round(config.cache_gb * 1e9) < least:
        raise ValueError(
            f"cache_gb is {config.cache_gb:g}: the shards of {config.shards} that are read at a time, {groups} times "
            f"open_shards {config.open_shards}, have {least / 1e9:.3g}: raise cache_gb or lower open_shards"
        )


def _fingerprint(config: DataConfig, index: ShardIndex) -> dict[str, Any]:
    """Return everything that decides which pixels and captions come at a position, by name."""
    return {
        "shards": index.fingerprint,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "open_shards": config.open_shards,
        "image_size": config.image_size,
        "crop_scale": list(config.crop_scale),
        "crop_ratio": list(config.crop_ratio),
        "order_version": _ORDER_VERSION,
    }


def _check_state(state: dict[str, Any], config: DataConfig, index: ShardIndex) -> int:
    position, then = state.get("position"), state.get("fingerprint")
    if not isinstance(position, int) or position < 0 or not isinstance(then, dict):
        raise ValueError("the loader state has no position and fingerprint: it is not one that a loader has saved")
    now = _fingerprint(config, index)
    changed = [f"{name} was {then.get(name)} and is {value}" for name, value in now.items() if then.get(name) != value]
    if changed:
        raise ValueError(
            f"the data is not what the state was saved with: {'; '.join(changed)}: restore it, or start a new run"
        )
    if position % config.batch_size:
        raise ValueError(f"the loader state's position {position} is not a multiple of batch_size {config.batch_size}")
    return position


def _open_dali(config: DataConfig, device: torch.device) -> "DaliDecoder | None":
    if config.decoder == "cpu" or (config.decoder == "auto" and device.type != "cuda"):
        return None
    try:
        # DALI takes seconds to import and is not installed everywhere.
        from .dali import DaliDecoder
    except ImportError as error:
        if config.decoder == "auto":
            return None
        raise ValueError(
            'decoder dali needs DALI, which is not installed: pip install "textlock[gpu]", or take decoder cpu'
        ) from error
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    return DaliDecoder(config.image_size, threads=config.workers, device_id=device_id)
