"""The model card, by what a reader does with it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from textlock.demo.text_tower import write_random_text_tower
from textlock.engine.config import EvalConfig
from textlock.exports.card import last_part, model_card, public_name
from textlock.exports.folder import Exported
from textlock.exports.loaded import image_fingerprint
from textlock.models.text import build_text_tower
from textlock.models.vision import ModelConfig

from .. import text_tower
from .towers import loaded, random_tower

HUB = {"name": "owner/text", "revision": "c0ffee"}


@pytest.fixture(scope="module")
def tower():
    return random_tower(embed_dim=48)


def card_of(checkpoint, *, license_name=None, **text):
    described = checkpoint.text_tower | text
    return model_card(
        checkpoint,
        Exported(checkpoint.tower, checkpoint.logit_scale, described),
        snippet="pass\n",
        loaders="transformers 4.57 or later",
        text_snippet=None,
        checked="Checked.",
        library="transformers",
        license_name=license_name,
    )


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_says_what_embeddings_depend_on(tower, tmp_path):
    recipe = {"prefix": "pass|age: ", "max_length": 16, "layers": ("Dense 32 to 64 Tanh",), "layer_norm": False}
    card = card_of(loaded(tower, tmp_path, described=text_tower.describe(**recipe)), **HUB, license_name="apache-2.0")
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\nlicense: apache-2.0\n---\n"
    )
    for row in (
        "text encoder | `owner/text`, commit `c0ffee` |",
        r"prefix, in front of every text | `pass\|age: ` |",
        "longest text | 16 tokens, prefix included |",
        "pooling | mean |",
        "after pooling | Dense 32 to 64 Tanh, unit length |",
        "dimensions | 48 |",
        "| fingerprint (SHA-256) of its files and all of the above | `abc` |",
        "mean 0.48145466, 0.4578275, 0.40821073 and standard deviation 0.26862954, 0.26130258, 0.27577711.",
        "| patches | 8 x 8 pixels, 4 x 4 of them |",
        "| pooling | map, projected to 48 |",
        "| samples seen | 112, in 7 steps of 16 |",
        "| starting weights | random |",
        "| logit scale at the end | 20.0000 |",
        "None was measured with this checkpoint.",
    ):
        assert row in card
    assert "AutoTokenizer" not in card  # these lines would not make the Dense layer
    assert "license" not in card_of(loaded(tower, tmp_path))


def test_leads_to_no_place_on_the_machine_of_the_run(tower, tmp_path):
    checkpoint = loaded(
        tower,
        tmp_path,
        model=ModelConfig(weights="/home/alice/secret/weights.safetensors"),
        evals=EvalConfig(zero_shot="/home/alice/secret/birds"),
    )
    write_json(tmp_path / "results.json", {"samples_seen": 112, "zero_shot_top1": 0.5})
    card = card_of(checkpoint, name=None)
    assert "alice" not in card and "secret" not in card and str(tmp_path) not in card
    assert "a local folder of whoever trained this" in card and "AutoTokenizer" not in card
    assert (
        "| starting weights | a local file |" in card
        and "| shards | `train`, `web`, each sample 0.5 times an epoch |" in card
        and "`birds`" in card
    )


def test_public_names_are_those_of_hub_models():
    described = {"name": "owner/text", "revision": "c0ffee"}
    assert public_name(described) == "owner/text"
    assert public_name(described | {"revision": None}) is None  # a local folder of that name
    cached = "/home/alice/.cache/hub/models--owner--text/snapshots/c0ffee"
    assert public_name(described | {"name": cached}) == "owner/text"
    places = ("s3://key:word@bucket/a/shards?token=x", "/data/photos/", ".", "shards")
    assert [last_part(place) for place in places] == ["shards", "photos", "local", "shards"]


def test_shows_the_figures_of_this_checkpoint_with_their_counts(tower, tmp_path):
    checkpoint = loaded(tower, tmp_path, evals=EvalConfig(zero_shot="data/birds", retrieval="data/held out"))
    counts = {"zero_shot": {"images": 2000, "classes": 10, "skipped": {"format": 3}}}
    results = {"zero_shot_top1": 0.5, "mean_recall@1": 0.25, "zero_shot_top5": float("nan"), "wall_seconds": 0.5}
    results |= {"zero_shot_top10": 7, "recall@1": True}
    results |= {"chance": {"zero_shot_top1": 0.1}, "counts": counts, "config": {"zero_shot_top1": 1}}
    write_json(tmp_path / "results.json", results | {"samples_seen": 112})
    write_json(tmp_path / "evaluation.json", {"zero_shot_top1": 0.75, "step": 7, "data": "/x/fish"})
    write_json(checkpoint.folder / "evaluation.json", {"zero_shot_top1": 0.99, "step": 6, "data": "/x/fish"})
    table = card_of(checkpoint).partition("## Figures\n\n")[2].splitlines()[2:]
    assert table == [
        "| zero_shot_top1 | 50.00 % | 10.00 % | `birds`, 2,000 images, 10 classes, "
        "without 3 that cannot be read (3 format) |",
        "| mean_recall@1 | 25.00 % |  | `held out` |",
        "| zero_shot_top1 | 75.00 % |  | `fish` |",
    ]
    write_json(tmp_path / "results.json", results | {"samples_seen": 224})  # of a later step
    assert "50.00 %" not in card_of(checkpoint)


def test_shows_the_figures_of_suites_that_are_of_this_tower(tower, tmp_path):
    checkpoint = loaded(tower, tmp_path)
    measured = {"figures": {"acc1": 0.5, "acc5": 0.9}, "counts": {"images": 10000, "classes": 10, "skipped": {}}}
    measured |= {"complaints": [], "folder": "/x/wds_cifar10_test", "set": "abc", "measured": {}}
    identity = {"suite": "datacomp", "image tower": image_fingerprint(tower)}
    tasks = {"cifar10": measured}
    for key, metric, share in (
        ("flickr30k", "mean_recall@1", 0.25),
        ("mscoco_captions", "mean_recall@1", 0.5),
        ("winogavil", "jaccard_score_10-12", 0.75),
    ):
        tasks[key] = measured | {"figures": {metric: share}, "counts": {"images": 3, "skipped": {}}}
    stored = {"identity": identity, "tasks": tasks, "averages": {}}
    path = tmp_path / "evaluation-datacomp.json"
    write_json(path, stored)
    assert card_of(checkpoint).partition("## Figures\n\n")[2].splitlines()[2:] == [
        "| datacomp, CIFAR-10: acc1 | 50.00 % |  | 10,000 images, 10 classes |",
        "| datacomp, Flickr: mean_recall@1 | 25.00 % |  | 3 images |",
        "| datacomp, MSCOCO: mean_recall@1 | 50.00 % |  | 3 images |",
        "| datacomp, WinoGAViL: jaccard_score_10-12 | 75.00 % |  | 3 images |",
        "| datacomp, average: Retrieval | 50.00 % |  | all of its tasks |",
    ]
    write_json(path, stored | {"identity": identity | {"image tower": "of another"}})
    assert "None was measured" in card_of(checkpoint)
    write_json(path, stored | {"tasks": {"cifar10": {}}})
    with pytest.raises(ValueError, match="holds no figures of a suite"):
        card_of(checkpoint)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_figures_are_said(tower, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json, whose figures go into the model card"):
        card_of(loaded(tower, tmp_path))


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_its_lines_make_the_text_embeddings(tower, tmp_path, pooling, layer_norm):
    texts = ["a red bicycle", "a bowl of soup"]
    write_random_text_tower(tmp_path / "text", texts, width=64, heads=1)
    # Its LayerNorms as they start would leave nothing for another LayerNorm to do.
    path = tmp_path / "text" / "model.safetensors"
    weights = load_file(path)
    save_file({key: value + (value.ndim == 1) * torch.rand(value.shape) for key, value in weights.items()}, path)
    text = build_text_tower(
        tmp_path / "text", prefix='"two": ', pooling=pooling, layer_norm=layer_norm, dimensions=48, max_length=12
    )
    described = replace(text.describe(), revision=None)
    card = card_of(loaded(tower, tmp_path, described=described))
    (lines,) = re.findall(r"```python\n(from transformers import AutoModel, AutoTokenizer.*?)```", card, re.DOTALL)
    names = {"embeddings": torch.zeros(1, 48)}
    exec(f"import torch\nimport torch.nn.functional as F\n{lines}", names)
    torch.testing.assert_close(names["text"], text.encode(texts), rtol=0, atol=1e-6)
