"""Shards read by the own code of clip_benchmark and open_clip: same samples, same captions, same figures."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from textlock.data.captions import Fields
from textlock.data.evaluation import iterate_shards
from textlock.data.images import BadSample, decode_image, eval_image
from textlock.data.index import index_shards, open_index
from textlock.data.reader import ShardReader, require_captions
from textlock.evals.retrieval import evaluate_retrieval

from ..data.tars import write_tar
from ..data.zoo import encode, photo
from .toys import toy_encoder, toy_text

pytest.importorskip("open_clip")
SIDE = 2


def png(seed):
    return encode(photo(9 + seed % 5, 8, seed=seed), "PNG")


def members_of(number):
    """A sample as sets have them: one to six captions, which repeat those of others, and fields that are not read."""
    captions = "\n".join(f"caption {number * 7 % 20 + line}" for line in range(1 + number % 6))
    yield from (
        (f"{number:05d}.depth.png", png(90)),
        (f"{number:05d}.de.txt", b"eine Beschreibung"),
        (f"{number:05d}.png", png(number)),
        (f"{number:05d}.json", b"{}"),
        (f"{number:05d}.txt", captions.encode()),
    )


def pixels(image):
    """What textlock's evaluation makes of an image that a peer has decoded."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return eval_image(buffer.getvalue(), SIDE)


def test_retrieval_on_a_set_of_clip_benchmark_gives_its_figures(tmp_path, monkeypatch):
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    folder = tmp_path / "test"
    folder.mkdir()
    for shard in range(3):
        write_tar(
            folder / f"{shard}.tar", [m for number in range(shard * 9, shard * 9 + 9) for m in members_of(number)]
        )
    (folder / "nshards.txt").write_text("3")
    (tmp_path / "dataset_type.txt").write_text("retrieval")

    theirs = builder.build_wds_dataset("any", pixels, data_dir=str(tmp_path))
    loader = torch.utils.data.DataLoader(theirs, batch_size=5, collate_fn=builder.image_captions_collate_fn)
    texts = []  # a tokenizer gives numbers: these are places in this list

    def tokenize(captions):
        texts.extend(captions)
        return torch.arange(len(texts) - len(captions), len(texts))

    model = SimpleNamespace(
        encode_image=toy_encoder, encode_text=lambda tokens: toy_text([texts[token] for token in tokens.tolist()])
    )
    monkeypatch.setattr(retrieval, "tqdm", iter)
    figures = retrieval.evaluate(model, loader, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])

    index_shards(folder)
    ours, rows = evaluate_retrieval(toy_encoder, toy_text, iterate_shards(folder, SIDE, batch_size=4))
    assert len(rows.keys) == 27 and [rows.captions[place] for place in rows.pairs[:, 1]] == texts
    for k in (1, 5, 10):
        # They take means in float32.
        assert np.float32(ours[f"text_to_image_recall@{k}"]) == np.float32(figures[f"image_retrieval_recall@{k}"])
        assert np.float32(ours[f"image_to_text_recall@{k}"]) == np.float32(figures[f"text_retrieval_recall@{k}"])
    assert 0 < ours["mean_recall@1"] < 1


def test_open_clip_trains_on_the_same_samples(tmp_path):
    """With --whole-text, as there a text is one caption whatever its lines; what cannot be read is left out by both."""
    data = pytest.importorskip("open_clip_train.data")
    good = [member for number in range(6) for member in members_of(number)]
    bad = [
        ("latin.png", png(20)), ("latin.txt", b"caf\xe9 au lait"),
        ("utf16.png", png(21)), ("utf16.txt", "a dog".encode("utf-16")),
        ("cut.jpg", encode(photo(64, 64))[:300]), ("cut.txt", b"a caption"),
        ("html.jpg", b"<html>"), ("html.txt", b"a caption"),
        ("silent.png", png(22)),
        ("alone.txt", b"a caption"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "00000.tar", [*good, *bad, *members_of(7)])
    arguments = SimpleNamespace(val_data=str(path), val_num_samples=8, batch_size=3, workers=0)
    # A list, as images of several sizes make no array.
    theirs = data.get_wds_dataset(
        arguments, lambda image: np.array(image).tolist(), is_train=False, tokenizer=lambda text: [text]
    )
    pairs = [pair for images, texts in theirs.dataloader for pair in zip(images, texts, strict=True)]

    index_shards(tmp_path, fields=Fields(whole_text=True))
    index = open_index(tmp_path)
    reader = ShardReader(index)
    ours, skipped = [], []
    for sample in range(len(index)):
        raw = reader.read(sample)
        try:
            require_captions(raw.captions)
            ours.append((decode_image(raw.image).tolist(), *raw.captions))
        except BadSample:
            skipped.append(raw.key)
    assert ours == pairs and len(ours) == 7
    assert skipped == ["latin", "utf16", "cut", "html", "silent"]
