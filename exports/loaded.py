"""Both towers of a checkpoint or of an exported folder, ready to embed images and texts."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.step import autocast_for, image_rows
from ..engine.trained import load_tower
from ..evals.suite import EvalConfig
from ..models.text import TextConfig, TextTower, make_text_tower
from ..models.vision import VisionTower
from .reading import is_exported, read_exported, text_settings


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint or an exported folder says of itself."""

    tower: VisionTower
    text: TextConfig
    text_tower: dict[str, Any] | None
    """The `TextTowerDescription` it was trained against; None of the released Nomic Embed Vision."""
    templates: tuple[str, ...]
    step: int | None


def load(checkpoint: Path, text_name: str | None) -> Loaded:
    """Read a run folder, one of its checkpoints, or an exported folder, whose text tower may need a name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or does not say which text tower it was trained against.
    """
    if is_exported(checkpoint):
        exported = read_exported(checkpoint)
        text = text_settings(exported.text_tower, checkpoint, text_name)
        return Loaded(exported.tower, text, exported.text_tower, EvalConfig().templates, None)
    found = load_tower(checkpoint)
    text = found.config.text if text_name is None else replace(found.config.text, name=text_name)
    return Loaded(found.tower, text, found.text_tower, found.config.evals.templates, found.step)


@dataclass(frozen=True)
class Towers:
    """An image tower and the text tower that it was trained against, on one device."""

    loaded: Loaded
    text: TextTower
    encode_images: Callable[[Tensor], Tensor]
    """uint8 [b, S, S, 3] on any device -> unit embeddings, float32 [b, d]; without gradients."""


def load_towers(checkpoint: Path, text_name: str | None, device: torch.device) -> Towers:
    """Load both towers on a device, and say on stderr how the text tower makes an embedding.

    Args:
        checkpoint: as in `load`.
        text_name: folder or hub name of the text tower; None: the one that the checkpoint names.
        device: where they compute.

    Raises:
        FileNotFoundError: there is no checkpoint, or no such text tower.
        ValueError: one of the two cannot be used, or the text tower is another one than the image tower was trained
            against.
    """
    loaded = load(checkpoint, text_name)
    tower = loaded.tower.to(device).eval()
    text = make_text_tower(loaded.text, device)
    difference = text.describe().difference_from(loaded.text_tower) if loaded.text_tower else None
    if text.embed_dim != tower.embed_dim:
        difference = f"its embeddings have {text.embed_dim} dimensions and those of images {tower.embed_dim}"
    if difference:
        raise ValueError(
            f"{checkpoint} was trained against another text tower than {loaded.text.name}: {difference}. Give the "
            "one it was trained against with --text."
        )
    print(f"text tower {loaded.text.name}: {text.recipe}", file=sys.stderr)
    autocast = autocast_for(device, "auto")

    @torch.no_grad()
    def encode_images(images: Tensor) -> Tensor:
        return image_rows(tower, images.to(device), autocast)

    return Towers(loaded, text, encode_images)


def image_fingerprint(tower: VisionTower) -> str:
    """Return the sha256 (hex) of what the embeddings of an image tower depend on: its shape, pooling and weights."""
    shape = {"config": asdict(tower.config), "pooling": tower.pooling, "embed_dim": tower.embed_dim}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
