"""Run as a module, this file is one rank of the test: rank, scratch folder."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from textlock.evals import benchmarks, retrieval
from textlock.evals.benchmark_suites import SUITES
from textlock.evals.benchmarks import Evaluator, find_sets
from textlock.evals.retrieval import evaluate_retrieval
from textlock.evals.zero_shot import class_embeddings, evaluate_zero_shot, gather_ragged

from ..data.sets import captioned, labelled, multilabelled, write_set, write_winogavil
from . import test_retrieval, test_zero_shot
from .test_zero_shot import NAMES, TEMPLATES, toy_data
from .toys import ToyTower, random_images, toy_encoder, toy_text

# The images of rank 0; rank 1 has the others.
SHARES = {"uneven": 17, "one rank has none": 47, "the other has none": 0}


def captioned_images():
    images = random_images(47)
    images[20:30] = images[:10]  # ties between ranks
    return images, [[f"caption {n % 31}"] if n % 3 else [f"caption {n}", f"more {n % 4}"] for n in range(47)]


def evaluate(share=slice(None), group=None):
    """Evaluate a share of the images."""
    images, captions = captioned_images()
    found, rows = evaluate_retrieval(
        toy_encoder, toy_text, test_retrieval.batches_of(images[share], captions[share]), group=group
    )
    images, labels, class_rows = toy_data(47)
    batches = test_zero_shot.batches_of(images[share], labels[share]) if len(images[share]) else []
    return found | evaluate_zero_shot(toy_encoder, batches, class_rows, group=group), len(rows.image_rows), rows.keys


def write_sets(root):
    """Write a set of each kind; one has fewer images than batches, one a damaged image and one without a label."""
    write_set(root / "geode", labelled(21, 7, groups=[0, 2]), classes=NAMES)
    write_set(root / "mnist", labelled(1, 3), classes=NAMES[:3])
    write_set(root / "cars", [*labelled(9, 5), {"png": b"<html>", "cls": b"1"}, {"png": b""}], classes=NAMES)
    write_set(root / "voc2007_multilabel", multilabelled(11, 7), kind="multilabel", classes=NAMES)
    write_set(root / "flickr30k", captioned(13), kind="retrieval")
    instances = [(f"cue {n}", [f"image {m}" for m in range(n, n + 10)], [f"image {n}"]) for n in range(5)]
    write_winogavil(root / "winogavil", instances)


def evaluate_sets(root, group=None):
    """Return the outcome of every set."""
    evaluator = Evaluator(toy_encoder, ToyTower(), 2, batch_size=3, group=group)
    return {
        task.key: asdict(evaluator.evaluate(task, layout))
        for suite in SUITES.values()
        for task in suite.tasks
        if (layout := find_sets(suite, root).get(task.key))
    }


def refusals_of_unread_sets(root, rank, group):
    """Evaluate a set that only rank 1 cannot read, and then another, as a suite does."""
    evaluator = Evaluator(toy_encoder, ToyTower(), 2, batch_size=3, group=group)
    layouts = find_sets(SUITES["datacomp"], root)
    tasks = {task.key: task for task in SUITES["datacomp"].tasks}
    if rank:
        layouts["mnist"].shards[0] = root / "not there.tar"
    try:
        evaluator.evaluate(tasks["mnist"], layouts["mnist"])
    except ValueError as error:
        yield str(error), asdict(evaluator.evaluate(tasks["geode"], layouts["geode"]))


def refusal_of(evaluation, *arguments):
    try:
        evaluation(*arguments, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)


def evaluate_as_rank(rank, folder):
    """Evaluate shares of unlike sizes, some of them empty, and what goes wrong on one rank alone."""
    # Several tiles, so that both ranks have some to score.
    retrieval.TILE_ELEMENTS = benchmarks.TILE_ELEMENTS = 200
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    results = {case: evaluate((slice(cut), slice(cut, None))[rank], group) for case, cut in SHARES.items()}
    for count in (7, 1):
        results[f"{count} classes"] = class_embeddings(ToyTower(), NAMES[:count], TEMPLATES, group=group).tolist()
    results["gathered"] = gather_ragged(torch.full((rank * 2, 3), rank), group).tolist()

    sets = Path(folder) / "sets"
    results["sets"] = evaluate_sets(sets, group)
    (results["unread"],) = refusals_of_unread_sets(sets, rank, group)

    def diverged(images):
        return toy_encoder(images) * (rank or float("nan"))

    images, captions = captioned_images()
    batches = test_retrieval.batches_of(images[:5], captions[:5])
    results["diverged"] = refusal_of(evaluate_retrieval, diverged, toy_text, batches)
    images, labels, class_rows = toy_data(5)
    batches = test_zero_shot.batches_of(images, labels + 7 * rank)
    results["labels"] = refusal_of(evaluate_zero_shot, toy_encoder, batches, class_rows)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_ranks_give_the_result_of_one(tmp_path, monkeypatch):
    write_sets(tmp_path / "sets")
    command = [sys.executable, "-m", "textlock.tests.evals.test_two_ranks"]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]

    monkeypatch.setattr(retrieval, "TILE_ELEMENTS", 200)
    expected, _, _ = evaluate()
    assert 0 < expected["mean_recall@1"] < 1 and 0 < expected["zero_shot_top1"] < 1
    class_rows = class_embeddings(ToyTower(), NAMES, TEMPLATES).tolist()
    sets = evaluate_sets(tmp_path / "sets")
    assert [*sets] == ["mnist", "cars", "flickr30k", "winogavil", "geode", "voc2007_multilabel"]
    assert sets["cars"]["counts"] == {"images": 9, "classes": 7, "skipped": {"format": 1, "no-label": 1}}
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for case, cut in SHARES.items():
            figures, images, keys = results.pop(case)
            assert (figures, images, len(keys)) == (expected, *[(cut, 47 - cut)[rank]] * 2), case
        assert results.pop("diverged").startswith("5 of 10 image rows are not finite")
        assert results.pop("sets") == sets
        unread, after = results.pop("unread")
        assert unread.endswith("not there.tar is no file") and after == sets["geode"]
        assert results == {
            "7 classes": class_rows,
            "1 classes": class_rows[:1],
            "gathered": [[1, 1, 1], [1, 1, 1]],
            "labels": "5 of 10 labels are outside the 7 classes; use the same class list",
        }


if __name__ == "__main__":
    evaluate_as_rank(int(sys.argv[1]), sys.argv[2])
