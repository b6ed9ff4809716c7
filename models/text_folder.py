"""The files of a text encoder's folder: where they are, and what is in them. Nothing is unpickled, no code is run."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

# All that is taken of a hub model: configurations, tokenizer, the weights of the encoder and of what comes after, and
# the terms under which a copy is passed on.
_WEIGHTS = (f"{folder}model*.safetensors" for folder in ("", "0_Transformer/", "[1-9]_*/"))
_WANTED = ["*.json", "*.txt", "LICENSE*", "NOTICE*", *_WEIGHTS]


def local_folder(path_or_name: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder itself, or that of a hub model at a commit, else the newest, fetched or from the local cache.

    Raises FileNotFoundError when there is neither.
    """
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or ("/" in name and folder.parent.is_dir()):
        raise FileNotFoundError(f"there is no text tower folder {name}; give an existing folder or a hub name")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"text tower {name} is neither a folder here nor a model that the hub gives; "
            f"check the name and the network, or give a folder ({type(error).__name__})"
        ) from error


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the content of a JSON file, which must be of a kind.

    Raises FileNotFoundError when it is missing and ValueError when it is damaged or of another kind.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the model folder is incomplete") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the model folder is damaged") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of a {kind.__name__}; the folder is damaged")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder.

    Raises FileNotFoundError when there are none and ValueError when their index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(Path(str(name)).name == name for name in names.values()):
            raise ValueError(f"{index} does not map weights to files of its folder; the model folder is damaged")
        return sorted({folder / name for name in names.values()})
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise FileNotFoundError(
        f"text tower {folder} has no model.safetensors; pickled weights (.bin, .pt) are not read, convert them first"
    )


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors by name, in an order that does not depend on how they are split into files."""
    file_of: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            file_of |= dict.fromkeys(weights.keys(), file)
    for name in sorted(file_of):
        with safe_open(file_of[name], framework="pt") as weights:
            yield name, weights.get_tensor(name)


def stored_size(folder: Path) -> int:
    """Return the number of elements of all stored tensors, read from the headers alone.

    Raises ValueError when a file is damaged.
    """
    size = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (no mapping)
                    size += math.prod(weights.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
    return size


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, and its type."""
    return f"{str(error).strip().partition(chr(10))[0]} ({type(error).__name__})"
