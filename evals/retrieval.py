"""Image-to-text and text-to-image retrieval: recall@k as CLIP papers and clip_benchmark count it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .zero_shot import TILE_ELEMENTS, gather_ragged


@dataclass(frozen=True)
class RetrievalRows:
    """What this rank encoded, for a report: its images and its distinct captions."""

    image_rows: Tensor
    """float32 [n, d] unit embeddings, one an image."""
    keys: list[str]
    """Sample key of each image."""
    text_rows: Tensor
    """float32 [m, d] unit embeddings, one a distinct caption."""
    captions: list[str]
    """Text of each row of ``text_rows``."""
    pairs: Tensor
    """int64 [p, 2]: (image, caption) positions that belong together, one for each caption of each image."""


def retrieval_recall(
    image_rows: Tensor, text_rows: Tensor, *, text_to_image: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k in both directions: the share of queries with at least one match among the k nearest.

    Equal to clip_benchmark's ``zeroshot_retrieval``, which calls ``torch.topk(k)`` for each k: ties fall as topk orders
    them. An image without a caption is a miss. With fewer than k candidates all of them count.

    Args:
        image_rows: [Ni, d] unit rows.
        text_rows: [Nt, d] unit rows; an image may have several.
        text_to_image: int64 [Nt], the image that each caption belongs to.
        ks: numbers of nearest candidates that count.

    Returns: ``image_to_text_recall@{k}`` and ``text_to_image_recall@{k}`` in [0, 1], and ``mean_recall@1``, the mean of
    both directions, where 1 is among ``ks``.

    Raises:
        ValueError: no image, no caption, an index outside the images, or a row that is not finite.
    """
    if len(text_to_image) != len(text_rows):
        raise ValueError(f"text_to_image has {len(text_to_image)} entries for {len(text_rows)} captions")
    if len(text_to_image) and not 0 <= int(text_to_image.min()) <= int(text_to_image.max()) < len(image_rows):
        raise ValueError(f"text_to_image points outside the {len(image_rows)} images")
    return _recall(image_rows, text_rows, text_to_image.to(image_rows.device), ks, group=None)


def evaluate_retrieval(
    encode_images: Callable[[Tensor], Tensor],
    encode_text: Callable[[list[str]], Tensor],
    batches: Iterable[Any],
    *,
    ks: Sequence[int] = (1, 5, 10),
    group: dist.ProcessGroup | None = None,
) -> tuple[dict[str, float], RetrievalRows]:
    """Measure retrieval recall over images and their captions: what clip_benchmark computes on the same set.

    Every image counts once, and every caption, that of another image of the same words included: its own image is the
    one right answer to it. The right answers to an image are its captions.

    Args:
        encode_images: uint8 [b, S, S, 3] -> rows [b, d], unit or not.
        encode_text: M texts -> rows [M, d], unit or not; no text gives [0, d].
        batches: of ``.images``, ``.captions`` (a list for each image) and ``.keys``; with a group, this rank's share of
            them. Shares may differ in size or be empty. Every image counts once. Where rank 0 has the first share, rank
            1 the next, and so on, the result is that of one process, ties included.
        ks: numbers of nearest candidates that count.
        group: ranks that share the images (all must call); None for one process.

    Returns: ``image_to_text_recall@{k}`` and ``text_to_image_recall@{k}`` in [0, 1] and ``mean_recall@1``, the same on
        all ranks, and this rank's embeddings for a report.

    Raises:
        ValueError: no image, no caption, or a row that is not finite, on all ranks alike.
    """
    image_parts: list[Tensor] = []
    keys: list[str] = []
    texts: dict[str, int] = {}  # distinct caption -> its position
    pairs: list[tuple[int, int]] = []
    with torch.no_grad():
        for batch in batches:
            image_parts.append(F.normalize(encode_images(batch.images).float(), dim=-1))
            for image, captions in enumerate(batch.captions, start=len(keys)):
                pairs += [(image, texts.setdefault(text, len(texts))) for text in captions]
            keys += batch.keys
        text_rows = F.normalize(encode_text(list(texts)).float(), dim=-1)
    # A rank without images learns width and device from the text tower.
    image_rows = torch.cat([part.to(text_rows.device) for part in image_parts] or [text_rows[:0]])
    local_pairs = torch.tensor(pairs, dtype=torch.int64, device=text_rows.device).view(-1, 2)
    mine = RetrievalRows(image_rows, keys, text_rows, list(texts), local_pairs)
    owners, text_rows = local_pairs[:, 0], text_rows[local_pairs[:, 1]]
    if group is not None:
        images = torch.tensor([len(image_rows)], device=owners.device)
        owners = gather_ragged(owners + gather_ragged(images, group)[: dist.get_rank(group)].sum(), group)
        image_rows, text_rows = gather_ragged(image_rows, group), gather_ragged(text_rows, group)
    return _recall(image_rows, text_rows, owners, ks, group), mine


def _recall(
    image_rows: Tensor, text_rows: Tensor, owners: Tensor, ks: Sequence[int], group: dist.ProcessGroup | None
) -> dict[str, float]:
    if not len(image_rows) or not len(text_rows):
        raise ValueError(f"retrieval was given {len(image_rows)} images and {len(text_rows)} captions; it needs both")
    for kind, rows in (("image", image_rows), ("text", text_rows)):
        not_finite = int((~rows.isfinite().all(dim=1)).sum())
        if not_finite:
            raise ValueError(f"{not_finite} of {len(rows)} {kind} rows are not finite; the {kind} encoder has diverged")

    image, text = owners, torch.arange(len(text_rows), device=owners.device)
    hits = torch.stack(
        [
            _count_hits(image_rows, text_rows, image * len(text_rows) + text, ks, group),
            _count_hits(text_rows, image_rows, text * len(image_rows) + image, ks, group),
        ]
    )
    if group is not None:
        dist.all_reduce(hits, group=group)

    image_hits, text_hits = hits.tolist()
    metrics = {f"image_to_text_recall@{k}": hit / len(image_rows) for k, hit in zip(ks, image_hits, strict=True)}
    metrics |= {f"text_to_image_recall@{k}": hit / len(text_rows) for k, hit in zip(ks, text_hits, strict=True)}
    if 1 in ks:
        metrics["mean_recall@1"] = (metrics["image_to_text_recall@1"] + metrics["text_to_image_recall@1"]) / 2
    return metrics


def _count_hits(
    queries: Tensor, gallery: Tensor, matches: Tensor, ks: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Count this rank's queries with a match among the k nearest, int64 [len(ks)].

    ``matches`` holds query * len(gallery) + candidate of every pair that belongs together. Ranks take whole tiles in
    turn, and tiles do not depend on the number of ranks, so neither does a single bit of a similarity.
    """
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    matches = matches.unique()
    hits = torch.zeros(len(ks), dtype=torch.int64, device=queries.device)
    step = max(1, TILE_ELEMENTS // len(gallery))
    for start in range(rank * step, len(queries), ranks * step):
        similarity = queries[start : start + step] @ gallery.T  # [n, G]
        query = torch.arange(start, start + len(similarity), device=queries.device)[:, None]
        for index, k in enumerate(ks):
            nearest = similarity.topk(min(k, len(gallery))).indices  # [n, k]
            hits[index] += torch.isin(query * len(gallery) + nearest, matches, assume_unique=True).any(dim=1).sum()
    return hits
