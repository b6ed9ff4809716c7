import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, NomicBertModel

from textlock.demo.text_tower import write_random_text_tower
from textlock.models import text_folder
from textlock.models.text import TextTower, bucket_by_length, build_text_tower

from .text_folders import CAPTIONS, edit_json, edit_weights

NOMIC = {"prefix": "search_query: ", "layer_norm": True, "max_length": 77}


def nomic_tower(folder: Path, **changes) -> TextTower:
    """Load a folder with the recipe of Nomic Embed Text v1.5, whatever it says itself."""
    return build_text_tower(folder, **NOMIC | changes)


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers") / "nomic"
    write_random_text_tower(folder, CAPTIONS, width=32, depth=2, heads=2, std=0.1)
    # Norms as they start give rows of mean 0, which hides a missing LayerNorm after pooling; token types start at zero.
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.ndim == 1 or "token_type" in name:
            tensor += (0.3 if tensor.ndim == 1 else 0.02) * torch.randn(tensor.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def editable(tower_folder, tmp_path):
    """Give a copy of the tower's folder that a test may damage."""
    return Path(shutil.copytree(tower_folder, tmp_path / "tower"))


def reference_rows(folder, captions, *, prefix="search_query: ", layer_norm=True, max_length=77):
    """Write out the recipe: one padded batch through transformers' own class, pooled in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = NomicBertModel.from_pretrained(folder).eval()
    batch = tokenizer(
        [prefix + c for c in captions], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.double()
    rows = []
    for states, mask in zip(hidden, batch["attention_mask"].bool(), strict=True):
        row = states[mask].mean(dim=0)
        if layer_norm:
            row = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
        rows.append(row / row.norm())
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel(), "the test needs padding"
    return torch.stack(rows)


def largest_difference(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("layer_norm", [True, False], ids=["v1.5", "v1"])
@pytest.mark.parametrize(
    "prefix, max_length", [("search_query: ", 77), ("", 77), ("search_query: ", 9)], ids=["recipe", "bare", "short"]
)
def test_rows_follow_the_recipe(tower_folder, layer_norm, prefix, max_length):
    settings = {"layer_norm": layer_norm, "prefix": prefix, "max_length": max_length}
    rows = nomic_tower(tower_folder, **settings).encode(CAPTIONS)
    assert rows.shape == (len(CAPTIONS), 32)
    assert rows.dtype == torch.float32
    assert largest_difference(rows, reference_rows(tower_folder, CAPTIONS, **settings)) < 1e-6
    settings["layer_norm"] = not layer_norm
    assert largest_difference(rows, reference_rows(tower_folder, CAPTIONS, **settings)) > 1e-3


def test_a_row_does_not_depend_on_its_batch(tower_folder):
    tower = nomic_tower(tower_folder)
    together = tower.encode(CAPTIONS)
    apart = torch.cat([tower.encode(CAPTIONS[:3]), tower.encode(CAPTIONS[3:])])
    alone = torch.cat([tower.encode([caption]) for caption in CAPTIONS])
    assert largest_difference(together, apart) < 1e-6
    assert largest_difference(together, alone) < 1e-6


def test_rows_come_in_input_order_and_captions_stay_apart(tower_folder):
    rows = nomic_tower(tower_folder).encode(CAPTIONS)
    reversed_rows = nomic_tower(tower_folder).encode(CAPTIONS[::-1])
    assert largest_difference(rows, reversed_rows.flip(0)) < 1e-6
    similarity = rows @ rows.T
    same = [[a == b for b in CAPTIONS] for a in CAPTIONS]
    assert (similarity[~torch.tensor(same)] < 0.999).all()


def test_equal_captions_are_encoded_once(tower_folder, monkeypatch):
    tower = nomic_tower(tower_folder)
    encoded = []
    encode_tokens = tower._encode_tokens
    monkeypatch.setattr(tower, "_encode_tokens", lambda tokens: (encoded.extend(tokens), encode_tokens(tokens))[1])
    rows = tower.encode(["two dogs", "a red circle"] * 50)
    assert len(encoded) == 2
    assert torch.equal(rows, rows[:2].repeat(50, 1))


LENGTHS = {
    "web captions": np.clip(np.random.default_rng(0).lognormal(2.9, 0.5, 4096).astype(int), 5, 77).tolist(),
    "few and far apart": [5, 77, 6, 40, 12, 60, 5, 21],
    "uniform": np.random.default_rng(1).integers(3, 78, 500).tolist(),
    "all equal": [20] * 1000,
    "one": [7],
    "longer than the budget": [50, 3000, 3000, 2],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_bucketing_pads_less_than_a_tenth(lengths):
    batches = bucket_by_length(lengths, 2048)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert sum(padded) < 1.1 * sum(lengths)
    assert all(len(batch) == 1 or tokens <= 2048 for batch, tokens in zip(batches, padded, strict=True))
    assert len(batches) < sum(lengths) / 2048 * 1.5 + 40, "the padding rule must not shatter the batches"


def test_encode_uses_the_buckets(tower_folder, monkeypatch):
    tower = nomic_tower(tower_folder)
    shapes = []
    run = tower.encoder.forward
    monkeypatch.setattr(
        tower.encoder, "forward", lambda **inputs: (shapes.append(inputs["input_ids"].shape), run(**inputs))[1]
    )
    captions = [f"{'dog ' * (1 + number % 40)}{number}" for number in range(300)]
    tower.encode(captions)
    tokenizer = AutoTokenizer.from_pretrained(tower_folder)
    tokens = tokenizer([tower.recipe.prefix + caption for caption in captions], truncation=True, max_length=77)[
        "input_ids"
    ]
    real = sum(map(len, tokens))
    assert real <= sum(rows * length for rows, length in shapes) < 1.1 * real


def test_no_captions_give_no_rows(tower_folder):
    rows = nomic_tower(tower_folder).encode([])
    assert rows.shape == (0, 32)
    assert rows.dtype == torch.float32


def test_a_caption_without_tokens_gives_a_finite_row(editable):
    edit_json(editable / "tokenizer.json", post_processor=None)
    rows = nomic_tower(editable, prefix="").encode(["", "two dogs"])
    assert rows.isfinite().all()
    assert torch.allclose(rows.norm(dim=1), torch.ones(2))


def test_lone_surrogates_are_encoded(tower_folder):
    assert nomic_tower(tower_folder).encode(["a \udcff red circle"]).isfinite().all()


def test_a_huge_caption_is_cut_before_it_is_tokenised(tower_folder):
    tower = nomic_tower(tower_folder)
    huge = "a red dog " * 100_000
    rows = tower.encode([huge, huge[:2000]])
    assert largest_difference(rows[:1], rows[1:]) < 1e-6

    seen = []
    tower._tokenizer = SimpleNamespace(
        encode_batch_fast=lambda texts: [seen.extend(texts), SimpleNamespace(ids=[2])][1:]
    )
    tower.encode([huge])
    assert len(seen) == 1
    assert len(seen[0]) < 6000


def test_the_tower_is_frozen(tower_folder):
    tower = nomic_tower(tower_folder)
    assert not isinstance(tower, torch.nn.Module)
    with torch.enable_grad():
        rows = tower.encode(CAPTIONS)
    assert not rows.requires_grad
    assert not rows.is_inference(), "inference tensors cannot be saved for the loss's backward"
    assert not any(parameter.requires_grad for parameter in tower.encoder.parameters())


def test_an_autocast_of_the_caller_changes_nothing(tower_folder):
    tower = nomic_tower(tower_folder)
    rows = tower.encode(CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tower.encode(CAPTIONS), rows)


def test_attention_is_never_cudnns(tower_folder, monkeypatch):
    """It builds a plan for every new shape of a batch."""
    allowed = []
    attend = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    nomic_tower(tower_folder).encode(CAPTIONS)
    assert allowed and not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before, "the image tower has its own choice"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the GPU's rows with the CPU's")
def test_gpu_rows_equal_cpu_rows_up_to_bfloat16(tower_folder):
    rows = nomic_tower(tower_folder, device="cuda").encode(CAPTIONS)
    assert (rows.device.type, rows.dtype) == ("cuda", torch.float32)
    assert largest_difference(rows.cpu(), nomic_tower(tower_folder).encode(CAPTIONS)) < 1e-2


# Every value differs from NomicBertConfig's defaults, so a field that is not translated changes the rows or the load.
OLD_NAMES = {
    "hidden_size": ("n_embd", 32.0),
    "num_hidden_layers": ("n_layer", 2),
    "num_attention_heads": ("n_head", 2),
    "intermediate_size": ("n_inner", 128.0),
    "layer_norm_eps": ("layer_norm_epsilon", 1e-2),
    "hidden_act": ("activation_function", "swiglu"),
    "rope_parameters": ("rotary_emb_base", 50),
}
HUB_EXTRAS = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    "n_positions": 8192,
    "prenorm": False,
    "causal": False,
    "use_rms_norm": None,
    "qkv_proj_bias": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "pad_vocab_size_multiple": 1,
}


@pytest.mark.parametrize("keep_native", [False, True], ids=["old names only", "both, as on the hub"])
def test_old_nomic_configs_are_translated(editable, tmp_path, keep_native):
    native = Path(shutil.copytree(editable, tmp_path / "native"))
    edit_json(native / "config.json", layer_norm_eps=1e-2, rope_parameters={"rope_theta": 50.0, "rope_type": "default"})
    shutil.copy(native / "config.json", editable / "config.json")
    old = dict(OLD_NAMES.values())
    removed = () if keep_native else (*OLD_NAMES, "max_position_embeddings", "head_dim")
    edit_json(editable / "config.json", remove=removed, **old, **HUB_EXTRAS)
    (editable / "evil.py").write_text("raise SystemExit('code of a model folder was run')")

    rows = nomic_tower(editable).encode(CAPTIONS)
    assert torch.equal(rows, nomic_tower(native).encode(CAPTIONS))
    assert largest_difference(rows, reference_rows(native, CAPTIONS)) < 1e-6


def test_a_padded_vocabulary_is_read_from_the_multiple(editable):
    weights = load_file(editable / "model.safetensors")
    words = weights["embeddings.word_embeddings.weight"]
    padded = -(-len(words) // 64) * 64
    weights["embeddings.word_embeddings.weight"] = torch.cat([words, torch.zeros(padded - len(words), 32)])
    expected = nomic_tower(editable).encode(CAPTIONS)
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    edit_json(editable / "config.json", pad_vocab_size_multiple=64)
    assert torch.equal(nomic_tower(editable).encode(CAPTIONS), expected)


def test_original_and_native_weight_names_give_the_same_rows(editable):
    assert "encoder.layers.0.attn.Wqkv.weight" in load_file(editable / "model.safetensors")
    expected = nomic_tower(editable).encode(CAPTIONS)
    native = NomicBertModel.from_pretrained(editable).state_dict()
    assert "layers.0.self_attn.q_proj.weight" in native
    save_file(native, editable / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(nomic_tower(editable).encode(CAPTIONS), expected)


def test_sharded_half_precision_weights_load_in_float32(editable):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(editable / "model.safetensors").items()}
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    whole = nomic_tower(editable)
    rows, fingerprint = whole.encode(CAPTIONS), whole.fingerprint()
    assert {parameter.dtype for parameter in whole.encoder.parameters()} == {torch.float32}

    (editable / "model.safetensors").unlink()
    files = {}
    for number, name in enumerate(sorted(weights)):
        files.setdefault(f"model-{number % 3}.safetensors", {})[name] = weights[name]
    for file, part in files.items():
        save_file(part, editable / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (editable / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = nomic_tower(editable)
    assert torch.equal(sharded.encode(CAPTIONS), rows)
    assert sharded.fingerprint() == fingerprint


def drop(folder, *files):
    for file in files:
        (folder / file).unlink()


DAMAGE = {
    "no config": (lambda f: drop(f, "config.json"), "has no config.json"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config of another kind": (lambda f: (f / "config.json").write_text("[]"), "holds a list instead of a dict"),
    "a text where a number is meant": (
        lambda f: edit_json(f / "config.json", hidden_size="32"),
        "describes no model",
    ),
    "no heads": (lambda f: edit_json(f / "config.json", num_attention_heads=0), "describes no model|cannot be read"),
    "a width beyond all memory": (
        lambda f: edit_json(f / "config.json", hidden_size=10**7, num_attention_heads=1),
        "asks for [0-9,]+ weights and its files hold",
    ),
    "tokenizer of no kind": (
        lambda f: (f / "tokenizer.json").write_text('{"version": 1}'),
        "the tokenizer of text tower .* cannot be read",
    ),
    "weights elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}'),
        "does not map weights to files of its folder",
    ),
    "modules of no kind": (lambda f: (f / "modules.json").write_text("{}"), "holds a dict instead of a list"),
    "no tokenizer": (lambda f: drop(f, "tokenizer.json", "tokenizer_config.json"), "has no tokenizer.json"),
    "no weights": (lambda f: drop(f, "model.safetensors"), "has no model.safetensors"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pickled weights .* are not read",
    ),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot be read"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1000]),
        "cannot be read",
    ),
    "missing key": (
        lambda f: edit_weights(f, remove=["encoder.layers.1.norm2.weight"]),
        r"lacks the weights layers.1.post_mlp_layernorm.weight",
    ),
    "unexpected key": (
        lambda f: edit_weights(f, **{"encoder.layers.0.attn.Wqkv.bias": torch.zeros(96)}),
        r"unexpected weights .*bias",
    ),
    "extra layer": (lambda f: edit_json(f / "config.json", num_hidden_layers=1), r"unexpected weights layers\.1"),
    "wrong shape": (lambda f: edit_json(f / "config.json", intermediate_size=64), r"wrong shape layers\.0\.mlp"),
    "tokenizer of another model": (
        lambda f: (
            edit_weights(f, **{"embeddings.word_embeddings.weight": torch.zeros(10, 32)})
            or edit_json(f / "config.json", vocab_size=10)
        ),
        "belongs to another model",
    ),
    "field missing": (
        lambda f: edit_json(f / "config.json", remove=["hidden_size"]),
        "neither hidden_size nor n_embd",
    ),
    "rope base missing": (
        lambda f: edit_json(f / "config.json", remove=["rope_parameters"]),
        "neither rope_theta nor rotary_emb_base",
    ),
    "contradiction": (lambda f: edit_json(f / "config.json", n_layer=3), "num_hidden_layers=2 but n_layer=3"),
    "pre-norm": (lambda f: edit_json(f / "config.json", prenorm=True), "prenorm=True"),
    "half rotary": (lambda f: edit_json(f / "config.json", rotary_emb_fraction=0.5), "rotary_emb_fraction=0.5"),
    "no gate": (lambda f: edit_json(f / "config.json", activation_function="gelu"), "activation_function=gelu"),
    "own code": (
        lambda f: edit_json(f / "config.json", model_type="mystery", auto_map={"AutoConfig": "evil.Config"}),
        "no built-in class for model type 'mystery'",
    ),
    "encoder-decoder": (
        lambda f: (f / "config.json").write_text(json.dumps({"model_type": "bart", "is_encoder_decoder": True})),
        "encoder-decoder",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders_raise_one_clear_sentence(editable, damage, message):
    (editable / "evil.py").write_text("raise SystemExit('code of a model folder was run')")
    damage(editable)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        nomic_tower(editable)
    assert str(editable) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text tower folder .*nowhere"):
        nomic_tower(tmp_path / "nowhere")


def test_a_hub_name_is_fetched_and_a_failure_is_one_sentence(tower_folder, monkeypatch):
    monkeypatch.setattr(text_folder, "snapshot_download", lambda name, **more: str(tower_folder))
    assert nomic_tower("some-org/some-model").embed_dim == 32

    def unreachable(name, **more):
        raise OSError("several\nlines")

    monkeypatch.setattr(text_folder, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match="some-org/some-model is neither a folder here nor") as caught:
        nomic_tower("some-org/some-model")
    assert "\n" not in str(caught.value)


def test_too_long_a_max_length_is_refused(tower_folder):
    with pytest.raises(ValueError, match=r"--text\.max-length is 513, must be at most 512"):
        nomic_tower(tower_folder, max_length=513)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: edit_weights(f, **{"emb_ln.bias": torch.full((32,), 1e-3)}),
        lambda f: edit_json(f / "config.json", layer_norm_eps=1e-6),
        lambda f: edit_json(f / "tokenizer.json", post_processor=None),
        lambda f: edit_json(f / "tokenizer_config.json", do_lower_case=False),
        {"prefix": "search_document: "},
        {"max_length": 64},
        {"layer_norm": False},
    ],
    ids=["weights", "config", "tokenizer", "tokenizer settings", "prefix", "max_length", "layer_norm"],
)
def test_the_fingerprint_tells_towers_apart(editable, tower_folder, change):
    if callable(change):
        change(editable)
        other = nomic_tower(editable)
    else:
        other = nomic_tower(editable, **change)
    tower = nomic_tower(tower_folder)
    assert tower.fingerprint() == nomic_tower(tower_folder).fingerprint()
    assert len(tower.fingerprint()) == 64
    assert other.fingerprint() != tower.fingerprint()
