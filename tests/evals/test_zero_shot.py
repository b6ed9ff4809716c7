import builtins
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from textlock.evals import zero_shot
from textlock.evals.zero_shot import class_embeddings, evaluate_zero_shot, zero_shot_accuracy

from .toys import WIDTH, ToyTower, random_images, toy_encoder, toy_text, unit_rows

NAMES = [f"class {number}" for number in range(7)]
TEMPLATES = ["a photo of a {}", "a drawing of a {} on {}", "{}"]


def toy_data(count=53):
    """Images, labels that their embeddings often, not always, point at, and the embeddings of the classes."""
    images = random_images(count)
    class_rows = class_embeddings(ToyTower(), NAMES, TEMPLATES)
    similarity = F.normalize(toy_encoder(images), dim=-1) @ class_rows.T
    labels = similarity.topk(3).indices[torch.arange(count), torch.arange(count) % 3]
    labels[::11] = similarity.argmin(dim=1)[::11]
    return images, labels, class_rows


def batches_of(images, labels, batch_size=10):
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return [SimpleNamespace(images=some, labels=of_them) for some, of_them in parts]


@pytest.fixture
def clip_benchmark_module(monkeypatch):
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # Its accuracy() calls float() on an array of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(module, "float", lambda value: builtins.float(np.asarray(value).reshape(())), raising=False)
    return module


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("images, classes, ks", [(53, 7, (1, 5)), (200, 40, (1, 5, 10)), (3, 1, (1,))])
def test_accuracy_equals_clip_benchmark_with_any_tile(clip_benchmark_module, monkeypatch, images, classes, ks, ties):
    image_rows, class_rows = unit_rows(images, WIDTH, seed=0), unit_rows(classes, WIDTH, seed=1)
    if ties:  # whole numbers: every product is exact, and few values are possible
        image_rows, class_rows = (image_rows * 3).round(), (class_rows * 3).round()
    labels = torch.randint(0, classes, (images,), generator=torch.Generator().manual_seed(2))
    logits = 100.0 * image_rows @ class_rows.T
    assert (len(logits[0].unique()) < classes) == (ties and classes > 1), "the case is not what its name says"

    accuracies = clip_benchmark_module.accuracy(logits, labels, topk=ks)
    expected = {f"zero_shot_top{k}": value for k, value in zip(ks, accuracies, strict=True)}
    for elements in (zero_shot.TILE_ELEMENTS, 1, 100, classes * images - 1, classes * images):
        monkeypatch.setattr(zero_shot, "TILE_ELEMENTS", elements)
        assert zero_shot_accuracy(image_rows, labels, class_rows, ks) == expected


def test_fewer_classes_than_k_count_in_full():
    rows = unit_rows(3, WIDTH, seed=7)
    assert zero_shot_accuracy(rows, torch.tensor([0, 2, 1]), rows) == {"zero_shot_top1": 1 / 3, "zero_shot_top5": 1.0}


def test_class_embeddings_and_evaluation_equal_clip_benchmark(clip_benchmark_module):
    prompts = []

    def tokenizer(texts):
        prompts.extend(texts)
        return torch.arange(len(prompts) - len(texts), len(prompts))

    model = SimpleNamespace(
        encode_text=lambda tokens: toy_text([prompts[token] for token in tokens]), encode_image=toy_encoder
    )
    templates = [template.replace("{}", "{c}") for template in TEMPLATES]
    classifier = clip_benchmark_module.zero_shot_classifier(model, tokenizer, NAMES, templates, "cpu", amp=False)
    images, labels, class_rows = toy_data()
    assert class_rows.dtype == torch.float32
    torch.testing.assert_close(class_rows, classifier.T, rtol=0, atol=1e-7)

    loader = list(zip(images.split(10), labels.split(10), strict=True))
    logits, target = clip_benchmark_module.run_classification(model, classifier, loader, "cpu", amp=False)
    expected = clip_benchmark_module.accuracy(logits, target, topk=(1, 5))
    result = evaluate_zero_shot(toy_encoder, batches_of(images, labels), class_rows)
    assert result == {"zero_shot_top1": expected[0], "zero_shot_top5": expected[1]}
    assert 0 < result["zero_shot_top1"] < result["zero_shot_top5"] < 1


def test_braces_in_a_class_name_are_kept():
    rows = class_embeddings(ToyTower(), ["a {} b", "{0}"], ["the {}"])
    assert torch.equal(rows, F.normalize(toy_text(["the a {} b", "the {0}"]), dim=-1))


def test_evaluation_keeps_no_graph():
    images, labels, class_rows = toy_data()
    weight = torch.nn.Parameter(torch.ones(()))
    seen = []

    def encode(images):
        seen.append(toy_encoder(images) * weight)
        return seen[-1]

    evaluate_zero_shot(encode, batches_of(images, labels), class_rows)
    assert seen and not any(rows.requires_grad for rows in seen)


@pytest.mark.parametrize(
    ("kept", "broken_rows", "label", "message"),
    [
        (0, [], 0, "no image"),
        (53, [3, 50], 0, "2 of 53 image rows are not finite"),
        (53, [], 7, "1 of 53 labels are outside the 7 classes"),
        (53, [], -1, "1 of 53 labels are outside"),
    ],
    ids=["no image", "diverged", "label", "negative label"],
)
def test_bad_input_is_refused(kept, broken_rows, label, message):
    images, labels, class_rows = toy_data()
    rows = toy_encoder(images)
    rows[broken_rows, 1] = float("nan")
    labels[0] = label
    with pytest.raises(ValueError, match=message):
        zero_shot_accuracy(rows[:kept], labels[:kept], class_rows)


@pytest.mark.parametrize(
    "names, templates, message",
    [([], TEMPLATES, "at least one class"), (NAMES, [], "one prompt template"), (NAMES, ["a {c}"], "has no {} where")],
    ids=["no class", "no template", "no place"],
)
def test_bad_prompts_are_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(ToyTower(), names, templates)
