"""The folder for timm: what timm computes with it, and what is read back."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from textlock.engine.starting_weights import Options, convert
from textlock.exports import timm_format
from textlock.exports.check import compare_with_tower
from textlock.exports.reading import read_exported
from textlock.models.vision import VISION_CONFIGS, ModelConfig, VisionTower
from textlock.models.weights import load_weights

from .towers import edit_config, exported, images, random_tower

VIT = "vit_base_patch16_224"
ROPE_VIT = "vit_base_patch16_rope_reg1_gap_256"
TOWERS = {
    "EVA02": {},
    "EVA02 of another resolution, projected": {"image_size": 48, "embed_dim": 48},
    "EVA02, mean": {"pooling": "mean"},
    "EVA02, class token, projected": {"pooling": "cls", "embed_dim": 48},
    "EVA02 with a register": {"register_tokens": 1},
    "EVA02 without a LayerNorm in its MLPs": {"sub_norm": False},
    "EVA02 with a last LayerNorm": {"final_norm": True},
    "inner channels whose ratio is inexact": {"width": 60, "heads": 3, "hidden": 123},
    "ViT of such inner channels": {"architecture": VIT, "width": 60, "heads": 3, "hidden": 123},
    "ViT, class token, projected": {"architecture": VIT, "pooling": "cls", "embed_dim": 48},
    "ViT, mean": {"architecture": VIT, "pooling": "mean"},
    "ViT, map": {"architecture": VIT},
    "ViT without a last LayerNorm": {"architecture": VIT, "final_norm": False},
    "ViT with registers": {"architecture": VIT, "register_tokens": 2},
    "ViT with RoPE": {"architecture": VIT, "rotary_grid": 4},
    "ViT without positions": {"architecture": VIT, "absolute_position": False},
    "RoPE ViT, mean": {"architecture": ROPE_VIT, "pooling": "mean"},
    "RoPE ViT, map": {"architecture": ROPE_VIT},
    "RoPE ViT without layer scale": {"architecture": ROPE_VIT, "layer_scale": None, "pooling": "mean"},
}


def write(tower, folder):
    folder.mkdir()
    timm_format.write(exported(tower), folder)
    return folder


@pytest.mark.parametrize("name", TOWERS)
def test_timm_gives_the_embeddings_of_every_tower_and_it_is_read_back_to_the_bit(name, tmp_path):
    tower = random_tower(**TOWERS[name])
    folder = write(tower, tmp_path / "out")
    lines, _ = timm_format.snippets(exported(tower))
    # All towers of this table: 2.4e-7 at most.
    assert "ran these lines with timm" in compare_with_tower(lines, folder, tower, package="timm", tolerance=1e-6)
    read = read_exported(folder)
    # The start of the layer scale says nothing of a trained tower.
    assert torch.equal(read.tower(images(tower)), tower(images(tower)))
    assert (read.tower.pooling, read.logit_scale) == (tower.pooling, 14.25)
    assert read.text_tower == json.loads(json.dumps(exported(tower).text_tower))
    other = VisionTower(tower.config, ModelConfig(pooling=tower.pooling), embed_dim=tower.embed_dim).eval()
    assert load_weights(other, folder) == ()
    assert torch.equal(other(images(tower)), tower(images(tower)))


def test_the_lines_fail_their_check_without_the_epsilon_or_the_key_bias(tmp_path):
    tower = random_tower()
    with torch.no_grad():
        for block in tower.blocks:
            block.mlp.gate_up.weight *= 0.05  # so that the epsilon counts
    folder = write(tower, tmp_path / "out")
    lines, _ = timm_format.snippets(exported(tower))
    assert "ran these lines with timm" in compare_with_tower(lines, folder, tower, package="timm", tolerance=1e-6)
    with pytest.raises(ValueError, match=r"loaded by timm, differs by .* from the trained tower where 1.0e-06 is"):
        without = lines.replace("1e-05", "1e-06")
        assert without != lines
        compare_with_tower(without, folder, tower, package="timm", tolerance=1e-6)
    weights = load_file(folder / "model.safetensors")
    for number in range(2):
        weights[f"blocks.{number}.attn.qkv.bias"][64:128] = 0
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="loaded by timm, differs"):
        compare_with_tower(lines, folder, tower, package="timm", tolerance=1e-6)


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_timm_has_a_class_for_every_architecture(name, tmp_path):
    with torch.device("meta"):
        tower = VisionTower(VISION_CONFIGS[name], ModelConfig(pooling="mean"))
        arguments = timm_format._arguments(tower)
        model = timm.create_model(timm_format._architecture(tower), num_classes=0, **arguments)
    trunk = timm_format.to_timm(tower.state_dict(), patch_size=tower.config.patch_size)
    assert {key: value.shape for key, value in trunk.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_timm_prepares_images_as_evaluation_does(tmp_path):
    model = timm.create_model(f"local-dir:{write(random_tower(), tmp_path / 'out')}", pretrained=True)
    steps = timm.data.create_transform(**timm.data.resolve_model_data_config(model)).transforms
    assert [str(step) for step in steps[:2]] == [
        "Resize(size=32, interpolation=bicubic, max_size=None, antialias=True)",
        "CenterCrop(size=(32, 32))",
    ]


def test_refuses_another_epsilon(tmp_path):
    tower = random_tower(norm_eps=1e-5)
    with pytest.raises(ValueError, match="its LayerNorms have the epsilon 1e-05 instead of 1e-06; use --format trans"):
        timm_format.write(exported(tower), tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_without_their_head_are_refused(tmp_path):
    tower = random_tower()
    folder = write(tower, tmp_path / "out")
    (folder / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"head.safetensors, the rest of the tower, is not beside it"):
        load_weights(VisionTower(tower.config, ModelConfig()), folder)


def test_conversion_of_starting_weights_takes_the_head_along(tmp_path, monkeypatch):
    tower = random_tower()
    monkeypatch.setitem(VISION_CONFIGS, "eva02_micro_patch8_32", tower.config)
    write(tower, tmp_path / "out")
    source = str(tmp_path / "out")
    convert(Options(source=source, output=tmp_path / "start", model="eva02_micro_patch8_32"))
    started = load_file(tmp_path / "start" / "model.safetensors")
    assert started.keys() == tower.state_dict().keys()
    assert all(torch.equal(started[key], value) for key, value in tower.state_dict().items())


def test_says_what_a_damaged_configuration_lacks(tmp_path):
    folder = write(random_tower(), tmp_path / "out")
    edit_config(folder, tower="removed")
    with pytest.raises(ValueError, match=r"config.json lacks the field 'tower'"):
        read_exported(folder)
