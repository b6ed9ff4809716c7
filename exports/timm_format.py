"""Format ``timm``: a folder for ``timm.create_model``, with what follows timm's trunk in a file of its own.

model.safetensors and config.json are timm's: every tower is an Eva or a VisionTransformer there, which pools as the
tower does, or not at all where the tower has attention pooling: timm's head of that name has another residual.
head.safetensors holds the attention pooling and the projection in the names of the checkpoint, where the tower has
them, and the model card the lines that compute them. Attention is timm's ``rope`` type, the one with a key bias.

timm has a single epsilon for all LayerNorms, 1e-6, where that in the MLPs of EVA02 is 1e-5 here: the card's lines set
it. Weights are kept bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..models.block import SUB_NORM_EPS
from ..models.vision import IMAGE_MEAN, IMAGE_STD, VisionTower
from ..models.weights import HEAD_FILE, OPTIONAL_PARTS, to_timm
from . import transformers_format
from .check import compare_with_tower
from .folder import CONFIG, Exported, Texts, write_json, write_weights

MODEL_TYPE: Final = "textlock_timm"
LIBRARY: Final = "timm"
LOADERS: Final = "timm 1.0.31 or later"
# Of timm's LayerNorms. Its configuration cannot say another.
_NORM_EPS: Final = 1e-6

_TRUNK_LINES: Final = """\
import timm
import torch
import torch.nn.functional as F
from PIL import Image
{imports}
folder = "path/to/this/folder"
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
{epsilon}transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    output = model(transform(Image.open("photo.jpg").convert("RGB"))[None])
"""
_EPSILON_LINES: Final = """\
for block in model.blocks:
    block.mlp.norm.eps = {sub_norm_eps}  # timm's configuration cannot say it
"""
_POOL_LINES: Final = """\
def linear(x, name):
    return F.linear(x, head[f"pool.{{name}}.weight"], head[f"pool.{{name}}.bias"])

def split(x):  # [b, tokens, width] to [b, heads, tokens, width / heads]
    return x.unflatten(-1, ({heads}, -1)).transpose(1, 2)

query = linear(head["pool.latent"], "query").expand(len(output), -1, -1)
key, value = linear(output, "key_value").chunk(2, dim=-1)
read = F.scaled_dot_product_attention(split(query), split(key), split(value)).flatten(1)
norm = head["pool.norm.weight"], head["pool.norm.bias"]
hidden = F.layer_norm(linear(read, "out_proj"), norm[0].shape, *norm, eps={norm_eps})
{mlp}output = output[:, 0] + linear(hidden, "mlp.fc2")
"""
_GATED_LINES: Final = """\
gate, up = linear(hidden, "mlp.gate_up").chunk(2, dim=-1)
hidden = F.silu(gate) * up
"""
_PLAIN_LINES: Final = """\
hidden = F.gelu(linear(hidden, "mlp.fc1"))
"""


def snippets(exported: Exported, texts: Texts | None = None) -> tuple[str, str | None]:
    """Return the lines of the model card for images, which depend on the tower, and for texts those of transformers."""
    tower, config = exported.tower, exported.tower.config
    has_head = tower.pool is not None or tower.projection is not None
    lines = _TRUNK_LINES.format(
        imports="from safetensors.torch import load_file\n" if has_head else "",
        epsilon=_EPSILON_LINES.format(sub_norm_eps=SUB_NORM_EPS) if config.sub_norm else "",
    )
    if has_head:
        lines += f'head = load_file(folder + "/{HEAD_FILE}")\n'
    if tower.pool is not None:
        mlp = _GATED_LINES if config.gated else _PLAIN_LINES
        lines += "\n" + _POOL_LINES.format(heads=config.heads, norm_eps=config.norm_eps, mlp=mlp)
    if tower.projection is not None:
        lines += 'output = output @ head["projection.weight"].T\n'
    return lines + "embeddings = F.normalize(output, dim=-1)\n", None


def check(exported: Exported, folder: Path, texts: Texts | None = None) -> str:
    """Run the card's lines on the folder and say what they gave; raises ValueError where that is something else."""
    lines, _ = snippets(exported)
    return compare_with_tower(lines, folder, exported.tower, package="timm", tolerance=1e-5)


def require(exported: Exported) -> None:
    """Raise ValueError for a tower that timm's models cannot compute."""
    epsilon = exported.tower.config.norm_eps
    if epsilon != _NORM_EPS:
        raise ValueError(
            f"timm cannot hold this tower: its LayerNorms have the epsilon {epsilon:g} instead of "
            f"{_NORM_EPS:g}; use --format transformers"
        )


def write(exported: Exported, folder: Path, texts: Texts | None = None) -> None:
    """Write weights, head and configuration into an existing folder.

    Raises:
        OSError: a file cannot be written.
        ValueError: the format cannot hold the tower.
    """
    tower = exported.tower
    require(exported)
    state = tower.state_dict()
    head = {key: value for key, value in state.items() if key.partition(".")[0] in OPTIONAL_PARTS}
    if head:
        write_weights(folder, head, name=HEAD_FILE)
    trunk = to_timm(state, patch_size=tower.config.patch_size)
    write_weights(folder, trunk, head=HEAD_FILE if head else None)
    fields = {
        "architecture": _architecture(tower),
        "logit_scale": exported.logit_scale,
        "model_args": _arguments(tower),
        "model_type": MODEL_TYPE,
        "num_classes": 0,
        "num_features": tower.config.width,
        "pretrained_cfg": {
            "crop_mode": "center",
            "crop_pct": 1.0,
            "fixed_input_size": True,
            "input_size": [3, tower.image_size, tower.image_size],
            "interpolation": "bicubic",
            "mean": list(IMAGE_MEAN),
            "num_classes": 0,
            "std": list(IMAGE_STD),
        },
        "text_tower": exported.text_tower,
        "tower": transformers_format.shape_fields(tower),
    }
    write_json(folder / CONFIG, fields)


def read(folder: Path, fields: Mapping[str, Any]) -> VisionTower:
    """Read the tower of a folder whose config.json has these fields.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: a field is missing or impossible, or a key of the weights is missing or unexpected.
    """
    shape = fields.get("tower")
    if not isinstance(shape, Mapping):
        raise ValueError(f"{folder / CONFIG} lacks the field 'tower'")
    return transformers_format.read(folder, shape)


def _is_vision_transformer(tower: VisionTower) -> bool:
    """Whether it is a plain ViT, which timm has a class of its own for; Eva holds every tower."""
    config = tower.config
    has_more = config.gated or config.register_tokens or config.layer_scale is not None or config.rotary_grid
    return config.absolute_position and not has_more


def _architecture(tower: VisionTower) -> str:
    """Return timm's name for the class and, by its arguments, the nearest of its towers."""
    if _is_vision_transformer(tower):
        return "vit_base_patch16_224"
    # An argument cannot take back the layer scale of the second.
    return "eva02_base_patch14_224" if tower.config.layer_scale is None else "vit_base_patch16_rope_reg1_gap_256"


def _arguments(tower: VisionTower) -> dict[str, Any]:
    """Return arguments of timm's class, every one in which timm's named tower may differ from this."""
    config = tower.config
    arguments: dict[str, Any] = {
        "class_token": config.class_token,
        "depth": config.depth,
        "embed_dim": config.width,
        "global_pool": {"cls": "token", "mean": "avg", "map": ""}[tower.pooling],
        "img_size": config.image_size,
        "mlp_ratio": (config.hidden + 0.5) / config.width,  # timm rounds the product with the width down
        "num_heads": config.heads,
        "patch_size": config.patch_size,
    }
    if _is_vision_transformer(tower):
        return arguments | {"fc_norm": False, "final_norm": config.final_norm}
    arguments |= {
        "attn_type": "rope",
        "num_reg_tokens": config.register_tokens,
        "qkv_fused": True,
        "scale_mlp": config.sub_norm,
        "swiglu_align_to": 1,  # any but 0: timm has another class, of other keys, for SwiGLU without a LayerNorm
        "swiglu_mlp": config.gated,
        "use_abs_pos_emb": config.absolute_position,
        "use_fc_norm": False,
        "use_post_transformer_norm": config.final_norm,
        "use_rot_pos_emb": config.rotary_grid is not None,
    }
    if config.rotary_grid is not None:
        arguments["ref_feat_shape"] = [config.rotary_grid] * 2
    if config.layer_scale is not None:
        arguments["init_values"] = 1.0
    return arguments
