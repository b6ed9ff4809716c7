"""The charts of a report: from the records of a log to the SVG paths and labels that the page's template draws.

Curves are inline SVG coloured by CSS classes, so light and dark need no second drawing and a curve costs a few
kilobytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CURVE_POINTS = 1000
TREND_POINTS = 80
ABSENT = "—"

# The drawing area of a chart, in the units of its SVG; the script reads the same numbers from the page.
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 170
AREA = {"width": 360, "height": 196, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}

# Marks differ in shape and lines in dashes (see the style sheet), so that a series is never known by its colour alone.
MARK_SHAPES = (
    "m-3,0a3,3 0 1 0 6,0a3,3 0 1 0 -6,0z",
    "m-2.8,-2.8h5.6v5.6h-5.6z",
    "m0,-3.8l3.8,3.8l-3.8,3.8l-3.8,-3.8z",
    "m0,-3.6l3.6,6.2h-7.2z",
)

Record = dict[str, Any]
Floats = npt.NDArray[np.float64]


def training_charts(metrics: list[Record]) -> list[Record]:
    """Return the charts of metrics.jsonl in the terms of the template, without those that have no finite value."""
    steps = column(metrics, "step")
    wanted = [
        ("Loss", "loss", False),
        ("Throughput, images/s", "images_per_second", False),
        ("Learning rate", "learning_rate", False),
        ("Logit scale", "logit_scale", False),
        ("Gradient norm", "grad_norm", False),
        ("Waiting for data", "data_wait_fraction", True),
    ]
    charts = [
        _draw_chart(title, [Curve(title, steps, column(metrics, key))], _span(steps), percent=percent)
        for title, key, percent in wanted
    ]
    return [chart for chart in charts if chart]


def evaluation_charts(metrics: list[Record], evaluations: list[Record]) -> list[Record]:
    """Return the charts of evaluations.jsonl over the steps of training, without those that have no finite value."""
    steps = column(evaluations, "step")
    wanted = {
        "Zero-shot accuracy": {
            "zero_shot_top1": "top-1",
            "zero_shot_top5": "top-5",
            "zero_shot_unseen_top1": "unseen, top-1",
            "zero_shot_renamed_top1": "renamed, top-1",
        },
        "Image to text recall": {f"image_to_text_recall@{k}": f"@{k}" for k in (1, 5, 10)},
        "Text to image recall": {f"text_to_image_recall@{k}": f"@{k}" for k in (1, 5, 10)},
    }
    span = _span(np.concatenate([column(metrics, "step"), steps]))
    charts = [
        _draw_chart(
            title,
            [Curve(name, steps, column(evaluations, key)) for key, name in names.items()],
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
    for index, curve in enumerate(finite):
        shown = downsample(curve.steps, curve.values, MAX_CURVE_POINTS)
        line, faint = path(*shown), None
        if len(curve.values) >= 4 * TREND_POINTS and _is_noisy(curve.values):
            line, faint = path(*_trend(curve.steps, curve.values)), line
        shape = MARK_SHAPES[index % len(MARK_SHAPES)]
        marked = len(shown[0]) <= (40 if marks else 1)
        points = zip(x_at(shown[0]), y_at(shown[1]), strict=True) if marked else ()
        series.append(
            {
                "name": curve.name,
                "number": index % len(MARK_SHAPES),
                "last": figure(curve.values[-1], percent=percent),
                "line": line,
                "faint": faint,
                "shape": shape,
                "marks": "".join(f"M{x:.1f},{y:.1f}{shape}" for x, y in points),
            }
        )
    x_ticks = _round_ticks(*span, most=5, whole=True)
    x_ticks = x_ticks[(span[0] <= x_ticks) & (x_ticks <= span[1])]
    return {
        "title": title,
        "series": series,
        "x_ticks": [(f"{x:.1f}", _tick(tick)) for x, tick in zip(x_at(x_ticks), x_ticks, strict=True)],
        "y_ticks": [(f"{y:.1f}", _tick(tick, percent=percent)) for y, tick in zip(y_at(y_ticks), y_ticks, strict=True)],
        "span": span,
        "limits": limits.tolist(),
        "logarithmic": logarithmic,
        "percent": percent,
        "missing": missing,
        "summary": f"{title} from {figure(finite[0].values[0], percent=percent)} to "
        f"{figure(finite[0].values[-1], percent=percent)} over steps {count(span[0])} to {count(span[1])}",
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
    return _round_ticks(low, high, most=4)


def _round_ticks(low: float, high: float, *, most: int, whole: bool = False) -> Floats:
    """Return multiples of a round distance, the least that divides low to high into ``most`` parts or fewer.

    The first is at low or below it, the last at high or above it; with ``whole`` all are whole numbers.
    """
    least = max((high - low) / most, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(least))
    distances = [size * power for size in (1, 2, 2.5, 5, 10) if not whole or (size * power).is_integer()]
    # Quotients that should be whole numbers may miss them by rounding.
    distance = next(distance for distance in distances if distance >= least * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return np.arange(first, last + 1, dtype=np.float64) * distance


def _log_ticks(values: Floats) -> Floats:
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    stride = math.ceil((high - low) / 5)
    return np.power(10.0, np.arange(low, high + stride, stride), dtype=np.float64)


def _span(steps: Floats) -> tuple[float, float]:
    """Return the first and last step, spread by one step each way when they are the same."""
    first, last = float(steps.min()), float(steps.max())
    return (first, last) if last > first else (first - 1, last + 1)


def number(value: object) -> float:
    """Return a JSON number as a float and anything else, null and booleans too, as not-a-number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def column(records: Sequence[Record], key: str) -> Floats:
    """Return the values [n] of one key, not-a-number where it is absent or not finite."""
    values = np.array([number(record.get(key)) for record in records], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def figure(value: float, *, percent: bool = False) -> str:
    """Write a value in four digits or as a percentage; a dash where it is not finite."""
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


def count(value: float) -> str:
    """Write a value as a whole number; a dash where it is not finite."""
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
