"""Zero-shot classification (CLIP, section 3.1): an image takes the class whose mean prompt embedding is nearest."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Similarities of one tile of queries against the whole gallery: 256 MiB of float32, never the whole matrix.
TILE_ELEMENTS = 2**26


class TextEncoder(Protocol):
    """What zero-shot classification needs of ``models.text.TextTower``."""

    def encode(self, captions: Sequence[str], /) -> Tensor:
        """Return float32 [N, d] unit embeddings."""
        ...


def class_embeddings(
    text_tower: TextEncoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Embed classes as the mean of the unit rows of their prompts, renormalised.

    Args:
        text_tower: the frozen tower; its prefix goes in front of the prompts as it does in front of captions.
        class_names: C names.
        templates: prompts with ``{}`` where the class name goes.
        group: ranks that share the work (all must call); None encodes everything here.

    Returns: float32 [C, d] unit rows, the same on all ranks.

    Raises:
        ValueError: no class, no template, or a template without ``{}``.
    """
    if not class_names or not templates:
        raise ValueError("zero-shot classification needs at least one class and one prompt template")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"prompt template {template!r} has no {{}} where the class name goes")

    mine = class_names if group is None else class_names[dist.get_rank(group) :: dist.get_world_size(group)]
    rows = text_tower.encode([template.replace("{}", name) for name in mine for template in templates])
    rows = F.normalize(rows.view(len(mine), len(templates), rows.shape[-1]).mean(dim=1), dim=-1)  # [C / ranks, d]
    if group is None:
        return rows
    # Rank r holds classes r, r + P, ...: put them back in order.
    ranks = dist.get_world_size(group)
    order = torch.tensor([index for rank in range(ranks) for index in range(rank, len(class_names), ranks)])
    return gather_ragged(rows, group)[order.argsort().to(rows.device)]


def zero_shot_accuracy(
    image_rows: Tensor, labels: Tensor, class_rows: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of images whose own class is among the k nearest classes.

    One ``torch.topk(max(ks))`` an image, as in open_clip and clip_benchmark: ties fall as topk orders them. With fewer
    than k classes the share is 1.

    Args:
        image_rows: [N, d] unit rows.
        labels: int64 [N], the class of each image.
        class_rows: [C, d] unit rows, see ``class_embeddings``.
        ks: numbers of nearest classes that count.

    Returns: ``zero_shot_top{k}`` in [0, 1] for each k.

    Raises:
        ValueError: no image, a label outside [0, C), or a row that is not finite.
    """
    return _to_accuracy(_count(image_rows, labels, class_rows, ks), len(class_rows), ks)


def evaluate_zero_shot(
    encode_images: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    class_rows: Tensor,
    *,
    ks: Sequence[int] = (1, 5),
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Zero-shot accuracy of an image encoder over labelled images: ``zero_shot_accuracy`` batch by batch.

    Args:
        encode_images: uint8 [b, S, S, 3] -> rows [b, d], unit or not.
        batches: of ``.images`` and ``.labels``; with a group, this rank's share of them. Shares may differ in size or
            be empty. Every image counts once, so the number of ranks does not change the result.
        class_rows: [C, d] unit rows.
        ks: numbers of nearest classes that count.
        group: ranks that share the images (all must call); None for one process.

    Returns: ``zero_shot_top{k}`` in [0, 1] for each k, the same on all ranks.

    Raises:
        ValueError: no image, a label outside [0, C), or a row that is not finite, on all ranks alike.
    """
    counts = _count(class_rows[:0], torch.empty(0, dtype=torch.int64), class_rows, ks)
    with torch.no_grad():
        for batch in batches:
            rows = F.normalize(encode_images(batch.images).to(class_rows.device, torch.float32), dim=-1)
            counts += _count(rows, batch.labels, class_rows, ks)
    if group is not None:
        dist.all_reduce(counts, group=group)
    return _to_accuracy(counts, len(class_rows), ks)


def gather_ragged(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, [n, ...] -> [N, ...], in the order of ranks; n may differ between ranks."""
    if group is None:
        return rows
    ranks = dist.get_world_size(group)
    counts = [torch.empty(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=group)
    sizes = [int(count) for count in counts]

    # Collectives want equal shapes: the padding is cut off again right after.
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _count(rows: Tensor, labels: Tensor, class_rows: Tensor, ks: Sequence[int]) -> Tensor:
    """int64 [3 + len(ks)]: images, rows that are not finite, labels out of range, and hits for each k."""
    labels = labels.to(rows.device)
    hits = torch.zeros(len(ks), dtype=torch.int64, device=rows.device)
    step = max(1, TILE_ELEMENTS // len(class_rows))
    for start in range(0, len(rows), step):
        similarity = rows[start : start + step] @ class_rows.T  # [n, C]
        nearest = similarity.topk(min(max(ks), len(class_rows))).indices
        correct = nearest == labels[start : start + step, None]
        hits += torch.stack([correct[:, :k].sum() for k in ks])
    images = torch.tensor(len(rows), device=rows.device)
    not_finite = (~rows.isfinite().all(dim=1)).sum()
    no_class = ((labels < 0) | (labels >= len(class_rows))).sum()
    return torch.cat([torch.stack([images, not_finite, no_class]), hits])


def _to_accuracy(counts: Tensor, classes: int, ks: Sequence[int]) -> dict[str, float]:
    images, not_finite, no_class, *hits = counts.tolist()
    if not images:
        raise ValueError("zero-shot classification was given no image")
    if not_finite:
        raise ValueError(f"{not_finite} of {images} image rows are not finite; the image encoder has diverged")
    if no_class:
        raise ValueError(f"{no_class} of {images} labels are outside the {classes} classes; use the same class list")
    return {f"zero_shot_top{k}": hit / images for k, hit in zip(ks, hits, strict=True)}
