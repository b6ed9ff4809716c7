import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from textlock.data import embeddings
from textlock.data.embeddings import encode_shards
from textlock.data.images import BadSample
from textlock.data.index import index_shards, open_index
from textlock.data.loader import DataConfig, open_loader
from textlock.data.stored_text import StoredText, file_name, read_header, record_dtype
from textlock.demo.text_tower import write_random_text_tower
from textlock.models.text import build_text_tower

from .tars import jpeg, write_shards

SIZES = [11, 5, 9]
WORDS = ["red", "blue", "circle", "square", "caption", *map(str, range(10))]


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers") / "text"
    write_random_text_tower(folder, [" ".join(WORDS)], width=16, depth=1, heads=1, std=0.1)
    return folder


@pytest.fixture(scope="module")
def tower(tower_folder):
    return build_text_tower(tower_folder, prefix="", max_length=16)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", SIZES, {3: (jpeg(3), b" \n"), 7: (jpeg(7), "r\xe9d".encode())})


def caption_of(number):
    return "r\xe9d" if number == 7 else f"caption {number}"


def test_every_row_is_the_tower_s_and_the_empty_caption_has_none(shards, tower):
    report = encode_shards(shards, tower)
    assert (report.encoded, report.kept, report.rows) == (3, 0, 24)
    assert [(problem.shard, problem.kind) for problem in report.without_row] == [("00000.tar", "no-caption")]
    stored = StoredText(shards / embeddings.FOLDER_NAME, open_index(shards), tower.describe())
    for number in range(25):
        if number == 3:
            with pytest.raises(BadSample) as caught:
                stored.row(number)
            assert caught.value.kind == "no-embedding"
            continue
        row = stored.row(number)
        assert row.dtype == np.float16
        (expected,) = tower.encode([caption_of(number)]).numpy()
        assert np.abs(row - expected).max() <= 2**-11 * np.abs(expected).max()


def test_the_file_is_a_matrix_that_maps_into_memory(shards, tower):
    encode_shards(shards, tower)
    path = shards / embeddings.FOLDER_NAME / "00001.embeddings"
    header = read_header(path)
    assert (header.shard, header.samples, header.embed_dim) == ("00001.tar", 5, 16)
    rows = np.memmap(path, record_dtype(16), "r", header.records_offset)["row"]
    assert rows.shape == (5, 16)
    expected = tower.encode([f"caption {number}" for number in range(11, 16)])
    assert np.abs(rows - expected.numpy()).max() < 1e-3
    assert header.tower == {
        "name": tower.config.name,
        "revision": None,
        "prefix": "",
        "max_length": 16,
        "pooling": "mean",
        "layer_norm": True,
        "embed_dim": 16,
        "fingerprint": tower.fingerprint(),
    }


def test_processes_share_the_shards_and_none_is_done_twice(shards, tower, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    encode_shards(shards, tower, whole)
    counts = [encode_shards(shards, tower, parts, rank=rank, world_size=2).encoded for rank in range(2)]
    assert counts == [2, 1]
    for name in ("00000", "00001", "00002"):
        assert (parts / f"{name}.embeddings").read_bytes() == (whole / f"{name}.embeddings").read_bytes()
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        encode_shards(shards, tower, parts, rank=2, world_size=2)


def test_a_second_run_does_what_is_missing_damaged_or_out_of_date(shards, tower, monkeypatch):
    folder = shards / embeddings.FOLDER_NAME
    encode_shards(shards, tower)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert encode_shards(shards, tower).kept == 3

    (folder / "00000.embeddings").unlink()
    flip(folder / "00001.embeddings", -5)
    cut(folder / "00002.embeddings", 40)
    assert encode_shards(shards, tower).encoded == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written

    write_shards(shards, SIZES, {12: (jpeg(12), b"a blue square")})
    report = encode_shards(shards, tower)
    assert (report.encoded, report.kept) == (2, 1), "the shards of samples 3, 7 and 12 have other captions now"


def test_a_killed_run_leaves_only_whole_files(shards, tower, monkeypatch):
    calls = []

    def dies(self, captions):
        calls.append(len(captions))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, captions)

    original = type(tower).encode
    monkeypatch.setattr(type(tower), "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(shards, tower)
    assert [path.name for path in (shards / embeddings.FOLDER_NAME).iterdir()] == ["00000.embeddings"]
    monkeypatch.undo()
    assert encode_shards(shards, tower).kept == 1


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def settings(shards, **changes):
    base = DataConfig(
        shards=str(shards), batch_size=8, image_size=16, decoder="cpu", workers=2, open_shards=2, max_skipped_fraction=1
    )
    return replace(base, text_embeddings=str(shards / embeddings.FOLDER_NAME), **changes)


def take(config, count, tower, **options):
    with open_loader(config, rank=0, world_size=1, text_tower=tower.describe(), **options) as loader:
        return list(islice(loader, count))


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_the_loader_joins_rows_and_captions(shards, tower, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    encode_shards(shards, tower)
    batches = take(settings(shards, decoder=decoder), 7, tower)
    for batch in batches:
        assert batch.text_embeddings.dtype == torch.float16 and batch.text_embeddings.shape == (8, 16)
        expected = tower.encode(batch.captions)
        assert (batch.text_embeddings.float() - expected).abs().max() < 1e-3
    assert sum(batch.skipped_by_kind.get("no-caption", 0) for batch in batches) >= 1


def test_a_damaged_row_costs_its_sample_and_no_other(shards, tower, tmp_path):
    encode_shards(shards, tower)
    flip(shards / embeddings.FOLDER_NAME / "00001.embeddings", -5)  # the last row: sample 15
    log = tmp_path / "skipped.jsonl"
    batches = take(settings(shards), 3, tower, skipped_log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = {(line["sample"], line["kind"], line["key"]) for line in lines}
    assert found <= {(15, "damaged-embedding", "000000015"), (3, "no-caption", "000000003")}
    assert "000000015" not in [key for batch in batches for key in batch.keys]
    with pytest.raises(BadSample, match=r"embedding 4 of 00001\.embeddings does not have its checksum"):
        StoredText(shards / embeddings.FOLDER_NAME, open_index(shards), tower.describe()).row(15)


def test_rows_of_other_captions_are_not_joined(shards, tower):
    """The shards were packed again with another caption, and the rows were not made again."""
    encode_shards(shards, tower)
    write_shards(shards, SIZES, {12: (jpeg(12), b"a blue square")})
    stored = StoredText(shards / embeddings.FOLDER_NAME, open_index(shards), tower.describe())
    stored.row(11)
    with pytest.raises(BadSample) as caught:
        stored.row(12)
    assert caught.value.kind == "no-embedding"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": "search_query: "}, r"prefix is '' there and 'search_query: ' here"),
        ({"max_length": 8}, "max_length is 16 there and 8 here"),
        ({"layer_norm": False}, "layer_norm is True there and False here"),
    ],
)
def test_another_setting_of_the_tower_is_refused(shards, tower, tower_folder, change, message):
    encode_shards(shards, tower)
    other = build_text_tower(tower_folder, **{"prefix": "", "max_length": 16, **change})
    for use in (lambda: take(settings(shards), 1, other), lambda: encode_shards(shards, other)):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "00000.embeddings" in str(caught.value) and "\n" not in str(caught.value)


def test_other_weights_are_refused_also_in_a_later_file(shards, tower, tmp_path):
    encode_shards(shards, tower)
    write_random_text_tower(tmp_path / "other", [" ".join(WORDS)], width=16, depth=1, heads=1, std=0.1, seed=1)
    other = build_text_tower(tmp_path / "other", prefix="", max_length=16)
    with pytest.raises(
        ValueError, match=r"00000\.embeddings holds embeddings of another text tower.*weights or the tokenizer"
    ):
        take(settings(shards), 1, other)
    encode_shards(shards, other, tmp_path / "rows")
    shutil.copy(tmp_path / "rows" / "00002.embeddings", shards / embeddings.FOLDER_NAME / "00002.embeddings")
    with pytest.raises(ValueError, match=r"00002\.embeddings holds embeddings of another text tower"):
        take(settings(shards), 4, tower)


def test_a_moved_tower_is_the_same_tower(shards, tower, tower_folder, tmp_path):
    encode_shards(shards, tower)
    moved = build_text_tower(shutil.copytree(tower_folder, tmp_path / "moved"), prefix="", max_length=16)
    assert len(take(settings(shards), 1, moved)) == 1


def test_missing_rows_are_named(shards, tower):
    with pytest.raises(FileNotFoundError, match=r"of stored text embeddings: run python -m textlock\.data\.embeddings"):
        take(settings(shards), 1, tower)
    encode_shards(shards, tower)
    (shards / embeddings.FOLDER_NAME / file_name("00001.tar")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards have no stored text embeddings.*00001\.tar"):
        take(settings(shards), 1, tower)
    with pytest.raises(ValueError, match="was not told of which text tower"):
        open_loader(settings(shards), rank=0, world_size=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "holds no stored text embeddings"),
        (lambda path: path.write_bytes(b"TEXTROWS" + b"\xff" * 8), "has version"),
        (lambda path: path.write_bytes(b"TEXTROWS\x01\0\0\0" + b"\xff" * 4), "is damaged"),
        (lambda path: flip(path, 30), "is damaged"),
        (lambda path: cut(path, 1), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is damaged"),
    ],
    ids=["empty", "version", "endless header", "header bit", "cut", "longer"],
)
def test_a_damaged_file_is_named(shards, tower, damage, message):
    encode_shards(shards, tower)
    path = shards / embeddings.FOLDER_NAME / "00000.embeddings"
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        take(settings(shards), 1, tower)
    assert str(path) in str(caught.value)


@pytest.mark.gpu  # the command takes one where there is one
def test_the_command(shards, tower_folder, capsys):
    text = embeddings.Tower(name=str(tower_folder), prefix="", max_length=16)
    options = embeddings.Options(shards=shards, text=text)
    embeddings.main(replace(options, rank=1, world_size=2))
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "00001.tar" and "5 captions of 1 shards encoded" in said
    embeddings.main(options)
    said = capsys.readouterr().out
    assert "19 captions of 2 shards encoded" in said and "1 shards were there; 1 samples have no caption" in said
    assert "no row: 00000.tar sample 3 (no-caption)" in said

    command = [sys.executable, "-m", "textlock.data.embeddings", str(shards), "--tower", str(tower_folder)]
    done = subprocess.run([*command, "--prefix", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "prefix is '' there and 'x' here" in done.stderr


def test_rows_that_are_not_finite_are_not_written(shards, tower, monkeypatch):
    monkeypatch.setattr(type(tower), "encode", lambda self, captions: torch.full((len(captions), 16), torch.nan))
    with pytest.raises(ValueError, match=r"not finite for captions of 00000\.tar"):
        encode_shards(shards, tower)
    assert not list((shards / embeddings.FOLDER_NAME).iterdir())


def test_shards_without_an_index(tmp_path, tower):
    shards = write_shards(tmp_path / "shards", [3])
    (shards / "index.textlock").unlink()
    with pytest.raises(FileNotFoundError, match=r"run python -m textlock\.data\.shards index"):
        encode_shards(shards, tower)
    index_shards(shards)
    assert encode_shards(shards, tower).rows == 3
