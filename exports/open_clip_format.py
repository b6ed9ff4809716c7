"""Format ``open_clip``: a CLIP of both towers for open_clip, with the image tower of this project beside it.

open_clip_model.safetensors and open_clip_config.json are a ``CustomTextCLIP``: open_clip's own VisionTransformer, which
has no EVA02, no RoPE, no registers and no such attention pooling, and its adapter for text encoders of transformers,
which pools by mean or class token, without layers behind. The text weights are in the folder; their configuration is
not, open_clip asks the hub for it by name. The tokenizer puts the prefix in front of every text but an
empty one, which tokenizers has no normaliser for.

A patch bias, which that VisionTransformer does not have, is in the positions of the patches; model.safetensors and
config.json keep the tower to the bit, and are what is read back. transformers, by which open_clip loads the tokenizer,
would ask whether to run code if config.json named any, so there is none.
"""

import importlib.util
import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from ..models.text import TextTower
from ..models.text_folder import first_line, local_folder
from ..models.vision import IMAGE_MEAN, IMAGE_STD, VisionTower
from . import transformers_format
from .check import require_near
from .folder import CONFIG, Exported, Texts, write_json, write_weights

MODEL_TYPE: Final = "textlock_open_clip"
MODEL: Final = "open_clip_model.safetensors"
MODEL_CONFIG: Final = "open_clip_config.json"
LIBRARY: Final = "open_clip"
LOADERS: Final = "open_clip 3 or later (open-clip-torch), with transformers"
_TOLERANCE: Final = 1e-5

SNIPPET: Final = """\
import open_clip
import torch
from PIL import Image

folder = "path/to/this/folder"
model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + folder)
tokenizer = open_clip.get_tokenizer("local-dir:" + folder)  # writes the prefix itself, but for an empty text
with torch.no_grad():
    embeddings = model.eval().encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)
    texts = model.encode_text(tokenizer(["a red bicycle", "a bowl of soup"]), normalize=True)
print(embeddings @ texts.T)
"""

_POOLERS: Final = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
# Those of open_clip's list that are encoders alone.
_ARCHITECTURES: Final = ("bert", "roberta", "xlm-roberta")
_TEXTS: Final = ["a red bicycle", "two dogs on a beach at dusk, one of them wet", "soup " * 200]


def require(exported: Exported) -> None:
    """Raise ValueError for towers that open_clip cannot compute, or where open_clip is not installed."""
    tower, config = exported.tower, exported.tower.config
    reasons = []
    if config.gated or config.sub_norm:
        reasons.append("its MLPs are SwiGLU")
    if config.rotary_grid is not None:
        reasons.append("it has RoPE")
    if config.register_tokens or not config.class_token:
        reasons.append("its tokens are other than a class token and the patches")
    if not config.final_norm:
        reasons.append("it has no last LayerNorm")
    if tower.pooling == "map":
        reasons.append("its pooling is map instead of cls or mean")
    if reasons:
        raise ValueError(f"open_clip cannot hold this tower: {', '.join(reasons)}; use --format transformers")
    if importlib.util.find_spec("open_clip") is None:
        raise ValueError("--format open_clip needs open-clip-torch: pip install --editable '.[open-clip]'")
    assert exported.text_tower is not None  # every checkpoint has one
    _require_text(exported.text_tower)


def _require_text(described: Mapping[str, Any]) -> None:
    """Raise ValueError where open_clip cannot make the embeddings of a stored `TextTowerDescription`."""
    recipe = described["recipe"]
    reasons = []
    if list(recipe["pooling"]) not in [[pooling] for pooling in _POOLERS]:
        reasons.append(f"its pooling is {' and '.join(recipe['pooling'])} instead of mean or cls")
    if recipe["layers"]:
        reasons.append(f"it has layers after pooling ({', '.join(recipe['layers'])})")
    if recipe["layer_norm"]:
        reasons.append("it has a LayerNorm after pooling")
    if not recipe["pool_prefix"]:
        reasons.append("the tokens of its prefix are left out of pooling")
    if reasons:
        raise ValueError(f"open_clip cannot hold this text tower: {', '.join(reasons)}; use --format transformers")
    if described["name"] is None:
        raise ValueError("open_clip asks the hub for the configuration of the text tower: give its --text-name")


def write(exported: Exported, folder: Path, texts: Texts | None) -> None:
    """Write what is read back, and open_clip's model, configuration and tokenizer, into an existing folder.

    Raises:
        OSError: a file cannot be written.
        ValueError: the text tower is of an architecture that open_clip does not know.
    """
    assert texts is not None  # export.py gives them to this format
    fields = transformers_format.shape_fields(exported.tower) | {
        "logit_scale": exported.logit_scale,
        "model_type": MODEL_TYPE,
        "text_tower": exported.text_tower,
    }
    write_weights(folder, exported.tower.state_dict())
    write_json(folder / CONFIG, fields)
    _write_model(exported, texts.tower, folder)


def read(folder: Path, fields: Mapping[str, Any]) -> VisionTower:
    """Read the image tower of a folder whose config.json has these fields, as that of ``transformers`` is read."""
    return transformers_format.read(folder, fields)


def _write_model(exported: Exported, text: TextTower, folder: Path) -> None:
    import open_clip  # not above: it takes seconds, and not everybody has it

    tower, described = exported.tower, exported.text_tower
    assert described is not None and exported.logit_scale is not None  # every checkpoint has both
    architecture = text.encoder.config.model_type
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"open_clip cannot hold this text tower: it is a {architecture}, and known are {', '.join(_ARCHITECTURES)}"
            "; use --format transformers"
        )
    if text.encoder_folder != local_folder(text.config.name):
        raise ValueError(
            f"open_clip cannot hold this text tower: its configuration is in the folder {text.encoder_folder.name} of "
            "it, where open_clip does not look; use --format transformers"
        )
    configuration = _configuration(tower, text, described["name"])
    try:
        model = open_clip.model.CustomTextCLIP(**configuration | {"text_cfg": _local(configuration, text)})
        model.visual.load_state_dict(_visual(tower))
        encoder = {key: value for key, value in text.encoder.state_dict().items() if not key.startswith("pooler.")}
        model.text.transformer.load_state_dict(encoder)
        with torch.no_grad():
            model.logit_scale.fill_(math.log(exported.logit_scale))
            if text.embed_dim != text.encoder.config.hidden_size:
                model.text.proj.weight.copy_(torch.eye(*model.text.proj.weight.shape))
    except OSError:
        raise
    except Exception as error:  # whatever open_clip and transformers raise of an encoder that they cannot hold
        raise ValueError(f"open_clip cannot hold these towers: {first_line(error)}") from error
    write_weights(folder, model.state_dict(), name=MODEL)
    preprocessing = {
        "interpolation": "bicubic",
        "mean": list(IMAGE_MEAN),
        "mode": "RGB",
        "resize_mode": "shortest",
        "size": tower.image_size,
        "std": list(IMAGE_STD),
    }
    write_json(
        folder / MODEL_CONFIG, {"model_cfg": configuration | {"custom_text": True}, "preprocess_cfg": preprocessing}
    )
    _write_tokenizer(text, folder)


def _local(configuration: Mapping[str, Any], text: TextTower) -> dict[str, Any]:
    """Return the configuration of the texts with the encoder's folder here in place of its name on the hub."""
    return configuration["text_cfg"] | {"hf_model_name": str(text.encoder_folder)}


def _configuration(tower: VisionTower, text: TextTower, name: str) -> dict[str, Any]:
    config = tower.config
    (pooling,) = text.recipe.pooling
    whole = text.embed_dim == text.encoder.config.hidden_size
    return {
        "embed_dim": tower.embed_dim,
        "text_cfg": {
            "context_length": text.recipe.max_length,
            "hf_model_name": name,
            "hf_model_pretrained": False,
            "hf_pooler_type": _POOLERS[pooling],
            "hf_proj_type": None if whole else "linear",  # the first numbers of an embedding
            "hf_tokenizer_name": name,
        },
        "vision_cfg": {
            "head_width": config.head_dim,
            "image_size": config.image_size,
            "layers": config.depth,
            "ls_init_value": None if config.layer_scale is None else 1.0,
            "mlp_ratio": (config.hidden + 0.5) / config.width,  # open_clip rounds the product with the width down
            "no_ln_pre": True,
            "norm_kwargs": {"eps": config.norm_eps},
            "patch_size": config.patch_size,
            "pool_type": {"cls": "tok", "mean": "avg"}[tower.pooling],
            "width": config.width,
        },
    }


def _visual(tower: VisionTower) -> dict[str, Tensor]:
    """Return the tower under the names of open_clip's VisionTransformer."""
    config = tower.config
    state = {key: value.detach().to("cpu", torch.float32) for key, value in tower.state_dict().items()}
    position = state["position"][0].double() if config.absolute_position else torch.zeros(config.tokens, config.width)
    position = torch.cat((position[:1], position[1:] + state["patch_embed.bias"]))
    projection = state["projection.weight"].T if tower.projection is not None else torch.eye(config.width)
    patches = state["patch_embed.weight"].unflatten(1, (3, config.patch_size, config.patch_size))
    theirs = {
        "class_embedding": state["class_token"][0, 0],
        "conv1.weight": patches,
        "ln_post.bias": state["norm.bias"],
        "ln_post.weight": state["norm.weight"],
        "positional_embedding": position.float(),
        "proj": projection,
    }
    names = {
        "norm1.": "ln_1.",
        "qkv.": "attn.in_proj_",
        "out_proj.": "attn.out_proj.",
        "norm2.": "ln_2.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }
    for layer in range(config.depth):
        ours, block = f"blocks.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            theirs |= {f"{block}{there}{kind}": state[f"{ours}{here}{kind}"] for here, there in names.items()}
        if config.layer_scale is not None:
            theirs |= {f"{block}ls_{number}.gamma": state[f"{ours}scale{number}"] for number in (1, 2)}
    return theirs


def _write_tokenizer(text: TextTower, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast  # not above: it takes seconds

    tokenizer = Tokenizer.from_str(text.padding_tokenizer().to_str())
    padding = tokenizer.padding
    assert padding is not None
    if text.recipe.prefix:
        [*others] = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(text.recipe.prefix), *others])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=tokenizer.id_to_token(text.encoder.config.pad_token_id),
        padding_side="right",
        truncation_side=json.loads(tokenizer.to_str())["truncation"]["direction"].lower(),
        model_max_length=text.recipe.max_length,
    )
    wrapped.save_pretrained(folder)


def snippets(exported: Exported, texts: Texts | None) -> tuple[str, str | None]:
    """Return the lines of the model card, which embed images and texts."""
    return SNIPPET, ""


def check(exported: Exported, folder: Path, texts: Texts | None) -> str:
    """Load the folder by open_clip and say how far its embeddings of random images and of texts are from the towers'.

    Raises ValueError where it does not load, or they are others.
    """
    import open_clip

    assert texts is not None and exported.text_tower is not None
    tower, text = exported.tower, texts.tower
    size, text_cfg = tower.image_size, _local(_configuration(tower, text, exported.text_tower["name"]), text)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        model = open_clip.create_model(f"local-dir:{folder}", text_cfg=text_cfg).eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(_TEXTS)
        with torch.no_grad():
            images = model.encode_image(pixels, normalize=True)
            rows = model.encode_text(tokens, normalize=True)
    except Exception as error:  # whatever open_clip, transformers and the file system raise
        raise ValueError(f"open_clip cannot load the folder as it was written: {first_line(error)}") from error
    with torch.no_grad():
        expected = F.normalize(tower(pixels), dim=-1)
    of_images = require_near(images, expected, _TOLERANCE, "open_clip", "the trained tower")
    of_texts = require_near(rows, text.encode(_TEXTS), _TOLERANCE, "open_clip", "the text tower")
    return (
        f"The export loaded the folder with open_clip {version('open_clip_torch')}: embeddings of random images "
        f"differed from those of the trained tower by {of_images:.0e} at most, those of texts by {of_texts:.0e}."
    )
