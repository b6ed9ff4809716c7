"""Figures of benchmark sets besides accuracy: mean recall over classes, macro F1, worst group, average precision.

Each is what clip_benchmark, scikit-learn or WILDS compute from the same labels and predictions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_per_class_recall(labels: Tensor, predicted: Tensor) -> float:
    """Return the mean, over the classes that occur among the labels, of the share of their images that are found.

    scikit-learn's ``balanced_accuracy_score``, which clip_benchmark calls.

    Args:
        labels: int64 [n], n at least 1.
        predicted: int64 [n].
    """
    return float(_by_class(labels, predicted)[0].mean())


def macro_f1(labels: Tensor, predicted: Tensor) -> float:
    """Return the mean F1 of the classes that occur among the labels: WILDS' ``F1(average="macro")``.

    Args:
        labels: int64 [n], n at least 1.
        predicted: int64 [n].
    """
    return float(_by_class(labels, predicted)[1].mean())


def _by_class(labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Return recall and F1, float64, of each class among the labels."""
    classes = int(max(labels.max(), predicted.max())) + 1
    there = torch.bincount(labels, minlength=classes).double()
    found = torch.bincount(predicted, minlength=classes).double()
    right = torch.bincount(labels[labels == predicted], minlength=classes).double()
    occurs = there > 0
    return (right / there)[occurs], (2 * right / (there + found))[occurs]


def group_accuracies(correct: Tensor, groups: Tensor) -> dict[int, tuple[float, int]]:
    """Return (share that is correct, number of images) of each group that has an image.

    The least of the shares is WILDS' worst-group accuracy.

    Args:
        correct: bool [n].
        groups: int64 [n].
    """
    return {
        group: (correct[groups == group].double().mean().item(), int((groups == group).sum()))
        for group in groups.unique().tolist()
    }


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Return the mean over classes of the average precision: clip_benchmark's ``average_precision_per_class``.

    Precision is taken at every image of the class, in the order of falling scores. A class without an image counts as
    0, as there.

    Args:
        scores: [n, C] on the CPU.
        targets: [n, C], zeros and ones.
    """
    truth = targets.gather(0, scores.sort(dim=0, descending=True).indices).double()
    ranks = torch.arange(1, len(scores) + 1, dtype=torch.float64)[:, None]
    precision = truth.cumsum(dim=0) / ranks
    return float(((precision * truth).sum(dim=0) / truth.sum(dim=0).clamp(min=1)).mean())


def jaccard(chosen: Sequence[int], right: Sequence[int]) -> float:
    """Return how many of two sets' members are in both, as a share of those in either; one of them has a member."""
    return len({*chosen} & {*right}) / len({*chosen} | {*right})
