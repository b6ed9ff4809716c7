"""The folder with its own modelling code, as transformers loads it and as it is read back here."""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from textlock.exports import transformers_format
from textlock.exports.reading import read_exported
from textlock.models.vision import VISION_CONFIGS, ModelConfig, VisionTower
from textlock.models.weights import load_weights

from .towers import edit_config, exported, images, random_tower, unit

ROPE_VIT = "vit_base_patch16_rope_reg1_gap_256"
POOLINGS = ("cls", "mean", "map")
TOWERS = {
    **{name: {"architecture": name} for name in VISION_CONFIGS},
    "of another resolution": {"image_size": 48},
    "with class token and registers": {"architecture": "vit_base_patch16_224", "register_tokens": 3},
}


def write(tower, folder):
    folder.mkdir()
    transformers_format.write(exported(tower), folder)
    return folder


def load(folder, **arguments):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **arguments).eval()


def embed(model, pixels):
    with torch.no_grad():
        return F.normalize(model(pixel_values=pixels).pooler_output.float(), dim=-1)


@pytest.fixture(scope="module")
def tower():
    """RoPE on another grid than the image's, a class token, attention pooling and a projection."""
    return random_tower(embed_dim=48, image_size=48)


@pytest.fixture(scope="module")
def folder(tower, tmp_path_factory):
    return write(tower, tmp_path_factory.mktemp("transformers") / "a folder.v1")


@pytest.fixture
def copy(tower, tmp_path):
    return write(tower, tmp_path / "copy")


@pytest.fixture(scope="module")
def pixels(tower, folder):
    pictures = [Image.fromarray(image.numpy()) for image in images(tower)]
    return AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("embed_dim", [None, 48])
@pytest.mark.parametrize(("name", "pooling"), [it for it in product(TOWERS, POOLINGS) if it != (ROPE_VIT, "cls")])
def test_every_tower_gives_its_embeddings_to_transformers_and_is_read_back_to_the_bit(
    name, pooling, embed_dim, tmp_path
):
    shape = TOWERS[name]
    tower = random_tower(pooling=pooling, embed_dim=embed_dim, **shape)
    folder = write(tower, tmp_path / "out")
    raw = images(tower)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor([Image.fromarray(image.numpy()) for image in raw], return_tensors="pt")["pixel_values"]
    model = load(folder)
    torch.testing.assert_close(embed(model, pixels), unit(tower, raw), rtol=0, atol=1e-6)
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
        torch.testing.assert_close(tokens, tower.forward_features(raw), rtol=1e-4, atol=1e-4)
    back = read_exported(folder)
    assert torch.equal(unit(back.tower, raw), unit(tower, raw))
    assert (back.tower.pooling, back.logit_scale) == (pooling, 14.25)


def test_a_process_without_textlock_loads_it(tower, folder):
    """Nor is an installed one on its path: it reads no .pth file and no PYTHONPATH."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"""
import sys
sys.path.append({site!r})
import torch
from importlib.util import find_spec
from transformers import AutoModel
assert find_spec("textlock") is None
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    pixels = torch.linspace(-1, 1, 3 * 48 * 48).view(1, 3, 48, 48)
    print(torch.nn.functional.normalize(model(pixels).pooler_output, dim=-1).tolist())
"""
    outcome = subprocess.run([sys.executable, "-ESP", "-c", code], capture_output=True, text=True, cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    found = torch.tensor(json.loads(outcome.stdout.splitlines()[-1]))
    expected = unit(tower, torch.linspace(-1, 1, 3 * 48 * 48).view(1, 3, 48, 48))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_model_made_on_the_meta_device_misses_nothing_but_its_weights(tower, folder, pixels):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True).eval()
    assert not list(model.buffers())
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True, assign=True)
    torch.testing.assert_close(embed(model, pixels), unit(tower, images(tower)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [{"embed_dim": 48}, {"architecture": ROPE_VIT, "pooling": "mean"}], ids=["map", "mean"]
)
def test_a_model_without_weights_starts_from_defined_ones(shape, tmp_path):
    folder = write(random_tower(**shape), tmp_path / "out")
    kept = {"patch_embed.weight": load_file(folder / "model.safetensors")["patch_embed.weight"]}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    state = load(folder).state_dict()
    assert torch.equal(state["patch_embed.weight"], kept["patch_embed.weight"])
    for key, value in state.items():
        if "norm" in key or "scale" in key:
            assert (value == float(not key.endswith("bias"))).all(), key
        elif key.endswith("bias") or key == "pool.latent":
            assert not value.any(), key
        elif key != "patch_embed.weight":
            assert 0.01 < value.std() < 0.03, key


def test_saved_by_transformers_and_loaded_again_in_bfloat16_it_is_the_same_model(tower, folder, pixels, tmp_path):
    load(folder).save_pretrained(tmp_path / "again")
    assert {path.name for path in folder.glob("*.py")} <= {path.name for path in (tmp_path / "again").iterdir()}
    read = read_exported(tmp_path / "again")
    assert read.tower.config == tower.config and read.text_tower == json.loads(json.dumps(exported(tower).text_tower))
    assert torch.equal(unit(read.tower, images(tower)), unit(tower, images(tower)))
    half = load(tmp_path / "again", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    # As far from the truth as our own tower in bfloat16.
    expected, ours = unit(tower, images(tower)), unit(read.tower.bfloat16(), images(tower)).float()
    assert (embed(half, pixels) - expected).norm() < 2 * (ours - expected).norm()


def test_any_batch_tuples_compilation_and_gradients(tower, folder, pixels):
    model = load(folder)
    for count in (0, 1, 7):
        tokens, embeddings = model(torch.zeros(count, 3, 48, 48), return_dict=False)
        assert tokens.shape == (count, 37, 64) and embeddings.shape == (count, 48)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(embed(compiled, pixels), embed(model, pixels), rtol=0, atol=1e-6)
    model(pixels).pooler_output.sum().backward()
    tower.zero_grad()
    tower(images(tower)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() < 1e-5 * largest, name


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, 48, 47), torch.zeros(3, 48, 48), torch.zeros(1, 3, 48, 48).byte()])
def test_other_pixels_are_refused(folder, wrong):
    with pytest.raises(ValueError, match=r"this model takes floating point \[batch, 3, 48, 48\]"):
        load(folder)(wrong)


def test_starts_a_training_as_the_weights_of_a_tower(tower, folder):
    other = VisionTower(tower.config, ModelConfig(), embed_dim=48)
    assert load_weights(other, folder) == ()
    assert torch.equal(unit(other, images(tower)), unit(tower, images(tower)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "removed"}, "lacks the field 'hidden_size'"),
        ({"hidden_size": "64"}, "describes no tower that can be built"),
        ({"num_attention_heads": 0}, "describes no tower that can be built"),
        ({"pooling": "max"}, "describes no tower that can be built"),
        ({"num_hidden_layers": 3}, "missing key blocks.2"),
        ({"num_hidden_layers": 1}, "unexpected key blocks.1"),
        ({"final_norm": True}, "missing key norm.bias"),
        ({"pooling": "mean"}, "unexpected key pool"),
        ({"embedding_size": 32}, "projection.weight has shape"),
        ({"model_type": "clip"}, "a model of type 'clip', which is not read here"),
        ({"model_type": ["clip"]}, "which is not read here"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(ValueError, match=message):
        read_exported(copy)


@pytest.mark.parametrize(
    ("prefix", "message"), [("pool.", "lacks all keys of pool"), ("pool.latent", "missing key pool.latent")]
)
def test_weights_without_a_part_are_refused(copy, prefix, message):
    path = copy / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if not key.startswith(prefix)}, path)
    with pytest.raises(ValueError, match=message):
        read_exported(copy)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json not found: give a folder that export"):
        read_exported(tmp_path / "nowhere")
