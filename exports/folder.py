"""What every exported folder has: weights in safetensors, a configuration, an image processor.

A format is a module of functions. ``require`` raises ValueError for what it cannot hold, before anything slow is
loaded. ``write`` writes the files of an `Exported` into an existing folder, with `Texts` where it takes them. ``check``
loads that folder by the format's own library, compares embeddings with the towers', and returns a sentence on it.
``snippets`` are the lines of the model card for images and for texts; None for the latter are those for transformers,
and none at all where the first embed texts, too. ``read`` gives back the tower. LIBRARY is what loads the folder, as
the hub names it, and LOADERS the software that the lines need.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..models.text import TextTower
from ..models.text_folder import first_line
from ..models.vision import IMAGE_MEAN, IMAGE_STD, VisionTower

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
# Where the format sentence-transformers has the image tower, and the text tower where it is copied.
IMAGE_FOLDER: Final = "image"
TEXT_FOLDER: Final = "text"


@dataclass(frozen=True)
class Exported:
    """What is written, and read back: an image tower and what its figures cannot do without."""

    tower: VisionTower
    logit_scale: float | None
    """Factor on the cosines at the end of training; None of the released Nomic Embed Vision."""
    text_tower: dict[str, Any] | None
    """The `TextTowerDescription` it was trained against, its name None where that was a local folder; None of the
    released Nomic Embed Vision."""


@dataclass(frozen=True)
class Texts:
    """The text tower that a folder holds or names."""

    tower: TextTower
    copied: bool
    """Whether all that it needs goes into the folder; else the folder names it by its hub name and commit."""


def write_weights(folder: Path, weights: Mapping[str, Tensor], *, name: str = WEIGHTS, head: str | None = None) -> None:
    """Write weights in float32, with the mark without which transformers refuses them.

    Args:
        folder: an existing one.
        weights: by name.
        name: of the file.
        head: the file beside it that holds the rest of the tower, see models/weights.py.

    Raises OSError when it cannot be written.
    """
    path = folder / name
    metadata = {"format": "pt"} if head is None else {"format": "pt", "head": head}
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in weights.items()}
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # also of a full disk
        raise OSError(f"{path} could not be written: {first_line(error)}") from error


def write_processor(folder: Path, size: int) -> None:
    """Write preprocessor_config.json, whose pixels are those that images are evaluated with.

    Where the margins of the central square are uneven, transformers always makes the first the smaller one, and
    torchvision, which evaluation follows, every other time the larger: then the squares are a pixel apart.
    """
    fields = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(IMAGE_STD),
        "resample": 3,  # bicubic, as PIL numbers it
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    write_json(folder / "preprocessor_config.json", fields)


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write an object or a list as JSON, its keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
