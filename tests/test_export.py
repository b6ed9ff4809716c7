"""The command: what it writes, what it refuses, what it leaves when it fails."""

import json
import os
import re
from dataclasses import asdict, replace
from unittest.mock import call, create_autospec

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError

from textlock import export
from textlock.demo.text_tower import write_random_text_tower
from textlock.exports import folder, onnx_format, open_clip_format, push, transformers_format
from textlock.exports.loaded import load
from textlock.exports.reading import read_exported, text_settings
from textlock.models.text import TextConfig, build_text_tower, make_text_tower

from . import text_tower
from .commands import run_here
from .exports.towers import images, loaded, random_tower, unit
from .models.text_folders import write_encoder, write_sentence_folder


@pytest.fixture(scope="module")
def tower():
    return random_tower()


@pytest.fixture
def run_export(tower, tmp_path, monkeypatch, capsys):
    """Run the command on a checkpoint of that tower; return the exit status, stdout and stderr."""

    def run(*flags, described=None):
        checkpoint = loaded(tower, tmp_path / "run", described=described)
        monkeypatch.setattr(export, "load_tower", lambda path: checkpoint)
        monkeypatch.setattr("sys.argv", ["export.py", "--checkpoint", "runs/x", *map(str, flags)])
        status = 0
        try:
            export.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("transformers", "modeling_textlock.py"),
        ("nomic", "preprocessor_config.json"),
        ("onnx", "preprocessor_config.json"),
        ("timm", "head.safetensors"),
    ],
)
def test_writes_a_whole_folder_that_reads_back(tower, run_export, tmp_path, name, file):
    recipe = {"prefix": "passage: ", "layer_norm": False, "max_length": 16, "layers": ("Dense 32 to 64 Tanh",)}
    described = text_tower.describe("/home/alice/téxt", **recipe)
    status, out, err = run_export("--format", name, "--output", tmp_path / "new" / "out", described=described)
    assert (status, err) == (0, "") and "step 7" in out
    assert os.listdir(tmp_path / "new") == ["out"]
    assert {"README.md", "config.json", "model.safetensors", file} <= set(os.listdir(tmp_path / "new" / "out"))
    card = (tmp_path / "new" / "out" / "README.md").read_text(encoding="utf-8")
    assert f"library_name: {'timm' if name == 'timm' else 'transformers'}\n" in card
    assert ("The export ran these lines" in card) == (name != "nomic")
    read = read_exported(tmp_path / "new" / "out")
    assert torch.equal(read.tower(images(tower)), tower(images(tower))) and read.logit_scale == 20.0
    # A local folder has no name that means anything elsewhere: whoever measures says where theirs is.
    assert read.text_tower == json.loads(json.dumps(asdict(described) | {"name": None}))
    assert all(b"alice" not in path.read_bytes() for path in (tmp_path / "new" / "out").rglob("*") if path.is_file())
    with pytest.raises(ValueError, match="whose place it does not tell: give --text"):
        text_settings(read.text_tower, tmp_path, None)
    assert text_settings(read.text_tower, tmp_path, "/bob/text") == TextConfig(
        name="/bob/text", prefix="passage: ", max_length=16, pooling="mean", layer_norm=False, dimensions=64
    )
    with pytest.raises(ValueError, match="does not say which text tower"):
        text_settings({"name": "x"}, tmp_path, None)


def test_texts_and_images_in_one_folder(tower, run_export, tmp_path):
    pytest.importorskip("sentence_transformers")
    captions = ["a red bicycle", "a bowl of soup on the table"]
    write_random_text_tower(tmp_path / "alice" / "text", captions, width=64, heads=1)
    text = build_text_tower(tmp_path / "alice" / "text", prefix="find: ")
    described = replace(text.describe(), name=str(tmp_path / "alice" / "text"))
    flags = ("--format", "sentence-transformers", "--output", tmp_path / "out")
    status, _, err = run_export(*flags, described=described)
    assert status == 2 and "the folder text as its text tower, which nobody else has: give --text-name with" in err
    assert not (tmp_path / "out").exists()
    assert run_export(*flags, "--copy-text", described=described)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n---\n")
    assert "in the folder text/, with the fingerprint" in card and "AutoTokenizer" not in card and "alice" not in card
    assert re.search(r"ran these lines with sentence-transformers 6\S+ on the CPU and .* by \de-0[789] at most", card)
    loaded_again = load(tmp_path / "out", None)  # as evaluate.py does
    assert torch.equal(unit(loaded_again.tower, images(tower)), unit(tower, images(tower)))
    rows = make_text_tower(loaded_again.text, torch.device("cpu")).encode(captions)
    assert torch.equal(rows, text.encode(captions))


def test_the_name_of_the_text_tower_is_that_of_the_hub_or_the_one_given(run_export, tmp_path):
    flags = ("--text-name", "owner/téxt", "--license", "apache-2.0")
    assert run_export("--output", tmp_path / "out", *flags)[0] == 0
    assert read_exported(tmp_path / "out").text_tower["name"] == "owner/téxt"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'AutoTokenizer.from_pretrained("owner/téxt")' in card and "license: apache-2.0" in card
    assert "The export ran these lines with transformers 5" in card
    hub = replace(text_tower.describe("owner/other"), revision="c0ffee")
    status, _, err = run_export("--output", tmp_path / "again", *flags, described=hub)
    assert status == 2 and "--text-name is 'owner/téxt', must be left out: the run names its text tower" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--push", "name"), "--push is 'name', must be the name of a model on the hub, owner/name"),
        (("--push", "owner/na--me"), "--push is 'owner/na--me', must be the name of a model on the hub, owner/name"),
        (("--private",), "--private is True, must be left out without --push"),
        (("--copy-text",), "--copy-text is True, must be left out: only --format sentence-transformers and"),
        (("--license", "Apache 2.0"), "--license is 'Apache 2.0', must be an identifier such as apache-2.0"),
        (("--text-name", "/home/alice/text"), "--text-name is '/home/alice/text', must be a name such as owner/name"),
    ],
)
def test_bad_flags_are_one_sentence(run_export, tmp_path, flags, message):
    status, _, err = run_export("--output", tmp_path / "out", *flags)
    assert status == 2 and message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_onnx_takes_the_text_tower_along(run_export, tmp_path):
    write_random_text_tower(tmp_path / "text", ["a photo of a red bus"], width=64)
    text = build_text_tower(tmp_path / "text", prefix="search_query: ", max_length=9)
    flags = ("--format", "onnx", "--copy-text", "--output", tmp_path / "out")
    status, _, err = run_export(*flags, described=replace(text.describe(), fingerprint="of another"))
    assert status == 2 and "text is not the text tower that the run was trained against: " in err
    assert not (tmp_path / "out").exists()

    status, out, err = run_export(*flags, described=text.describe())
    assert (status, err) == (0, "") and "The export ran these lines with onnxruntime 1" in out
    assert sorted(os.listdir(tmp_path / "out" / "onnx")) == ["model.onnx", "text_model.onnx", "tokenizer.json"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert onnx_format.SNIPPET in card and onnx_format.TEXT_SNIPPET in card and "AutoTokenizer" not in card


def test_open_clip_needs_both_towers_and_names_the_text_tower_alone(tower, run_export, tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    encoder = write_encoder(tmp_path / "encoder", "bert")
    text = build_text_tower(write_sentence_folder(tmp_path / "text", encoder), prefix="two dogs: ", max_length=12)
    flags = ("--format", "open_clip", "--output", tmp_path / "out")
    status, _, err = run_export(*flags, described=text.describe())
    assert status == 2 and "open_clip cannot hold this tower: its MLPs are SwiGLU" in err
    vit = loaded(
        random_tower("vit_base_patch16_224", "cls", text.embed_dim), tmp_path / "run", described=text.describe()
    )
    monkeypatch.setattr(export, "load_tower", lambda path: vit)
    monkeypatch.setattr("sys.argv", ["export.py", "--checkpoint", "runs/x", *map(str, flags)])
    with pytest.raises(SystemExit):
        export.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", ["export.py", "--checkpoint", "runs/x", *map(str, flags), "--text-name", "me/text"])
    export.main()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert open_clip_format.SNIPPET in card and "library_name: open_clip\n" in card and "with open_clip 3" in card
    text_cfg = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text_cfg["hf_model_name"] == "me/text"
    place = str(tmp_path).encode()
    assert all(place not in path.read_bytes() for path in (tmp_path / "out").iterdir())


def fail_to_save(*arguments, **names):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def write_another_weight(folder, weights):
    folder_weights(folder, weights | {"blocks.1.mlp.fc2.weight": 1.001 * weights["blocks.1.mlp.fc2.weight"]})


folder_weights = folder.write_weights


@pytest.mark.parametrize(
    ("module", "name", "stand_in", "message"),
    [
        (folder, "save_file", fail_to_save, "could not be written: I/O error: No space left on device"),
        (
            transformers_format,
            "write_weights",
            write_another_weight,
            "differs by .* from the trained tower where 1.0e-06 is",
        ),
        (transformers_format, "_CODE", ("modeling_textlock.py",), "cannot load the folder as it was written"),
    ],
    ids=["a full disk", "another weight", "a file that is missing"],
)
def test_what_fails_leaves_nothing(run_export, tmp_path, monkeypatch, module, name, stand_in, message):
    monkeypatch.setattr(module, name, stand_in)
    status, _, err = run_export("--output", tmp_path / "out")
    assert status == 2 and err.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub's client, with its own signatures: one of its calls may fail."""

    def connect(*, fails=None, is_private=True):
        client = create_autospec(HfApi, instance=True)
        client.create_repo.return_value = "https://hub/owner/name"
        client.repo_info.return_value.private = is_private
        if fails is not None:
            getattr(client, fails).side_effect = ConnectionError("no route to host\nin two lines")
        monkeypatch.setattr(push, "HfApi", lambda: client)
        monkeypatch.setattr(push, "get_token", lambda: "hf_token")
        return client

    return connect


@pytest.mark.parametrize("name", ["transformers", "nomic"])
@pytest.mark.parametrize("private", [True, False])
def test_a_finished_folder_is_uploaded(run_export, hub, tmp_path, name, private):
    client = hub()
    flags = ("--format", name, "--output", tmp_path / "out", "--push", "owner/name", *["--private"] * private)
    status, out, err = run_export(*flags)
    assert (status, err) == (0, "") and out.endswith("uploaded to https://hub/owner/name\n")
    about = "Upload an export of textlock"
    assert client.method_calls == [
        call.create_repo("owner/name", private=True if private else None, exist_ok=True),
        *[call.repo_info("owner/name")] * private,
        call.upload_folder(repo_id="owner/name", folder_path=tmp_path / "out", commit_message=about),
    ]
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize("fails", ["create_repo", "repo_info", "upload_folder"])
def test_a_folder_stays_when_its_upload_fails(tower, run_export, hub, tmp_path, fails):
    hub(fails=fails)
    status, out, err = run_export("--output", tmp_path / "out", "--push", "owner/name", "--private")
    assert status == 2 and "wrote " in out and "uploaded" not in out
    kept = f"error: {tmp_path / 'out'} was written whole and is kept, but not uploaded to owner/name: no route"
    assert err.startswith(kept) and err.endswith(f"hf upload owner/name {tmp_path / 'out'} --private\n")
    assert err.count("\n") == 1
    assert torch.equal(read_exported(tmp_path / "out").tower(images(tower)), tower(images(tower)))


def test_what_is_to_be_private_is_not_uploaded_to_a_public_model(run_export, hub, tmp_path):
    client = hub(is_private=False)
    status, _, err = run_export("--output", tmp_path / "out", "--push", "owner/name", "--private")
    assert status == 2 and "not uploaded to owner/name: that model exists and is public; make it private" in err
    assert not client.upload_folder.called


def test_nothing_is_written_or_asked_without_a_token(run_export, hub, tmp_path, monkeypatch):
    client = hub()
    monkeypatch.setattr(push, "get_token", lambda: None)
    status, _, err = run_export("--output", tmp_path / "out", "--push", "owner/name")
    assert status == 2 and err.count("\n") == 1
    assert "--push needs a token of the hub that may write: run hf auth login, or set HF_TOKEN" in err
    assert os.listdir(tmp_path) == [] and client.method_calls == []


def test_nothing_is_uploaded_that_failed_its_check(run_export, hub, tmp_path, monkeypatch):
    client = hub()
    monkeypatch.setattr(transformers_format, "write_weights", write_another_weight)
    assert run_export("--output", tmp_path / "out", "--push", "owner/name")[0] == 2
    assert client.method_calls == []


def test_a_folder_with_something_in_it_is_kept_and_a_run_without_checkpoint_is_said(tmp_path):
    (tmp_path / "out").mkdir()
    flags = ("--checkpoint", tmp_path / "run", "--output", tmp_path / "out")
    status, _, err = run_here("export.py", *flags)
    assert status == 2 and err.startswith("error: ") and "holds no checkpoint" in err and err.count("\n") == 1
    (tmp_path / "out" / "mine").touch()
    status, _, err = run_here("export.py", *flags)  # said before the checkpoint is looked for
    assert status == 2 and "is not an empty folder" in err and err.count("\n") == 1
    assert os.listdir(tmp_path / "out") == ["mine"]
