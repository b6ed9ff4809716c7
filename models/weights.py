"""Weights of other projects in this project's names, and back.

Every format differs from ours only in names and in how tensors are packed: a tensor of ours holds the rows of one or
more of theirs, one after another. A `KeyMap` says which, and one function each applies it forwards and backwards. A
key that is missing or left over is always an error that names it.

Formats: ours, timm's Eva and VisionTransformer, and the released Nomic Embed Vision. Only safetensors files are read;
engine/starting_weights.py makes them of others.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

# Our key -> the foreign keys whose rows make it up, in order; None means rows of zeros.
KeyMap = dict[str, tuple[str | None, ...]]

WEIGHTS_FILE = "model.safetensors"
# Beside weights of a format that has no place for a tower's own head: pool and projection, in this project's keys. The
# metadata of such weights names it.
HEAD_FILE = "head.safetensors"
TORCH_FILE = "pytorch_model.bin"
_CONVERT = "python -m textlock.engine.starting_weights"
# Left at their random start when a file holds none of their keys.
OPTIONAL_PARTS = ("pool", "projection")
# timm's classifier and the norm in front of it.
_TIMM_CLASSIFIER = ("head.", "fc_norm.")


def from_timm(state_dict: Mapping[str, Tensor], *, final_norm: bool = True) -> dict[str, Tensor]:
    """Translate the trunk of a timm Eva or VisionTransformer model; its classifier is dropped.

    Projections may be separate (``q_proj``), fused with ``q_bias`` and ``v_bias``, or fused with one bias; a key bias
    that timm does not have becomes zeros. The convolution of the patch embedding is flattened.

    Args:
        state_dict: timm's keys.
        final_norm: False drops the LayerNorm after the last block, for towers that have none.

    Raises:
        ValueError: a key is missing or unknown.
    """
    trunk = {key: value for key, value in state_dict.items() if not key.startswith(_TIMM_CLASSIFIER)}
    if not final_norm:
        trunk = {key: value for key, value in trunk.items() if not key.startswith("norm.")}
    patch_weight = trunk.get("patch_embed.proj.weight")
    if patch_weight is not None:
        trunk["patch_embed.proj.weight"] = patch_weight.flatten(1)
    return _pack(trunk, _timm_keys(trunk))


def to_timm(state_dict: Mapping[str, Tensor], *, patch_size: int) -> dict[str, Tensor]:
    """Translate the trunk of a tower to timm's keys, those with one bias for queries, keys and values.

    Args:
        state_dict: a tower's; its head (``pool``, ``projection``) is left out.
        patch_size: side of a patch in pixels.
    """
    trunk = {key: value for key, value in state_dict.items() if key.partition(".")[0] not in OPTIONAL_PARTS}
    shown = {f"blocks.{_count_layers(trunk, 'blocks') - 1}.", "blocks.0.attn.qkv.bias"}
    for ours, theirs in (
        ("class_token", "cls_token"),
        ("register_tokens", "reg_token"),
        ("position", "pos_embed"),
        ("norm.weight", "norm.weight"),
        ("blocks.0.mlp.gate_up.weight", "blocks.0.mlp.fc1_g.weight"),
        ("blocks.0.mlp.norm.weight", "blocks.0.mlp.norm.weight"),
        ("blocks.0.scale1", "blocks.0.gamma_1"),
    ):
        if ours in trunk:
            shown.add(theirs)
    released = _unpack(trunk, _timm_keys(shown))
    patches = released["patch_embed.proj.weight"]
    released["patch_embed.proj.weight"] = patches.unflatten(1, (3, patch_size, patch_size))
    return released


def from_nomic(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the released Nomic Embed Vision, with or without its head.

    Raises:
        ValueError: a key is missing or unknown.
    """
    has_head = any(key.startswith("selector.") for key in state_dict)
    return _pack(state_dict, _nomic_keys(_count_layers(state_dict, "layers"), has_head=has_head))


def to_nomic(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate an EVA02 tower to the keys of the released Nomic Embed Vision, each tensor in its own memory.

    Raises:
        ValueError: a key is missing, or the format has no place for it (a projection, layer scale, register tokens).
    """
    has_head = any(key.startswith("pool.") for key in state_dict)
    keys = _nomic_keys(_count_layers(state_dict, "blocks"), has_head=has_head)
    return _unpack(state_dict, keys)


def load_weights(tower: nn.Module, source: str | Path) -> tuple[str, ...]:
    """Copy weights into a tower, whatever the known format they are in.

    Args:
        tower: its parameters keep their type and device. A MAP head and a projection that the weights lack altogether
            stay as they are.
        source: a .safetensors file, a folder with model.safetensors, or a hub name "owner/name".

    Returns:
        The parts that stayed as they were, of ``pool`` and ``projection``.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be downloaded.
        ValueError: the file is damaged, of an unknown format, or does not fit; the message names the file and the key.
    """
    path = _find_weights(source)
    expected = tower.state_dict()
    try:
        state = in_our_keys(load_file(path), final_norm="norm.weight" in expected)
        state |= head_beside(path)
        present_parts = {key.partition(".")[0] for key in state}
        kept_parts = {key.partition(".")[0] for key in expected}.intersection(OPTIONAL_PARTS) - present_parts
        _require_keys(state, (key for key in expected if key.partition(".")[0] not in kept_parts))
        for key, value in state.items():
            if value.shape != expected[key].shape:
                advice = f": {_CONVERT} resamples it" if key in ("patch_embed.weight", "position") else ""
                raise ValueError(
                    f"{key} has shape {list(value.shape)} where {list(expected[key].shape)} is needed{advice}"
                )
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit this tower: {error}") from error
    tower.load_state_dict(state, strict=False)
    return tuple(sorted(kept_parts))


def _find_weights(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        # image/ is where the export of texts and images has its image tower.
        places = (WEIGHTS_FILE, TORCH_FILE, f"image/{WEIGHTS_FILE}")
        there = (name for name in places if (path / name).is_file())
        path = path / next(there, WEIGHTS_FILE)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a .safetensors file: convert it by {_CONVERT} {path} --output FOLDER")
        return path
    if path.suffix == ".safetensors" or not is_hub_name(source):
        raise FileNotFoundError(
            f"weights {path} not found: give a .safetensors file, a folder with {WEIGHTS_FILE} or owner/name"
        )
    try:
        return Path(hf_hub_download(str(source), WEIGHTS_FILE))
    except OSError as error:  # the base of the hub client's errors: offline, no such repository, no access
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{source} is no local path, and its {WEIGHTS_FILE} could not be downloaded from the hub ({reason}); where "
            f"it has a {TORCH_FILE} instead, convert that: {_CONVERT} {source} --output FOLDER"
        ) from error


def head_beside(path: Path) -> dict[str, Tensor]:
    """Return what a .safetensors file says is in a file of its own beside it, under this project's names.

    Raises ValueError where that file is missing, SafetensorError where one is damaged.
    """
    with safe_open(path, "pt") as file:
        name = (file.metadata() or {}).get("head")
    if name != HEAD_FILE:
        return {}
    head = path.with_name(HEAD_FILE)
    if not head.is_file():
        raise ValueError(f"{HEAD_FILE}, the rest of the tower, is not beside it: give a folder that holds both")
    return load_file(head)


def is_hub_name(source: str | Path) -> bool:
    """Return whether this has the form of a hub name, owner/name."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)))


def in_our_keys(state_dict: dict[str, Tensor], *, final_norm: bool) -> dict[str, Tensor]:
    """Return weights of any known format under this project's names.

    ``final_norm`` as in `from_timm`. Raises ValueError where the format is unknown, or a key missing or unknown.
    """
    if "embeddings.proj.weight" in state_dict:
        return from_nomic(state_dict)
    if "patch_embed.proj.weight" in state_dict:
        return from_timm(state_dict, final_norm=final_norm)
    if "patch_embed.weight" in state_dict:
        return state_dict
    raise ValueError(
        "it has none of patch_embed.weight (this project), patch_embed.proj.weight (timm) and embeddings.proj.weight"
        f" (Nomic Embed Vision), but {_some(state_dict)}"
    )


def _nomic_keys(depth: int, *, has_head: bool) -> KeyMap:
    keys: KeyMap = {
        "class_token": ("embeddings.cls_token",),
        "position": ("embeddings.pos_embed",),
        "patch_embed.weight": ("embeddings.proj.weight",),
        "patch_embed.bias": ("embeddings.proj.bias",),
    }
    for kind in ("weight", "bias"):
        for layer in range(depth):
            ours, theirs = f"blocks.{layer}", f"layers.{layer}"
            keys |= {
                f"{ours}.norm1.{kind}": (f"{theirs}.norm1.{kind}",),
                f"{ours}.qkv.{kind}": (f"{theirs}.attn.Wqkv.{kind}",),
                f"{ours}.out_proj.{kind}": (f"{theirs}.attn.out_proj.{kind}",),
                f"{ours}.norm2.{kind}": (f"{theirs}.norm2.{kind}",),
                f"{ours}.mlp.gate_up.{kind}": (f"{theirs}.mlp.fc12.{kind}", f"{theirs}.mlp.fc11.{kind}"),
                f"{ours}.mlp.norm.{kind}": (f"{theirs}.mlp.norm.{kind}",),
                f"{ours}.mlp.fc2.{kind}": (f"{theirs}.mlp.fc2.{kind}",),
            }
        if has_head:
            keys |= {
                "pool.latent": ("selector.attn.latent",),
                f"pool.query.{kind}": (f"selector.attn.Wq.{kind}",),
                f"pool.key_value.{kind}": (f"selector.attn.Wkv.{kind}",),
                f"pool.out_proj.{kind}": (f"selector.attn.out_proj.{kind}",),
                f"pool.norm.{kind}": (f"selector.norm1.{kind}",),
                f"pool.mlp.gate_up.{kind}": (f"selector.mlp.fc12.{kind}", f"selector.mlp.fc11.{kind}"),
                f"pool.mlp.fc2.{kind}": (f"selector.mlp.fc2.{kind}",),
            }
    return keys


def _timm_keys(state_dict: Collection[str]) -> KeyMap:
    """Key map for the variant that the file's own first block and top-level keys show."""
    keys: KeyMap = {}
    for ours, theirs in (("class_token", "cls_token"), ("register_tokens", "reg_token"), ("position", "pos_embed")):
        if theirs in state_dict:
            keys[ours] = (theirs,)

    separate_projections = "blocks.0.attn.q_proj.weight" in state_dict
    fused_bias = "blocks.0.attn.qkv.bias" in state_dict
    gated = "blocks.0.mlp.fc1_g.weight" in state_dict
    for kind in ("weight", "bias"):
        keys[f"patch_embed.{kind}"] = (f"patch_embed.proj.{kind}",)
        if "norm.weight" in state_dict:
            keys[f"norm.{kind}"] = (f"norm.{kind}",)
        for layer in range(_count_layers(state_dict, "blocks")):
            block = f"blocks.{layer}"
            projections: tuple[str | None, ...]
            if separate_projections:
                key_rows = f"{block}.attn.k_proj.weight" if kind == "weight" else None
                projections = (f"{block}.attn.q_proj.{kind}", key_rows, f"{block}.attn.v_proj.{kind}")
            elif kind == "weight" or fused_bias:
                projections = (f"{block}.attn.qkv.{kind}",)
            else:
                projections = (f"{block}.attn.q_bias", None, f"{block}.attn.v_bias")
            keys[f"{block}.qkv.{kind}"] = projections

            keys[f"{block}.norm1.{kind}"] = (f"{block}.norm1.{kind}",)
            keys[f"{block}.out_proj.{kind}"] = (f"{block}.attn.proj.{kind}",)
            keys[f"{block}.norm2.{kind}"] = (f"{block}.norm2.{kind}",)
            if gated:
                keys[f"{block}.mlp.gate_up.{kind}"] = (f"{block}.mlp.fc1_g.{kind}", f"{block}.mlp.fc1_x.{kind}")
            else:
                keys[f"{block}.mlp.fc1.{kind}"] = (f"{block}.mlp.fc1.{kind}",)
            if "blocks.0.mlp.norm.weight" in state_dict:
                keys[f"{block}.mlp.norm.{kind}"] = (f"{block}.mlp.norm.{kind}",)
            keys[f"{block}.mlp.fc2.{kind}"] = (f"{block}.mlp.fc2.{kind}",)
            if "blocks.0.gamma_1" in state_dict:
                keys[f"{block}.scale1"] = (f"{block}.gamma_1",)
                keys[f"{block}.scale2"] = (f"{block}.gamma_2",)
    return keys


def _count_layers(state_dict: Iterable[str], name: str) -> int:
    """One more than the highest layer number; at least one, so that a file without layers misses keys."""
    numbers = (re.match(rf"{name}\.(\d+)\.", key) for key in state_dict)
    return 1 + max((int(match[1]) for match in numbers if match), default=0)


def _pack(state_dict: Mapping[str, Tensor], keys: KeyMap) -> dict[str, Tensor]:
    _require_keys(state_dict, (name for theirs in keys.values() for name in theirs if name is not None))
    packed = {}
    for ours, theirs in keys.items():
        parts = [None if name is None else state_dict[name] for name in theirs]
        filler = torch.zeros_like(next(part for part in parts if part is not None))
        packed[ours] = torch.cat([filler if part is None else part for part in parts])
    return packed


def _unpack(state_dict: Mapping[str, Tensor], keys: KeyMap) -> dict[str, Tensor]:
    """Undo `_pack`, each tensor in its own memory."""
    _require_keys(state_dict, keys)
    released = {}
    for ours, theirs in keys.items():
        for name, rows in zip(theirs, state_dict[ours].chunk(len(theirs)), strict=True):
            assert name is not None  # the formats that are written have every bias
            released[name] = rows.clone()
    return released


def _require_keys(state_dict: Iterable[str], expected: Iterable[str]) -> None:
    present, expected = set(state_dict), set(expected)
    if missing := expected - present:
        raise ValueError(f"missing key {_some(missing)}")
    if unexpected := present - expected:
        raise ValueError(f"unexpected key {_some(unexpected)}")


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
