"""The folder for texts and images, as sentence-transformers loads it and as it is read back here."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import huggingface_hub.constants
import pytest
import torch
from PIL import Image

from textlock import export
from textlock.exports import sentence_transformers_format
from textlock.exports.check import compare_with_towers
from textlock.exports.folder import Exported, Texts
from textlock.exports.reading import is_exported, read_exported, text_settings
from textlock.exports.text import find_text_tower
from textlock.models.text import build_text_tower, make_text_tower
from textlock.models.vision import ModelConfig, VisionTower
from textlock.models.weights import load_weights

from ..conftest import ROOT
from ..models.text_folders import (
    CAPTIONS,
    WIDTH,
    dense,
    edit_json,
    edit_weights,
    write_encoder,
    write_sentence_folder,
)
from .towers import exported, images, loaded, random_tower, unit

sentence_transformers = pytest.importorskip("sentence_transformers")

COMMIT, LATER = "c0ffee" * 6 + "cafe", "decade" * 6 + "cafe"
# Texts without any token that pooling counts have no embedding in sentence-transformers.
TEXTS = [caption for caption in CAPTIONS if caption]
TOWERS = {
    "EVA02, map": {},
    "EVA02, map, another width": {"embed_dim": 48},
    "ViT, cls, projection": {"architecture": "vit_base_patch16_224", "pooling": "cls", "embed_dim": 48},
    "ViT, mean": {"architecture": "vit_base_patch16_224", "pooling": "mean"},
    "RoPE ViT": {"architecture": "vit_base_patch16_rope_reg1_gap_256", "pooling": "mean", "embed_dim": 48},
}
IDENTITY = "torch.nn.modules.linear.Identity"
LAYER_NORM = {"norm.weight": torch.linspace(-1, 2, WIDTH), "norm.bias": torch.linspace(1, 0, WIDTH)}
# Architecture, what its tokenizer does, parts after pooling, what else the folder says, settings of the run.
RECIPES = {
    "as Nomic v1.5": (
        "nomic_bert", {}, [], {}, {"prefix": "search_query: ", "layer_norm": True, "max_length": 20, "dimensions": 48},
    ),
    "cls, a default prompt": ("bert", {}, [], {
        "pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        "prompts": {"query": "find two: "}, "default": "query",
    }, {}),
    "last token, left padding": (
        "gpt2", {"template": "$A </s>", "padding_side": "left"}, [], {"pooling": {"pooling_mode": "lasttoken"}}, {},
    ),
    "two poolings and two layers, as in EmbeddingGemma": (
        "gemma3, both directions", {},
        [dense(2 * WIDTH, 96, activation=IDENTITY, bias=False), dense(96, WIDTH), ("Normalize", {}, {})],
        {"pooling": {"pooling_mode": ["mean", "cls"]}}, {"layer_norm": True},
    ),
    "the prompt not pooled, LayerNorm with weights, Normalize in between": ("mpnet", {}, [
        ("LayerNorm", {"dimension": WIDTH}, LAYER_NORM), ("Normalize", {}, {}), dense(WIDTH, WIDTH, use_residual=True),
    ], {
        "pooling": {"pooling_mode": "mean", "include_prompt": False}, "prompts": {"q": "two dogs: "}, "default": "q",
    }, {}),
    "lower case, short": ("t5 encoder", {}, [], {"do_lower_case": True, "max_seq_length": 12}, {}),
    "pooling by the run": ("bert", {}, [], {"pooling": {"pooling_mode": "cls"}}, {"pooling": "max"}),
}  # fmt: skip


def folder_of(place, recipe):
    architecture, tokenizer, parts, said, settings = RECIPES[recipe]
    encoder = write_encoder(place.with_name(f"{place.name} encoder"), architecture, **tokenizer)
    folder = write_sentence_folder(place, encoder, *parts, **said)
    if architecture == "nomic_bert":  # by the names of Nomic's own code, as on the hub
        config = json.loads((folder / "config.json").read_text())
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                 "intermediate_size": "n_inner", "layer_norm_eps": "layer_norm_epsilon"}  # fmt: skip
        old = {old: config[new] for new, old in names.items()}
        old |= {"activation_function": "swiglu", "rotary_emb_base": 1000, "n_inner": float(old["n_inner"])}
        old["auto_map"] = {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"}
        edit_json(folder / "config.json", remove=(*names, "hidden_act", "rope_parameters"), **old)
    return folder, settings


def write(folder, tower, text, *, copy=True):
    folder.mkdir()
    described = asdict(text.describe()) | ({"name": None} if copy else {"name": "owner/text"})
    sentence_transformers_format.write(Exported(tower, 14.25, described), folder, Texts(text, copy))
    return folder


def load(folder, **arguments):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, **arguments)


def pictures(tower, count=3):
    return [Image.fromarray(image.numpy()) for image in images(tower, count)]


def largest(found, expected):
    assert found.shape == tuple(expected.shape)
    return float((torch.from_numpy(found) - expected).abs().max())


@pytest.fixture(scope="module")
def tower():
    return random_tower(embed_dim=48)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, settings = folder_of(tmp_path_factory.mktemp("text") / "text", "as Nomic v1.5")
    return build_text_tower(folder, **settings)


@pytest.fixture(scope="module")
def folder(tower, text, tmp_path_factory):
    return write(tmp_path_factory.mktemp("exported") / "a folder.v1", tower, text)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A cache of the hub that holds owner/text at a commit, and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = cache / "models--owner--text"

    def put(folder, commit):
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        return place / "snapshots" / commit

    return put


@pytest.mark.parametrize("shape", TOWERS.values(), ids=TOWERS)
def test_every_tower_beside_texts(shape, text, tmp_path):
    tower = random_tower(**shape)
    model = load(write(tmp_path / "out", tower, text))
    assert largest(model.encode(pictures(tower)), unit(tower, images(tower, 3))) <= 1e-6
    assert largest(model.encode(TEXTS), text.encode(TEXTS)) <= 1e-6


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "from the hub"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_of_texts(recipe, copy, hub, tmp_path):
    source, settings = folder_of(tmp_path / "text", recipe)
    place = source if copy else hub(source, COMMIT)
    text = build_text_tower(place, **settings)
    tower = random_tower(embed_dim=text.embed_dim)
    folder = write(tmp_path / "out", tower, text, copy=copy)
    shutil.rmtree(source)
    if not copy:
        assert [path.parent.name for path in folder.rglob("*.safetensors")].count("image") == 1
        assert {path.parent.name for path in folder.rglob("*.safetensors")} <= {"image", "text_norm"}
        (tmp_path / "empty").mkdir()
        hub(tmp_path / "empty", LATER)  # the newest commit is not the one that is named
    model = load(folder)
    expected = text.encode(TEXTS)
    for encode in (model.encode, model.encode_query, model.encode_document):
        assert largest(encode(TEXTS), expected) <= 1e-6
    assert largest(model.encode(pictures(tower)), unit(tower, images(tower, 3))) <= 1e-6
    assert model.get_embedding_dimension() == text.embed_dim
    if copy:
        found = make_text_tower(text_settings(read_exported(folder).text_tower, folder, None), torch.device("cpu"))
        assert found.fingerprint() == text.fingerprint() and torch.equal(found.encode(TEXTS), expected)


def test_searches_over_both_kinds(model, tower, text, tmp_path):
    from sentence_transformers.util import semantic_search

    shown = pictures(tower)
    rows, texts = model.encode(shown), model.encode(TEXTS)
    expected = unit(tower, images(tower, 3)) @ text.encode(TEXTS).T
    torch.testing.assert_close(model.similarity(rows, texts), expected, rtol=0, atol=1e-5)
    for hits, scores in zip(semantic_search(rows, texts, top_k=1), expected, strict=True):
        assert hits[0]["corpus_id"] == int(scores.argmax())
    assert [hits[0]["corpus_id"] for hits in semantic_search(model.encode(shown[::-1]), rows)] == [2, 1, 0]
    # Whatever shows the same pixels; a prompt is for texts.
    shown[0].save(tmp_path / "photo.png")
    for same in (str(tmp_path / "photo.png"), {"image": shown[0]}, shown[0].convert("RGBA")):
        assert largest(model.encode([same], prompt_name="query"), torch.from_numpy(rows[:1])) <= 1e-6
    assert model.modalities == ["image", "text"]


def test_the_lines_of_the_readme_search_a_folder_of_photos(folder, model, tower, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (lines,) = [block for block in blocks if "semantic_search" in block]
    (tmp_path / "photos").mkdir()
    for number, picture in enumerate(pictures(tower)):
        picture.save(tmp_path / "photos" / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    exec(lines.replace('"path/to/this/folder"', repr(str(folder)) + ', device="cpu"'), {})
    of_texts, of_images, of_both = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert [hits[0]["corpus_id"] for hits in of_images] == [0, 1, 2]
    assert [len(hits) for hits in (*of_texts, *of_both)] == [3, 3, 2, 2, 2]
    shown = Image.open("photos/1.jpg")
    expected = model.similarity(model.encode([shown]), model.encode(["a red bicycle", "a bowl of soup"]))[0]
    for hit in of_both[1]:
        assert abs(hit["score"] - expected[hit["corpus_id"]]) < 1e-5


@pytest.mark.slow
def test_needs_nothing_of_this_project_nor_of_who_saves_it_again(folder, model, tower, text, tmp_path):
    model.save_pretrained(str(tmp_path / "again"))
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"""
import json, sys, importlib.util
sys.path.append({site!r})
from PIL import Image
from sentence_transformers import SentenceTransformer
assert importlib.util.find_spec("textlock") is None
for folder in {[str(tmp_path / "again"), str(folder)]!r}:
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    image = Image.frombytes("RGB", (32, 32), bytes(i % 251 for i in range(3072)))
    print(json.dumps([model.encode(image).tolist(), model.encode("a red circle").tolist()]))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-ESP", "-c", code]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert outcome.returncode == 0, outcome.stderr
    pixels = torch.tensor([i % 251 for i in range(3072)], dtype=torch.uint8).view(1, 32, 32, 3)
    for line in outcome.stdout.splitlines():
        image, caption = torch.tensor(json.loads(line))
        torch.testing.assert_close(image, unit(tower, pixels)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(caption, text.encode(["a red circle"])[0], rtol=0, atol=1e-6)
    assert len(outcome.stdout.splitlines()) == 2


def test_is_read_back_to_the_bit_and_starts_a_training(folder, tower):
    assert is_exported(folder) and not is_exported(folder.parent)
    read = read_exported(folder)
    assert torch.equal(unit(read.tower, images(tower)), unit(tower, images(tower))) and read.logit_scale == 14.25
    other = VisionTower(tower.config, ModelConfig(), embed_dim=48)
    assert load_weights(other, folder) == ()
    assert torch.equal(unit(other, images(tower)), unit(tower, images(tower)))


def test_half_precision_is_that_of_both_towers(folder, tower, text):
    model = load(folder).to(torch.bfloat16)
    for inputs, expected in ((pictures(tower), unit(tower, images(tower, 3))), (TEXTS, text.encode(TEXTS))):
        found = model.encode(inputs, convert_to_tensor=True)
        assert found.dtype == torch.bfloat16
        difference = (found.float() - expected).norm(dim=-1).max()
        assert 2**-10 < difference < 2**-5  # that of bfloat16, which has 8 bits


def test_the_check_tells_another_tower_of_either_kind(folder, tower, text):
    lines, texts = sentence_transformers_format.SNIPPET, sentence_transformers_format.TEXTS
    check = partial(compare_with_towers, lines, texts, package="sentence-transformers")
    largest_two = re.findall(r"\de[-+]\d+", check(folder, tower, text))
    assert len(largest_two) == 2 and all(float(difference) <= 1e-6 for difference in largest_two)
    with pytest.raises(ValueError, match=r"by sentence-transformers, .* from the text tower where 1\.0e-05"):
        check(folder, tower, build_text_tower(text.config.name, prefix="", layer_norm=True))
    with pytest.raises(ValueError, match=r"differs by .* from the trained tower where 1\.0e-06 is allowed"):
        check(folder, random_tower(pooling="mean", embed_dim=48), text)
    with pytest.raises(ValueError, match=r"sentence-transformers 6\S+ cannot load the folder as it was written"):
        check(folder / "image" / "nothing", tower, text)


def test_a_local_text_tower_is_found_under_its_hub_name_when_it_is_the_same(text, hub):
    described = json.loads(json.dumps(asdict(text.describe())))  # as a checkpoint stores it
    assert find_text_tower(described, None).fingerprint() == text.fingerprint()
    with pytest.raises(FileNotFoundError, match="owner/text is neither a folder here nor a model"):
        find_text_tower(described, "owner/text")
    place = hub(text.config.name, COMMIT)
    assert find_text_tower(described, "owner/text").revision == COMMIT
    # Of a run that named it by the hub, at that commit and no later one.
    named = described | {"name": "owner/text", "revision": COMMIT}
    edit_weights(hub(place, LATER), **{"norm_of_another": torch.ones(1)})
    assert find_text_tower(named, "owner/text").revision == COMMIT
    edit_json(place / "tokenizer_config.json", model_max_length=77)
    with pytest.raises(ValueError, match="owner/text is not the text tower that the run was trained against: the wei"):
        find_text_tower(named, "owner/text")


def test_the_export_of_a_local_text_tower_names_the_hub_and_the_commit_it_was_checked_at(tower, text, hub, tmp_path):
    described = json.loads(json.dumps(asdict(text.describe())))
    run = loaded(tower, tmp_path / "run")
    run = replace(run, text_tower=described)
    hub(text.config.name, COMMIT)
    settings = {"checkpoint": tmp_path, "format": "sentence-transformers", "text_name": "owner/text"}
    sentence = export.export(run, export.ExportConfig(**settings, output=tmp_path / "out"))
    assert "The export ran these lines with sentence-transformers" in sentence
    assert f"| text encoder | `owner/text`, commit `{COMMIT}` |" in (tmp_path / "out" / "README.md").read_text()
    read = read_exported(tmp_path / "out").text_tower
    assert (read["name"], read["revision"], read["fingerprint"]) == ("owner/text", COMMIT, text.fingerprint())
    reference = json.loads((tmp_path / "out" / "text_encoder" / "reference.json").read_text())
    assert (reference["name"], reference["revision"], reference["subfolder"]) == ("owner/text", COMMIT, "")


def test_a_folder_here_of_that_name_is_not_the_hub(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text.config.name, "owner/text")
    with pytest.raises(ValueError, match="owner/text is a folder here"):
        find_text_tower(asdict(text.describe()), "owner/text")


def test_without_sentence_transformers_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs sentence-transformers: pip install sentence-transformers"):
        sentence_transformers_format.require(exported(random_tower()))
