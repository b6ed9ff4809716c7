"""An exported folder read back, by this project's own code: no code in the folder is run."""

from pathlib import Path
from typing import Any

from ..models.text import TextConfig, TextTowerDescription
from ..models.text_folder import read_json
from . import nomic_format, open_clip_format, timm_format, transformers_format
from .folder import CONFIG, IMAGE_FOLDER, TEXT_FOLDER, Exported

_READERS = {
    module.MODEL_TYPE: module.read for module in (transformers_format, nomic_format, open_clip_format, timm_format)
}


def is_exported(folder: Path) -> bool:
    """Return whether this is a folder that `read_exported` reads, and no run or checkpoint."""
    return (folder / CONFIG).is_file() or (folder / IMAGE_FOLDER / CONFIG).is_file()


def read_exported(folder: Path) -> Exported:
    """Read a folder that export.py wrote, or a released Nomic Embed Vision; config.json says which.

    Returns:
        The tower in float32 on the CPU, and what it was trained against.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        ValueError: the folder is of another kind or damaged, or its weights do not fit its configuration.
    """
    if (folder / IMAGE_FOLDER / CONFIG).is_file():  # of sentence-transformers
        folder = folder / IMAGE_FOLDER
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: give a folder that export.py wrote")
    fields = read_json(path)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(
            f"{path} describes a model of type {kind!r}, which is not read here: give a folder that export.py wrote "
            f"({', '.join(_READERS)})"
        )
    return Exported(_READERS[kind](folder, fields), fields.get("logit_scale"), fields.get("text_tower"))


def text_settings(described: dict[str, Any] | None, folder: Path, name: str | None) -> TextConfig:
    """Return the settings of the text tower that an exported folder was trained against.

    Args:
        described: what the folder says. None, as of the released Nomic Embed Vision, which goes with Nomic Embed Text
            v1.5.
        folder: it. The text tower that it may hold is taken when nothing else is named.
        name: a folder or hub name that takes the place of its name.

    Raises:
        ValueError: there is no name, or the description is of another form.
    """
    if described is None:
        return TextConfig() if name is None else TextConfig(name=name)
    if name is None and (folder / TEXT_FOLDER).is_dir():
        name = str(folder / TEXT_FOLDER)
    try:
        if name is not None or described["name"] is not None:
            return TextTowerDescription.config_of({**described, "name": name or described["name"]})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} does not say which text tower it was trained against: {error}") from error
    raise ValueError(
        f"{folder} was trained against a text tower from a local folder, whose place it does not tell: give --text"
    )
