"""The held-out images that a report shows: saved at the end of a run, read back for the page."""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image

from ..data.atomic import atomic_file, write_text_atomically
from .charts import number

if TYPE_CHECKING:  # evals loads transformers, which a report does without
    from ..evals.suite import Answer

MAX_IMAGES = 24


def save_gallery(
    run_dir: Path,
    images: torch.Tensor,  # uint8 [n, S, S, 3]
    captions: Sequence[str],  # n true captions
    nearest: Sequence[Sequence[tuple[str, float]]],  # for each image its nearest captions with cosine, best first
) -> None:
    """Write the held-out images that the report shows: `gallery.safetensors` and `gallery.json`.

    Raises ValueError when the shapes or the counts do not agree.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"gallery images must be uint8 [n, S, S, 3], got {images.dtype} {list(images.shape)}")
    if not len(images) == len(captions) == len(nearest):
        raise ValueError(
            f"the gallery needs one caption and one list of nearest captions for each image, got {len(images)} "
            f"images, {len(captions)} captions and {len(nearest)} lists"
        )
    entries = [
        {"caption": caption, "nearest": [{"caption": near, "score": float(score)} for near, score in candidates]}
        for caption, candidates in zip(captions, nearest, strict=True)
    ]
    # The captions go last: the pair is complete when they are there, so old captions never meet new images.
    (run_dir / "gallery.json").unlink(missing_ok=True)
    with atomic_file(run_dir / "gallery.safetensors") as file:
        file.write(safetensors.torch.save({"images": images.detach().cpu().contiguous()}))
    write_text_atomically(run_dir / "gallery.json", json.dumps(entries, indent=1))


def read_gallery(run_dir: Path) -> dict[str, Any] | None:
    """Return what the template shows of the gallery, or None when the run has none."""
    images_path, captions_path = run_dir / "gallery.safetensors", run_dir / "gallery.json"
    if not (images_path.is_file() and captions_path.is_file()):
        return None
    try:
        images = safetensors.numpy.load_file(images_path)["images"]
        entries = [
            (entry["caption"], [(near["caption"], number(near["score"])) for near in entry["nearest"]])
            for entry in json.loads(captions_path.read_text(encoding="utf-8"))
        ]
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"the gallery in {run_dir} is damaged ({error!r}): delete both gallery files") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(entries):
        raise ValueError(
            f"{images_path} must hold uint8 images [{len(entries)}, S, S, 3] to fit {captions_path.name}, "
            f"not {images.dtype} {list(images.shape)}: delete both gallery files"
        )
    cards = [
        _card(image, caption, nearest) for image, (caption, nearest) in zip(images[:MAX_IMAGES], entries, strict=False)
    ]
    return {
        "cards": cards,
        "total": len(entries),
        "first": sum(card["rank"] == 1 for card in cards),
        "found": sum(card["rank"] is not None for card in cards),
    }


def save_answers(run_dir: Path, answers: "Sequence[Answer]") -> None:
    """Write the free texts that the report shows and the images they found: `answers.safetensors` and `.json`."""
    entries = [
        {
            "query": answer.query,
            "images": [
                {"caption": caption, "score": score}
                for caption, score in zip(answer.captions, answer.scores, strict=True)
            ],
        }
        for answer in answers
    ]
    images = {str(index): answer.images.detach().cpu().contiguous() for index, answer in enumerate(answers)}
    (run_dir / "answers.json").unlink(missing_ok=True)  # the texts go last, as in the gallery
    with atomic_file(run_dir / "answers.safetensors") as file:
        file.write(safetensors.torch.save(images))
    write_text_atomically(run_dir / "answers.json", json.dumps(entries, indent=1))


def read_answers(run_dir: Path) -> list[dict[str, Any]]:
    """Return what the template shows of the free texts and the images they found; nothing when the run has none."""
    images_path, texts_path = run_dir / "answers.safetensors", run_dir / "answers.json"
    if not (images_path.is_file() and texts_path.is_file()):
        return []
    try:
        images = safetensors.numpy.load_file(images_path)
        entries = json.loads(texts_path.read_text(encoding="utf-8"))
        return [
            {
                "query": entry["query"],
                "images": [
                    {"image": _data_url(image), "caption": found["caption"], "score": f"{number(found['score']):.3f}"}
                    for image, found in zip(images[str(index)], entry["images"], strict=True)
                ],
            }
            for index, entry in enumerate(entries)
        ]
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"the answers in {run_dir} are damaged ({error!r}): delete both answers files") from error


def _card(image: npt.NDArray[np.uint8], caption: str, nearest: list[tuple[str, float]]) -> dict[str, Any]:
    right = [_same_caption(near, caption) for near, _ in nearest]
    top = max((score for _, score in nearest if score > 0), default=math.inf)
    return {
        "image": _data_url(image),
        "size": image.shape[:2],
        "caption": caption,
        "rank": right.index(True) + 1 if any(right) else None,
        "nearest": [
            {
                "caption": near,
                "right": hit,
                "score": f"{score:.3f}" if math.isfinite(score) else "not finite",
                "share": f"{100 * score / top:.0f}" if 0 < score < math.inf else "0",
            }
            for (near, score), hit in zip(nearest, right, strict=True)
        ],
    }


def _same_caption(left: str, right: str) -> bool:
    return " ".join(left.split()).casefold() == " ".join(right.split()).casefold()


def _data_url(image: npt.NDArray[np.uint8]) -> str:
    """Encode an image as PNG (drawings) or JPEG (photographs), whichever is smaller."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    encoded = Image.fromarray(image)
    encoded.save(png, "png", optimize=True)
    encoded.save(jpeg, "jpeg", quality=88, subsampling=0, optimize=True)
    kind, buffer = min(("png", png), ("jpeg", jpeg), key=lambda file: file[1].tell())
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
