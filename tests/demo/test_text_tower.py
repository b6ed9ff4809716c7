import pytest
import torch
from transformers import AutoTokenizer

from textlock.demo.text_tower import main, write_random_text_tower

CAPTIONS = ["a red circle", "two “dogs”"]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_seeds_give_equal_bytes_and_leave_no_trace(tmp_path):
    (tmp_path / "empty").mkdir()
    state = torch.get_rng_state()
    for name, seed in (("empty", 3), ("again", 3), ("other", 4)):
        write_random_text_tower(tmp_path / name, CAPTIONS, width=16, heads=2, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert files(tmp_path / "empty") == files(tmp_path / "again")
    assert files(tmp_path / "empty")["model.safetensors"] != files(tmp_path / "other")["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "empty", "other"]


def test_it_knows_its_words_and_spells_others(tmp_path):
    write_random_text_tower(tmp_path / "tower", CAPTIONS, width=16, heads=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tower")
    assert tokenizer.tokenize("search_query: A Red Circle") == ["search", "_", "query", ":", "a", "red", "circle"]
    assert tokenizer.tokenize("reddest") == ["red", "##d", "##e", "##s", "##t"]
    assert tokenizer.tokenize("猫") == ["[UNK]"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"width": 10}, "not an even head width"),
        ({"depth": 0}, "must be positive"),
        ({"std": -0.1}, "must be positive, std -0.1 not negative"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        write_random_text_tower(tmp_path / "tower", CAPTIONS, **{"width": 16, "heads": 2, **wrong})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["txt", "tsv"])
def test_the_command_line_reads_captions_from_a_file(tmp_path, suffix):
    lines = CAPTIONS if suffix == "txt" else ["key\tcaption", *(f"{i}\t{c}" for i, c in enumerate(CAPTIONS))]
    (tmp_path / f"captions.{suffix}").write_text("\n".join(lines), encoding="utf-8")
    main(tmp_path / f"captions.{suffix}", tmp_path / "by_command", width=16)
    write_random_text_tower(tmp_path / "by_call", CAPTIONS, width=16)
    assert files(tmp_path / "by_call") == files(tmp_path / "by_command")


@pytest.mark.parametrize("content", [None, "key\ttext\n0\tdogs\n"], ids=["no file", "no caption column"])
def test_the_command_line_ends_with_a_sentence_and_status_2(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "captions.tsv").write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(tmp_path / "captions.tsv", tmp_path / "tower")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "tower").exists()
