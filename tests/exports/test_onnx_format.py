"""The graphs, as onnxruntime reads them where there is no torch, next to the towers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from textlock.exports import onnx_format
from textlock.exports.folder import Texts
from textlock.exports.onnx_format import SNIPPET, TEXT_SNIPPET, require, write
from textlock.exports.reading import read_exported
from textlock.models.text import build_text_tower

from ..models.text_folders import WIDTH, dense, write_encoder, write_sentence_folder
from .towers import exported, images, random_tower, unit

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TOWERS = {
    "EVA02 with a projection": {"embed_dim": 48},
    "ViT": {"architecture": "vit_base_patch16_224", "pooling": "cls"},
    "RoPE ViT": {"architecture": "vit_base_patch16_rope_reg1_gap_256", "pooling": "mean", "embed_dim": 48},
}
CAPTIONS = ["two dogs", "a dog on a beach at dusk, and two more of them that run", "", "Dog"]
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = sys.modules['textlock'] = None\n"


def written(tower, folder, texts=None, **text):
    folder.mkdir()
    write(exported(tower, **text), folder, texts)
    return folder


@pytest.mark.parametrize("shape", TOWERS.values(), ids=TOWERS)
def test_every_tower_gives_its_embeddings_to_onnxruntime(shape, tmp_path):
    tower = random_tower(**shape)
    folder = written(tower, tmp_path / "out")
    graph = onnx.load(folder / "onnx" / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(found.domain, found.version) for found in graph.opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    side = tower.image_size
    assert (taken.name, taken.shape, given.name) == ("pixel_values", ["batch", 3, side, side], "embeddings")
    for count in (1, 2, 7):
        pixels = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        (found,) = session.run(None, {"pixel_values": pixels.numpy()})
        assert np.abs(found - unit(tower, pixels).numpy()).max() < 1e-6
    assert torch.equal(unit(read_exported(folder).tower, images(tower)), unit(tower, images(tower)))


ALL_POOLINGS = {"pooling_mode": ["mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens"]}


def text_tower(folder, architecture, *parts, **settings):
    encoder = write_encoder(folder / "encoder", architecture)
    settings = {"prefix": "two dogs: ", "max_length": 12, **settings}
    return build_text_tower(write_sentence_folder(folder / "text", encoder, *parts, pooling=ALL_POOLINGS), **settings)


@pytest.mark.parametrize("architecture", ["bert", "nomic_bert"])
def test_the_lines_of_the_card_run_without_torch(architecture, tmp_path):
    text = text_tower(tmp_path, architecture, dense(6 * WIDTH, 32), layer_norm=True, dimensions=24)
    tower = random_tower(embed_dim=text.embed_dim)
    folder = written(tower, tmp_path / "out", Texts(text, copied=True), prefix="two dogs: ")
    Image.fromarray(images(tower, 1)[0].numpy()).save(tmp_path / "photo.png")
    captions = json.dumps(CAPTIONS)
    lines = WITHOUT_TORCH + SNIPPET + TEXT_SNIPPET + "print(json.dumps([embeddings.tolist(), texts.tolist()]))"
    lines = lines.replace('"path/to/this/folder"', repr(str(folder))).replace('"photo.jpg"', '"photo.png"')
    lines = lines.replace('("a red bicycle", "a bowl of soup")', f"json.loads({captions!r})")
    outcome = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    found, texts = (torch.tensor(rows) for rows in json.loads(outcome.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, unit(tower, images(tower, 1)), rtol=0, atol=1e-6)
    torch.testing.assert_close(texts, text.encode(CAPTIONS), rtol=0, atol=1e-6)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(onnx_format.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"--format onnx needs onnxscript: pip install --editable '\.\[onnx\]'"):
        require(exported(random_tower()))


def test_a_graph_that_gives_something_else_is_refused(tmp_path, monkeypatch):
    class Wrong(onnx_format._Images):
        def forward(self, pixel_values):
            noise = 1e-3 if torch.compiler.is_exporting() else 0.0
            return super().forward(pixel_values) + noise

    monkeypatch.setattr(onnx_format, "_Images", Wrong)
    with pytest.raises(ValueError, match=r"model.onnx gives embeddings that differ by 1.0e-03 from the tower's where"):
        written(random_tower(), tmp_path / "out")


def test_a_tower_that_has_no_graph_is_refused_in_a_sentence(tmp_path, monkeypatch):
    class Strange(onnx_format._Images):
        def forward(self, pixel_values):
            return torch.linalg.svd(pixel_values.mean((0, 1)))[0]

    monkeypatch.setattr(onnx_format, "_Images", Strange)
    with pytest.raises(ValueError, match=r"^model.onnx cannot be made of this tower: .*\)$"):
        written(random_tower(), tmp_path / "out")
