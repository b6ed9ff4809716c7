"""The report of a run: one self-contained HTML page, made from what the run folder holds.

Curves are inline SVG written by the page template: `matplotlib.ticker` chooses the ticks, CSS classes do the theming,
so light and dark need no second drawing and a curve costs a few kilobytes. Pictures are inline PNG or JPEG. Captions
come from the open web: every text passes through autoescaping, and the page's content security policy allows no
request anywhere and no script but the one below, by its hash.
"""

import base64
import hashlib
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import tyro
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..data.atomic import atomic_file, write_text_atomically

MAX_CURVE_POINTS = 1000
MAX_GALLERY_PICTURES = 24
MAX_CAPTION_LETTERS = 160
TREND_POINTS = 80
ABSENT = "—"

# The drawing area of a chart, in the units of its SVG; the script reads the same numbers from the page.
WIDTH, HEIGHT = 360, 196
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 170

METRIC_LABELS = {
    "zero_shot_top1": "Zero-shot top-1",
    "zero_shot_top5": "Zero-shot top-5",
    "zero_shot_unseen_top1": "Zero-shot top-1, unseen",
    "image_to_text_recall@1": "Image to text, recall@1",
    "image_to_text_recall@5": "Image to text, recall@5",
    "image_to_text_recall@10": "Image to text, recall@10",
    "text_to_image_recall@1": "Text to image, recall@1",
    "text_to_image_recall@5": "Text to image, recall@5",
    "text_to_image_recall@10": "Text to image, recall@10",
    "mean_recall@1": "Mean recall@1",
    "zero_shot_unseen_top5": "Zero-shot top-5, unseen",
}
# Numbers beside the metrics that are facts of the run, not scores of the model.
RUN_KEYS = {"step", "samples_seen", "images_per_second", "wall_seconds", "world_size"}

# Marks differ in shape and lines in dashes (see the style sheet), so that a series is never known by its colour alone.
MARK_SHAPES = ("m-3,0a3,3 0 1 0 6,0a3,3 0 1 0 -6,0z", "m-2.8,-2.8h5.6v5.6h-5.6z", "m0,-3.8l3.8,3.8l-3.8,3.8l-3.8,-3.8z")

Record = dict[str, Any]
Floats = npt.NDArray[np.float64]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files of a finished, running or killed run, and return its path.

    Needs `metrics.jsonl`. A section whose input (`evaluations.jsonl`, `results.json`, `config.yaml`, the gallery) is
    not there is replaced by a sentence. Lines that cannot be read, such as the half-written last line of a killed run,
    are left out and counted on the page. Of two records of one step, which a resumed run writes, the later counts.

    Raises FileNotFoundError without `metrics.jsonl`, ValueError when that file has no record or another is damaged.
    """
    metrics_path = run_dir / "metrics.jsonl"
    if not metrics_path.is_file():
        raise FileNotFoundError(f"{metrics_path} does not exist: give the --run-dir of a training run")
    metrics, unreadable = _read_records(metrics_path)
    if not metrics:
        raise ValueError(f"{metrics_path} holds no logged step yet: wait for the first one and try again")
    evaluations_path = run_dir / "evaluations.jsonl"
    evaluations, unreadable_evaluations = _read_records(evaluations_path) if evaluations_path.is_file() else ([], 0)
    results = _read_results(run_dir / "results.json")
    config_path = run_dir / "config.yaml"

    page = _environment.from_string(_PAGE).render(
        run=run_dir.resolve().name,
        finished=bool(results),
        headlines=_headlines(metrics, evaluations, results),
        training_charts=_training_charts(metrics),
        evaluation_charts=_evaluation_charts(metrics, evaluations),
        scores=_scores(evaluations, results),
        unseen=_unseen_bars(evaluations, results),
        gallery=_read_gallery(run_dir),
        facts=_facts(metrics, results),
        versions=versions if isinstance(versions := results.get("versions"), dict) else {},
        commit=results.get("commit"),
        command=results.get("command"),
        config=config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else None,
        unreadable=unreadable + unreadable_evaluations,
        area={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        style=Markup(_STYLE),
        script=Markup(_SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
    )
    report_path = run_dir / "report.html"
    write_text_atomically(report_path, page)
    return report_path


def save_gallery(
    run_dir: Path,
    images: torch.Tensor,  # uint8 [n, S, S, 3]
    captions: Sequence[str],  # n true captions
    nearest: Sequence[Sequence[tuple[str, float]]],  # for each picture its nearest captions with cosine, best first
) -> None:
    """Write the held-out pictures that the report shows: `gallery.safetensors` and `gallery.json`.

    Raises ValueError when the shapes or the counts do not agree.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"gallery images must be uint8 [n, S, S, 3], got {images.dtype} {list(images.shape)}")
    if not len(images) == len(captions) == len(nearest):
        raise ValueError(
            f"the gallery needs one caption and one list of nearest captions for each picture, got {len(images)} "
            f"pictures, {len(captions)} captions and {len(nearest)} lists"
        )
    entries = [
        {"caption": caption, "nearest": [{"caption": near, "score": float(score)} for near, score in candidates]}
        for caption, candidates in zip(captions, nearest, strict=True)
    ]
    # The captions go last: the pair is complete when they are there, so old captions never meet new pictures.
    (run_dir / "gallery.json").unlink(missing_ok=True)
    with atomic_file(run_dir / "gallery.safetensors") as file:
        file.write(safetensors.torch.save({"images": images.detach().cpu().contiguous()}))
    write_text_atomically(run_dir / "gallery.json", json.dumps(entries, indent=1))


def _read_records(path: Path) -> tuple[list[Record], int]:
    """Return the records of a JSON-lines file in the order of their steps, and how many lines could not be read."""
    by_step: dict[float, Record] = {}
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                unreadable += bool(line.strip())
                continue
            if isinstance(record, dict) and math.isfinite(step := _number(record.get("step"))):
                by_step[step] = record
            else:
                unreadable += 1
    return [by_step[step] for step in sorted(by_step)], unreadable


def _read_results(path: Path) -> Record:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it or evaluate the run again") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} must hold one JSON object, not a {type(results).__name__}: evaluate the run again")
    return results


def _read_gallery(run_dir: Path) -> Record | None:
    """Return what the template shows of the gallery, or None when the run has none."""
    images_path, captions_path = run_dir / "gallery.safetensors", run_dir / "gallery.json"
    if not (images_path.is_file() and captions_path.is_file()):
        return None
    try:
        images = safetensors.numpy.load_file(images_path)["images"]
        entries = [
            (entry["caption"], [(near["caption"], _number(near["score"])) for near in entry["nearest"]])
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
        _gallery_card(image, caption, nearest)
        for image, (caption, nearest) in zip(images[:MAX_GALLERY_PICTURES], entries, strict=False)
    ]
    return {
        "cards": cards,
        "total": len(entries),
        "first": sum(card["rank"] == 1 for card in cards),
        "found": sum(card["rank"] is not None for card in cards),
    }


def _gallery_card(image: npt.NDArray[np.uint8], caption: str, nearest: list[tuple[str, float]]) -> Record:
    right = [_same_caption(near, caption) for near, _ in nearest]
    top = max((score for _, score in nearest if score > 0), default=math.inf)
    return {
        "picture": _data_url(image),
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
    """Encode a picture as PNG (drawings) or JPEG (photographs), whichever is smaller."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture = Image.fromarray(image)
    picture.save(png, "png", optimize=True)
    picture.save(jpeg, "jpeg", quality=88, subsampling=0, optimize=True)
    kind, buffer = min(("png", png), ("jpeg", jpeg), key=lambda encoded: encoded[1].tell())
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _headlines(metrics: list[Record], evaluations: list[Record], results: Record) -> list[Record]:
    """Return the four figures at the top; one that no file holds yet is a dash."""
    speeds = _column(metrics, "images_per_second")
    speed = _number(results.get("images_per_second"))
    if not math.isfinite(speed) and np.isfinite(speeds).any():
        speed = float(np.nanmedian(speeds))
    tiles = [
        ("Zero-shot top-1", _figure(_final("zero_shot_top1", evaluations, results), percent=True)),
        ("Mean recall@1", _figure(_final("mean_recall@1", evaluations, results), percent=True)),
        ("Images per second", _count(speed)),
        ("Wall time", _duration(_final("wall_seconds", evaluations, results))),
    ]
    notes = [
        ("top-5 {}", _figure(_final("zero_shot_top5", evaluations, results), percent=True)),
        ("image to text, recall@5 {}", _figure(_final("image_to_text_recall@5", evaluations, results), percent=True)),
        ("{} on each device", _count(_last(metrics, "images_per_second_per_device"))),
        ("{} samples seen", _count(_last([*metrics, results], "samples_seen"))),
    ]
    return [
        {"label": label, "value": value, "note": sentence.format(note) if note != ABSENT else "not measured"}
        for (label, value), (sentence, note) in zip(tiles, notes, strict=True)
    ]


def _facts(metrics: list[Record], results: Record) -> dict[str, str]:
    """Return what is worth knowing of a run besides its scores, without the facts that were not logged."""
    waits, mfu = _column(metrics, "data_wait_fraction"), _column(metrics, "mfu")
    memory = _column(metrics, "peak_memory_bytes")
    device, devices = results.get("device"), _number(results.get("world_size"))
    facts = {
        "Device": f"{_count(devices)} x {device}" if devices > 1 else device or ABSENT,
        "Steps": _count(_last(metrics, "step")),
        "Samples seen": _count(_last([*metrics, results], "samples_seen")),
        "Epoch": _count(_last(metrics, "epoch")),
        "Last loss": _figure(_last(metrics, "loss")),
        "Model FLOPs utilisation, median": _figure(_median(mfu), percent=True),
        "Waiting for data, median": _figure(_median(waits), percent=True),
        "Peak memory": f"{np.nanmax(memory) / 2**30:.2f} GiB" if np.isfinite(memory).any() else ABSENT,
        "Skipped samples": _count(_last(metrics, "skipped_samples")),
    }
    return {label: value for label, value in facts.items() if value != ABSENT}


def _scores(evaluations: list[Record], results: Record) -> list[Record]:
    """Return one row for each metric of any name: its final value and, where it was once better, the best."""
    keys = [key for record in (results, *evaluations) for key in record if math.isfinite(_number(record[key]))]
    known = [key for key in METRIC_LABELS if key in keys]
    rows = []
    for key in dict.fromkeys([*known, *keys]):
        if key in RUN_KEYS:
            continue
        percent = key in METRIC_LABELS or any(word in key for word in ("top1", "top5", "recall@", "accuracy"))
        final, values = _final(key, evaluations, results), _column(evaluations, key)
        best = int(np.nanargmax(values)) if key in METRIC_LABELS and np.isfinite(values).any() else None
        rows.append(
            {
                "label": METRIC_LABELS.get(key, key),
                "final": _figure(final, percent=percent),
                "best": f"best {_figure(values[best], percent=percent)} at step {_count(evaluations[best]['step'])}"
                if best is not None and values[best] > final
                else "",
            }
        )
    return rows


def _unseen_bars(evaluations: list[Record], results: Record) -> list[Record]:
    keys = ("zero_shot_top1", "zero_shot_unseen_top1")
    values = [_final(key, evaluations, results) for key in keys]
    if not math.isfinite(values[1]):
        return []
    return [
        {"label": label, "value": _figure(value, percent=True), "share": f"{100 * min(max(value, 0), 1):.1f}"}
        for label, value in zip(("Seen", "Unseen"), values, strict=True)
        if math.isfinite(value)
    ]


def _training_charts(metrics: list[Record]) -> list[Record]:
    steps = _column(metrics, "step")
    wanted = [
        ("Loss", "loss", False),
        ("Throughput, images/s", "images_per_second", False),
        ("Learning rate", "learning_rate", False),
        ("Logit scale", "logit_scale", False),
        ("Gradient norm", "grad_norm", False),
        ("Waiting for data", "data_wait_fraction", True),
    ]
    charts = [
        _draw_chart(title, [Curve(title, steps, _column(metrics, key))], _span(steps), percent=percent)
        for title, key, percent in wanted
    ]
    return [chart for chart in charts if chart]


def _evaluation_charts(metrics: list[Record], evaluations: list[Record]) -> list[Record]:
    steps = _column(evaluations, "step")
    wanted = {
        "Zero-shot accuracy": {
            "zero_shot_top1": "top-1",
            "zero_shot_top5": "top-5",
            "zero_shot_unseen_top1": "unseen, top-1",
        },
        "Image to text recall": {f"image_to_text_recall@{k}": f"@{k}" for k in (1, 5, 10)},
        "Text to image recall": {f"text_to_image_recall@{k}": f"@{k}" for k in (1, 5, 10)},
    }
    span = _span(np.concatenate([_column(metrics, "step"), steps]))
    charts = [
        _draw_chart(
            title,
            [Curve(name, steps, _column(evaluations, key)) for key, name in names.items()],
            span,
            percent=True,
            marks=True,
        )
        for title, names in wanted.items()
    ]
    return [chart for chart in charts if chart]


@dataclass(frozen=True)
class Curve:
    """One series of a chart: values over steps, not-a-number where nothing finite was logged."""

    name: str
    steps: Floats  # [n], ascending
    values: Floats  # [n]


def _draw_chart(
    title: str, curves: list[Curve], span: tuple[float, float], *, percent: bool = False, marks: bool = False
) -> Record | None:
    """Return a chart in the terms of the template, or None when it has no finite value.

    Values that are not finite are left out and counted in the note. Noisy curves of many points get a trend, the median
    of neighbouring values, drawn over the faint original. An axis whose greatest value dwarfs the typical one is
    logarithmic, so that a single spike does not flatten the rest.
    """
    missing = sum(int((~np.isfinite(curve.values)).sum()) for curve in curves if np.isfinite(curve.values).any())
    finite = [
        Curve(curve.name, curve.steps[kept], curve.values[kept])
        for curve in curves
        if (kept := np.isfinite(curve.values)).any()
    ]
    if not finite:
        return None
    values = np.concatenate([curve.values for curve in finite])
    logarithmic = bool(values.min() > 0 and values.max() > 30 * np.median(values))
    y_ticks = _log_ticks(values) if logarithmic else _linear_ticks(values)
    limits = np.array([y_ticks[0], y_ticks[-1]])

    def x_at(steps: Floats) -> Floats:
        return LEFT + (steps - span[0]) / (span[1] - span[0]) * (RIGHT - LEFT)

    def y_at(values: Floats) -> Floats:
        low, high = np.log(limits) if logarithmic else limits
        return BOTTOM - ((np.log(values) if logarithmic else values) - low) / (high - low) * (BOTTOM - TOP)

    def path(steps: Floats, values: Floats) -> str:
        return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(x_at(steps), y_at(values), strict=True))

    series = []
    for number, curve in enumerate(finite):
        shown = downsample(curve.steps, curve.values, MAX_CURVE_POINTS)
        line, faint = path(*shown), None
        if len(curve.values) >= 4 * TREND_POINTS and _is_noisy(curve.values):
            line, faint = path(*_trend(curve.steps, curve.values)), line
        shape = MARK_SHAPES[number % len(MARK_SHAPES)]
        marked = len(shown[0]) <= (40 if marks else 1)
        points = zip(x_at(shown[0]), y_at(shown[1]), strict=True) if marked else ()
        series.append(
            {
                "name": curve.name,
                "number": number % len(MARK_SHAPES),
                "last": _figure(curve.values[-1], percent=percent),
                "line": line,
                "faint": faint,
                "shape": shape,
                "marks": "".join(f"M{x:.1f},{y:.1f}{shape}" for x, y in points),
            }
        )
    x_ticks = [tick for tick in MaxNLocator(nbins=5, integer=True).tick_values(*span) if span[0] <= tick <= span[1]]
    return {
        "title": title,
        "series": series,
        "x_ticks": [(f"{x:.1f}", _tick(tick)) for x, tick in zip(x_at(np.array(x_ticks)), x_ticks, strict=True)],
        "y_ticks": [(f"{y:.1f}", _tick(tick, percent=percent)) for y, tick in zip(y_at(y_ticks), y_ticks, strict=True)],
        "span": span,
        "limits": limits.tolist(),
        "logarithmic": logarithmic,
        "percent": percent,
        "missing": missing,
        "summary": f"{title} from {_figure(finite[0].values[0], percent=percent)} to "
        f"{_figure(finite[0].values[-1], percent=percent)} over steps {_count(span[0])} to {_count(span[1])}",
    }


def downsample(steps: Floats, values: Floats, limit: int) -> tuple[Floats, Floats]:
    """Keep at most `limit` points [n] -> [m]: the least and the greatest of each run of neighbours, and both ends.

    Extremes are kept because a spike is what a reader looks for; a mean or every n-th point would lose it.
    """
    if len(values) <= limit:
        return steps, values
    edges = np.linspace(0, len(values), limit // 2).astype(int)
    kept = {0, len(values) - 1}
    for start, stop in pairwise(edges):
        kept |= {start + int(values[start:stop].argmin()), start + int(values[start:stop].argmax())}
    order = sorted(kept)
    return steps[order], values[order]


def _is_noisy(values: Floats) -> bool:
    """Tell whether values [n] wander far more than their range, as a loss does and a schedule does not."""
    return bool(np.abs(np.diff(values)).sum() > 4 * np.ptp(values))


def _trend(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Return the median of values [n] over equal runs of neighbours, at the middle of each run, and both end steps."""
    medians = np.array([np.median(part) for part in np.array_split(values, TREND_POINTS)])
    middles = np.array([part.mean() for part in np.array_split(steps, TREND_POINTS)])
    return np.array([steps[0], *middles, steps[-1]]), np.array([medians[0], *medians, medians[-1]])


def _linear_ticks(values: Floats) -> Floats:
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-4 * max(abs(low), abs(high)):  # else the tick labels would differ beyond their last digit
        margin = 0.1 * abs(low) or 1.0
        low, high = low - margin, high + margin
    elif 0 <= low < 0.5 * high:
        low = 0.0
    return np.asarray(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high), dtype=np.float64)


def _log_ticks(values: Floats) -> Floats:
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    stride = math.ceil((high - low) / 5)
    return np.power(10.0, np.arange(low, high + stride, stride), dtype=np.float64)


def _span(steps: Floats) -> tuple[float, float]:
    """Return the first and last step, spread by one step each way when they are the same."""
    first, last = float(steps.min()), float(steps.max())
    return (first, last) if last > first else (first - 1, last + 1)


def _number(value: object) -> float:
    """Return a JSON number as a float and anything else, null and booleans too, as not-a-number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _column(records: Sequence[Record], key: str) -> Floats:
    values = np.array([_number(record.get(key)) for record in records], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _last(records: Sequence[Record], key: str) -> float:
    values = _column(records, key)
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def _median(values: Floats) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


def _final(key: str, evaluations: list[Record], results: Mapping[str, Any]) -> float:
    """Return a metric from results.json or, before the run has finished, from the last evaluation that has it."""
    value = _number(results.get(key))
    return value if math.isfinite(value) else _last(evaluations, key)


def _figure(value: float, *, percent: bool = False) -> str:
    if not math.isfinite(value):
        return ABSENT
    if percent:
        return f"{100 * value:.1f}%"
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:,.4g}" if abs(value) >= 1e-3 or value == 0 else _scientific(value)


def _scientific(value: float) -> str:
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else ABSENT


def _tick(value: float, *, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.4g}%"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    # Ticks are computed in floating point: what is left of a zero must not read 1e-17.
    if abs(value) < 1e-15:
        return "0"
    return f"{value:.6g}" if abs(value) >= 1e-2 else _scientific(value)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CAPTION_LETTERS else text[: MAX_CAPTION_LETTERS - 1].rstrip() + "…"


_environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_environment.filters["shorten"] = _shorten

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f5f1; --card: #ffffff; --ink: #1b1f24; --soft: #59616b; --rule: #dfddd5; --grid: #ebe9e3;
  --c0: #1f5fbf; --c1: #b4500a; --c2: #0b7566; --right: #0b7566; --wrong: #b03a1d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e9ebee; --soft: #a3abb6; --rule: #333a43; --grid: #2a3038;
    --c0: #7db0ff; --c1: #f5a35c; --c2: #4fd1b5; --right: #4fd1b5; --wrong: #ff9478;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, header, footer { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { font-size: 30px; line-height: 1.15; letter-spacing: -0.02em; margin: 2px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 44px 0 0; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
p { margin: 0; }
.lead { color: var(--soft); margin: 4px 0 14px; max-width: 80ch; text-wrap: pretty; }
.kicker { color: var(--soft); font-size: 13px; letter-spacing: 0.04em; }
.kicker b { color: var(--c0); font-weight: 700; }
.panel + .lead, header + main > .lead { margin-top: 14px; }
.panel { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; border-radius: 4px; }

.headlines { display: grid; grid-template-columns: repeat(4, 1fr); margin: 24px 0 0; overflow: hidden; }
.headlines div { padding: 18px 20px; border-left: 1px solid var(--rule); }
.headlines div:first-child { border-left: 0; }
.headlines dt { color: var(--soft); font-size: 13px; }
.headlines dd { margin: 0; }
.headlines .value {
  font-size: 34px; font-weight: 650; line-height: 1.2; letter-spacing: -0.03em; font-variant-numeric: tabular-nums;
  white-space: nowrap;
}
.headlines .note { color: var(--soft); font-size: 13px; }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.chart { margin: 0; padding: 14px 14px 8px; display: flex; flex-direction: column; }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; padding: 0 4px 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.legend svg { width: 24px; height: 10px; vertical-align: 0; margin-right: 3px; }
.chart .aside { font-weight: 400; color: var(--soft); font-size: 12px; }
.plot { margin-top: auto; position: relative; touch-action: pan-y; cursor: crosshair; }
.plot svg { display: block; width: 100%; height: auto; overflow: visible; }
.grid { stroke: var(--grid); }
.axis { stroke: var(--rule); }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.faint { fill: none; stroke-width: 1; opacity: 0.3; stroke-linejoin: round; }
.s0 { stroke: var(--c0); }
.s1 { stroke: var(--c1); stroke-dasharray: 6 4; }
.s2 { stroke: var(--c2); stroke-dasharray: 1.5 4; }
.m0 { fill: var(--c0); } .m1 { fill: var(--c1); } .m2 { fill: var(--c2); }
.hair { position: absolute; top: 5.1%; bottom: 13.3%; width: 1px; background: var(--soft); }
.hair { display: none; pointer-events: none; }
.hair span {
  position: absolute; top: -8px; left: 0; transform: translateX(-50%); background: var(--ink); color: var(--card);
  border-radius: 4px; padding: 0 5px; font-size: 11px; white-space: nowrap;
}

.bars { padding: 16px 20px; display: grid; gap: 10px; }
.bar { display: grid; grid-template-columns: 64px 1fr 64px; gap: 12px; align-items: center; }
.bar i { display: block; height: 14px; border-radius: 3px; background: var(--c0); min-width: 2px; }
.bar:nth-child(2) i { background: repeating-linear-gradient(135deg, var(--c1) 0 5px, transparent 5px 8px); }
.bar .track { background: var(--grid); border-radius: 3px; }
.bar b { text-align: right; font-variant-numeric: tabular-nums; }

.scores { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); overflow: hidden; }
.scores { margin: 0; gap: 0 16px; }
.scores div { display: flex; justify-content: space-between; gap: 12px; padding: 7px 20px; margin-top: -1px; }
.scores div { border-top: 1px solid var(--grid); }
.scores dt { color: var(--soft); overflow-wrap: anywhere; }
.scores dd { margin: 0; font-weight: 600; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scores small { display: block; font-weight: 400; color: var(--soft); font-size: 12px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 7px 20px; border-top: 1px solid var(--grid); }
tr:first-child > * { border-top: 0; }
th { font-weight: 400; text-align: left; overflow-wrap: anywhere; color: var(--soft); }
td { font-variant-numeric: tabular-nums; text-align: right; font-weight: 600; overflow-wrap: break-word; }

.gallery {
  list-style: none; margin: 0; padding: 0; display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr));
}
.gallery > li { display: grid; grid-template-columns: 112px 1fr; gap: 14px; padding: 14px; align-items: start; }
.gallery img { width: 112px; height: auto; border-radius: 6px; display: block; background: var(--grid); }
.gallery .verdict { font-size: 12px; margin-top: 6px; text-align: center; }
.truth { overflow-wrap: anywhere; line-height: 1.3; font-weight: 600; }
.nearest { list-style: none; margin: 8px 0 0; padding: 0; font-size: 13.5px; }
.nearest li { display: grid; grid-template-columns: 16px 1fr auto; gap: 0 6px; padding: 4px 0 5px; line-height: 1.3; }
.nearest bdi { overflow-wrap: anywhere; min-width: 0; }
.nearest .score { font-variant-numeric: tabular-nums; color: var(--soft); }
.nearest i { grid-column: 2 / -1; height: 3px; border-radius: 2px; background: var(--rule); margin-top: 3px; }
.yes { color: var(--right); } .no { color: var(--wrong); }
.nearest .yes { font-weight: 600; }
.nearest .yes ~ i { background: var(--right); }

.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 16px; }
.facts > * { align-self: start; }
h2 + .facts { margin-top: 14px; }
pre, code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; padding: 14px 18px; overflow-x: auto; }
code { overflow-wrap: anywhere; }
details { margin-top: 16px; }
summary { padding: 10px 18px; cursor: pointer; font-weight: 600; }
details pre { border-top: 1px solid var(--grid); }
footer { color: var(--soft); font-size: 13px; padding-top: 36px; padding-bottom: 40px; }

@media (max-width: 760px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 22px; }
  h1 { font-size: 25px; }
  .headlines { grid-template-columns: 1fr 1fr; }
  .headlines div { padding: 14px 16px; }
  .headlines div:nth-child(odd) { border-left: 0; }
  .headlines div:nth-child(n + 3) { border-top: 1px solid var(--rule); }
  .headlines .value { font-size: 27px; }
  .gallery > li { grid-template-columns: 96px 1fr; }
  .gallery img { width: 96px; }
}
@media print { .panel { break-inside: avoid; } }
"""

# One cross-hair for all charts, moved by pointer or arrow keys. The values are read back from the drawn paths.
_SCRIPT = """
"use strict";
const charts = [...document.querySelectorAll(".chart")].map((figure) => {
  const plot = figure.querySelector(".plot"), numbers = JSON.parse(plot.dataset.chart);
  const lines = [...plot.querySelectorAll(".line")].map((path) =>
    path.getAttribute("d").slice(1).split("L").map((point) => point.split(",").map(Number)));
  const hair = figure.querySelector(".hair"), outputs = [...figure.querySelectorAll(".legend b")];
  return {plot, lines, hair, outputs, last: outputs.map((output) => output.textContent), ...numbers};
});
const figure = (value, percent) => percent ? (100 * value).toFixed(1) + "%"
  : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en")
  : Math.abs(value) >= 1e-3 || value === 0 ? value.toLocaleString("en", {maximumSignificantDigits: 4})
  : value.toExponential(2);
const stepAt = (chart, x) =>
  chart.span[0] + (x - chart.left) / (chart.right - chart.left) * (chart.span[1] - chart.span[0]);
function valueAt(chart, y) {
  const part = (chart.bottom - y) / (chart.bottom - chart.top), [low, high] = chart.limits;
  return chart.logarithmic ? low * (high / low) ** part : low + part * (high - low);
}
function show(step) {
  for (const chart of charts) {
    const share = (step - chart.span[0]) / (chart.span[1] - chart.span[0]);
    const x = chart.left + share * (chart.right - chart.left);
    chart.hair.style.display = share >= 0 && share <= 1 ? "block" : "none";
    chart.hair.style.left = 100 * x / chart.width + "%";
    chart.hair.firstElementChild.textContent = "step " + Math.round(step).toLocaleString("en");
    const texts = chart.lines.map((line) => {
      const [, y] = line.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
      return figure(valueAt(chart, y), chart.percent);
    });
    texts.forEach((text, i) => { chart.outputs[i].textContent = text; });
    chart.plot.setAttribute("aria-valuenow", Math.round(step));
    chart.plot.setAttribute("aria-valuetext", "step " + Math.round(step) + ": " + texts.join(", "));
  }
}
function rest() {
  for (const chart of charts) {
    chart.hair.style.display = "none";
    chart.outputs.forEach((output, i) => { output.textContent = chart.last[i]; });
  }
}
for (const chart of charts) {
  let step = chart.span[1];
  const [first, last] = chart.span;
  const go = (to) => show(step = Math.min(last, Math.max(first, to)));
  chart.plot.setAttribute("role", "slider");
  chart.plot.tabIndex = 0;
  chart.plot.setAttribute("aria-valuemin", first);
  chart.plot.setAttribute("aria-valuemax", last);
  chart.plot.setAttribute("aria-valuenow", last);
  chart.plot.addEventListener("pointermove", (event) => {
    const box = chart.plot.getBoundingClientRect();
    go(stepAt(chart, (event.clientX - box.left) / box.width * chart.width));
  });
  chart.plot.addEventListener("pointerleave", rest);
  chart.plot.addEventListener("blur", rest);
  chart.plot.addEventListener("keydown", (event) => {
    const stride = (last - first) / 100;
    const moves = {ArrowLeft: step - stride, ArrowRight: step + stride, Home: first, End: last};
    if (event.key === "Escape") rest();
    if (!(event.key in moves)) return;
    event.preventDefault();
    go(moves[event.key]);
  });
}
"""

_PAGE = """<!doctype html>
<html lang="en">
{% macro chart_figure(chart) %}
<figure class="chart panel">
<figcaption>
<h3>{{ chart.title }}
{% if chart.logarithmic %}<span class="aside">logarithmic</span>{% endif %}
{% if chart.missing %}<span class="aside">{{ chart.missing }} not finite, left out</span>{% endif %}</h3>
<div class="legend">{% for series in chart.series %}<span>{% if chart.series|length > 1 -%}
<svg viewBox="0 0 24 10" aria-hidden="true"><path class="line s{{ series.number }}" d="M0,5H24"/>\
<path class="m{{ series.number }}" d="M12,5{{ series.shape }}"/></svg>{{ series.name }} {% endif -%}
<b>{{ series.last }}</b></span>{% endfor %}</div>
</figcaption>
<div class="plot" role="img" aria-label="{{ chart.summary }}" data-chart="{{ dict(area, span=chart.span, \
limits=chart.limits, logarithmic=chart.logarithmic, percent=chart.percent)|tojson|forceescape }}">
<svg viewBox="0 0 {{ area.width }} {{ area.height }}" aria-hidden="true">
{% for y, label in chart.y_ticks %}
<path class="grid" d="M{{ area.left }},{{ y }}H{{ area.right }}"/>\
<text class="tick" x="{{ area.left - 8 }}" y="{{ y }}" dy="0.35em" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for x, label in chart.x_ticks %}
<text class="tick" x="{{ x }}" y="{{ area.bottom + 18 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
<text class="tick" x="{{ area.left - 8 }}" y="{{ area.bottom + 18 }}" text-anchor="end">step</text>
<path class="axis" d="M{{ area.left }},{{ area.bottom }}H{{ area.right }}"/>
{% for series in chart.series %}
{% if series.faint %}<path class="faint s{{ series.number }}" d="{{ series.faint }}"/>{% endif %}
<path class="line s{{ series.number }}" d="{{ series.line }}"/>
{% if series.marks %}<path class="m{{ series.number }}" d="{{ series.marks }}"/>{% endif %}
{% endfor %}
</svg>
<div class="hair"><span></span></div>
</div>
</figure>
{% endmacro %}
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{{ script_hash }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ run }} · textlock</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<p class="kicker"><b>textlock</b> training run</p>
<h1>{{ run }}</h1>
<dl class="headlines panel">
{% for headline in headlines %}
<div><dt>{{ headline.label }}</dt>
<dd class="value">{{ headline.value }}</dd><dd class="note">{{ headline.note }}</dd></div>
{% endfor %}
</dl>
</header>
<main>
{% if not finished %}
<p class="lead">No results.json: this run has not finished. The figures above are those logged so far.</p>
{% endif %}
<section aria-labelledby="evaluation">
<h2 id="evaluation">Evaluation</h2>
{% if evaluation_charts %}
<p class="lead">On held-out pictures, over training steps.</p>
<div class="charts">
{% for chart in evaluation_charts %}{{ chart_figure(chart) }}{% endfor %}
</div>
{% else %}
<p class="lead">No evaluations.jsonl with a metric: accuracy and recall over time appear after the first evaluation.</p>
{% endif %}
</section>
{% if unseen %}
<section aria-labelledby="unseen">
<h2 id="unseen">Unseen classes</h2>
<p class="lead">Zero-shot top-1 on classes that no training caption names, such as new pairs of colour and shape.</p>
<div class="bars panel">
{% for bar in unseen %}
<div class="bar"><span>{{ bar.label }}</span><span class="track"><i style="width:{{ bar.share }}%"></i></span>\
<b>{{ bar.value }}</b></div>
{% endfor %}
</div>
</section>
{% endif %}
{% if scores %}
<section aria-labelledby="scores">
<h2 id="scores">All scores</h2>
<p class="lead">At the end of the run, or at the last evaluation of a run that has not finished.</p>
<dl class="scores panel">
{% for row in scores %}
<div><dt>{{ row.label }}</dt><dd>{{ row.final }}{% if row.best %}<small>{{ row.best }}</small>{% endif %}</dd></div>
{% endfor %}
</dl>
</section>
{% endif %}
<section aria-labelledby="gallery">
<h2 id="gallery">Held-out pictures and their nearest captions</h2>
{% if gallery and gallery.cards %}
<p class="lead">The true caption comes first for {{ gallery.first }} of these {{ gallery.cards|length }} pictures and \
is among the nearest shown for {{ gallery.found }}.
{% if gallery.total > gallery.cards|length %}The gallery holds {{ gallery.total }} pictures.{% endif %}</p>
<ul class="gallery">
{% for card in gallery.cards %}
<li class="panel">
<div><img src="{{ card.picture }}" width="{{ card.size[1] }}" height="{{ card.size[0] }}" \
alt="Held-out picture {{ loop.index }}">
{% if card.rank %}<p class="verdict yes">✓ rank {{ card.rank }}</p>
{% else %}<p class="verdict no">✗ not in top {{ card.nearest|length }}</p>{% endif %}</div>
<div><p class="truth"><span class="hidden">True caption: </span><bdi>{{ card.caption|shorten }}</bdi></p>
<ol class="nearest">
{% for near in card.nearest %}
<li><span class="{{ 'yes' if near.right else 'no' }}"><span aria-hidden="true">{{ '✓' if near.right else '✗' }}</span>\
<span class="hidden">{{ 'right' if near.right else 'wrong' }}: </span></span>\
<bdi>{{ near.caption|shorten }}</bdi><span class="score">{{ near.score }}</span>\
<i style="width:{{ near.share }}%"></i></li>
{% endfor %}
</ol></div>
</li>
{% endfor %}
</ul>
{% else %}
<p class="lead">No gallery was saved: it is written at the end of a run that evaluates retrieval.</p>
{% endif %}
</section>
<section aria-labelledby="training">
<h2 id="training">Training</h2>
<p class="lead">One point for each logged step; where a curve is noisy, its running median is drawn over it. \
Point at a chart, or focus one and use the arrow keys, to read all of them at one step.</p>
<div class="charts">
{% for chart in training_charts %}{{ chart_figure(chart) }}{% endfor %}
</div>
</section>
<section aria-labelledby="run">
<h2 id="run">The run</h2>
{% if command or config is not none or commit %}
<p class="lead">
{% if command %}
Command: <code>{{ command }}</code><br>
{% elif config is not none %}
To repeat it, with the configuration below: <code>python train.py --config config.yaml --run-dir NEW_FOLDER</code><br>
{% endif %}
{% if commit %}
Commit: <code>{{ commit }}</code>
{% endif %}
</p>
{% endif %}
<div class="facts">
<div class="panel"><table><tbody>
{% for label, value in facts.items() %}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if versions %}
<div class="panel"><table><tbody>
{% for label, value in versions.items() %}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</div>
{% if config is not none %}
<details class="panel"><summary>Configuration</summary><pre tabindex="0">{{ config }}</pre></details>
{% else %}
<p class="lead">No config.yaml in the run folder: the configuration is not known.</p>
{% endif %}
</section>
</main>
<footer>
{% if unreadable %}
<p>Log lines that could not be read and are left out: {{ unreadable }}. A killed run leaves a half-written one.</p>
{% endif %}
<p>Written by textlock from the files of the run folder. This page loads nothing from anywhere.</p>
</footer>
<script>{{ script }}</script>
</body>
</html>
"""


def main(run_dir: tyro.conf.Positional[Path]) -> None:
    """Write report.html for a run folder, also for a run that is still going or was killed."""
    print(write_report(run_dir))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
