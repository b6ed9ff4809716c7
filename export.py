"""Write a checkpoint as a folder that other software loads.

    python export.py --checkpoint runs/demo --format transformers --output exported/

``transformers`` is the folder of the released Nomic Embed Vision: the same weight names, configuration fields and image
processor, in float32. It describes EVA02 towers with attention pooling and nothing else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save_file

from textlock.data.atomic import atomic_folder
from textlock.engine.trained import load_tower
from textlock.models.text import TextConfig, TextTowerDescription
from textlock.models.vision import IMAGE_MEAN, IMAGE_STD, ModelConfig, VisionConfig, VisionTower
from textlock.models.weights import load_weights, to_nomic
from textlock.settings import exit_with

# What the released configuration says of every EVA02 tower. A folder that says otherwise is not one of ours to read.
_EVA02_FIELDS: dict[str, Any] = {
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
_BOOKKEEPING_FIELDS: dict[str, Any] = {
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
    "model_type": "nomic_bert",
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

_MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
---

# Image encoder aligned with {text_tower}

Embeds {size} x {size} images into the latent space of the text encoder `{text_tower}`: {embed_dim} numbers an image,
compared by cosine. It was trained by Locked Text Tuning with textlock; the logit scale ended at {logit_scale:.4f}.
Weights and fields are those of Nomic Embed Vision, so whatever loads that model loads this one.

```python
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokens = model(**processor(images, return_tensors="pt")).last_hidden_state
embeddings = F.normalize(tokens[:, 0], dim=-1)
```

Without remote code: `textlock.export.load_exported_tower("path/to/this/folder")`.

## Text embeddings

Other text embeddings than these are not in its space:

| text encoder | `{text_tower}`{revision} |
| --- | --- |
| prefix, in front of every text | {prefix} |
| longest text | {max_length} tokens, prefix included{lower_case} |
| pooling | {pooling} |
| after pooling | {after} |
| dimensions | {embed_dim} |

`textlock.models.text.build_text_tower({text_tower!r}, {settings})` computes them.
"""


def write_transformers_folder(
    tower: VisionTower, folder: Path, *, logit_scale: float, text_tower: Mapping[str, Any]
) -> None:
    """Write a tower as a folder in the format of the released Nomic Embed Vision.

    The folder appears whole or not at all.

    Args:
        tower: an EVA02 tower with attention pooling and no projection; its weights are written in float32.
        folder: must not exist, or be empty.
        logit_scale: factor on the cosines at the end of training, kept in config.json.
        text_tower: `TextTowerDescription` of the text tower it was trained against, as a dict; kept in config.json, as
            figures with another one are meaningless.

    Raises:
        ValueError: the format cannot hold this tower, or ``folder`` is not empty.
    """
    released = _released_fields(tower)
    with atomic_folder(folder) as draft:
        weights = {key: value.detach().to("cpu", torch.float32) for key, value in tower.state_dict().items()}
        save_file(to_nomic(weights), draft / "model.safetensors", metadata={"format": "pt"})
        _write_json(draft / "config.json", {**released, "logit_scale": logit_scale, "text_tower": dict(text_tower)})
        _write_json(draft / "preprocessor_config.json", _processor_fields(tower.image_size))
        (draft / "README.md").write_text(_model_card(tower, logit_scale, text_tower), encoding="utf-8")


def load_exported_tower(folder: Path) -> VisionTower:
    """Read a folder in the format of the released Nomic Embed Vision; its config.json alone gives the architecture.

    Returns:
        The tower in float32 on the CPU.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        ValueError: config.json describes another architecture, or the weights do not fit it.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: give a folder written by export.py --format transformers")
    try:
        config = _read_fields(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a Nomic Embed Vision tower: {error}") from error
    tower = VisionTower(config, ModelConfig(pooling="map"))
    if load_weights(tower, folder):
        raise ValueError(
            f"{folder / 'model.safetensors'} lacks the attention pooling head: its keys begin with selector."
        )
    return tower


def read_text_tower(folder: Path) -> tuple[TextConfig, dict[str, Any] | None]:
    """Return the settings of the text tower that an exported folder was trained against, and its description.

    The released Nomic Embed Vision says neither; it goes with Nomic Embed Text v1.5, without a description to compare.

    Raises:
        ValueError: the folder's config.json says it in another form.
    """
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8")).get("text_tower")
        if described is None:
            return TextConfig(), None
        return TextTowerDescription.config_of(described), described
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not say which text tower belongs to it: {error}") from error


def _model_card(tower: VisionTower, logit_scale: float, text_tower: Mapping[str, Any]) -> str:
    recipe = text_tower["recipe"]
    text = TextTowerDescription.config_of(text_tower)
    settings = {field.name: getattr(text, field.name) for field in fields(text) if field.name != "name"}
    after = [*recipe["layers"], *(["LayerNorm without weights, eps 1e-5"] if recipe["layer_norm"] else [])]
    return _MODEL_CARD.format(
        text_tower=text.name,
        revision=f", commit {text_tower['revision']}" if text_tower["revision"] else "",
        size=tower.image_size,
        embed_dim=tower.embed_dim,
        logit_scale=logit_scale,
        prefix=(f"`{recipe['prefix']}`" if recipe["prefix"] else "none")
        + ("" if recipe["pool_prefix"] else ", whose tokens are left out of pooling"),
        max_length=recipe["max_length"],
        lower_case="; lower-cased" if recipe["lower_case"] else "",
        pooling=" and ".join(recipe["pooling"]),
        after=", ".join([*after, "unit length"]),
        settings=", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None),
    )


def _released_fields(tower: VisionTower) -> dict[str, Any]:
    config = tower.config
    released = {
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
    # The format holds what it can describe: a tower whose description reads back as another one does not fit.
    if tower.pooling != "map" or tower.embed_dim != config.width or _read_fields(released) != config:
        raise ValueError(
            "the transformers format holds EVA02 towers with map pooling and no projection, and this tower is not one:"
            " export such a tower, or use the checkpoint itself"
        )
    return released


def _read_fields(fields: dict[str, Any]) -> VisionConfig:
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


def _processor_fields(size: int) -> dict[str, Any]:
    return {
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


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a checkpoint as a folder that other software loads."""

    checkpoint: Path
    """A run folder, for its newest checkpoint, or one of its checkpoints."""
    output: Path
    """Folder to write; must not exist, or be empty."""
    format: Literal["transformers"] = "transformers"
    """transformers: the folder of the released Nomic Embed Vision."""


def main() -> None:
    """Run the command line."""
    options = tyro.cli(ExportConfig)
    try:
        loaded = load_tower(options.checkpoint)
        write_transformers_folder(
            loaded.tower,
            options.output,
            logit_scale=loaded.logit_scale,
            text_tower=loaded.text_tower,
        )
    except (ValueError, OSError) as error:
        exit_with(error)
    print(f"wrote {options.output} from step {loaded.step} of {options.checkpoint}")


if __name__ == "__main__":
    main()
