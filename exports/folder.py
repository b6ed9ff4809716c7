"""What every exported folder has: weights in safetensors, a configuration, an image processor."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

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


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write model.safetensors in float32, with the mark without which transformers refuses it.

    Raises OSError when it cannot be written.
    """
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in weights.items()}
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # also of a full disk
        raise OSError(f"{folder / WEIGHTS} could not be written: {first_line(error)}") from error


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
