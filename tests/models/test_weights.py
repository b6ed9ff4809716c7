import pickle
import re
from functools import partial
from unittest import mock

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


def our_state():
    return dict(randomised_tower().state_dict())


def released_state(*, without=()):
    """Return the released form of a tower, without the keys that begin so."""
    state = to_nomic(our_state())
    return {key: value for key, value in state.items() if not key.startswith(tuple(without))}


# The micro tower's trunk, in timm's terms.
AS_MICRO = {"img_size": 32, "patch_size": 8, "ref_feat_shape": (4, 4)}
AS_MICRO |= {"embed_dim": 64, "depth": 2, "num_heads": 1, "mlp_ratio": 2.75}


def timm_state(**arguments):
    model = timm.create_model("eva02_base_patch14_224", **AS_MICRO, **arguments)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def without(state, removed):
    return {key: value for key, value in state.items() if key != removed}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def test_nomic_round_trip_is_exact():
    ours = our_state()
    released = to_nomic(ours)
    assert_same(from_nomic(released), ours)
    assert_same(to_nomic(from_nomic(released)), released)


def test_released_tensors_are_independent():
    ours = our_state()
    released = to_nomic(ours)
    released["layers.0.mlp.fc12.weight"].zero_()
    assert torch.count_nonzero(released["layers.0.mlp.fc11.weight"])
    assert torch.count_nonzero(ours["blocks.0.mlp.gate_up.weight"]) == ours["blocks.0.mlp.gate_up.weight"].numel()


def test_gate_is_fc12_and_value_is_fc11():
    ours = our_state()
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


@pytest.mark.parametrize(
    ("convert", "state", "names"),
    [
        pytest.param(from_nomic, released_state, None, id="from_nomic"),
        pytest.param(
            from_timm,
            timm_state,
            [
                "patch_embed.proj.bias",
                "blocks.1.attn.k_proj.weight",
                "blocks.1.attn.v_proj.bias",
                "blocks.1.mlp.fc1_x.bias",
                "blocks.1.norm2.weight",
            ],
            id="from_timm",
        ),
    ],
)
def test_names_a_missing_key(convert, state, names):
    """Each of Nomic's; of timm's, whose variants are told by some keys, those that tell nothing."""
    state = state()
    for removed in names or state:
        with pytest.raises(ValueError, match=f"missing key {re.escape(removed)}$"):
            convert(without(state, removed))


@pytest.mark.parametrize(
    ("convert", "state", "added"),
    [
        pytest.param(from_nomic, released_state, "layers.0.ls1", id="from_nomic"),
        pytest.param(from_timm, timm_state, "blocks.0.attn.norm.weight", id="from_timm"),
        pytest.param(to_nomic, our_state, "projection.weight", id="to_nomic"),
    ],
)
def test_names_an_unexpected_key(convert, state, added):
    with pytest.raises(ValueError, match=f"unexpected key {re.escape(added)}$"):
        convert(state() | {added: torch.zeros(1)})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


FORMATS = {
    "ours": (our_state, dict),
    "nomic": (released_state, from_nomic),
    "timm": (timm_state, partial(from_timm, final_norm=False)),
    "timm-with-final-norm": (partial(timm_state, global_pool="token"), partial(from_timm, final_norm=False)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_loads_every_format_from_a_folder_or_a_file(file, name):
    make, convert = FORMATS[name]
    state = make()
    save_file(state, file)
    expected = convert(state)
    for source in (file.parent, str(file)):
        found = build_vision_tower(MICRO, weights=source).state_dict()
        assert_same(expected, {key: value for key, value in found.items() if key in expected})


def test_keeps_the_start_of_a_head_that_the_weights_lack(file):
    save_file(released_state(without=["selector."]), file)
    tower = build_vision_tower(MICRO, embed_dim=16)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    assert weights.load_weights(tower, file.parent) == ("pool", "projection")
    after = tower.state_dict()
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith(("pool.", "projection.")), key
    save_file(released_state(), file)
    assert weights.load_weights(build_vision_tower(MICRO), file) == (), "nothing is kept for a whole tower"


def test_loads_bfloat16_weights_into_float32(file):
    state = {key: value.bfloat16() for key, value in released_state().items()}
    save_file(state, file)
    tower = build_vision_tower(MICRO, weights=file)
    assert tower.patch_embed.weight.dtype == torch.float32
    assert torch.equal(tower.patch_embed.weight, state["embeddings.proj.weight"].float())


UNFIT = {
    "transposed": (
        lambda: released_state() | {"layers.1.mlp.fc2.weight": torch.zeros(176, 64)},
        {},
        "blocks.1.mlp.fc2.weight has shape \\[176, 64\\] where \\[64, 176\\] is needed",
    ),
    "partial head": (lambda: released_state(without=["selector.norm1.bias"]), {}, "missing key selector.norm1.bias"),
    "head not wanted": (released_state, {"pooling": "cls"}, "unexpected key pool.key_value.bias"),
    "too shallow": (lambda: released_state(without=["layers.1."]), {}, "missing key blocks.1.mlp.fc2.bias"),
    "other grid": (released_state, {"image_size": 64}, "position has shape \\[1, 17, 64\\]"),
    "unknown format": (lambda: {"conv1.weight": torch.zeros(1)}, {}, "but conv1.weight"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_names_the_file_and_the_key_that_does_not_fit(file, case):
    make, arguments, message = UNFIT[case]
    save_file(make(), file)
    with pytest.raises(ValueError, match=message) as caught:
        build_vision_tower(MICRO, weights=file.parent, **arguments)
    assert str(file) in str(caught.value)


def test_refuses_a_damaged_file(file):
    save_file(released_state(), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        build_vision_tower(MICRO, weights=file)


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
    with pytest.raises(FileNotFoundError, match=f"weights {re.escape(source)} not found"):
        build_vision_tower(MICRO, weights=source)


def test_an_empty_folder_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found"):
        build_vision_tower(MICRO, weights=tmp_path)


def test_downloads_a_hub_name(file, monkeypatch):
    state = released_state()
    save_file(state, file)
    download = mock.Mock(return_value=str(file))
    monkeypatch.setattr(weights, "hf_hub_download", download)
    tower = build_vision_tower(MICRO, weights="owner/some-model_v1.5")
    download.assert_called_once_with("owner/some-model_v1.5", "model.safetensors")
    assert_same(to_nomic(tower.state_dict()), state)


def test_says_why_a_download_failed(monkeypatch):
    failure = OSError("no route to the hub\nand a long explanation")
    monkeypatch.setattr(weights, "hf_hub_download", mock.Mock(side_effect=failure))
    with pytest.raises(FileNotFoundError, match=re.escape("owner/model is no local path")) as caught:
        build_vision_tower(MICRO, weights="owner/model")
    assert "(no route to the hub)" in str(caught.value)
