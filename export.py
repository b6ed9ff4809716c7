"""Write a checkpoint as a folder that other software loads.

    python export.py --checkpoint runs/demo --format transformers --output exported/

``transformers`` holds every tower and brings its own modelling code: ``AutoModel.from_pretrained(folder,
trust_remote_code=True)``. ``sentence-transformers`` embeds texts, too: ``SentenceTransformer(folder,
trust_remote_code=True).encode``. ``nomic`` is the folder of the released Nomic Embed Vision, for Nomic's own code, and
holds what that code can compute. All have a model card, and evaluate.py reads all.
"""

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro

from textlock.data.atomic import atomic_folder, require_free
from textlock.engine.trained import LoadedTower, load_tower
from textlock.exports import nomic_format, sentence_transformers_format, transformers_format
from textlock.exports.card import model_card, public_name
from textlock.exports.check import compare_with_tower, compare_with_towers
from textlock.exports.folder import Exported
from textlock.exports.push import is_repository_name, push, require_token
from textlock.models.text import TextTower
from textlock.settings import Bound, Settings, exit_with

_FORMATS = {
    "transformers": transformers_format,
    "sentence-transformers": sentence_transformers_format,
    "nomic": nomic_format,
}

_HUB_NAME = Bound(
    lambda name: bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)), "be a name such as owner/name"
)
_REPOSITORY = Bound(is_repository_name, "be the name of a model on the hub, owner/name")
_LICENCE = Bound(lambda name: bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name)), "be an identifier such as apache-2.0")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Write a checkpoint as a folder that other software loads."""

    checkpoint: Path
    """A run folder, for its newest checkpoint, or one of its checkpoints."""
    output: Path
    """Folder to write; must not exist, or be empty."""
    format: Literal["transformers", "sentence-transformers", "nomic"] = "transformers"
    """transformers: with modelling code of its own, any tower. sentence-transformers: the same and the text
    tower, for texts and images in one space. nomic: for the code of the released Nomic Embed Vision,
    EVA02 towers with map pooling, no projection and inner channels in multiples of 256."""
    text_name: Annotated[str | None, _HUB_NAME] = None
    """Hub name of the text tower, where the run named a local folder: the folder then says this name to everybody.
    Without it the text tower is known by its fingerprint alone."""
    copy_text: bool = False
    """With sentence-transformers: copy the text tower into the folder, which then needs nothing else. Without it the
    folder names the text tower by its hub name and commit."""
    license: Annotated[str | None, _LICENCE] = None
    """Licence of the weights for the model card, an identifier such as apache-2.0. Without it the card names none."""
    push: Annotated[str | None, _REPOSITORY] = None
    """Upload the folder as the model owner/name of the hub, which is made when there is none, with the token of
    hf auth login or HF_TOKEN. Files that are there already and not in the folder stay."""
    private: bool = False
    """With push: nobody but the owner may read it."""


def main() -> None:
    """Read the command line and export; bad input ends in one sentence and exit status 2."""
    options = tyro.cli(ExportConfig)
    try:
        if options.copy_text and options.format != "sentence-transformers":
            options.refuse("copy_text", "be left out: only --format sentence-transformers holds a text tower")
        if options.private and options.push is None:
            options.refuse("private", "be left out without --push")
        require_free(options.output)
        if options.push is not None:
            require_token()
        loaded = load_tower(options.checkpoint)
        sentence = export(loaded, options)
    except (ValueError, OSError) as error:
        exit_with(error)
    print(f"wrote {options.output} from step {loaded.step} of {options.checkpoint}. {sentence}")
    if options.push is not None:
        try:
            address = push(options.output, options.push, private=options.private)
        except ValueError as error:
            exit_with(error)
        print(f"uploaded to {address}")


def export(loaded: LoadedTower, options: ExportConfig) -> str:
    """Write the folder, which appears whole and checked or not at all; return a sentence on what was checked.

    Raises:
        ValueError: the format cannot hold this tower, ``options.output`` is not empty, figures next to the checkpoint
            are damaged, or the written folder failed its check.
        OSError: a file cannot be written.
    """
    folder_format = _FORMATS[options.format]
    folder_format.require(loaded.tower)
    name = public_name(loaded.text_tower)
    if name is not None and options.text_name is not None:
        options.refuse("text_name", f"be left out: the run names its text tower by the hub name {name}")
    described = loaded.text_tower | {"name": name or options.text_name}
    text_tower = None
    if options.format == "sentence-transformers":
        text_tower = sentence_transformers_format.find_text_tower(
            loaded.text_tower, text_name=options.text_name, copy=options.copy_text
        )
        if name is None and not options.copy_text:  # the hub's, found under --text-name
            described["revision"] = text_tower.revision
    exported = Exported(loaded.tower, loaded.logit_scale, described)
    with atomic_folder(options.output) as draft:
        if text_tower is None:
            folder_format.write(exported, draft)
        else:
            sentence_transformers_format.write(exported, draft, text_tower, copy=options.copy_text)
        checked = _check(options.format, draft, loaded, text_tower)
        card = model_card(
            loaded,
            exported,
            snippet=folder_format.SNIPPET,
            loaders=folder_format.LOADERS,
            checked=checked,
            library=folder_format.LIBRARY,
            license_name=options.license,
        )
        (draft / "README.md").write_bytes(card.encode("utf-8", "replace"))
    return checked


def _check(name: str, draft: Path, loaded: LoadedTower, text_tower: TextTower | None) -> str:
    if name == "nomic":
        return "The lines above were not run by the export, which never runs code from the hub."
    if text_tower is not None:
        module = sentence_transformers_format
        image, text = compare_with_towers(module.SNIPPET, module.TEXTS, draft, loaded.tower, text_tower)
        return (
            f"The export ran these lines with sentence-transformers {version('sentence-transformers')} on the CPU and "
            f"a random image: its embedding differed from that of the trained tower by {image:.0e} at most, those of "
            f"the texts from the text tower's by {text:.0e}."
        )
    difference = compare_with_tower(transformers_format.SNIPPET, draft, loaded.tower)
    import transformers  # not above: it takes seconds

    return (
        f"The export ran these lines with transformers {transformers.__version__} on a random image: the embedding "
        f"differed from that of the trained tower by {difference:.0e} at most."
    )


if __name__ == "__main__":
    main()
