"""How many captions a second the frozen text tower encodes, next to sentence-transformers on the same captions.

    python -m textlock.bench.text                                              # after make demo
    python -m textlock.bench.text --tower FOLDER --captions captions.txt --count 4096

Two cases: captions that all differ, and as many drawn with repetitions from half of them, as captions of a data set
repeat. Ours encodes equal captions once, which only the second case shows. sentence-transformers runs at its default
batch of 32 and at 128. All use the same threads, and the embeddings must agree before anything is timed. The floor is
the matrix products of the layers over the real tokens of distinct captions, at the rate of large products
(`textlock.bench.ceilings`). One JSON line a candidate on stdout, a table on stderr.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from textlock.bench import ceilings
from textlock.bench.candidates import Comparison, Ready, compared
from textlock.bench.ceilings import TOLERANCE, ceilings_for
from textlock.bench.entry import ERROR, FLOOR, TIMING, Benchmark, Column, Line, Session, require_known, require_positive
from textlock.bench.measure import Unavailable, importable, relative_error
from textlock.models.text import TextTower, build_text_tower

DEMO = Path("runs/demo")
BATCHES = {"sentence_transformers": 32, "sentence_transformers_128": 128}


@dataclass(frozen=True, kw_only=True)
class TextOptions(ceilings.Options):
    """Options of the command."""

    tower: Path = DEMO / "text_tower"
    """Folder of sentence-transformers with mean pooling."""
    captions: Path = DEMO / "data" / "captions.txt"
    """Distinct captions, one a line."""
    count: int = 2048
    """How many are encoded, spread over the file."""


def product_weights(folder: Path) -> int:
    """Count the weights of the layers' matrix products: a token is multiplied once with each."""
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys() if ".layer." in name]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def comparison_of(tower: TextTower, folder: Path, captions: Sequence[str], kind: str) -> Comparison:
    """Return ours and sentence-transformers on these captions; right is what ours gives for single captions."""
    distinct = list(dict.fromkeys(captions))
    checked = slice(None, None, max(1, len(captions) // 16))
    alone = torch.cat([tower.encode([caption]) for caption in captions[checked]]).double()

    def ready(encode: Callable[[Sequence[str]], Tensor]) -> Ready:
        error = relative_error(encode(captions)[checked], alone)
        return Ready(lambda: encode(captions), {"embeddings": error}, TOLERANCE[torch.float32], torch.float32)

    def peer(batch_size: int) -> Ready:
        if not importable("sentence_transformers"):
            raise Unavailable("sentence-transformers is not installed: pip install 'textlock[peers]'")
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder), device=tower.device.type)
        return ready(
            lambda texts: model.encode(
                list(texts), batch_size=batch_size, convert_to_tensor=True, normalize_embeddings=True
            )
        )

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    lengths = [len(found.ids) for found in tokenizer.encode_batch(distinct)]
    return Comparison(
        part="text",
        operation="encode",
        case={"tower": folder.name, "captions": len(captions), "distinct": len(distinct), "tokens": sum(lengths)},
        shown=(kind, f"{len(captions):,}", f"{len(distinct):,}", f"{sum(lengths) / len(distinct):.1f}"),
        candidates={"ours": lambda: ready(tower.encode)}
        | {name: partial(peer, batch_size) for name, batch_size in BATCHES.items()},
        operations=2.0 * sum(lengths) * product_weights(folder),
        more=lambda seconds: {"captions_per_second": len(captions) / seconds},
    )


def lines(options: TextOptions, session: Session) -> Iterator[Line]:
    """Measure both cases."""
    found = ceilings_for(options.ceilings, session.device, options.seconds)
    known = options.captions.read_text(encoding="utf-8").splitlines()
    distinct = known[:: max(1, len(known) // options.count)][: options.count]
    tower = build_text_tower(options.tower, device=session.device)
    session.notes.append(f"{torch.get_num_threads()} threads")
    repeated = random.Random(0).choices(distinct[: max(1, len(distinct) // 2)], k=len(distinct))
    for kind, captions in (("distinct", distinct), ("repeated", repeated)):
        comparison = comparison_of(tower, options.tower, captions, kind)
        yield from compared(comparison, options.candidates, found, options.seconds, session)


def check(options: TextOptions) -> None:
    """Raise ValueError for what cannot be."""
    require_positive(options, "count", "seconds", "limit")
    require_known("candidates", options.candidates, ("ours", *BATCHES))
    for path in (options.tower / "model.safetensors", options.captions):
        if not path.is_file():
            raise ValueError(f"there is no {path}: run make demo first, or name others by --tower and --captions")


BENCHMARK = Benchmark(
    about=__doc__,
    options=TextOptions,
    check=check,
    lines=lines,
    before=("captions", "number", "distinct", "tokens each"),
    columns=(*TIMING, FLOOR, Column("captions/s", "captions_per_second", ",.0f"), ERROR),
)

if __name__ == "__main__":
    BENCHMARK.command()
