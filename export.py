"""Write a checkpoint as a folder that other software loads.

    python export.py --checkpoint runs/demo --format transformers --output exported/

``transformers`` holds every tower and brings its own modelling code: ``AutoModel.from_pretrained(folder,
trust_remote_code=True)``. ``onnx`` is that folder with graphs for onnxruntime. ``nomic`` is the folder of the released
Nomic Embed Vision, for Nomic's own code, and holds what that code can compute. ``timm`` is a folder for
``timm.create_model``, with what follows timm's trunk in a file of its own; ``open_clip`` a CLIP of both towers. All
have a model card, and evaluate.py reads all.
"""

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from textlock.data.atomic import atomic_folder, require_free
from textlock.engine.trained import LoadedTower, load_tower
from textlock.exports import nomic_format, onnx_format, open_clip_format, timm_format, transformers_format
from textlock.exports.card import model_card, public_name
from textlock.exports.check import compare_with_tower
from textlock.exports.folder import Exported
from textlock.models.text import TextTower, make_text_tower
from textlock.models.vision import VisionTower
from textlock.settings import Bound, Settings, exit_with

_FORMATS = {
    "transformers": transformers_format,
    "nomic": nomic_format,
    "onnx": onnx_format,
    "open_clip": open_clip_format,
    "timm": timm_format,
}
_LIBRARIES = {"open_clip": "open_clip", "timm": "timm"}

_HUB_NAME = Bound(
    lambda name: bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)), "be a name such as owner/name"
)
_LICENCE = Bound(lambda name: bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name)), "be an identifier such as apache-2.0")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Write a checkpoint as a folder that other software loads."""

    checkpoint: Path
    """A run folder, for its newest checkpoint, or one of its checkpoints."""
    output: Path
    """Folder to write; must not exist, or be empty."""
    format: Literal["transformers", "nomic", "onnx", "open_clip", "timm"] = "transformers"
    """transformers: with modelling code of its own, any tower. onnx: that folder with a graph for onnxruntime beside
    the weights. nomic: for the code of the released Nomic Embed Vision, EVA02 towers with map pooling, no projection
    and inner channels in multiples of 256. timm: a model of timm, any tower, with map pooling and projection in a file
    of their own. open_clip: a CLIP of image and text tower: ViTs with class
    token, cls or mean pooling; text towers of BERT's kind, mean or cls, without layers behind."""
    copy_text: bool = False
    """onnx: the text tower too, as a graph with its tokenizer."""

    def __post_init__(self) -> None:
        """Also refuse a text tower that the format has no place for."""
        super().__post_init__()
        if self.copy_text and self.format != "onnx":
            self.refuse("copy_text", "be left out: only --format onnx has a place for the text tower")

    text_name: Annotated[str | None, _HUB_NAME] = None
    """Hub name of the text tower, where the run named a local folder: the folder then says this name to everybody.
    Without it the text tower is known by its fingerprint alone."""
    license: Annotated[str | None, _LICENCE] = None
    """Licence of the weights for the model card, an identifier such as apache-2.0. Without it the card names none."""


def main() -> None:
    """Read the command line and export; bad input ends in one sentence and exit status 2."""
    options = tyro.cli(ExportConfig)
    try:
        require_free(options.output)
        loaded = load_tower(options.checkpoint)
        sentence = export(loaded, options)
    except (ValueError, OSError) as error:
        exit_with(error)
    print(f"wrote {options.output} from step {loaded.step} of {options.checkpoint}. {sentence}")


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
    if folder_format is open_clip_format:
        open_clip_format.require_text(described)
    needs_text = options.copy_text or folder_format is open_clip_format
    text_tower = _text_tower(loaded) if needs_text else None
    exported = Exported(loaded.tower, loaded.logit_scale, described)
    with atomic_folder(options.output) as draft:
        folder_format.write(exported, draft)
        text_snippet = None
        if folder_format is onnx_format:
            text_snippet = "" if text_tower is None else onnx_format.TEXT_SNIPPET
            if text_tower is not None:
                onnx_format.write_text(text_tower, draft)
        if folder_format is open_clip_format:
            assert text_tower is not None
            text_snippet = ""  # its lines embed texts themselves
            checked = _said_of_open_clip(*open_clip_format.write_model(exported, text_tower, draft))
        else:
            checked = _check(folder_format, draft, loaded)
        card = model_card(
            loaded,
            exported,
            snippet=_snippet(folder_format, loaded.tower),
            loaders=folder_format.LOADERS,
            checked=checked,
            license_name=options.license,
            text_snippet=text_snippet,
            library=_LIBRARIES.get(options.format, "transformers"),
        )
        (draft / "README.md").write_bytes(card.encode("utf-8", "replace"))
    return checked


def _text_tower(loaded: LoadedTower) -> TextTower:
    text_tower = make_text_tower(loaded.config.text, torch.device("cpu"))
    if difference := text_tower.describe().difference_from(loaded.text_tower):
        raise ValueError(f"{loaded.config.text.name} is no longer the text tower of the run: {difference}")
    return text_tower


def _snippet(folder_format: Any, tower: VisionTower) -> str:
    """Return the lines of the model card: timm's depend on the tower."""
    lines: str = timm_format.snippet(tower) if folder_format is timm_format else folder_format.SNIPPET
    return lines


def _said_of_open_clip(images: float, texts: float) -> str:
    return (
        f"The export loaded the folder with open_clip {version('open_clip_torch')}: embeddings of random images "
        f"differed from those of the trained tower by {images:.0e} at most, those of texts by {texts:.0e}."
    )


def _check(folder_format: Any, draft: Path, loaded: LoadedTower) -> str:
    package = folder_format.RUN_BY
    if package is None:
        return "The lines above were not run by the export, which never runs code from the hub."
    difference = compare_with_tower(
        _snippet(folder_format, loaded.tower), draft, loaded.tower, package=package, tolerance=folder_format.TOLERANCE
    )
    return (
        f"The export ran these lines with {package} {version(package)} on a random image: the embedding differed from "
        f"that of the trained tower by {difference:.0e} at most."
    )


if __name__ == "__main__":
    main()
