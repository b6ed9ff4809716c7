"""Try a checkpoint or an exported folder: search your own images with a sentence, or with an image.

    python explore.py --checkpoint runs/demo --pictures photos
    python explore.py --checkpoint runs/demo --pictures runs/demo/data/heldout --query "a red circle" --query "a dog"

The first line serves a page on this machine alone; the second answers in the terminal. Images and captions are embedded
once and kept.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from textlock.data.cache import DEFAULT_CACHE_DIR
from textlock.data.tar import printable
from textlock.engine.distributed import join_world
from textlock.exports.loaded import load_towers
from textlock.search.explorer import Answer, Explorer, summary
from textlock.search.pictures import find_pictures
from textlock.search.server import HOST, listen, serve
from textlock.settings import NOT_EMPTY, Settings, at_least, at_most, exit_with


@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Search images with a sentence or with an image: on a local page, or in the terminal with --query."""

    checkpoint: Path
    """A run folder (its newest checkpoint), one of its checkpoints/step_* folders, or an exported folder."""
    pictures: Path
    """A folder of image files, in any depth, whose captions are in .txt files next to them; or of tar shards with
    their index. It is only read."""
    query: Annotated[tuple[str, ...], NOT_EMPTY, tyro.conf.UseAppendAction] = ()
    """A sentence to answer in the terminal, without a page. May be given several times."""
    json: bool = False
    """Answer --query as JSON, an object a line."""
    top: Annotated[int, at_least(1), at_most(1000)] = 12
    """Images and captions in an answer."""
    text: str | None = None
    """Text tower, a folder or hub name. Default: the one the run was trained against."""
    cache: Path = Path(DEFAULT_CACHE_DIR) / "explore"
    """Folder in which embeddings are kept. They are computed again for images that change and for other towers, and the
    folder may be deleted at any time."""
    port: Annotated[int, at_least(0), at_most(65535)] = 7861
    """Port of the page; 0 takes a free one."""
    batch_size: Annotated[int, at_least(1)] = 64
    """Images per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""

    def __post_init__(self) -> None:
        """Also refuse a form of answers that nobody asked for."""
        super().__post_init__()
        if self.json and not self.query:
            self.refuse("json", "be left out without --query, whose answers it is the form of")


def main() -> None:
    """Read the command line and search; bad input ends in one sentence and exit status 2."""
    arguments = tyro.cli(Arguments)
    try:
        explore(arguments)
    except (ValueError, OSError) as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("\nstopped: what was embedded is kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


def explore(arguments: Arguments) -> None:
    """Answer the queries, or serve the page until Ctrl-C."""
    pictures = find_pictures(arguments.pictures)
    server = None if arguments.query else listen(arguments.port)  # a taken port is known before anything is loaded
    towers = load_towers(arguments.checkpoint, arguments.text, join_world(arguments.device).device)
    explorer = Explorer(towers, pictures, arguments.cache.expanduser(), batch_size=arguments.batch_size)
    count = f"{len(explorer.places):,} images and {len(explorer.captions):,} captions"
    left = [summary("images were not read", explorer.unread)] if explorer.unread else []
    left += [summary("other things could not be read", pictures.problems)] if pictures.problems else []
    print(printable(f"{arguments.pictures}: {count}"), *map(printable, left), sep="\n", file=sys.stderr)
    if server is None:
        for query in arguments.query:
            answer = explorer.by_text(query, arguments.top)
            print(
                json.dumps({"query": query, **asdict(answer)}) if arguments.json else _lines(query, answer), flush=True
            )
        return
    about: dict[str, Any] = {
        "pictures": str(arguments.pictures),
        "checkpoint": str(arguments.checkpoint),
        "text_tower": towers.loaded.text.name,
        "count": count,
        "left": left,
    }
    with server:
        print(f"http://{HOST}:{server.server_address[1]} (Ctrl-C ends it)", flush=True)
        try:
            serve(server, explorer, about, arguments.top)
        except KeyboardInterrupt:
            print("\nended", file=sys.stderr)


def _lines(query: str, answer: Answer) -> str:
    lines = [query, "  images"]
    lines += [
        f"    {found.cosine:6.3f}  {found.name}  {' | '.join(found.captions)}".rstrip() for found in answer.images
    ]
    if answer.captions:
        lines += ["  captions", *(f"    {found.cosine:6.3f}  {found.text}" for found in answer.captions)]
    return "\n".join(map(printable, lines))


if __name__ == "__main__":
    main()
