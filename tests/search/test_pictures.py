"""What is found in a folder of images."""

import os

import pytest

from textlock.data.images import BadSample
from textlock.search.pictures import find_pictures

from .toys import jpeg


def test_files_in_any_depth_with_their_captions(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z.jpg", "b/a.JPG", "b/deep/c.jpeg", ".hidden/no.jpg", ".no.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    (tmp_path / "z.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b" / "a.txt").write_bytes(b"\xff\xfe\0")
    (tmp_path / "notes.md").write_text("no image")
    pictures = find_pictures(tmp_path)
    names = [pictures.name(place) for place in range(len(pictures))]
    assert names == ["z.jpg", "b/a.JPG", "b/deep/c.jpeg"]
    assert pictures.captions == [["one", "two"], [], []]
    assert len(pictures.problems) == 1 and "a.txt: " in pictures.problems[0]
    assert pictures.read(0) == jpeg(0) and len(set(pictures.identities)) == 3


def test_an_identity_changes_with_the_file_even_at_its_old_size_and_time(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(0))
    pictures, before = find_pictures(tmp_path), path.stat()
    assert find_pictures(tmp_path).identities == pictures.identities
    path.write_bytes(jpeg(0)[:-1] + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    assert find_pictures(tmp_path).identities != pictures.identities
    with pytest.raises(BadSample, match="has changed since it was listed"):
        pictures.read(0)


def test_what_is_no_file_is_never_opened(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere")
    pictures = find_pictures(tmp_path)
    assert len(pictures) == 1
    assert "b.jpg: it is no file" in pictures.problems and any("c.jpg" in said for said in pictures.problems)


def test_samples_of_shards(small_world):
    folder = small_world.root / "data" / "heldout"
    pictures = find_pictures(folder)
    assert len(pictures) == len(set(pictures.identities)) == 40 and all(pictures.captions)
    assert pictures.name(0) == "000000000 in 00000.tar" and pictures.read(0).startswith(b"\xff\xd8")
    assert find_pictures(folder).identities == pictures.identities
    # Another set: not one image of it is taken for one of these.
    assert not set(find_pictures(small_world.root / "data" / "train").identities) & set(pictures.identities)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "it is empty: name a folder"),
        (["a.txt", "b.txt"], r"it holds \.txt \(2\): name a folder"),
        (["a.tar", "b.jpg"], "holds tar shards and image files such as b"),
        (["a.tar"], "no index.textlock in"),
    ],
)
def test_bad_folders_are_refused_in_one_sentence(tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        find_pictures(tmp_path)
