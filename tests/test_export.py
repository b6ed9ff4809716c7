import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from textlock import export
from textlock.export import load_exported_tower, write_transformers_folder
from textlock.models.text import TextConfig
from textlock.models.vision import VISION_CONFIGS, ModelConfig, VisionTower, build_vision_tower
from textlock.models.weights import to_nomic

from . import text_tower
from .commands import run_here

MICRO = "eva02_micro_patch8_32"


def randomised_tower(**arguments):
    tower = build_vision_tower(MICRO, **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return tower


def write(tower, folder):
    write_transformers_folder(tower, folder, logit_scale=14.25, text_tower=asdict(text_tower.describe()))


@pytest.fixture(scope="module")
def tower():
    return randomised_tower()


@pytest.fixture
def exported(tower, tmp_path):
    """The tower as it is exported into an empty folder."""
    (tmp_path / "out").mkdir()
    write(tower, tmp_path / "out")
    return tmp_path / "out"


def images(size=32):
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


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
    shapes = {key: list(value.shape) for key, value in to_nomic(tower.state_dict()).items()}
    assert shapes == released_keys()
    assert len(shapes) == 211
    assert sum(parameter.numel() for parameter in tower.parameters()) == 92_946_688


@pytest.mark.parametrize("size", [32, 48])
def test_reads_back_bit_for_bit(tmp_path, size):
    tower = randomised_tower(image_size=size)
    write(tower, tmp_path / "out")
    read = load_exported_tower(tmp_path / "out")
    assert torch.equal(read(images(size)), tower(images(size)))
    assert read.config == tower.config


def test_a_folder_gives_a_new_tower_its_weights(exported, tower):
    assert torch.equal(build_vision_tower(MICRO, weights=exported)(images()), tower(images()))


def test_folder_holds_the_released_files_and_fields(tmp_path):
    folder = tmp_path / "new" / "out"
    write(randomised_tower(dtype=torch.bfloat16), folder)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert os.listdir(folder.parent) == ["out"]
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
    assert "`owner/text`" in (folder / "README.md").read_text()
    fields = json.loads((folder / "config.json").read_text())
    numbers = {"n_embd": 64, "n_layer": 2, "n_head": 1, "n_inner": 176, "img_size": 32, "patch_size": 8}
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


def test_image_processor_gives_what_the_tower_does_itself(exported, tower):
    processor = CLIPImageProcessor.from_pretrained(exported)
    pixels = processor(list(images().permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tower(pixels), tower(images()), rtol=1e-4, atol=1e-4)
    wide = torch.zeros(3, 64, 96, dtype=torch.uint8)
    assert processor(wide, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "pooling", "embed_dim"),
    [
        (MICRO, "mean", None),
        (MICRO, "map", 32),
        ("vit_base_patch16_224", "map", None),
        ("vit_base_patch16_rope_reg1_gap_256", "map", None),
    ],
)
def test_refuses_what_the_format_cannot_hold(tmp_path, name, pooling, embed_dim):
    with torch.device("meta"):
        tower = VisionTower(VISION_CONFIGS[name], ModelConfig(pooling=pooling), embed_dim=embed_dim)
    with pytest.raises(ValueError, match="EVA02 towers with map pooling and no projection"):
        write(tower, tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_what_is_there_is_kept_and_what_fails_leaves_nothing(tower, exported, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not an empty folder"):
        write(tower, exported)

    def fail(path, fields):
        raise OSError("disk full")

    monkeypatch.setattr(export, "_write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tower, tmp_path / "other")
    assert os.listdir(tmp_path) == ["out"]


def edit_config(folder, **changes):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value != "removed"}))


def test_reads_the_fractional_inner_width_of_the_released_file(exported, tower):
    edit_config(exported, n_inner=176.0)
    assert load_exported_tower(exported).config == tower.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"prenorm": False}, "prenorm is False where EVA02 towers have True", id="post-norm"),
        pytest.param({"n_layer": 3}, "missing key blocks.2", id="depth"),
        pytest.param({"n_embd": "removed"}, "config.json does not describe .*'n_embd'", id="missing-field"),
        pytest.param({"ref_feat_shape": None}, "config.json does not describe", id="no-grid"),
    ],
)
def test_refuses_a_config_of_another_model(exported, changes, message):
    edit_config(exported, **changes)
    with pytest.raises(ValueError, match=message):
        load_exported_tower(exported)


def test_refuses_weights_without_a_head_and_a_folder_that_is_not_there(exported):
    path = exported / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if not key.startswith("selector.")}, path)
    with pytest.raises(ValueError, match="lacks the attention pooling head"):
        load_exported_tower(exported)
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json not found"):
        load_exported_tower(exported / "nowhere")


def test_a_release_that_names_no_text_tower_goes_with_that_of_v1_5(exported):
    edit_config(exported, text_tower=None)
    assert export.read_text_tower(exported) == (TextConfig(), None)
    edit_config(exported, text_tower={"name": "x"})
    with pytest.raises(ValueError, match="does not say which text tower"):
        export.read_text_tower(exported)


def test_command_exports_a_checkpoint(tower, tmp_path, monkeypatch, capsys):
    text = asdict(
        text_tower.describe(layer_norm=False, prefix="passage: ", max_length=16, layers=("Dense 32 to 64 Tanh",))
    )
    loaded = SimpleNamespace(tower=tower, logit_scale=20.0, step=7, text_tower=text)
    monkeypatch.setattr(export, "load_tower", lambda checkpoint: loaded)
    monkeypatch.setattr("sys.argv", ["export.py", "--checkpoint", "runs/x", "--output", str(tmp_path / "out")])
    export.main()
    assert torch.equal(load_exported_tower(tmp_path / "out")(images()), tower(images()))
    settings, described = export.read_text_tower(tmp_path / "out")
    assert described == json.loads(json.dumps(text))
    assert settings == TextConfig(
        name="owner/text", prefix="passage: ", max_length=16, pooling="mean", layer_norm=False, dimensions=64
    )
    assert "step 7" in capsys.readouterr().out
    # Whoever reads the card can make the same text embeddings.
    card = (tmp_path / "out/README.md").read_text()
    for row in (
        "prefix, in front of every text | `passage: `",
        "| 16 tokens",
        "| mean",
        "| Dense 32 to 64 Tanh, unit length",
    ):
        assert row in card
    assert "build_text_tower('owner/text', prefix='passage: ', max_length=16, pooling='mean', layer_norm=False" in card


def test_command_fails_in_one_line(tmp_path):
    status, _, err = run_here("export.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out")
    assert status == 2
    assert err.startswith("error: ") and "holds no checkpoint" in err and err.count("\n") == 1
