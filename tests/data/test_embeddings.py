import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch

from textlock.data.captions import caption_id
from textlock.data.embeddings import FOLDER_NAME, encode_shards
from textlock.data.index import INDEX_NAME, open_index
from textlock.data.reader import ShardReader
from textlock.data.stored_text import StoredText, file_name, read_header, record_dtype
from textlock.demo.text_tower import write_random_text_tower
from textlock.models.text import build_text_tower

from ..commands import run_here
from ..conftest import records
from . import loading
from .loading import keys, open_one
from .tars import bad_sample, caption_of, flip, key_of, write_shards

SIZES = [11, 5, 9]
CHANGES = {3: {"txt": b" \n"}, 7: {"txt": "r\xe9d".encode()}}
OTHER_CAPTION = {12: {"txt": b"a blue square"}}
CAPTIONS = ["red blue circle square caption 0 1 2 3 4 5 6 7 8 9"]
TOWER = {"width": 16, "depth": 1, "heads": 1, "std": 0.1}


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers") / "text"
    write_random_text_tower(folder, CAPTIONS, **TOWER)
    return folder


def build(folder, **changes):
    return build_text_tower(folder, **{"max_length": 16, **changes})


@pytest.fixture(scope="module")
def tower(tower_folder):
    return build(tower_folder)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", SIZES, CHANGES)


@pytest.fixture(scope="module")
def encoded_once(tower, tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("encoded") / "shards", SIZES, CHANGES)
    return folder, encode_shards(folder, tower)


@pytest.fixture
def encoded(encoded_once, tmp_path):
    """Return shards with their embeddings, for one test to change."""
    return shutil.copytree(encoded_once[0], tmp_path / "encoded")


def path_of(shards, number):
    return shards / FOLDER_NAME / f"0000{number}.embeddings"


def stored(shards, tower):
    return StoredText(shards / FOLDER_NAME, open_index(shards), tower.describe())


def rows_of(shards, tower):
    """Return what gives the stored embedding of a sample's caption."""
    rows, reader = stored(shards, tower), ShardReader(open_index(shards))

    def row_of(number, which=0):
        captions = [*reader.read_captions(number), ""]
        return rows.row(number, which, caption_id(captions[which]))

    return row_of


def settings(shards, **changes):
    return loading.settings(shards, text_embeddings=(str(shards / FOLDER_NAME),), **changes)


def take(config, count, tower, **options):
    return loading.take(config, count, text_tower=tower.describe(), **options)


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def test_every_embedding_is_the_tower_s_and_the_empty_caption_has_none(encoded_once, tower):
    shards, report = encoded_once
    assert (report.encoded, report.kept, report.rows) == (3, 0, 24)
    assert [(problem.shard, problem.kind) for problem in report.without_row] == [("00000.tar", "no-caption")]
    row_of = rows_of(shards, tower)
    for number in set(range(25)) - {3}:
        row = row_of(number)
        assert row.dtype == np.float16
        (expected,) = tower.encode(["r\xe9d" if number == 7 else caption_of(number)]).numpy()
        assert np.abs(row - expected).max() <= 2**-11 * np.abs(expected).max()
    with bad_sample("no-embedding"):
        row_of(3)

    header = read_header(path_of(shards, 1))
    assert (header.shard, header.captions, header.embed_dim) == ("00001.tar", 5, 16)
    assert header.tower == json.loads(json.dumps(asdict(tower.describe())))
    assert header.tower["recipe"]["pooling"] == ["mean"] and header.tower["recipe"]["max_length"] == 16
    matrix = np.memmap(path_of(shards, 1), record_dtype(16), "r", header.records_offset)["row"]
    assert np.array_equal(matrix, [row_of(number) for number in range(11, 16)])


def test_processes_share_the_shards_and_none_is_done_twice(shards, encoded_once, tower, tmp_path):
    parts = tmp_path / "parts"
    counts = [encode_shards(shards, tower, parts, rank=rank, world_size=2).encoded for rank in range(2)]
    assert counts == [2, 1]
    for number, path in enumerate(sorted(parts.iterdir(), key=lambda path: path.name)):
        assert path.read_bytes() == path_of(encoded_once[0], number).read_bytes()
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        encode_shards(shards, tower, parts, rank=2, world_size=2)


def test_a_second_run_does_what_is_missing_damaged_or_out_of_date(encoded, tower):
    written = [path_of(encoded, number).read_bytes() for number in range(3)]
    assert encode_shards(encoded, tower).kept == 3
    path_of(encoded, 0).unlink()
    flip(path_of(encoded, 1), -5)
    cut(path_of(encoded, 2), 40)
    assert encode_shards(encoded, tower).encoded == 3
    assert [path_of(encoded, number).read_bytes() for number in range(3)] == written

    write_shards(encoded, SIZES, CHANGES | OTHER_CAPTION)
    row_of = rows_of(encoded, tower)
    row_of(11)
    with bad_sample("no-embedding"):  # until the captions are encoded again
        row_of(12)
    report = encode_shards(encoded, tower)
    assert (report.encoded, report.kept) == (1, 2)


def test_every_caption_of_an_image_is_stored_and_the_one_of_the_step_is_joined(tower, tmp_path):
    several = {0: {"txt": b"red circle\nblue square\n\n7 8 9"}, 4: {"txt": b"one\ntwo"}}
    shards = write_shards(tmp_path / "shards", SIZES, CHANGES | several)
    assert (report := encode_shards(shards, tower)).rows == 24 + 2 + 1
    assert [(read_header(path_of(shards, shard)).captions) for shard in range(3)] == [13, 5, 9] and report.encoded == 3
    row_of = rows_of(shards, tower)
    expected = tower.encode(["red circle", "blue square", "7 8 9"]).numpy()
    for which in range(3):
        assert np.abs(row_of(0, which) - expected[which]).max() <= 2**-11 * np.abs(expected[which]).max()
    for batch in take(settings(shards), 6, tower):
        assert (batch.text_embeddings.float() - tower.encode(batch.captions)).abs().max() < 1e-3
    assert encode_shards(shards, tower).kept == 3
    write_shards(shards, SIZES, CHANGES | several | {0: {"txt": b"red circle\nblue square\n\n7 8 8"}})
    assert encode_shards(shards, tower).encoded == 1


def test_a_killed_run_leaves_only_whole_files(shards, tower, monkeypatch):
    calls = []

    def dies(self, captions):
        calls.append(captions)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, captions)

    original = type(tower).encode
    monkeypatch.setattr(type(tower), "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(shards, tower)
    assert [path.name for path in (shards / FOLDER_NAME).iterdir()] == ["00000.embeddings"]
    monkeypatch.undo()
    assert encode_shards(shards, tower).kept == 1


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_the_loader_joins_embeddings_and_captions(encoded_once, tower, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    batches = take(settings(encoded_once[0], decoder=decoder), 7, tower)
    for batch in batches:
        assert batch.text_embeddings.dtype == torch.float16 and batch.text_embeddings.shape == (8, 16)
        expected = tower.encode(batch.captions)
        assert (batch.text_embeddings.float() - expected).abs().max() < 1e-3
    assert sum(batch.skipped_by_kind.get("no-caption", 0) for batch in batches) >= 1


def test_a_damaged_embedding_costs_its_sample_and_no_other(encoded, tower, tmp_path):
    flip(path_of(encoded, 1), -5)  # the last one: of sample 15
    log = tmp_path / "skipped.jsonl"
    batches = take(settings(encoded), 3, tower, skipped_log=log)
    found = {(line["sample"], line["kind"], line["key"]) for line in records(log)}
    assert found <= {(15, "damaged-embedding", key_of(15)), (3, "no-caption", key_of(3))}
    assert key_of(15) not in keys(batches)
    with bad_sample("damaged-embedding", r"embedding 4 of 00001\.embeddings does not have its checksum"):
        rows_of(encoded, tower)(15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": "search_query: "}, r"prefix is '' there and 'search_query: ' here"),
        ({"max_length": 8}, "max_length is 16 there and 8 here"),
        ({"layer_norm": True}, "layer_norm is False there and True here"),
        ({"pooling": "cls"}, r"pooling is \['mean'\] there and \['cls'\] here"),
    ],
)
def test_another_setting_of_the_tower_is_refused(encoded_once, tower_folder, change, message):
    shards, other = encoded_once[0], build(tower_folder, **change)
    for use in (lambda: take(settings(shards), 1, other), lambda: encode_shards(shards, other)):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "00000.embeddings" in str(caught.value) and "\n" not in str(caught.value)


def test_other_weights_are_refused_also_in_a_later_file_and_a_moved_tower_is_the_same(
    encoded, tower, tower_folder, tmp_path
):
    assert take(settings(encoded), 1, build(shutil.copytree(tower_folder, tmp_path / "moved")))
    write_random_text_tower(tmp_path / "other", CAPTIONS, **TOWER, seed=1)
    other = build(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"00000\.embeddings holds embeddings of another text tower.*weights or the tokenizer"
    ):
        take(settings(encoded), 1, other)
    encode_shards(encoded, other, tmp_path / "rows")
    shutil.copy(tmp_path / "rows" / "00002.embeddings", path_of(encoded, 2))
    with pytest.raises(ValueError, match=r"00002\.embeddings holds embeddings of another text tower"):
        take(settings(encoded), 4, tower)


def test_missing_embeddings_are_named(shards, encoded, tower):
    with pytest.raises(FileNotFoundError, match=r"of stored text embeddings: run python -m textlock\.data\.embeddings"):
        take(settings(shards), 1, tower)
    (encoded / FOLDER_NAME / file_name("00001.tar")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards have no stored text embeddings.*00001\.tar"):
        take(settings(encoded), 1, tower)
    with pytest.raises(ValueError, match="was not told of which text tower"):
        open_one(settings(encoded))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "holds no stored text embeddings"),
        (lambda path: path.write_bytes(b"TEXTROWS" + b"\xff" * 8), "has version"),
        (lambda path: path.write_bytes(b"TEXTROWS\x03\0\0\0" + b"\xff" * 4), "is damaged"),
        (lambda path: flip(path, 30), "is damaged"),
        (lambda path: cut(path, 1), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is damaged"),
    ],
    ids=["empty", "version", "endless header", "header bit", "cut", "longer"],
)
def test_a_damaged_file_is_named(encoded, tower, damage, message):
    damage(path_of(encoded, 0))
    with pytest.raises(ValueError, match=message) as caught:
        stored(encoded, tower)
    assert str(path_of(encoded, 0)) in str(caught.value)


@pytest.mark.gpu  # the command takes one where there is one
def test_the_command(shards, tower_folder):
    command = ("textlock.data.embeddings", shards, "--tower", tower_folder, "--max-length", 16)
    status, said, _ = run_here(*command, "--prefix", "", "--rank", 1, "--world-size", 2)
    assert said.startswith(f"text tower {tower_folder}: prefix '', 16 tokens, mean pooling")
    assert status == 0 and said.splitlines()[1] == "00001.tar" and "5 captions of 1 shards encoded" in said
    status, said, _ = run_here(*command, "--prefix", "")
    assert status == 0
    assert "19 captions of 2 shards encoded" in said and "1 shards were there; 1 samples have no caption" in said
    assert "no row: 00000.tar sample 3 (no-caption)" in said
    status, _, said = run_here(*command, "--prefix", "x")
    assert status == 2
    assert said.startswith("error: ") and said.count("\n") == 1 and "prefix is '' there and 'x' here" in said


def test_embeddings_that_are_not_finite_are_not_written(shards, tower, monkeypatch):
    monkeypatch.setattr(type(tower), "encode", lambda self, captions: torch.full((len(captions), 16), torch.nan))
    with pytest.raises(ValueError, match=r"not finite for captions of 00000\.tar"):
        encode_shards(shards, tower)
    assert not list((shards / FOLDER_NAME).iterdir())


def test_shards_without_an_index(shards, tower):
    (shards / INDEX_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"run python -m textlock\.data\.shards index"):
        encode_shards(shards, tower)
