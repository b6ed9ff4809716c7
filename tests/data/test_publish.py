import pytest

from textlock.data.publish import publish_text, published_file, published_folder


def test_a_file_replaces_the_old_one_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), published_file(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert path.read_text() == "old"
    with published_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_text_that_has_no_encoding_is_written_all_the_same(tmp_path):
    publish_text(tmp_path / "file", "é \ud800")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "é ?"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with pytest.raises(RuntimeError), published_folder(folder) as draft:
        (draft / "a").write_text("a")
        raise RuntimeError
    assert not list((tmp_path / "deep").iterdir())
    with published_folder(folder) as draft:
        (draft / "a").write_text("a")
        assert not folder.exists()
    assert (folder / "a").read_text() == "a"


def test_what_a_killed_attempt_left_is_no_hindrance(tmp_path):
    stale = tmp_path / ".folder.partial"
    stale.mkdir()
    (stale / "half").write_text("")
    with published_folder(tmp_path / "folder") as draft:
        assert not list(draft.iterdir())


@pytest.mark.parametrize("kind", ["file", "full folder", "empty folder"])
def test_nothing_is_overwritten(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if kind == "empty folder":
        with published_folder(target) as draft:
            (draft / "a").write_text("a")
        assert (target / "a").exists()
        return
    if kind == "full folder":
        (target / "mine").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"), published_folder(target):
        pytest.fail("the block must not run")
