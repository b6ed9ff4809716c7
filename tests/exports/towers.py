"""Small image towers with random weights, and the checkpoints that they might come from."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from textlock.data.loader import DataConfig
from textlock.engine.config import Config
from textlock.engine.optim import OptimConfig
from textlock.engine.trained import LoadedTower
from textlock.exports.folder import Exported
from textlock.models.vision import VISION_CONFIGS, ModelConfig, VisionTower

from .. import text_tower

MICRO = "eva02_micro_patch8_32"
# Two blocks of two heads on a 4 x 4 grid, and inner channels that Nomic's code can hold.
SMALL = {"width": 64, "heads": 2, "depth": 2, "hidden": 256}


def random_tower(architecture=MICRO, pooling="map", embed_dim=None, **changes):
    """A tower of the shape of that name in small, every weight drawn."""
    shape = VISION_CONFIGS[architecture]
    grid = None if shape.rotary_grid is None else 4
    shape = replace(shape, **{**SMALL, "image_size": 4 * shape.patch_size, "rotary_grid": grid, **changes})
    tower = VisionTower(shape, ModelConfig(pooling=pooling), embed_dim=embed_dim).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            # Queries and keys so large that attention is far from a mean of all tokens.
            parameter.normal_(std=0.25 if "qkv" in name else 0.1, generator=generator)
    return tower


def images(tower, count=2):
    shape = (count, tower.image_size, tower.image_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def unit(tower, pixels):
    return F.normalize(tower(pixels), dim=-1)


def exported(tower, **text):
    return Exported(tower, 14.25, asdict(text_tower.describe(**text)))


def loaded(tower, run_dir, *, described=None, **settings):
    """What is read from the seventh step of a run in this folder."""
    data = {
        "shards": ("/home/alice/secret/train", "s3://secret/web:0.5"),
        "batch_size": 16,
        "image_size": tower.image_size,
        "workers": 1,
    }
    return LoadedTower(
        tower=tower,
        logit_scale=20.0,
        config=Config(run_dir=str(run_dir), data=DataConfig(**data), optim=OptimConfig(steps=7), **settings),
        folder=Path(run_dir) / "checkpoints" / "step_00000007",
        step=7,
        samples_seen=112,
        text_tower=asdict(described or text_tower.describe()),
    )


def edit_config(folder, **changes):
    """Change fields of a folder's config.json; those that become "removed" go."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value != "removed"}))
