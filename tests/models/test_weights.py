import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from textlock.models import weights
from textlock.models.vision import VISION_CONFIGS, build_vision_tower
from textlock.models.weights import from_nomic, from_timm, to_nomic

MICRO = "eva02_micro_patch8_32"


def randomised_tower(**arguments):
    tower = build_vision_tower(MICRO, **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(generator=generator)
    return tower


def released_state(*, head=True):
    state = to_nomic(randomised_tower().state_dict())
    return state if head else {key: value for key, value in state.items() if not key.startswith("selector.")}


def timm_state(**arguments):
    """Make the state dict of a timm model that is the micro tower's trunk."""
    model = timm.create_model(
        "eva02_base_patch14_224",
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=1,
        mlp_ratio=2.75,
        ref_feat_shape=(4, 4),
        **arguments,
    )
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def changed(state, *, remove=(), add=()):
    state = {key: value for key, value in state.items() if key not in remove}
    return state | {key: torch.zeros(1) for key in add}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def test_nomic_round_trip_is_exact():
    ours = dict(randomised_tower().state_dict())
    released = to_nomic(ours)
    assert_same(from_nomic(released), ours)
    assert_same(to_nomic(from_nomic(released)), released)


def test_released_tensors_are_independent():
    ours = dict(randomised_tower().state_dict())
    released = to_nomic(ours)
    released["layers.0.mlp.fc12.weight"].zero_()
    assert torch.count_nonzero(released["layers.0.mlp.fc11.weight"])
    assert torch.count_nonzero(ours["blocks.0.mlp.gate_up.weight"]) == ours["blocks.0.mlp.gate_up.weight"].numel()


def test_gate_is_fc12_and_value_is_fc11():
    ours = randomised_tower().state_dict()
    released = to_nomic(ours)
    hidden = VISION_CONFIGS[MICRO].hidden
    for mlp, theirs in (("blocks.1.mlp", "layers.1.mlp"), ("pool.mlp", "selector.mlp")):
        assert torch.equal(released[f"{theirs}.fc12.weight"], ours[f"{mlp}.gate_up.weight"][:hidden])
        assert torch.equal(released[f"{theirs}.fc11.bias"], ours[f"{mlp}.gate_up.bias"][hidden:])


def test_separate_projections_of_timm_are_packed():
    theirs = timm_state(num_classes=3)
    ours = from_timm(theirs)
    rows = [theirs[f"blocks.1.attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(ours["blocks.1.qkv.weight"], torch.cat(rows))
    biases = [theirs["blocks.1.attn.q_proj.bias"], torch.zeros(64), theirs["blocks.1.attn.v_proj.bias"]]
    assert torch.equal(ours["blocks.1.qkv.bias"], torch.cat(biases))
    assert torch.equal(ours["patch_embed.weight"], theirs["patch_embed.proj.weight"].flatten(1))
    assert torch.equal(ours["blocks.0.mlp.gate_up.weight"][:176], theirs["blocks.0.mlp.fc1_g.weight"])
    assert not [key for key in ours if key.startswith(("head", "fc_norm"))]


def test_fused_projection_of_timm_gets_a_zero_key_bias():
    theirs = timm_state(qkv_fused=True)
    biases = [theirs["blocks.0.attn.q_bias"], torch.zeros(64), theirs["blocks.0.attn.v_bias"]]
    assert torch.equal(from_timm(theirs)["blocks.0.qkv.bias"], torch.cat(biases))


@pytest.mark.parametrize("removed", sorted(released_state()))
def test_nomic_names_a_missing_key(removed):
    with pytest.raises(ValueError, match=f"missing key {re.escape(removed)}$"):
        from_nomic(changed(released_state(), remove=[removed]))


@pytest.mark.parametrize(
    "removed",
    [
        "patch_embed.proj.bias",
        "blocks.1.attn.k_proj.weight",
        "blocks.1.attn.v_proj.bias",
        "blocks.1.mlp.fc1_x.bias",
        "blocks.1.norm2.weight",
    ],
)
def test_timm_names_a_missing_key(removed):
    with pytest.raises(ValueError, match=f"missing key {re.escape(removed)}$"):
        from_timm(changed(timm_state(), remove=[removed]))


@pytest.mark.parametrize(
    ("convert", "state", "added"),
    [
        pytest.param(from_nomic, released_state, "layers.0.ls1", id="from_nomic"),
        pytest.param(from_timm, timm_state, "blocks.0.attn.norm.weight", id="from_timm"),
        pytest.param(to_nomic, lambda: randomised_tower().state_dict(), "projection.weight", id="to_nomic"),
    ],
)
def test_names_an_unexpected_key(convert, state, added):
    with pytest.raises(ValueError, match=f"unexpected key {re.escape(added)}$"):
        convert(changed(state(), add=[added]))


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(lambda: dict(randomised_tower().state_dict()), id="ours"),
        pytest.param(released_state, id="nomic"),
        pytest.param(timm_state, id="timm"),
        pytest.param(lambda: timm_state(global_pool="token"), id="timm-with-final-norm"),
    ],
)
@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_loads_every_format(tmp_path, state, as_folder):
    state = state()
    save_file(state, tmp_path / "model.safetensors")
    tower = build_vision_tower(MICRO, weights=tmp_path if as_folder else str(tmp_path / "model.safetensors"))
    if "embeddings.proj.weight" in state:
        expected = from_nomic(state)
    elif "patch_embed.proj.weight" in state:
        expected = from_timm(state, final_norm=False)
    else:
        expected = state
    assert_same(expected, {key: value for key, value in tower.state_dict().items() if key in expected})


def test_keeps_the_start_of_a_head_that_the_weights_lack(tmp_path):
    save_file(released_state(head=False), tmp_path / "model.safetensors")
    tower = build_vision_tower(MICRO, embed_dim=16)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    assert weights.load_weights(tower, tmp_path) == ("pool", "projection")
    after = tower.state_dict()
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith(("pool.", "projection.")), key


def test_reports_nothing_kept_for_a_whole_tower(tmp_path):
    save_file(released_state(), tmp_path / "model.safetensors")
    assert weights.load_weights(build_vision_tower(MICRO), tmp_path) == ()


def test_loads_bfloat16_weights_into_float32(tmp_path):
    state = {key: value.bfloat16() for key, value in released_state().items()}
    save_file(state, tmp_path / "model.safetensors")
    tower = build_vision_tower(MICRO, weights=tmp_path)
    assert tower.patch_embed.weight.dtype == torch.float32
    assert torch.equal(tower.patch_embed.weight, state["embeddings.proj.weight"].float())


@pytest.mark.parametrize(
    ("state", "arguments", "message"),
    [
        pytest.param(
            lambda: released_state() | {"layers.1.mlp.fc2.weight": torch.zeros(176, 64)},
            {},
            "blocks.1.mlp.fc2.weight has shape \\[176, 64\\] where \\[64, 176\\] is needed",
            id="transposed",
        ),
        pytest.param(
            lambda: changed(released_state(), remove=["selector.norm1.bias"]),
            {},
            "missing key selector.norm1.bias",
            id="partial-head",
        ),
        pytest.param(released_state, {"pooling": "cls"}, "unexpected key pool.key_value.bias", id="head-not-wanted"),
        pytest.param(
            lambda: {key: value for key, value in released_state().items() if not key.startswith("layers.1.")},
            {},
            "missing key blocks.1.mlp.fc2.bias",
            id="too-shallow",
        ),
        pytest.param(released_state, {"image_size": 64}, "position has shape \\[1, 17, 64\\]", id="other-grid"),
        pytest.param(lambda: {"conv1.weight": torch.zeros(1)}, {}, "but conv1.weight", id="unknown-format"),
    ],
)
def test_names_the_file_and_the_key_that_does_not_fit(tmp_path, state, arguments, message):
    save_file(state(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        build_vision_tower(MICRO, weights=tmp_path, **arguments)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_refuses_a_damaged_file(tmp_path):
    save_file(released_state(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        build_vision_tower(MICRO, weights=tmp_path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_never_unpickles(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"not a \.safetensors file"):
        build_vision_tower(MICRO, weights=path)


@pytest.mark.parametrize("source", ["nowhere/deep/model", "nowhere.safetensors", "owner/weights.safetensors"])
def test_names_a_missing_path(source):
    with pytest.raises(FileNotFoundError, match=re.escape(source)):
        build_vision_tower(MICRO, weights=source)


def test_an_empty_folder_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found"):
        build_vision_tower(MICRO, weights=tmp_path)


def test_downloads_a_hub_name(tmp_path, monkeypatch):
    state = released_state()
    save_file(state, tmp_path / "model.safetensors")
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(weights, "hf_hub_download", download)
    tower = build_vision_tower(MICRO, weights="owner/some-model_v1.5")
    assert asked == [("owner/some-model_v1.5", "model.safetensors")]
    assert_same(to_nomic(tower.state_dict()), state)


def test_says_why_a_download_failed(monkeypatch):
    def download(repository, file):
        raise OSError("no route to the hub\nand a long explanation")

    monkeypatch.setattr(weights, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=re.escape("owner/model is no local path")) as caught:
        build_vision_tower(MICRO, weights="owner/model")
    assert "(no route to the hub)" in str(caught.value)
