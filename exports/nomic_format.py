"""Format ``nomic``: the folder of the released Nomic Embed Vision, for Nomic's own modelling code.

The same weight names, configuration fields and image processor, in float32. That code is fetched from the hub by the
names in ``auto_map``; it builds EVA02 towers with attention pooling and nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..models.vision import ModelConfig, VisionConfig, VisionTower
from ..models.weights import load_weights, to_nomic
from .folder import CONFIG, WEIGHTS, Exported, Texts, write_json, write_processor, write_weights

MODEL_TYPE: Final = "nomic_bert"
# Nomic's code rounds the inner width of its MLPs up to a multiple of this.
_HIDDEN_MULTIPLE: Final = 256

# What the released configuration says of every EVA02 tower. A folder that says otherwise is not one of ours to read.
_EVA02_FIELDS: Final[dict[str, Any]] = {
    "activation_function": "swiglu",
    "causal": False,
    "eva_qkv_bias": False,
    "global_pool": None,
    "layer_norm_epsilon": 1e-6,
    "layer_scale": False,
    "learned_pos_embedding": False,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "no_cls_token": False,
    "no_embed_class": False,
    "no_last_ln": True,
    "norm_mlp": True,
    "num_channels": 3,
    "parallel_block": False,
    "prenorm": True,
    "qkv_proj_bias": True,
    "register_tokens": 0,
    "rotary_emb_base": 10000,
    "rotary_emb_fraction": 0,
    "use_pos_embed": True,
    "use_rms_norm": False,
    "use_rotary_pos_emb": True,
}

# Needed by the remote code or by transformers, without a say in what the tower computes.
_BOOKKEEPING_FIELDS: Final[dict[str, Any]] = {
    "architectures": ["NomicVisionModel"],
    "attn_pdrop": 0.0,
    "auto_map": {
        "AutoConfig": "nomic-ai/nomic-bert-2048--configuration_hf_nomic_bert.NomicBertConfig",
        "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicVisionModel",
    },
    "bos_token_id": None,
    "drop_path_rate": 0.0,
    "embd_pdrop": 0.0,
    "eos_token_id": None,
    "fused_bias_fc": True,
    "fused_dropout_add_ln": True,
    "hidden_features_scaling_factor": 1.0,
    "initializer_range": 0.02,
    "layer_scale_init": 1.0,
    "mask_token": False,
    "model_type": MODEL_TYPE,
    "n_positions": 0,
    "pad_vocab_size_multiple": 1,
    "parallel_block_tied_norm": False,
    "patch_dropout": 0,
    "patch_embed_bias": True,
    "prepre_layernom": False,
    "resid_pdrop": 0.0,
    "sinusoidal_pos_embedding": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "type_vocab_size": 2,
    "use_flash_attn": True,
    "vocab_size": 0,
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
embeddings = F.normalize(output.last_hidden_state[:, 0], dim=-1)
"""
LIBRARY: Final = "transformers"
LOADERS: Final = "transformers below 5, such as 4.57, with einops: Nomic's code does not run with transformers 5"


def require(exported: Exported) -> None:
    """Raise ValueError for a tower that Nomic's code cannot hold."""
    tower, config = exported.tower, exported.tower.config
    reasons = []
    if _read_fields(_released_fields(config)) != config:
        reasons.append("it is no EVA02 tower")
    if tower.pooling != "map":
        reasons.append(f"its pooling is {tower.pooling} instead of map")
    if tower.embed_dim != config.width:
        reasons.append(f"it has a projection from {config.width} to {tower.embed_dim}")
    if config.hidden % _HIDDEN_MULTIPLE:
        reasons.append(f"its MLPs have {config.hidden} inner channels, no multiple of {_HIDDEN_MULTIPLE}")
    if reasons:
        raise ValueError(f"Nomic's code cannot hold this tower: {', '.join(reasons)}; use --format transformers")


def write(exported: Exported, folder: Path, texts: Texts | None = None) -> None:
    """Write weights, configuration and image processor into an existing folder.

    Raises:
        OSError: a file cannot be written.
        ValueError: the format cannot hold the tower.
    """
    tower = exported.tower
    require(exported)
    said = {"logit_scale": exported.logit_scale, "text_tower": exported.text_tower}
    write_weights(folder, to_nomic(tower.state_dict()))
    write_json(folder / CONFIG, _released_fields(tower.config) | said)
    write_processor(folder, tower.image_size)


def check(exported: Exported, folder: Path, texts: Texts | None = None) -> str:
    """Say that nothing was checked."""
    return "The lines above were not run by the export, which never runs code from the hub."


def snippets(exported: Exported, texts: Texts | None = None) -> tuple[str, str | None]:
    """Return the lines of the model card for images, and for texts those of transformers."""
    return SNIPPET, None


def read(folder: Path, fields: Mapping[str, Any]) -> VisionTower:
    """Read the tower of a folder whose config.json has these fields, a released one included.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: the fields describe another architecture, or the weights do not fit it.
    """
    try:
        config = _read_fields(fields)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a Nomic Embed Vision tower: {error}") from error
    tower = VisionTower(config, ModelConfig(pooling="map"))
    if load_weights(tower, folder):
        raise ValueError(f"{folder / WEIGHTS} lacks the attention pooling head: its keys begin with selector.")
    return tower


def _released_fields(config: VisionConfig) -> dict[str, Any]:
    return {
        **_EVA02_FIELDS,
        **_BOOKKEEPING_FIELDS,
        "img_size": config.image_size,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.hidden,  # an integer: the released file's 2048.0 is refused by newer transformers
        "n_layer": config.depth,
        "patch_size": config.patch_size,
        "ref_feat_shape": [config.rotary_grid, config.rotary_grid],
    }


def _read_fields(fields: Mapping[str, Any]) -> VisionConfig:
    for key, value in _EVA02_FIELDS.items():
        if fields.get(key, value) != value:
            raise ValueError(f"{key} is {fields[key]!r} where EVA02 towers have {value!r}")
    return VisionConfig(
        image_size=int(fields["img_size"]),
        patch_size=int(fields["patch_size"]),
        width=int(fields["n_embd"]),
        depth=int(fields["n_layer"]),
        heads=int(fields["n_head"]),
        hidden=int(fields["n_inner"]),
        gated=True,
        sub_norm=True,
        class_token=True,
        register_tokens=0,
        absolute_position=True,
        rotary_grid=fields["ref_feat_shape"][0],
        layer_scale=None,
        final_norm=False,
        norm_eps=_EVA02_FIELDS["layer_norm_epsilon"],
    )
