"""Every way an embedder's folder says how its embeddings are made, against sentence-transformers' own encode."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from textlock.models.text import build_text_tower

from .text_folders import (
    CAPTIONS,
    ENCODERS,
    WIDTH,
    dense,
    edit_json,
    edit_weights,
    write_encoder,
    write_sentence_folder,
)

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer


def reference(folder, captions=CAPTIONS, **encode):
    """sentence-transformers' unit embeddings, each caption alone, so that no padding takes part."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return F.normalize(torch.from_numpy(model.encode(captions, batch_size=1, **encode)).double(), dim=-1)


def assert_same_embeddings(folder, captions=CAPTIONS, encode=None, **settings):
    tower = build_text_tower(folder, **settings)
    rows, expected = tower.encode(captions), reference(folder, captions, **(encode or {}))
    assert rows.shape == expected.shape
    assert (rows - expected).abs().max() < 1e-6
    assert tower.embed_dim == rows.shape[1]
    return tower


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Write each architecture once."""
    root, made = tmp_path_factory.mktemp("encoders"), {}

    def get(architecture, **tokenizer):
        key = (architecture, *tokenizer.items())
        if key not in made:
            made[key] = write_encoder(root / str(len(made)), architecture, **tokenizer)
        return made[key]

    return get


CAUSAL = {
    "last token, right padding": ("$A </s>", "right"),
    "last token, left padding": ("$A </s>", "left"),
}


@pytest.mark.parametrize("architecture", ENCODERS)
def test_every_architecture(encoders, tmp_path, architecture):
    """All poolings in one embedding, with and without a prompt."""
    pooling = {"pooling_mode": ["mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens"]}
    folder = write_sentence_folder(
        tmp_path / "t", encoders(architecture), pooling=pooling, prompts={"query": "two dogs: "}, default="query"
    )
    tower = assert_same_embeddings(folder)
    assert tower.recipe.prefix == "two dogs: "
    assert_same_embeddings(folder, prefix="", encode={"prompt": ""})


@pytest.mark.parametrize(("template", "side"), CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_last_token_of_a_causal_model(encoders, tmp_path, architecture, template, side):
    encoder = encoders(architecture, template=template, padding_side=side)
    folder = write_sentence_folder(tmp_path / "t", encoder, pooling={"pooling_mode": "lasttoken"})
    captions = [caption for caption in CAPTIONS if caption]
    tower = assert_same_embeddings(folder, captions)
    assert torch.allclose(tower.encode(captions), torch.cat([tower.encode([one]) for one in captions]), atol=1e-6)


POOLINGS = {
    "max": {"pooling_mode": "max"},
    "mean over the root of the length": {"pooling_mode": "mean_sqrt_len_tokens"},
    "weighted mean": {"pooling_mode": "weightedmean"},
    "last token": {"pooling_mode": "lasttoken"},
    "three": {"pooling_mode": ["mean", "cls", "mean_sqrt_len_tokens"]},
    "old names": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    "several old names": {
        "pooling_mode_lasttoken": True,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_mean_sqrt_len_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_weightedmean_tokens": True,
    },
}


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
def test_every_pooling(encoders, tmp_path, pooling):
    assert_same_embeddings(write_sentence_folder(tmp_path / "t", encoders("bert"), pooling=pooling))


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("template", ["<s> $A </s>", "<s> $A"], ids=["ends in a special token", "does not"])
def test_tokens_of_the_prompt_that_pooling_leaves_out(encoders, tmp_path, mode, template):
    folder = write_sentence_folder(
        tmp_path / "t",
        encoders("bert", template=template),
        pooling={"pooling_mode": mode, "include_prompt": False},
        prompts={"query": "find two: ", "other": "x"},
        default="query",
    )
    captions = [caption for caption in CAPTIONS if caption]
    tower = assert_same_embeddings(folder, captions)
    assert "not pooled" in str(tower.recipe)
    assert tower.encode([""]).isfinite().all()


LAYERS = {
    "dense": [dense(WIDTH, 24)],
    "dense twice, as in EmbeddingGemma": [
        dense(WIDTH, 96, activation="torch.nn.modules.linear.Identity", bias=False),
        dense(96, WIDTH, activation="torch.nn.modules.linear.Identity", bias=False),
        ("Normalize", {}, {}),
    ],
    "dense that names no activation": [
        ("Dense", {"in_features": WIDTH, "out_features": 24}, dense(WIDTH, 24)[2]),
        ("Normalize", {}, {}),
    ],
    "residual": [dense(WIDTH, WIDTH, use_residual=True)],
    "residual to another width": [dense(WIDTH, 24, activation="torch.nn.modules.activation.GELU", use_residual=True)],
    "layer norm": [
        (
            "LayerNorm",
            {"dimension": WIDTH},
            {"norm.weight": torch.linspace(-1, 2, WIDTH), "norm.bias": torch.linspace(1, 0, WIDTH)},
        )
    ],
    "normalised in between": [("Normalize", {}, {}), dense(WIDTH, 16), ("Dropout", {"dropout": 0.5}, {})],
}


@pytest.mark.parametrize("parts", LAYERS.values(), ids=LAYERS)
def test_what_comes_after_pooling(encoders, tmp_path, parts):
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"), *parts)
    tower = assert_same_embeddings(folder)
    assert tower.recipe.layers[-1] != "Normalize", "every embedding ends at unit length"
    assert ("input added" in str(tower.recipe)) == any("use_residual" in it[1] for it in parts)
    changed = shutil.copytree(folder, tmp_path / "changed")
    weighted = next(place for place in sorted(changed.glob("[2-9]_*")) if (place / "model.safetensors").exists())
    name = "norm.bias" if "LayerNorm" in weighted.name else "linear.weight"
    edit_weights(weighted, **{name: torch.zeros_like(parts[int(weighted.name[0]) - 2][2][name])})
    assert build_text_tower(changed).fingerprint() != tower.fingerprint()


def test_a_default_prompt_is_followed(encoders, tmp_path):
    prompts = {"query": "two dogs: ", "document": ""}
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"), prompts=prompts, default="query")
    tower = assert_same_embeddings(folder)
    assert tower.recipe.prefix == "two dogs: " and not tower.notes
    other = build_text_tower(folder, prefix="a photo ")
    assert other.notes == ("--text.prefix is 'a photo ' where the folder of the text tower says 'two dogs: '",)
    assert (other.encode(CAPTIONS) - reference(folder, prompt="a photo ")).abs().max() < 1e-6


def test_prompts_without_a_default_are_named_and_not_used(encoders, tmp_path):
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"), prompts={"query": "two: ", "document": ""})
    tower = assert_same_embeddings(folder)
    [note] = tower.notes
    assert "the prompts query and names none as its default" in note and "--text.prefix" in note
    assert not build_text_tower(folder, prefix="two: ").notes


def test_lower_casing_and_length_are_followed(encoders, tmp_path):
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"), max_seq_length=9, do_lower_case=True)
    tower = assert_same_embeddings(folder)
    assert (tower.recipe.max_length, tower.recipe.lower_case) == (9, True)
    rows = tower.encode(["RED CIRCLE", "red circle"])
    assert torch.equal(rows[0], rows[1])
    [note] = build_text_tower(folder, max_length=5).notes
    assert note == "--text.max-length is 5 where the folder of the text tower says 9"


def test_folders_that_it_saves_itself(encoders, tmp_path):
    old = write_sentence_folder(tmp_path / "old", encoders("bert"), dense(WIDTH, 24), ("Normalize", {}, {}))
    model = SentenceTransformer(str(old), device="cpu", prompts={"find": "two "}, default_prompt_name="find")
    model.save(str(tmp_path / "new"))
    assert_same_embeddings(tmp_path / "new")


def test_the_layout_of_its_first_versions(encoders, tmp_path):
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"))
    (folder / "0_Transformer").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).rename(folder / "0_Transformer" / file)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert_same_embeddings(folder)


def test_weights_in_bfloat16_alone(encoders, tmp_path):
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"))
    from safetensors.torch import load_file

    edit_weights(folder, **{k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()})
    edit_json(folder / "config.json", dtype="bfloat16")
    assert_same_embeddings(folder)


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_length_and_lower_case_are_read_beside_a_pooling_without_modules(encoders, tmp_path, name):
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"), max_seq_length=9, do_lower_case=True)
    whole = build_text_tower(folder)
    (folder / "modules.json").unlink()
    (folder / "sentence_bert_config.json").rename(folder / name)
    assert build_text_tower(folder).recipe == whole.recipe


@pytest.mark.parametrize("architecture", ["roberta", "xlm-roberta", "mpnet"])
def test_positions_that_hold_no_token_are_not_counted(encoders, architecture):
    """130 positions of which the padding token's two are never read: issue after issue asks why 514 is 512."""
    folder = encoders(architecture, max_length=1000)
    tower = build_text_tower(folder, pooling="mean")
    assert tower.recipe.max_length == 128
    assert tower.encode([CAPTIONS[6]]).isfinite().all()
    with pytest.raises(ValueError, match=r"--text\.max-length is 129, must be at most 128"):
        build_text_tower(folder, pooling="mean", max_length=129)


def test_dimensions_cut_and_normalise_again(encoders, tmp_path):
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"), ("Normalize", {}, {}))
    model = SentenceTransformer(str(folder), device="cpu", truncate_dim=12)
    expected = F.normalize(torch.from_numpy(model.encode(CAPTIONS, batch_size=1)), dim=-1)
    tower = build_text_tower(folder, dimensions=12)
    assert tower.embed_dim == 12
    assert (tower.encode(CAPTIONS) - expected).abs().max() < 1e-6
    # Nomic's order: LayerNorm over all, cut, unit length.
    whole = build_text_tower(folder).encode(CAPTIONS)
    expected = F.normalize(F.layer_norm(whole, (WIDTH,), eps=0)[:, :12], dim=-1)
    rows = build_text_tower(folder, layer_norm=True, dimensions=12).encode(CAPTIONS)
    assert (rows - expected).abs().max() < 1e-3  # the eps of the LayerNorm, on vectors of another length
    with pytest.raises(ValueError, match=rf"--text\.dimensions is {WIDTH + 1}, must be at most {WIDTH}"):
        build_text_tower(folder, dimensions=WIDTH + 1)


@pytest.mark.parametrize("version", ["v1", "v1.5"])
@pytest.mark.parametrize("place", ["name", "hub cache"])
@pytest.mark.parametrize("modules", [True, False], ids=["with modules.json", "without"])
def test_nomic_embed_text_has_its_recipe_by_name(encoders, tmp_path, version, place, modules):
    released = f"nomic-embed-text-{version}"
    folder = tmp_path / (released if place == "name" else f"models--nomic-ai--{released}/snapshots/abc")
    (write_sentence_folder if modules else shutil.copytree)(*[folder, encoders("nomic_bert")][:: 1 if modules else -1])
    tower = build_text_tower(folder)
    expected = build_text_tower(
        encoders("nomic_bert"), pooling="mean", prefix="search_query: ", layer_norm=version == "v1.5", max_length=77
    )
    assert tower.recipe == expected.recipe and not tower.notes
    assert torch.equal(tower.encode(CAPTIONS), expected.encode(CAPTIONS))
    [note] = build_text_tower(folder, layer_norm=version == "v1").notes
    assert note.startswith("--text.layer-norm is ")


def test_another_nomic_bert_is_asked_for_what_it_does_not_say(encoders, tmp_path):
    folder = write_sentence_folder(tmp_path / "my-copy", encoders("nomic_bert"))
    with pytest.raises(ValueError, match=r"give --text\.prefix and --text\.layer-norm .*'search_query: '"):
        build_text_tower(folder)
    with pytest.raises(ValueError, match=r"give --text\.layer-norm \("):
        build_text_tower(folder, prefix="")
    assert_same_embeddings(folder, prefix="", layer_norm=False)


def test_a_folder_without_pooling_is_asked_for_it(encoders, tmp_path):
    folder = shutil.copytree(encoders("bert"), tmp_path / "models--org--bge/snapshots/abc")
    with pytest.raises(ValueError, match=r"does not say how token states become one vector .*give --text\.pooling"):
        build_text_tower(folder)
    by_hand = build_text_tower(folder, pooling="cls").encode(CAPTIONS)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert torch.equal(build_text_tower(folder).encode(CAPTIONS), by_hand)
    [note] = build_text_tower(folder, pooling="mean").notes
    assert note == "--text.pooling is 'mean' where the folder of the text tower says 'cls'"
    (folder / "2_Dense").mkdir()
    with pytest.raises(ValueError, match=r"holds 1_Pooling, 2_Dense and no modules\.json"):
        build_text_tower(folder)


def modules_of(folder, kinds):
    types = [kind if "." in kind else f"sentence_transformers.models.{kind}" for kind in kinds]
    paths = ["", "1_Pooling", "2_X"]
    (folder / "modules.json").write_text(
        json.dumps([{"type": it, "path": path} for it, path in zip(types, paths, strict=False)])
    )


def write_part(folder, name, config, weights=None):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(config))


REFUSED = {
    "layers over tokens": (
        lambda f: modules_of(f, ["Transformer", "WeightedLayerPooling", "Pooling"]),
        "lists Transformer, WeightedLayerPooling, Pooling; only",
    ),
    "modules with code": (
        lambda f: modules_of(f, ["custom_st.Transformer", "Pooling"]),
        r"names code of its own \(custom_st\.Transformer\), which is never run",
    ),
    "modules elsewhere": (
        lambda f: (f / "modules.json").write_text(
            '[{"type": "sentence_transformers.models.Transformer", "path": "../secret"},'
            ' {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]'
        ),
        r"names the place \.\./secret, which is not in its folder",
    ),
    "an unknown pooling": (
        lambda f: write_part(f, "1_Pooling", {"pooling_mode": "attention"}),
        "asks for the pooling attention, which is not known",
    ),
    "no pooling": (lambda f: write_part(f, "1_Pooling", {"pooling_mode_cls_token": False}), "the pooling of none"),
    "a dense layer of token states": (
        lambda f: (
            modules_of(f, ["Transformer", "Pooling", "Dense"]),
            write_part(f, "2_X", {"module_input_name": "token_embeddings"}),
        ),
        "only layers of the pooled vector",
    ),
    "a pickled dense layer": (
        lambda f: (modules_of(f, ["Transformer", "Pooling", "Dense"]), write_part(f, "2_X", {"out_features": 8})),
        r"2_X has no model\.safetensors; pickled weights",
    ),
    "a prompt that is not there": (
        lambda f: (f / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}'),
        "names the prompt 'query' as its default and has no such prompt",
    ),
    "another task": (
        lambda f: (f / "sentence_bert_config.json").write_text('{"transformer_task": "fill-mask"}'),
        "another task than feature-extraction",
    ),
    "another output": (
        lambda f: (f / "sentence_bert_config.json").write_text(
            '{"modality_config": {"text": {"method_output_name": "pooler_output"}}}'
        ),
        "other than the encoder's last hidden states",
    ),
    "arguments that change the model": (
        lambda f: (f / "sentence_bert_config.json").write_text('{"model_args": {"rope_scaling": {"factor": 2}}}'),
        "sets rope_scaling, which cannot be followed",
    ),
    "code for a known type": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "modeling_x.BertModel"}),
        r"names code of its own \(modeling_x\.BertModel\).*delete auto_map",
    ),
    "a projection that transformers would drop": (
        lambda f: edit_weights(f, **{"text_projection.weight": torch.zeros(4, 4)}),
        r"has unexpected weights text_projection\.weight: they are not those of the BertModel",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_reason(encoders, tmp_path, change, message):
    folder = write_sentence_folder(tmp_path / "t", encoders("bert"))
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build_text_tower(folder)
    assert "\n" not in str(caught.value)


def test_dense_that_does_not_fit_and_an_unknown_activation(encoders, tmp_path):
    folder = write_sentence_folder(tmp_path / "a", encoders("bert"), dense(16, 8))
    with pytest.raises(ValueError, match=rf"2_Dense do not fit {WIDTH} pooled numbers: .*size mismatch"):
        build_text_tower(folder)
    folder = write_sentence_folder(tmp_path / "b", encoders("bert"), dense(WIDTH, 8, activation="os.system"))
    with pytest.raises(ValueError, match=r"asks for the activation os\.system"):
        build_text_tower(folder)


@pytest.mark.parametrize(("prefix", "least"), [("", 2), ("two dogs: ", 5)])
def test_a_length_that_leaves_no_room_for_a_caption_is_refused(encoders, prefix, least):
    """Every caption would be cut to the same tokens."""
    tower = build_text_tower(encoders("bert"), pooling="mean", prefix=prefix, max_length=least + 1)
    assert not torch.equal(*tower.encode(["red", "blue"]))
    with pytest.raises(ValueError, match=rf"--text\.max-length is {least}, must be above {least}, the tok"):
        build_text_tower(encoders("bert"), pooling="mean", prefix=prefix, max_length=least)


def test_a_model_that_cannot_encode_is_refused_when_it_is_loaded(encoders, tmp_path):
    folder = shutil.copytree(encoders("bert"), tmp_path / "t")
    edit_weights(folder, **{"embeddings.LayerNorm.bias": torch.full((WIDTH,), torch.nan)})
    with pytest.raises(ValueError, match=r"encodes a caption to .* numbers that are not all finite"):
        build_text_tower(folder, pooling="mean")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    text, vision = {"vocab_size": 99, **shape}, {"image_size": 32, "patch_size": 16, **shape}
    both = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    both.save_pretrained(tmp_path / "clip")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, tmp_path / "clip" / file)
    with pytest.raises(ValueError, match="is a CLIPModel, which reads more than texts; save its text"):
        build_text_tower(tmp_path / "clip", pooling="mean", max_length=16)


def test_an_encoder_without_a_limit_is_asked_for_one(encoders):
    folder = encoders("t5 encoder", template="$A </s>", max_length=10**30)
    with pytest.raises(ValueError, match=r"does not say how many tokens it reads: give --text\.max-length"):
        build_text_tower(folder, pooling="mean")
    assert build_text_tower(folder, pooling="mean", max_length=77).encode(CAPTIONS).isfinite().all()
