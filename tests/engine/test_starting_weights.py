"""Starting weights from other files, patches and resolutions, next to what timm itself makes of them."""

import hashlib
import json
import os
import sys
from unittest import mock

import httpx2
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models.eva import checkpoint_filter_fn

from textlock.engine import starting_weights
from textlock.engine.starting_weights import Options, convert
from textlock.models.vision import build_vision_tower
from textlock.models.weights import load_weights, to_nomic

from .training import MICRO

# The micro tower's trunk in timm's terms, with patches of another size: 4 pixels, 6 of them a side.
OF_MICRO = {"embed_dim": 64, "depth": 2, "num_heads": 1, "mlp_ratio": 2.75, "num_classes": 0}
OTHERS = {"img_size": 24, "patch_size": 4, "ref_feat_shape": (6, 6)}


def timm_model(**arguments):
    model = timm.create_model("eva02_base_patch14_224", **OF_MICRO, **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def weights_of_timm(**arguments):
    return {key: value.clone() for key, value in timm_model(**arguments).state_dict().items()}


def converted(source, output, **options):
    said = convert(Options(source=str(source), output=output, model=MICRO, **options))
    return said, load_file(output / "model.safetensors")


@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
def test_a_file_of_torch_is_read_as_safetensors_are(wrapper, tmp_path):
    weights = weights_of_timm(img_size=32, patch_size=8, ref_feat_shape=(4, 4))
    save_file(weights, tmp_path / "there.safetensors")
    folder = tmp_path / "hub"
    folder.mkdir()
    content = weights if wrapper is None else {wrapper: weights, "epoch": 3}
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is not a .safetensors file: convert it by python -m textlock"
    ):
        load_weights(build_vision_tower(MICRO), folder)

    said, found = converted(folder, tmp_path / "start")
    assert "nothing was resampled" in said
    origin = json.loads((tmp_path / "start" / "origin.json").read_text())
    digest = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    assert origin == {"source": str(folder), "file": "pytorch_model.bin", "sha256": digest, "changes": []}
    direct, tower = build_vision_tower(MICRO), build_vision_tower(MICRO)
    assert load_weights(direct, tmp_path / "there.safetensors") == load_weights(tower, tmp_path / "start") == ("pool",)
    for key, value in direct.state_dict().items():
        if not key.startswith("pool."):
            assert torch.equal(value, tower.state_dict()[key]) and torch.equal(value, found[key])


@pytest.mark.parametrize("image_size", [32, 80])
def test_patches_and_positions_are_resampled_as_timm_does(image_size, tmp_path):
    save_file(weights_of_timm(**OTHERS), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has shape .* is needed: python -m .*starting_weights resamples"):
        load_weights(build_vision_tower(MICRO, image_size=image_size), tmp_path / "other.safetensors")

    said, _ = converted(tmp_path / "other.safetensors", tmp_path / "start", image_size=image_size)
    grid = image_size // 8
    assert said.endswith(f"patches of 4 pixels resampled to 8, positions of 6 x 6 patches resampled to {grid} x {grid}")
    theirs = timm_model(img_size=image_size, patch_size=8, ref_feat_shape=(4, 4))
    theirs.load_state_dict(checkpoint_filter_fn(weights_of_timm(**OTHERS), theirs))
    for block in theirs.blocks:
        block.mlp.norm.eps = 1e-5  # that of the released towers
    tower = build_vision_tower(MICRO, image_size=image_size, weights=str(tmp_path / "start")).double().eval()
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs.double().forward_features(images), tower.forward_features(images)
    # Tables of positions are in float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_released_head_comes_along(tmp_path):
    tower = build_vision_tower(MICRO)
    torch.save(to_nomic(tower.state_dict()), tmp_path / "released.pt")
    converted(tmp_path / "released.pt", tmp_path / "start")
    other = build_vision_tower(MICRO)
    assert load_weights(other, tmp_path / "start") == ()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in tower.state_dict().items())


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("was-here",)


def named(**tensors):
    return weights_of_timm(img_size=32, patch_size=8, ref_feat_shape=(4, 4)) | tensors


def without(state, removed):
    return {key: value for key, value in state.items() if key != removed}


REFUSED = {
    "code": (lambda: {"model": RunsCode()}, "torch's weights_only loader, which runs no code, does not read it"),
    "no tensors": (lambda: {"epoch": 3}, "it holds no tensors by name, nor has it any under state_dict, model"),
    "a list": (lambda: [torch.zeros(3)], "it holds no tensors by name"),
    "other keys": (lambda: {"conv1.weight": torch.zeros(3)}, "it has none of patch_embed.weight"),
    "a missing key": (lambda: without(named(), "blocks.1.norm2.bias"), "missing key blocks.1"),
    "another width": (lambda: named(cls_token=torch.zeros(1, 1, 32)), "class_token has shape"),
    "patches of no square": (
        lambda: named(**{"patch_embed.proj.weight": torch.zeros(64, 3, 8, 7)}),
        "no square of RGB",
    ),
    "positions of no grid": (
        lambda: named(pos_embed=torch.zeros(1, 19, 64)),
        "its 19 positions are no square grid and 1",
    ),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_nothing(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(), tmp_path / "weights.bin")
    with pytest.raises(ValueError) as caught:
        converted("weights.bin", tmp_path / "start")
    assert f"weights.bin does not fit {MICRO}: " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


def remote(**files):
    """A hub that has these files."""

    def download(source, name):
        if name in files:
            return files[name]
        raise RemoteEntryNotFoundError(
            f"no {name}", response=httpx2.Response(404, request=httpx2.Request("GET", "http://x"))
        )

    return download


def test_a_repository_with_a_file_of_torch_alone_is_read(tmp_path, monkeypatch):
    torch.save(named(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(
        starting_weights, "hf_hub_download", remote(**{"pytorch_model.bin": str(tmp_path / "pytorch_model.bin")})
    )
    converted("owner/name", tmp_path / "start")
    assert json.loads((tmp_path / "start" / "origin.json").read_text())["source"] == "owner/name"
    monkeypatch.setattr(starting_weights, "hf_hub_download", remote())
    with pytest.raises(FileNotFoundError, match=r"^owner/name on the hub has neither model\.safetensors"):
        converted("owner/name", tmp_path / "other")


def test_the_command_says_in_one_sentence_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    offline = mock.Mock(side_effect=LocalEntryNotFoundError("no route to the hub\nand a long explanation"))
    monkeypatch.setattr(starting_weights, "hf_hub_download", offline)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "text.bin").write_bytes(b"text")
    for words, message in (
        (["nowhere.bin"], "weights nowhere.bin not found"),
        (["empty"], "empty has neither model.safetensors nor pytorch_model.bin"),
        (["owner/name"], "owner/name is no local path, and model.safetensors could not be downloaded from the hub"),
        (["text.bin"], "weights_only loader"),
        (["text.bin", "--output", "full"], "is not an empty folder"),
        (["text.bin", "--model", "resnet50"], "must be one of eva02_base_patch16_224"),
        (["text.bin", "--image-size", "33"], "must be a multiple of 8"),
    ):
        monkeypatch.setattr(sys, "argv", ["starting_weights", "--output", "start", "--model", MICRO, *words])
        with pytest.raises(SystemExit) as ended:
            starting_weights.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and message in said and said.count("\n") == 1, said
        assert not (tmp_path / "start").exists()
