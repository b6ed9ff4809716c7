"""The image tower of a training run, read back for evaluation and export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.vision import VisionTower, make_vision_tower
from .checkpoint import MANIFEST, Checkpoint, read_checkpoint, read_latest, require_same_keys
from .config import Config, load_config


@dataclass(frozen=True)
class LoadedTower:
    """An image tower read from a training checkpoint."""

    tower: VisionTower
    logit_scale: float
    config: Config
    folder: Path
    """The checkpoint: one of the run's checkpoints/step_* folders."""
    step: int
    samples_seen: int
    text_tower: dict[str, Any]
    """The `TextTowerDescription` of the text tower it was trained against."""


def load_tower(checkpoint: Path) -> LoadedTower:
    """Read the image tower of a step folder, or of the newest good checkpoint of a run folder, in float32 on the CPU.

    Raises FileNotFoundError when there is no checkpoint, CorruptCheckpoint when it is damaged, ValueError when the
    weights are not those of the architecture that its config names.
    """
    if (checkpoint / MANIFEST).is_file():
        found: Checkpoint | None = read_checkpoint(checkpoint)
    else:
        found, _ = read_latest(checkpoint / "checkpoints" if (checkpoint / "checkpoints").is_dir() else checkpoint)
    if found is None:
        raise FileNotFoundError(
            f"{checkpoint} holds no checkpoint: give a run folder or one of its checkpoints/step_* folders"
        )
    config = load_config(found.folder / "config.yaml")
    tower = make_vision_tower(
        config.model, image_size=config.data.image_size, embed_dim=found.embed_dim, pretrained=False
    )
    require_same_keys(found.model, tower.state_dict(), found.folder / "model.safetensors")
    tower.load_state_dict(found.model)
    scale = float(found.trainer["log_logit_scale"].double().exp())
    return LoadedTower(
        tower=tower,
        logit_scale=scale,
        config=config,
        folder=found.folder,
        step=found.progress.step,
        samples_seen=found.progress.samples_seen,
        text_tower=found.text_tower,
    )
