"""Benchmark sets, their figures and their suites, next to the peers' own readers and metrics."""

import io
import json
import re
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from textlock.data.benchmark_sets import read_layout, read_set
from textlock.data.evaluation import iterate_set
from textlock.data.images import eval_image
from textlock.evals.benchmark_metrics import group_accuracies, macro_f1, mean_average_precision, mean_per_class_recall
from textlock.evals.benchmark_report import Results, SuiteRun, read_results
from textlock.evals.benchmark_suites import PAPER, SUITES, Group, Task
from textlock.evals.benchmarks import Evaluator, Outcome, find_sets, read_winogavil
from textlock.evaluate import Arguments

from ..data.sets import captioned, labelled, multilabelled, npy, png, write_set, write_winogavil
from ..data.zoo import encode, photo
from .toys import ToyTower, toy_encoder, toy_text

SIDE = 2
NAMES = ("red fox", "blue car", "tree", "house", "dog", "sunglasses", "sunglasses")
EVALUATOR = Evaluator(toy_encoder, ToyTower(), SIDE, batch_size=4)
ANY = Task("any", "Any")


def pixels(image):
    """What textlock's evaluation makes of an image that a peer has decoded."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return eval_image(buffer.getvalue(), SIDE)


def peer_set(folder):
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    return builder.build_wds_dataset("any", pixels, data_dir=str(folder))


class PeerModel:
    """The toy towers as clip_benchmark calls a model; a tokenizer gives numbers, which are places in ``texts``."""

    def __init__(self):
        self.texts = []

    def tokenize(self, captions):
        self.texts.extend(captions)
        return torch.arange(len(self.texts) - len(captions), len(self.texts))

    def encode_text(self, tokens):
        return toy_text([self.texts[token] for token in tokens.tolist()])

    encode_image = staticmethod(toy_encoder)


def peer_figures(folder, monkeypatch, batch_size=5):
    """The figures of clip_benchmark, whose own top-k accuracy raises with numpy 2.4."""
    zeroshot = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")

    def accuracy(output, target, topk):
        best = output.topk(max(topk)).indices
        return [(best[:, :k] == target[:, None]).any(dim=1).float().mean().item() for k in topk]

    monkeypatch.setattr(zeroshot, "tqdm", iter)
    monkeypatch.setattr(zeroshot, "accuracy", accuracy)
    theirs, model = peer_set(folder), PeerModel()
    loader = torch.utils.data.DataLoader(theirs, batch_size=batch_size)
    return zeroshot.evaluate(model, loader, model.tokenize, theirs.classes, theirs.templates, "cpu", amp=False)


def test_classification_gives_the_samples_and_the_figures_of_clip_benchmark(tmp_path, monkeypatch):
    samples = labelled(41, len(NAMES))
    samples[3] = {"png": png(90), "cls": b" 4\n", "webp": encode(photo(9, 8, seed=3), "WEBP", lossless=True)}
    samples[4] = {"depth.png": png(91), "jpg": encode(photo(9, 8), quality=95), "cls": b"2", "json": b"{}"}
    folder = write_set(tmp_path / "set", samples, classes=NAMES, shards=3)

    found = read_set(read_layout(folder))
    theirs = peer_set(folder)
    assert list(found.layout.classes) == theirs.classes
    assert [text.replace("{}", "{c}") for text in found.layout.templates] == theirs.templates
    ours = [image for batch in iterate_set(found, SIDE, batch_size=4) for image in batch.images]
    for (image, label), our_image, our_label in zip(theirs, ours, found.labels.tolist(), strict=True):
        assert torch.equal(image, our_image) and label == our_label

    expected = peer_figures(folder, monkeypatch)
    outcome = EVALUATOR.evaluate(ANY, found.layout)
    assert outcome.figures.keys() == expected.keys()
    assert outcome.figures == pytest.approx(expected, abs=1e-6)
    assert 0 < outcome.figures["acc1"] < outcome.figures["acc5"] < 1
    assert outcome.counts == {"images": 41, "classes": 7, "skipped": {}} and outcome.complaints == []


def test_with_fewer_than_five_classes_there_is_no_top_five(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", labelled(17, 3), classes=NAMES[:3])
    figures = EVALUATOR.evaluate(ANY, read_layout(folder)).figures
    expected = peer_figures(folder, monkeypatch)
    assert np.isnan(expected.pop("acc5"))
    assert figures == pytest.approx(expected, abs=1e-6)


def test_multilabel_gives_the_average_precision_of_clip_benchmark(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", multilabelled(23, 7), kind="multilabel", classes=NAMES, shards=2)
    task = Task("any", "Any", ("mean_average_precision",), "multilabel")
    outcome = EVALUATOR.evaluate(task, read_layout(folder))
    assert outcome.figures == pytest.approx(peer_figures(folder, monkeypatch), abs=1e-6)
    assert outcome.counts == {"images": 23, "classes": 7, "skipped": {}}


def test_retrieval_gives_the_recall_of_clip_benchmark(tmp_path, monkeypatch):
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    folder = write_set(tmp_path / "set", captioned(27), kind="retrieval", shards=2)
    monkeypatch.setattr(retrieval, "tqdm", iter)
    model = PeerModel()
    loader = torch.utils.data.DataLoader(peer_set(folder), batch_size=5, collate_fn=builder.image_captions_collate_fn)
    theirs = retrieval.evaluate(model, loader, model.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    outcome = EVALUATOR.evaluate(Task("any", "Any", ("mean_recall@1",), "retrieval"), read_layout(folder))
    for k in (1, 5, 10):
        assert outcome.figures[f"text_to_image_recall@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
        assert outcome.figures[f"image_to_text_recall@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
    assert outcome.counts == {"images": 27, "captions": len(model.texts), "skipped": {}}


def test_metrics_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (60,), generator=draw)
    labels[labels == 4] = 3  # a class that is predicted and does not occur
    predicted = torch.where(torch.rand(60, generator=draw) < 0.5, labels, torch.randint(0, 9, (60,), generator=draw))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        recall = metrics.balanced_accuracy_score(labels, predicted)
    assert mean_per_class_recall(labels, predicted) == pytest.approx(recall, abs=1e-12)
    f1 = metrics.f1_score(labels, predicted, average="macro", labels=labels.unique())
    assert macro_f1(labels, predicted) == pytest.approx(f1, abs=1e-12)
    groups = torch.randint(0, 4, (60,), generator=draw) * 2
    for group, (share, images) in group_accuracies(labels == predicted, groups).items():
        of_group = groups == group
        assert share == pytest.approx(metrics.accuracy_score(labels[of_group], predicted[of_group]), abs=1e-12)
        assert images == int(of_group.sum())
    scores, targets = torch.randn(40, 5, generator=draw), torch.randint(0, 2, (40, 5), generator=draw)
    expected = metrics.average_precision_score(targets, scores, average="macro")
    assert mean_average_precision(scores, targets) == pytest.approx(expected, abs=1e-6)
    targets[:, 2] = 0  # counts as 0, as in clip_benchmark
    assert mean_average_precision(scores, targets) < expected * 0.9


@pytest.mark.parametrize("top", [1, 5])
def test_a_figure_of_the_worst_group(tmp_path, top):
    """What WILDS' standard_group_eval gives: the least accuracy of the groups that have an image."""
    metrics = pytest.importorskip("sklearn.metrics")
    names = (*NAMES[:6], "boat")  # scikit-learn counts ties otherwise
    folder = write_set(tmp_path / "set", labelled(60, 7, groups=[0, 2, 5]), classes=names)
    task = Task("any", "Any", ("acc_wg", "F1-macro_all"), group=Group("region", 0, "acc_wg", top))
    outcome = EVALUATOR.evaluate(task, read_layout(folder))

    found = read_set(read_layout(folder))
    rows = torch.nn.functional.normalize(
        torch.cat([toy_encoder(batch.images) for batch in iterate_set(found, SIDE, batch_size=60)]), dim=-1
    )
    texts = [[text.replace("{}", name) for text in found.layout.templates] for name in names]
    classes = torch.stack([torch.nn.functional.normalize(toy_text(some).mean(dim=0), dim=-1) for some in texts])
    logits, groups = rows @ classes.T, found.metadata[:, 0]
    shares = {
        group: metrics.top_k_accuracy_score(
            found.labels[groups == group], logits[groups == group], k=top, labels=range(7)
        )
        for group in (0, 2, 5)
    }
    assert outcome.figures["acc_wg"] == pytest.approx(min(shares.values()))
    assert outcome.groups == {
        f"region {group}": {"share": pytest.approx(share), "images": int((groups == group).sum())}
        for group, share in shares.items()
    }
    f1 = metrics.f1_score(found.labels, logits.argmax(1), average="macro", labels=found.labels.unique())
    assert outcome.figures["F1-macro_all"] == pytest.approx(f1)


@pytest.mark.parametrize("change", [{"npy": None}, {"npy": npy([[1, 2]])}, {"npy": npy([1])}, {"npy": b"no array"}])
def test_a_figure_of_groups_needs_the_group_of_every_image(tmp_path, change):
    samples = labelled(9, 3, groups=[0, 1])
    samples[5] = {name: content for name, content in (samples[5] | change).items() if content is not None}
    layout = read_layout(write_set(tmp_path / "set", samples, classes=NAMES[:3]))
    group = Group("region", 1, "acc_wg")
    with pytest.raises(ValueError, match=r"does not say the region of every image \(a row of numbers in \.npy\)"):
        EVALUATOR.evaluate(Task("any", "Any", ("acc_wg",), group=group), layout)
    assert EVALUATOR.evaluate(ANY, layout).counts["images"] == 9


INSTANCES = [
    ("Bark", [f"image {n}" for n in range(5)], ["image 1", "image 4"]),
    ("ocean", [f"image {n}" for n in range(3, 13)], [f"image {n}" for n in range(4, 10)]),
    ("king", [f"image {n}" for n in range(2, 14)], ["image 2", "image 13"]),
]


def test_winogavil_gives_the_jaccard_index_of_datacomp(tmp_path):
    """DataComp takes the candidates with the greatest similarity, as many as there are associations."""
    metrics = pytest.importorskip("sklearn.metrics")
    layout = read_winogavil(write_winogavil(tmp_path / "winogavil", INSTANCES))
    outcome = EVALUATOR.evaluate(Task("winogavil", "WinoGAViL", kind="winogavil"), layout)
    scores = []
    for (_, candidates, right), prompt in zip(INSTANCES, ["A bark", "An ocean", "A king"], strict=True):
        images = [(layout.folder / "winogavil_images" / f"{name}.jpg").read_bytes() for name in candidates]
        rows = torch.nn.functional.normalize(toy_encoder(torch.stack([eval_image(i, SIDE) for i in images])), dim=-1)
        truth = np.isin(candidates, right)
        chosen = np.argsort((rows @ toy_text([prompt])[0]).numpy())[-truth.sum() :]
        scores.append(metrics.jaccard_score(truth, np.isin(np.arange(len(candidates)), chosen)))
    assert outcome.figures == {
        "avg_jaccard_score": pytest.approx(np.mean(scores)),
        "jaccard_score_5-6": pytest.approx(scores[0]),
        "jaccard_score_10-12": pytest.approx(np.mean(scores[1:])),
    }
    assert 0 < outcome.figures["avg_jaccard_score"] < 1
    assert outcome.counts == {"images": 14, "instances": 3, "skipped": {}}

    (layout.folder / "winogavil_images" / "image 13.jpg").write_bytes(b"<html>")
    outcome = EVALUATOR.evaluate(Task("winogavil", "WinoGAViL", kind="winogavil"), layout)
    assert outcome.counts == {"images": 13, "instances": 2, "skipped": {"format": 1}}
    assert outcome.complaints == [
        "1 of 14 images cannot be read (1 format)", "1 of 3 instances have an image that cannot be read",
    ]  # fmt: skip
    assert outcome.figures["jaccard_score_10-12"] == pytest.approx(scores[1])


def test_what_is_left_out_is_counted_and_said(tmp_path):
    samples = labelled(40, 2)
    samples += [{"png": b"<html>", "cls": b"2"}, {"png": png(1)}, {"cls": b"1"}, {"png": png(2), "cls": b"two"}]
    folder = write_set(tmp_path / "set", samples, classes=NAMES[:3])
    outcome = EVALUATOR.evaluate(ANY, read_layout(folder))
    assert outcome.counts == {
        "images": 40, "classes": 3, "skipped": {"format": 1, "no-label": 1, "no-image": 1, "label": 1}
    }  # fmt: skip
    assert outcome.complaints == [
        "4 of 44 images cannot be read (1 format, 1 label, 1 no-image, 1 no-label)",
        "no image of class tree can be read",
    ]
    tar = folder / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:-12000])
    outcome = EVALUATOR.evaluate(ANY, read_layout(folder))
    assert (
        outcome.counts["images"] < 40 and "0.tar: the" in outcome.complaints[0] and "file ends" in outcome.complaints[0]
    )


def test_a_set_of_other_labels_is_refused(tmp_path):
    folder = write_set(tmp_path / "set", labelled(30, 7), classes=NAMES[:4])
    with pytest.raises(ValueError, match=r"0\.tar: s\d{7}: its class is [456] and classnames\.txt has 4: it is"):
        read_set(read_layout(folder))
    folder = write_set(tmp_path / "many", multilabelled(5, 7), kind="multilabel", classes=NAMES[:4])
    with pytest.raises(ValueError, match="no row of 4 zeros and ones"):
        read_set(read_layout(folder))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("test/nshards.txt", None, "nshards.txt is missing"),
        ("test/nshards.txt", "", "must hold the number of shards"),
        ("test/nshards.txt", "0", "must hold the number of shards"),
        ("test/nshards.txt", "2", "1.tar is missing: test/nshards.txt says that there are 2 shards"),
        ("classnames.txt", None, "classnames.txt is missing"),
        ("classnames.txt", "cat\n\ndog\n", "has no name in line 2"),
        ("classnames.txt", "", "has no name in line 1"),
        ("zeroshot_classification_templates.txt", None, "templates.txt is missing"),
        ("zeroshot_classification_templates.txt", "", "is empty"),
        ("zeroshot_classification_templates.txt", "a photo\n", "has the line 'a photo': each must have {c}"),
        ("zeroshot_classification_templates.txt", "a {c} {d}\n", "and no other braces"),
        ("dataset_type.txt", "captioning", "must hold one of classification, multilabel, retrieval"),
    ],
)
def test_a_layout_that_is_not_whole_is_refused(tmp_path, name, content, message):
    folder = write_set(tmp_path / "set", labelled(3, 3), classes=NAMES[:3])
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_layout(folder)


@pytest.mark.parametrize(
    "row, message",
    [
        ('"[""image 0""]",,"[""image 0""]"', "an instance needs a cue"),
        ('"[""image 0""]",a,"[""image 1""]"', "associations among them"),
        ('"[""../image 0""]",a,"[""../image 0""]"', "candidates must be names of images"),
        ('image 0,a,"[""image 0""]"', "Expecting value"),
        ('"[""image 9""]",a,"[""image 9""]"', "image 9.jpg is missing"),
    ],
)
def test_instances_of_winogavil_that_are_none_are_refused(tmp_path, row, message):
    folder = write_winogavil(tmp_path / "winogavil", INSTANCES[:1])
    (folder / "winogavil_dataset.csv").write_text(f"candidates,cue,associations\n{row}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_winogavil(folder)


def test_sets_are_found_by_the_names_that_peers_give_their_folders(tmp_path):
    suite = SUITES["datacomp"]
    write_set(tmp_path / "wds_vtab-dtd_test", labelled(3, 3), classes=NAMES[:3])
    write_set(tmp_path / "vtab" / "pets", labelled(3, 3), classes=NAMES[:3])
    write_set(tmp_path / "wds_flickr30k", captioned(3), kind="retrieval")
    write_winogavil(tmp_path / "winogavil", INSTANCES)
    (tmp_path / "other").mkdir()
    assert [*find_sets(suite, tmp_path)] == ["vtab/dtd", "vtab/pets", "flickr30k", "winogavil"]
    write_set(tmp_path / "vtab-dtd", labelled(3, 3), classes=NAMES[:3])
    with pytest.raises(ValueError, match=r"wds_vtab-dtd_test and .*/vtab-dtd are both vtab/dtd: keep one"):
        find_sets(suite, tmp_path)
    write_set(tmp_path / "b" / "cars", captioned(3), kind="retrieval")
    with pytest.raises(
        ValueError, match=r"cars is a set of retrieval by its dataset_type.txt, and cars of classification"
    ):
        find_sets(suite, tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="holds no set of the suite: their folders are called wds_vtab-caltech"):
        find_sets(suite, tmp_path / "other")


def test_the_suites_are_those_of_their_authors():
    assert {*SUITES} == {*get_args(get_args(Arguments.__annotations__["suite"])[0])}
    datacomp, clip_benchmark = SUITES["datacomp"], SUITES["clip-benchmark"]
    groups = {average.name: len(datacomp.tasks_of(average)) for average in datacomp.averages}
    assert groups == {"ImageNet dist. shifts": 6, "VTAB": 13, "Retrieval": 3, "Average": 38}
    assert len(datacomp.tasks) == 38 and {task.images is None for task in datacomp.tasks} == {False}
    others = {task.name: task.metrics[0] for task in datacomp.tasks if task.metrics != ("acc1",)}
    recall = "mean_per_class_recall"
    assert others == {
        "Caltech-101": recall, "FGVC Aircraft": recall, "Oxford Flowers-102": recall, "Oxford-IIIT Pet": recall,
        "Flickr": "mean_recall@1", "MSCOCO": "mean_recall@1", "WinoGAViL": "jaccard_score_10-12",
        "iWildCam": "F1-macro_all", "FMoW": "acc_worst_region", "Dollar Street": "acc_top5_wg", "GeoDE": "acc_wg",
    }  # fmt: skip
    (average,) = clip_benchmark.averages
    keys = {task.key for task in clip_benchmark.tasks}
    assert len(clip_benchmark.tasks_of(average)) == 37 and len(keys) == 41
    collection = pytest.importorskip("clip_benchmark.datasets.builder").dataset_collection
    assert {*collection["vtab+"], *collection["retrieval"]} - keys == set()
    assert keys - {*collection["vtab+"], *collection["retrieval"]} == {
        "imagenet-o", "vtab/dsprites_label_y_position"
    }  # fmt: skip


def run_of(suite, layouts=None, **flags):
    layouts = {task.key: SimpleNamespace(folder=task.key, fingerprint=lambda: "as it was") for task in suite.tasks}
    return SuiteRun(suite, layouts, **{"allow_missing": False, **flags})


def measured(task, share, complaints=()):
    return Outcome(dict.fromkeys(task.metrics, share), {"images": task.images or 5}, list(complaints))


def test_averages_and_the_table(tmp_path):
    suite = SUITES["datacomp"]
    run, results = run_of(suite), Results({"suite": "datacomp"})
    for number, task in enumerate(suite.tasks):
        run.store(task, measured(task, number / 100), results, {"step": 2})
    assert results.averages["Average"] == pytest.approx(np.mean([number / 100 for number in range(38)]))
    retrieval = [
        number / 100 for number, task in enumerate(suite.tasks) if task.name in ("Flickr", "MSCOCO", "WinoGAViL")
    ]
    assert results.averages["Retrieval"] == pytest.approx(np.mean(retrieval)) and len(retrieval) == 3
    lines = [re.split(r"\s{2,}", line) for line in run.table(results)]
    assert ["ImageNet 1k", "acc1", "11.00", "71.00", "-60.00", "50,000 images"] in lines
    assert ["CIFAR-10", "acc1", "1.00", "-", "-", "10,000 images"] in lines
    assert ["Average", "average", "18.50", "56.80", "-38.30", "38 tasks"] in lines
    assert ["Average, reported of others: v1 56.7, CLIP ViT-B/16 56.3, Jina CLIP v1 52.2"] in lines

    results.write(tmp_path / "figures.json")
    again = read_results(tmp_path / "figures.json", {"suite": "datacomp"})
    assert again.tasks == results.tasks and run.still_good(again) == [task.key for task in suite.tasks]
    del results.tasks["cifar10"], results.tasks["mnist"]
    results.averages = run.averages(results)
    assert results.averages.keys() == {"ImageNet dist. shifts", "VTAB", "Retrieval"}
    table = "\n".join(run.table(results))
    assert re.search(r"CIFAR-10 +acc1 +- +- +- +not here", table)
    assert re.search(r"Average +average +- +56.80 +- +no average: 36 of 38 tasks are there", table)


def test_stored_figures_stand_only_for_what_they_are_of(tmp_path):
    suite = SUITES["clip-benchmark"]
    run, path = run_of(suite), tmp_path / "figures.json"
    results = Results({"image tower": "a", "precision": "fp32"})
    tasks = {task.key: task for task in suite.tasks}
    for key, complaints in (("mnist", ()), ("cars", ("half of it is lost",)), ("stl10", ())):
        run.store(tasks[key], measured(tasks[key], 0.5, complaints), results, {})
    results.write(path)
    assert run.still_good(results) == ["mnist", "stl10"]
    assert run_of(suite, allow_missing=True).still_good(results) == ["mnist", "cars", "stl10"]
    run.layouts["mnist"].fingerprint = lambda: "changed"
    del run.layouts["stl10"]
    assert run.still_good(results) == ["stl10"]
    table = "\n".join(run.table(results))
    assert re.search(r"stl10 +acc1 .* measured in stl10, which is not under --data now", table)
    with pytest.raises(ValueError, match="holds figures of another image tower and another precision, and they"):
        read_results(path, {"image tower": "b", "precision": "bf16"})
    for content in ("no JSON", "[]", '{"identity": {}, "tasks": {"mnist": {}}}', json.dumps({"zero_shot_top1": 0.5})):
        path.write_text(content)
        with pytest.raises(ValueError, match="holds no figures of a suite: give another --output"):
            read_results(path, {})


def test_what_is_wrong_with_a_set_stops_no_other():
    suite, asked = SUITES["clip-benchmark"], []
    run = run_of(suite)

    def evaluate(task, layout):
        asked.append(task.key)
        if task.key == "mnist":
            raise ValueError("it is damaged")
        if task.key == "gtsrb":
            return Outcome({"acc5": 1.0}, {"images": 1})
        return measured(task, 0.5, ["one is lost"] if task.key == "cars" else [])

    found = [task.key for task, _ in run.outcomes(["stl10"], evaluate)]
    assert asked == [task.key for task in suite.tasks if task.key != "stl10"]
    assert found == [key for key in asked if key not in ("mnist", "cars", "gtsrb")]
    assert run.without == {
        "mnist": "it is damaged",
        "cars": "one is lost: mend it, or take the figure of the rest with --allow-missing",
        "gtsrb": "gtsrb is too small for acc1",
    }
    allowed = run_of(suite, allow_missing=True)
    assert "cars" in [task.key for task, _ in allowed.outcomes([], evaluate)] and [*allowed.without] == [
        "mnist",
        "gtsrb",
    ]


def test_what_is_reported_is_of_the_papers_model():
    for suite in SUITES.values():
        for reported in [*(p for t in suite.tasks for p in t.paper.values()), *(a.paper for a in suite.averages)]:
            assert not reported or (
                next(iter(reported)) == PAPER and all(0 < value < 100 for value in reported.values())
            )
