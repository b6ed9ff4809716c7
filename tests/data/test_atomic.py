import pytest
import torch
from safetensors.torch import save_file

from textlock.data.atomic import atomic_file, atomic_folder, write_text_atomically


def test_a_file_replaces_the_old_one_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_text_atomically(path, "é \ud800")  # a lone surrogate has no encoding
    assert path.read_text(encoding="utf-8") == "é ?"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with pytest.raises(RuntimeError), atomic_folder(folder) as draft:
        (draft / "a").write_text("a")
        raise RuntimeError
    assert not list((tmp_path / "deep").iterdir())
    folder.mkdir()  # an empty folder is replaced, and so is the draft of a killed process
    stale = tmp_path / "deep" / ".folder.partial"
    stale.mkdir()
    (stale / "half").write_text("")
    with atomic_folder(folder) as draft:
        assert not list(draft.iterdir())
        (draft / "a").write_text("a")
        assert not (folder / "a").exists()
    assert [str(path.relative_to(tmp_path / "deep")) for path in sorted(tmp_path.rglob("deep/**/*"))] == [
        "folder",
        "folder/a",
    ]


def test_files_of_a_folder_are_for_those_who_may_read_it(tmp_path):
    with atomic_folder(tmp_path / "folder") as draft:
        save_file({"a": torch.zeros(2)}, draft / "model.safetensors")
        (draft / "config.json").write_text("{}")
        (draft / "image").mkdir()
        save_file({"a": torch.zeros(2)}, draft / "image" / "model.safetensors")
    files = [path for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {
        (tmp_path / "folder").stat().st_mode & 0o666
    }


@pytest.mark.parametrize("mine", ["target", "target/mine"], ids=["a file", "a full folder"])
def test_nothing_is_overwritten(tmp_path, mine):
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"), atomic_folder(tmp_path / "target"):
        pytest.fail("the block must not run")
    assert (tmp_path / mine).read_text() == "mine"
