"""Gives damaged images, captions and files of stored text embeddings to what reads them, which uses or refuses them.

    python tests/data/fuzz.py --inputs 100000 --seed 0

Any other exception ends it with the input on stderr, a crash ends it by a signal. It names the slowest input of each
kind. The test suite runs a short one in a separate process.
"""

import base64
import contextlib
import hashlib
import json
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))
import zoo  # type: ignore[import-not-found]  # a plain script finds its neighbour so

from textlock.data import stored_text
from textlock.data.captions import MAX_CAPTION_BYTES, caption_id, decode_caption
from textlock.data.images import BadSample, CropWindow, check_image, crop_and_resize, decode_image
from textlock.models.text import TextTowerDescription

TELLING = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x00\x01",
]
MARKERS = [bytes([0xFF, marker]) for marker in (0xC0, 0xC2, 0xC4, 0xC9, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE)]


def mutate(payload: bytes, rng: np.random.Generator, reach: int) -> bytes:
    """Change a few things within the first ``reach`` bytes, and sometimes cut or join."""
    mutant = bytearray(payload)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, max(1, min(len(mutant), reach))))
        match rng.integers(7):
            case 0 | 1:
                mutant[at : at + 1] = bytes([rng.integers(256)])
            case 2:
                mutant[at : at + 1] = bytes([(mutant[at] if at < len(mutant) else 0) ^ 1 << int(rng.integers(8))])
            case 3:
                new = TELLING[rng.integers(len(TELLING))]
                mutant[at : at + len(new)] = new
            case 4:
                new = MARKERS[rng.integers(len(MARKERS))]
                mutant[at : at + 2] = new
            case 5:
                length = int(rng.integers(1, 64))
                if rng.random() < 0.5:
                    mutant[at:at] = mutant[at : at + length]
                else:
                    del mutant[at : at + length]
            case 6 if rng.random() < 0.2:
                del mutant[int(rng.integers(0, len(mutant) + 1)) :]
    return bytes(mutant)


def whole_image(payload: bytes) -> CropWindow:
    header = check_image(payload)
    return CropWindow(0, 0, header.height, header.width)


def fuzz_images(rng: np.random.Generator) -> tuple[bytes, Callable[[], None]]:
    seeds = SEEDS["images"]
    payload = mutate(seeds[rng.integers(len(seeds))], rng, 700)

    def use() -> None:
        window = whole_image(payload)
        if window.height * window.width < 4_000_000:  # larger ones would only take long: the check bounds memory
            crop_and_resize(decode_image(payload), window, torch.empty(8, 8, 3, dtype=torch.uint8))

    return payload, use


def fuzz_captions(rng: np.random.Generator) -> tuple[bytes, Callable[[], None]]:
    seeds = SEEDS["captions"]
    payload = mutate(seeds[rng.integers(len(seeds))], rng, 4096)

    def use() -> None:
        caption = decode_caption(payload)
        assert len(caption.encode()) <= 3 * MAX_CAPTION_BYTES  # a byte that is no UTF-8 becomes three
        assert caption == caption.strip() and "\0" not in caption
        assert -(2**63) <= caption_id(caption) < 2**63
        assert json.loads(json.dumps(caption)) == caption

    return payload, use


TOWER = TextTowerDescription("tower", None, "", 77, "mean", True, 8, "0" * 64)


def stored_rows(samples: int = 5) -> bytes:
    """Return a good file of stored rows, of samples whose hashes are all 1."""
    header = {"shard": "0.tar", "samples": samples, "embed_dim": 8, "tower": vars(TOWER)}
    return sealed(json.dumps(header).encode()) + records(samples)


def sealed(header: bytes) -> bytes:
    start = stored_text._START.pack(b"TEXTROWS", 1, len(header))
    content = start + header + hashlib.sha256(start + header).digest()
    return content + bytes(-len(content) % 64)


def records(samples: int) -> bytes:
    rows = np.zeros(samples, stored_text.record_dtype(8))
    rows["key_hash"] = rows["caption_hash"] = 1
    rows["row"] = 0.5
    rows["crc32"] = zlib.crc32(rows["row"][0].tobytes())
    return rows.tobytes()


def fuzz_stored_rows(rng: np.random.Generator) -> tuple[bytes, Callable[[], None]]:
    good = SEEDS["stored rows"][0]
    if rng.random() < 0.5:
        payload = mutate(good, rng, len(good))
    else:  # a header that says other things and has a right checksum
        length = int.from_bytes(good[12:16], "little")
        payload = sealed(mutate(good[16 : 16 + length], rng, length)) + records(5)
    path = FOLDER / "0.embeddings"
    sample = np.array([(0, 0, 0, 0, 1, 1)], dtype="u8,u8,u4,u4,u8,u8")

    def use() -> None:
        path.write_bytes(payload)
        index = SimpleNamespace(
            shard_names=["0.tar"],
            shard_of=lambda sample: 0,
            first_sample=np.array([0, 5]),
            samples=np.repeat(sample, 5),
        )
        stored = stored_text.StoredText(FOLDER, index, TOWER)
        for number in range(5):
            with contextlib.suppress(BadSample):
                assert (stored.row(number) == 0.5).all(), "a damaged row was believed"

    return payload, use


FOLDER = Path()
SEEDS = {
    "images": [*zoo.GOOD.values(), *zoo.DAMAGED.values()],
    "captions": [*(c[:5000] for c in zoo.ODD_CAPTIONS.values()), "Grüße 🐘 é".encode() * 300],
    "stored rows": [stored_rows()],
}
TARGETS = {"images": fuzz_images, "captions": fuzz_captions, "stored rows": fuzz_stored_rows}


def fuzz_dali(inputs: int, rng: np.random.Generator) -> Counter[str]:
    """Batches of JPEG mutants that pass the check, as the loader makes them, with a good batch in between."""
    from textlock.data.dali import DaliDecoder

    decoder = DaliDecoder(8, threads=2, device_id=None, hw_decoder_load=0.65)
    seeds = [payload for payload in SEEDS["images"] if payload.startswith(b"\xff\xd8")]
    outcomes: Counter[str] = Counter()
    while outcomes.total() < inputs:
        payloads = []
        while len(payloads) < 8:
            payload = mutate(seeds[rng.integers(len(seeds))], rng, 700)
            try:
                window = whole_image(payload)
            except BadSample as fault:
                outcomes[fault.kind] += 1
                continue
            if window.height * window.width < 1_000_000:
                payloads.append(payload)
        for batch in (payloads, [zoo.JPEG] * 3):
            images = torch.zeros(len(batch), 8, 8, 3, dtype=torch.uint8)
            windows = [whole_image(payload) for payload in batch]
            try:
                decoder.decode(batch, windows, images, list(range(len(batch))))
            except RuntimeError:
                assert batch is payloads, "a good batch failed after a bad one"
                outcomes["batches refused"] += len(batch)
            else:
                outcomes["decoded" if batch is payloads else "good"] += len(batch)
    return outcomes


def main(inputs: int = 100_000, seed: int = 0, dali: bool = False) -> None:
    """Fuzz.

    Args:
        inputs: Inputs in all, shared by the kinds.
        seed: Of the mutations.
        dali: Give JPEGs that pass the check to DALI instead.
    """
    global FOLDER
    rng = np.random.default_rng(seed)
    if dali:
        print(f"dali: {dict(fuzz_dali(inputs, rng))}")
        return
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        for name, target in TARGETS.items():
            outcomes: Counter[str] = Counter()
            slowest = 0.0
            for _ in range(inputs // len(TARGETS)):
                payload, use = target(rng)
                start = time.perf_counter()
                try:
                    use()
                    outcomes["used"] += 1
                except BadSample as fault:
                    outcomes[fault.kind] += 1
                except ValueError as refusal:
                    assert name == "stored rows", refusal
                    outcomes["refused"] += 1
                except BaseException:
                    print(f"{name}: {base64.b64encode(payload).decode()}", file=sys.stderr)
                    raise
                slowest = max(slowest, time.perf_counter() - start)
            print(f"{name}: {outcomes.total()} inputs, slowest {slowest * 1e3:.0f} ms, {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
