"""Gives damaged images, captions and files of stored text embeddings to what reads them, which uses or refuses them.

    python -m textlock.tests.data.fuzz --inputs 100000 --seed 0

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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

from textlock.data import stored_text
from textlock.data.captions import MAX_CAPTION_BYTES, caption_id, captions_hash, read_captions
from textlock.data.images import BadSample, CropWindow, check_image, crop_and_resize, decode_image
from textlock.data.index import SAMPLE_DTYPE

from .. import text_tower
from . import zoo

TELLING = [bytes.fromhex(word) for word in ["00", "ff", "7f", "80", "ffff", "00000000", "ffffffff", "7fffffff", "0001"]]
MARKERS = [bytes([0xFF, marker]) for marker in (0xC0, 0xC2, 0xC4, 0xC9, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE)]
IMAGES = [*zoo.GOOD.values(), *zoo.DAMAGED.values()]
CAPTIONS = [*(caption[:5000] for caption in zoo.ODD_CAPTIONS.values()), "Grüße 🐘 é".encode() * 300]
TOWER = text_tower.describe(fingerprint="0" * 64, dimensions=8)


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
            case (3 | 4) as kind:
                words = TELLING if kind == 3 else MARKERS
                new = words[rng.integers(len(words))]
                mutant[at : at + len(new)] = new
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


def damaged_image(rng: np.random.Generator) -> bytes:
    return mutate(IMAGES[rng.integers(len(IMAGES))], rng, 700)


def use_image(payload: bytes) -> None:
    window = whole_image(payload)
    if window.height * window.width < 4_000_000:  # larger ones would only take long: the check bounds memory
        crop_and_resize(decode_image(payload), window, torch.empty(8, 8, 3, dtype=torch.uint8))


def damaged_caption(rng: np.random.Generator) -> bytes:
    return mutate(CAPTIONS[rng.integers(len(CAPTIONS))], rng, 4096)


def use_caption(payload: bytes) -> None:
    captions = []
    with contextlib.suppress(ValueError):
        captions += read_captions(b'{"x": "' + payload + b'"}', "json:x").texts
    check_captions(captions)
    check_captions(read_captions(payload, "txt").texts)


def check_captions(captions: list[str]) -> None:
    for caption in captions:
        assert 0 < len(caption.encode()) <= MAX_CAPTION_BYTES
        assert caption == caption.strip() and "\0" not in caption
        assert -(2**63) <= caption_id(caption) < 2**63
        assert json.loads(json.dumps(caption)) == caption
    assert 0 <= captions_hash(captions) < 2**64


def damaged_embeddings(rng: np.random.Generator, samples: int = 5) -> bytes:
    """Damage a file of the embeddings of samples whose hashes are all 1."""
    records = np.zeros(samples, stored_text.record_dtype(8))
    records["key_hash"] = records["caption_hash"] = 1
    records["row"] = 0.5
    records["crc32"] = zlib.crc32(records["row"][0].tobytes())
    packed = stored_text.pack_header("0.tar", samples, TOWER)
    if rng.random() < 0.5:
        good = packed + records.tobytes()
        return mutate(good, rng, len(good))
    # A header that says other things and has a right checksum.
    length = int.from_bytes(packed[12:16], "little")
    header = mutate(packed[16 : 16 + length], rng, length)
    content = packed[:12] + len(header).to_bytes(4, "little") + header
    content += hashlib.sha256(content).digest()
    return content + bytes(-len(content) % 64) + records.tobytes()


def use_embeddings(payload: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "0.embeddings").write_bytes(payload)
        index = SimpleNamespace(
            shard_names=["0.tar"],
            shard_of=lambda sample: 0,
            first_sample=np.array([0, 5]),
            samples=np.array([(0, 0, 0, 0, 1, 1, 1, 0)] * 5, dtype=SAMPLE_DTYPE),
        )
        stored = stored_text.StoredText(folder, index, TOWER)
        for number in range(5):
            with contextlib.suppress(BadSample):
                assert (stored.row(number, 0, 1) == 0.5).all(), "a damaged embedding was believed"


TARGETS = {
    "images": (damaged_image, use_image),
    "captions": (damaged_caption, use_caption),
    "stored embeddings": (damaged_embeddings, use_embeddings),
}


def fuzz_dali(inputs: int, rng: np.random.Generator) -> Counter[str]:
    """Batches of JPEG mutants that pass the check, as the loader makes them, with a good batch in between."""
    from textlock.data.dali import DaliDecoder

    decoder = DaliDecoder(8, threads=2, device_id=None, hw_decoder_load=0.65)
    jpegs = [payload for payload in IMAGES if payload.startswith(b"\xff\xd8")]
    outcomes: Counter[str] = Counter()
    while outcomes.total() < inputs:
        payloads = []
        while len(payloads) < 8:
            payload = mutate(jpegs[rng.integers(len(jpegs))], rng, 700)
            try:
                window = whole_image(payload)
            except BadSample as fault:
                outcomes[fault.kind] += 1
                continue
            if window.height * window.width < 1_000_000 and check_image(payload).is_plain_jpeg:
                payloads.append(payload)
        for batch in (payloads, [zoo.JPEG] * 3):
            images = torch.zeros(len(batch), 8, 8, 3, dtype=torch.uint8)
            windows = [whole_image(payload) for payload in batch]
            try:
                decoder.decode(batch, windows, images, list(range(len(batch))), are_plain=True)
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
        dali: Give a quarter of them, JPEGs that pass the check, to DALI.
    """
    rng = np.random.default_rng(seed)
    if dali:
        print(f"dali: {dict(fuzz_dali(inputs // 4, rng))}")
    for name, (damaged, use) in TARGETS.items():
        outcomes: Counter[str] = Counter()
        slowest = 0.0
        for _ in range(inputs // len(TARGETS)):
            payload = damaged(rng)
            start = time.perf_counter()
            try:
                use(payload)
                outcomes["used"] += 1
            except BadSample as fault:
                outcomes[fault.kind] += 1
            except ValueError as refusal:
                assert use is not use_image, refusal
                outcomes["refused"] += 1
            except BaseException:
                print(f"{name}: {base64.b64encode(payload).decode()}", file=sys.stderr)
                raise
            slowest = max(slowest, time.perf_counter() - start)
        print(f"{name}: {outcomes.total()} inputs, slowest {slowest * 1e3:.0f} ms, {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
