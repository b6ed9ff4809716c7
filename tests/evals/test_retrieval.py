from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from textlock.evals import retrieval
from textlock.evals.retrieval import evaluate_retrieval, retrieval_recall

from .toys import WIDTH, random_images, toy_encoder, toy_text, unit_rows


def problem(images, captions_per_image, *, whole_numbers=False, seed=0):
    """Images, noisy captions of them in mixed order, and the owner of each caption."""
    image_rows = unit_rows(images, WIDTH, seed=seed)
    owners = torch.arange(images).repeat_interleave(captions_per_image)
    owners = owners[torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed))]
    text_rows = F.normalize(image_rows[owners] + 0.9 * unit_rows(len(owners), WIDTH, seed=seed + 1), dim=-1)
    if whole_numbers:  # every product is exact, and few values are possible
        image_rows, text_rows = (2 * image_rows).round(), (2 * text_rows).round()
    return image_rows, text_rows, owners


def clip_benchmark_recall(image_rows, text_rows, owners, ks):
    """The lines of clip_benchmark's ``evaluate`` from scores on, with its own functions."""
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    scores = text_rows @ image_rows.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owners] = True
    recalls = {}
    for k in ks:
        for direction, s, p in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
            recall = module.batchify(module.recall_at_k, s, p.contiguous(), 7, "cpu", k=k)
            recalls[f"{direction}_recall@{k}"] = (recall > 0).double().mean().item()
    return recalls


PROBLEMS = {
    "one caption each": (40, 1),
    "five captions each": (23, 5),
    "some images without": (30, [0, 1, 2, 3, 1] * 6),
}


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("images, captions_per_image", PROBLEMS.values(), ids=PROBLEMS)
def test_recall_equals_clip_benchmark_with_any_tile(images, captions_per_image, ties, monkeypatch):
    image_rows, text_rows, owners = problem(images, torch.tensor(captions_per_image), whole_numbers=ties)
    ks = (1, 5, 10)
    similarity = text_rows @ image_rows.T
    assert (similarity.unique().numel() < similarity.numel() / 4) == ties, "the case is not what its name says"

    expected = clip_benchmark_recall(image_rows, text_rows, owners, ks)
    expected["mean_recall@1"] = (expected["image_to_text_recall@1"] + expected["text_to_image_recall@1"]) / 2
    assert 0 < expected["mean_recall@1"] < 1
    for elements in (retrieval.TILE_ELEMENTS, 1, 40, 41, 1000):
        monkeypatch.setattr(retrieval, "TILE_ELEMENTS", elements)
        assert retrieval_recall(image_rows, text_rows, text_to_image=owners, ks=ks) == expected


def test_fewer_candidates_than_k_all_count():
    rows = unit_rows(3, WIDTH, seed=0)
    result = retrieval_recall(rows, rows, text_to_image=torch.tensor([1, 2, 0]), ks=(1, 5))
    assert result["image_to_text_recall@1"] == result["text_to_image_recall@1"] == result["mean_recall@1"] == 0.0
    assert result["image_to_text_recall@5"] == result["text_to_image_recall@5"] == 1.0


def batches_of(images, captions, batch_size=10):
    keys = [f"{number:05d}" for number in range(len(captions))]
    parts = (slice(start, start + batch_size) for start in range(0, len(captions), batch_size))
    return [SimpleNamespace(images=images[part], captions=captions[part], keys=keys[part]) for part in parts]


SHARED = [
    ["a red circle"],
    ["two dogs"],
    ["A red  circle"],
    ["a cat"],
    ["two dogs"],
    ["a cat"],
    ["a red circle", "a shape"],
]
CAPTIONS = {
    "distinct": [[f"caption {i} {n}" for n in range(i % 3 + 1)] for i in range(33)],
    "of several images": [*SHARED, *([f"other {number}"] for number in range(9)), *SHARED[:2]],
    "twice of one image": [["a cat", "a cat"], ["a dog"], ["a cat"], ["a cow", "a dog"], *[["a cow"]] * 7],
}


@pytest.mark.parametrize("captions", CAPTIONS.values(), ids=CAPTIONS)
def test_an_evaluation_equals_clip_benchmark_and_encodes_each_text_once(captions):
    images = random_images(len(captions))
    owners = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    image_rows = F.normalize(toy_encoder(images), dim=-1)
    text_rows = F.normalize(toy_text([text for texts in captions for text in texts]), dim=-1)
    expected = clip_benchmark_recall(image_rows, text_rows, owners, (1, 5, 10))

    encoded = []
    result, rows = evaluate_retrieval(
        toy_encoder, lambda texts: (encoded.extend(texts), 3 * toy_text(texts))[1], batches_of(images, captions)
    )
    assert {name: result[name] for name in expected} == expected
    assert torch.equal(rows.image_rows, image_rows)
    assert encoded == rows.captions == list(dict.fromkeys(text for texts in captions for text in texts))
    torch.testing.assert_close(rows.text_rows[rows.pairs[:, 1]], text_rows)
    assert torch.equal(rows.pairs[:, 0], owners)
    assert rows.keys == [f"{number:05d}" for number in range(len(captions))]


@pytest.mark.parametrize(
    ("captions", "owners", "diverged", "message"),
    [
        (0, [], None, "5 images and 0 captions"),
        (5, [0, 1, 2, 3], None, "4 entries for 5 captions"),
        (5, [0, 1, 5, 3, 4], None, "outside the 5 images"),
        (5, [0, 1, -1, 3, 4], None, "outside the 5 images"),
        (5, [0, 1, 2, 3, 4], 0, "1 of 5 image rows are not finite"),
        (5, [0, 1, 2, 3, 4], 1, "1 of 5 text rows are not finite"),
    ],
    ids=["no caption", "count", "owner", "negative owner", "image diverged", "text diverged"],
)
def test_bad_input_is_refused(captions, owners, diverged, message):
    rows = unit_rows(2, 5, WIDTH, seed=0)
    if diverged is not None:
        rows[diverged, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=message):
        retrieval_recall(rows[0], rows[1, :captions], text_to_image=torch.tensor(owners, dtype=torch.int64))


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="0 images and 0 captions"):
        evaluate_retrieval(toy_encoder, lambda _: unit_rows(0, WIDTH, seed=1), [])
