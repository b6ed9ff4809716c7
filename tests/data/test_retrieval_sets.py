"""Caption files of Flickr30k, Flickr8k and COCO as retrieval shards, next to clip_benchmark's reader."""

import importlib.util
import io
import json

import pytest
from PIL import Image

from textlock.data.benchmark_sets import read_layout, read_set
from textlock.data.evaluation import iterate_shards

from ..commands import run_here
from .tars import jpeg

MODULE = "textlock.data.retrieval_sets"
NAMES = [f"{n}.jpg" for n in range(6)]
CAPTIONS = {name: [f"caption {line} of {name}" for line in range(1 + n % 3)] for n, name in enumerate(NAMES)}
SPLITS = ("test", "train", "test", "restval", "val", "test")


@pytest.fixture
def images(tmp_path):
    for folder in ("photos", "photos/val2014"):
        (tmp_path / folder).mkdir()
        for n, name in enumerate(NAMES):
            (tmp_path / folder / name).write_bytes(jpeg(n, 30 + n))
    return tmp_path / "photos"


def karpathy(folder, **common):
    entries = [
        {"filename": name, "split": split, "sentences": [{"raw": text} for text in CAPTIONS[name]], **common}
        for name, split in zip(NAMES, SPLITS, strict=True)
    ]
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "any", "images": entries}))
    return path


def coco(folder, **changes):
    entries = [{"id": 10 + n, "file_name": name} for n, name in enumerate(NAMES)]
    annotations = [{"id": 0, "image_id": 10 + n, "caption": c} for n, name in enumerate(NAMES) for c in CAPTIONS[name]]
    path = folder / "captions_val.json"
    path.write_text(json.dumps({"images": entries, "annotations": annotations[::-1], **changes}))
    return path


def tokens(folder):
    path = folder / "tokens.txt"
    lines = [f"{name}#{n}\t{text}" for name in NAMES for n, text in enumerate(CAPTIONS[name])]
    path.write_text("\n".join(lines) + "\n")
    return path


def write(kind, captions, images, *flags):
    output = captions.parent / "out"
    status, out, err = run_here(MODULE, kind, "--captions", captions, "--images", images, "--output", output, *flags)
    return output, status, out, err


def contents(output):
    """Return (number, captions) of each image, as evaluate.py reads them by both of its ways, and clip_benchmark."""
    found = read_set(read_layout(output))
    assert found.layout.kind == "retrieval" and len(found.layout.shards) == 1
    batches = list(iterate_shards(output / "test", 8, batch_size=4))
    assert [captions for batch in batches for captions in batch.captions] == found.captions
    numbers = [Image.open(io.BytesIO(found.read_image(place))).width - 30 for place in range(len(found.images))]
    ours = list(zip(numbers, found.captions, strict=True))
    if importlib.util.find_spec("clip_benchmark"):
        builder = importlib.import_module("clip_benchmark.datasets.builder")
        theirs = builder.build_wds_dataset("any", lambda image: image.width - 30, data_dir=str(output))
        assert list(theirs) == ours
    return ours


@pytest.mark.parametrize("common", [{}, {"filepath": "val2014"}])
def test_a_split_of_karpathy(tmp_path, images, common):
    path = karpathy(tmp_path, **common)
    if common:
        for name in NAMES:
            (images / name).unlink()
    output, status, out, err = write("karpathy", path, images)
    assert status == 0, err
    assert out == f"3 images with 7 captions in 1 shards in {output / 'test'}; 0 images left out\n"
    assert contents(output) == [(n, CAPTIONS[NAMES[n]]) for n in (0, 2, 5)]
    output.rename(tmp_path / "before")
    output, status, out, err = write("karpathy", path, images, "--split", "restval")
    assert contents(output) == [(3, CAPTIONS[NAMES[3]])]


def test_all_of_coco(tmp_path, images):
    output, status, out, _ = write("coco", coco(tmp_path), images)
    assert status == 0 and out.startswith("6 images with 12 captions in 1 shards")
    assert contents(output) == [(n, CAPTIONS[name][::-1]) for n, name in enumerate(NAMES)]


def test_tokens_of_the_images_of_a_list(tmp_path, images):
    (tmp_path / "list.txt").write_text("4.jpg\n1.jpg\n")
    output, status, out, _ = write("tokens", tokens(tmp_path), images, "--split-list", tmp_path / "list.txt")
    assert status == 0 and out.startswith("2 images with 4 captions")
    assert contents(output) == [(n, CAPTIONS[NAMES[n]]) for n in (4, 1)]
    output.rename(tmp_path / "before")
    output, _, out, _ = write("tokens", tokens(tmp_path), images)
    assert contents(output) == [(n, CAPTIONS[name]) for n, name in enumerate(NAMES)]


def test_shards_of_a_thousand_images_are_counted(tmp_path, images, monkeypatch):
    monkeypatch.setattr("textlock.data.retrieval_sets._SAMPLES_PER_SHARD", 4)
    from textlock.data.retrieval_sets import read_coco, write_retrieval_set

    report = write_retrieval_set(images, read_coco(coco(tmp_path)), tmp_path / "out")
    assert (report.shards, report.samples, report.captions) == (2, 6, 12)
    assert sorted(path.name for path in (tmp_path / "out" / "test").glob("*.tar")) == ["0.tar", "1.tar"]
    assert len(read_set(read_layout(tmp_path / "out")).images) == 6


def test_what_cannot_be_packed_is_an_error_that_leaves_nothing(tmp_path, images):
    (images / "2.jpg").write_bytes(b"<html>")
    output, status, _, err = write("karpathy", karpathy(tmp_path), images)
    assert status == 2 and f"{tmp_path / 'dataset.json'} image 3: 2.jpg: " in err and "--skip-bad" in err
    assert not output.exists()
    output, status, out, _ = write("karpathy", karpathy(tmp_path), images, "--skip-bad")
    assert status == 0 and "left out: 2.jpg: " in out and "2 images with 4 captions" in out and "; 1 images left" in out

    (images / "5.jpg").unlink()
    path = karpathy(tmp_path)
    status, _, err = run_here(MODULE, "karpathy", "--captions", path, "--images", images, "--output", tmp_path / "new")
    assert status == 2 and f"{path} image 6: there is no image {images / '5.jpg'}" in err
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))
    _, status, _, err = write("karpathy", path, images)
    assert status == 2 and "exists and is not an empty folder" in err


@pytest.mark.parametrize(
    "kind, content, message",
    [
        ("karpathy", None, "no file "),
        ("karpathy", "{", "is not JSON"),
        ("karpathy", "[]", "has no list images: it is another kind of file"),
        ("karpathy", '{"images": [], "images": []}', "names images more than once"),
        ("karpathy", '{"images": [{"filename": "0.jpg"}]}', "image 1 has no text split"),
        ("karpathy", '{"images": [{"filename": "0.jpg", "split": "val"}]}', "no image of the split test: it has val"),
        ("karpathy", '{"images": [{"filename": "0.jpg", "split": "test", "sentences": []}]}', "0.jpg has no caption"),
        ("coco", '{"images": [{"id": 1, "file_name": "0.jpg"}]}', "has no list annotations"),
        ("coco", '{"images": [], "annotations": []}', "names no image"),
        ("coco", '{"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": []}', "image 1: 0.jpg has no caption"),
        ("coco", '{"images": [], "annotations": [{"image_id": 3, "caption": "a"}]}', "there is no image 3"),
        ("coco", '{"images": [{"id": "1", "file_name": "0.jpg"}], "annotations": []}', "image 1 has no number id"),
        (
            "coco",
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
            "another",
        ),
        ("tokens", "0.jpg a caption\n", "line 1 is no NAME#NUMBER, a tab and a caption"),
        ("tokens", "0.jpg#x\ta caption\n", "line 1 is no NAME#NUMBER"),
        ("tokens", "\n", "names no image"),
    ],
)
def test_other_files_are_refused(tmp_path, images, kind, content, message):
    path = tmp_path / "captions"
    if content is not None:
        path.write_text(content)
    output, status, out, err = write(kind, path, images)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize("names, message", [("9.jpg\n", "names 9.jpg, of which"), ("1.jpg\n1.jpg\n", "more than once")])
def test_a_list_of_other_images_is_refused(tmp_path, images, names, message):
    (tmp_path / "list.txt").write_text(names)
    _, status, _, err = write("tokens", tokens(tmp_path), images, "--split-list", tmp_path / "list.txt")
    assert status == 2 and message in err
