"""Write a checkpoint as a folder that other software loads.

    python export.py --checkpoint runs/demo --format transformers --output exported/

``transformers`` holds every tower and brings its own modelling code: ``AutoModel.from_pretrained(folder,
trust_remote_code=True)``. ``sentence-transformers`` embeds texts, too: ``SentenceTransformer(folder,
trust_remote_code=True).encode``. ``onnx`` is the folder of transformers with graphs for onnxruntime. ``timm`` is a
folder for ``timm.create_model``, with what follows timm's trunk in a file of its own; ``open_clip`` a CLIP of both
towers; ``nomic`` the folder of the released Nomic Embed Vision, for Nomic's own code. All have a model card, and
evaluate.py reads all.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from textlock.data.atomic import atomic_folder, require_free
from textlock.engine.trained import LoadedTower, load_tower
from textlock.exports import (
    nomic_format,
    onnx_format,
    open_clip_format,
    sentence_transformers_format,
    timm_format,
    transformers_format,
)
from textlock.exports.card import last_part, model_card, public_name
from textlock.exports.folder import Exported, Texts
from textlock.exports.push import is_repository_name, push, require_token
from textlock.exports.text import find_text_tower
from textlock.settings import Bound, Settings, exit_with

_FORMATS: dict[str, Any] = {
    "transformers": transformers_format,
    "sentence-transformers": sentence_transformers_format,
    "onnx": onnx_format,
    "timm": timm_format,
    "open_clip": open_clip_format,
    "nomic": nomic_format,
}
# Whose folders need the text tower, and whose may hold it.
_WITH_TEXTS = (sentence_transformers_format, open_clip_format)
_COPIES_TEXTS = (sentence_transformers_format, onnx_format)

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
    format: Literal["transformers", "sentence-transformers", "onnx", "timm", "open_clip", "nomic"] = "transformers"
    """transformers: any tower, with modelling code of its own. sentence-transformers: the same and the text tower, for
    texts and images in one space. onnx: as transformers, with graphs for onnxruntime. timm: any tower, with map pooling
    and projection in a file of their own. open_clip: a CLIP of both towers: ViTs with class token, cls or mean pooling;
    text towers of BERT's kind, mean or cls, without layers behind. nomic: for the code of the released Nomic Embed
    Vision, EVA02 towers with map pooling, no projection and inner channels in multiples of 256."""
    text_name: Annotated[str | None, _HUB_NAME] = None
    """Hub name of the text tower, where the run named a local folder: the folder then says this name to everybody.
    Without it the text tower is known by its fingerprint alone."""
    copy_text: bool = False
    """The text tower goes into the folder, too. sentence-transformers: its files; else the folder names it by hub name
    and commit. onnx: its graph and tokenizer."""
    license: Annotated[str | None, _LICENCE] = None
    """Licence of the weights for the model card, an identifier such as apache-2.0. Without it the card names none."""
    push: Annotated[str | None, _REPOSITORY] = None
    """Upload the folder as the model owner/name of the hub, which is made when there is none, with the token of
    hf auth login or HF_TOKEN. Files that are there already and not in the folder stay."""
    private: bool = False
    """With push: nobody but the owner may read it."""

    def __post_init__(self) -> None:
        """Also refuse what the format or the rest has no place for."""
        super().__post_init__()
        if self.copy_text and _FORMATS[self.format] not in _COPIES_TEXTS:
            self.refuse("copy_text", "be left out: only --format sentence-transformers and onnx hold a text tower")
        if self.private and self.push is None:
            self.refuse("private", "be left out without --push")


def main() -> None:
    """Read the command line and export; bad input ends in one sentence and exit status 2."""
    options = tyro.cli(ExportConfig)
    try:
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
        FileNotFoundError: the text tower is needed and not there.
        ValueError: the format cannot hold these towers, ``options.output`` is not empty, figures next to the checkpoint
            are damaged, or the written folder failed its check.
        OSError: a file cannot be written.
    """
    folder_format = _FORMATS[options.format]
    hub = public_name(loaded.text_tower)
    if hub is not None and options.text_name is not None:
        options.refuse("text_name", f"be left out: the run names its text tower by the hub name {hub}")
    described = loaded.text_tower | {"name": hub or options.text_name}
    exported = Exported(loaded.tower, loaded.logit_scale, described)
    folder_format.require(exported)
    texts = _find_texts(loaded, options, hub)
    if texts is not None and not texts.copied:
        described["revision"] = texts.tower.revision or described["revision"]  # the hub's, found under --text-name
    with atomic_folder(options.output) as draft:
        folder_format.write(exported, draft, texts)
        checked: str = folder_format.check(exported, draft, texts)
        snippet, text_snippet = folder_format.snippets(exported, texts)
        card = model_card(
            loaded,
            exported,
            snippet=snippet,
            loaders=folder_format.LOADERS,
            text_snippet=text_snippet,
            checked=checked,
            library=folder_format.LIBRARY,
            license_name=options.license,
        )
        (draft / "README.md").write_bytes(card.encode("utf-8", "replace"))
    return checked


def _find_texts(loaded: LoadedTower, options: ExportConfig, hub: str | None) -> Texts | None:
    """Return the text tower where the folder holds or names it; ``hub`` is its name there, None of a local folder."""
    folder_format = _FORMATS[options.format]
    if folder_format not in _WITH_TEXTS and not options.copy_text:
        return None
    if folder_format is sentence_transformers_format and not options.copy_text:
        # Others fetch it by that name: it must be there.
        hub = hub or options.text_name
        if hub is None:
            raise ValueError(
                f"the run named the folder {last_part(loaded.text_tower['name'])} as its text tower, which nobody else "
                "has: give --text-name with its name on the hub, or --copy-text"
            )
    return Texts(find_text_tower(loaded.text_tower, hub), options.copy_text)


if __name__ == "__main__":
    main()
