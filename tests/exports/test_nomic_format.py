"""The folder of the released Nomic Embed Vision."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from textlock.exports import nomic_format
from textlock.exports.reading import read_exported, text_settings
from textlock.models.text import TextConfig
from textlock.models.vision import VISION_CONFIGS, ModelConfig, VisionTower
from textlock.models.weights import load_weights, to_nomic

from .towers import edit_config, exported, images, random_tower, unit


def write(tower, folder):
    folder.mkdir()
    nomic_format.write(exported(tower), folder)
    return folder


@pytest.fixture(scope="module")
def tower():
    return random_tower()


@pytest.fixture
def folder(tower, tmp_path):
    return write(tower, tmp_path / "out")


def released_keys():
    """List the keys and shapes of the released file, written out from its description."""
    width, hidden, tokens = 768, 2048, 197
    keys = {
        "embeddings.cls_token": [1, 1, width],
        "embeddings.pos_embed": [1, tokens, width],
        "embeddings.proj.weight": [width, width],
        "embeddings.proj.bias": [width],
        "selector.attn.latent": [1, 1, width],
        "selector.norm1.weight": [width],
        "selector.norm1.bias": [width],
    }

    def linear(name, inputs, outputs):
        keys[f"{name}.weight"] = [outputs, inputs]
        keys[f"{name}.bias"] = [outputs]

    linear("selector.attn.Wq", width, width)
    linear("selector.attn.Wkv", width, 2 * width)
    linear("selector.attn.out_proj", width, width)
    for layer in range(12):
        for norm in ("norm1", "norm2"):
            keys[f"layers.{layer}.{norm}.weight"] = keys[f"layers.{layer}.{norm}.bias"] = [width]
        keys[f"layers.{layer}.mlp.norm.weight"] = keys[f"layers.{layer}.mlp.norm.bias"] = [hidden]
        linear(f"layers.{layer}.attn.Wqkv", width, 3 * width)
        linear(f"layers.{layer}.attn.out_proj", width, width)
    for mlp in ("selector.mlp", *(f"layers.{layer}.mlp" for layer in range(12))):
        linear(f"{mlp}.fc11", width, hidden)
        linear(f"{mlp}.fc12", width, hidden)
        linear(f"{mlp}.fc2", hidden, width)
    return keys


def test_base_tower_has_the_released_tensors():
    with torch.device("meta"):
        tower = VisionTower(VISION_CONFIGS["eva02_base_patch16_224"], ModelConfig())
    nomic_format.require(exported(tower))
    shapes = {key: list(value.shape) for key, value in to_nomic(tower.state_dict()).items()}
    assert shapes == released_keys()
    assert len(shapes) == 211
    assert sum(parameter.numel() for parameter in tower.parameters()) == 92_946_688


@pytest.mark.parametrize("changes", [{}, {"image_size": 48}])
def test_reads_back_bit_for_bit_and_starts_a_training(tmp_path, changes):
    tower = random_tower(**changes)
    read = read_exported(write(tower, tmp_path / "out"))
    assert torch.equal(unit(read.tower, images(tower)), unit(tower, images(tower)))
    assert read.tower.config == tower.config and read.logit_scale == 14.25
    other = VisionTower(tower.config, ModelConfig())
    assert load_weights(other, tmp_path / "out") == ()
    assert torch.equal(unit(other, images(tower)), unit(tower, images(tower)))


def test_folder_holds_the_released_files_and_fields(tower, tmp_path):
    folder = write(random_tower().bfloat16(), tmp_path / "out")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
    fields = json.loads((folder / "config.json").read_text())
    numbers = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 256, "img_size": 32, "patch_size": 8}
    assert all(type(fields[key]) is int for key in numbers)
    expected = {
        **numbers,
        **dict.fromkeys(("prenorm", "no_last_ln", "norm_mlp", "use_rotary_pos_emb"), True),
        "model_type": "nomic_bert",
        "architectures": ["NomicVisionModel"],
        "ref_feat_shape": [4, 4],
        "logit_scale": 14.25,
    }
    assert {key: fields[key] for key in expected} == expected


def test_image_processor_gives_what_the_tower_does_itself(folder, tower):
    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(list(images(tower).permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(unit(tower, pixels), unit(tower, images(tower)), rtol=0, atol=1e-6)
    wide = torch.zeros(3, 64, 96, dtype=torch.uint8)
    assert processor(wide, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"pooling": "mean"}, "its pooling is mean instead of map"),
        ({"embed_dim": 48}, "it has a projection from 64 to 48"),
        ({"hidden": 176}, "its MLPs have 176 inner channels, no multiple of 256"),
        ({"architecture": "vit_base_patch16_224"}, "it is no EVA02 tower"),
        ({"architecture": "vit_base_patch16_rope_reg1_gap_256"}, "it is no EVA02 tower"),
        ({"register_tokens": 1}, "it is no EVA02 tower"),
    ],
)
def test_refuses_what_nomics_code_cannot_hold(tmp_path, shape, reason):
    with pytest.raises(ValueError, match=f"cannot hold this tower: {reason}; use --format transformers"):
        nomic_format.write(exported(random_tower(**shape)), tmp_path)
    assert not os.listdir(tmp_path)


def test_reads_the_fractional_inner_width_of_the_released_file(folder, tower):
    edit_config(folder, n_inner=256.0)
    assert read_exported(folder).tower.config == tower.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prenorm": False}, "prenorm is False where EVA02 towers have True"),
        ({"n_layer": 3}, "missing key blocks.2"),
        ({"n_embd": "removed"}, "config.json does not describe .*'n_embd'"),
        ({"ref_feat_shape": None}, "config.json does not describe"),
    ],
)
def test_refuses_a_config_of_another_model(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_exported(folder)


def test_refuses_weights_without_a_head(folder):
    path = folder / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if not key.startswith("selector.")}, path)
    with pytest.raises(ValueError, match="lacks the attention pooling head"):
        read_exported(folder)


def test_a_release_that_names_no_text_tower_goes_with_that_of_v1_5(folder):
    edit_config(folder, text_tower="removed", logit_scale="removed")
    read = read_exported(folder)
    assert (read.text_tower, read.logit_scale) == (None, None)
    assert text_settings(None, folder, None) == TextConfig()
    assert text_settings(None, folder, "other") == TextConfig(name="other")


@pytest.mark.skipif(
    not {"NOMIC_CODE", "NOMIC_PYTHON"} <= os.environ.keys(),
    reason="NOMIC_CODE names no folder with Nomic's modelling code, or NOMIC_PYTHON no Python with transformers 4",
)
def test_nomics_own_code_gives_the_same_embeddings(folder, tower):
    """Its two files are contrastors' src/contrastors/models/huggingface/{configuration,modeling}_hf_nomic_bert.py."""
    for kind in ("configuration", "modeling"):
        shutil.copy(Path(os.environ["NOMIC_CODE"]) / f"{kind}_hf_nomic_bert.py", folder)
    names = {
        "AutoConfig": "configuration_hf_nomic_bert.NomicBertConfig",
        "AutoModel": "modeling_hf_nomic_bert.NomicVisionModel",
    }
    edit_config(folder, auto_map=names)
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    code = f"""
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    print(torch.nn.functional.normalize(model(pixels).last_hidden_state[:, 0], dim=-1).tolist())
"""
    command = [os.environ["NOMIC_PYTHON"], "-P", "-c", code]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    found = torch.tensor(json.loads(outcome.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, unit(tower, pixels), rtol=0, atol=1e-6)
