"""Format ``transformers``: every tower that is trained here, with the code that computes it in the folder.

The code is modeling_textlock.py and configuration_textlock.py next to this file, copied as they are; they import
nothing of this project. The weights have the names of the checkpoint.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..models.vision import ModelConfig, VisionConfig, VisionTower
from ..models.weights import load_weights
from .check import compare_with_tower
from .folder import CONFIG, WEIGHTS, Exported, Texts, write_json, write_processor, write_weights

MODEL_TYPE: Final = "textlock_vision"
_CODE: Final = ("configuration_textlock.py", "modeling_textlock.py")

# Field of VisionConfig -> field of the folder's configuration. Every field is there but the start of the layer scale.
_FIELDS: Final = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "gated": "gated_mlp",
    "sub_norm": "mlp_norm",
    "norm_eps": "layer_norm_eps",
    "class_token": "class_token",
    "register_tokens": "num_register_tokens",
    "absolute_position": "absolute_position",
    "rotary_grid": "rotary_grid",
    "final_norm": "final_norm",
}

SNIPPET: Final = """\
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "path/to/this/folder"
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    output = model(**processor([Image.open("photo.jpg")], return_tensors="pt"))
embeddings = F.normalize(output.pooler_output, dim=-1)
"""
LIBRARY: Final = "transformers"
LOADERS: Final = "transformers 4.57 or later, 5 included"


def require(exported: Exported) -> None:
    """Accept every tower."""


def write(exported: Exported, folder: Path, texts: Texts | None = None) -> None:
    """Write weights, configuration, code and image processor into an existing folder.

    Raises OSError when a file cannot be written.
    """
    tower = exported.tower
    fields = shape_fields(tower) | {
        "architectures": ["TextlockVisionModel"],
        "auto_map": {
            "AutoConfig": "configuration_textlock.TextlockVisionConfig",
            "AutoModel": "modeling_textlock.TextlockVisionModel",
        },
        "dtype": "float32",
        "logit_scale": exported.logit_scale,
        "model_type": MODEL_TYPE,
        "text_tower": exported.text_tower,
    }
    write_weights(folder, tower.state_dict())
    write_json(folder / CONFIG, fields)
    write_processor(folder, tower.image_size)
    for name in _CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def check(exported: Exported, folder: Path, texts: Texts | None = None) -> str:
    """Run the card's lines on the folder and say what they gave; raises ValueError where that is something else."""
    return compare_with_tower(SNIPPET, folder, exported.tower, package="transformers", tolerance=1e-6)


def snippets(exported: Exported, texts: Texts | None = None) -> tuple[str, str | None]:
    """Return the lines of the model card for images, and for texts those of transformers."""
    return SNIPPET, None


def build(tower: VisionTower) -> Any:
    """Return the tower as the folder's own code computes it, a ``TextlockVisionModel``."""
    from .configuration_textlock import TextlockVisionConfig  # not above: transformers takes seconds
    from .modeling_textlock import TextlockVisionModel

    model = TextlockVisionModel(TextlockVisionConfig(**shape_fields(tower)))
    model.load_state_dict(tower.state_dict())
    return model.eval()


def shape_fields(tower: VisionTower) -> dict[str, Any]:
    """Return the fields that say what the tower computes; `read` builds it from them."""
    return {theirs: getattr(tower.config, ours) for ours, theirs in _FIELDS.items()} | {
        "embedding_size": tower.embed_dim,
        "layer_scale": tower.config.layer_scale is not None,
        "pooling": tower.pooling,
    }


def read(folder: Path, fields: Mapping[str, Any]) -> VisionTower:
    """Read the tower of a folder whose config.json has these fields; its code is not run.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: a field is missing or impossible, or a key of the weights is missing or unexpected.
    """
    try:
        shape = {ours: fields[theirs] for ours, theirs in _FIELDS.items()}
        config = VisionConfig(**shape, layer_scale=1.0 if fields["layer_scale"] else None)
        tower = VisionTower(config, ModelConfig(pooling=fields["pooling"]), embed_dim=fields["embedding_size"])
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks the field {error}") from error
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG} describes no tower that can be built: {error}") from error
    if missing := load_weights(tower, folder):
        raise ValueError(f"{folder / WEIGHTS} lacks all keys of {' and '.join(missing)}, which {CONFIG} says there are")
    return tower
