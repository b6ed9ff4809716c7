"""The folder for open_clip: what open_clip computes with it, and what is refused."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from textlock.exports import open_clip_format
from textlock.exports.folder import Texts
from textlock.exports.open_clip_format import SNIPPET, check, require, write
from textlock.exports.reading import read_exported
from textlock.models.text import build_text_tower

from ..models.text_folders import WIDTH, write_encoder, write_sentence_folder
from .towers import exported, images, random_tower, unit

open_clip = pytest.importorskip("open_clip")
VIT = "vit_base_patch16_224"
ROPE_VIT = "vit_base_patch16_rope_reg1_gap_256"
TOWERS = {
    "class token, projected": {"pooling": "cls", "embed_dim": WIDTH},
    "class token": {"pooling": "cls", "width": WIDTH},
    "mean, layer scale": {"pooling": "mean", "embed_dim": WIDTH, "layer_scale": 0.1},
    "without positions, uneven inner channels": {
        "pooling": "cls",
        "embed_dim": WIDTH,
        "absolute_position": False,
        "width": 60,
        "heads": 3,
        "hidden": 123,  # 60 * (123 / 60) is less than 123
    },
    "another epsilon": {"pooling": "mean", "embed_dim": WIDTH, "norm_eps": 1e-3},
}
CAPTIONS = ["two dogs", "a red circle and a blue square on the left of a green dot, and a yellow star", "Dog"]


def text_tower(folder, architecture="bert", pooling="mean", **settings):
    folder = write_sentence_folder(folder / "text", write_encoder(folder / architecture, architecture))
    return build_text_tower(folder, **{"pooling": pooling, "prefix": "two dogs: ", "max_length": 12, **settings})


def written(tower, text, folder):
    folder.mkdir()
    source = exported(tower, name=text.config.name, layer_norm=False)
    texts = Texts(text, copied=False)
    write(source, folder, texts)
    said = check(source, folder, texts)
    return [float(number) for number in re.findall(r"\d+e[-+]\d+", said)]


def run_lines(folder, tmp_path, pixels):
    """Run the lines of the card on an image and the captions."""
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    lines = SNIPPET.replace('"path/to/this/folder"', repr(str(folder)))
    lines = lines.replace('"photo.jpg"', repr(str(tmp_path / "photo.png")))
    lines = lines.replace('["a red bicycle", "a bowl of soup"]', repr(CAPTIONS))
    names = {}
    exec(lines, names)
    return names["embeddings"], names["texts"], names["model"]


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip_gives_the_embeddings_of_every_tower_that_it_can_hold(name, tmp_path):
    tower = random_tower(VIT, **TOWERS[name])
    text = text_tower(tmp_path)
    of_images, of_texts = written(tower, text, tmp_path / "out")
    assert of_images < 1e-6 and of_texts < 1e-6
    found, texts, model = run_lines(tmp_path / "out", tmp_path, images(tower, 1)[0])
    torch.testing.assert_close(found, unit(tower, images(tower, 1)), rtol=0, atol=1e-6)
    torch.testing.assert_close(texts, text.encode(CAPTIONS), rtol=0, atol=1e-6)
    assert model.logit_scale.exp().item() == pytest.approx(14.25)
    # transformers, which reads the tokenizer, asks at the terminal whether to run code that a config.json names.
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    read = read_exported(tmp_path / "out")
    assert torch.equal(read.tower(images(tower)), tower(images(tower))) and read.logit_scale == 14.25


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize(
    ("pooling", "settings"), [("mean", {}), ("cls", {"dimensions": 24}), ("mean", {"prefix": "", "max_length": 9})]
)
def test_open_clip_gives_the_embeddings_of_texts(architecture, pooling, settings, tmp_path):
    text = text_tower(tmp_path, architecture, pooling, **settings)
    tower = random_tower(VIT, pooling="cls", embed_dim=text.embed_dim)
    assert written(tower, text, tmp_path / "out")[1] < 1e-6
    texts = run_lines(tmp_path / "out", tmp_path, images(tower, 1)[0])[1]
    torch.testing.assert_close(texts, text.encode(CAPTIONS), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"pooling": "cls"}, "its MLPs are SwiGLU, it has RoPE, it has no last LayerNorm"),
        ({"architecture": VIT}, "its pooling is map instead of cls or mean"),
        ({"architecture": VIT, "pooling": "cls", "register_tokens": 1}, "its tokens are other than a class token and"),
        ({"architecture": VIT, "pooling": "cls", "final_norm": False}, "it has no last LayerNorm"),
        ({"architecture": ROPE_VIT, "pooling": "mean"}, "it has RoPE, its tokens are other"),
    ],
)
def test_refuses_image_towers_that_open_clip_cannot_compute(shape, reason):
    with pytest.raises(ValueError, match=rf"open_clip cannot hold this tower: {reason}.*; use --format transformers"):
        require(exported(random_tower(**shape), layer_norm=False))


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"layer_norm": True}, "it has a LayerNorm after pooling; use"),
        ({"pooling": ("mean", "cls")}, "its pooling is mean and cls instead of mean or cls; use"),
        ({"pooling": ("lasttoken",)}, "its pooling is lasttoken instead of mean or cls; use"),
        ({"layers": ("Dense 32 to 64 Tanh",)}, r"it has layers after pooling \(Dense 32 to 64 Tanh\); use"),
        ({"pool_prefix": False}, "the tokens of its prefix are left out of pooling; use"),
        ({"name": None}, "give its --text-name"),
    ],
)
def test_refuses_texts_that_open_clip_cannot_embed(recipe, reason):
    source = exported(random_tower(VIT, pooling="cls"), **{"layer_norm": False, **recipe})
    with pytest.raises(ValueError, match=rf"open_clip .*{reason}"):
        require(source)


def test_refuses_an_architecture_that_is_not_in_its_list(tmp_path):
    text = text_tower(tmp_path, "nomic_bert", layer_norm=False)
    with pytest.raises(ValueError, match="it is a nomic_bert, and known are bert, roberta, xlm-roberta; use"):
        written(random_tower(VIT, pooling="cls", embed_dim=WIDTH), text, tmp_path / "out")


def test_refuses_an_encoder_in_a_folder_of_its_own(tmp_path):
    text = text_tower(tmp_path)
    inner = tmp_path / "text" / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "text" / name).rename(inner / name)
    modules = json.loads((tmp_path / "text" / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (tmp_path / "text" / "modules.json").write_text(json.dumps(modules))
    text = build_text_tower(tmp_path / "text", max_length=12)
    with pytest.raises(ValueError, match="its configuration is in the folder 0_Transformer of it, where open_clip"):
        written(random_tower(VIT, pooling="cls", embed_dim=WIDTH), text, tmp_path / "out")


@pytest.mark.parametrize(("part", "kind"), [("visual.proj", "trained"), ("text.transformer.", "text")])
def test_a_model_that_gives_something_else_is_refused(part, kind, tmp_path, monkeypatch):
    def write_wrong(folder, weights, **arguments):
        changed = {key: value * 1.01 + 0.01 if key.startswith(part) else value for key, value in weights.items()}
        save_file(
            {key: value.contiguous() for key, value in changed.items()},
            folder / arguments.get("name", "model.safetensors"),
        )

    monkeypatch.setattr(open_clip_format, "write_weights", write_wrong)
    with pytest.raises(ValueError, match=rf"loaded by open_clip, differs by .* from the {kind} tower where"):
        written(random_tower(VIT, pooling="cls", embed_dim=WIDTH), text_tower(tmp_path), tmp_path / "out")


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(open_clip_format.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--format open_clip needs open-clip-torch: pip install .*\[open-clip\]"):
        require(exported(random_tower(VIT, pooling="cls")))
