"""Run as a script, this file is one rank of the sharded tests: rank, number of ranks, scratch folder."""

import builtins
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

from textlock.evals import zero_shot
from textlock.evals.zero_shot import class_embeddings, evaluate_zero_shot, gather_ragged, zero_shot_accuracy

CLASSES, IMAGES, WIDTH = 7, 53, 8
NAMES = [f"class {number}" for number in range(CLASSES)]
TEMPLATES = ["a photo of a {}", "a drawing of a {} on {}", "{}"]


def unit_rows(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class ToyTower:
    """Rows that depend on the text alone."""

    def encode(self, texts):
        rows = [unit_rows(WIDTH, seed=sum(i * b for i, b in enumerate(text.encode(), 1))) for text in texts]
        return torch.stack(rows) if rows else torch.empty(0, WIDTH)


def toy_data():
    """Images as uint8 with labels that their projection often, not always, points at."""
    images = torch.randint(0, 256, (IMAGES, 2, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    class_rows = class_embeddings(ToyTower(), NAMES, TEMPLATES)
    similarity = F.normalize(toy_encoder(images), dim=-1) @ class_rows.T
    labels = similarity.topk(3).indices[torch.arange(IMAGES), torch.arange(IMAGES) % 3]
    labels[::11] = 0
    return images, labels


def toy_encoder(images):
    projection = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(2))
    return (images.float() - 127.5).flatten(1) @ projection / 50


def batches_of(images, labels, batch_size):
    return [
        SimpleNamespace(images=i, labels=c)
        for i, c in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]


@pytest.fixture
def clip_benchmark_module(monkeypatch):
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # Its accuracy() calls float() on an array of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(module, "float", lambda value: builtins.float(np.asarray(value).reshape(())), raising=False)
    return module


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("images, classes, ks", [(53, 7, (1, 5)), (200, 40, (1, 5, 10)), (3, 1, (1,))])
def test_accuracy_equals_clip_benchmark(clip_benchmark_module, images, classes, ks, ties):
    image_rows, class_rows = unit_rows(images, 8, seed=0), unit_rows(classes, 8, seed=1)
    if ties:  # whole numbers: every product is exact, and few values are possible
        image_rows, class_rows = (image_rows * 3).round(), (class_rows * 3).round()
    labels = torch.randint(0, classes, (images,), generator=torch.Generator().manual_seed(2))
    logits = 100.0 * image_rows @ class_rows.T
    assert (len(logits[0].unique()) < classes) == (ties and classes > 1), "the case is not what its name says"

    expected = clip_benchmark_module.accuracy(logits, labels, topk=ks)
    result = zero_shot_accuracy(image_rows, labels, class_rows, ks)
    assert result == {f"zero_shot_top{k}": value for k, value in zip(ks, expected, strict=True)}


def test_accuracy_equals_brute_force():
    image_rows, class_rows = unit_rows(200, 8, seed=3), unit_rows(30, 8, seed=4)
    labels = torch.arange(200) % 30
    similarity = image_rows.double().numpy() @ class_rows.double().numpy().T
    nearer = (similarity > similarity[np.arange(200), labels.numpy()][:, None]).sum(axis=1)
    expected = {"zero_shot_top1": (nearer < 1).mean(), "zero_shot_top5": (nearer < 5).mean()}
    assert 0 < expected["zero_shot_top1"] < expected["zero_shot_top5"] < 1
    assert zero_shot_accuracy(image_rows, labels, class_rows) == expected


def test_accuracy_does_not_depend_on_the_tile(monkeypatch):
    image_rows, class_rows, labels = unit_rows(100, 8, seed=5), unit_rows(9, 8, seed=6), torch.arange(100) % 9
    expected = zero_shot_accuracy(image_rows, labels, class_rows)
    for elements in (1, 100, 899, 900):
        monkeypatch.setattr(zero_shot, "TILE_ELEMENTS", elements)
        assert zero_shot_accuracy(image_rows, labels, class_rows) == expected


def test_fewer_classes_than_k_count_in_full():
    rows = unit_rows(3, 8, seed=7)
    assert zero_shot_accuracy(rows, torch.tensor([0, 2, 1]), rows) == {"zero_shot_top1": 1 / 3, "zero_shot_top5": 1.0}


def test_class_embeddings_and_evaluation_equal_clip_benchmark(clip_benchmark_module):
    prompts = []

    def tokenizer(texts):
        prompts.extend(texts)
        return torch.arange(len(prompts) - len(texts), len(prompts))

    tower = ToyTower()
    model = SimpleNamespace(
        encode_text=lambda tokens: tower.encode([prompts[token] for token in tokens]), encode_image=toy_encoder
    )
    templates = [template.replace("{}", "{c}") for template in TEMPLATES]
    classifier = clip_benchmark_module.zero_shot_classifier(model, tokenizer, NAMES, templates, "cpu", amp=False)
    class_rows = class_embeddings(tower, NAMES, TEMPLATES)
    assert class_rows.dtype == torch.float32
    torch.testing.assert_close(class_rows, classifier.T, rtol=0, atol=1e-7)

    images, labels = toy_data()
    loader = list(zip(images.split(10), labels.split(10), strict=True))
    logits, target = clip_benchmark_module.run_classification(model, classifier, loader, "cpu", amp=False)
    expected = clip_benchmark_module.accuracy(logits, target, topk=(1, 5))
    result = evaluate_zero_shot(toy_encoder, batches_of(images, labels, 10), class_rows)
    assert result == {"zero_shot_top1": expected[0], "zero_shot_top5": expected[1]}
    assert 0 < result["zero_shot_top1"] < result["zero_shot_top5"] < 1


def test_braces_in_a_class_name_are_kept():
    rows = class_embeddings(ToyTower(), ["a {} b", "{0}"], ["the {}"])
    assert torch.equal(rows, F.normalize(ToyTower().encode(["the a {} b", "the {0}"]), dim=-1))


def test_evaluation_keeps_no_graph():
    images, labels = toy_data()
    weight = torch.nn.Parameter(torch.ones(()))
    seen = []

    def encode(images):
        seen.append(toy_encoder(images) * weight)
        return seen[-1]

    evaluate_zero_shot(encode, batches_of(images, labels, 10), class_embeddings(ToyTower(), NAMES, TEMPLATES))
    assert not any(rows.requires_grad for rows in seen)


@pytest.mark.parametrize(
    "case, message",
    [
        ("no image", "no image"),
        ("diverged", "2 of 53 image rows are not finite"),
        ("label", "1 of 53 labels are outside the 7 classes"),
        ("negative label", "1 of 53 labels are outside"),
    ],
)
def test_bad_input_is_refused(case, message):
    images, labels = toy_data()
    class_rows = class_embeddings(ToyTower(), NAMES, TEMPLATES)
    rows = F.normalize(toy_encoder(images), dim=-1)
    if case == "no image":
        rows, labels = rows[:0], labels[:0]
    elif case == "diverged":
        rows[3, 1], rows[50] = float("nan"), float("inf")
    else:
        labels[-1] = -1 if case == "negative label" else CLASSES
    with pytest.raises(ValueError, match=message):
        zero_shot_accuracy(rows, labels, class_rows)


@pytest.mark.parametrize(
    "names, templates, message",
    [([], TEMPLATES, "at least one class"), (NAMES, [], "one prompt template"), (NAMES, ["a {c}"], "has no {} where")],
    ids=["no class", "no template", "no place"],
)
def test_bad_prompts_are_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(ToyTower(), names, templates)


def evaluate_as_rank(rank, ranks, folder):
    """Evaluate shares of unlike sizes, one of them empty, and what goes wrong on one rank alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    images, labels = toy_data()
    class_rows = class_embeddings(ToyTower(), NAMES, TEMPLATES, group=group)
    results = {"class_rows": class_rows.tolist()}
    for case, cut in (("uneven", 37), ("one rank has none", IMAGES)):
        mine = slice(0, cut) if rank == 0 else slice(cut, IMAGES)
        batches = batches_of(images[mine], labels[mine], 10) if len(images[mine]) else []
        results[case] = evaluate_zero_shot(toy_encoder, batches, class_rows, group=group)
    results["one class"] = class_embeddings(ToyTower(), NAMES[:1], TEMPLATES, group=group).tolist()
    results["gathered"] = gather_ragged(torch.full((rank * 2, 3), rank), group).tolist()
    try:
        bad = batches_of(images[:5], labels[:5] + (CLASSES if rank == 1 else 0), 5)
        evaluate_zero_shot(toy_encoder, bad, class_rows, group=group)
    except ValueError as error:
        results["error"] = str(error)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_ranks_give_the_result_of_one(tmp_path):
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]

    images, labels = toy_data()
    class_rows = class_embeddings(ToyTower(), NAMES, TEMPLATES)
    expected = evaluate_zero_shot(toy_encoder, batches_of(images, labels, 10), class_rows)
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results["class_rows"] == class_rows.tolist()
        assert results["uneven"] == expected
        assert results["one rank has none"] == expected
        assert results["one class"] == class_rows[:1].tolist()
        assert results["gathered"] == [[1, 1, 1], [1, 1, 1]]
        assert results["error"] == "5 of 10 labels are outside the 7 classes; use the same class list"


if __name__ == "__main__":
    evaluate_as_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
