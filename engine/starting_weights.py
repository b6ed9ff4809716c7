"""The command for starting weights that --model.weights cannot take as they are: other files, patches or resolutions.

    python -m textlock.engine.starting_weights timm/eva02_base_patch14_224.mim_in22k --output start
    python -m textlock.engine.starting_weights owner/name --model eva02_base_patch16_224 --output start
    python train.py --model.weights start ...

Files of torch.save are read by torch's ``weights_only`` loader, which builds tensors and containers and runs no code.
Patches of another size are resampled so that the resized image of a patch gives what the patch gave (FlexiViT,
https://arxiv.org/abs/2212.08013, section 3.4), position embeddings of another grid bicubically; both by timm.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import tyro
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from ..data.atomic import atomic_folder, require_free
from ..models.vision import ModelConfig, VisionConfig, VisionTower
from ..models.weights import TORCH_FILE, WEIGHTS_FILE, head_beside, in_our_keys, is_hub_name, load_weights
from ..settings import Settings, exit_with

# Where training code keeps the weights in what it saves.
_WRAPPERS: Final = ("state_dict", "model", "module", "model_state_dict")
_FILES: Final = (WEIGHTS_FILE, TORCH_FILE)


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Write starting weights for one of the image towers."""

    source: tyro.conf.Positional[str]
    """A .safetensors file, or one of torch.save (.bin, .pt, .pth); a folder with model.safetensors or
    pytorch_model.bin; or a hub name. Keys of timm, of Nomic Embed Vision or of this project."""
    output: Path
    """New folder, for --model.weights."""
    model: str = ModelConfig.name
    """Architecture that the weights are for, as --model.name."""
    image_size: int | None = None
    """Side of the images that it will be trained with, as --data.image-size; by default that of its name."""


def convert(options: Options) -> str:
    """Write the folder, which appears whole or not at all; return a sentence on what was changed.

    Raises:
        FileNotFoundError: the source is not there.
        ValueError: the output is not free, or the source is damaged, of unknown keys or of another tower.
        OSError: a file cannot be written.
    """
    model = ModelConfig(name=options.model, pooling="mean")
    shape = model.shape(options.image_size)
    require_free(options.output)
    path = _find(options.source)
    try:
        weights = in_our_keys(_read(path), final_norm=shape.final_norm)
        if path.suffix == ".safetensors":
            weights |= {key: value.float() for key, value in head_beside(path).items()}
        changes = _resample(weights, shape)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit {options.model}: {error}") from error
    with atomic_folder(options.output) as draft:
        save_file(weights, draft / WEIGHTS_FILE, metadata={"format": "pt"})
        if any(key.startswith("pool.") for key in weights):
            model = replace(model, pooling="map")
        projection = weights.get("projection.weight")
        tower = VisionTower(shape, model, embed_dim=None if projection is None else len(projection))
        try:
            load_weights(tower, draft)
        except ValueError as error:
            raise ValueError(f"{path} does not fit {options.model}: {error.__cause__ or error}") from error
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        origin = {"source": options.source, "file": path.name, "sha256": digest, "changes": changes}
        (draft / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return f"{len(weights)} tensors of {path}; {', '.join(changes) or 'nothing was resampled'}"


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has neither {' nor '.join(_FILES)}: name the file")
        return found[0]
    if path.is_file():
        return path
    if not is_hub_name(source):
        raise FileNotFoundError(f"weights {path} not found: give a file, a folder with {_FILES[0]} or owner/name")
    for name in _FILES:
        try:
            return Path(hf_hub_download(source, name))
        except RemoteEntryNotFoundError:
            continue
        except OSError as error:  # offline, no such repository, no access
            reason = str(error).strip().partition("\n")[0]
            raise FileNotFoundError(
                f"{source} is no local path, and {name} could not be downloaded from the hub ({reason})"
            ) from error
    raise FileNotFoundError(f"{source} on the hub has neither {' nor '.join(_FILES)}")


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return {key: value.float() for key, value in load_file(path).items()}
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # most built-in types, of a damaged file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch's weights_only loader, which runs no code, does not read it ({reason})") from error
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"it holds no tensors by name, nor has it any under {', '.join(_WRAPPERS)}")
    return {str(key): value.float().contiguous() for key, value in content.items()}


def _resample(weights: dict[str, Tensor], shape: VisionConfig) -> list[str]:
    """Bring patches and positions to those of a tower, in place; return what was changed."""
    changes = []
    patches = weights["patch_embed.weight"]
    side = round((patches.shape[1] / 3) ** 0.5)
    if 3 * side**2 != patches.shape[1]:
        raise ValueError(f"its patches have {patches.shape[1]} values, which is no square of RGB pixels")
    if side != shape.patch_size:
        resampled = resample_patch_embed(patches.unflatten(1, (3, side, side)), [shape.patch_size] * 2)
        weights["patch_embed.weight"] = resampled.flatten(1).contiguous()
        changes.append(f"patches of {side} pixels resampled to {shape.patch_size}")
    position = weights.get("position")
    if position is not None:
        grid = round((position.shape[1] - shape.prefix_tokens) ** 0.5)
        if grid**2 + shape.prefix_tokens != position.shape[1]:
            raise ValueError(
                f"its {position.shape[1]} positions are no square grid and {shape.prefix_tokens} in front of it"
            )
        if grid != shape.grid:
            weights["position"] = resample_abs_pos_embed(
                position, [shape.grid] * 2, [grid] * 2, num_prefix_tokens=shape.prefix_tokens
            ).contiguous()
            changes.append(f"positions of {grid} x {grid} patches resampled to {shape.grid} x {shape.grid}")
    return changes


def main() -> None:
    """Read the command line and convert; bad input ends in one sentence and exit status 2."""
    options = tyro.cli(Options)
    try:
        said = convert(options)
    except (ValueError, OSError) as error:
        exit_with(error)
    print(f"wrote {options.output} from {said}: train with --model.weights {options.output}")


if __name__ == "__main__":
    main()
