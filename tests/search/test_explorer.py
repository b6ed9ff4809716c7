"""Embeddings that are kept, and what is found with them."""

import signal
import threading

import pytest
import torch

from textlock.data.images import BadSample
from textlock.search import cache
from textlock.search.explorer import Explorer
from textlock.search.pictures import find_pictures

from ..conftest import run
from .toys import Counting, Text, jpeg


@pytest.fixture
def folder(tmp_path):
    """Nine images, three of them with a caption; two of these say the same."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    for number, text in ((1, "a dog"), (4, "a cat"), (7, "a dog")):
        (folder / f"{number}.txt").write_text(text)
    return folder


def explorer(folder, tmp_path, counting=None, **settings):
    counting = counting or Counting()
    return Explorer(counting.towers, find_pictures(folder), tmp_path / "cache", **{"batch_size": 4, **settings})


def parts(tmp_path, kind="images"):
    return sorted((tmp_path / "cache").glob(f"{kind}-*/part-*.safetensors"))


def test_embedded_once(folder, tmp_path):
    first = explorer(folder, tmp_path)
    counting = Counting()
    second = explorer(folder, tmp_path, counting)
    assert counting.images == 0 and counting.text.encoded == []
    assert torch.equal(first.image_rows, second.image_rows) and torch.equal(first.caption_rows, second.caption_rows)
    assert first.captions == ["a dog", "a cat"]
    assert len(parts(tmp_path)) == len(parts(tmp_path, "captions")) == 1


def test_a_read_only_folder_of_images_is_left_as_it_is(folder, tmp_path):
    before = sorted(folder.iterdir()), folder.stat().st_mtime_ns
    explorer(folder, tmp_path)
    assert (sorted(folder.iterdir()), folder.stat().st_mtime_ns) == before


def test_new_and_changed_images_are_embedded_and_deleted_ones_dropped(folder, tmp_path):
    explorer(folder, tmp_path)
    (folder / "3.jpg").write_bytes(jpeg(30))
    (folder / "9.jpg").write_bytes(jpeg(9))
    (folder / "0.jpg").unlink()
    counting = Counting()
    changed = explorer(folder, tmp_path, counting)
    assert counting.images == 2
    fresh = Explorer(Counting().towers, find_pictures(folder), tmp_path / "fresh")
    torch.testing.assert_close(changed.image_rows, fresh.image_rows, rtol=0, atol=1e-6)
    (part,) = parts(tmp_path)
    stored, rows = cache._read_part(part, 64)
    assert sorted(stored) == sorted(find_pictures(folder).identities) and len(rows) == 9


def test_deleted_images_are_dropped_where_nothing_is_new(folder, tmp_path):
    explorer(folder, tmp_path)
    (folder / "0.jpg").unlink()
    counting = Counting()
    assert len(explorer(folder, tmp_path, counting).places) == 8 and counting.images == 0
    (part,) = parts(tmp_path)
    assert len(cache._read_part(part, 64)[0]) == 8


def test_an_interrupt_keeps_what_there_is(folder, tmp_path):
    counting = Counting()
    encode = counting.towers.encode_images

    def interrupted(images):
        if counting.images >= 4:
            raise KeyboardInterrupt
        return encode(images)

    object.__setattr__(counting.towers, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explorer(folder, tmp_path, counting)
    counting = Counting()
    assert len(explorer(folder, tmp_path, counting).places) == 9 and counting.images == 5


def test_of_two_processes_one_waits_for_the_other(tmp_path):
    """And computes nothing that the other has."""
    folder, identities = tmp_path / "cache", [bytes([number]) * 16 for number in range(3)]
    started, waiting = threading.Event(), threading.Event()

    def embed(missing):
        started.set()
        assert waiting.wait(30)
        yield missing, torch.eye(3)

    def never(missing):
        pytest.fail("it was there")

    first = threading.Thread(target=cache.cached_embeddings, args=(folder, identities, 3, embed, waiting.set))
    first.start()
    assert started.wait(30)
    places, rows = cache.cached_embeddings(folder, identities, 3, never, waiting.set)
    first.join()
    assert places.tolist() == [0, 1, 2] and torch.equal(rows, torch.eye(3))


def test_another_image_tower_or_text_tower_embeds_again(folder, tmp_path):
    explorer(folder, tmp_path)
    other = Counting(change=1.0)
    explorer(folder, tmp_path, other)
    assert other.images == 9 and other.text.encoded == []
    other = Counting(Text("two"))
    explorer(folder, tmp_path, other)
    assert other.images == 0 and other.text.encoded == ["a dog", "a cat"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from textlock.search import cache
from textlock.search.explorer import Explorer
from textlock.search.pictures import find_pictures
from textlock.tests.search.toys import Counting

cache._SECONDS_PER_PART = 0.0
counting = Counting()
encode = counting.towers.encode_images

def dying(images):
    if counting.images >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(images)

object.__setattr__(counting.towers, "encode_images", dying)
Explorer(counting.towers, find_pictures(Path(sys.argv[1])), Path(sys.argv[2]), batch_size=4)
"""


def test_a_killed_process_goes_on(folder, tmp_path):
    outcome = run("-c", _KILLED, str(folder), str(tmp_path / "cache"))
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr
    assert len(parts(tmp_path)) == 1, "nothing was kept"
    counting = Counting()
    resumed = explorer(folder, tmp_path, counting)
    assert counting.images == 5
    fresh = Explorer(Counting().towers, find_pictures(folder), tmp_path / "fresh")
    torch.testing.assert_close(resumed.image_rows, fresh.image_rows, rtol=0, atol=1e-6)
    assert len(parts(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign"])
def test_a_damaged_cache_is_refused_by_name(folder, tmp_path, damage):
    explorer(folder, tmp_path)
    (part,) = parts(tmp_path)
    content = bytearray(part.read_bytes())
    if damage == "cut":
        content = content[:-100]
    elif damage == "bit":
        content[-100] ^= 1
    else:
        content = b"what is this"
    part.write_bytes(content)
    with pytest.raises(ValueError, match=f"{part.name}.* is damaged: delete it"):
        explorer(folder, tmp_path)


def test_unreadable_images_are_named_and_left_out(folder, tmp_path):
    (folder / "2.jpg").write_bytes(b"<html>")
    (folder / "5.jpg").write_bytes(jpeg(5)[:200])
    found = explorer(folder, tmp_path)
    assert found.places.tolist() == [0, 1, 3, 4, 6, 7, 8]
    assert len(found.unread) == 2 and "2.jpg (format: " in found.unread[0] and "5.jpg" in found.unread[1]
    with pytest.raises(KeyError):
        found.by_place(2, 3)
    for number in range(9):
        (folder / f"{number}.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"none of the 9 images in .* can be read: 0\.jpg"):
        explorer(folder, tmp_path)


def test_embeddings_that_are_not_finite_are_not_kept(folder, tmp_path):
    with pytest.raises(ValueError, match="image tower gives embeddings that are not finite"):
        explorer(folder, tmp_path, Counting(change=float("nan")))
    assert parts(tmp_path) == []


def test_answers(folder, tmp_path):
    found = explorer(folder, tmp_path)
    text = Text()
    cosines = found.image_rows.double() @ text.encode(["a dog"])[0].double()
    answer = found.by_text("a dog", 3)
    assert [image.place for image in answer.images] == cosines.argsort(descending=True)[:3].tolist()
    assert [image.cosine for image in answer.images] == pytest.approx(cosines.sort(descending=True).values[:3].tolist())
    assert (answer.captions[0].text, answer.captions[0].cosine) == ("a dog", pytest.approx(1))
    assert [caption.text for caption in answer.captions] == ["a dog", "a cat"]

    for answer in (found.by_place(4, 2), found.by_image(jpeg(4), 2)):
        assert (answer.images[0].name, answer.images[0].captions) == ("4.jpg", ["a cat"])
        assert answer.images[0].cosine == pytest.approx(1, abs=1e-6) and answer.images[1].cosine < 0.9999
    with pytest.raises(BadSample):
        found.by_image(b"GIF89a", 2)
    with pytest.raises(ValueError, match="the query is empty"):
        found.by_text(" ", 2)
