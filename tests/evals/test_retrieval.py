"""Run as a script, this file is one rank of the sharded test: rank, number of ranks, scratch folder."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from textlock.data.captions import caption_id
from textlock.evals import retrieval
from textlock.evals.retrieval import evaluate_retrieval, retrieval_recall

WIDTH = 8


def random_rows(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def problem(images, captions_per_image, *, whole_numbers=False, seed=0):
    """Images, noisy captions of them in mixed order, and the owner of each caption."""
    image_rows = random_rows(images, WIDTH, seed=seed)
    owners = torch.arange(images).repeat_interleave(captions_per_image)
    owners = owners[torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed))]
    text_rows = F.normalize(image_rows[owners] + 0.9 * random_rows(len(owners), WIDTH, seed=seed + 1), dim=-1)
    if whole_numbers:  # every product is exact, and few values are possible
        image_rows, text_rows = (2 * image_rows).round(), (2 * text_rows).round()
    return image_rows, text_rows, owners


def clip_benchmark_recall(image_rows, text_rows, owners, ks, batch_size=7):
    """The lines of clip_benchmark's ``evaluate`` from scores on, with its own functions."""
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    scores = text_rows @ image_rows.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owners] = True
    recalls = {}
    for k in ks:
        for direction, s, p in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
            recall = module.batchify(module.recall_at_k, s, p.contiguous(), batch_size, "cpu", k=k)
            recalls[f"{direction}_recall@{k}"] = (recall > 0).double().mean().item()
    return recalls


PROBLEMS = {
    "one caption each": (40, 1),
    "five captions each": (23, 5),
    "some images without": (30, [0, 1, 2, 3, 1] * 6),
}


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("images, captions_per_image", PROBLEMS.values(), ids=PROBLEMS)
def test_recall_equals_clip_benchmark(images, captions_per_image, ties):
    image_rows, text_rows, owners = problem(images, torch.tensor(captions_per_image), whole_numbers=ties)
    ks = (1, 5, 10)
    similarity = text_rows @ image_rows.T
    assert (similarity.unique().numel() < similarity.numel() / 4) == ties, "the case is not what its name says"

    expected = clip_benchmark_recall(image_rows, text_rows, owners, ks)
    expected["mean_recall@1"] = (expected["image_to_text_recall@1"] + expected["text_to_image_recall@1"]) / 2
    assert 0 < expected["mean_recall@1"] < 1
    assert retrieval_recall(image_rows, text_rows, text_to_image=owners, ks=ks) == expected


def test_recall_equals_clip_benchmarks_evaluate():
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    image_rows, text_rows, _ = problem(20, 1)
    text_rows = text_rows[torch.arange(20).repeat_interleave(3)] + 0.1 * random_rows(60, WIDTH, seed=9)
    owners = torch.arange(20).repeat_interleave(3)
    loader = [(rows, [["", "", ""]] * len(rows)) for rows in image_rows.split(6)]
    texts = iter(text_rows.split(18))
    model = SimpleNamespace(encode_image=lambda rows: rows, encode_text=lambda tokens: next(texts))
    theirs = module.evaluate(model, loader, lambda captions: torch.empty(0), "cpu", amp=False, recall_k_list=[1, 5])

    ours = retrieval_recall(image_rows, F.normalize(text_rows, dim=-1), text_to_image=owners, ks=(1, 5))
    for k in (1, 5):  # it rounds its means to float32
        assert np.float32(ours[f"text_to_image_recall@{k}"]) == np.float32(theirs[f"image_retrieval_recall@{k}"])
        assert np.float32(ours[f"image_to_text_recall@{k}"]) == np.float32(theirs[f"text_retrieval_recall@{k}"])


def test_recall_equals_brute_force():
    image_rows, text_rows, owners = problem(60, 3, seed=5)
    scores = text_rows.double().numpy() @ image_rows.double().numpy().T
    owner = owners.numpy()
    expected = {}
    for k in (1, 5, 10):
        per_text = [owner[t] in np.argsort(-scores[t])[:k] for t in range(len(owner))]
        per_image = [i in owner[np.argsort(-scores[:, i])[:k]] for i in range(60)]
        expected[f"text_to_image_recall@{k}"] = np.mean(per_text)
        expected[f"image_to_text_recall@{k}"] = np.mean(per_image)
    result = retrieval_recall(image_rows, text_rows, text_to_image=owners)
    assert {name: result[name] for name in expected} == expected
    assert set(result) == {*expected, "mean_recall@1"}


@pytest.mark.parametrize("elements", [1, 40, 41, 1000])
def test_recall_does_not_depend_on_the_tile(monkeypatch, elements):
    image_rows, text_rows, owners = problem(20, 2, whole_numbers=True)
    expected = retrieval_recall(image_rows, text_rows, text_to_image=owners)
    monkeypatch.setattr(retrieval, "TILE_ELEMENTS", elements)
    assert retrieval_recall(image_rows, text_rows, text_to_image=owners) == expected


def test_fewer_candidates_than_k_all_count():
    rows = random_rows(3, WIDTH, seed=0)
    result = retrieval_recall(rows, rows, text_to_image=torch.tensor([1, 2, 0]), ks=(1, 5))
    assert result["image_to_text_recall@1"] == result["text_to_image_recall@1"] == result["mean_recall@1"] == 0.0
    assert result["image_to_text_recall@5"] == result["text_to_image_recall@5"] == 1.0


def toy_text(texts):
    """Rows that depend on the text alone, not normalised."""
    rows = [3 * random_rows(WIDTH, seed=sum(i * b for i, b in enumerate(text.encode(), 1))) for text in texts]
    return torch.stack(rows) if rows else torch.empty(0, WIDTH)


def toy_encoder(images):
    projection = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(2))
    return (images.float() - 127.5).flatten(1) @ projection


def random_images(count):
    return torch.randint(0, 256, (count, 2, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def batches_of(images, captions, batch_size=10):
    return [
        SimpleNamespace(
            images=images[start : start + batch_size],
            captions=captions[start : start + batch_size],
            keys=[f"{number:05d}" for number in range(start, min(start + batch_size, len(captions)))],
        )
        for start in range(0, len(captions), batch_size)
    ]


def test_evaluation_of_distinct_captions_equals_clip_benchmark():
    images = random_images(33)
    captions = [[f"caption {i} {n}" for n in range(i % 3 + 1)] for i in range(33)]
    owners = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    image_rows = F.normalize(toy_encoder(images), dim=-1)
    text_rows = F.normalize(toy_text([text for texts in captions for text in texts]), dim=-1)
    expected = clip_benchmark_recall(image_rows, text_rows, owners, (1, 5, 10))

    lines = ["\n".join(texts) + "\n\n" for texts in captions]
    result, rows = evaluate_retrieval(toy_encoder, toy_text, batches_of(images, lines))
    assert {name: result[name] for name in expected} == expected
    assert torch.equal(rows.image_rows, image_rows)
    assert torch.equal(rows.text_rows, text_rows)
    assert rows.captions == [text for texts in captions for text in texts]
    assert rows.keys == [f"{number:05d}" for number in range(33)]
    assert torch.equal(rows.pairs, torch.stack([owners, torch.arange(len(owners))], dim=1))


SHARED = ["a red circle", "two dogs", "A red  circle", "a cat", "two dogs", "a cat", "a red circle\na shape"]


def brute_force(images, captions, k):
    """Recall over distinct captions, where every image with a caption matches it."""
    texts = list({caption_id(line): line for caption in captions[::-1] for line in caption.splitlines()[::-1]}.values())
    texts = texts[::-1]
    scores = (F.normalize(toy_encoder(images), dim=-1) @ F.normalize(toy_text(texts), dim=-1).T).numpy()
    ids = [{caption_id(line) for line in caption.splitlines()} for caption in captions]
    match = np.array([[caption_id(text) in own for text in texts] for own in ids])
    nearest_text, nearest_image = np.argsort(-scores, axis=1)[:, :k], np.argsort(-scores, axis=0)[:k]
    per_image = [match[i, nearest_text[i]].any() for i in range(len(match))]
    per_text = [match[nearest_image[:, t], t].any() for t in range(len(texts))]
    return np.mean(per_image), np.mean(per_text)


def test_images_with_the_same_caption_all_match_it():
    captions = [*SHARED, *(f"other {number}" for number in range(9)), *SHARED[:2]]
    images = random_images(len(captions))
    encoded = []
    result, rows = evaluate_retrieval(
        toy_encoder, lambda texts: (encoded.extend(texts), toy_text(texts))[1], batches_of(images, captions)
    )
    assert encoded == rows.captions == ["a red circle", "two dogs", "a cat", "a shape", *captions[7:16]]
    for k in (1, 5, 10):
        image_to_text, text_to_image = brute_force(images, captions, k)
        assert result[f"image_to_text_recall@{k}"] == image_to_text
        assert result[f"text_to_image_recall@{k}"] == text_to_image


def test_an_encoder_that_knows_the_caption_is_perfect():
    """With shared captions a perfect encoder must reach 1, which counting one image per caption would deny it."""
    images = random_images(len(SHARED))
    perfect = toy_text([caption.splitlines()[0].lower().replace("  ", " ") for caption in SHARED])
    result, _ = evaluate_retrieval(lambda images: perfect, toy_text, batches_of(images, SHARED[:6] + SHARED[:1]))
    assert result["image_to_text_recall@1"] == result["text_to_image_recall@1"] == result["mean_recall@1"] == 1.0


@pytest.mark.parametrize(
    "case, message",
    [
        ("no image", "0 images and 5 captions"),
        ("no caption", "5 images and 0 captions"),
        ("count", "4 entries for 5 captions"),
        ("owner", "outside the 5 images"),
        ("negative owner", "outside the 5 images"),
        ("image diverged", "1 of 5 image rows are not finite"),
        ("text diverged", "2 of 5 text rows are not finite"),
    ],
)
def test_bad_input_is_refused(case, message):
    image_rows, text_rows, owners = random_rows(5, WIDTH, seed=0), random_rows(5, WIDTH, seed=1), torch.arange(5)
    if case == "no image":
        with pytest.raises(ValueError, match=message):
            evaluate_retrieval(toy_encoder, lambda _: text_rows, [])
        return
    if case == "no caption":
        text_rows, owners = text_rows[:0], owners[:0]
    elif case == "count":
        owners = owners[:4]
    elif case.endswith("owner"):
        owners[2] = -1 if case == "negative owner" else 5
    elif case == "image diverged":
        image_rows[2, 3] = float("nan")
    else:
        text_rows[:2] = float("inf")
    with pytest.raises(ValueError, match=message):
        retrieval_recall(image_rows, text_rows, text_to_image=owners)


def sharded_problem():
    captions = [
        f"caption {number % 31}" if number % 3 else f"caption {number}\nmore {number % 4}" for number in range(47)
    ]
    images = random_images(47)
    images[20:30] = images[:10]  # ties between ranks
    return images, captions


def evaluate_as_rank(rank, ranks, folder):
    """Evaluate shares of unlike sizes, one of them empty, and rows that diverge on one rank alone."""
    retrieval.TILE_ELEMENTS = 200  # several tiles, so that both ranks have some to score
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    images, captions = sharded_problem()
    results = {}
    for case, cut in (("uneven", 17), ("one rank has none", 47), ("the other has none", 0)):
        mine = slice(0, cut) if rank == 0 else slice(cut, 47)
        batches = batches_of(images[mine], captions[mine])
        metrics, rows = evaluate_retrieval(toy_encoder, toy_text, batches, group=dist.group.WORLD)
        results[case] = {"metrics": metrics, "images": len(rows.image_rows), "keys": len(rows.keys)}
    try:
        broken = batches_of(images[:5], captions[:5])
        evaluate_retrieval(lambda x: toy_encoder(x) * (rank or float("nan")), toy_text, broken, group=dist.group.WORLD)
    except ValueError as error:
        results["error"] = str(error)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_ranks_give_the_result_of_one(tmp_path, monkeypatch):
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]

    monkeypatch.setattr(retrieval, "TILE_ELEMENTS", 200)
    images, captions = sharded_problem()
    expected, _ = evaluate_retrieval(toy_encoder, toy_text, batches_of(images, captions))
    assert 0 < expected["mean_recall@1"] < 1
    for rank, shares in ((0, (17, 47, 0)), (1, (30, 0, 47))):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for case, images in zip(("uneven", "one rank has none", "the other has none"), shares, strict=True):
            assert results[case] == {"metrics": expected, "images": images, "keys": images}, case
        assert results["error"].startswith("5 of 10 image rows are not finite")


if __name__ == "__main__":
    evaluate_as_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
